"""A training that is stopped, killed or finds its files damaged ends in the same bytes as an undisturbed one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.kills import spread
from helpers.training import Interrupted, cut, files, flip, record_bytes, specification, train_until
from safetensors.torch import load_file

import empirics.run
from empirics.__main__ import main
from empirics.checkpoints import KEPT
from empirics.kept import load_model
from empirics.model import build
from empirics.run import checkpoints_of, model_path, record_path, run, stop_signals
from empirics.train import Stopped, train

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The record of the plain specification."""
    out = tmp_path_factory.mktemp("undisturbed")
    run(specification(text), out)
    return record_bytes(specification(text), out)


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- stopped ------------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "cosine": {},
    "constant": {"schedule": "constant"},
    "linear": {"schedule": "linear"},
    "wsd": {"schedule": "wsd", "decay_fraction": 0.4},
    "bfloat16, accumulation": {"precision": "bfloat16", "batch_size": 4, "micro_batch": 2},
    "z-loss, deterministic": {"z_loss": 1e-2, "deterministic": True},
    "bfloat16": {"precision": "bfloat16"},
    "accumulation": {"batch_size": 4, "micro_batch": 1},
    "decay, tied": {
        "weight_decay": 0.1,
        "decay_embeddings": True,
        "architecture": {"tied": True, "positions": "learned"},
    },
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_resumed_is_the_same_file(text: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = specification(text, **changes)
    run(spec, tmp_path / "undisturbed")
    expected = record_bytes(spec, tmp_path / "undisturbed")
    for last in (1, 4, spec.steps - 1):
        out = tmp_path / f"stopped-{last}"
        folder = train_until(spec, out, last)
        assert steps_of(folder)[-1] == f"step-{last:08d}"
        run(spec, out)
        assert record_bytes(spec, out) == expected
        assert not folder.exists()


def test_interrupted_many_times_between_checkpoints(text: Path, tmp_path: Path) -> None:
    spec = specification(text, steps=12)
    run(spec, tmp_path / "undisturbed")
    for last in (3, 4, 6, 9, 11):
        train_until(spec, tmp_path, last, every=2)
    run(spec, tmp_path, checkpoint_every=2)
    assert record_bytes(spec, tmp_path) == record_bytes(spec, tmp_path / "undisturbed")


def test_the_global_generator_decides_nothing(text: Path, tmp_path: Path, undisturbed: bytes) -> None:
    """So a checkpoint need not hold its state."""
    torch.manual_seed(12345)
    run(specification(text), tmp_path)
    assert record_bytes(specification(text), tmp_path) == undisturbed


def test_the_last_two_are_kept(text: Path, tmp_path: Path) -> None:
    folder = train_until(specification(text), tmp_path, 6)
    assert steps_of(folder) == ["step-00000005", "step-00000006"]
    assert KEPT == 2
    manifest = json.loads((folder / "step-00000006" / "manifest.json").read_text())
    assert manifest["step"] == 6
    assert manifest["run"] == specification(text).identity
    model = build(specification(text).architecture, seed=0)
    names = {name for name, _ in model.named_parameters()}
    assert set(load_file(folder / "step-00000006" / "model.safetensors")) == names
    moments = load_file(folder / "step-00000006" / "optimizer.safetensors")
    assert set(moments) == {f"{name}.{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert all(float(moments[f"{name}.step"]) == 6 for name in names)


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGINT is not ignored, as it is in what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_between_two_steps(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: bytes, number: signal.Signals
) -> None:
    spec = specification(text)
    honest = empirics.run.train

    def signalled(*arguments: Any, on_step: Any, **options: Any) -> Any:
        def send(step: int, loss: Any) -> None:
            on_step(step, loss)
            if step == 4:
                os.kill(os.getpid(), number)

        return honest(*arguments, on_step=send, **options)

    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(empirics.run, "train", signalled)
        with pytest.raises(Stopped, match="stopped and saved after 5 of 9 steps"):
            run(spec, tmp_path)
    assert signal.getsignal(number) == before
    assert steps_of(checkpoints_of(spec, tmp_path).folder) == ["step-00000005"]
    assert not record_path(spec, tmp_path).exists()
    run(spec, tmp_path)
    assert record_bytes(spec, tmp_path) == undisturbed


@pytest.mark.usefixtures("heard")
def test_a_second_signal_interrupts_at_once() -> None:
    with stop_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_stopped_command_says_how_to_go_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command(text, tmp_path, steps=6)
    honest = empirics.run.train
    with monkeypatch.context() as patched:
        patched.setattr(empirics.run, "train", lambda *a, **o: honest(*a, **(o | {"stop": lambda: True})))
        assert main(argv) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("stopped and saved after 1 of 6 steps; run the same command again to go on")
    assert main(argv) == 0


# --- killed -------------------------------------------------------------------------------------------------------


def command(text: Path, out: Path, *, steps: int) -> list[str]:
    """Two checkpoints out of three are written over; a step takes some milliseconds."""
    sizes = ["--layers", "1", "--seq-len", "8", "--batch", "2", "--steps", str(steps), "--warmup", "3"]
    data = ["--data", str(text), "--tokenizer", "bytes", "--probe-every", "7"]
    return ["train", "tiny", *sizes, *data, "--checkpoint-every", "3", "--keep-checkpoint", "--out", str(out)]


KILLER = """
import json, os, signal, sys
import torch
from empirics.__main__ import main
from helpers.kills import tell_steps, wait_for

torch.set_num_threads(1)
kills, command = map(json.loads, sys.argv[1:])
reached = []
for kill in kills:
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        tell_steps(tells)
        os._exit(main(command))
    os.close(tells)
    reached.append(wait_for(told, kill, 60.0))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    os.close(told)
print(json.dumps(reached), flush=True)
os._exit(main(command))
"""


@pytest.mark.parametrize(
    ("times", "steps"), [(3, 60), pytest.param(20, 300, marks=pytest.mark.slow)], ids=["3 kills", "20 kills"]
)
def test_killed_at_random_moments_is_the_same(text: Path, tmp_path: Path, times: int, steps: int) -> None:
    """A real SIGKILL, again and again, from the first steps to the last ones: while it steps or writes a checkpoint."""
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert main(command(text, calm, steps=steps)) == 0
    kills = spread(times, steps)
    arguments = [json.dumps(kills), json.dumps(command(text, killed, steps=steps))]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILLER, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False, timeout=200 + steps,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reached = json.loads(done.stdout.splitlines()[0])
    assert len(reached) == times
    assert all(step >= kill["step"] for step, kill in zip(reached, kills))  # each had come so far
    assert files(killed) == files(calm)


DYING = """
import json, os, signal, sys
from pathlib import Path
import torch
from empirics.__main__ import main
from helpers.kills import die_where_renamed

torch.set_num_threads(1)
left = []
for folder, after, command in json.loads(sys.argv[1]):
    ends, out = [], Path(command[-1])
    for dies in (True, False):
        child = os.fork()
        if child == 0:
            if dies:
                die_where_renamed(out / folder, after=after)
            os._exit(main(command))
        ends.append(os.waitpid(child, 0)[1])
        if dies:
            seen = [out / name for name in (folder, "checkpoints")]
            left.append([sorted(os.listdir(path)) if path.is_dir() else [] for path in seen])
    assert os.WIFSIGNALED(ends[0]) and os.WTERMSIG(ends[0]) == signal.SIGKILL and ends[1] == 0, ends
print(json.dumps(left), flush=True)
"""


def test_killed_while_its_results_get_their_names_is_the_same(text: Path, tmp_path: Path) -> None:
    """A real SIGKILL right before the model, the record or the losses are renamed into place, or right after.

    What has no name yet is not left behind either.
    """
    assert main(command(text, tmp_path / "calm", steps=7)) == 0
    places = [("models", False), ("records", False), ("records", True), (".", False)]
    killed = [tmp_path / str(n) for n in range(len(places))]
    kills = [(*place, command(text, out, steps=7)) for place, out in zip(places, killed, strict=True)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DYING, json.dumps(kills)], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (folder, after), found, out in zip(places, json.loads(done.stdout.splitlines()[-1]), killed, strict=True):
        there, checkpoints = found
        assert sum(name.startswith(".") for name in there) == (not after)
        if folder != ".":
            assert len(there) == 1
            assert checkpoints  # the run is not lost before its record is there
        assert files(out) == files(tmp_path / "calm")


def test_killed_before_the_record_is_written(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: bytes
) -> None:
    """All steps are taken and there is no record: the checkpoints must be there still."""
    spec = specification(text)

    def killed(*arguments: Any, **options: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(empirics.run, "write_record", killed)
        with pytest.raises(Interrupted):
            run(spec, tmp_path, checkpoint_every=4)
    assert steps_of(checkpoints_of(spec, tmp_path).folder) == ["step-00000004", "step-00000008"]
    run(spec, tmp_path)
    assert record_bytes(spec, tmp_path) == undisturbed


def test_killed_after_the_record_is_written(text: Path, tmp_path: Path) -> None:
    spec = specification(text)
    folder = train_until(spec, tmp_path, 5)
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    run(spec, tmp_path)
    shutil.copytree(kept, folder)
    run(spec, tmp_path)
    assert not folder.exists()


# --- damaged ------------------------------------------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE: dict[str, tuple[Any, str]] = {
    "truncated model": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors has"),
    "one bit of the model": (lambda folder: flip(folder / "model.safetensors"), "model.safetensors has another SHA"),
    "truncated optimizer": (lambda folder: cut(folder / "optimizer.safetensors"), "optimizer.safetensors has"),
    "one bit of the optimizer": (lambda folder: flip(folder / "optimizer.safetensors"), "has another SHA"),
    "no optimizer": (lambda folder: (folder / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
    "truncated series": (lambda folder: cut(folder / "series.json"), "series.json has"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda folder: (folder / "manifest.json").write_bytes(b""), "manifest.json cannot be read"),
    "garbage manifest": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff{"), "cannot be read"),
    "manifest of a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "cannot be read"),
    "no step": (lambda folder: edit(folder / "manifest.json", step=None), "cannot be read"),
    "no files": (lambda folder: edit(folder / "manifest.json", files={}), "cannot be read"),
    "another run": (lambda folder: edit(folder / "manifest.json", run="another"), "it is step 5 of another"),
    "another step": (lambda folder: edit(folder / "manifest.json", step=4), "it is step 4 of"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint_is_named_and_the_last_good_one_used(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], undisturbed: bytes, damage: Any, words: str
) -> None:
    spec = specification(text)
    folder = train_until(spec, tmp_path, 5)
    damage(folder / "step-00000005")
    capfd.readouterr()
    steps: list[int] = []
    train(spec, empirics.run.corpus_of(spec, tmp_path), checkpoints=checkpoints_of(spec, tmp_path),
          on_step=lambda step, _: steps.append(step))  # fmt: skip
    assert steps == [4, 5, 6, 7, 8]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"checkpoint {folder / 'step-00000005'} is damaged (")
    assert words in line
    assert line.endswith("; the one of step 4 is used")
    run(spec, tmp_path)
    assert record_bytes(spec, tmp_path) == undisturbed


def test_without_a_good_one_the_run_starts_again(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], undisturbed: bytes
) -> None:
    spec = specification(text)
    folder = train_until(spec, tmp_path, 5)
    for name in steps_of(folder):
        cut(folder / name / "model.safetensors")
    capfd.readouterr()
    run(spec, tmp_path)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.endswith("; the run starts again from step 0") for line in lines)
    assert record_bytes(spec, tmp_path) == undisturbed


def test_damaged_ones_never_push_out_the_good_one(text: Path, tmp_path: Path) -> None:
    """Damage to steps 4 and 5, and a checkpoint of step 4 written anew: it and step 3 are what is left."""
    spec = specification(text)
    folder = train_until(spec, tmp_path, 3)
    for name in ("step-00000004", "step-00000005"):
        shutil.copytree(folder / "step-00000003", folder / name)
        cut(folder / name / "model.safetensors")
    (folder / ".step-00000006.killed").mkdir()
    train_until(spec, tmp_path, 4)
    assert steps_of(folder) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("content", [b"", b'{"schema":1', b"[]", b'{"schema":0}', b"\xff"])
def test_damaged_record_is_named_and_made_again(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], undisturbed: bytes, content: bytes
) -> None:
    spec = specification(text)
    run(spec, tmp_path)
    record_path(spec, tmp_path).write_bytes(content)
    capfd.readouterr()
    run(spec, tmp_path)
    assert capfd.readouterr().err == f"record {record_path(spec, tmp_path)} is damaged; it is made again\n"
    assert record_bytes(spec, tmp_path) == undisturbed


def test_a_record_with_another_digit_is_named_and_made_again(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], undisturbed: bytes
) -> None:
    spec = specification(text)
    path, honest = record_path(spec, tmp_path), run(spec, tmp_path)["series"]["loss"]
    digits = repr(honest[0])
    changed = digits[:-1] + ("1" if digits[-1] != "1" else "2")
    path.write_text(path.read_text().replace(digits, changed, 1))
    capfd.readouterr()
    assert run(spec, tmp_path)["series"]["loss"] == honest
    assert capfd.readouterr().err == f"record {path} is damaged; it is made again\n"
    assert record_bytes(spec, tmp_path) == undisturbed


# --- the model that is kept ---------------------------------------------------------------------------------------


def test_the_model_is_kept(text: Path, tmp_path: Path) -> None:
    spec = specification(text)
    folder = train_until(spec, tmp_path / "stopped", 8)
    last = load_file(folder / "step-00000008" / "model.safetensors")
    run(spec, tmp_path, keep_model=True)
    run(spec, tmp_path, keep_model=True)
    model = load_model(model_path(spec, tmp_path))
    assert model.architecture == spec.architecture
    moved = [float((parameter.detach() - last[name]).abs().max()) for name, parameter in model.named_parameters()]
    assert all(0 < change < 2 * spec.learning_rate for change in moved)  # one step of Adam further


def test_a_finished_run_has_no_model_to_keep(text: Path, tmp_path: Path) -> None:
    spec = specification(text, steps=2)
    run(spec, tmp_path)
    with pytest.raises(ValueError, match=r"its model is not in .*; bring it back, or delete .*json and run again"):
        run(spec, tmp_path, keep_model=True)
