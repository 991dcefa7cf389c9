"""Tokenising that is killed, and training on shards or streams, go on in the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tokens import Killed, contents, make
from helpers.training import specification, train_until, write_text

from empirics import shards, tokenizer
from empirics.__main__ import main
from empirics.run import run
from empirics.shards import MANIFEST, open_shards

ROOT = Path(__file__).resolve().parents[1]


# --- kills ----------------------------------------------------------------------------------------------------------


def test_killed_at_every_write_it_leaves_the_same_bytes(
    tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch, little_at_a_time: None
) -> None:
    make(documents, tmp_path / "whole", tokenizer="bpe", vocab_size=300, shard_tokens=500)
    whole = contents(tmp_path / "whole")
    honest = shards.write_bytes
    for writes in range(100):
        out = tmp_path / str(writes)
        done = 0

        def failing(path: Path, content: bytes, writes: int = writes) -> None:
            nonlocal done
            if done == writes:
                path.parent.mkdir(exist_ok=True)
                (path.parent / f".{path.name}.left").write_bytes(content[:9])  # what a kill leaves behind
                raise Killed
            done += 1
            honest(path, content)

        with monkeypatch.context() as patch:
            for module in (shards, tokenizer):
                patch.setattr(module, "write_bytes", failing)
            patch.setattr(shards, "write_json", lambda path, value: failing(path, json.dumps(value).encode()))
            try:
                make(documents, out, tokenizer="bpe", vocab_size=300, shard_tokens=500)
            except Killed:
                killed = True
            else:
                killed = False
        make(documents, out, tokenizer="bpe", vocab_size=300, shard_tokens=500)
        if not killed:
            break
        assert {name: content for name, content in contents(out).items() if name[0] != "."} == whole
    assert 10 < writes < 100


@pytest.mark.usefixtures("little_at_a_time")
def test_resuming_reads_on_from_the_last_shard(
    tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    encoded: list[str] = []
    honest = tokenizer.Tokenizer.encode

    def watched(self: tokenizer.Tokenizer, texts: Any) -> Any:
        encoded.extend(texts)
        if len(encoded) == 60:
            raise Killed
        return honest(self, texts)

    monkeypatch.setattr(tokenizer.Tokenizer, "encode", watched)
    monkeypatch.setattr(shards, "GROUP", 1)  # a document at a time
    with pytest.raises(Killed):
        make(documents, out)
    done = json.loads((out / MANIFEST).read_text())["documents"]
    assert 40 < done < 60
    make(documents, out)
    assert len(encoded) == 60 + 80 - done


def test_what_a_cut_write_left_behind_goes(text: Path, tmp_path: Path) -> None:
    """A kill between a temporary file and its name leaves the file; the next run to the end takes it away."""
    make(text, tmp_path / "whole")
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in (".manifest.json.1jkkhs_t", ".00001.bin.abcdefgh"):
        (killed / name).write_bytes(b"half")
    (killed / ".hidden").write_bytes(b"another's")
    make(text, killed)
    assert contents(killed) == contents(tmp_path / "whole") | {".hidden": b"another's"}


def test_killed_for_real(tmp_path: Path) -> None:
    """SIGKILL while shards appear, three times; then it goes on to the end."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} words of a text, {n % 89}\n" * 60}) + "\n" for n in range(2000)))
    code = (
        "import sys; from empirics import shards; shards.GROUP = 50000; shards.SHORT = 100000\n"
        "from pathlib import Path\n"
        "shards.tokenise(sys.argv[1], Path(sys.argv[2]), tokenizer='bytes', shard_tokens=200000)"
    )

    def start(out: Path) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, "-c", code, str(text), str(out)], env=environment)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    assert len(list(whole.glob("*.bin"))) > 12
    kills = 0
    for seen in (1, 4, 9):
        process = start(killed)
        while process.poll() is None and len(list(killed.glob("*.bin"))) <= seen:
            time.sleep(0.001)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills >= 2
    assert start(killed).wait() == 0
    assert contents(killed) == contents(whole)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell that runs the tests in the background has them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("little_at_a_time", "interruptible")
