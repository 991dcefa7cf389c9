"""Models in folders that are damaged: named in a line, and the last whole checkpoint used, by every command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.commands import ROOT
from helpers.training import cut, flip, specification, train_until, write_text
from helpers.weights import architecture
from safetensors.torch import load_file, save_file

from empirics.__main__ import main
from empirics.checkpoints import DOCUMENTS, MANIFEST, keep_model
from empirics.kept import load_model, model_folder
from empirics.model import build
from empirics.run import model_path, record_path
from empirics.run import run as train
from empirics.tokenizer import load_tokenizer

WEIGHTS = "model.safetensors"
COMMANDS = {
    "probes": ["probes", "--only", "weight_norm", "--seq-len", "6", "--json"],
    "measure": ["measure", "--seeds", "1", "--seq-len", "8", "--json"],
    "perplexity": ["perplexity", "--tokenizer", "bytes", "--json"],
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints of steps 7 and 8, of a high rate, beside its text."""
    folder = tmp_path_factory.mktemp("stopped")
    train_until(specification(write_text(folder), learning_rate=0.1, warmup=0), folder / "run", 8)
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped / "run", tmp_path / "run")
    return tmp_path / "run"


def checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoints/*/step-*"))


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "one"
    keep_model(
        folder,
        build(architecture(d_model=12, vocab_size=258), seed=0),
        tokenizer=load_tokenizer("bytes"),
        run={"seq_len": 9},
    )
    return folder


def command(name: str, folder: Path, text: Path) -> list[str]:
    first, *rest = COMMANDS[name]
    return [first, str(folder), *rest, *(["--data", str(text / "text.txt")] if name == "perplexity" else [])]


def said(capfd: pytest.CaptureFixture[str], argv: list[str]) -> tuple[dict[str, object], list[str]]:
    """The answer, and what is on standard error but for progress."""
    capfd.readouterr()
    assert main(argv) == 0
    out, err = capfd.readouterr()
    return json.loads(out), [line for line in err.splitlines() if line.strip() and not line.startswith("windows")]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_damaged_checkpoint_is_named_and_the_last_good_one_used(
    name: str, run: Path, stopped: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, newest = checkpoints(run)
    good = [said(capfd, command(name, folder, stopped)) for folder in (before, newest, run)]
    (of_before, _), (of_newest, _), (of_run, lines) = good
    assert lines == []

    def values(answer: dict[str, object]) -> object:
        return {"probes": answer.get("probes"), "stds": answer.get("stds"), "nats": answer.get("nats")}

    assert values(of_before) != values(of_newest) == values(of_run)  # the newest one, where both are whole
    damages: list[tuple[Callable[[Path], None], str]] = [(flip, "another SHA-256"), (cut, "bytes and not")]
    for damage, words in damages:
        damage(newest / WEIGHTS)
        answer, (line,) = said(capfd, command(name, run, stopped))
        assert values(answer) == values(of_before)
        assert line.startswith(f"checkpoint {newest} is damaged ({WEIGHTS} has ")
        assert words in line
        assert line.endswith("; the one of step 7 is used")


@pytest.mark.parametrize("name", COMMANDS)
def test_where_none_is_whole_one_line_says_so(
    name: str, run: Path, stopped: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for folder in checkpoints(run):
        flip(folder / WEIGHTS)
    for folder, words in (
        (run, "there is no other: train again, which starts from step 0"),
        (checkpoints(run)[0], "name the folder of its run, of which the newest whole checkpoint is used"),
    ):
        assert main(command(name, folder, stopped)) == 2
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert f"is damaged ({WEIGHTS} has another SHA-256)" in err
        assert words in err


def test_spikes_reads_nothing_where_none_is_whole(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for folder in checkpoints(run):
        flip(folder / "series.json")
    assert main(["spikes", str(run)]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.count("series.json has another SHA-256") == 2


def test_the_moments_beside_a_model_are_not_its_damage(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A checkpoint named by itself is read for its weights; of a run's folder one is used that could be resumed."""
    before, newest = checkpoints(run)
    flip(newest / "optimizer.safetensors")
    load_model(newest)
    assert model_folder(run) == before
    assert "the one of step 7 is used" in capfd.readouterr().err


@pytest.mark.parametrize("file", [WEIGHTS, "architecture.json", "tokenizer.json", "run.json"])
def test_a_kept_model_is_held_to_its_manifest(file: str, kept: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = (kept / file).read_bytes()
    load_model(kept)
    changed = {"architecture.json": (b'"tied":false', b'"tied":true '), "run.json": (b"9}", b"8}")}
    if file in changed:
        assert whole.count(changed[file][0]) == 1
        (kept / file).write_bytes(whole.replace(*changed[file]))
    else:
        flip(kept / file)
    with pytest.raises(ValueError, match=rf"is damaged \({file} has another SHA-256\); bring it back, or train again"):
        load_model(kept)
    (kept / file).unlink()
    with pytest.raises(ValueError, match=f"{file} is missing|{file} is damaged|has no {file}"):
        load_model(kept)
    (kept / file).write_bytes(whole)
    load_model(kept)
    assert capfd.readouterr().err == ""


def test_a_manifest_has_every_file_that_is_read(kept: Path) -> None:
    assert set(json.loads((kept / MANIFEST).read_text())["files"]) == {p.name for p in kept.iterdir()} - {MANIFEST}
    save_file({"more": torch.zeros(2)}, kept / "zz.safetensors")
    with pytest.raises(ValueError, match=r"zz.safetensors is not in manifest.json"):
        load_model(kept)
    (kept / "zz.safetensors").unlink()
    for content in ("", "[]", '{"files": []}', '{"files": {"model.safetensors": 3}}', "[" * 100_000):
        (kept / MANIFEST).write_text(content)
        with pytest.raises(ValueError, match=r"manifest.json cannot be read|architecture.json is not in"):
            load_model(kept)


def older(kept: Path) -> None:
    """Make it one of a version that wrote no manifest."""
    (kept / MANIFEST).unlink()
    save_file(load_file(kept / WEIGHTS), kept / WEIGHTS)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_older_model_without_a_manifest_is_said_to_be(
    name: str, kept: Path, stopped: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One whose manifest is lost is damaged: its weights were written with one."""
    (kept / MANIFEST).unlink()
    assert main(command(name, kept, stopped)) == 2
    assert f"the model in {kept} is damaged (manifest.json is missing); bring" in capfd.readouterr().err
    save_file(load_file(kept / WEIGHTS), kept / WEIGHTS)
    _, lines = said(capfd, command(name, kept, stopped))
    assert [line for line in lines if line.startswith("note: ")] == [
        f"note: {kept} has no manifest.json, being of an older version, so that damage to its numbers would not be seen"
    ]


def test_an_older_model_has_the_numbers_of_its_file(kept: Path) -> None:
    older(kept)
    model = load_model(kept)
    for name, value in load_file(kept / WEIGHTS).items():
        assert torch.equal(model.get_parameter(name), value)


def test_an_older_model_of_other_weights_is_damaged(kept: Path) -> None:
    """As far as anybody can see without a manifest."""
    older(kept)
    weights = load_file(kept / WEIGHTS)
    del weights["head.weight"]
    save_file(weights, kept / WEIGHTS)
    with pytest.raises(ValueError, match=r"is damaged \(Missing key in checkpoint state_dict: head.weight.\)"):
        load_model(kept)


def test_what_a_manifest_does_not_name_is_not_obeyed(kept: Path) -> None:
    (kept / DOCUMENTS).write_text('{"end_of_document": 5}')
    with pytest.raises(ValueError, match=r"is damaged \(documents.json is not in manifest.json\)"):
        load_model(kept)


def test_a_checkpoint_without_a_manifest_is_no_older_model(run: Path) -> None:
    newest = checkpoints(run)[-1]
    (newest / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"manifest.json is missing"):
        load_model(newest)


def test_no_traceback_of_torchs_is_on_standard_error(kept: Path) -> None:
    """Its loader logs one, which pytest's own handler would take: a process without one sees what a user does."""
    older(kept)  # else the damage is seen before the loader sees it
    cut(kept / WEIGHTS)
    argv = [sys.executable, "-m", "empirics", "probes", str(kept), "--only", "weight_norm"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    note, line = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert note.startswith("note: ")
    assert f"the model in {kept} is damaged (" in line
    assert line.endswith("bring it back, or train again with --keep-checkpoint")


def test_an_older_model_that_was_masked_needs_to_know_where(kept: Path) -> None:
    older(kept)
    (kept / "run.json").write_text('{"seq_len": 9, "mask_documents": true}')
    with pytest.raises(ValueError, match=r"is damaged \(documents.json is missing\)"):
        load_model(kept)
    (kept / DOCUMENTS).write_text('{"end_of_document": 5}')
    assert load_model(kept).end_of_document == 5


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("sealed", [True, False])
def test_what_is_wrong_with_an_architecture_is_said(
    name: str, sealed: bool, kept: Path, stopped: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if not sealed:
        older(kept)
    for content, words in (("[]", "it is no JSON object"), ("{}", "it has no 'init'")):
        (kept / "architecture.json").write_text(content)
        assert main(command(name, kept, stopped)) == 2
        assert f"damaged ({'architecture.json has 2 bytes and not ' if sealed else words}" in capfd.readouterr().err


def test_a_damaged_tokenizer_is_damage_to_perplexity_too(
    kept: Path, stopped: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cut(kept / "tokenizer.json")
    assert main(["perplexity", str(kept), "--data", str(stopped / "text.txt")]) == 2
    assert f"the model in {kept} is damaged (tokenizer.json has " in capfd.readouterr().err


def test_another_tokenizer_than_the_models_own_is_noted(
    kept: Path, stopped: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer("bytes")
    (tmp_path / "other.json").write_text(tokenizer.file + "\n ")
    for asked, noted in (("bytes", False), (str(tmp_path / "other.json"), True)):
        _, lines = said(capfd, [*command("perplexity", kept, stopped), "--tokenizer", asked])
        note = f"note: --tokenizer {asked} is not the tokenizer that {kept} has of its own"
        assert lines == ([note] if noted else [])


def test_a_finished_run_whose_model_is_damaged_is_told_what_makes_it_anew(
    stopped: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both remedies, that of the training and that of who reads the model, name the record, and are true."""
    spec, out = specification(stopped / "text.txt", steps=2), tmp_path / "out"
    train(spec, out, keep_model=True)
    train(spec, out, keep_model=True)  # whole: nothing to say
    model, record = model_path(spec, out), record_path(spec, out)
    flip(model / WEIGHTS)
    with pytest.raises(ValueError, match=rf"its model in {model} is damaged \(.*\); .*, or delete {record} and run"):
        train(spec, out, keep_model=True)
    with pytest.raises(ValueError, match=rf"bring it back, or delete {record} and train again with --keep"):
        load_model(model)
    record.unlink()
    train(spec, out, keep_model=True)
    load_model(model)
    assert capfd.readouterr().err == ""
