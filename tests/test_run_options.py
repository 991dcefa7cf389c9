"""Bad options of `measure`, `train` and the reproduction: one line that names the remedy, status 2."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import pytest
from helpers.commands import ROOT, assert_refused, call

import empirics.__main__
import empirics.command_line
import paper_repro
from empirics import scales
from empirics.train_command import add_command, specification, unscheduled
from theory.architecture import preset

# --- measuring and training ---------------------------------------------------------------------------------------

MEASURE: dict[str, list[str]] = {
    "unknown preset": ["70b"],
    "missing data": ["tiny", "--data", "none.txt"],
    "data is a folder": ["tiny", "--data", "tests"],
    "unknown device": ["tiny", "--device", "abacus"],
    "device without numbers": ["tiny", "--device", "meta"],
    "device number that is not": ["tiny", "--device", "cuda:x"],
    "no seeds": ["tiny", "--seeds", "0"],
    "half a sequence": ["tiny", "--batch", "0.5"],
    "too large a network": ["13b", "--layers", "4000"],
}


@pytest.mark.parametrize("argv", MEASURE.values(), ids=MEASURE)
def test_bad_measurement(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert_refused(call(empirics.__main__.main, ["measure", *argv], capsys))


def test_measurement_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--layers", "1", "--seq-len", "4", "--batch", "1", "--seeds", "1", "--out", "/proc/none/x"]
    assert_refused(call(empirics.__main__.main, ["measure", "tiny", *options], capsys), "cannot write")


TYPED: dict[str, tuple[list[str], str]] = {
    "micro-batch": (["--micro-batch", "3"], "--micro-batch 3 does not divide --batch 8; use"),
    "beta": (["--beta2", "1"], "--beta2 1.0 is out of range; use"),
    "decay": (
        ["--schedule", "wsd", "--decay-fraction", "0.97", "--warmup", "20"],
        "--warmup 20 and the 291 steps of --decay-fraction 0.97 do not fit",
    ),
    "decay without wsd": (["--decay-fraction", "0.2"], "--decay-fraction 0.2 is of no use to the schedule cosine"),
    "embeddings": (["--decay-embeddings"], "do not decay at --weight-decay 0; give"),
    "rate beyond float32": (["--lr", "1e300"], "--lr 1e+300 is beyond float32, in which the weights are; use a"),
    "text too short": (["--data", "SHORT", "--tokenizer", "bytes"], "fewer than the 65 of --seq-len 64; use"),
}


@pytest.mark.parametrize(("argv", "words"), TYPED.values(), ids=TYPED)
def test_a_refusal_names_what_was_typed(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not what the code calls it."""
    (tmp_path / "short.txt").write_text("too short\n" * 5)
    argv = [str(tmp_path / "short.txt") if part == "SHORT" else part for part in argv]
    result = call(empirics.__main__.main, ["train", "tiny", *argv, "--out", str(tmp_path / "run")], capsys)
    assert_refused(result, words)
    assert not re.search(r"[a-z]_[a-z]+=", result[2]), result[2]


TRAIN: dict[str, list[str]] = {
    "missing data": ["--data", "none.txt"],
    "unknown tokenizer": ["--tokenizer", "words"],
    "unknown device": ["--device", "abacus"],
    "unknown precision": ["--precision", "float16"],
    **{f"rate {rate}": ["--lr", rate] for rate in ("nan", "inf", "-1", "0", "fast")},
    **{f"weight decay {decay}": ["--weight-decay", decay] for decay in ("nan", "inf", "-1", "some")},
    "unknown schedule": ["--schedule", "cubic"],
    **{f"clip {clip}": ["--clip", clip] for clip in ("0", "-1", "nan", "inf", "on")},
    **{f"beta {beta}": ["--beta2", beta] for beta in ("1", "1.5", "-0.1", "nan", "high")},
    "first beta": ["--beta1", "1"],
    **{f"z-loss {weight}": ["--z-loss", weight] for weight in ("nan", "inf", "-1", "some")},
    **{f"decay fraction {share}": ["--schedule", "wsd", "--decay-fraction", share] for share in ("0", "1.1", "nan")},
    "decay fraction without wsd": ["--decay-fraction", "0.2"],
    "warm-up and decay too long": ["--schedule", "wsd", "--decay-fraction", "0.9", "--warmup", "40"],
    "warm-up longer than the training": ["--steps", "2", "--warmup", "50"],
    "embedding decay without decay": ["--decay-embeddings"],
    "micro-batch that does not divide": ["--micro-batch", "3"],
    "no step between checkpoints": ["--checkpoint-every", "0"],
    "tensorboard nowhere": ["--tensorboard", "/proc/none"],
    "JSON without a plan": ["--json"],
    "file without a plan": ["--plan-out", "plan.txt"],
    "devices without a plan": ["--devices", "4"],
    "no steps": ["--steps", "0"],
    "negative seed": ["--seed", "-1"],
    "absurd sequence": ["--seq-len", "1000001"],
}


