"""What is kept of attention: of every head's rows the logits' variance and the probabilities' entropy.

A row is a query's; it sees the keys that the mask leaves it. The first row sees one key alone, so that its logits have
no variance and its entropy is 0 whatever the weights: rows of two keys or more count.

Shapes: B batch, T tokens, H heads, E head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, multi_head_attention_forward
from torch.overrides import TorchFunctionMode

from empirics.registry import Unavailable
from empirics.running import outside_modes

LONGEST = 512  # tokens of a long sequence that are judged; no later one changes them
HIDDEN = -5e3  # a logit below it is a mask's: classes fill in -1e4, -1e9, the dtype's lowest or -infinity


class AttentionRows(NamedTuple):
    """Means over rows and sequences, head by head, (H,) each or (layers, H)."""

    variance: Tensor
    entropy: Tensor
    relative: Tensor


@torch.no_grad()
def row_statistics(logits: Tensor, probabilities: Tensor, seen: Tensor) -> AttentionRows:
    """Logit variance, entropy in nats, and entropy over the log of the number of keys seen.

    Args:
        logits, probabilities: (B, H, T, T), of hidden keys any and 0.
        seen: whether a row sees a key; broadcast to them.

    Raises:
        Unavailable: no row sees two keys.
    """
    count = seen.sum(-1)
    rows = count > 1
    if not bool(rows.any()):
        raise Unavailable("no row of attention sees two keys; use more tokens")
    mean = logits.masked_fill(~seen, 0.0).sum(-1) / count.clamp(min=1)
    variance = (logits - mean[..., None]).masked_fill(~seen, 0.0).square().sum(-1) / count.clamp(min=1)
    entropy = torch.special.entr(probabilities).sum(-1)
    relative = entropy / count.clamp(min=2).to(entropy).log()
    n_rows = rows.expand_as(entropy).sum((0, -1))
    return AttentionRows(
        *(x.double().masked_fill(~rows, 0.0).sum((0, -1)) / n_rows for x in (variance, entropy, relative))
    )


class AttentionView(TorchFunctionMode):
    """Sees what the attention that runs inside gives its softmax, whoever wrote it, and changes nothing.

    That is the queries and keys of a fused kernel or of `nn.MultiheadAttention`, or the logits of a softmax over tokens
    by tokens; of the first sequence, and of its first `LONGEST` tokens.

    Args:
        batch_size: sequences of what runs inside.
        show: gets the statistics of each attention that is computed, or why there are none.
    """

    def __init__(self, batch_size: int, show: Callable[[AttentionRows | str], object]) -> None:
        super().__init__()
        self._batch_size, self._show = batch_size, show

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        look = {
            "scaled_dot_product_attention": self._fused,
            "multi_head_attention_forward": self._multi_head,
            "softmax": self._softmax,
        }.get(name)
        if look is not None:
            try:
                with outside_modes():
                    look(*args, **kwargs)
            except (RuntimeError, TypeError, ValueError) as reason:  # whoever is watched must not fail of it
                self._show(str(reason).splitlines()[0])
        return func(*args, **kwargs)

    @torch.no_grad()
    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if query.ndim != 4 or query.shape[-2] != key.shape[-2]:
            return
        query, key = (x.detach()[:1, :, :LONGEST] for x in (query, key))
        query, key = _precise(query), _precise(key)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.mT
        if is_causal:
            logits = logits.masked_fill(~torch.ones_like(logits[0, 0], dtype=torch.bool).tril(), -math.inf)
        if attn_mask is not None:
            mask = attn_mask[:1] if attn_mask.ndim == 4 else attn_mask
            mask = mask[..., : logits.shape[-2], : logits.shape[-1]]
            logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
        self._judge(logits)

    @torch.no_grad()
    def _multi_head(self, query: Tensor, key: Tensor, *more: Any, **named: Any) -> None:
        """`torch.nn.functional.multi_head_attention_forward` of (T, B, D) or (T, D)."""
        parameters = signature(multi_head_attention_forward)
        given = parameters.bind(query, key, *more, **named)
        given.apply_defaults()
        a = given.arguments
        if a["bias_k"] is not None or a["add_zero_attn"] or a["static_k"] is not None or query.shape != key.shape:
            self._show("its nn.MultiheadAttention has keys that are no token's")
            return
        if a["use_separate_proj_weight"]:
            weights = [a["q_proj_weight"], a["k_proj_weight"]]
        else:
            weights = a["in_proj_weight"].chunk(3)[:2]
        biases = [None, None] if a["in_proj_bias"] is None else [_precise(b) for b in a["in_proj_bias"].chunk(3)[:2]]
        n_heads, first = a["num_heads"], slice(1 if query.ndim > 2 else None)
        q, k = (
            linear(_precise(x if x.ndim == 2 else x[:, 0])[:LONGEST], _precise(weight), bias)
            .unflatten(-1, (n_heads, -1))
            .transpose(0, 1)[None]
            for x, weight, bias in zip((query, key), weights, biases)
        )
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        mask, padding = a["attn_mask"], a["key_padding_mask"]
        for hides in (
            None if mask is None else mask[:n_heads][None] if mask.ndim == 3 else mask,
            None if padding is None else padding[first].reshape(1, 1, 1, -1),
        ):
            if hides is not None:
                hides = hides[..., : logits.shape[-2], : logits.shape[-1]]
                logits = logits.masked_fill(hides, -math.inf) if hides.dtype == torch.bool else logits + hides
        self._judge(logits)

    @torch.no_grad()
    def _softmax(self, logits: Tensor, *_: Any, **__: Any) -> None:
        if logits.ndim not in (3, 4) or logits.shape[-1] != logits.shape[-2]:
            return
        first = 1 if logits.ndim == 4 else len(logits) // self._batch_size  # (B H, T, T)
        heads = logits.detach()[:first, ..., :LONGEST, :LONGEST]
        self._judge(heads.reshape(1, -1, *heads.shape[-2:]))

    def _judge(self, logits: Tensor) -> None:
        logits = _precise(logits)
        if logits.isnan().any():
            raise Unavailable("its logits are not finite")
        seen = logits > HIDDEN
        # A row of hidden keys alone, of padding, has no probabilities.
        self._show(row_statistics(logits, logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(), seen))


def _precise(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()
