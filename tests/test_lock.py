"""One process trains a run: the second one is told so, and a killed one leaves nothing that is in the way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from filelock import FileLock
from helpers.training import files, record_bytes, specification

import empirics.run
from empirics.__main__ import main
from empirics.run import lock_path, record_path, run
from empirics.sweep import run_all

ROOT = Path(__file__).resolve().parents[1]


def command(text: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--layers", "1", "--seq-len", "8", "--batch", "2", "--steps", "40", "--warmup", "3"]
    data = ["--data", str(text), "--tokenizer", "bytes", "--checkpoint-every", "5"]
    return ["train", "tiny", *sizes, *data, *more, "--out", str(out)]


@contextmanager
def held(path: Path) -> Iterator[None]:
    """What another process would hold, for so long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield


def test_the_second_is_refused_and_every_other_run_is_not(text: Path, tmp_path: Path) -> None:
    spec, other = specification(text), specification(text, seed=1)
    with held(lock_path(spec, tmp_path)):
        before = files(tmp_path)
        with pytest.raises(ValueError, match=f"{spec.identity} is being trained by another process; wait for it, or"):
            run(spec, tmp_path)
        assert files(tmp_path) == before
        run(other, tmp_path)
    assert record_path(other, tmp_path).exists()
    run(spec, tmp_path)
    run(spec, tmp_path / "calm")
    assert record_bytes(spec, tmp_path) == record_bytes(spec, tmp_path / "calm")
    assert not lock_path(spec, tmp_path).exists()


def test_a_finished_run_needs_no_lock(text: Path, tmp_path: Path) -> None:
    spec = specification(text, steps=2)
    record = run(spec, tmp_path)
    with held(lock_path(spec, tmp_path)):
        assert run(spec, tmp_path) == record


def test_a_sweep_trains_the_others(text: Path, tmp_path: Path) -> None:
    specs = [specification(text, steps=2, seed=seed) for seed in range(3)]
    with held(lock_path(specs[1], tmp_path)), pytest.raises(ValueError, match="1 of 3 runs failed") as refused:
        run_all(specs, tmp_path, processes=1)
    assert f"{specs[1].identity} is being trained by" in str(refused.value)
    assert [record_path(spec, tmp_path).exists() for spec in specs] == [True, False, True]


def test_what_another_process_has_finished_meanwhile_is_read(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look for the record and the lock: a run that has ended by then is not trained again."""
    spec = specification(text, steps=2)
    run(spec, tmp_path / "other")
    honest = empirics.run.sole_trainer

    @contextmanager
    def later(path: Path, name: str) -> Iterator[None]:
        shutil.copytree(tmp_path / "other" / "records", tmp_path / "records", dirs_exist_ok=True)
        with honest(path, name):
            yield

    def again(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("trained again")

    with monkeypatch.context() as patched:
        patched.setattr(empirics.run, "train", again)
        with pytest.raises(AssertionError, match="trained again"):  # the control: nobody has finished it
            run(spec, tmp_path)
        patched.setattr(empirics.run, "sole_trainer", later)
        assert run(spec, tmp_path)["id"] == spec.identity
    assert not lock_path(spec, tmp_path).exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_trained_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    spec = specification(text, steps=2)
    with monkeypatch.context() as patched:

        def flock(*_: Any) -> NoReturn:
            raise OSError(number, os.strerror(number))

        patched.setattr(fcntl, "flock", flock)
        run(spec, tmp_path)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path} is on a file system without locks; see to it that no other process trains")
    run(spec, tmp_path / "calm")
    assert capfd.readouterr().err == ""
    assert record_bytes(spec, tmp_path) == record_bytes(spec, tmp_path / "calm")


def test_a_folder_in_which_another_run_has_begun_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also before that has a checkpoint; a lock that a killed one has left is in nobody's way."""
    left = tmp_path / ".train-tiny-lr0.1-seed0-0123456789ab.lock"
    with held(left):
        assert main(command(text, tmp_path)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "holds another run, train-tiny-lr0.1-seed0-0123456789ab; use another --out" in line
        assert files(tmp_path).keys() == {left.name}
    left.touch()
    assert main(command(text, tmp_path, "--checkpoint-every", "100")) == 0


TWO = """
import json, os, signal, sys
import torch
from empirics.__main__ import main
from helpers.kills import tell_steps, wait_for

torch.set_num_threads(1)
command = json.loads(sys.argv[1])

def started(tells=None):
    child = os.fork()
    if child == 0:
        if tells is not None:
            tell_steps(tells)
        os._exit(main(command))
    return child

told, tells = os.pipe()
first = started(tells)
os.close(tells)
step = wait_for(told, {"step": 12, "later": 0.0}, 60.0)
os.kill(first, signal.SIGSTOP)  # alive, and not to end before the second has tried
second = os.waitstatus_to_exitcode(os.waitpid(started(), 0)[1])
os.kill(first, signal.SIGKILL)
ended = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
third = os.waitstatus_to_exitcode(os.waitpid(started(), 0)[1])
print(json.dumps([first, step, second, ended, third]), flush=True)
"""


def test_two_processes_and_a_kill(text: Path, tmp_path: Path) -> None:
    """A second trainer gets one line and status 2; after a real SIGKILL of the first one the next goes on at once."""
    calm, both = tmp_path / "calm", tmp_path / "both"
    assert main(command(text, calm)) == 0
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TWO, json.dumps(command(text, both))], cwd=ROOT, env=environment, capture_output=True,
        text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, step, second, ended, third = json.loads(done.stdout.splitlines()[-1])
    assert step >= 12
    assert (second, ended, third) == (2, -9, 0)
    said = [line for line in done.stderr.splitlines() if "is being trained by" in line]
    assert len(said) == 1, done.stderr
    assert f"is being trained by process {first} on " in said[0]
    assert files(both) == files(calm)
    assert not [name for name in files(both) if "lock" in name]
