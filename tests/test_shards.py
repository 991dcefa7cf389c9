"""Shards hold what memory would, survive a kill, name what is damaged, and are never read whole."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.training import specification, train_until, write_text
from hypothesis import given
from hypothesis import strategies as st

from empirics import shards, tokenizer
from empirics.__main__ import main
from empirics.data import batch, heldout_batches, load_corpus, tokenise
from empirics.run import run
from empirics.shards import MANIFEST, ShardedTokens, open_shards

ROOT = Path(__file__).resolve().parents[1]


class Killed(BaseException):
    pass


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of 5000 characters is a long one, read a few documents at a time."""
    monkeypatch.setattr(tokenizer, "TRAINED_ON", 4500)
    monkeypatch.setattr(shards, "SHORT", 5000)
    monkeypatch.setattr(shards, "GROUP", 700)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Eighty documents of some 150 characters, with blank ones between."""
    path = tmp_path / "words.jsonl"
    texts = [f"document {n}: {n * n % 97} and {n % 7} caf\u00e9s \u4e2d\n" * 5 for n in range(80)]
    path.write_text("".join(json.dumps({"text": text}) + '\n{"text": " "}\n' for text in texts), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make(text: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return tokenise(str(text), out, **({"tokenizer": "bytes", "shard_tokens": 2000} | changes))


def assert_like_memory(text: str, out: Path, name: str, vocab_size: int, limit: int | None = None) -> None:
    there = load_corpus(str(out), vocab_size=vocab_size)
    here = load_corpus(text, vocab_size=vocab_size, tokenizer=name, limit=limit)
    np.testing.assert_array_equal(np.asarray(there.train), here.train)
    np.testing.assert_array_equal(np.asarray(there.heldout), here.heldout)
    assert there.description == here.description
    assert there.tokenizer is not None
    assert here.tokenizer is not None
    assert there.tokenizer.file == here.tokenizer.file
    for order in ("random", "epoch"):
        one, other = (batch(c, seed=3, step=5, batch_size=6, seq_len=33, order=order) for c in (there, here))
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(
        heldout_batches(there, batch_size=2, seq_len=9, count=3),
        heldout_batches(here, batch_size=2, seq_len=9, count=3),
    )


# --- the same tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bytes", "bpe"])
@pytest.mark.parametrize("kind", ["documents", "one file", "sympy"])
def test_short_text_is_as_in_memory(tmp_path: Path, documents: Path, name: str, kind: str) -> None:
    text = {"documents": str(documents), "one file": str(write_text(tmp_path)), "sympy": "sympy"}[kind]
    limit = 40_000 if kind == "sympy" else None
    out = tmp_path / "out"
    manifest = tokenise(text, out, tokenizer=name, vocab_size=300, limit=limit, shard_tokens=3000)
    assert manifest["short"]
    assert len(manifest["shards"]) > 1
    assert_like_memory(text, out, name, 300, limit)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
@pytest.mark.usefixtures("small")
def test_long_text_is_as_in_memory(tmp_path: Path, documents: Path, name: str) -> None:
    out = tmp_path / "out"
    manifest = make(documents, out, tokenizer=name, vocab_size=400, shard_tokens=900)
    assert not manifest["short"]
    assert len(manifest["shards"]) > 2
    assert_like_memory(str(documents), out, name, 400)


@pytest.mark.usefixtures("small")
def test_one_long_document_is_cut_inside(tmp_path: Path) -> None:
    text, out = write_text(tmp_path), tmp_path / "out"
    manifest = make(text, out)
    n = len(text.read_text())
    assert (manifest["documents"], manifest["tokens"]) == (1, n + 1)
    assert manifest["train_tokens"] == pytest.approx(0.95 * n, abs=2)


def test_manifest_says_what_is_there(tmp_path: Path, documents: Path) -> None:
    out = tmp_path / "out"
    manifest = make(documents, out)
    texts = [json.loads(line)["text"] for line in documents.read_text(encoding="utf-8").splitlines()]
    texts = [text for text in texts if text.strip()]
    assert manifest["documents"] == 80
    assert manifest["characters"] == sum(map(len, texts))
    assert manifest["bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest["tokens"] == manifest["bytes"] + 80
    assert manifest["dtype"] == "<u2"
    assert manifest["tokenizer"]["end_of_document"] == {"token": "<|endoftext|>", "id": 257}
    tokens, made, _ = open_shards(out)
    ids, start = np.asarray(tokens), 0
    index = [np.load(out / shard["index"]["file"]) for shard in manifest["shards"]]
    ends = np.concatenate([part[:, 0] + sum(int(p[-1, 0]) for p in index[:n]) for n, part in enumerate(index)])
    for text, end in zip(texts, ends, strict=True):
        assert ids[end - 1] == 257
        assert made.decode(ids[start : end - 1]) == text
        start = end


def test_wide_ids_get_wide_numbers(tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = tokenizer.byte_tokenizer()
    wide.vocab_size = 2**16 + 1
    monkeypatch.setattr(shards, "make_tokenizer", lambda *_: wide)
    assert make(documents, tmp_path / "out")["dtype"] == "<u4"
    assert int(np.asarray(open_shards(tmp_path / "out")[0]).max()) == 257


@given(st.data())
def test_windows_do_not_see_where_shards_end(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda n: sum(n) > 0))
    whole = np.arange(sum(lengths), dtype=np.uint16)
    tokens = ShardedTokens(np.split(whole, np.cumsum(lengths)[:-1]))
    first = data.draw(st.integers(0, len(whole) - 1))
    last = data.draw(st.integers(first + 1, len(whole)))
    part = tokens.part(first, last)
    length = data.draw(st.integers(1, len(part)))
    starts = np.array(data.draw(st.lists(st.integers(0, len(part) - length), max_size=4)), np.int64)
    expected = whole[first:last][starts[:, None] + np.arange(length)]
    np.testing.assert_array_equal(part.windows(starts, length), expected)
    np.testing.assert_array_equal(np.asarray(part), whole[first:last])


# --- kills ----------------------------------------------------------------------------------------------------------


def test_killed_at_every_write_it_leaves_the_same_bytes(
    tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch, small: None
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


@pytest.mark.usefixtures("small")
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("small")
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


# --- damage ---------------------------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "one bit": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["00001.bin", "00001.documents.npy", "tokenizer.json"])
@pytest.mark.usefixtures("small")
def test_damage_is_named_and_repaired(
    tmp_path: Path, documents: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    make(documents, out)
    whole = contents(out)
    DAMAGES[damage](out / name)
    with pytest.raises(ValueError, match=rf"{name} is (damaged|missing).*; run the same tokenise command again"):
        open_shards(out)
    make(documents, out)
    assert contents(out) == whole
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line
    assert load_corpus(str(out), vocab_size=258).vocab_size == 258


def test_damaged_short_text_is_made_again(tmp_path: Path, documents: Path) -> None:
    out = tmp_path / "out"
    make(documents, out)
    whole = contents(out)
    (out / "00001.bin").write_bytes(b"")
    make(documents, out)
    assert contents(out) == whole


def test_large_folders_are_checked_by_size_alone(
    tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    make(documents, out)
    monkeypatch.setattr(shards, "CHECKED", 100)
    DAMAGES["one bit"](out / "00000.bin")
    open_shards(out)
    DAMAGES["truncated"](out / "00000.bin")
    with pytest.raises(ValueError, match=r"00000.bin is damaged \(it has .* bytes and not"):
        open_shards(out)


@pytest.mark.usefixtures("small")
def test_other_folders_are_let_be(tmp_path: Path, documents: Path) -> None:
    out = tmp_path / "out"
    make(documents, out)
    whole = contents(out)
    with pytest.raises(ValueError, match="another text, tokenizer, vocabulary or limit"):
        make(documents, out, vocab_size=300)
    with pytest.raises(ValueError, match="another text"):
        make(documents, out, limit=7000)
    documents.write_text(documents.read_text(encoding="utf-8") + '{"text": "more"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="its text has changed"):
        make(documents, out)
    assert contents(out) == whole
    with pytest.raises(ValueError, match="holds other files; use an empty folder"):
        make(documents, tmp_path)
    (out / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged; delete .* and tokenise again"):
        open_shards(out)
    (out / MANIFEST).write_text('{"format": 99}')
    with pytest.raises(ValueError, match="is of format 99 and not 1"):
        open_shards(out)
    with pytest.raises(ValueError, match="shard_tokens=0"):
        make(documents, tmp_path / "other", shard_tokens=0)


@pytest.mark.usefixtures("small")
def test_unfinished_folder_is_not_trained_on(tmp_path: Path, documents: Path) -> None:
    out = tmp_path / "out"

    def stop(size: int, tokens: int) -> None:
        if tokens > 5000:
            raise Killed

    with pytest.raises(Killed):
        make(documents, out, on_group=stop)
    with pytest.raises(ValueError, match="is not finished; run the same tokenise command again"):
        load_corpus(str(out), vocab_size=300)


def test_shards_are_no_text(tmp_path: Path, documents: Path) -> None:
    make(documents, tmp_path / "out")
    with pytest.raises(ValueError, match="holds tokens and not a text; name the text"):
        make(tmp_path / "out", tmp_path / "again")


def test_too_small_a_vocabulary_is_refused(tmp_path: Path, documents: Path) -> None:
    make(documents, tmp_path / "out", tokenizer="bpe", vocab_size=400)
    remedy = "use a config.json with vocab_size 364 or more, or tokenise the text with --tokenizer bpe --vocab 300"
    with pytest.raises(ValueError, match=f"has 364 ids and the vocabulary 300; {remedy}"):
        load_corpus(str(tmp_path / "out"), vocab_size=300)
    make(documents, tmp_path / "other", tokenizer="bpe", vocab_size=300)  # what the message says to do
    load_corpus(str(tmp_path / "other"), vocab_size=300)


# --- larger than memory ---------------------------------------------------------------------------------------------


def test_twice_the_memory_is_mapped_and_not_read(tmp_path: Path, documents: Path) -> None:
    """A shard with a hole in it, twice as large as this machine's memory: batches come, and memory stays."""
    out = tmp_path / "out"
    manifest = make(documents, out, shard_tokens=10**9)
    (shard,) = manifest["shards"]
    tokens = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    os.truncate(out / shard["file"], 2 * tokens)
    shard |= {"bytes": 2 * tokens, "tokens": tokens}
    manifest |= {"tokens": tokens, "train_tokens": tokens - 10**7}
    (out / MANIFEST).write_text(json.dumps(manifest))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    corpus = load_corpus(str(out), vocab_size=300)
    assert len(corpus.train) == tokens - 10**7
    for step in range(5):
        batch(corpus, seed=0, step=step, batch_size=8, seq_len=1024)
        batch(corpus, seed=0, step=step, batch_size=8, seq_len=1024, order="epoch")
    heldout_batches(corpus, batch_size=8, seq_len=1024, count=4)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000_000 / (1 if sys.platform == "darwin" else 1024)


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
@pytest.mark.usefixtures("small")
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


