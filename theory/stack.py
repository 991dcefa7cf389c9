"""Bounds over the depth of a network, in logarithms: nothing overflows at 10,000 layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.activations import lipschitz, secant
from theory.architecture import Architecture
from theory.arguments import require_failure, require_tokens
from theory.attention import attention_estimate
from theory.attention_variants import attention_general_upper
from theory.bounds_feedforward import ffn_gated_upper_apriori
from theory.experts import experts_upper
from theory.feedforward import ffn_estimate, ffn_gated_estimate, ffn_upper
from theory.forward_pass import ForwardPass, forward_pass
from theory.gram_maps import steepest_alibi_slope
from theory.grams import Gram
from theory.growth import Growth
from theory.initialisation import Stds
from theory.kernels import activation_kernel
from theory.normalisation import norm_jacobian_upper
from theory.random_matrix import cesaro_opnorm, gaussian_opnorm_estimate, gaussian_opnorm_upper
from theory.sublayer_maps import routing

Array = NDArray[np.float64]
FAILURE_PROBABILITY = 1e-6  # of all random events behind a rigorous product together; a convention
_LARGEST_EXPONENT = 700.0  # exp of more overflows a double; every use is under a minimum with a finite bound


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthBound:
    """Branch norms of every half-layer and what they make of the gradient.

    Attributes:
        attention, feedforward: (N,) bound on |J| of each branch in the residual stream, residual multiplier included.
        log10_profile: (places,) log10 of the bound on the gradient norm at each place over that at the last.
    """

    kind: str
    attention: tuple[float, ...]
    feedforward: tuple[float, ...]
    log10_profile: tuple[float, ...]
    assumptions: tuple[str, ...]

    @property
    def log10_product(self) -> float:
        """log10 of the bound on gradient growth."""
        return self.log10_profile[0]


def log_product(branches: Any) -> Array:
    """Log of the product of 1 + |J| from each half-layer to the last, and 0 at the end.

    >>> log_product([0.0, 0.0]).tolist()
    [0.0, 0.0, 0.0]
    """
    return _from_the_end(np.log1p(np.asarray(branches, dtype=np.float64)))


def _from_the_end(logs: Array) -> Array:
    return np.concatenate([np.cumsum(logs[::-1])[::-1], [0.0]])


def _depth_bound(
    kind: str, a: Architecture, attention: Array, feedforward: Array, after: Array, assumptions: tuple[str, ...]
) -> DepthBound:
    """Products over the updates of alpha + sum of their branches; `after` (places - 1,) is post-ln's 1/s."""
    each = np.stack([attention, feedforward], axis=1)
    added = each.sum(axis=1) if a.parallel else each.reshape(-1)
    shortcut = a.shortcut_multiplier
    with np.errstate(divide="ignore"):  # of nothing at all the product is 0, and its logarithm -inf
        logs = np.log1p(added) if shortcut == 1 else np.log(shortcut + added)
    return DepthBound(
        kind=kind,
        attention=tuple(attention.tolist()),
        feedforward=tuple(feedforward.tolist()),
        log10_profile=tuple((_from_the_end(logs + np.log(after)) / math.log(10)).tolist()),
        assumptions=assumptions,
    )


def feedforward_estimate(architecture: Architecture, sigma_xp: float, layer: int = 0) -> float:
    """The paper's eq. (15) of a layer's feed-forward branch, extended to what it does not cover.

    The paper's activation is the identity and has no gate, for which there is `ffn_gated_estimate`. For ReLU squared,
    whose slope grows with its input, the entries of diag(F'(z)) W_1 have variance E[F'^2] sigma_1^2.
    """
    a, stds = architecture, architecture.layer_stds(layer)
    values = {
        "sigma_1": stds.ffn_in, "sigma_2": stds.ffn_out, "sigma_xp": sigma_xp, "d": a.d_model, "d_ffn": a.d_ffn,
    }  # fmt: skip
    variance = np.array(stds.ffn_in**2 * a.d_model)
    value, slope = activation_kernel(a.activation, variance, variance, variance)
    if a.gated:
        values |= {"sigma_3": stds.ffn_gate, "slope_square": slope, "value_square": value}
        return float(ffn_gated_estimate().evaluate(values))
    if a.activation == "relu-squared":
        values["sigma_1"] *= math.sqrt(slope)
    return float(ffn_estimate().evaluate(values))


