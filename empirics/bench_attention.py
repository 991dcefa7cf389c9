"""The benches of attention: of its probabilities and of its Jacobian."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from empirics import attention_slopes, observables
from empirics.bench_sublayers import UNIT, sequence
from empirics.benches import Bench, Choices, add_bench, small_architecture
from empirics.model import ALL, Attention
from theory.architecture import Norm

ATTENTIONS = {
    "n_kv_heads": (1, 2),
    "kv_group": (1, 2, 3),
    "head_pairs": (1, 2),
    "positions": ("none", "rope", "alibi"),
    # What most models have comes up more often.
    "rope_fraction": (1.0, 1.0, 0.5, 0.25, 0.0),
    "rope_base": (10_000.0, 10_000.0, 2.0),
    "window": (0, 0, 0, 1, 2, 3),
    "qk_norm": ("none", "none", "head", "full"),
    "attention_softcap": (0.0, 0.0, 0.5, 5.0),
    "attention_scale": (None, None, None, None, 0.0, 3.0),
    "causal": (True, False),
}


class FullAttention(Attention):
    """Every token sees every other."""

    def seen(self, length: int, device: torch.device, rows: slice = ALL, documents_BT: Tensor | None = None) -> Tensor:
        """(T, T), true everywhere; of the `rows` alone. There are no documents here."""
        assert documents_BT is None
        return torch.ones(length, length, dtype=torch.bool, device=device)[rows]


def attention_module(choices: Choices) -> Attention:
    """The model's attention, causal or not; `head_pairs` pairs turn where some turn, and else that many coordinates."""
    width, turning = choices["head_pairs"], choices["rope_fraction"]
    if choices["positions"] == "rope":
        width *= round(2 / turning) if turning else 2
    heads = choices["n_kv_heads"] * choices["kv_group"]
    kind = Attention if choices["causal"] else FullAttention
    return kind(small_architecture({**choices, "n_heads": heads, "d_head": width}))


def attention_rounding(attention: Attention, u_TD: Tensor) -> float:
    """v_j - o_t is a difference of numbers of size |W_V| R + |b_V|; a saturated softmax leaves only its rounding."""
    norms = observables.observe_attention_weights(attention, u_TD)
    size_of: dict[str, float] = {}
    slope_of: dict[str, float] = {}
    for name in ("query", "key", "value"):
        linear, norm = getattr(attention, name), getattr(attention, f"{name}_norm", None)
        slope_of[name] = observables.opnorm(linear.weight).item()
        bias = 0.0 if linear.bias is None else linear.bias.norm().item()
        size_of[name] = slope_of[name] * norms["R"].item() + bias
        if norm is not None:  # relative to what it divides by, as for any norm
            rows = linear(u_TD) if attention.qk_norm == "full" else linear(u_TD).unflatten(-1, (-1, attention.d_head))
            observed = observables.observe_norm(norm, rows.flatten(0, -2))
            gain, least = observed["gain"].item(), observed["s"].item()
            slope_of[name] *= gain / least * (1 + size_of[name] / least) ** 2
            shift = getattr(norm, "bias", None)
            size_of[name] = gain * math.sqrt(norm.weight.numel()) + (0.0 if shift is None else shift.norm().item())
    value = size_of["value"]
    slopes = attention.scale * (size_of["query"] * slope_of["key"] + size_of["key"] * slope_of["query"])
    size = math.sqrt(norms["kv_group"] * u_TD.shape[0]) * (norms["opnorm_V"].item() + value * slopes)
    return UNIT * norms["opnorm_O"].item() * size


def attends_apart(attention: Attention, u_TD: Tensor) -> bool:
    """Two tokens a hundredth of the longest one apart, and a row of logits with at least 1 between two of them.

    Without the second, a softmax that is uniform whatever the tokens would count: a fixed average.
    """
    with torch.no_grad():
        apart = torch.cdist(u_TD, u_TD).max() > 0.01 * u_TD.norm(dim=-1).max()
        return bool(apart) and float(observables.observe_softmax(attention, u_TD)["logit_spread"]) >= 1


ATTENTION_SYMBOLS = {
    (
        *("opnorm_Q", "opnorm_K", "opnorm_V", "opnorm_VH", "opnorm_O", "head_VQ", "head_VK"),
        *("R", "d_head", "kv_group", "n_tokens"),
    ): observables.observe_attention_weights,
    ("logit_spread", "opnorm_P"): observables.observe_softmax,
    ("key_term", "query_term"): observables.observe_covariances,
    ("opnorm_OV", "opnorm_P_mean", "P_deviation", "key_blocks", "query_blocks"): attention_slopes.observe_blocks,
    ("heads_OV", "key_slope", "query_slope", "n_seen"): attention_slopes.observe_slopes,
}
ATTENTION_CHOICES = {
    "d_model": tuple(range(1, 7)), "n_tokens": tuple(range(1, 7)), "biases": (False, True), "norm": get_args(Norm),
    "eps": (1e-12, 1e-5, 1e-3, 10.0), **ATTENTIONS,
}  # fmt: skip

add_bench(
    Bench(
        quantity="attention_probability",
        choices=ATTENTION_CHOICES,
        module=attention_module,
        shape=sequence,
        truth=observables.true_probability,
        symbols=ATTENTION_SYMBOLS,
        several=attends_apart,
    )
)
add_bench(
    Bench(
        quantity="attention_jacobian",
        choices=ATTENTION_CHOICES,
        module=attention_module,
        shape=sequence,
        truth=observables.true_attention,
        symbols=ATTENTION_SYMBOLS,
        rounding=attention_rounding,
        several=attends_apart,
    )
)