@pytest.mark.usefixtures("small")
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


# --- the command ----------------------------------------------------------------------------------------------------


def test_command_tokenises_and_train_takes_it(
    tmp_path: Path, documents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    assert main(["tokenise", str(documents), "--out", str(out), "--vocab", "300", "--shard-tokens", "2000"]) == 0
    said = capsys.readouterr().out
    assert "80 documents" in said
    assert main(["tokenise", str(documents), "--out", str(tmp_path / "one"), "--limit", "200"]) == 0
    assert "tokens in 1 shard (uint16)" in capsys.readouterr().out
    assert "300 ids; a document ends with <|endoftext|> (1)" in said
    assert (
        main(["tokenise", str(documents), "--out", str(out), "--vocab", "300", "--shard-tokens", "2000", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["documents"] == 80
    train = ["train", "tiny", "--layers", "1", "--seq-len", "8", "--batch", "1", "--steps", "2", "--data", str(out)]
    assert main([*train, "--out", str(tmp_path / "run"), "--order", "epoch"]) == 0
    assert main([*train, "--out", str(tmp_path / "other"), "--tokenizer", "bytes"]) == 2
    assert "brings its own tokenizer" in capsys.readouterr().err

    assert main(["measure", "tiny", "--layers", "1", "--seq-len", "8", "--seeds", "1", "--data", str(out)]) == 0
    capsys.readouterr()
    assert main(["tokenise", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no text" in line
