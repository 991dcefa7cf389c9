"""Every upper bound: it holds in every case that is drawn, and fails where it is shrunk or a term is left out.

All truths are float64. `test_attack` climbs where the cases here are drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from helpers.benches import attention, cases, eye, filled, identity_branch, seen, unit_norm, vector
from helpers.catalogue import ALL, UPPER, value
from helpers.weights import architecture, normal
from hypothesis import given, settings, target
from hypothesis import strategies as st

from empirics import observables
from empirics.attack import Observation, bound_of, evaluate
from empirics.bench_attention import FullAttention
from empirics.bench_embedding import EmbeddingTables
from empirics.benches import find_bench
from empirics.model import ACTIVATIONS, Attention, Experts, FeedForward
from theory.activations import lipschitz
from theory.random_matrix import cesaro_opnorm
from theory.symbols import SYMBOLS


@pytest.mark.parametrize("name", UPPER)
@settings(max_examples=max(200, settings().max_examples))
@given(data=st.data())
def test_upper_holds(name: str, data: st.DataObject) -> None:
    """true <= bound, whatever the shapes, scales, weights, biases and inputs."""
    case = data.draw(cases(ALL[name]))
    observation, bound = evaluate(ALL[name], case)
    ratio = observation.ratio(bound)
    target(math.log(max(ratio, 1e-300)))  # search towards tight cases
    assert not observation.violates(bound), f"true {observation.truth!r} exceeds {bound!r} at {case.witness()}"


def steepest(activation: str) -> Observation:
    """One unit whose bias puts it at the activation's steepest point."""
    z = torch.linspace(0, 3, 30_001, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(ACTIVATIONS[activation](z).sum(), z)
    at = float(z.detach()[slope.argmax()])
    module = FeedForward(architecture(d_model=1, d_ffn=1, activation=activation, biases=True))
    one = torch.ones(1, 1, dtype=torch.float64)
    filled(module, **{"enter.weight": one * 3, "leave.weight": one * 0.2, "enter.bias": vector(at)})
    return seen("ffn-upper", module, torch.zeros(1, 1, dtype=torch.float64), activation=activation)


def gated_unit() -> Observation:
    """One unit whose two input weights are orthogonal and equally long."""
    module = FeedForward(architecture(d_model=2, d_ffn=1, activation="silu", gated=True))
    filled(
        module,
        **{"enter.weight": vector(2.0, 0.0)[None], "gate.weight": vector(0.0, 2.0)[None], "leave.weight": eye(2, 1)},
    )
    return seen("ffn-gated-upper", module, vector(0.7, -1.3)[None])


def opposite_experts(count: int) -> Experts:
    """Experts of nothing but a bias, opposite in turn, at equal logits along the input, with rows of two kinds."""
    module = Experts(architecture(d_model=3, d_ffn=3, biases=True, n_experts=count, experts_per_token=count))
    signs = [(-1.0) ** place for place in range(count)]
    rows = torch.tensor([[1.0, 2.0 * sign, 0.0] for sign in signs], dtype=torch.float64)
    biases = {f"experts.{place}.leave.bias": vector(0.0, sign, 0.0) for place, sign in enumerate(signs)}
    return filled(module, **{"router.weight": rows}, **biases)


def uniform_attention(group: int = 1) -> Attention:
    """No logits: P is the causal average, and |J| = sqrt(g) |C_T| |W_O| |W_V| with aligned values and output."""
    return attention(d=2, heads=group, width=2, W_V=eye(2), W_O=torch.cat([eye(2)] * group, dim=1) / math.sqrt(group))


def averaging(name: str, group: int = 1) -> Observation:
    return seen(name, uniform_attention(group), normal(2, 7, 2))


def embedded(name: str, tokens: str) -> Observation:
    """Learned positions, no norm."""
    choices = {"sequence": tokens, "position_rows": 1.0, "multiplier": 3.0, "embedding_gradient": 0.1}
    module = EmbeddingTables({**choices, "embedding_norm": False})
    return seen(name, module, normal(2, module.rows, 4), **choices)


def unmasked(name: str) -> Observation:
    """No logits and no mask: P averages over all tokens, with norm 1."""
    module = attention(d=2, kind=FullAttention, W_V=eye(2), W_O=eye(2))
    return seen(name, module, normal(2, 7, 2))


# Cases that attain a bound by hand: shrunk by a tenth, it must fail on them. The attack finds others for every bound
# that is marked tight.
ATTAINED: dict[str, list[Callable[[], Observation]]] = {
    "norm-jacobian-upper": [
        lambda: seen("norm-jacobian-upper", unit_norm("layernorm", 3), normal(1, 2, 3)),
        lambda: seen("norm-jacobian-upper", unit_norm("rmsnorm", 2), normal(1, 2, 2) * 1e-3),
    ],
    "norm-jacobian-upper-apriori": [
        lambda kind=kind: seen("norm-jacobian-upper-apriori", unit_norm(kind, 3), 0 * eye(2, 3), eps=1e-5)
        for kind in ("layernorm", "rmsnorm")
    ],
    "norm-jacobian-lower": [
        lambda: seen("norm-jacobian-lower", unit_norm("layernorm", 3), normal(1, 1, 3)),
        lambda: seen("norm-jacobian-lower", unit_norm("rmsnorm", 2), normal(1, 1, 2)),
    ],
    "embedding-upper-apriori": [lambda: embedded("embedding-upper-apriori", "0000")],
    "embedding-upper-aposteriori": [lambda: embedded("embedding-upper-aposteriori", "0121")],
    "softmax-jacobian": [lambda: seen("softmax-jacobian", torch.nn.Softmax(-1), vector(3.0, 3.0))],
    "ffn-upper": [lambda name=name: steepest(name) for name in ("identity", "relu", "gelu", "gelu-tanh", "silu")],
    "ffn-gated-upper": [gated_unit],
    "experts-upper": [
        lambda count=count: seen("experts-upper", opposite_experts(count), eye(1, 3)) for count in (2, 4)
    ],
    "ffn-branch-upper": [
        lambda: seen("ffn-branch-upper", identity_branch(5), normal(0, 3, 5), activation="identity"),
    ],
    "attention-probability-upper": [lambda: averaging("attention-probability-upper")],
    **{
        name: [lambda name=name, group=group: averaging(name, group) for group in (1, 3)]
        for name in ("attention-upper-apriori", "attention-upper-aposteriori")
    },
    **{
        name: [lambda name=name, group=group: averaging(name, group) for group in (1, 3)]
        for name in ("attention-general-upper", "attention-blocks-upper")
    },
    "attention-window-upper": [lambda: averaging("attention-window-upper")],
    "attention-full-probability-upper": [lambda: unmasked("attention-full-probability-upper")],
    "attention-full-upper": [lambda: unmasked("attention-full-upper")],
}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in ATTAINED.items() for case in cases])
def test_shrunk_bound_fails(name: str, case: Callable[[], Observation]) -> None:
    attained = case()
    bound = bound_of(ALL[name], attained)
    assert not attained.violates(bound)
    assert attained.violates(0.9 * bound)
    assert attained.truth == pytest.approx(
        bound, rel=1e-7
    )  # steepest points are off by a grid step of 1e-4, to second order


