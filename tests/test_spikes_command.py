"""`spikes`: the command that says of a log where its spikes are."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.series import series, spike
from helpers.training import flip, specification, train_until, write_text

import empirics.spike_log
from empirics.__main__ import main
from empirics.checkpoints import Checkpoints
from empirics.run import record_path, run
from empirics.spike_definitions import DEFINITIONS
from empirics.spike_log import Log, read_log, tell

LOSS = spike(400, 14, at=200)  # slowly; two-valued noise before
CALM = series(400)


def write(path: Path, loss: Any, **columns: Any) -> str:
    """A log by its ending: .jsonl as train writes it, .csv, or .json for a record."""
    rows = [{"step": step, "loss": None if not np.isfinite(value) else float(value)} for step, value in enumerate(loss)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        path.write_text("\ufeffloss,step\n" + "".join(f"{row['loss'] or 'nan'},{row['step']}\n" for row in rows))
    else:
        body = {"series": {"loss": [row["loss"] for row in rows], **columns}, "final": {"diverged_at": None}}
        path.write_text(json.dumps({"schema": 1, "kind": "training", **body}))
    return str(path)


def found_in(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["spikes", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["losses.jsonl", "log.csv", "run.json"])
def test_command_finds_the_same_in_every_kind_of_log(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, calm = write(tmp_path / name, LOSS), write(tmp_path / "calm" / name, CALM)
    told = found_in(capsys, run, "--reference", calm)
    assert [definition["name"] for definition in told["definitions"]] == list(DEFINITIONS)
    assert (told["entries"], told["steps"], told["diverged_at"]) == (400, [0, 399], None)
    for definition in told["definitions"]:
        expected = [{"step": 200 + DEFINITIONS[definition["name"]].lag, "outcome": "slowly", "after": 14}]
        if definition["name"] == "ten-times-first-maximum":
            expected = []  # five times only
        assert definition["raw"] == definition["paired"] == {"entries": 400, "events": expected}
        assert definition["source"]
        assert definition["statement"]
    # The same spike in the reference: a hard batch, which the pair does not show.
    told = found_in(capsys, run, "--reference", run)
    assert all(definition["paired"]["events"] == [] for definition in told["definitions"])
    assert any(definition["raw"]["events"] for definition in told["definitions"])


def test_command_reads_what_training_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    train = ["train", "tiny", "--layers", "1", "--steps", "24", "--warmup", "0", "--batch", "1", "--seq-len", "8"]
    assert main([*train, "--data", "sympy", "--tokenizer", "bytes", "--out", str(out)]) == 0
    capsys.readouterr()
    record = next((out / "records").glob("*.json"))
    series = json.loads(record.read_text())["series"]
    for path in (out, out / "losses.jsonl", record):
        told = found_in(capsys, str(path))
        assert told["entries"] == 24
        expected = list(DEFINITIONS["robust-deviation"].find(np.array(series["loss"])))
        (robust,) = [one for one in told["definitions"] if one["name"] == "robust-deviation"]
        assert [event["step"] for event in robust["raw"]["events"]] == expected
    assert found_in(capsys, str(out), "--column", "gradient_norm")["file"] == str(record)


def test_command_prints_definitions_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, calm = write(tmp_path / "losses.jsonl", [*LOSS[:208], np.nan]), write(tmp_path / "c.csv", CALM)
    assert main(["spikes", str(tmp_path), "--reference", calm]) == 0
    out = capsys.readouterr().out
    assert f"{run}: loss, 209 entries, steps 0 to 208; diverged at step 208" in out
    for definition in DEFINITIONS.values():
        assert definition.statement in out
        assert definition.deviation in out
    assert out.count("no published source confirmed") == 1
    assert out.count("200: never") == 6  # three definitions, raw and paired
    assert out.count("204: never") == 2
    assert main(["spikes", run, "--definition", "six-sigma", "--definition", "twice-median"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["six-sigma", "twice-median"]
    assert main(["spikes", write(tmp_path / "short.csv", LOSS[:100])]) == 0
    out = capsys.readouterr().out
    assert out.count("too short") == 2  # it does not say that they found nothing
    assert "105 entries needed, 100 there" in out
    many = series(600)
    many[20::20] = 50.0
    assert main(["spikes", write(tmp_path / "many.csv", many), "--out", str(tmp_path / "t" / "told.txt")]) == 0
    assert "and 17 more (--json has all)" in (tmp_path / "t" / "told.txt").read_text()


def test_help_calls_no_definition_published_that_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["spikes", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "published definitions" not in told
    (named,) = re.findall(r"the source that published it, but for (.*?), which has none", told)
    assert named.split(", ") == [d.name for d in DEFINITIONS.values() if "no published source" in d.source.label]


@pytest.mark.parametrize("diverged_at", [None, 204])
def test_a_gradient_that_is_not_finite_ends_a_finite_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], diverged_at: int | None
) -> None:
    """Only the record knows of it, beside the losses."""
    run, calm = write(tmp_path / "losses.jsonl", LOSS[:205]), write(tmp_path / "calm" / "losses.jsonl", CALM)
    record = tmp_path / "records" / "run.json"
    write(record, LOSS[:205])
    record.write_text(json.dumps(json.loads(record.read_text()) | {"final": {"diverged_at": diverged_at}}))
    for path in (str(tmp_path), run, str(record)):
        told = found_in(capsys, path, "--reference", calm, "--definition", "six-sigma")
        assert (told["entries"], told["steps"], told["diverged_at"]) == (205, [0, 204], diverged_at)
        (definition,) = told["definitions"]
        for kind in ("raw", "paired"):
            assert definition[kind]["entries"] == 205
            outcomes = [event["outcome"] for event in definition[kind]["events"]]
            assert outcomes == ["undecided" if diverged_at is None else "never"], (path, kind)


def test_steps_are_the_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,train\n" + "".join(f"{1000 + 10 * n},{value}\n" for n, value in enumerate(LOSS)))
    told = found_in(capsys, str(path), "--column", "train", "--definition", "six-sigma")
    assert told["steps"] == [1000, 4990]
    assert told["definitions"][0]["raw"]["events"] == [{"step": 3000, "outcome": "slowly", "after": 14}]
    main(["spikes", str(path), "--column", "train"])
    assert "not every step is there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("missing.json", None, "does not exist"),
        ("missing", None, "does not exist"),
        ("log.txt", "1", "is not a log"),
        ("a.jsonl", "", "has no entries"),
        ("a.jsonl", "[1]", "line 1 of"),
        ("a.jsonl", '{"loss": 1}\n{"loss', "line 2 of"),
        ("a.jsonl", '{"step": 1, "nll": 2}', "no 'loss'; choose with --column from step, nll"),
        ("a.jsonl", '{"loss": "high"}', "has 'high' for loss and 0 for step, which are not numbers"),
        ("a.jsonl", '{"loss": true}', "has True for loss"),
        ("a.jsonl", '{"loss": [1]}', "which are not numbers"),
        ("a.jsonl", '{"loss": 1, "step": 0.5}', "not a whole number"),
        ("a.jsonl", '{"loss": 1, "step": 1e300}', "not a whole number"),
        ("a.jsonl", '{"loss": 1, "step": 7}\n{"loss": 1, "step": 5}', "step 5 follows step 7"),
        ("a.jsonl", '{"loss": 1, "step": 7}\n{"loss": 1}', "not a whole number"),
        ("a.jsonl", b"\xff\xfe", "not text"),
        ("a.csv", "step,nll\n1,2\n", "choose with --column from step, nll"),
        ("a.csv", "loss\n", "has no entries"),
        ("a.csv", "loss,x\n,1\n", "has '' for loss"),
        ("a.csv", "loss,x\n1,1\n1,2,3\n", ""),
        ("a.jsonl", '{"loss": 1' + "0" * 400 + "}", "which are not numbers"),
        ("a.json", '{"schema": 1, "kind": "training", "series": {"loss": [1' + "0" * 400 + "]}}", "beyond all floats"),
        ("a.json", '{"schema": 1, "kind": "training"}', "not a training record"),
        ("n" * 300 + ".csv", None, "cannot read"),
        ("a.json", "{}", "not a training record"),
        ("a.json", '{"schema": 1, "kind": "spikes", "rows": []}', "not a training record"),
        ("a.json", '{"schema": 1, "kind": "training", "sha256": "0"}', "is damaged, or not a training record"),
        ("a.json", '{"schema": 1, "kind": "training", "series": {"nll": [1], "place": [[1]]}}', "from nll"),
        ("a.json", '{"schema": 1, "kind": "training", "series": {"loss": []}}', "has no entries"),
        ("folder", None, "0 training records"),
    ],
)
def test_bad_logs_are_one_line(
    tmp_path: Path, name: str, content: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    status = main(["spikes", str(path)])
    error = capsys.readouterr().err
    if words:
        assert status == 2
        assert words in error
        assert error.count("\n") == 1
    else:
        assert status == 0  # a row with a cell too many still has its loss


def test_a_reference_of_other_steps_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run.csv", LOSS)
    other = tmp_path / "other.csv"
    other.write_text("step,loss\n5,1.0\n6,1.0\n")
    assert main(["spikes", run, "--reference", str(other)]) == 2
    assert "name a reference that saw the same batches" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["spikes", run, "--definition", "seven-sigma"])
    assert stop.value.code == 2
    write(tmp_path / "two" / "a.json", LOSS)
    write(tmp_path / "two" / "b.json", LOSS)
    assert main(["spikes", str(tmp_path / "two")]) == 2
    assert "2 training records" in capsys.readouterr().err


def test_an_unfinished_run_is_read_from_its_newest_whole_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train_until(specification(write_text(tmp_path), steps=40), tmp_path / "run", 12, every=4)
    newest = max(folder.glob("step-*"))
    series = json.loads((newest / "series.json").read_text())
    for column in ("loss", "gradient_norm", "update_norm"):
        told = found_in(capsys, str(tmp_path / "run"), "--column", column)
        assert (told["entries"], told["steps"], told["unfinished"]) == (12, [0, 11], True)
        log = read_log(tmp_path / "run", column)
        assert log.values.tolist() == series[column]
    assert main(["spikes", str(tmp_path / "run"), "--lag"]) == 0
    assert "the run is unfinished, read from its checkpoint up to step 11" in capsys.readouterr().out
    flip(newest / "series.json")
    assert main(["spikes", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert "up to step 7;" in out
    assert "is damaged (series.json has another SHA-256); the one of step 8 is used" in err
    assert main(["spikes", str(tmp_path / "run"), "--column", "los"]) == 2
    assert "choose with --column from loss" in capsys.readouterr().err


def test_what_is_known_of_a_run_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records of a finished run, and the checkpoint of one that goes on, which may be another one a moment later."""
    read: list[Path] = []

    def reading(honest: Any, name: Any) -> Any:
        def counted(it: Any, *arguments: Any) -> Any:
            read.append(name(it))
            return honest(it, *arguments)

        return counted

    monkeypatch.setattr(empirics.spike_log, "read_record", reading(empirics.spike_log.read_record, lambda it: it))
    monkeypatch.setattr(Checkpoints, "series", reading(Checkpoints.series, lambda it: it.folder))
    spec = specification(write_text(tmp_path), steps=20)
    out = tmp_path / "run"
    begun = train_until(spec, out, 12, every=4)
    for more in ([], ["--lag"]):
        assert main(["spikes", str(out), *more]) == 0
        assert read == [begun]
        read.clear()
    write(out / "losses.jsonl", run(spec, out)["series"]["loss"])
    for path in (str(out), str(record_path(spec, out))):
        for more in ([], ["--lag"], ["--column", "gradient_norm"]):
            assert main(["spikes", path, *more]) == 0
            assert read == [record_path(spec, out)]
            read.clear()
    for column in ("loss", "gradient_norm"):  # the control: two logs
        read_log(out, column)
    assert len(read) == 2
    capsys.readouterr()


