"""What the theory does not do yet: each target as a strict expected failure, with the gap that was measured."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from empirics.model import Transformer, build
from empirics.probes import gradient_profile
from theory.architecture import Architecture, preset
from theory.growth import gradient_growth
from theory.initialisation import Init
from theory.statements import find
from theory.verdict import check

VOCABULARY, LENGTH = 64, 32


def small() -> Architecture:
    sizes: dict[str, Any] = {
        "d_model": 64, "n_layers": 4, "n_heads": 2, "n_kv_heads": 2, "d_head": 32, "d_ffn": 256,
        "vocab_size": VOCABULARY, "context": LENGTH,
    }  # fmt: skip
    return replace(preset("tiny"), **sizes).with_embedding("vanilla")


def sentences(seed: int, count: int) -> torch.Tensor:
    """Tokens of which each follows from the one before, or is random one time in four."""
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(VOCABULARY, (count,), generator=g)]
    for _ in range(LENGTH):
        random = torch.randint(VOCABULARY, (count,), generator=g)
        rows.append(torch.where(torch.rand(count, generator=g) < 0.25, random, (5 * rows[-1] + 7) % VOCABULARY))
    return torch.stack(rows, dim=1)


@cache
def trained(seed: int) -> Transformer:
    """A hundred steps of Adam."""
    model = build(small(), seed=seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for step in range(100):
        text = sentences(1000 * seed + step, 8)
        optimiser.zero_grad()
        model.loss(text[:, :-1], text[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model


def measured_init(model: Transformer) -> Init:
    """The trained matrices' root mean squares, as a recipe."""

    def rms(part: str) -> float:
        found = [p for name, p in model.named_parameters() if part in name and p.ndim == 2]
        return math.sqrt(sum(float(p.detach().square().sum()) for p in found) / sum(p.numel() for p in found))

    writers = math.hypot(rms("attention.output"), rms("feedforward.leave")) / math.sqrt(2)
    return Init(
        name="measured", hidden=rms("feedforward.enter"), embedding=rms("tokens"), position=0.0, head=rms("head"),
        query_key=math.hypot(rms("query"), rms("key")) / math.sqrt(2), value=rms("value"), writers=writers,
    )  # fmt: skip


def gap(model: Transformer) -> float:
    """Log of predicted over measured growth."""
    text = sentences(77, 16)
    _, gradient = gradient_profile(model, text[:, :-1], text[:, 1:])
    predicted = gradient_growth(replace(small(), init=measured_init(model)), LENGTH)
    return math.log(predicted.value / (gradient[0] / gradient[-1]))


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="trained matrices are not independent numbers of their own size: after a hundred steps the prediction is "
    "43 % and 38 % too low at two seeds, where the target is a log of 0.1",
)
def test_growth_follows_training_by_the_sizes_of_the_matrices() -> None:
    gaps = [gap(trained(seed)) for seed in range(2)]
    assert all(abs(gap) <= 0.1 for gap in gaps), gaps


def test_the_same_measurement_at_initialisation_is_right() -> None:
    """The control: before training the same comparison holds."""
    assert abs(gap(build(small(), seed=0))) <= 0.15


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="no run calibrates growth to an outcome: of 60 trainings on two cores none diverged, so a growth of some "
    "hundreds is called at risk and never unstable",
)
def test_growth_says_whether_a_run_diverges() -> None:
    assert check(preset("350m").with_init("xavier"), 1024).outcome == "unstable"


UNEVEN = {
    "c_VO": 0.72,
    "s": 1.0,
    "d": 256,
    "n_heads": 4,
    "d_head": 64,
    "n_tokens": 16,
    "logit_variance": 1.0,
    "kv_group": 1,
}


def against_simulation(closed: str, simulated: str, **changes: float) -> float:
    """Log of a closed form over the mean of simulated draws, at uneven softmax rows."""
    values = UNEVEN | changes
    return math.log(float(find(closed).evaluate(values)) / float(find(simulated).evaluate(values)))


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="the outlier of one row leaves out that rows strengthen each other: 3.1 % below the mean of 1400 simulated "
    "draws, known to 0.2 % (3.6 % below that of the statement's 64), at 16 tokens and logit variance 1, where the "
    "target is 3 %; its strength is drawn, too, and has no formula",
)
def test_attention_norm_at_uneven_rows_in_closed_form() -> None:
    assert abs(against_simulation("attention-uneven-sharp", "attention-simulated")) <= 0.03


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="with the shortcut there is a closed form at even rows alone: 29 % low at logit variance 1, where the "
    "target is 2.5 %",
)
def test_attention_half_layer_at_uneven_rows_in_closed_form() -> None:
    gap = against_simulation("attention-half-layer-sharp", "attention-half-layer-simulated", c_VO=0.25)
    assert abs(gap) <= 0.025


def test_both_closed_forms_hold_where_they_claim_to() -> None:
    """The control: at their own targets, and at even rows with the shortcut."""
    assert abs(against_simulation("attention-uneven-sharp", "attention-simulated")) <= 0.06
    changes = {"c_VO": 0.25, "logit_variance": 0.05}
    gap = against_simulation("attention-half-layer-sharp", "attention-half-layer-simulated", **changes)
    assert abs(gap) <= 0.025
