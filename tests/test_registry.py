"""Every probe of the registry against its definition taken by hand."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import weights
from helpers.weights import architecture, generator, normal
from scipy import stats
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from empirics import probes as probes_module
from empirics.attention_rows import attention_rows
from empirics.bounds import BOUNDED, a_posteriori_bounds
from empirics.data import random_tokens
from empirics.model import Attention, Layer, Transformer
from empirics.probes import distribution
from empirics.registry import Reading, Unavailable, find, probe, probes, schedule
from empirics.spectral import explicit_jacobian, explicit_opnorm
from empirics.subject import Subject
from theory.quantities import QUANTITIES, Quantity
from theory.sources import REFERENCES

ROOT = Path(__file__).resolve().parents[1]
SIZES: dict[str, Any] = {
    "d_model": 12, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_head": 4, "d_ffn": 30, "vocab_size": 50,
    "positions": "rope", "activation": "gelu",
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "pre-ln": {},
    "pre-ln, gated": {"gated": True, "activation": "silu", "biases": True},
    "pre-ln, squares": {"activation": "relu-squared", "residual_multiplier": 0.4, "shortcut_multiplier": 0.9},
    "post-ln": {"block": "post-ln", "shortcut_multiplier": 1.4},
    "peri-ln": {"block": "peri-ln", "attention_softcap": 1.5, "window": 3, "norm": "rmsnorm"},
    "branch-ln": {"block": "branch-ln", "qk_norm": "full"},
    "parallel": {"parallel": True, "positions": "alibi", "norm_depth_scaling": True},
    "one norm": {"parallel": True, "shared_norm": True},
    "experts": {"n_experts": 4, "experts_per_token": 2},
    "half of a head turns": {"rope_fraction": 0.5, "biases": True, "rope_base": 50.0},
}


def disturbed(layout: str, seed: int = 0) -> Transformer:
    return weights.disturbed(architecture(**SIZES | LAYOUTS[layout]), seed)


def tokens(batch_size: int = 2, seq_len: int = 6) -> tuple[Tensor, Tensor]:
    inputs, targets = random_tokens(50, seed=1, batch_size=batch_size, seq_len=seq_len)
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def subject(layout: str, **options: Any) -> Subject:
    return Subject(disturbed(layout), *tokens(), **{"tolerance": 1e-3} | options)


# --- the registry -------------------------------------------------------------------------------------------------


def test_every_probe_is_a_quantity() -> None:
    assert len(probes()) > 30
    for name, found in probes().items():
        assert found.name == name
        assert QUANTITIES[name] == found.quantity
        assert found.about.endswith(".")
        assert found.quantity.axis in {"none", "place", "layer", "half-layer", "head", "matrix"}
        assert found.quantity.source is None or found.quantity.source.key in REFERENCES
        iterative = "jacobian" in name or name.endswith(("branch", "product", "bound_ratio"))
        sampled = name.endswith("normal_distance")
        assert found.kind == ("lower estimate" if iterative else "estimate" if sampled else "exact")


def test_the_order_of_probes_is_not_that_of_imports() -> None:
    """A record lists them in it, and its bytes must not depend on what was imported first."""
    code = "import {}; from empirics.registry import probes; print(*probes())"
    orders = []
    for first in ("empirics.weight_probes, empirics.attention_probes", "empirics.registry"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(first)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        orders.append(done.stdout.split())
    assert orders[0] == orders[1] == list(probes())


def test_a_new_probe_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    from empirics import registry

    monkeypatch.setattr(registry, "_PROBES", dict(probes()))

    @probe(Quantity(name="largest_entry", meaning="the largest entry", axis="matrix"), of="every entry", cost="cheap")
    def largest_entry(subject: Subject) -> Reading:
        """In absolute value."""
        found = {name: float(matrix.abs().max()) for name, matrix in subject.matrices.items()}
        return registry.reading("largest_entry", list(found), list(found.values()))

    assert find("largest_entry").about == "In absolute value."
    assert schedule("default", 20)["largest_entry"] == 20
    assert len(find("largest_entry").measure(subject("pre-ln")).values) == 2 + 3 * 6
    with pytest.raises(ValueError, match="has a probe already; give the quantity another name"):
        probe("residual_std", of="every token", cost="cheap")
    with pytest.raises(ValueError, match="unknown quantity"):
        probe("no_such_thing", of="every token", cost="cheap")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_probes_leave_the_model_as_it_was(layout: str) -> None:
    """Weights, their gradients, what asks for one, and every random state."""
    model = disturbed(layout)
    frozen = model.layers[0].attention.query.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    seen = Subject(model, *tokens())
    measured = 0
    for found in probes().values():
        try:
            reading = found.measure(seen)
        except Unavailable:
            continue
        measured += 1
        assert reading.quantity == found.name
        assert len(reading.labels) == len(reading.values) == len(set(reading.labels))
        assert all(math.isfinite(value) for value in reading.values)
        assert reading.lower_estimate == (found.kind == "lower estimate") == (reading.residuals is not None)
    assert measured >= 32
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert not frozen.requires_grad
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002


@pytest.mark.parametrize("layout", ["pre-ln", "experts"])
def test_a_probe_is_of_what_it_says(layout: str) -> None:
    """Of other tokens in the second sequence alone, everything that is of every token changes, and nothing else."""
    model, (inputs, targets) = disturbed(layout), tokens()
    others = torch.cat([inputs[:1], inputs[1:] % 49 + 1])
    seen, changed = Subject(model, inputs, targets), Subject(model, others, targets)
    measured = 0
    for name, found in probes().items():
        try:
            one, other = found.measure(seen), found.measure(changed)
        except Unavailable:
            continue
        measured += 1
        thinned = found.of.startswith("at most ")
        assert (found.kind == "estimate") == thinned, name
        assert (one.entries is not None) == (one.standard_errors is not None), name
        assert found.kind != "estimate" or one.entries is not None, name
        first = found.of == "first sequence"
        assert first or thinned or found.of in ("every token", "every entry"), name
        of_tokens = found.of == "every token" or name == "residual_normal_distance"
        assert (one.values != other.values) == of_tokens, name
        assert of_tokens == name.startswith(("residual", "place", "token", "gradient_growth")), name
    assert measured >= 32


def test_entries_that_a_distribution_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments are of all, the distance of a sample."""
    monkeypatch.setattr(probes_module, "SAMPLE", 101)
    seen = subject("pre-ln")
    found = {name: find(name).measure(seen) for name in ("weight_kurtosis", "weight_normal_distance")}
    sizes = [matrix.numel() for matrix in seen.matrices.values()]
    assert found["weight_kurtosis"].entries == tuple(sizes)
    assert found["weight_normal_distance"].entries == tuple(min(size, 101) for size in sizes)
    assert max(sizes) > 101