def input_scales(architecture: Architecture, growth: Growth | ForwardPass) -> Array:
    """(N, 2) what the norm before each sub-layer divides by, attention first; 1 where there is none.

    By standard deviations: the mean of sinusoidal positions, which RMSNorm has in its length, is left out.
    """
    a, std = architecture, np.asarray(growth.residual_std)
    if a.block not in ("pre-ln", "peri-ln"):
        return np.ones((a.n_layers, 2))
    # Parallel sub-layers share their input.
    entering = std[:-1, None].repeat(2, axis=1) if a.parallel else std[:-1].reshape(a.n_layers, 2)
    return np.sqrt(entering**2 + a.eps)


def paper_bound(architecture: Architecture, n_tokens: int, growth: Growth | ForwardPass | None = None) -> DepthBound:
    """The paper's product of eq. (15) and eq. (20) over all layers: an estimate.

    sigma_x and sigma_x' are those that the kernel recursion predicts; |J^Z|, which the paper leaves open, is
    taken at uniform attention, |C_T| |W_V|. For other block layouts than the paper's Pre-LN, a branch is divided by
    the standard deviation that its own norms see, which is the same argument.

    Raises:
        ValueError: n_tokens is below 1 or beyond the learned positions.
    """
    a = architecture
    n_tokens = require_tokens(n_tokens, a)
    growth = growth or forward_pass(a, n_tokens)
    d, n = a.d_model, a.n_layers
    std, branch_std = np.asarray(growth.residual_std), np.asarray(growth.branch_std).reshape(n, 2)
    group = math.sqrt(a.n_heads / a.n_kv_heads)
    averaging = cesaro_opnorm(n_tokens)
    attention, feedforward = np.empty(n), np.empty(n)
    scale = input_scales(a, growth)
    if a.norm_depth_scaling:
        scale = scale * np.sqrt(np.arange(1, n + 1))[:, None]
    for layer in range(n):
        stds = a.layer_stds(layer)
        values = gaussian_opnorm_estimate().evaluate(
            {"sigma": stds.value, "rows": a.n_kv_heads * a.d_head, "columns": d}
        )
        attention[layer] = attention_estimate().evaluate(
            {"sigma_O": stds.output, "sigma_x": scale[layer, 0], "d": d, "J_Z": averaging * values * group}
        )
        feedforward[layer] = _gate_size(a, layer) * feedforward_estimate(a, scale[layer, 1], layer)
    r, after = a.residual_multiplier, np.ones(std.size - 1)
    if a.block in ("peri-ln", "branch-ln"):
        attention, feedforward = (
            branch / np.sqrt(branch_std[:, k] ** 2 + a.eps) for k, branch in enumerate((attention, feedforward))
        )
    elif a.block == "post-ln":
        before = (a.shortcut_multiplier * std[:-1]) ** 2 + (r * branch_std.reshape(-1)) ** 2
        after = 1 / np.sqrt(before + a.eps)
    assumptions = ("assumption 1 of the paper", "|J^Z| at uniform attention", "residual std from the recursion")
    if a.n_experts:
        assumptions = (*assumptions, "an expert's norm times the root of its gates' mean sum of squares")
    if a.block != "pre-ln":
        assumptions = (*assumptions, f"the paper's argument carried over to {a.block}")
    return _depth_bound("estimate", a, attention * r, feedforward * r, after, assumptions)


