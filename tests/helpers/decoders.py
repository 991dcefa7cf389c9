"""Decoders written by hand in the manner of well-known trainers, and modules that are none."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCAB, WIDTH, HEADS = 50, 64, 4


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.resid_dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.resid_dropout(self.c_proj(mixed.transpose(1, 2).flatten(2)))


class NanoBlock(nn.Module):
    """Norms as modules, or as functions that no hook can see."""

    def __init__(self, functional_norm: bool) -> None:
        super().__init__()
        if not functional_norm:
            self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.functional_norm = functional_norm
        self.attn = FusedAttention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (
            (lambda y: functional.rms_norm(y, (WIDTH,)),) * 2 if self.functional_norm else (self.ln_1, self.ln_2)
        )
        x = x + self.attn(first(x))
        return x + self.mlp(second(x))


class NanoGPT(nn.Module):
    """A ModuleDict, a tied head assigned to the table, and logits of the last token alone unless there are targets."""

    def __init__(self, *, n_layers: int = 3, functional_norm: bool = False) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, WIDTH),
                "wpe": nn.Embedding(128, WIDTH),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList(NanoBlock(functional_norm) for _ in range(n_layers)),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.1)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        parts = self.transformer
        x = parts["drop"](parts["wte"](idx) + parts["wpe"](torch.arange(idx.shape[1])))
        for block in parts["h"]:
            x = block(x)
        x = parts["ln_f"](x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        return logits, functional.cross_entropy(logits.flatten(0, 1), targets.view(-1))  # viewed, as nanoGPT does


class TitanAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = nn.Linear(WIDTH, WIDTH // 2, bias=False), nn.Linear(WIDTH, WIDTH // 2, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for proj in (self.wq, self.wk, self.wv))
        q, k = (torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turns).flatten(3) for y in (q, k))
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class TitanFeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(WIDTH, 96, bias=False), nn.Linear(WIDTH, 96, bias=False)
        self.w2 = nn.Linear(96, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class TitanBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = TitanAttention(), TitanFeedForward()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), turns)
        return h + self.feed_forward(self.ffn_norm(h))


class Titan(nn.Module):
    """Blocks in a ModuleDict, an untied output and rotations passed beside the stream."""

    def __init__(self, *, n_layers: int = 3) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleDict({str(n): TitanBlock() for n in range(n_layers)})
        self.norm, self.output = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        for n, layer in enumerate(self.layers.values()):
            nn.init.normal_(layer.feed_forward.w2.weight, std=0.02 / math.sqrt(n + 1))

    def forward(self, tokens: Tensor) -> Tensor:
        half = WIDTH // HEADS // 2
        angles = torch.arange(tokens.shape[1])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        turns = torch.polar(torch.ones_like(angles), angles)
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = layer(x, turns)
        return self.output(self.norm(x))


class PlainBlock(nn.Module):
    """Attention and feed-forward in a row, with no shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), FusedAttention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(self.norm(x)))


class Shortcutless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return x @ self.table.weight.T


class Encoder(nn.Module):
    """torch's own layers, which attend by nn.MultiheadAttention, made causal by a mask."""

    def __init__(self, *, norm_first: bool = True, batch_first: bool = True, n_layers: int = 3) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.1, norm_first=norm_first, batch_first=batch_first
        )
        self.table, self.batch_first = nn.Embedding(VOCAB, WIDTH), batch_first
        norm = nn.LayerNorm(WIDTH) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, n_layers, norm=norm, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.table(tokens)
        x = self.encoder(x if self.batch_first else x.transpose(0, 1), mask=mask, is_causal=True)
        return self.head(x if self.batch_first else x.transpose(0, 1))