def test_schedule() -> None:
    cheap = {name for name, found in probes().items() if found.cost == "cheap"}
    assert schedule("default", 20) == dict.fromkeys(cheap, 20)
    assert schedule(" none ", 20) == {}
    assert schedule("stack_jacobian, residual_std", 5) == {"stack_jacobian": None, "residual_std": 5}
    assert schedule("default,stack_jacobian@100,residual_std@1", 20) == dict.fromkeys(cheap, 20) | {
        "stack_jacobian": 100,
        "residual_std": 1,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("residual_sd", "unknown probe 'residual_sd'; did you mean residual_std or "),
        ("", "unknown probe ''; use one of"),
        ("default,none", "none goes with no other probe"),
        ("stack_jacobian@0", "write for example stack_jacobian@100"),
        ("stack_jacobian@", "write for example stack_jacobian@100"),
        ("stack_jacobian@-3", "write for example stack_jacobian@100"),
    ],
)
def test_schedule_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(text, 20)


# --- Jacobians ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stack", [(0, 2), (1, 1)])
def test_the_norm_of_a_stack_is_that_of_its_explicit_jacobian(layout: str, stack: tuple[int, int]) -> None:
    """Input of layer a to output of layer b, over the whole sequence; at most the half-layers' product."""
    seen = subject(layout, stack=stack)
    found, product = (find(name).measure(seen) for name in ("stack_jacobian", "half_layer_product"))
    updates = [update for layer in seen.layers[stack[0] : stack[1] + 1] for update in layer.updates]
    x = seen.entering[stack[0]][0]
    bound, at = 1.0, x
    with sdpa_kernel(SDPBackend.MATH):

        def through(v: Tensor) -> Tensor:
            for update in updates:
                v = update(v)
            return v

        truth = float(torch.linalg.svdvals(explicit_jacobian(through, x))[0])
        for update in updates:
            bound *= explicit_opnorm(update, at)
            at = update(at).detach()
    assert truth * (1 - 1e-3) <= found.values[0] <= truth * (1 + 1e-12)
    assert found.likely_upper is not None
    assert found.likely_upper[0] >= truth
    assert bound * (1 - 1e-3) ** len(updates) <= product.values[0] <= bound * (1 + 1e-12)
    assert truth <= bound * (1 + 1e-12)
    assert found.labels == (f"layers {stack[0]} to {stack[1]}",)