def through_keys(name: str, *, scale: float = 2**-0.5) -> Observation:
    """Queries from their bias alone; keys along e_2 that no token has: the logits are equal, their slopes are not."""
    module = attention(
        W_K=torch.outer(vector(1, 0), vector(0, 1, 0, 0)), W_V=eye(2, 4), W_O=eye(4, 2), b_Q=vector(1000, 0)
    )
    module.scale = scale
    return seen(name, module, torch.outer(vector(1, -1, 1), vector(1, 0, 0, 0)))


def through_queries(name: str, n_tokens: int = 3, *, scale: float = 2**-0.5) -> Observation:
    """Query weights along e_2 that no token has: no logits, and an output that turns with the query."""
    module = attention(
        W_Q=1000 * torch.outer(vector(1, 0), vector(0, 1, 0, 0)), W_K=eye(2, 4), W_V=eye(2, 4), W_O=eye(4, 2)
    )
    module.scale = scale
    return seen(name, module, torch.outer(vector(1, -1, 1)[:n_tokens], vector(1, 0, 0, 0)))


def rotated_key_bias(name: str) -> Observation:
    """Keys from their bias alone: RoPE turns it by the token, so that it does not cancel in a softmax row."""
    module = attention(
        positions="rope", W_Q=torch.outer(vector(1, 0), vector(0, 1, 0, 0)), W_V=eye(2, 4), W_O=eye(4, 2),
        b_K=vector(1000, 0),
    )  # fmt: skip
    return seen(name, module, torch.outer(vector(1, -1, 1), vector(1, 0, 0, 0)))


def through_both(name: str) -> Observation:
    """Queries along one coordinate of the head and keys along the other: no logits; no mask, and slopes that add up."""
    along, across = vector(1, 0, 0, 0), vector(0, 1, 0, 0)
    module = attention(
        kind=FullAttention, W_V=eye(2, 4), W_O=eye(4, 2),
        W_Q=1000 * (torch.outer(vector(1, 0), along) + torch.outer(vector(0, 1), across)),
        W_K=torch.outer(vector(1, 0), across) + torch.outer(vector(0, 1), along),
    )  # fmt: skip
    return seen(name, module, torch.outer(vector(1, -1), along))


