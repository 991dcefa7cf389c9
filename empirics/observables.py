"""Values of the theory's symbols and the true norms, on one sub-layer with any weights and any input.

This is the bench on which every `upper` statement is attacked: `observe_*` gives what a bound is
evaluated at, `true_*` the explicit Jacobian's largest singular value. They share no formula.

All of them are tensors. If the input asks for gradients they carry them, to the input and to the weights that ask
for them too, so that an attack can climb the ratio of truth to bound.

Shapes: T tokens, D d_model, H heads, G key/value heads, E head width; a `j` or `t` before a letter is the key's
or the query's token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from empirics.model import Attention, Experts, FeedForward, rotate
from empirics.probes import PlainAttention

Observed = dict[str, Any]


def opnorm(matrix: Tensor) -> Tensor:
    """Largest singular value, of each matrix of a stack."""
    return torch.linalg.matrix_norm(matrix, ord=2)


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The explicit Jacobian as an (outputs, inputs) matrix; it can be differentiated again if x asks for gradients."""
    wanted = x.requires_grad
    with torch.enable_grad():
        x = x if wanted else x.detach().requires_grad_()
        out = function(x).reshape(-1)
        basis = torch.eye(out.numel(), dtype=out.dtype)
        (rows,) = torch.autograd.grad(out, x, basis, create_graph=wanted, is_grads_batched=True, materialize_grads=True)
    return rows.reshape(out.numel(), x.numel())


