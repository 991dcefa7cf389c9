"""The benchmarks run and write what they say; how fast they are is no test."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, folder: Path, script: str = "theory.py") -> subprocess.CompletedProcess[str]:
    """From another folder and without a search path: the script finds its own package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_tiny_scale_measures_every_task(tmp_path: Path) -> None:
    out = tmp_path / "new" / "theory.json"
    done = run("--scale", "tiny", "--out", str(out), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["scale"] == "tiny"
    printed = done.stdout.splitlines()
    assert len(printed) == len(record["rows"]) + 2
    for line, row in zip(printed[2:], record["rows"], strict=True):
        assert line.startswith(f"| {row['name']} |")
        for cost in (row["cost"], row["peer_cost"]):
            assert all(value > 0 for value in cost.values())
        assert row["ratio"] > 0
        assert row["cost"]["megabytes"] > 5  # an interpreter with numpy is no smaller: kilobytes were not taken for MB
    assert sum(bool(row["target"]) for row in record["rows"]) == 3


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("--scale", "tiny", "--out", str(tmp_path / "file" / "theory.json"), folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write")
    assert len(done.stderr.splitlines()) == 1


def test_the_tiny_scale_of_norms(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every task, in this process; what is printed is what was measured."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])  # the script changes its first entry
    norms = importlib.import_module("benchmarks.norms")
    monkeypatch.setattr(norms, "one_core", lambda: None)
    monkeypatch.setattr(norms, "measured", lambda task, scale, number: norms.TASKS[task](norms.SCALES[scale], number))
    assert norms.main(["--scale", "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("|") for line in lines) == (8 + 3 + 1) + 3 * 2
    rows = norms.layer_rows("tiny", 1, 1.0)
    assert all(row.cpu_seconds > 0 for row in rows)
    assert all(-0.01 < row.error < 1e-5 for row in rows if row.error is not None)
    assert rows[0].products >= rows[5].products  # in hindsight, fewer would have done


def test_a_task_of_norms_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = run("--scale", "tiny", "--task", "ours", "1", folder=tmp_path, script="norms.py")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["products"] > 1