@pytest.mark.parametrize("argv", TRAIN.values(), ids=TRAIN)
def test_bad_training(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(call(empirics.__main__.main, ["train", "tiny", "--out", str(tmp_path), *argv], capsys))


@pytest.mark.parametrize("out", ["/proc/none", "/dev/null/run"])
def test_training_that_cannot_be_written(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    argv = ["train", "tiny", "--layers", "1", "--steps", "1", "--data", str(text), "--tokenizer", "bytes", "--out", out]
    assert_refused(call(empirics.__main__.main, argv, capsys), "cannot write")


def test_training_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(call(empirics.__main__.main, ["train", "tiny"], capsys), "--out")


SHORT = ["--layers", "1", "--seq-len", "8", "--batch", "1", "--steps", "2", "--tokenizer", "bytes"]


def test_a_folder_holds_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second one would write over the first one's losses.jsonl."""
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    argv = ["train", "tiny", *SHORT, "--data", str(text), "--out", str(out)]
    assert call(empirics.__main__.main, argv, capsys)[0] == 0
    before = (out / "losses.jsonl").read_bytes()
    other = call(empirics.__main__.main, [*argv, "--lr", "1e-2"], capsys)
    assert_refused(other, "holds another run", " (--lr 0.001 and not 0.01); use another --out")
    other = call(empirics.__main__.main, [*argv, "--layers", "3", "--clip", "off"], capsys)
    assert_refused(other, "n_layers=", " and not 3", "--clip 1.0 and not none")
    assert (out / "losses.jsonl").read_bytes() == before
    assert call(empirics.__main__.main, argv, capsys)[0] == 0


@pytest.mark.parametrize(
    ("more", "noted"),
    [
        ([], "cosine never lowers the rate in 2 steps, 2 of them warm-up; give more --steps, or --warmup 0"),
        (["--schedule", "linear", "--warmup", "1"], "1 of them warm-up; give more --steps, or --warmup 0"),
        (["--schedule", "wsd"], "give more --steps, or a larger --decay-fraction with --warmup 0"),
        (["--schedule", "wsd", "--decay-fraction", "1"], ""),
        (["--schedule", "constant"], ""),
        (["--warmup", "0"], ""),
    ],
)
def test_a_schedule_that_lowers_no_rate_is_told(
    more: list[str], noted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps, of which the default warm-up takes two, and of wsd's what its decay leaves."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    out = tmp_path / "run"
    argv = ["train", "tiny", *SHORT, "--data", str(text), "--probes", "none", "--out", str(out), *more]
    status, said, _ = call(empirics.__main__.main, argv, capsys)
    assert status == 0
    assert ("note: " in said) == bool(noted)
    assert noted in said
    (path,) = (out / "records").iterdir()
    series = json.loads(path.read_text())["series"]
    assert (min(series["learning_rate"][1:]) == 1e-3) == (bool(noted) or "constant" in more)


def options(*argv: str) -> argparse.Namespace:
    """Of `train tiny`."""
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    return parser.parse_args(["train", "tiny", *argv], argparse.Namespace(device="cpu"))


@pytest.mark.parametrize(
    ("argv", "advice", "followed"),
    [
        (["--steps", "9", "--warmup", "8"], "--warmup 7 or less", ["--warmup", "7"]),
        (["--steps", "9", "--schedule", "linear", "--warmup", "9"], "--warmup 7 or less", ["--warmup", "7"]),
        (
            ["--steps", "9", "--schedule", "wsd", "--warmup", "8"],
            "a larger --decay-fraction with --warmup 7 or less",
            ["--warmup", "7", "--decay-fraction", "0.2"],
        ),
        (
            ["--steps", "9", "--schedule", "wsd", "--warmup", "2"],
            "a larger --decay-fraction",
            ["--decay-fraction", "0.2"],
        ),
    ],
)
def test_advice_on_a_schedule_is_just_enough(argv: list[str], advice: str, followed: list[str]) -> None:
    before, after = (specification(options(*argv, *more), preset("tiny"), 8) for more in ([], followed))
    note = unscheduled(before)
    assert note is not None
    assert note.endswith(f"give more --steps, or {advice}")
    assert unscheduled(after) is None


@pytest.mark.parametrize(
    ("schedule", "steps", "warmup"), [("cosine", 12, 12), ("cosine", 40, 20), ("wsd", 12, 11), ("wsd", 300, 20)]
)
def test_default_warmup(schedule: str, steps: int, warmup: int) -> None:
    """Those of the schedules but wsd name finished runs, and stay."""
    arguments = options("--steps", str(steps), "--schedule", schedule)
    assert specification(arguments, preset("tiny"), 8).warmup == warmup


def test_tensorboard_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    argv = ["train", "tiny", *SHORT, "--out", str(tmp_path / "run"), "--tensorboard", str(tmp_path / "board")]
    assert_refused(call(empirics.__main__.main, argv, capsys), "tensorboard", "pip install 'spikecheck[tensorboard]'")
    assert not any(tmp_path.iterdir())


def test_training_that_diverges_is_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate of 1e30: infinities after the first step are written down and said, with the step, and not raised."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    options = ["--layers", "1", "--seq-len", "8", "--batch", "1", "--data", str(text), "--tokenizer", "bytes"]
    for steps in ("1", "3"):
        out = str(tmp_path / steps)
        argv = ["train", "tiny", *options, "--lr", "1e30", "--warmup", "0", "--steps", steps, "--out", out]
        status, words, _ = call(empirics.__main__.main, argv, capsys)
        assert status == 0
        (path,) = (tmp_path / steps / "records").iterdir()
        at = json.loads(path.read_text())["final"]["diverged_at"]
        said = "the held-out loss is not finite after 1 step"
        if at is not None:
            said = f"the loss or its gradient was not finite at step {at}"
        assert words.splitlines()[0] == f"diverged: {said}"
        assert (at is None) == (steps == "1")


# --- the reproduction's own command line --------------------------------------------------------------------------

REPRODUCE: dict[str, list[str]] = {
    "unknown step": ["--only", "nonsense"],
    "unknown scale": ["--scale", "70b"],
    "no GPU": ["--scale", "350m", "--device", "abacus"],
    "unknown device": ["--scale", "smoke", "--device", "abacus"],
    "unknown device, listed": ["--scale", "gpu-smoke", "--device", "foo", "--list"],
    "no processes": ["--processes", "0"],
    "seeds that are not": ["--seeds", "0,x"],
    "negative seed": ["--seeds", "-1"],
    "a seed twice": ["--seeds", "0,0"],
    "unknown flag": ["--fast"],
    "output nowhere": ["--scale", "smoke", "--out", "/proc/none"],
}


@pytest.mark.parametrize("argv", REPRODUCE.values(), ids=REPRODUCE)
def test_bad_reproduction(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = [] if "--out" in argv else ["--out", str(tmp_path)]
    assert_refused(call(paper_repro.main, [*argv, *place], capsys))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("size", scales.PAPER_SIZES)
def test_paper_sizes_need_a_gpu(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(device: str) -> str:
        raise ValueError("absent")

    monkeypatch.setattr(empirics.command_line, "check_device", absent)
    assert_refused(call(paper_repro.main, ["--scale", size, "--out", str(tmp_path)], capsys), "cuda", "--scale cpu")


def test_drawing_needs_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--draw-only", "--out", str(tmp_path / "none")]
    assert_refused(call(paper_repro.main, argv, capsys), "run without --draw-only")
