"""The initialisation to the letter: every matrix's standard deviation, law, mean and zeros, in every recipe."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.weights import architecture, generator
from scipy import stats
from torch import Tensor, nn

from empirics import model as model_module
from empirics.model import Transformer, build
from empirics.plan import count
from theory.architecture import EMBEDDINGS, INITS, Init, preset
from theory.initialisation import Law, deepnorm
from theory.records import fingerprint

MODERATE: dict[str, Any] = {
    "d_model": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_head": 24, "d_ffn": 160, "vocab_size": 300,
    "context": 50, "positions": "learned", "gated": True, "biases": True, "qk_norm": "head", "block": "peri-ln",
}  # fmt: skip
RECIPES = INITS | {
    "deepnorm": deepnorm(3),
    "a rule each": Init(
        name="each", hidden="xavier", embedding=0.02, position=0.01, head="kaiming", query_key="width", value="inverse",
        writers="fan-in", layer_scaled=True, branch_gain=0.7, distribution="uniform",
    ),
    "sharp cut": Init(
        name="cut", hidden="small", embedding=1.0, position=0.5, head="xavier", distribution="truncated", cutoff=0.5
    ),
}  # fmt: skip


def matrices(model: Transformer) -> dict[str, tuple[Tensor, float]]:
    """Every matrix with the standard deviation that the architecture states for it."""
    a = model.architecture
    found: dict[str, tuple[Tensor, float]] = {"tokens": (model.tokens.weight, a.stds.embedding)}
    if model.positions is not None:
        found["positions"] = (model.positions.weight, a.stds.position)
    if not a.tied:
        found["head"] = (model.head.weight, a.stds.head)
    for n, layer in enumerate(model.layers):
        attention, feedforward, stds = layer.attention, layer.feedforward, a.layer_stds(n)
        rows = {
            "query": (attention.query, stds.query),
            "key": (attention.key, stds.key),
            "value": (attention.value, stds.value),
            "output": (attention.output, stds.output),
            "enter": (feedforward.enter, stds.ffn_in),
            "leave": (feedforward.leave, stds.ffn_out),
        }
        if feedforward.gate is not None:
            rows["gate"] = (feedforward.gate, stds.ffn_gate)
        found |= {f"layers.{n}.{name}": (linear.weight, std) for name, (linear, std) in rows.items()}
    return found


def law(distribution: Law, cutoff: float) -> Any:
    """The standardised law of the entries."""
    if distribution == "normal":
        return stats.norm()
    if distribution == "uniform":
        return stats.uniform(-math.sqrt(3), 2 * math.sqrt(3))
    scale = 1 / float(stats.truncnorm(-cutoff, cutoff).std())
    return stats.truncnorm(-cutoff, cutoff, scale=scale)


def assert_drawn(matrix: Tensor, std: float, distribution: Law, cutoff: float = 3.0) -> None:
    """Mean 0, this standard deviation and this law; no entry outside its range, and one close to its end."""
    if std == 0.0:
        assert not matrix.any()
        return
    z, expected = matrix.detach().double().flatten().numpy() / std, law(distribution, cutoff)
    n, kurtosis = z.size, float(expected.stats("k")) + 3
    # Standard errors: 1/sqrt(n) of the mean, sqrt((kurtosis - 1)/(4 n)) of the deviation. Some 850 matrices are looked
    # at, so that 4.5 of them are exceeded once in a hundred such tests; Kolmogorov's distance, at 2.7, even less.
    assert abs(z.mean()) < 4.5 / math.sqrt(n)
    assert abs(math.sqrt(np.mean(z * z)) - 1) < 4.5 * math.sqrt((kurtosis - 1) / (4 * n))
    assert math.sqrt(n) * stats.kstest(z, expected.cdf).statistic < 2.7
    end = float(expected.support()[1])
    largest = float(np.abs(z).max())
    assert largest <= end * (1 + 1e-6)  # float32
    # A normal sample of n reaches the deviation that one in n/10 exceeds, but for once in e^10 times.
    assert largest > (0.99 * end if end < 2 else -float(expected.ppf(5 / n)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_every_matrix_has_its_standard_deviation(name: str, tied: bool) -> None:
    init = RECIPES[name]
    model = build(architecture(**MODERATE, tied=tied, init=init), seed=3)
    found = matrices(model)
    assert {id(matrix) for matrix, _ in found.values()} == {id(p) for p in model.parameters() if p.ndim == 2}
    assert sum(std == 0.0 for _, std in found.values()) == (6 if name == "zero-output" else 0)
    for name, (matrix, std) in found.items():
        assert_drawn(matrix, std, init.law(table=name in ("tokens", "positions")), init.cutoff)


@pytest.mark.parametrize("tied", [False, True])
def test_init_torch_is_what_torchs_modules_draw(tied: bool) -> None:
    """Of every matrix, entry by entry against the module of its shape that torch has drawn by itself; no bias is."""
    model = build(architecture(**MODERATE, tied=tied, init=INITS["torch"]), seed=3)
    torch.manual_seed(0)
    compared = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding) or (tied and name == "head"):
            continue
        own = module.weight.detach().double().flatten().numpy()
        if isinstance(module, nn.Linear):
            theirs = nn.Linear(module.in_features, module.out_features)
        else:
            theirs = nn.Embedding(*module.weight.shape)
        other = theirs.weight.detach().double().flatten().numpy()
        # Two samples of n: their distance is above 2.7 sqrt(2/n) once in a million times, and the deviations of the
        # laws' kurtosis of at most 3 differ by 4.5 standard errors as rarely.
        assert stats.ks_2samp(own, other).statistic < 2.7 * math.sqrt(2 / own.size), name
        assert abs(own.std() / other.std() - 1) < 4.5 * math.sqrt(1 / own.size), name
        # The largest of a uniform sample is 1.73 deviations; of a normal one of thousands, more than 3.
        assert (np.abs(own).max() < 2 * own.std()) == (np.abs(other).max() < 2 * other.std()), name
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert isinstance(theirs, nn.Linear)
            assert not module.bias.any()
            assert float(theirs.bias.detach().std()) == pytest.approx(1 / math.sqrt(3 * module.in_features), rel=0.2)
        compared += 1
    assert compared == sum(p.ndim == 2 for p in model.parameters())


def test_a_model_that_was_drawn_uniform_says_so() -> None:
    """`torch` was once uniform throughout: what was written down then means what it did."""
    old = architecture(**MODERATE, init=Init(**asdict(INITS["torch"]) | {"distribution": "uniform"}))
    tables = build(old, seed=3).tokens.weight.detach(), build(architecture(**MODERATE, init=INITS["torch"]), seed=3)
    assert_drawn(tables[0], 1.0, "uniform")
    assert_drawn(tables[1].tokens.weight, 1.0, "normal")
    assert fingerprint(old) != fingerprint(tables[1].architecture)


def standard(kind: str) -> Tensor:
    """Some 6,000 entries of mean 0 and deviation 1, but for what is wrong with them."""
    z, u = torch.randn(64, 96, generator=generator(0)), torch.rand(64, 96, generator=generator(1))
    return {
        "normal": z,
        "uniform": (2 * u - 1) * math.sqrt(3),
        "cut": z[z.abs() < 3] / float(stats.truncnorm(-3, 3).std()),
        "shifted": z + 0.1,
        "5 % wide": 1.05 * z,
        "skewed": -torch.log(u) - 1,
        "constant": z.sign(),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "distribution"),
    [
        ("shifted", "normal"), ("5 % wide", "normal"), ("uniform", "normal"), ("cut", "normal"), ("skewed", "normal"),
        ("constant", "normal"), ("normal", "truncated"), ("uniform", "truncated"), ("normal", "uniform"),
    ],
)  # fmt: skip
def test_another_law_would_show(kind: str, distribution: Law) -> None:
    """Control: what is drawn otherwise fails; and what is drawn rightly does not."""
    with pytest.raises(AssertionError):
        assert_drawn(standard(kind), 1.0, distribution)
    with pytest.raises(AssertionError):
        assert_drawn(standard("normal"), 0.0, "normal")
    for right in ("normal", "uniform"):
        assert_drawn(standard(right), 1.0, right)  # type: ignore[arg-type]
    assert_drawn(standard("cut"), 1.0, "truncated")


def test_recipes_are_those_of_the_table() -> None:
    """The table in the module's docstring, row by row and column by column."""
    lines = (model_module.__doc__ or "").splitlines()
    start = next(n for n, line in enumerate(lines) if line.split()[:2] == ["init", "E,"])
    rows = {cells[0]: cells[1:] for cells in (re.split(r" {2,}", line.strip()) for line in lines[start + 1 :] if line)}
    assert set(rows) == set(INITS)
    for name, (tables, hidden, writers, head, drawn) in rows.items():
        init = INITS[name]
        assert [_rule(init.embedding), _rule(init.position)] == [tables, tables]
        assert _rule(init.head) == head
        assert _rule(init.hidden) == hidden
        factor = " / sqrt(2N)" if init.depth_scaled else " / sqrt(2(n+1))" if init.layer_scaled else ""
        assert _rule(init.hidden if init.writers is None else init.writers) + factor == writers
        assert (init.query_key, init.value, init.branch_gain) == (None, None, 1.0)
        words = {"truncated": f"cut at {init.cutoff:g}", "torch": "uniform, E and positions normal"}
        assert words.get(init.distribution, init.distribution) == drawn