def test_a_signal_says_what_is_kept_and_how_to_go_on(
    tmp_path: Path, documents: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any shard, and after two of them; the same command ends in the bytes of an undisturbed one."""
    out = tmp_path / "out"
    argv = ["tokenise", str(documents), "--tokenizer", "bytes", "--shard-tokens", "2000", "--out"]
    honest, last = shards._Shard.add, [0]

    def interrupted(shard: Any, *arguments: Any, **options: Any) -> None:
        honest(shard, *arguments, **options)
        if len(shard.manifest["shards"]) == last[0]:
            signal.raise_signal(number)

    with monkeypatch.context() as patched:
        patched.setattr(shards._Shard, "add", interrupted)
        for last[0], kept in ((0, "stopped before the first shard"), (2, "stopped and saved 2 shards, ")):
            assert main([*argv, str(out)]) == 130
            said = capsys.readouterr().err.splitlines()[-1]
            assert said.startswith(f"python -m empirics: {kept}")
            assert said.endswith("; run the same command again to go on")
    tokens = sum(shard["tokens"] for shard in json.loads((out / MANIFEST).read_text())["shards"])
    assert f"{tokens} tokens, in {out};" in said
    assert main([*argv, str(out)]) == 0
    assert main([*argv, str(tmp_path / "whole")]) == 0
    assert contents(out) == contents(tmp_path / "whole")


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["random", "epoch"])
def test_training_from_shards_is_training_from_memory(tmp_path: Path, order: str) -> None:
    text, out = write_text(tmp_path), tmp_path / "shards"
    make(text, out, shard_tokens=5000)
    one = run(specification(text, order=order), tmp_path / "a")
    other = run(specification(out, order=order), tmp_path / "b")
    assert one["series"] == other["series"]
    assert one["final"] == other["final"]


def test_order_decides_the_losses(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    one, other = (run(specification(text, order=order), tmp_path) for order in ("random", "epoch"))
    assert one["id"] != other["id"]
    assert one["series"]["loss"] != other["series"]["loss"]


def test_interrupted_epochs_from_shards_resume_exactly(tmp_path: Path) -> None:
    text, out = write_text(tmp_path), tmp_path / "shards"
    make(text, out, limit=3000, shard_tokens=1000)
    spec = specification(out, order="epoch", seq_len=32, batch_size=7, steps=30)  # an epoch is some 13 steps
    whole = run(spec, tmp_path / "whole")
    for last in (3, 14):
        train_until(spec, tmp_path / "killed", last, every=2)
    assert run(spec, tmp_path / "killed") == whole


def test_text_that_changes_between_kill_and_resume_is_refused(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    train_until(specification(text), tmp_path, 3)
    text.write_text(text.read_text().replace("plus", "and"))
    with pytest.raises(ValueError, match=r"text.txt has other tokens than the checkpoints .*; bring the text back"):
        run(specification(text), tmp_path)


# --- streams --------------------------------------------------------------------------------------------------------


class Stream:
    """Rows that can be told where to go on, as `datasets.IterableDataset`."""

    started_at: list[int] = []  # noqa: RUF012

    def __init__(self, rows: list[str]) -> None:
        self.rows, self.place, self.since = rows, 0, 0

    def __iter__(self) -> Iterator[dict[str, str]]:
        Stream.started_at.append(self.place)
        for place in range(self.place, len(self.rows)):
            self.place, self.since = place + 1, self.since + 1
            yield {"text": self.rows[place]}

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place, "rows since the last load": self.since}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.usefixtures("little_at_a_time")
def test_streams_go_on_where_they_were_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_state: bool) -> None:
    rows = [f"row {n} of a stream " * 9 if n % 5 else "" for n in range(100)]
    module = types.ModuleType("datasets")
    make_stream = (lambda: Stream(rows)) if has_state else (lambda: [{"text": row} for row in rows])
    setattr(module, "load_dataset", lambda *names, **options: make_stream())  # noqa: B010
    monkeypatch.setitem(sys.modules, "datasets", module)

    def stop(size: int, tokens: int) -> None:
        if tokens > 7000:
            raise Killed

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    make(Path("hf:a"), whole)
    with pytest.raises(Killed):
        make(Path("hf:a"), killed, on_group=stop)
    Stream.started_at.clear()
    make(Path("hf:a"), killed)
    assert contents(killed) == contents(whole)
    if has_state:
        (start,) = Stream.started_at
        assert start > 30  # nothing of the finished shards is read again
    (killed / "00001.bin").write_bytes(b"damaged")
    make(Path("hf:a"), killed)
    assert contents(killed) == contents(whole)


@pytest.mark.usefixtures("little_at_a_time")
def test_streaming_with_datasets_itself(tmp_path: Path, documents: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    lines = documents.read_text(encoding="utf-8").splitlines(keepends=True)
    for n in range(4):
        (folder / f"train-{n}.jsonl").write_text("".join(lines[40 * n : 40 * n + 40]), encoding="utf-8")

    def stop(size: int, tokens: int) -> None:
        if tokens > 7000:
            raise Killed

    make(documents, tmp_path / "local")
    make(Path(f"hf:{folder}"), tmp_path / "whole")
    with pytest.raises(Killed):
        make(Path(f"hf:{folder}"), tmp_path / "out", on_group=stop)
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["shards"][0]["position"]["stream"]
    make(Path(f"hf:{folder}"), tmp_path / "out")
    here, there = (np.asarray(open_shards(tmp_path / name)[0]) for name in ("local", "out"))
    np.testing.assert_array_equal(here, there)
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")