def all_on_the_first(name: str) -> Observation:
    """Four hundred tokens that attend to the first, by a query's bias; their values are zero, the values' slopes not.

    |P| is near 20, the root of the tokens, and the other terms, which go with the logits' size, are less than that.
    """
    module = attention(
        W_K=torch.outer(vector(1, 0), vector(1, 0)), W_V=torch.outer(vector(1, 0), vector(0, 1)), W_O=eye(2),
        b_Q=vector(4.5 * math.sqrt(2), 0), d=2,
    )  # fmt: skip
    return seen(name, module, torch.outer(torch.cat([vector(1), -torch.ones(399).double()]), vector(1, 0)))


# Cases by hand for the symbols that those drawn by chance have no need of.
NEEDED: dict[str, list[Callable[[str], Observation]]] = {
    "gaussian-opnorm-upper": [lambda name: gaussian_case(64, 64, 0.5)],
    "attention-upper-apriori": [
        through_keys, lambda name: through_keys(name, scale=100), rotated_key_bias, all_on_the_first,
    ],
    "attention-upper-aposteriori": [
        through_keys, through_queries, lambda name: through_queries(name, scale=100),
    ],
    "attention-general-upper": [through_keys, lambda name: through_queries(name, 2), all_on_the_first],
    "attention-full-upper": [through_both],
    "attention-blocks-upper": [through_keys, through_queries],
}  # fmt: skip
# A symbol that a bound may as well be told a millionth of, and why. There is none.
NEEDLESS: dict[tuple[str, str], str] = {}


def without(name: str, one: Observation, parameter: str) -> list[float]:
    """The bound at a millionth of that symbol and at a million of it, since it may divide; a count is one."""
    number = one.numbers[parameter]
    others = [1] if SYMBOLS[parameter].integer else [1e-6 * number, 1e6 * number]
    return [value(name, one.numbers | {parameter: other}) for other in others]


@pytest.mark.parametrize("name", [name for name in UPPER if ALL[name].parameters])
def test_upper_fails_without_any_of_its_symbols(name: str) -> None:
    """Control: each symbol in its turn is taken away, and a case by hand or by chance breaks what is left."""
    statement, random = ALL[name], Random(0)
    bench = find_bench(statement.quantity.name)
    drawn = (
        evaluate(statement, bench.draw(random, style, statement.covers))[0]
        for _ in range(150)
        for style in ("plain", "structured")
    )
    idle = set(statement.parameters)
    for one in itertools.chain((case(name) for case in NEEDED.get(name, [])), drawn):
        assert not one.violates(value(name, one.numbers))
        idle -= {parameter for parameter in idle if any(map(one.violates, without(name, one, parameter)))}
        if not idle:
            break
    assert idle == {parameter for other, parameter in NEEDLESS if other == name}


# What a bound would be with a term left out or a factor forgotten, and a case on which that fails.
CORRUPTED: dict[str, list[tuple[str, dict[str, Any], Callable[[str], Observation]]]] = {
    "attention-upper-apriori": [
        ("no value term", {"opnorm_V": 0.0}, averaging),
        ("no group factor", {"kv_group": 1}, lambda name: averaging(name, 3)),
        ("no query bias", {"head_VQ": 0.0}, through_keys),
        ("no key bias under RoPE", {"head_VK": 0.0}, rotated_key_bias),
    ],
    "attention-upper-aposteriori": [
        ("no value term", {"opnorm_V": 0.0}, averaging),
        ("no group factor", {"kv_group": 1}, lambda name: averaging(name, 3)),
        ("no key term", {"key_term": 0.0}, through_keys),
        ("no query term", {"query_term": 0.0}, through_queries),
    ],
    "attention-general-upper": [
        ("no value term", {"opnorm_VH": 0.0}, averaging),
        ("no slope through the keys", {"key_slope": 0.0}, through_keys),
        ("no slope through the queries", {"query_slope": 0.0}, lambda name: through_queries(name, 2)),
    ],
    "attention-full-upper": [
        ("no value term", {"opnorm_VH": 0.0}, unmasked),
    ],
    "attention-blocks-upper": [
        ("no value term", {"opnorm_OV": 0.0, "P_deviation": 0.0}, averaging),
        ("no blocks through the keys", {"key_blocks": 0.0}, through_keys),
        ("no blocks through the queries", {"query_blocks": 0.0}, through_queries),
    ],
    "gaussian-opnorm-upper": [
        ("one side", {"columns": 0}, lambda name: gaussian_case(64, 64, 0.5)),
    ],
}  # fmt: skip


def gaussian_case(rows: int, columns: int, t: float) -> Observation:
    values = {"sigma": 2.0, "rows": rows, "columns": columns, "t": t}
    return Observation(values=values, norm=observables.opnorm(2.0 * normal(3, rows, columns)))