def _rule(rule: float | str) -> str:
    return rule if isinstance(rule, str) else f"{rule:g}"


@pytest.mark.parametrize("name", ["tiny", "350m"])
def test_stds_of_the_papers_recipe(name: str) -> None:
    a = preset(name)
    small = math.sqrt(2 / (5 * a.d_model))
    assert a.stds.query == a.stds.key == a.stds.value == a.stds.ffn_in == a.stds.embedding == a.stds.head == small
    assert a.stds.output == a.stds.ffn_out == pytest.approx(small / math.sqrt(2 * a.n_layers), rel=1e-15)
    xavier = a.with_init("xavier").stds
    assert xavier.query == xavier.output == pytest.approx(1 / math.sqrt(a.d_model), rel=1e-15)
    assert xavier.ffn_in == xavier.ffn_out == pytest.approx(math.sqrt(2 / (5 * a.d_model)), rel=1e-15)  # d + 4 d
    assert xavier.embedding == small


def test_gains_are_one_and_biases_zero() -> None:
    model = build(architecture(**MODERATE, norm="layernorm"), seed=0)
    gains = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            gain = "norm" in name and name.endswith("weight")
            gains += gain
            assert torch.equal(parameter, torch.full_like(parameter, float(gain))), name
    assert gains == 3 * (4 + 2) + 1


