"""Every criterion has records on which it holds and a corruption under which it must not."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from figures.claims import CLAIMS, NOT_REPRODUCED, NOT_TESTED, REPRODUCED, judge_all
from theory.architecture import METHODS

KEYS = {"id", "claim", "kind", "verdict", "criterion", "observed", "predicted", "error", "seeds", "source"}
WEAK = ("Vanilla", "Embed Detach", "Xavier + Scaled Embed")
UNTESTABLE = {"claim-12", "claim-13"}


def prediction(quantity: str, kind: str, values: list[float]) -> dict[str, Any]:
    return {"quantity": quantity, "kind": kind, "values": values, "in_domain": True, "reasons": []}


def initialisation(label: str) -> dict[str, Any]:
    """Two layers of width 256 whose norms lie below the estimates and whose growth is predicted exactly."""
    growth = 10.0 if label in WEAK else 1.2
    return {
        "kind": "initialisation",
        "label": label,
        "preset": "wide",
        "tokens": "random",
        "seeds": [0, 1],
        "architecture": {"d_model": 256},
        "predictions": [
            prediction("ffn_branch", "estimate", [2.0, 1.0]),
            prediction("attention_branch", "estimate", [2.0, 1.0]),
            prediction("gradient_growth", "sharp", [growth]),
        ],
        "measurements": [{"quantity": "gradient_growth", "values": [growth], "log_sd": [0.01]}],
        "jacobians": {"seed": 0, "layers": [{"feedforward_half": 1.8, "attention_half": 1.8}] * 2},
        "norm_jacobian": {"opnorm_sigma": 1.0, "paper_gap": 1 / 16, "exact_gap": 1e-16},
    }


def predicted(label: str) -> dict[str, Any]:
    excess = [26.0, 3.0] if label in WEAK else [0.8, 0.7]
    values = [prediction("ffn_branch", "estimate", excess), prediction("gradient_growth", "sharp", [5.0])]
    return {"kind": "prediction", "label": label, "preset": "350m", "predictions": values}


def training(label: str, seed: int, rate: float, experiment: str = "sweep") -> dict[str, Any]:
    """Weak methods lose more the higher the rate; the detached embedding has a tenth of the gradient."""
    weak = label in WEAK
    detach = label == "Embed Detach"
    normal = {"mean": 0.0, "std": 1.0, "normal_distance": 0.01}
    entries = {"places": [dict(normal)], "weights": {"head": dict(normal)}}
    return {
        "kind": "training",
        "spec": {
            "label": label,
            "experiment": experiment,
            "seed": seed,
            "learning_rate": rate,
            "seq_len": 64,
            "architecture": {"d_model": 64, "embedding_gradient": 0.1 if detach else 1.0},
        },
        "series": {
            "gradient_norm": [3.0 if weak else 0.5] * 5,
            "place_gradient": [[2.0, 1.5, 1.2, 1.1, 1.0]],
            "embedding_gradient": [0.2 if detach else 2.0],
            "distributions": {"start": entries, "end": copy.deepcopy(entries)},
        },
        "final": {"heldout_loss": 4.0 + 0.01 * seed + (10 * rate if weak else 0.0), "diverged_at": None},
    }


def event_row(label: str, seed: int, quantity: str, experiment: str = "sweep", count: int = 0) -> dict[str, Any]:
    steps = list(range(count))
    definition = "robust-deviation" if quantity == "loss" else "twice-median"
    row = {"label": label, "seed": seed, "learning_rate": 0.03, "experiment": experiment, "quantity": quantity}
    length = 32 if experiment == "short-sequences" else 64
    return row | {"definition": definition, "raw": steps, "paired": steps, "seq_len": length}


def records() -> list[dict[str, Any]]:
    """Records on which every claim that can be tested holds."""
    made = [build(label) for label in METHODS for build in (initialisation, predicted)]
    made += [training(label, seed, rate) for label in METHODS for seed in (0, 1) for rate in (0.01, 0.03)]
    made += [training(label, seed, 0.01, "llama-style") for label in ("Vanilla", "Scaled Embed") for seed in (0, 1)]
    rows = [event_row(label, seed, "loss", count=label == "Vanilla") for label in METHODS for seed in (0, 1)]
    rows += [event_row("Vanilla", seed, "gradient_norm", count=3) for seed in (0, 1)]
    rows += [event_row("Vanilla", seed, "gradient_norm", "short-sequences", 1) for seed in (0, 1)]
    return [*made, {"kind": "spikes", "rows": rows}]


def test_every_claim_is_listed_once_with_every_key() -> None:
    rows = judge_all(records())
    assert [row["id"] for row in rows][:13] == [f"claim-{n:02}" for n in range(1, 14)]
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(set(row) == KEYS for row in rows)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_verdict_follows_the_records(claim: Any) -> None:
    assert claim.verdict([])["verdict"] == NOT_TESTED
    if claim.id in UNTESTABLE:
        assert claim.verdict(records())["verdict"] == NOT_TESTED
        return
    assert claim.verdict(records())["verdict"] == REPRODUCED
    before = records()
    assert claim.verdict(claim.control(before))["verdict"] == NOT_REPRODUCED
    assert before == records()  # a control corrupts copies


def test_a_diverged_run_counts_as_an_infinite_loss() -> None:
    made = records()
    for record in made:
        if record["kind"] == "training" and record["spec"]["label"] == "Vanilla":
            record["final"] = {"heldout_loss": None, "diverged_at": 3}
    row = next(row for row in judge_all(made) if row["id"] == "question-03")
    assert row["verdict"] == REPRODUCED
    assert "inf" in row["observed"]