@pytest.mark.parametrize(
    ("name", "change", "case"),
    [
        pytest.param(name, change, case, id=f"{name}: {what}")
        for name, rows in CORRUPTED.items()
        for what, change, case in rows
    ],
)
def test_corrupted_bound_fails(name: str, change: dict[str, Any], case: Callable[[str], Observation]) -> None:
    attacked = case(name)
    assert not attacked.violates(value(name, attacked.numbers))
    assert attacked.violates(value(name, attacked.numbers | change))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (8, 8), (4, 64)])
@pytest.mark.parametrize("t", [0.25, 0.5, 1.0, 2.0])
def test_gaussian_bound_fails_at_most_as_often_as_stated(rows: int, columns: int, t: float) -> None:
    draws, sigma = 4000, 0.3
    matrices = sigma * normal(rows * columns, draws, rows, columns)
    norms = torch.linalg.matrix_norm(matrices, ord=2).numpy()
    bound = value("gaussian-opnorm-upper", {"sigma": sigma, "rows": rows, "columns": columns, "t": t})
    allowed = math.exp(-(t**2) / 2)
    standard_error = math.sqrt(allowed * (1 - allowed) / draws)
    assert np.mean(norms >= bound) <= allowed + 3 * standard_error


def test_gaussian_bound_is_no_bound_with_smaller_spread() -> None:
    """Control: for one entry the norm is |z|, and P(|z| >= t) is far above exp(-(3t)^2/2)."""
    t, norms = 0.5, normal(5, 4000).abs().numpy()
    allowed = math.exp(-((3 * t) ** 2) / 2)
    assert np.mean(norms >= t) > allowed + 3 * math.sqrt(allowed * (1 - allowed) / norms.size)


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "gelu-tanh", "silu"])
def test_lipschitz_constant_is_the_largest_slope_and_not_below_it(activation: str) -> None:
    """The truth: PyTorch's own derivative on a dense grid, its maximum refined by Newton steps in 40 digits."""
    import mpmath

    from empirics.model import ACTIVATIONS
    from theory.kernels import activation_slope

    constant = lipschitz(activation)  # type: ignore[arg-type]
    z = torch.linspace(-12, 12, 480_001, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(ACTIVATIONS[activation](z).sum(), z)
    # Autograd's slope has its own rounding, a few units in the last place.
    assert float(slope.abs().max()) <= constant * (1 + 8 * 2.0**-52)
    assert float(slope.abs().max()) >= constant * (1 - 1e-8)  # the grid misses the top by half a step, to second order
    assert np.max(np.abs(activation_slope(activation, z.detach().numpy()))) <= constant * (1 + 8 * 2.0**-52)  # type: ignore[arg-type]
    decimals = {"gelu": 1.128904, "gelu-tanh": 1.128993, "silu": 1.099839}
    if activation not in decimals:
        assert constant == 1.0
        return
    assert abs(constant - decimals[activation]) < 1e-6
    with mpmath.workdps(40):
        function = {
            "gelu": lambda y: y * mpmath.erfc(-y / mpmath.sqrt(2)) / 2,
            "gelu-tanh": lambda y: y / (1 + mpmath.exp(-2 * mpmath.sqrt(2 / mpmath.pi) * (y + 0.044715 * y**3))),
            "silu": lambda y: y / (1 + mpmath.exp(-y)),
        }[activation]
        at = mpmath.mpf(float(z.detach()[slope.abs().argmax()]))
        for _ in range(6):
            at -= mpmath.diff(function, at, 2) / mpmath.diff(function, at, 3)
        top = mpmath.diff(function, at)
        # mpmath's 0.044715 above is the double; the constant's is the decimal. They differ by 1e-18.
        assert top <= mpmath.mpf(constant) + mpmath.mpf(10) ** -17
        assert mpmath.mpf(constant) - top < 5e-16


def test_cesaro_norm() -> None:
    """Against a dense singular value; increasing, and below Hardy's 2."""
    norms = [float(cesaro_opnorm(n)) for n in (1, 2, 3, 8, 64, 300)]
    for n, norm in zip((1, 2, 3, 8, 64, 300), norms, strict=True):
        dense = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
        assert norm == pytest.approx(np.linalg.norm(dense, 2), rel=2.0**-49 * n**2)  # twice its margin
        assert norm >= np.linalg.norm(dense, 2) * (1 - 1e-13)  # a singular value of LAPACK's
    assert norms == sorted(norms)
    assert all(norm < 2 for norm in norms)
    documented = {64: 1.598, 1024: 1.749, 2048: 1.774}
    assert all(float(cesaro_opnorm(n)) == pytest.approx(norm, abs=5e-4) for n, norm in documented.items())