@pytest.mark.parametrize("init", ["paper", "mitchell", "torch", "zero-output"])
def test_initialising_again_forgets_everything(init: str) -> None:
    a = architecture(**MODERATE, init=INITS[init])
    model = build(a, seed=7)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        nn.init.constant_(parameter, 3.0)
    model.initialise(torch.Generator().manual_seed(7))
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("init", ["paper", "mitchell", "torch"])
def test_matrices_are_independent_and_decided_by_the_seed(init: str) -> None:
    a = architecture(**MODERATE, init=INITS[init])
    model = build(a, seed=7)
    again, other = build(a, seed=7), build(a, seed=8)
    for (name, matrix), same, different in zip(
        model.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(matrix, same), name
        assert matrix.ndim == 1 or not torch.equal(matrix, different), name
    layers = [layer.attention.query.weight.detach().flatten() for layer in model.layers]
    cosine = float(F.cosine_similarity(layers[0], layers[1], dim=0))
    assert abs(cosine) < 4.5 / math.sqrt(layers[0].numel())  # standard error of an uncorrelated pair


@pytest.mark.parametrize("init", ["paper", "mitchell", "truncated", "torch", "zero-output"])
def test_same_weights_whatever_the_embedding_treatment(init: str) -> None:
    a = preset("tiny").with_init(init)
    states = [build(a.with_embedding(treatment), seed=1).state_dict() for treatment in EMBEDDINGS]
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())
    assert set(states[3]) - set(states[0]) == {"embedding_norm.weight"}


@pytest.mark.parametrize("block", ["pre-ln", "post-ln", "peri-ln", "branch-ln"])
def test_same_matrices_whatever_the_layout(block: Any) -> None:
    a = architecture(**(MODERATE | {"block": "pre-ln", "qk_norm": "none"}))
    expected = build(a, seed=1).state_dict()
    found = build(architecture(**(MODERATE | {"block": block})), seed=1).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items() if value.ndim == 2)


def test_padding_row_is_zero() -> None:
    model = build(architecture(**MODERATE, padding_row=True, init=INITS["torch"]), seed=0)
    assert not model.tokens.weight[0].any()
    assert model.tokens.weight[1:].abs().sum(1).min() > 0


BARE = MODERATE | {"positions": "rope", "biases": False, "qk_norm": "none", "block": "pre-ln"}
COUNTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "biases": {"biases": True},
    "gates and biases": {"gated": True, "biases": True, "norm": "layernorm"},
    "LayerNorm without biases": {"norm": "layernorm"},
    "Post-LN": {"block": "post-ln", "biases": True},
    "Peri-LN": {"block": "peri-ln", "norm": "layernorm", "biases": True},
    "branch norms alone": {"block": "branch-ln", "final_norm": False},
    "one norm for both": {
        "block": "pre-ln",
        "parallel": True,
        "shared_norm": True,
        "norm": "layernorm",
        "biases": True,
    },
    "two norms for both": {"parallel": True},
    "heads' norms": {"qk_norm": "head", "norm": "layernorm", "biases": True},
    "norms of all heads": {"qk_norm": "full", "n_kv_heads": 2},
    "learned positions, a norm behind them": {"positions": "learned", "embedding_norm": True},
    "experts": {"n_experts": 5, "experts_per_token": 2},
    "experts with biases": {"n_experts": 3, "experts_per_token": 1, "biases": True, "gated": False},
}


@pytest.mark.parametrize("name", COUNTED)
def test_number_of_parameters(name: str) -> None:
    """As the model has them, and as a plan counts them."""
    a = architecture(**(BARE | COUNTED[name]))
    parameters = list(Transformer(a).parameters())
    assert a.n_parameters == sum(p.numel() for p in parameters) == count(a).parameters
    assert a.n_weights == sum(p.numel() for p in parameters if p.ndim == 2) == count(a).matrices
    assert a.n_parameters > a.n_weights
    assert a.active_weights == a.n_weights or a.n_experts


def test_number_of_parameters_with_experts() -> None:
    a = architecture(**MODERATE, n_experts=5, experts_per_token=2)
    model = Transformer(a)
    assert a.n_weights == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    expert = sum(p.numel() for p in model.layers[0].feedforward.experts[0].parameters() if p.ndim == 2)
    assert a.active_weights == a.n_weights - a.n_layers * 3 * expert