def exact_norms(layer: Layer, x: Tensor, middle: Tensor, feedforward: str) -> dict[str, list[float]]:
    read, fed = layer.attention_input(x).detach(), layer.feedforward_input(middle).detach()
    return {
        "attention_jacobian": [explicit_opnorm(layer.attention, read)],
        "attention_heads_jacobian": [explicit_opnorm(layer.attention.heads, read)],
        feedforward: [explicit_opnorm(layer.feedforward, fed)],
        "attention_branch": [explicit_opnorm(layer.attention_branch, x)],
        "ffn_branch": [explicit_opnorm(layer.feedforward_branch, middle)],
        "half_layer_jacobian": [explicit_opnorm(f, at) for f, at in zip(layer.updates, (x, middle))],
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_of_sublayers_are_those_of_explicit_jacobians(layout: str) -> None:
    seen = subject(layout)
    feedforward = "experts_jacobian" if layout == "experts" else "ffn_jacobian"
    for n, layer in enumerate(seen.layers):
        x, middle = seen.entering[n][0], seen.entering[n][-1]
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no derivative under vmap
            truths = exact_norms(layer, x, middle, feedforward)
        for name, truth in truths.items():
            each = len(truth)
            values = find(name).measure(seen).values[n * each : (n + 1) * each]
            for value, exact in zip(values, truth, strict=True):
                assert exact * (1 - 1e-3) <= value <= exact * (1 + 1e-12), name
    other = {"ffn_jacobian", "experts_jacobian"} - {feedforward}
    with pytest.raises(Unavailable, match="see"):
        find(other.pop()).measure(seen)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_measured_norms_are_below_their_bounds(layout: str) -> None:
    """At any weights; and not by an order of magnitude, so that a bound of something else would show."""
    seen = subject(layout)
    bounds = a_posteriori_bounds(seen)
    assert set(bounds) <= set(BOUNDED)
    for name, upper in bounds.items():
        values = find(name).measure(seen).values
        ratios = [value / bound for value, bound in zip(values, upper, strict=True)]
        assert max(ratios) <= 1 + 1e-9, name
        if name != "stack_jacobian":
            assert max(ratios) > 0.1, name


@pytest.mark.parametrize("layout", ["pre-ln", "parallel"])
def test_bound_ratio_is_the_norm_over_its_bound(layout: str) -> None:
    seen = subject(layout)
    ratio, norms = (find(name).measure(seen) for name in ("bound_ratio", "half_layer_jacobian"))
    bounds = a_posteriori_bounds(seen)["half_layer_jacobian"]
    assert ratio.labels == norms.labels
    assert ratio.residuals == norms.residuals
    for found, norm, bound in zip(ratio.values, norms.values, bounds, strict=True):
        assert found == pytest.approx(norm / bound, rel=1e-12)
        assert 0 < found <= 1


# --- attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"positions": "alibi"}, {"window": 3}, {"attention_softcap": 0.7}, {"qk_norm": "head"}], ids=str
)
def test_attention_rows_by_hand(changes: dict[str, Any]) -> None:
    a = architecture(**SIZES | changes)
    attention, u = Attention(a).double(), normal(3, 2, 6, 12)
    for parameter in attention.parameters():
        parameter.data = 0.7 * torch.randn(parameter.shape, generator=generator(4), dtype=torch.float64)
    logits, probabilities = (x.detach().numpy() for x in attention.probabilities(u))
    found = attention_rows(attention, u)
    for h in range(4):
        variances, entropies, relative = [], [], []
        for b, t in itertools.product(range(2), range(1, 6)):
            first = max(0, t - 2) if changes.get("window") else 0
            p = probabilities[b, h, t, first : t + 1]
            assert p.sum() == pytest.approx(1, rel=1e-12)
            variances.append(np.var(logits[b, h, t, first : t + 1]))
            entropies.append(stats.entropy(p))
            relative.append(entropies[-1] / math.log(t + 1 - first))
        assert float(found.variance[h]) == pytest.approx(np.mean(variances), rel=1e-12)
        assert float(found.entropy[h]) == pytest.approx(np.mean(entropies), rel=1e-12)
        assert float(found.relative[h]) == pytest.approx(np.mean(relative), rel=1e-12)


