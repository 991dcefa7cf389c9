"""Probes against explicit Jacobians and gradients taken by hand, and the identities that hold in every network."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.weights import architecture, disturbed, generator, normal, svd_norm
from scipy import stats
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from empirics import probes
from empirics.data import random_tokens
from empirics.initialisation import _layer_bounds
from empirics.model import Transformer, build
from empirics.probes import (
    SAMPLE,
    PlainAttention,
    distribution,
    distributions,
    gradient_profile,
    layer_norms,
    measure_growth,
    moments,
    place_statistics,
)
from empirics.spectral import explicit_jacobian, explicit_opnorm
from theory.architecture import Architecture, preset

# --- a layer's norms --------------------------------------------------------------------------------------------

LAYERED: dict[str, Any] = {
    "d_model": 12, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_head": 4, "d_ffn": 30, "vocab_size": 50,
}  # fmt: skip


LAYOUTS: dict[str, dict[str, Any]] = {
    "pre-ln": {},
    "pre-ln, gated, rope": {"gated": True, "positions": "rope"},
    "depth scaling": {"norm_depth_scaling": True, "shortcut_multiplier": 0.9, "residual_multiplier": 0.4},
    "post-ln": {"block": "post-ln", "shortcut_multiplier": 1.4},
    "post-ln without a final norm": {"block": "post-ln", "final_norm": False, "norm": "rmsnorm"},
    "peri-ln": {"block": "peri-ln", "attention_softcap": 1.5, "window": 3, "positions": "rope"},
    "branch-ln": {"block": "branch-ln", "qk_norm": "full", "residual_multiplier": 0.4},
    "parallel": {"parallel": True, "positions": "alibi"},
    "parallel with one norm": {"parallel": True, "shared_norm": True, "norm_depth_scaling": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_norms_are_those_of_explicit_jacobians(layout: str) -> None:
    a = architecture(**(LAYERED | {"activation": "gelu", "biases": True} | LAYOUTS[layout]))
    model = disturbed(a)
    tokens = torch.from_numpy(random_tokens(50, seed=0, batch_size=1, seq_len=6)[0])
    tolerance = 1e-3
    seen: list[int] = []
    rows = layer_norms(model, tokens, tolerance=tolerance, on_layer=seen.append)
    assert seen == [0, 1]
    assert all(parameter.requires_grad for parameter in model.parameters())
    places: list[Tensor] = []
    model(tokens, places)
    one = torch.eye(6 * 12, dtype=torch.float64)
    count = len(a.updates)
    for n, (row, layer) in enumerate(zip(rows, model.layers, strict=True)):
        x, middle = places[n * count].detach(), places[n * count + count - 1].detach()
        gain = 1 / math.sqrt(n + 1) if a.norm_depth_scaling else 1.0

        def scaled(norm: Any, v: Tensor, gain: float = gain) -> Tensor:
            return v if norm is None else norm(v) * gain

        def branch(sub: Any, before: Any, after: Any, v: Tensor) -> Tensor:
            v = sub(scaled(before, v))
            return a.residual_multiplier * (v if a.block == "post-ln" else scaled(after, v))

        plain, norm = PlainAttention(layer.attention), layer.attention_norm
        roles = {
            "attention": (plain, norm, layer.attention_out_norm, x),
            "feedforward": (layer.feedforward, layer.feedforward_norm or norm, layer.feedforward_out_norm, middle),
        }
        expected: dict[str, float] = {"J_Z": explicit_opnorm(plain.heads, scaled(norm, x).detach())}
        exact = {
            "sigma_x": math.sqrt(np.var(x.numpy(), axis=-1).mean()),
            "opnorm_O": svd_norm(layer.attention.output.weight),
            "opnorm_1": svd_norm(layer.feedforward.enter.weight),
            "opnorm_2": svd_norm(layer.feedforward.leave.weight),
        }
        total = a.shortcut_multiplier * one
        for name, (sub, before, after, at) in roles.items():
            jacobian = explicit_jacobian(lambda v, r=(sub, before, after): branch(*r, v), at)
            expected[f"{name}_branch"] = svd_norm(jacobian)
            total = total + jacobian
            half = a.shortcut_multiplier * one + jacobian
            added = a.shortcut_multiplier * at + branch(sub, before, after, at)
            if a.block == "post-ln":
                half = explicit_jacobian(lambda v, after=after: scaled(after, v), added.detach()) @ half
            if not a.parallel:
                expected[f"{name}_half"] = svd_norm(half)
            if before is not None:
                exact[f"s_{name}"] = normaliser(a, at)
            if after is not None:
                exact[f"s_{name}_out"] = normaliser(a, added if a.block == "post-ln" else sub(scaled(before, at)))
        if a.parallel:
            expected["layer"] = svd_norm(total)
        else:
            exact["sigma_xp"] = math.sqrt(np.var(middle.numpy(), axis=-1).mean())
        for name, truth in expected.items():
            assert truth * (1 - tolerance) <= row[name] <= truth * (1 + 1e-12), name
        for name, truth in exact.items():
            assert row[name] == pytest.approx(truth, rel=1e-12), name
        assert set(row) == set(expected) | set(exact)


def normaliser(a: Architecture, x: Tensor) -> float:
    values = x.detach().numpy()
    square = np.var(values, axis=-1) if a.norm == "layernorm" else np.square(values).mean(-1)
    return math.sqrt(square.min() + a.eps)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_product_of_measured_norms_bounds_the_growth(layout: str) -> None:
    """|g_l| <= prod |I + J| |g_N|, with explicit norms of the whole sequence."""
    model = disturbed(architecture(**(LAYERED | LAYOUTS[layout])))
    tokens, targets = map(torch.from_numpy, random_tokens(50, seed=3, batch_size=1, seq_len=5))
    _, gradient = gradient_profile(model, tokens, targets)
    places: list[Tensor] = []
    model(tokens, places)
    updates = [update for layer in model.layers for update in layer.updates]
    assert len(gradient) == len(places) == len(updates) + 1
    bound = gradient[-1]
    with sdpa_kernel(SDPBackend.MATH):
        for place in reversed(range(len(updates))):
            norm = explicit_opnorm(updates[place], places[place].detach())
            assert gradient[place] <= gradient[place + 1] * norm * (1 + 1e-9)
            bound *= norm
            assert gradient[place] <= bound * (1 + 1e-9)


# --- gradients --------------------------------------------------------------------------------------------------


def by_hand(model: Transformer, tokens: Tensor, targets: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Residual stream and gradient at every place: the network is cut there and the rest differentiated anew."""
    updates = [update for layer in model.layers for update in layer.updates]
    streams = [model.embed(tokens).detach()]
    for update in updates:
        streams.append(update(streams[-1]).detach())
    gradients = []
    for place, stream in enumerate(streams):
        start = stream.clone().requires_grad_()
        x = start
        for update in updates[place:]:
            x = update(x)
        logits = model.head(model.norm(x)).flatten(0, 1)
        loss = -torch.log_softmax(logits, -1)[torch.arange(targets.numel()), targets.flatten()].mean()
        gradients.append(torch.autograd.grad(loss, start)[0])
    return streams, gradients