def test_what_has_not_come_back_in_an_unfinished_run_is_undecided() -> None:
    lasting = np.append(CALM, np.full(250, 50.0))  # longer than the patience
    log = Log(path=Path("a.csv"), column="loss", steps=np.arange(lasting.size), values=lasting)
    for unfinished, outcome in ((False, "never"), (True, "undecided")):
        told = tell(replace(log, unfinished=unfinished), None, ["six-sigma"])
        assert {event["outcome"] for event in told["definitions"][0]["raw"]["events"]} == {outcome}


def written(folder: Path, digest: str = "aa", **changes: Any) -> str:
    """A finished run's folder, as `train` leaves it, but for what no log is read for."""
    spec = {"data": "a.txt", "tokenizer": "bpe", "data_bytes": None, "seed": 0, "batch_size": 8, "seq_len": 64}
    write(folder / "losses.jsonl", CALM)
    data = {"source": "a.txt", "digest": digest, "vocab_size": changes.pop("vocab_size", 512)}
    body = {"schema": 1, "kind": "training", "spec": spec | changes, "data": data, "series": {"loss": CALM.tolist()}}
    (folder / "records").mkdir()
    (folder / "records" / "run.json").write_text(json.dumps(body))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed 1 and not 0"),
        ({"batch_size": 4}, "sequences a batch 4 and not 8"),
        ({"seq_len": 32}, "tokens a sequence 32 and not 64"),
        ({"order": "epoch"}, "order epoch and not random"),
        ({"data": "b.txt", "digest": "bb"}, "text b.txt and not a.txt"),
        ({"tokenizer": "bytes", "digest": "bb"}, "tokenizer bytes and not bpe"),
        ({"vocab_size": 300, "digest": "bb"}, "vocabulary 300 and not 512"),
        ({"digest": "bb"}, "a text that has changed since"),
        ({"seed": 1, "order": "epoch"}, "seed 1 and not 0, order epoch and not random"),
    ],
)
def test_a_reference_of_other_batches_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = written(tmp_path / "run"), written(tmp_path / "other", **changes)
    for log, reference in ((run, other), (f"{run}/losses.jsonl", f"{other}/records/run.json")):
        assert main(["spikes", log, "--reference", reference]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert f"is of other batches than {run}/losses.jsonl: {words}; name a reference that" in err


def test_a_reference_is_known_or_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another rate, or another copy of the text, leaves the batches; where a record is missing, nobody knows."""
    run = written(tmp_path / "run")
    calm = written(tmp_path / "calm", learning_rate=1e-4, steps=9, data="/copy/a.txt", order="random")
    assert found_in(capsys, run, "--reference", calm)["same_batches"] == "recorded"
    assert main(["spikes", run, "--reference", calm]) == 0
    assert f"paired with {calm}/losses.jsonl, on the same batches, as both records say\n" in capsys.readouterr().out
    for log, reference in ((run, write(tmp_path / "c.csv", CALM)), (write(tmp_path / "d.jsonl", CALM), run)):
        assert found_in(capsys, log, "--reference", reference)["same_batches"] == "on trust"
        assert main(["spikes", log, "--reference", reference]) == 0
        assert "taken on trust to have seen the same batches" in capsys.readouterr().out
    assert found_in(capsys, run)["same_batches"] is None
