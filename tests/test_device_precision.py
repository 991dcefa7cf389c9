"""A training computes in the precision that it says; a compiler that fails says so in one line."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.device_checks import mini

from empirics.device_check import make_all
from empirics.run import corpus_of
from empirics.run_spec import RunSpec
from empirics.train import train
from figures.devices import MARGIN
from theory.architecture import preset


def short(text: Path, **changes: Any) -> RunSpec:
    settings: dict[str, Any] = {
        "data": str(text),
        "steps": 3,
        "batch_size": 4,
        "seq_len": 16,
        "warmup": 1,
        "tokenizer": "bytes",
    }
    return RunSpec(
        architecture=mini(), label="Vanilla", experiment="x", seed=0, learning_rate=1e-2, schedule="constant",
        **settings | changes,
    )  # fmt: skip


def test_float32_is_float32_whatever_the_process_was_told(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(short(text, steps=2), architecture=replace(preset("wide"), n_layers=1, vocab_size=300))
    corpus = corpus_of(spec, tmp_path)
    expected = train(spec, corpus)
    assert expected["environment"]["float32_products"] == "highest"
    torch.set_float32_matmul_precision("medium")
    try:
        found = train(spec, corpus)
        assert torch.get_float32_matmul_precision() == "medium"
        monkeypatch.setattr("empirics.train.true_float32", nullcontext)
        loose = train(spec, corpus)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found["series"] == expected["series"]
    assert found["environment"] == expected["environment"]
    assert loose["environment"]["float32_products"] == "medium"
    if loose["series"]["loss"] == expected["series"]["loss"]:
        pytest.skip("the control: this CPU multiplies in float32 even where it may round more")


def test_float64_is_a_reference_for_float32(text: Path, tmp_path: Path) -> None:
    corpus = corpus_of(short(text), tmp_path)
    single, double = (train(short(text, precision=p), corpus)["series"]["loss"] for p in ("float32", "float64"))
    np.testing.assert_allclose(single, double, rtol=MARGIN * 2.0**-23)
    assert all(float(np.float32(loss)) != loss for loss in double)  # computed in float64 to the end
    assert all(float(np.float32(loss)) == loss for loss in single)


def test_a_compiler_that_fails_is_one_line(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no C++ compiler\nlong story")

    monkeypatch.setattr("empirics.device_check.run_all", fail)
    with pytest.raises(ValueError, match=r"no C\+\+ compiler; the other steps run with --only"):
        make_all([short(text, compile=True)], tmp_path, processes=1, title="x")
    with pytest.raises(RuntimeError):
        make_all([short(text)], tmp_path, processes=1, title="x")