@pytest.mark.parametrize(
    ("layout", "treatment"),
    [
        *(("pre-ln", treatment) for treatment in ("vanilla", "embed-detach", "scaled-embed", "embed-ln")),
        *((layout, "embed-ln") for layout in LAYOUTS if layout != "pre-ln"),
    ],
)
def test_place_statistics_by_hand(layout: str, treatment: Any) -> None:
    a = architecture(**(LAYERED | {"positions": "rope"} | LAYOUTS[layout])).with_embedding(treatment)
    model = disturbed(a)
    tokens, targets = map(torch.from_numpy, random_tokens(50, seed=1, batch_size=2, seq_len=6))
    deviation, gradient = gradient_profile(model, tokens, targets)
    streams, gradients = by_hand(model, tokens, targets)
    assert len(deviation) == len(gradient) == 2 * len(a.updates) + 1
    for n, (x, g) in enumerate(zip(streams, gradients, strict=True)):
        expected = math.sqrt(np.mean([np.var(token.numpy()) for token in x.flatten(0, 1)]))
        assert deviation[n] == pytest.approx(expected, rel=1e-12)
        # The loss is taken of float32 logits, whatever the model's precision: 6e-8 a token, averaged.
        assert gradient[n] == pytest.approx(float(g.norm()), rel=1e-5)