def true_opnorm(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """|d function / d x| over everything at once."""
    return opnorm(jacobian(function, x))


def true_each_token(function: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
    """(T,) |d function / d x| of each token, for a function of each token by itself."""
    return opnorm(vmap(jacrev(function))(x_TD))


def true_tokenwise(function: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
    """The largest of them."""
    return true_each_token(function, x_TD).max()


def observe_norm(norm: nn.Module, x_TD: Tensor) -> Observed:
    """`gain`, and `s` the smallest normaliser sqrt(var + eps) or sqrt(mean square + eps) over tokens."""
    gain, eps = norm.weight, norm.eps
    square = x_TD.var(-1, unbiased=False) if isinstance(norm, nn.LayerNorm) else x_TD.square().mean(-1)
    return {"gain": gain.abs().max(), "s": (square.min() + eps).sqrt()}  # type: ignore[operator, union-attr]


def true_feedforward(feedforward: FeedForward, u_TD: Tensor) -> Tensor:
    """Largest over tokens of |d FFN / d u|; the sequence's Jacobian is block-diagonal."""
    return true_tokenwise(feedforward, u_TD)


def observe_feedforward(feedforward: FeedForward, u_TD: Tensor) -> Observed:
    enter, leave = feedforward.enter, feedforward.leave
    values = {"opnorm_1": opnorm(enter.weight), "opnorm_2": opnorm(leave.weight)}
    if feedforward.gate is not None:
        values["opnorm_13"] = opnorm(torch.cat([enter.weight, feedforward.gate.weight]))
        z = enter(u_TD)
        slope, active = _slope(feedforward.activation, z), feedforward.activation(z)
        values["gate_slope"] = (slope * feedforward.gate(u_TD)).hypot(active).max()
    return values


def observe_open_units(feedforward: FeedForward, u_TD: Tensor) -> Observed:
    """Norms of the two matrices with each unit's share of its slope, largest over tokens; nothing with a gate."""
    if feedforward.gate is not None:
        return {}
    sizes_TM = _slope(feedforward.activation, feedforward.enter(u_TD)).abs()
    roots_TM = _root(sizes_TM)  # of a closed unit: held at 0
    return {
        "open_1": torch.stack([opnorm(root_M[:, None] * feedforward.enter.weight) for root_M in roots_TM]).max(),
        "open_2": torch.stack([opnorm(feedforward.leave.weight * root_M) for root_M in roots_TM]).max(),
    }


def _root(x: Tensor) -> Tensor:
    """Square roots; that of 0 has no derivative, and is held at 0, or a climb would see nothing of the others."""
    return torch.where(x > 0, x.clamp(min=torch.finfo(x.dtype).tiny).sqrt(), 0.0)


def observe_reach(module: nn.Module, u_TD: Tensor) -> Observed:
    """The longest token of the input."""
    return {"R": u_TD.norm(dim=-1).max()}


def true_experts(experts: Experts, u_TD: Tensor) -> Tensor:
    """Largest over tokens of |d Experts / d u|; one token after another, since each has a routing of its own."""
    return torch.stack([true_opnorm(experts, u_D[None]) for u_D in u_TD]).max()


def observe_experts(experts: Experts, u_TD: Tensor) -> Observed:
    rows = experts.router.weight
    return {
        "expert_jacobian": torch.stack([true_feedforward(expert, u_TD) for expert in experts.each]).max(),
        "expert_output": torch.stack([expert(u_TD).norm(dim=-1).max() for expert in experts.each]).max(),
        # Not torch.cdist, whose gradient at distance 0 is not a number.
        "router_spread": (rows[:, None] - rows).square().sum(-1).max().sqrt(),
    }


def _slope(activation: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    wanted = z.requires_grad
    with torch.enable_grad():
        z = z if wanted else z.detach().requires_grad_()
        return torch.autograd.grad(activation(z).sum(), z, create_graph=wanted)[0]


def true_attention(attention: Attention, u_TD: Tensor) -> Tensor:
    """|d Attn / d u| over the whole sequence, T D by T D."""
    return true_opnorm(PlainAttention(attention), u_TD[None])


def true_probability(attention: Attention, u_TD: Tensor) -> Tensor:
    """Largest norm over heads of the softmax matrix."""
    return opnorm(attention.probabilities(u_TD[None])[1][0]).max()


def true_half_layer(branch: Callable[[Tensor], Tensor], norm: nn.Module, x_TD: Tensor) -> Tensor:
    """|I + J| of residual plus branch, over the whole sequence."""
    return true_opnorm(lambda x: x + branch(norm(x)), x_TD)


def observe_attention(attention: Attention, u_TD: Tensor, documents_BT: Tensor | None = None) -> Observed:
    """Every attention symbol; R and the logit spread are those of this input, and of its documents (1, T) if given."""
    return {
        **observe_attention_weights(attention, u_TD),
        **observe_softmax(attention, u_TD, documents_BT),
        **observe_covariances(attention, u_TD, documents_BT),
    }


def observe_attention_weights(attention: Attention, u_TD: Tensor) -> Observed:
    """Norms of the matrices, the radius R of the input, and the sizes."""
    heads, groups, width = attention.n_heads, attention.n_kv_heads, attention.d_head
    group = heads // groups
    query_H = opnorm(attention.query.weight.view(heads, width, -1))
    key_H = opnorm(attention.key.weight.view(groups, width, -1)).repeat_interleave(group)
    value_H = opnorm(attention.value.weight.view(groups, width, -1)).repeat_interleave(group)
    radius = u_TD.norm(dim=-1).max()
    if attention.query.bias is not None:
        query_H = query_H + _over(attention.query.bias.view(heads, -1).norm(dim=1), radius)
    if attention.rope and attention.key.bias is not None:  # without RoPE it is the same for all keys and cancels
        key_H = key_H + _over(attention.key.bias.view(groups, -1).norm(dim=1), radius).repeat_interleave(group)
    return {
        "opnorm_Q": opnorm(attention.query.weight),
        "opnorm_K": opnorm(attention.key.weight),
        "opnorm_V": opnorm(attention.value.weight),
        "opnorm_O": opnorm(attention.output.weight),
        "opnorm_VH": math.sqrt(group) * opnorm(attention.value.weight),  # a group's rows repeated for its heads
        "head_VQ": (value_H * query_H).max(),
        "head_VK": (value_H * key_H).max(),
        "R": radius,
        "d_head": attention.scale**-2 if attention.scale else math.inf,  # the bounds' 1/sqrt(d_h) is the logits' scale
        "kv_group": group,
        "n_tokens": u_TD.shape[0],
    }


def _over(bias: Tensor, radius: Tensor) -> Tensor:
    """A bias over the radius; both meet R^2 in the bounds, so that at R = 0 nothing of the bias is left."""
    return bias / radius if radius.item() > 0 else torch.zeros_like(bias)


def observe_softmax(attention: Attention, u_TD: Tensor, documents_BT: Tensor | None = None) -> Observed:
    """The largest spread of a row's logits, and the largest softmax matrix."""
    logits, probabilities = attention.probabilities(u_TD[None], documents_BT)
    hidden = ~attention.seen(u_TD.shape[0], u_TD.device, documents_BT=documents_BT)
    highest = logits.masked_fill(hidden, -math.inf).amax(-1)
    lowest = logits.masked_fill(hidden, math.inf).amin(-1)
    return {
        "logit_spread": (highest - lowest).max(),
        "opnorm_P": opnorm(probabilities[0]).max(),
        "n_tokens": u_TD.shape[0],
    }


def observe_covariances(attention: Attention, u_TD: Tensor, documents_BT: Tensor | None = None) -> Observed:
    """max_j |B_j|^(1/2) and max over h, t of |Cov_t(v, k)|, keys rotated into the frame of the query at t."""
    heads, groups, width, length = attention.n_heads, attention.n_kv_heads, attention.d_head, u_TD.shape[0]
    group = heads // groups

    def split(rows: Tensor, count: int) -> Tensor:
        return rows.view(length, count, -1).transpose(0, 1).repeat_interleave(heads // count, 0)

    p_HtT = attention.probabilities(u_TD[None], documents_BT)[1][0]
    query_HTE, key_HTE = split(attention.query(u_TD), heads), split(attention.key(u_TD), groups)
    value_HTE = split(attention.value(u_TD), groups)
    key_HED = attention.key.weight.view(groups, width, -1).repeat_interleave(group, 0)
    key_HtTE, query_HtTE = key_HTE[:, None], query_HTE[:, :, None]
    if attention.rope:
        # R_t' R_j k_j and R_j' R_t q_t: undo the rotation at one token after that at the other.
        cosine, sine = attention.rotary_table(length, u_TD.device, u_TD.dtype)
        at_t = cosine[:, None], sine[:, None]
        key_HtTE = rotate(rotate(key_HtTE, cosine, sine), at_t[0], -at_t[1])
        query_HtTE = rotate(rotate(query_HtTE, *at_t), cosine, -sine)
    centred_HtTE = value_HTE[:, None] - (p_HtT @ value_HTE)[:, :, None]
    weighted = p_HtT[..., None] * centred_HtTE
    spread_Ht = opnorm(weighted.mT @ centred_HtTE)
    query_term = opnorm(weighted.mT @ (key_HtTE - p_HtT[..., None, :] @ key_HtTE)).max()
    a_HtTD = query_HtTE @ key_HED[:, None] * attention.scale
    a_HtTD = a_HtTD.expand(heads, length, length, -1)
    blocks = torch.einsum("htj,htjd,htje->jde", spread_Ht[..., None] * p_HtT, a_HtTD, a_HtTD)
    return {"key_term": _root(opnorm(blocks).max()), "query_term": query_term}