def _gate_size(a: Architecture, layer: int) -> float:
    """Root of the mean sum of squared gates of normalised tokens; 1 without experts."""
    if not a.n_experts:
        return 1.0
    shared = routing(a, layer).overlaps(Gram(np.ones(1), np.ones((1, 1)))).shared
    return math.sqrt(shared.diag[0])


@dataclass(frozen=True, slots=True)
class _Reach:
    """What is known of every token's vector at a place: its length is at most `high`; normalised, at least `low`."""

    low: float
    high: float


def rigorous_bound(architecture: Architecture, n_tokens: int, *, failure: float = FAILURE_PROBABILITY) -> DepthBound:
    """A true bound on the gradient's growth at initialisation, from the configuration alone.

    Holds with probability at least 1 - failure over the weights, for every input of n_tokens tokens (the
    padding token, whose row may be zero, left out). Half the failure goes to the weight norms, half to the
    embeddings' lengths. Deep in the network the residual stream is only known to exceed what the branches
    cannot have removed, and below that sqrt(eps): this is what makes the bound enormous.

    Raises:
        ValueError: n_tokens is below 1 or beyond the learned positions, or failure is not between 0 and 1.
    """
    a, d = architecture, architecture.d_model
    n_tokens, failure = require_tokens(n_tokens, a), require_failure(failure)
    if _silent(a):
        nothing = np.zeros(a.n_layers)
        return _depth_bound("upper", a, nothing, nothing, np.ones(a.n_layers * len(a.updates)), ("no branch",))
    refusal = _refusal(a)
    if refusal:
        infinite = np.full(a.n_layers, math.inf)
        return _depth_bound("upper", a, infinite, infinite, np.ones(a.n_layers * len(a.updates)), (refusal,))
    reach = _embedding_reach(a, n_tokens, failure / 2)
    branches: dict[str, list[float]] = {"attention": [], "feedforward": []}
    after: list[float] = []
    for layer in range(a.n_layers):
        stds = a.layer_stds(layer)
        for names in a.updates:
            written = 0.0
            for name in names:
                slope, radius = 1.0, reach.high
                if a.block in ("pre-ln", "peri-ln"):
                    scale = a.norm_factor_at(layer)
                    slope, radius = scale * _norm_slope(a, reach.low), scale * math.sqrt(d)
                if name == "attention":
                    jacobian, size = _attention_bound(a, stds, a.window_at(layer), n_tokens, radius, failure)
                else:
                    jacobian, size = _feedforward_bound(a, stds, radius, failure)
                if a.block in ("peri-ln", "branch-ln"):
                    # Nothing bounds a branch from below, so its norm's slope is only known to be at most 1/sqrt(eps).
                    jacobian, size = jacobian * _norm_slope(a, 0.0), min(math.sqrt(d), size / math.sqrt(a.eps))
                branches[name].append(a.residual_multiplier * jacobian * slope)
                written += a.residual_multiplier * size
            reach = _after(a, layer, reach, written, after)
    attention, feedforward = (np.array(found) for found in branches.values())
    assumptions = (f"with probability at least 1 - {failure:g} over the weights", "unit gains, zero biases")
    return _depth_bound("upper", a, attention, feedforward, np.array(after), assumptions)


def _silent(a: Architecture) -> bool:
    """Whether every branch is zero, whatever its normalised input."""
    everywhere = (a.layer_stds(layer) for layer in range(a.n_layers))
    zero = a.residual_multiplier == 0 or all(s.value * s.output == 0 == s.ffn_in * s.ffn_out for s in everywhere)
    return a.block == "pre-ln" and zero


def _refusal(a: Architecture) -> str:
    """Why there is no rigorous product for this architecture; empty if there is one."""
    if a.eps == 0:
        return "eps = 0: the residual stream may vanish"
    if a.activation == "relu-squared" and a.block == "branch-ln":
        return "no rigorous product for squares of an unnormalised stream"
    return ""


