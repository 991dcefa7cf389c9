"""Training is a pure function of its specification, alone or in parallel: what it writes, divergence, bad input."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.training import record_bytes, specification
from helpers.weights import architecture

from empirics import run as run_module
from empirics import train as train_module
from empirics.data import batch, load_corpus
from empirics.model import build
from empirics.run import corpus_of, record_path, run
from empirics.sweep import run_all
from theory.architecture import method
from theory.records import read_record, read_records

# --- what a run writes ------------------------------------------------------------------------------------------


def test_record(text: Path, tmp_path: Path) -> None:
    spec = specification(text)
    record = run(spec, tmp_path)
    series = record["series"]
    assert record["id"] == spec.identity
    assert record["kind"] == "training"
    for name in ("loss", "learning_rate", "gradient_norm", "update_norm", "embedding_gradient", "layer_gradient"):
        assert len(series[name]) == spec.steps, name
    assert series["probe_step"] == [0, 3, 6]
    assert all(len(row) == 5 for row in series["residual_std"] + series["place_gradient"])
    # Logits of variance d std^2 = 2/5 add half of it to the loss of a uniform guess; 32 targets scatter by a tenth.
    assert series["loss"][0] == pytest.approx(math.log(258) + 0.2, abs=0.4)
    assert series["loss"][-1] < series["loss"][0]
    assert series["learning_rate"] == [spec.rate(step) for step in range(spec.steps)]
    assert set(series["distributions"]) == {"start", "end"}
    assert record["final"] == {"heldout_loss": record["final"]["heldout_loss"], "diverged_at": None}
    assert math.isfinite(record["final"]["heldout_loss"])
    assert not list((tmp_path / "checkpoints").glob("*"))
    total = [
        math.sqrt(e**2 + sum(g**2 for g in layers))
        for e, layers in zip(series["embedding_gradient"], series["layer_gradient"], strict=True)
    ]
    assert all(
        part <= norm for part, norm in zip(total, series["gradient_norm"], strict=True)
    )  # the rest is the head's


def test_first_step_is_adams_by_hand(text: Path, tmp_path: Path) -> None:
    """One step without clipping: every entry moves by the rate times g/(|g| + eps), and the norms are its norms."""
    spec = specification(text, steps=1, warmup=0, schedule="constant", clip=math.inf)
    series = run(spec, tmp_path)["series"]
    model = build(spec.architecture, seed=0)
    tokens, targets = map(torch.from_numpy, batch(corpus_of(spec, tmp_path), seed=0, step=0, batch_size=2, seq_len=16))
    model.loss(tokens, targets).backward()
    gradients = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    assert series["gradient_norm"][0] == pytest.approx(float(gradients.norm()), rel=1e-5)  # float32
    update = spec.learning_rate * gradients / (gradients.abs() + 1e-8)
    # An entry of size 0.1 moves by 0.003 and is rounded to 6e-9: 1e-5 in the norm of thousands of them.
    assert series["update_norm"][0] == pytest.approx(float(update.norm()), rel=1e-4)


def test_micro_batches_add_up(text: Path, tmp_path: Path) -> None:
    """The same batch in parts: equal but for the order of float32 sums."""
    whole = run(specification(text, batch_size=4), tmp_path)["series"]
    parts = run(specification(text, batch_size=4, micro_batch=1), tmp_path)["series"]
    for name in ("loss", "gradient_norm", "residual_std", "place_gradient"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=2e-3, err_msg=name)  # nine steps of Adam amplify it


def test_probing_changes_no_number(text: Path, tmp_path: Path) -> None:
    often, seldom = (run(specification(text, probe_every=every), tmp_path)["series"] for every in (1, 100))
    assert len(often["probe_step"]) == 9
    assert seldom["probe_step"] == [0]
    for name in ("loss", "gradient_norm", "update_norm", "layer_gradient"):
        assert often[name] == seldom[name]


def test_methods_see_the_same_batches(text: Path, tmp_path: Path) -> None:
    """Vanilla and Embed Detach start with the same loss, bit for bit, and part afterwards."""
    vanilla = specification(text)
    detached = replace(vanilla, architecture=method(vanilla.architecture, "Embed Detach"), label="Embed Detach")
    one, other = run(vanilla, tmp_path)["series"], run(detached, tmp_path)["series"]
    assert one["loss"][0] == other["loss"][0]
    assert one["embedding_gradient"][0] * 0.1 == pytest.approx(other["embedding_gradient"][0], rel=1e-6)
    assert one["layer_gradient"][0] == other["layer_gradient"][0]
    assert one["loss"][1:] != other["loss"][1:]


# --- a batch of runs -----------------------------------------------------------------------------------------------


def test_finished_run_trains_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = specification(text)
    record = run(spec, tmp_path)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained a second time")

    monkeypatch.setattr(run_module, "train", fail)
    monkeypatch.setattr(run_module, "load_corpus", fail)
    assert run(spec, tmp_path) == record
    assert run_all([spec, spec], tmp_path) == [record, record]


def test_a_run_that_is_asked_for_twice_is_computed_once(text: Path, tmp_path: Path) -> None:
    spec = specification(text, steps=2)
    one, other = run_all([spec, spec], tmp_path, processes=2)
    assert one == other == run(spec, tmp_path)


def test_two_processes_are_one(text: Path, tmp_path: Path) -> None:
    specs = [specification(text, seed=0), specification(text, seed=1, steps=5), specification(text, seed=2)]
    together = run_all(specs, tmp_path / "together", processes=2)
    assert [record["id"] for record in together] == [spec.identity for spec in specs]
    for spec in specs:
        run(spec, tmp_path / "alone")
        assert record_bytes(spec, tmp_path / "together") == record_bytes(spec, tmp_path / "alone")
    assert len(read_records(tmp_path / "together" / "records")) == 3


# --- divergence, precision, compilation -------------------------------------------------------------------------


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_divergence_is_a_result(text: Path, tmp_path: Path) -> None:
    """An absurd learning rate ends in a loss that is not a number: recorded where it happened, in valid JSON."""
    spec = specification(text, learning_rate=1e30, warmup=1, schedule="constant", steps=30)
    record = run(spec, tmp_path)
    at = record["final"]["diverged_at"]
    assert at is not None
    assert 0 < at < 29
    assert len(record["series"]["loss"]) == at + 1
    assert record["final"]["heldout_loss"] is None
    json.loads(record_bytes(spec, tmp_path), parse_constant=no_constant)
    assert run(spec, tmp_path) == record


@pytest.mark.parametrize("at", [0, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_a_number(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, value: float
) -> None:
    calls = 0
    honest = train_module.Transformer.loss

    def spoiled(self: Any, *arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return honest(self, *arguments) * (value if calls == at + 1 else 1.0)

    monkeypatch.setattr(train_module.Transformer, "loss", spoiled)
    spec = specification(text)
    record = run(spec, tmp_path)
    assert record["final"] == {"heldout_loss": None, "diverged_at": at}
    assert record["series"]["loss"][at] is None
    assert len(record["series"]["gradient_norm"]) == at
    json.loads(record_bytes(spec, tmp_path), parse_constant=no_constant)


def test_bfloat16_runs_on_the_cpu(text: Path, tmp_path: Path) -> None:
    exact, rounded = (run(specification(text, precision=precision), tmp_path) for precision in ("float32", "bfloat16"))
    losses = [np.array(record["series"]["loss"]) for record in (exact, rounded)]
    assert not np.array_equal(*losses)
    # bfloat16 keeps 8 bits: a loss of 5.5 is right to a few thousandths, and nine steps do not lose more.
    np.testing.assert_allclose(*losses, rtol=0.01)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch warns of TorchScript in its own compiler
def test_compiled_run(text: Path, tmp_path: Path) -> None:
    """The same numbers to float32 rounding; needs a C++ compiler."""
    plain, compiled = (run(specification(text, compile=flag), tmp_path)["series"] for flag in (False, True))
    np.testing.assert_allclose(compiled["loss"], plain["loss"], rtol=1e-3)


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0 is not a positive whole number"),
        ({"batch_size": -1}, "batch_size=-1 is not a positive whole number"),
        ({"seq_len": 1.5}, "seq_len=1.5 is not a positive whole number"),
        ({"probe_every": True}, "probe_every=True is not a positive whole number"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 is not positive"),
        ({"learning_rate": math.nan}, "learning_rate=nan is not positive"),
        ({"learning_rate": 4e38}, "learning_rate=4e+38 is beyond float32"),
        ({"learning_rate": math.inf}, "learning_rate=inf is beyond float32"),
        ({"clip": 0}, "clip=0 is not positive"),
        ({"schedule": "cubic"}, "unknown schedule 'cubic'; use one of cosine, linear, constant, wsd"),
        ({"schedule": "wsd", "decay_fraction": 0.0}, "decay_fraction=0.0 is out of range"),
        ({"schedule": "wsd", "decay_fraction": math.nan}, "decay_fraction=nan is out of range"),
        ({"decay_fraction": 0.2}, "decay_fraction=0.2 is of no use to the schedule cosine; leave it out, or use"),
        (
            {"schedule": "wsd", "decay_fraction": 0.9},
            "warmup=2 and the 8 steps of decay_fraction=0.9 do not fit into steps=9",
        ),
        ({"beta_1": 1.0}, "beta_1=1.0 is out of range"),
        ({"beta_2": math.nan}, "beta_2=nan is out of range"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 is negative"),
        ({"z_loss": math.inf}, "z_loss=inf is negative or not finite"),
        ({"decay_embeddings": True}, "embeddings do not decay at weight_decay=0"),
        ({"batch_size": 4, "micro_batch": 3}, "micro_batch=3 does not divide batch_size=4"),
        ({"architecture": architecture(positions="learned", context=8)}, "seq_len=16 exceeds the 8 learned positions"),
    ],
)
def test_specification_errors_name_the_field(text: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        specification(text, **change)


def test_identity_tells_every_field_apart(text: Path) -> None:
    base = specification(text)
    changes: dict[str, Any] = {
        "seed": 1,
        "steps": 10,
        "clip": 2.0,
        "beta_2": 0.99,
        "weight_decay": 0.1,
        "probe_every": 4,
    }
    changes |= {"precision": "bfloat16", "schedule": "constant", "architecture": replace(base.architecture, d_ffn=33)}
    identities = {base.identity, *(replace(base, **{name: value}).identity for name, value in changes.items())}
    assert len(identities) == 1 + len(changes)
    assert base.identity == specification(text).identity


def test_output_that_cannot_be_written(text: Path, tmp_path: Path) -> None:
    """A file where a folder should be: one line that names the path and the remedy, for data and for records."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(ValueError, match="file"):
        run(specification(text), blocked)
    out = tmp_path / "out"
    out.mkdir()
    (out / "records").write_text("not a folder")
    with pytest.raises(ValueError, match=r"cannot write .*records.*; choose a writable folder with --out"):
        run(specification(text, steps=1), out)


def test_text_that_is_too_short(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a few words\n" * 3)
    with pytest.raises(ValueError, match="fewer than the"):
        run(specification(short), tmp_path)


def test_no_record_without_a_run(tmp_path: Path, text: Path) -> None:
    assert read_record(record_path(specification(text), tmp_path)) is None
    assert load_corpus(str(text), vocab_size=258, tokenizer="bytes").vocab_size == 258
