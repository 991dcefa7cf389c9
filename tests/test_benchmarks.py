"""The benchmarks run and write what they say; how fast they are is no test."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from empirics.model import build

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
    assert sum(bool(row["target"]) for row in record["rows"]) == 4


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


def test_the_tiny_scale_of_training(tmp_path: Path) -> None:
    """In a process of its own, as it changes torch's threads; what is printed is what was measured."""
    out = tmp_path / "new" / "training.json"
    done = run("--scale", "tiny", "--out", str(out), folder=tmp_path, script="training.py")
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert [(row["precision"], row["attention"]) for row in record["rows"]] == [
        ("float32", "fused"), ("bfloat16", "plain"),
    ]  # fmt: skip
    for row in record["rows"]:
        assert row["tokens_per_second"] > 0
        assert row["of_peak"] == pytest.approx(row["flops_per_second"] / record["peaks"][row["precision"]])
        for name, ratios in row["ratios"].items():
            assert len(ratios) == 2
            assert min(*ratios, row["peers"][name]) > 0
        assert f"| tiny | {row['precision']} | {row['tokens_per_second']:.0f} |" in done.stdout
    assert [row["table"] for row in record["attention"]] == ["fused", "plain"]
    assert all(min(row["fused"], row["plain"]) > 0 for row in record["attention"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--sizes", "huge", "error: --sizes huge is not known; use some of tiny, small, wide\n"),
        ("--rounds", "0", "error: --rounds 0 is not positive; use 1 or more\n"),
        ("--threads", "-1", "error: --threads -1 is not positive; use 1 or more\n"),
    ],
)
def test_bad_options_of_training(
    option: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    assert importlib.import_module("benchmarks.training").main([option, value]) == 2
    assert capsys.readouterr().err == message


def test_the_peer_is_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """With our weights the peer has our loss and our gradients, in float64: like is compared with like."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    training = importlib.import_module("benchmarks.training")
    size = training.SCALES["tiny"].sizes[0]
    ours, peer = (
        build(size.architecture(), seed=0).double(),
        importlib.import_module("benchmarks.gpt_peer").GPT(size.config()).double(),
    )
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())

    def pairs() -> Iterator[tuple[torch.nn.Parameter, list[torch.nn.Parameter]]]:
        yield peer.tokens.weight, [ours.tokens.weight]
        yield peer.positions.weight, [ours.positions.weight]
        yield peer.norm.weight, [ours.norm.weight]
        for block, layer in zip(peer.blocks, ours.layers, strict=True):
            attention, feedforward = layer.attention, layer.feedforward
            yield block.attention.enter.weight, [attention.query.weight, attention.key.weight, attention.value.weight]
            yield block.attention.leave.weight, [attention.output.weight]
            yield block.enter.weight, [feedforward.enter.weight]
            yield block.leave.weight, [feedforward.leave.weight]
            yield block.norm_1.weight, [layer.attention_norm.weight]
            yield block.norm_2.weight, [layer.feedforward_norm.weight]

    with torch.no_grad():
        for one, others in pairs():
            one.copy_(torch.cat(others))
    tokens = torch.arange(16).reshape(2, 8) * 3 % 64
    losses = ours(tokens).flatten(0, 1).log_softmax(-1).gather(1, (tokens + 1).flatten()[:, None]).mean().neg()
    found = peer(tokens, tokens + 1)
    torch.testing.assert_close(found, losses, rtol=1e-12, atol=0)
    found.backward()
    losses.backward()
    for one, others in pairs():
        assert one.grad is not None
        gradients = torch.cat([other.grad for other in others if other.grad is not None])
        torch.testing.assert_close(one.grad, gradients, rtol=1e-9, atol=1e-14)


def test_a_task_of_norms_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = run("--scale", "tiny", "--task", "ours", "1", folder=tmp_path, script="norms.py")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["products"] > 1


def test_the_tiny_scale_of_probes(tmp_path: Path) -> None:
    """Two whole trainings in turns; with probes and without their losses are the same."""
    out = tmp_path / "new" / "probes.json"
    done = run("--scale", "tiny", "--out", str(out), folder=tmp_path, script="probes.py")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["same_losses"] is True
    assert row["step"] > 0
    assert row["steps"] == row["every"] == 20
    assert row["cost"] == row["probed_step"] / (20 * row["step"])
    assert row["total"] != row["control"]
    assert row["once"] + row["probed_step"] > 0  # a run of one step is longer with probes than without
    assert len(done.stdout.splitlines()) == 3
    refused = run("--scale", "tiny", "--out", str(out / "below.json"), folder=tmp_path, script="probes.py")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