def _norm_slope(a: Architecture, low: float) -> float:
    """Bound on a norm's Jacobian where the (centred, for LayerNorm) input is at least `low` long."""
    return float(norm_jacobian_upper().evaluate({"gain": 1.0, "s": math.sqrt(low**2 / a.d_model + a.eps)}))


def _after(a: Architecture, layer: int, reach: _Reach, written: float, after: list[float]) -> _Reach:
    """What is known after an update that adds at most `written` to every token; post-ln's 1/s goes to `after`."""
    alpha = a.shortcut_multiplier
    low, high = max(0.0, alpha * reach.low - written), alpha * reach.high + written
    if a.block != "post-ln":
        after.append(1.0)
        return _Reach(low, high)
    slope = _norm_slope(a, low) * a.norm_factor_at(layer)
    after.append(slope)
    return _Reach(low * slope, math.sqrt(a.d_model))


def _deviation(a: Architecture, failure: float) -> float:
    """t of `gaussian-opnorm-upper`, jointly over every matrix and head with probability 1 - failure / 2."""
    feedforward = (3 if a.gated else 2) * max(a.n_experts, 1) + (1 if a.n_experts else 0)
    n_matrices = a.n_layers * (4 + feedforward + a.n_heads + 2 * a.n_kv_heads)
    return math.sqrt(2 * math.log(2 * n_matrices / failure))


def _opnorm(a: Architecture, failure: float, sigma: float, rows: int, columns: int) -> float:
    values = {"sigma": sigma * a.init.gaussian_factor, "rows": rows, "columns": columns, "t": _deviation(a, failure)}
    return float(gaussian_opnorm_upper().evaluate(values))


