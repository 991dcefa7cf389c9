"""Attention of any kind, seen by its softmax matrices and by the slopes of its logits.

`observe_blocks` and `observe_slopes` give the symbols of the bounds in `theory/attention_variants.py`, as tensors
that carry gradients where the input does.

Shapes: T tokens, D d_model, H heads, G key/value heads, E head width; t is the query's token and j the key's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from empirics.model import Attention
from empirics.observables import Observed, opnorm


def head_matrices(attention: Attention) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_Q, W_K, W_V (H, E, D) and W_O (H, D, E) of every head."""
    heads, groups, width = attention.n_heads, attention.n_kv_heads, attention.d_head
    query, key, value = (
        linear.weight.view(count, width, -1).repeat_interleave(heads // count, 0)
        for linear, count in ((attention.query, heads), (attention.key, groups), (attention.value, groups))
    )
    return query, key, value, attention.output.weight.view(-1, heads, width).transpose(0, 1)


def logit_slopes(attention: Attention, u_TD: Tensor) -> tuple[Tensor, Tensor]:
    """dl_tj/du_j through the key and dl_tj/du_t through the query, each (H, t, j, D), by automatic differentiation."""
    wanted, length, heads = u_TD.requires_grad, u_TD.shape[0], attention.n_heads
    basis = torch.eye(heads * length, dtype=u_TD.dtype)

    def slopes(summed: Tensor, x_TD: Tensor) -> Tensor:
        (rows,) = torch.autograd.grad(
            summed.flatten(),
            x_TD,
            basis,
            create_graph=wanted,
            retain_graph=True,
            is_grads_batched=True,
            materialize_grads=True,
        )
        return rows.view(heads, length, length, -1)

    with torch.enable_grad():
        by_query, by_key = (u_TD * 1 if wanted else u_TD.detach().requires_grad_() for _ in range(2))
        query = attention.queries_keys_values(by_query[None])[0]
        key = attention.queries_keys_values(by_key[None])[1]
        logits = attention.softmax(query, key)[0][0]
        # A logit knows one token on either side, so that one sweep over a row or a column gives all of its slopes.
        return slopes(logits.sum(-1), by_key), slopes(logits.sum(-2), by_query).transpose(1, 2)


def observe_blocks(attention: Attention, u_TD: Tensor, documents_BT: Tensor | None = None) -> Observed:
    """Norms of the blocks of the Jacobian: values by Kronecker products, keys and queries by their slopes.

    Args:
        documents_BT: of the tokens, (1, T), as `Transformer.documents` has them.
    """
    p_Htj = attention.probabilities(u_TD[None], documents_BT)[1][0]
    _, _, value_HED, output_HDE = head_matrices(attention)
    value_GTE = attention.queries_keys_values(u_TD[None])[2][0]
    value_HTE = value_GTE.repeat_interleave(attention.n_heads // attention.n_kv_heads, 0)
    key_HtjD, query_HtjD = logit_slopes(attention, u_TD)
    written_HTD, mixed_HTD = value_HTE @ output_HDE.mT, p_Htj @ value_HTE @ output_HDE.mT
    moved_HtjD = p_Htj[..., None] * (written_HTD[:, None] - mixed_HTD[:, :, None])
    mean_tj = p_Htj.mean(0)
    return {
        "opnorm_OV": opnorm(attention.output.weight @ value_HED.flatten(0, 1)),
        "opnorm_P_mean": opnorm(mean_tj),
        "P_deviation": opnorm(p_Htj - mean_tj).max(),
        "key_blocks": opnorm(_products(moved_HtjD, key_HtjD)),
        "query_blocks": opnorm(torch.einsum("htjd,htje->tde", moved_HtjD, query_HtjD)).max(),
    }


def _products(left_HtjD: Tensor, right_HtjD: Tensor) -> Tensor:
    """|sum_h left_h right_h'| at every t and j, from triangular factors where there are fewer heads than dimensions."""
    left, right = (x.permute(1, 2, 3, 0) for x in (left_HtjD, right_HtjD))
    if left.shape[-1] < left.shape[-2] and not left.requires_grad:
        left, right = torch.linalg.qr(left, mode="r")[1], torch.linalg.qr(right, mode="r")[1]
    return opnorm(left @ right.mT)


def observe_slopes(attention: Attention, u_TD: Tensor) -> Observed:
    """What the bounds from the weights ask for beside the matrices' norms; of the input its radius alone."""
    _, _, value_HED, output_HDE = head_matrices(attention)
    radius, length = u_TD.norm(dim=-1).max(), u_TD.shape[0]
    key_slope, query_slope = weight_slopes(attention, radius)
    return {
        "heads_OV": opnorm((output_HDE @ value_HED).transpose(0, 1).flatten(1)),
        "key_slope": key_slope,
        "query_slope": query_slope,
        "n_seen": min(attention.window or length, length),
    }


def weight_slopes(attention: Attention, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds on the logits' slopes over all inputs of that radius, through the keys and through the queries."""
    query_HED, key_HED, _, _ = head_matrices(attention)
    if attention.qk_norm == "none" and not attention.rope and not attention.softcap:
        both_HDD = key_HED.mT @ query_HED
        by_key = radius * opnorm(both_HDD.transpose(0, 1).flatten(1))
        if attention.query.bias is not None:
            bias_HE1 = attention.query.bias.view(attention.n_heads, -1, 1)
            by_key = by_key + opnorm((key_HED.mT @ bias_HE1)[..., 0])
        return attention.scale * by_key, attention.scale * radius * opnorm(both_HDD.flatten(0, 1))
    # Turned, capped or normalised: the key's size times the query's slope, and the other way round. A bias no longer
    # cancels between the keys of a row.
    query, query_each = _size(attention, "query", query_HED, radius)
    key, key_each = _size(attention, "key", key_HED, radius)
    return attention.scale * query * key_each, attention.scale * key * query_each


def _size(attention: Attention, name: str, weight_HED: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """The largest that a head's query or key is, and the slope of all heads'."""
    linear, norm = getattr(attention, name), getattr(attention, f"{name}_norm", None)
    slope = opnorm(weight_HED.flatten(0, 1))
    if norm is None:
        bias = 0.0 if linear.bias is None else linear.bias.view(-1, attention.d_head).norm(dim=-1)
        count = linear.weight.shape[0] // attention.d_head
        return (opnorm(linear.weight.view(count, attention.d_head, -1)) * radius + bias).max(), slope
    gain = norm.weight.abs().max()
    shift = getattr(norm, "bias", None)
    size = gain * math.sqrt(norm.weight.numel()) + (0.0 if shift is None else shift.norm())
    return size, slope * gain / math.sqrt(norm.eps)  # the least that it divides by