def test_attention_that_is_uniform_or_collapsed() -> None:
    attention, u = Attention(architecture(**SIZES | {"positions": "none"})).double(), normal(3, 1, 6, 12)
    attention.query.weight.data.zero_()
    uniform = attention_rows(attention, u)
    assert torch.allclose(uniform.relative, torch.ones(4, dtype=torch.float64), rtol=1e-12)
    assert not uniform.variance.any()
    attention.query.weight.data.normal_(generator=generator(0)).mul_(1e4)
    collapsed = attention_rows(attention, u)
    assert float(collapsed.relative.max()) < 1e-3
    assert bool(torch.isfinite(collapsed.entropy).all())  # probabilities of 0 among them
    with pytest.raises(Unavailable, match="use more tokens"):
        attention_rows(attention, u[:, :1])


def test_attention_probes_are_means_and_minima_over_heads() -> None:
    seen = subject("pre-ln")
    heads = np.array(find("head_entropy").measure(seen).values).reshape(3, 4)
    assert find("head_entropy").measure(seen).labels[5] == "layer 1 head 1"
    assert find("attention_entropy_relative").measure(seen).values == pytest.approx(heads.mean(1), rel=1e-12)
    assert find("attention_entropy_lowest").measure(seen).values == pytest.approx(heads.min(1), rel=1e-12)


# --- the stream, the weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["pre-ln", "parallel", "experts"])
def test_gradients_per_token(layout: str) -> None:
    model = disturbed(layout)
    inputs, targets = tokens(3)
    places: list[Tensor] = []
    model.loss(inputs, targets, places).backward()
    seen = Subject(model, inputs, targets)
    found = {name: find(name).measure(seen) for name in ("place_gradient", "token_gradient", "token_gradient_max")}
    deviation = find("residual_std").measure(seen)
    assert deviation.labels[0] == "embedding"
    assert len(deviation.labels) == len(places)
    for n, x in enumerate(places):
        assert x.grad is not None
        lengths = np.linalg.norm(x.grad.numpy().reshape(18, 12), axis=1)
        assert found["place_gradient"].values[n] == pytest.approx(np.linalg.norm(lengths), rel=1e-12)
        assert found["token_gradient"].values[n] == pytest.approx(lengths.mean(), rel=1e-12)
        assert found["token_gradient_max"].values[n] == pytest.approx(lengths.max(), rel=1e-12)
        expected = math.sqrt(np.var(x.detach().numpy(), axis=-1).mean())
        assert deviation.values[n] == pytest.approx(expected, rel=1e-12)