def test_place_without_a_gradient_is_not_a_number() -> None:
    deviation, gradient = place_statistics([torch.ones(1, 2, 4)])
    assert deviation == [0.0]
    assert math.isnan(gradient[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_growth_is_the_geometric_mean_over_seeds(layout: str) -> None:
    a = architecture(**(LAYERED | LAYOUTS[layout]))

    def batches(seed: int) -> Any:
        return random_tokens(50, seed=seed, batch_size=2, seq_len=6)

    logs, deviations = [], []
    for seed in (0, 1, 2):
        model = build(a, seed=seed)
        deviation, gradient = gradient_profile(model, *map(torch.from_numpy, batches(seed)))
        logs.append([math.log(g / gradient[-1]) for g in gradient])
        deviations.append([math.log(d) for d in deviation])
    seen: list[int] = []
    growth, profile, residual = measure_growth(a, seeds=(0, 1, 2), batches=batches, on_seed=seen.append)
    assert seen == [0, 1, 2]
    assert [m.quantity for m in (growth, profile, residual)] == ["gradient_growth", "gradient_profile", "residual_std"]
    assert growth.values == profile.values[:1]
    assert profile.values[-1] == 1.0
    assert profile.values == pytest.approx(np.exp(np.mean(logs, axis=0)), rel=1e-12)
    assert residual.values == pytest.approx(np.exp(np.mean(deviations, axis=0)), rel=1e-12)
    assert profile.log_sd == pytest.approx(np.std(logs, axis=0, ddof=1), rel=1e-9, abs=1e-15)
    assert all(m.seeds == (0, 1, 2) and not m.lower_estimate for m in (growth, profile, residual))
    assert len(profile.values) == len(residual.values) == 2 * len(a.updates) + 1
    (alone, _, _) = measure_growth(a, seeds=(4,), batches=batches)
    assert alone.log_sd is not None
    assert math.isnan(alone.log_sd[0])


@pytest.mark.parametrize("zero", ["embedding", "head"])
def test_growth_of_nothing_is_refused(zero: str) -> None:
    init = replace(preset("tiny").init, **{zero: 0.0})
    with pytest.raises(ValueError, match="not zero"):
        measure_growth(
            architecture(**LAYERED, init=init),
            seeds=(0,),
            batches=lambda seed: random_tokens(50, seed=seed, batch_size=2, seq_len=6),
        )


@pytest.mark.parametrize("training", [False, True])
def test_probing_changes_no_bit(training: bool) -> None:
    """Losses and parameter gradients, with and without the places kept."""
    tokens, targets = map(torch.from_numpy, random_tokens(512, seed=0, batch_size=2, seq_len=16))
    results = []
    for places in (None, []):
        model = build(preset("tiny"), seed=0).train(training)
        loss = model.loss(tokens, targets, places)
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(one, other) for one, other in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_probes_leave_the_model_as_it_was(layout: str) -> None:
    model = build(architecture(**(LAYERED | LAYOUTS[layout])), seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens, targets = map(torch.from_numpy, random_tokens(50, seed=0, batch_size=1, seq_len=6))
    state = torch.random.get_rng_state()
    gradient_profile(model, tokens, targets)
    layer_norms(model, tokens)
    distributions(model, tokens)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- distributions ----------------------------------------------------------------------------------------------


def test_distribution_of_a_normal_sample() -> None:
    n = 40_000
    values = 3.0 + 2.0 * normal(0, n)
    found = distribution(values.reshape(100, 400))
    assert found["entries"] == n
    assert found["mean"] == pytest.approx(float(values.mean()), rel=1e-12)
    assert found["std"] == pytest.approx(float(values.std(unbiased=False)), rel=1e-12)
    # Standard errors of a normal sample: sqrt(6/n) of the skewness, sqrt(24/n) of the excess kurtosis. The distance
    # to the fitted law stays below Lilliefors' 0.1 % critical value, 1.2/sqrt(n).
    assert abs(found["skewness"]) < 4 * math.sqrt(6 / n)
    assert abs(found["excess_kurtosis"]) < 4 * math.sqrt(24 / n)
    assert 0 < found["normal_distance"] < 1.2 / math.sqrt(n)
    assert found["quantiles"][4] == pytest.approx(3.0, abs=0.05)


@pytest.mark.parametrize(
    ("sample", "distance", "kurtosis"),
    [
        (lambda u: u, 0.0572, -1.2),  # uniform: the gap to the normal law is largest at 0.71 deviations
        (lambda u: (u > 0.5).double(), 0.3413, -2.0),  # a fair coin: Phi(1) - 1/2
        (lambda u: -torch.log1p(-u), 0.1587, 6.0),  # exponential: Phi(-1), at its lower end
    ],
)
def test_distribution_of_other_samples(sample: Any, distance: float, kurtosis: float) -> None:
    n = 40_000
    found = distribution(sample(torch.rand(n, generator=generator(1), dtype=torch.float64)))
    assert found["normal_distance"] == pytest.approx(distance, abs=4 / (2 * math.sqrt(n)))  # four standard errors
    assert found["excess_kurtosis"] == pytest.approx(kurtosis, abs=1.2)  # eighth moments: a wide standard error
    assert found["normal_distance"] > 5 / math.sqrt(n)  # control: far beyond what a normal sample shows


def test_distance_is_kolmogorovs() -> None:
    values = normal(5, 300) ** 3
    expected = stats.kstest(values.numpy(), "norm", args=(float(values.mean()), float(values.std(unbiased=False))))
    assert distribution(values)["normal_distance"] == pytest.approx(expected.statistic, rel=1e-12)


def test_distribution_of_a_constant_and_of_a_large_tensor() -> None:
    third = float(np.float32(1 / 3))  # whose sum over 12 is rounded
    constant = {"mean": third, "std": 0.0, "size": 12, "entries": 12}
    assert distribution(torch.full((3, 4), 1 / 3)) == constant
    values = normal(0, 3 * SAMPLE + 1).float()
    large = distribution(values)
    assert (large["size"], large["entries"]) == (3 * SAMPLE + 1, SAMPLE)
    assert large["std"] == pytest.approx(float(values.double().std(unbiased=False)), rel=1e-12)
    lost = distribution(torch.tensor([1.0, math.nan, 2.0]))
    assert math.isnan(lost["mean"])
    assert "excess_kurtosis" not in lost


@pytest.mark.parametrize("rows", [SAMPLE - 1, SAMPLE, 2 * SAMPLE])
def test_the_sample_is_of_every_column(rows: int) -> None:
    """Columns that lie apart by two, so that those of any one are not the whole; of as many rows as the sample too."""
    values = normal(0, rows, 4) * 0.1 + torch.arange(4) * 2.0
    found = distribution(values)
    expected = np.quantile(values.numpy(), [0.001, 0.999])
    assert (found["quantiles"][0], found["quantiles"][-1]) == pytest.approx(expected, abs=0.3)
    assert found["entries"] >= SAMPLE - 8


def test_moments_are_of_every_entry() -> None:
    """One outlier of 60 among 160,000 normal entries, which most samples of them do not have."""
    values = normal(0, 400, 400)
    values[0, 1] = 60.0
    found = distribution(values.float())
    assert found["excess_kurtosis"] == pytest.approx(stats.kurtosis(values.float().double(), axis=None), rel=1e-12)
    assert found["excess_kurtosis"] > 60**4 / 160_000 / (1 + 60**2 / 160_000) ** 2 - 1
    assert found["skewness"] == pytest.approx(stats.skew(values.float().double(), axis=None), rel=1e-12)
    assert found["standard_errors"]["excess_kurtosis"] == math.sqrt(24 / 160_000)
    assert found["normal_distance"] < 1.2 / math.sqrt(SAMPLE)  # one entry moves no distribution function


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize(("scale", "dtype"), [(1e-40, torch.float32), (1e38, torch.float32), (1e200, torch.float64)])
def test_moments_piece_by_piece(piece: int, scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large or small the entries are, whose fourth powers are no float64; and far from 0."""
    monkeypatch.setattr(probes, "PIECE", piece)
    values = ((normal(3, 300).exp() - 2) * scale / 100).to(dtype)
    z = values.double().numpy() / scale
    expected = (z.mean() * scale, z.std() * scale, stats.skew(z), stats.kurtosis(z))
    assert moments(values) == pytest.approx(expected, rel=1e-9, abs=0)


def test_a_sample_has_as_much_of_every_column() -> None:
    """Columns whose deviations are 1 and 3 in turns: every fourth entry is of columns of one kind."""
    values = normal(0, 400, 400)
    values[:, 1::2] *= 3
    found = distribution(values)
    deviation = float(values.std(unbiased=False))
    whole = stats.kstest(values.flatten().numpy(), "norm", args=(float(values.mean()), deviation)).statistic
    error = found["standard_errors"]["normal_distance"]
    assert found["normal_distance"] == pytest.approx(whole, abs=4 * error)
    assert whole > 20 * error  # control: columns of one kind are normal


def test_distributions_name_the_ends_of_the_network() -> None:
    model = build(preset("tiny"), seed=0)
    tokens = torch.from_numpy(random_tokens(512, seed=0, batch_size=2, seq_len=16)[0])
    found = distributions(model, tokens)
    assert len(found["places"]) == 2 * 12 + 1
    layers = {name.split(".")[1] for name in found["weights"] if name.startswith("layers")}
    assert layers == {"0", "11"}
    assert {"tokens.weight", "head.weight"} <= set(found["weights"])


# --- identities -------------------------------------------------------------------------------------------------


def exact(norm: Any, positions: Any) -> Transformer:
    """eps = 0 and no norm bias: the branches are invariant under scaling their input."""
    a = architecture(**LAYERED, norm=norm, positions=positions, eps=0.0, activation="gelu", gated=True)
    return disturbed(a)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("positions", ["rope", "none"])
def test_gradient_identities(norm: Any, positions: Any) -> None:
    """<g_l - g_{l+1}, x_l> = 0 for every token and half-layer, <g_N, x_N> = 0; LayerNorm: orthogonal to 1 as well."""
    model = exact(norm, positions)
    tokens, targets = map(torch.from_numpy, random_tokens(50, seed=2, batch_size=2, seq_len=6))
    streams, gradients = by_hand(model, tokens, targets)
    pairs = [(gradients[n] - gradients[n + 1], streams[n]) for n in range(4)] + [(gradients[4], streams[4])]
    for change, x in pairs:
        size = change.norm(dim=-1) * x.norm(dim=-1) + 1e-300
        # Float64 products of a few dozen terms; the last token of the attention half is not treated otherwise.
        assert float(((change * x).sum(-1).abs() / size).max()) < 1e-12
        if norm == "layernorm":
            assert float((change.sum(-1).abs() / (size / x.norm(dim=-1))).max()) < 1e-11
        assert float(change.norm(dim=-1).max()) > 1e-6, "the identity is of nothing"


def test_gradient_identity_fails_with_a_large_eps() -> None:
    """Control: an eps of the size of the variance breaks the scale invariance."""
    model = disturbed(architecture(**LAYERED, eps=1.0))
    streams, gradients = by_hand(model, *map(torch.from_numpy, random_tokens(50, seed=2, batch_size=1, seq_len=6)))
    change, x = gradients[4], streams[4]
    assert float((change * x).sum(-1).abs().max()) > 1e-3 * float(change.norm() * x.norm())


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("place", [0, 1])
def test_branch_jacobian_scales_and_ignores_the_radius(norm: Any, place: int) -> None:
    """J(cx) = J(x)/c and J(x) x = 0."""
    model = exact(norm, "rope")
    x, layer = normal(4, 1, 5, 12), model.layers[0]
    plain = PlainAttention(layer.attention)
    branch = [lambda v: plain(layer.attention_norm(v)), layer.feedforward_branch][place]
    jacobian = explicit_jacobian(branch, x)
    size = float(jacobian.norm())
    for c in (1e-3, 0.5, 40.0):
        assert float((explicit_jacobian(branch, c * x) * c - jacobian).norm()) < 1e-11 * size
    assert float((jacobian @ x.reshape(-1)).norm()) < 1e-12 * size * float(x.norm())
    # Token by token, too: attention's projector acts on each key and query alone.
    blocks = jacobian.reshape(60, 5, 12)
    for t in range(5):
        assert float((blocks[:, t] @ x[0, t]).norm()) < 1e-12 * size * float(x.norm())


def test_zero_pattern_of_the_branches() -> None:
    """The feed-forward half acts on tokens alone; attention sees no later token."""
    model = exact("layernorm", "rope")
    x, layer = normal(4, 1, 5, 12), model.layers[0]
    plain = PlainAttention(layer.attention)
    attention = explicit_jacobian(lambda v: plain(layer.attention_norm(v)), x).reshape(5, 12, 5, 12)
    feedforward = explicit_jacobian(layer.feedforward_branch, x).reshape(5, 12, 5, 12)
    for t in range(5):
        for j in range(5):
            assert bool(attention[t, :, j].any()) == (j <= t)
            assert bool(feedforward[t, :, j].any()) == (j == t)


# --- beside the theory ------------------------------------------------------------------------------------------


def layer_bounds(a: Architecture) -> tuple[list[dict[str, float]], dict[tuple[str, str], tuple[float, ...]]]:
    """Measured norms of each layer, and what is predicted from them, by quantity and kind."""
    tokens = torch.from_numpy(random_tokens(50, seed=0, batch_size=1, seq_len=8)[0])
    rows = layer_norms(build(a, seed=0), tokens)
    return rows, {(found.quantity, found.kind): found.values for found in _layer_bounds(a, rows)}


@pytest.mark.parametrize("changes", [{}, {"parallel": True}, {"norm_depth_scaling": True}], ids=str)
def test_bounds_of_a_layer_follow_its_multipliers(changes: dict[str, Any]) -> None:
    """The upper bound holds, and a residual multiplier of 10 is a factor of 10 on what is added in the first layer."""
    a = architecture(**LAYERED, **changes)
    _, plain = layer_bounds(a)
    rows, found = layer_bounds(replace(a, residual_multiplier=10.0))
    measured, bounds = [row["feedforward_branch"] for row in rows], found["ffn_branch", "upper"]
    assert all(norm <= bound for norm, bound in zip(measured, bounds, strict=True))
    assert any(norm > bound / 10 for norm, bound in zip(measured, bounds, strict=True)), "control"
    estimates = [values["attention_branch", "estimate"][0] for values in (found, plain)]
    assert estimates[0] == pytest.approx(10 * estimates[1], rel=1e-6)


def test_squares_are_bounded_by_what_they_can_reach() -> None:
    """ReLU squared has no largest slope, but one for the pre-activations of a normalised token."""
    rows, found = layer_bounds(architecture(**LAYERED, activation="relu-squared"))
    measured, bounds = [row["feedforward_branch"] for row in rows], found["ffn_branch", "upper"]
    assert all(norm <= bound < math.inf for norm, bound in zip(measured, bounds, strict=True))
    assert any(norm > bound / 100 for norm, bound in zip(measured, bounds, strict=True)), "control"


@pytest.mark.parametrize("block", ["post-ln", "peri-ln", "branch-ln"])
def test_other_layouts_have_no_bound_of_a_normalised_branch(block: Any) -> None:
    assert layer_bounds(architecture(**LAYERED, block=block))[1] == {}


def test_a_distribution_leaves_memory_that_can_be_freed() -> None:
    """As it is between the passes of a model in shards; that of a tensor which numpy shares cannot be."""
    for dtype in (torch.float32, torch.float64):
        values = normal(0, 300).to(dtype)
        distribution(values)
        values.untyped_storage().resize_(0)
