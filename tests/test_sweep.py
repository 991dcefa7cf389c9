"""Sweeps: every combination once, over processes or jobs; one that fails or stops takes no other with it."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.training import record_bytes, specification

import empirics.sweep
from empirics.__main__ import main
from empirics.run import checkpoints_of, record_path, run
from empirics.sweep import run_all
from empirics.sweep_command import summary, table
from empirics.train import Stopped
from theory.records import read_records

CONFIG = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 259,
    "intermediate_size": 32, "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip


def command(text: Path, out: Path, *more: str) -> list[str]:
    path = text.parent / "config.json"
    path.write_text(json.dumps(CONFIG))
    sizes = ["--seq-len", "8", "--batch", "2", "--steps", "3", "--warmup", "1"]
    data = ["--data", str(text), "--tokenizer", "bytes", "--out", str(out)]
    return ["sweep", str(path), *sizes, *data, *more]


# --- the command ------------------------------------------------------------------------------------------------


def test_every_combination_once(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ["--methods", "vanilla,Scaled Embed", "--lr", "1e-3,1e30", "--seed", "0,1"]
    argv = command(text, tmp_path, *grid)
    assert main([*argv, "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 8
    assert all(line.startswith("to run   sweep-") for line in listed)
    assert not list(tmp_path.iterdir())
    assert main([*argv, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    found = {(row["method"], row["learning_rate"]): row for row in rows}
    assert set(found) == {(name, rate) for name in ("Vanilla", "Scaled Embed") for rate in (1e-3, 1e30)}
    for (_, rate), row in found.items():
        assert row["seeds"] == 2
        assert row["diverged"] == (0 if rate < 1 else 2)
        assert (row["heldout_loss"] is None) == (rate > 1)
    records = read_records(tmp_path / "records")
    assert sorted(record["id"] for record in records) == sorted(line.split()[-1] for line in listed)
    calm = [
        r["final"]["heldout_loss"]
        for r in records
        if (r["spec"]["label"], r["spec"]["learning_rate"]) == ("Vanilla", 1e-3)
    ]
    assert found["Vanilla", 1e-3]["heldout_loss"] == pytest.approx(sum(calm) / 2, rel=1e-12)
    assert main([*argv, "--list"]) == 0
    assert all(line.startswith("finished") for line in capsys.readouterr().out.splitlines())
    assert main([*argv, "--table", str(tmp_path / "table.txt")]) == 0  # from the records
    assert len((tmp_path / "table.txt").read_text().splitlines()) == 5


def test_the_configuration_as_it_is_given(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = command(text, tmp_path, "--methods", "config", "--embedding", "embed-ln", "--processes", "1")
    assert main(argv) == 0
    assert "llama" in capsys.readouterr().out
    (record,) = read_records(tmp_path / "records")
    assert record["spec"]["architecture"]["embedding_norm"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--methods", "vanila"], "unknown method 'vanila'; did you mean vanilla? use one of vanilla, embed-detach"),
        (["--methods", "vanilla,Vanilla"], "Vanilla is there twice"),
        (["--lr", "1e-3,zero"], "'zero' is not a number"),
        (["--lr", "1e-2,"], "'1e-2,' has an empty place"),
        (["--lr", "1e-3,0.001"], "0.001 is there twice"),
        (["--seed", "0,1,0"], "0 is there twice"),
        (["--warmup", "50"], "--warmup 50 never reaches the peak rate in --steps 3"),
        (["--embedding", "embed-ln"], "add --methods config"),
        (["--slurm", "hours"], "--slurm hours is not NAME=VALUE"),
        (
            ["--slurm"],
            "--slurm finds no sbatch and no srun here; run it where the cluster takes jobs (a login node), or",
        ),
        (["--slurm", "cluster=local", "speed=3"], "speed"),
        (["--data", "/nowhere"], "there is no text '/nowhere'"),
    ],
)
def test_refusals(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str) -> None:
    try:
        status = main(command(text, tmp_path / "out", *more))
    except SystemExit as end:
        status = end.code
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_table_by_hand() -> None:
    def final(loss: float | None) -> dict[str, Any]:
        return {"final": {"heldout_loss": loss}}

    specs = [specification(Path("text"), seed=seed) for seed in range(3)]
    (row,) = summary(specs, [final(4.0), final(None), final(5.0)])
    assert (row["seeds"], row["diverged"], row["heldout_loss"]) == (3, 1, 4.5)
    assert row["heldout_loss_sd"] == pytest.approx(0.5**0.5)
    assert table([row]).splitlines()[1].split() == ["Vanilla", "0.003", "3", "1", "4.5000", "0.7071"]


# --- what goes wrong --------------------------------------------------------------------------------------------


def test_a_run_that_fails_is_named_and_the_others_go_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [specification(text, seed=seed, steps=2) for seed in range(3)]

    def broken(spec: Any, *arguments: Any, **options: Any) -> Any:
        if spec.seed == 1:
            raise ValueError("no\nsuch thing")
        return run(spec, *arguments, **options)

    monkeypatch.setattr(empirics.sweep, "run", broken)
    with pytest.raises(ValueError, match=f"1 of 3 runs failed: {specs[1].identity}: no such thing"):
        run_all(specs, tmp_path, processes=1)
    assert [record_path(spec, tmp_path).exists() for spec in specs] == [True, False, True]


def when(condition: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    def wait() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not condition():
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_stops_all_with_a_checkpoint_each(text: Path, tmp_path: Path, processes: int) -> None:
    specs = [specification(text, seed=seed, steps=400, probe_every=100) for seed in range(3)]
    folders = [checkpoints_of(spec, tmp_path).folder for spec in specs[:processes]]
    thread = when(
        lambda: all(list(folder.glob("step-*")) for folder in folders), lambda: os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(Stopped, match="stopped and saved, with 0 of 3 runs done"):
        run_all(specs, tmp_path, processes=processes, checkpoint_every=10)
    thread.join()
    assert not list((tmp_path / "records").glob("*"))
    assert sum(checkpoints_of(spec, tmp_path).folder.exists() for spec in specs) == processes
    run_all(specs[:1], tmp_path)
    run(specs[0], tmp_path / "undisturbed")
    assert record_bytes(specs[0], tmp_path) == record_bytes(specs[0], tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_killed_process_is_said(text: Path, tmp_path: Path) -> None:
    specs = [specification(text, seed=seed, steps=2000, probe_every=1000) for seed in range(2)]
    folder = checkpoints_of(specs[0], tmp_path).folder
    before = children()
    thread = when(lambda: bool(list(folder.glob("step-*"))), lambda: os.kill(max(children() - before), signal.SIGKILL))
    with pytest.raises(ValueError, match="a worker process was killed, perhaps for memory; run the same command again"):
        run_all(specs, tmp_path, checkpoint_every=10)
    thread.join()
    shorter = [specification(text, seed=seed, steps=2) for seed in range(2)]
    assert len(run_all(shorter, tmp_path)) == 2


def children() -> set[int]:
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


# --- jobs -------------------------------------------------------------------------------------------------------


def on_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """SLURM's programs as far as a submission sees them."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_what_slurm_says(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of its programs alone is not enough; a refusal of its is one line, and what it takes is submitted once."""
    argv = command(text, tmp_path / "out", "--methods", "vanilla", "--slurm", "slurm_partition=gpuu")
    on_the_path(tmp_path / "some", monkeypatch, srun="exit 0")
    assert main(argv) == 2
    assert "--slurm finds no sbatch here; run it where" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    on_the_path(tmp_path / "bad", monkeypatch, srun="exit 0", sbatch="echo 'invalid\npartition: gpuu' >&2; exit 1")
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("SLURM took no job: invalid partition: gpuu; mend the parameters of --slurm")
    on_the_path(tmp_path / "good", monkeypatch, srun="exit 0", sbatch="echo Submitted batch job 12")
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith("1 of 1 run submitted")
    assert main(argv) == 2
    assert "as job 12; wait for them" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # submitit waits for none
def test_jobs_on_a_local_cluster(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job of two tasks, which are two ranks of one run; the same scheduler that speaks to SLURM."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    argv = command(text, tmp_path, "--methods", "vanilla")
    slurm = ["--slurm", "cluster=local", "timeout_min=5", "tasks_per_node=2"]
    assert main([*argv, *slurm]) == 0
    assert capsys.readouterr().out.startswith("1 of 1 run submitted")
    if not list((tmp_path / "records").glob("*.json")):
        assert main([*argv, *slurm]) == 2
        assert "submitted and not finished" in capsys.readouterr().err
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((tmp_path / "records").glob("*.json")):
        time.sleep(0.1)
    records = read_records(tmp_path / "records")
    assert records, [path.read_text() for path in (tmp_path / "slurm").rglob("*.err")]
    assert records[0]["environment"]["ranks"] == 2
    assert main([*argv, *slurm]) == 0
    assert capsys.readouterr().out.startswith("0 of 1 run submitted")
    gc.collect()
