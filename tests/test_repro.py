"""The reproduction script end to end, on networks small enough for a test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import paper_repro
from empirics import scales
from theory.architecture import PRESETS, Architecture, preset
from theory.records import write_json

STEPS = 6
MINIATURE = """
import sys
import paper_repro
from empirics import scales
from test_repro import miniature
scales.SCALES["smoke"] = (miniature, 1, "cpu", "sympy")
raise SystemExit(paper_repro.main(sys.argv[1:]))
"""


def mini() -> Architecture:
    return replace(preset("tiny"), d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, d_head=8, d_ffn=32, vocab_size=300)


def miniature(seeds: Any, device: str, data: str) -> list[scales.Step]:
    changes = {"steps": STEPS, "seq_len": 16, "batch_size": 2, "device": device, "data": data, "tokenizer": "bytes"}

    def sweep() -> list[Any]:
        return [
            scales.training(mini(), label, "sweep", seed, 1e-2, **changes) for seed in seeds for label in scales.FOUR
        ]

    return [scales.Step(name="sweep", purpose="four small trainings", minutes=0.1, specs=sweep)]


@pytest.fixture
def small_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scales.SCALES, "smoke", (miniature, 1, "cpu", "sympy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.usefixtures("small_scale")
def test_one_command_writes_everything_and_a_second_trains_nothing(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--scale", "smoke", "--out", str(tmp_path / "out"), "--data", str(text)]
    assert paper_repro.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "claim-13" in printed
    assert "report.html" in printed
    first = contents(tmp_path / "out")
    assert {"claims.json", "report.html", "figures/loss_curves.png", "figures/loss_curves.svg"} <= set(first)
    assert sum(name.startswith("records/sweep-") for name in first) == len(scales.FOUR)
    claims = json.loads(first["claims.json"])
    assert [claim["id"] for claim in claims][:13] == [f"claim-{n:02}" for n in range(1, 14)]

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr("empirics.sweep.Parallel", fail)
    assert paper_repro.main(arguments) == 0
    assert paper_repro.main([*arguments, "--draw-only"]) == 0
    assert contents(tmp_path / "out") == first


def test_killed_it_resumes_to_the_same_records(text: Path, tmp_path: Path) -> None:
    """Undisturbed beside killed as soon as the first record is there, and again soon after the restart."""

    def start(out: Path) -> subprocess.Popen[bytes]:
        options = ["--scale", "smoke", "--out", str(out), "--data", str(text), "--processes", "1"]
        command = [sys.executable, "-c", MINIATURE, *options]
        root = Path(__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    assert start(tmp_path / "whole").wait(timeout=120) == 0
    killed = tmp_path / "killed"
    for records in (1, 2):
        process = start(killed)
        deadline = time.monotonic() + 120
        while len(list(killed.glob("records/sweep-*.json"))) < records and time.monotonic() < deadline:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(killed).wait(timeout=120) == 0
    assert contents(killed / "records") == contents(tmp_path / "whole" / "records")


def test_the_default_scale_keeps_to_its_trainings(capsys: pytest.CaptureFixture[str]) -> None:
    steps = scales.cpu((0, 1, 2), "cpu", "sympy")
    trainings = [spec for step in steps for spec in step.specs() if hasattr(spec, "learning_rate")]
    assert len(trainings) <= 60
    assert len({spec.identity for spec in trainings}) == len(trainings)
    assert paper_repro.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(step.name in listed for step in steps)
    assert sum(step.minutes for step in steps) <= 10


def test_the_full_scale_is_larger_and_says_its_hours(capsys: pytest.CaptureFixture[str]) -> None:
    steps = scales.cpu_full(range(5), "cpu", "sympy")
    trainings = [spec for step in steps for spec in step.specs() if hasattr(spec, "learning_rate")]
    assert len({spec.identity for spec in trainings}) == len(trainings) == 60
    assert {spec.seed for spec in trainings} == set(range(5))
    assert all(spec.steps >= 5000 and spec.seq_len >= 128 for spec in trainings)
    assert all((a := spec.architecture).d_model >= 128 and a.n_layers >= 12 for spec in trainings)
    assert paper_repro.main(["--scale", "cpu-full", "--list"]) == 0
    listed = capsys.readouterr().out
    assert " h  " in listed
    assert listed.count("estimated, not run") == 2


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--only", "nothing"], "use one of"),
        (["--only", "swep"], "did you mean sweep? use one of"),
        (["--draw-only", "--out", "nowhere"], "run without --draw-only"),
        (["--scale", "350m", "--device", "cuda"], "--scale cpu"),
        (["--scale", "cpu", "--out", "/proc/none"], "choose a writable folder"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    remedy: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert paper_repro.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert remedy in captured.err


def test_every_preset_of_the_paper_has_a_scale() -> None:
    assert {"350m", "1.7b", "13b"} <= set(PRESETS) & set(scales.SCALES)


@pytest.mark.usefixtures("small_scale")
def test_a_folder_keeps_to_one_scale_and_a_text_is_looked_for_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert paper_repro.main(["--scale", "smoke", "--out", str(out), "--data", "nosuch.txt"]) == 2
    assert not list(out.glob("records/*"))
    write_json(out / "scale.json", {"scale": "smoke", "seeds": [0], "device": "cpu", "data": "sympy"})
    assert paper_repro.main(["--scale", "cpu", "--out", str(out)]) == 2
    assert "another --out" in capsys.readouterr().err


def test_a_label_cannot_name_another_folder() -> None:
    spec = scales.training(mini(), "Vanilla", "sweep", 0, 1e-2)
    assert "/" not in replace(spec, label="../../m/config.json").identity