def test_spectra() -> None:
    seen = subject("pre-ln, gated")
    found = {name: find(name).measure(seen) for name in probes() if name.startswith("weight_")}
    for label, matrix in seen.matrices.items():
        s = np.linalg.svd(matrix.numpy(), compute_uv=False)
        share = s / s.sum()
        expected = {
            "weight_opnorm": s[0],
            "weight_smallest": s[-1],
            "weight_norm": np.linalg.norm(matrix.numpy()),
            "weight_quantile_10": np.quantile(s, 0.1),
            "weight_quantile_50": np.median(s),
            "weight_quantile_90": np.quantile(s, 0.9),
            "weight_stable_rank": (s**2).sum() / s[0] ** 2,
            "weight_effective_rank": math.exp(stats.entropy(share)),
            "weight_skewness": stats.skew(matrix.numpy(), axis=None),
            "weight_kurtosis": stats.kurtosis(matrix.numpy(), axis=None),
        }
        for name, value in expected.items():
            index = found[name].labels.index(label)
            assert found[name].values[index] == pytest.approx(value, rel=1e-9, abs=1e-12), name
        assert 1 <= expected["weight_stable_rank"] <= expected["weight_effective_rank"] + 1 <= min(matrix.shape) + 1


def test_the_rank_of_one_direction_and_of_an_orthogonal_matrix() -> None:
    model = disturbed("pre-ln")
    model.layers[0].attention.query.weight.data = torch.outer(normal(0, 16), normal(1, 12))
    model.layers[0].attention.output.weight.data = torch.linalg.qr(normal(2, 16, 12))[0].mT
    model.layers[0].attention.key.weight.data.zero_()
    seen = Subject(model, *tokens())
    for name in ("weight_stable_rank", "weight_effective_rank"):
        values = dict(zip((r := find(name).measure(seen)).labels, r.values, strict=True))
        assert values["layers.0.attention.query.weight"] == pytest.approx(1, rel=1e-9)
        assert values["layers.0.attention.output.weight"] == pytest.approx(12, rel=1e-9)
        assert math.isnan(values["layers.0.attention.key.weight"])
    assert "layers.0.attention.key.weight" not in find("weight_skewness").measure(seen).labels


@pytest.mark.parametrize("statistic", ["skewness", "excess_kurtosis"])
def test_standard_errors_of_moments(statistic: str) -> None:
    """Of 400 normal samples the scatter is the error that each of them states, to four of its own errors (3.5 %)."""
    found = [distribution(normal(seed, 2000)) for seed in range(400)]
    scatter = float(np.std([item[statistic] for item in found], ddof=1))
    assert scatter == pytest.approx(found[0]["standard_errors"][statistic], rel=4 / math.sqrt(2 * 399))


@pytest.mark.parametrize(
    "law", [lambda u: -torch.log1p(-u), lambda u: (u > 0.3).double() + u], ids=["exponential", "two pieces"]
)
def test_standard_error_of_the_distance(law: Any) -> None:
    """Of a law far from normal, the scatter over 400 samples is the error stated, to four errors of a scatter."""
    draws = (torch.rand(4000, generator=generator(seed), dtype=torch.float64) for seed in range(400))
    found = [distribution(law(draw)) for draw in draws]
    scatter = float(np.std([item["normal_distance"] for item in found], ddof=1))
    stated = float(np.mean([item["standard_errors"]["normal_distance"] for item in found]))
    assert scatter == pytest.approx(stated, rel=4 / math.sqrt(2 * 399))
    assert np.mean([item["normal_distance"] for item in found]) > 5 * stated