@lru_cache(maxsize=256)
def _attention_bound(
    a: Architecture, stds: Stds, window: int, n_tokens: int, radius: float, failure: float
) -> tuple[float, float]:
    """Bounds on the attention sub-layer's Jacobian and on a token's output, for inputs at most `radius` long."""
    d, width = a.d_model, a.d_head
    heads, kv = a.n_heads * width, a.n_kv_heads * width
    shared = math.sqrt(a.n_heads // a.n_kv_heads)  # what repeating a group's rows for its heads adds to a norm
    query, key, value_head = (_opnorm(a, failure, sigma, width, d) for sigma in (stds.query, stds.key, stds.value))
    largest_query, largest_key = query * radius, key * radius
    every_query = _opnorm(a, failure, stds.query, heads, d)
    every_key = shared * _opnorm(a, failure, stds.key, kv, d)
    if a.qk_norm != "none":
        slope, whole = _norm_slope(a, 0.0), a.qk_norm == "full"
        largest_query, largest_key = (math.sqrt(n if whole else width) for n in (heads, kv))
        every_query, every_key = slope * every_query, slope * every_key
    seen = min(window or n_tokens, n_tokens)
    spread = 2 * a.logit_scale * largest_query * largest_key
    if a.attention_softcap:
        spread = min(spread, 2 * a.attention_softcap)
    if a.positions == "alibi":
        spread += steepest_alibi_slope(a.n_heads) * (seen - 1)
    output = _opnorm(a, failure, stds.output, d, heads)
    jacobian = float(
        attention_general_upper().evaluate(
            {
                "opnorm_O": output,
                "opnorm_VH": shared * _opnorm(a, failure, stds.value, kv, d),
                "heads_OV": output * value_head,
                "R": radius,
                # Slopes of the products of a query and a key; capping them only makes them smaller.
                "key_slope": a.logit_scale * largest_query * every_key,
                "query_slope": a.logit_scale * largest_key * every_query,
                "n_tokens": n_tokens,
                "n_seen": seen,
                "logit_spread": min(spread, _LARGEST_EXPONENT),
            }
        )
    )
    # Each head averages its own values, so the concatenated heads have norm at most sqrt(H) max |W_V^h| R.
    return jacobian, output * math.sqrt(a.n_heads) * value_head * radius


@lru_cache(maxsize=256)
def _feedforward_bound(a: Architecture, stds: Stds, radius: float, failure: float) -> tuple[float, float]:
    """Bounds on the feed-forward sub-layer's Jacobian and on a token's output, for inputs at most `radius` long.

    Two rows of a router are at most sqrt(2) |W_r| apart.
    """
    jacobian, size = _single_feedforward_bound(a, stds, radius, failure)
    if a.n_experts:
        spread = math.sqrt(2) * _opnorm(a, failure, stds.router, a.n_experts, a.d_model)
        symbols = {"expert_jacobian": jacobian, "expert_output": size, "router_spread": spread}
        jacobian = float(experts_upper().evaluate(symbols))
    return jacobian, size


def _single_feedforward_bound(a: Architecture, stds: Stds, radius: float, failure: float) -> tuple[float, float]:
    """The same of one feed-forward, each expert's with experts."""
    d, m = a.d_model, a.d_ffn
    enter, leave = _opnorm(a, failure, stds.ffn_in, m, d), _opnorm(a, failure, stds.ffn_out, d, m)
    largest = enter * radius  # of any pre-activation: |z_i| <= |W_1 u|
    slope, share = lipschitz(a.activation, largest), secant(a.activation, largest)
    if a.gated:
        gate = _opnorm(a, failure, stds.ffn_gate, m, d)
        symbols = {"lipschitz": slope, "R": radius, "opnorm_2": leave, "opnorm_13": math.hypot(enter, gate)}
        return float(ffn_gated_upper_apriori().evaluate(symbols)), leave * share * largest * gate * radius
    symbols = {"lipschitz": slope, "opnorm_1": enter, "opnorm_2": leave}
    return float(ffn_upper().evaluate(symbols)), leave * share * largest


def _embedding_reach(architecture: Architecture, n_tokens: int, failure: float) -> _Reach:
    """Lengths between which every embedding lies, centred for a LayerNorm from below, with probability 1 - failure.

    Source: laurent2000adaptive, lemma 1: a chi-square of n degrees is below n - 2 sqrt(n x) with probability at most
    exp(-x), and above n + 2 sqrt(n x) + 2x as rarely. Fixed sinusoidal positions only add to the length from below.
    Entries that are not normal have E x^4 <= 3 sigma^4, and a sum of n non-negative x_i^2 is below
    n sigma^2 - sqrt(2 n E[x^4] y) with probability at most exp(-y) (Maurer 2003); their mean is sub-Gaussian, so that
    n times its square is above 2 gaussian_factor^2 sigma^2 y with probability at most 2 exp(-y).
    """
    a, d = architecture, architecture.d_model
    variance = (a.embedding_multiplier * a.stds.embedding) ** 2
    count = a.vocab_size
    if a.positions == "learned":
        variance += a.stds.position**2
        count *= n_tokens
    elif a.positions == "sinusoidal":
        count *= n_tokens
    normal, centred = a.init.distribution == "normal", a.norm == "layernorm"
    events = 2 if normal or not centred else 4  # too short and too long; and a mean too far off on either side
    x = math.log(events * count / failure)
    degrees = d - (1 if centred else 0)
    if normal:
        square = variance * max(0.0, degrees - 2 * math.sqrt(degrees * x))
    else:
        centre = 2 * a.init.gaussian_factor**2 * x if centred else 0.0
        square = variance * max(0.0, d - math.sqrt(6 * d * x) - centre)
    dominating = variance * a.init.gaussian_factor**2
    high = math.sqrt(dominating) * (math.sqrt(d) + math.sqrt(2 * x))
    if a.positions == "sinusoidal":
        high += math.sqrt((d + 1) // 2)  # sine and cosine in pairs; an odd width ends with a sine alone
    low = math.sqrt(square)
    if a.embedding_norm:
        return _Reach(low * _norm_slope(a, low), math.sqrt(d))
    return _Reach(low, high)
