"""The peer of `training.py`: a GPT-2 and a training loop as people write them, with nothing written down but the loss.

It corresponds to nanoGPT's `model.py` and `train.py` in what they compute and in which order, written anew. The model
has one product for queries, keys and values, `scaled_dot_product_attention` with `is_causal`, learned positions, exact
GELU, a head tied to the token table, and by default LayerNorms and linear layers without biases and no dropout. The
loop has AdamW over two groups (everything with two axes decays), linear warm-up and a cosine to a tenth, gradients
clipped to norm 1 by `clip_grad_norm_`, autocast for bfloat16, the next batch fetched between forward and backward
pass, and the loss read after every step. On CUDA a batch goes through pinned memory while the device works. nanoGPT
asks for the fused form of AdamW on CUDA alone; `fused` does anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Sizes: width, layers, heads, vocabulary, tokens of a sequence, sequences of a batch."""

    d_model: int
    n_layers: int
    n_heads: int
    vocab_size: int
    seq_len: int
    batch_size: int


class Attention(nn.Module):
    """Causal attention whose queries, keys and values are one product."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.enter = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.leave = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = (t.view(batch, length, self.n_heads, -1).transpose(1, 2) for t in self.enter(x).split(width, dim=2))
        mixed = F.scaled_dot_product_attention(*split, is_causal=True)
        return self.leave(mixed.transpose(1, 2).contiguous().view(batch, length, width))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        d = config.d_model
        self.norm_1, self.attention = nn.LayerNorm(d, bias=False), Attention(config)
        self.norm_2 = nn.LayerNorm(d, bias=False)
        self.enter, self.leave = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.leave(F.gelu(self.enter(self.norm_2(x))))


class GPT(nn.Module):
    """Calling it with tokens and targets (B, T) gives the loss."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.seq_len, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model, bias=False)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                depth = math.sqrt(2 * config.n_layers) if name.endswith("leave.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / depth)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class Loop:
    """A training that can be taken a few steps at a time.

    Args:
        corpus: all tokens, one axis.
        steps: of the whole training, which the learning rate depends on.
    """

    def __init__(
        self, config: Config, corpus: np.ndarray, *, precision: str, steps: int, fused: bool, compiled: bool = False,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.config, self.corpus, self.steps, self.done = config, corpus, steps, 0
        self.device = device
        self.model = GPT(config).to(device)
        self.parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=fused or None)
        self.call = torch.compile(self.model) if compiled else self.model
        self.precision = precision
        self.next_batch = self.batch()

    def batch(self) -> tuple[Tensor, Tensor]:
        length = self.config.seq_len
        starts = torch.randint(len(self.corpus) - length, (self.config.batch_size,)).tolist()
        tokens, targets = (
            torch.stack([torch.from_numpy(self.corpus[s + k : s + k + length].astype(np.int64)) for s in starts])
            for k in (0, 1)
        )
        if self.device == "cpu":
            return tokens, targets
        return tuple(part.pin_memory().to(self.device, non_blocking=True) for part in (tokens, targets))

    def rate(self) -> float:
        warmup = max(1, self.steps // 10)
        if self.done < warmup:
            return 1e-3 * (self.done + 1) / (warmup + 1)
        progress = (self.done - warmup) / (self.steps - warmup)
        return 1e-4 + 0.5 * (1 + math.cos(math.pi * progress)) * 9e-4

    def run(self, steps: int) -> float:
        """Some more steps; the last one's loss."""
        lossf = math.nan
        for _ in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate()
            with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16"):
                loss = self.call(*self.next_batch)
            self.next_batch = self.batch()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            lossf = loss.item()
            self.done += 1
        return lossf
