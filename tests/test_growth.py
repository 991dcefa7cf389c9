"""The growth recursion: documented values, its limits and its symmetries, and a small network that is measured."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from empirics.data import random_tokens
from empirics.probes import measure_growth
from theory.architecture import EMBEDDINGS, Architecture, method, preset
from theory.embedding_gram import Stream
from theory.growth import gradient_growth, growth_closed_form
from theory.initialisation import Init


@pytest.mark.parametrize(
    ("name", "method_name", "documented", "tolerance"),
    [
        ("350m", "Vanilla", 16.3, 0.06),
        ("350m", "Scaled Embed", 1.183, 0.01),
        ("350m", "Embed LN", 1.077, 0.01),
        ("1.7b", "Vanilla", 24.7, 0.08),
        ("13b", "Vanilla", 35.2, 0.08),
        ("13b", "Scaled Embed", 1.183, 0.01),
    ],
)
def test_documented_values(name: str, method_name: str, documented: float, tolerance: float) -> None:
    value = gradient_growth(method(preset(name), method_name), 1024).value
    print(f"{name} {method_name}: {value:.4f} against {documented}: {value / documented - 1:+.2%}")
    assert value == pytest.approx(documented, rel=tolerance)


def test_embed_detach_is_vanilla() -> None:
    a = preset("small")
    assert gradient_growth(a.with_embedding("embed-detach"), 64) == gradient_growth(a, 64)
    assert growth_closed_form(a.with_embedding("embed-detach"), 64) == growth_closed_form(a, 64)


@given(scales=st.lists(st.floats(0.1, 100), min_size=2, max_size=2, unique=True), tokens=st.integers(1, 500))
def test_growth_decreases_in_the_embedding_scale(scales: list[float], tokens: int) -> None:
    small, large = sorted(scales)
    a = replace(preset("tiny"), n_layers=2)
    forms = [growth_closed_form(replace(a, embedding_multiplier=scale), tokens) for scale in (small, large)]
    assert forms[0] >= forms[1] >= 1
    if large > 1.01 * small:
        assert forms[0] > forms[1]


def test_recursion_decreases_in_the_embedding_scale() -> None:
    a = preset("tiny")
    values = [gradient_growth(replace(a, embedding_multiplier=scale), 32).value for scale in (0.5, 1, 2, 5, 20, 200)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(1, abs=1e-3)


def test_closed_form_by_hand() -> None:
    """350M, Scaled Embed: one layer adds b = (2/5) (4 d) (2/(5 d)) / (2 N) / 2 + (2/5)^2/(2 N) H_T/T to 2/5."""
    a, tokens = method(preset("350m"), "Scaled Embed"), 1024
    harmonic = float(np.sum(1 / np.arange(1, tokens + 1)))
    feedforward = 0.4 * 1.6 / 48 / 2
    added = feedforward + 0.4 * 0.4 / 48 * harmonic / tokens
    assert growth_closed_form(a, tokens) == pytest.approx(math.sqrt(1 + 24 * added / 0.4), rel=1e-12)


@pytest.mark.parametrize("name", ["Scaled Embed", "Embed LN"])
def test_closed_form_is_close_where_branches_are_small(name: str) -> None:
    a = method(preset("350m"), name)
    assert growth_closed_form(a, 1024) == pytest.approx(gradient_growth(a, 1024).value, rel=0.01)


def test_product_of_gradient_and_scale_is_conserved() -> None:
    """ReLU, no correlations of the gradient with the logits, eps 0, wide: g_l s_l is the same at every place."""
    wide = Init(name="flat", hidden=1e-3, embedding=0.02, position=0.02, head=0.02, depth_scaled=False)
    a = replace(preset("350m"), n_layers=3, eps=0.0, init=wide)
    answer = gradient_growth(a, 1, attention="uniform")  # one token: nothing to correlate with
    # The finite width's (d-2)/(d-3) on each branch is all that is left, and the branches are small here.
    products = np.array(answer.gradient) * np.array(answer.residual_std)
    np.testing.assert_allclose(products / products[-1], 1, rtol=2e-3)


def test_profile_and_answer_agree() -> None:
    for treatment in EMBEDDINGS:
        answer = gradient_growth(preset("small").with_embedding(treatment), 48)
        assert len(answer.gradient) == len(answer.residual_std) == 2 * 12 + 1
        assert answer.gradient[0] == answer.value
        assert answer.gradient[-1] == 1.0
        assert answer.in_domain
        assert answer.reasons == ()


def test_repeated_tokens_and_distinct_tokens() -> None:
    """Ids that are handed in are seen to be distinct; equal ids change the answer."""
    a = preset("tiny")
    distinct = gradient_growth(a, 20, tokens=np.arange(20), distinct=True)
    assert distinct.value == pytest.approx(gradient_growth(a, 20, distinct=True).value, rel=1e-12)
    repeated = gradient_growth(a, 20, tokens=np.arange(20) // 4)
    assert abs(repeated.value / distinct.value - 1) > 0.01
    assert not repeated.in_domain
    assert repeated.reasons == ("5 distinct tokens repeat over the sequence, fewer than 16",)
    assert gradient_growth(a, 20, tokens=np.arange(20) % 16).in_domain
    assert gradient_growth(a, 5, tokens=np.arange(5)).in_domain  # few tokens, but none repeats


def distinct_tokens(a: Architecture, seed: int, sequences: int, length: int) -> tuple[Any, Any]:
    """Sequences without a repeated token, and targets without one."""
    generator = np.random.default_rng(seed)
    rows = [[generator.permutation(np.arange(1, a.vocab_size))[:length] for _ in range(sequences)] for _ in range(2)]
    return np.array(rows[0]), np.array(rows[1])


@pytest.mark.parametrize(("treatment", "target"), [("vanilla", 0.05), ("scaled-embed", 0.015), ("embed-ln", 0.015)])
def test_growth_of_a_small_network(treatment: Any, target: float) -> None:
    """Theory against a network that is built and differentiated: within its target and three standard errors."""
    a, seeds = preset("tiny").with_embedding(treatment), (0, 1, 2, 3)
    growth_measured, _, residual = measure_growth(a, seeds=seeds, batches=lambda seed: distinct_tokens(a, seed, 4, 64))
    predicted = gradient_growth(a, 64, distinct=True)
    measured = growth_measured.values[0]
    assert growth_measured.log_sd is not None
    error = growth_measured.log_sd[0] / math.sqrt(len(seeds))
    gap = math.log(predicted.value / measured)
    print(f"tiny {treatment}: predicted {predicted.value:.4f}, measured {measured:.4f} +- {error:.2%}: {gap:+.2%}")
    assert abs(gap) <= target + 3 * error
    assert residual.values == pytest.approx(
        predicted.residual_std, rel=0.05
    )  # d = 64: a sample of few thousand entries


def test_growth_with_repeated_tokens() -> None:
    """One sequence of random ids, given to the theory as well."""
    a, seeds = preset("tiny"), (0, 1, 2, 3)
    logs, predictions = [], []
    for seed in seeds:

        def batches(seed: int) -> Any:
            return random_tokens(a.vocab_size, seed=seed, batch_size=1, seq_len=64)

        measured, _, _ = measure_growth(a, seeds=(seed,), batches=batches)
        tokens, targets = batches(seed)
        logs.append(math.log(measured.values[0]))
        predictions.append(math.log(gradient_growth(a, 64, tokens=tokens[0], targets=targets[0]).value))
    differences = np.array(predictions) - np.array(logs)
    error = differences.std(ddof=1) / math.sqrt(len(seeds))
    print(f"tiny with repeated tokens: {differences.mean():+.2%} +- {error:.2%}")
    assert abs(differences.mean()) <= 0.05 + 3 * error


# --- sinusoidal positions, whose mean over coordinates is not small ----------------------------------------------

SINUSOIDAL: dict[str, Any] = {
    "name": "sinusoidal", "d_model": 256, "n_layers": 1, "n_heads": 4, "n_kv_heads": 4, "d_head": 64, "d_ffn": 1024,
    "vocab_size": 4096, "context": 64, "positions": "sinusoidal",
    "init": Init(name="unit", hidden="fan-in", embedding=0.05, position=1.0, head="fan-in"),
}  # fmt: skip


@pytest.mark.parametrize("changes", [{"block": "post-ln", "n_layers": 2, "final_norm": False}, {"block": "branch-ln"}])
def test_what_reads_the_raw_stream_reads_its_mean(changes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """LayerNorm takes it out; an attention that reads the stream before any does not."""
    a = Architecture(**(SINUSOIDAL | changes))
    seeds = tuple(range(10))
    found, _, residual = measure_growth(a, seeds=seeds, batches=lambda seed: distinct_tokens(a, seed, 4, 32))
    assert found.log_sd is not None
    error = found.log_sd[0] / math.sqrt(len(seeds))
    predicted = gradient_growth(a, 32, distinct=True)
    gap = math.log(predicted.value / found.values[0])
    monkeypatch.setattr(Stream, "read", lambda stream, _: stream.varied)
    without = math.log(gradient_growth(a, 32, distinct=True).value / found.values[0])
    print(f"{a.block}: {gap:+.1%} +- {error:.1%}, with the mean left out {without:+.1%}")
    assert predicted.in_domain
    assert abs(gap) <= 0.02 + 3 * error
    assert without > 0.08 + 3 * error
    assert residual.values == pytest.approx(predicted.residual_std, rel=0.02)


def test_the_deviation_of_the_stream_is_without_its_mean() -> None:
    """RMSNorm keeps the mean, which the measurement removes, and so does the prediction."""
    a = Architecture(**(SINUSOIDAL | {"norm": "rmsnorm", "init": replace(SINUSOIDAL["init"], hidden=0.01)}))
    seeds = (0, 1)
    found, _, residual = measure_growth(a, seeds=seeds, batches=lambda seed: distinct_tokens(a, seed, 4, 32))
    predicted = gradient_growth(a, 32, distinct=True)
    assert residual.values == pytest.approx(predicted.residual_std, rel=0.02)
    assert found.values[0] == pytest.approx(predicted.value, rel=0.05)
    root_mean_square = math.hypot(0.05, math.sqrt(0.5))  # control: what it was taken for
    assert abs(math.log(residual.values[0] / root_mean_square)) > 0.08
