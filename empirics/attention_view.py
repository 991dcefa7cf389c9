"""What anyone's attention gives its softmax, seen where torch computes it.

Shapes: B batch, T tokens, H heads, E head width; t rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias
from torch.nn.functional import linear, multi_head_attention_forward
from torch.overrides import TorchFunctionMode

from empirics.attention_masks import NO_BIAS, NOT_FINITE, earlier_keys, hidden_level
from empirics.attention_rows import AttentionRows, precise, row_blocks, row_statistics
from empirics.registry import Unavailable
from empirics.running import first_tensor, outside_modes

HIDING_BIAS = -1e4  # what a mask adds is a bias, as ALiBi's, if it is higher
HIDING_LOGIT = NO_BIAS


class AttentionView(TorchFunctionMode):
    """Sees what the attention that runs inside gives its softmax, whoever wrote it, and changes nothing.

    That is the queries and keys of a fused kernel or of `nn.MultiheadAttention`, or the logits of a softmax over tokens
    by tokens; all rows of the first sequence. What a mask of numbers adds to keys that it does not hide, as ALiBi does,
    is part of the logits; `attention_masks` says which it hides.

    Args:
        batch_size: sequences of what runs inside.
        show: gets the statistics of each attention that is computed, or why there are none.
    """

    def __init__(self, batch_size: int, show: Callable[[AttentionRows | str], object]) -> None:
        super().__init__()
        self._batch_size, self._show = batch_size, show

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        look = {
            "scaled_dot_product_attention": self._fused,
            "multi_head_attention_forward": self._multi_head,
            "softmax": self._softmax,
        }.get(getattr(func, "__name__", ""))
        x = None if look is None else first_tensor((*args, *kwargs.values()))
        if look is not None and x is not None:
            try:
                # Not in a lower precision than the numbers have that are looked at.
                with outside_modes(), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                    look(*args, **kwargs)
            except (RuntimeError, TypeError, ValueError) as reason:  # whoever is watched must not fail of it
                self._show(str(reason).splitlines()[0])
        return func(*args, **kwargs)

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
        q, k = precise(query[0]), precise(key[0])
        k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
        masks: list[Tensor] = []
        if isinstance(attn_mask, CausalBias):
            is_causal = True
        elif attn_mask is not None:
            masks.append(attn_mask[0] if attn_mask.ndim == 4 else attn_mask)
        self._products(q, k, scale, masks, causal=is_causal)

    def _multi_head(self, query: Tensor, key: Tensor, *more: Any, **named: Any) -> None:
        """`torch.nn.functional.multi_head_attention_forward` of (T, B, D) or (T, D)."""
        given = signature(multi_head_attention_forward).bind(query, key, *more, **named)
        given.apply_defaults()
        a = given.arguments
        if a["bias_k"] is not None or a["add_zero_attn"] or a["static_k"] is not None or query.shape != key.shape:
            self._show("its nn.MultiheadAttention has keys that are no token's")
            return
        if a["use_separate_proj_weight"]:
            weights = [a["q_proj_weight"], a["k_proj_weight"]]
        else:
            weights = a["in_proj_weight"].chunk(3)[:2]
        biases = [None, None] if a["in_proj_bias"] is None else [precise(b) for b in a["in_proj_bias"].chunk(3)[:2]]
        n_heads, batched = a["num_heads"], query.ndim > 2
        q, k = (
            linear(precise(x[:, 0] if batched else x), precise(weight), bias)
            .unflatten(-1, (n_heads, -1))
            .transpose(0, 1)
            for x, weight, bias in zip((query, key), weights, biases)
        )
        mask, padding = a["attn_mask"], a["key_padding_mask"]
        hiding = [] if mask is None else [mask[:n_heads] if mask.ndim == 3 else mask]
        hiding += [] if padding is None else [padding[0 if batched else ...][None]]
        self._products(q, k, None, [~x if x.dtype == torch.bool else x for x in hiding])

    def _softmax(self, input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> None:
        if dim is None or input.ndim not in (3, 4) or input.shape[-1] != input.shape[-2]:
            return
        if dim % input.ndim < input.ndim - 2:
            return  # over heads or sequences
        x = input if dim % input.ndim == input.ndim - 1 else input.mT
        # Of (B, H, T, T), or of (B H, T, T).
        heads = precise(x[0] if x.ndim == 4 else x[: len(x) // self._batch_size])
        blocks = list(row_blocks(*heads.shape[:2]))
        level = hidden_level(lambda rows: heads[:, rows], blocks, lowest=HIDING_LOGIT)
        self._judge((heads[:, rows], ~(heads[:, rows] <= level)) for rows in blocks)

    def _products(
        self, q_HTE: Tensor, k_HTE: Tensor, scale: float | None, masks: Sequence[Tensor], causal: bool = False
    ) -> None:
        """Of queries and keys, and masks that broadcast to (H, T, T): of keys that are seen, or added."""
        n_heads, length, width = q_HTE.shape
        q_HTE = q_HTE * (1 / math.sqrt(width) if scale is None else scale)
        masks = [x.broadcast_to(*x.shape[:-2], length, length) for x in masks]
        told, added = ([x for x in masks if (x.dtype == torch.bool) is kind] for kind in (True, False))
        blocks = list(row_blocks(n_heads, length))

        def seen(rows: slice) -> Tensor:
            earlier = earlier_keys(rows, length, q_HTE.device)
            return reduce(torch.logical_and, (x[..., rows, :] for x in told), earlier if causal else earlier | True)

        def bias(rows: slice) -> Tensor:
            total = reduce(torch.add, (precise(x[..., rows, :]) for x in added))
            return total.masked_fill(~seen(rows), -math.inf)

        level = hidden_level(bias, blocks, lowest=HIDING_BIAS) if added else -math.inf

        def block(rows: slice) -> tuple[Tensor, Tensor]:
            keys = slice(rows.stop if causal else None)  # no row sees a later one
            logits = q_HTE[:, rows] @ k_HTE[:, keys].mT
            if not added:
                return logits, seen(rows)[..., keys]
            more = bias(rows)[..., keys]
            return logits + more, ~(more <= level)  # what is no number is seen

        self._judge(map(block, blocks))

    def _judge(self, blocks: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Show the statistics of rows, by blocks of (H, t, keys)."""
        found = row_statistics((logits[None], seen) for logits, seen in blocks)
        if not bool(found.variance.isfinite().all()):
            raise Unavailable(NOT_FINITE)
        self._show(found)
