"""Shards hold what memory would, name what is damaged, and are never read whole."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.tokens import Killed, contents, make
from helpers.training import write_text
from hypothesis import given
from hypothesis import strategies as st

from empirics import shards, tokenizer
from empirics.__main__ import main
from empirics.data import batch, heldout_batches, load_corpus, require_length, tokenise
from empirics.shards import MANIFEST, ShardedTokens, open_shards


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
@pytest.mark.usefixtures("little_at_a_time")
def test_long_text_is_as_in_memory(tmp_path: Path, documents: Path, name: str) -> None:
    out = tmp_path / "out"
    manifest = make(documents, out, tokenizer=name, vocab_size=400, shard_tokens=900)
    assert not manifest["short"]
    assert len(manifest["shards"]) > 2
    assert_like_memory(str(documents), out, name, 400)


@pytest.mark.usefixtures("little_at_a_time")
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


# --- damage ---------------------------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "one bit": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["00001.bin", "00001.documents.npy", "tokenizer.json"])
@pytest.mark.usefixtures("little_at_a_time")
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


@pytest.mark.usefixtures("little_at_a_time")
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


@pytest.mark.usefixtures("little_at_a_time")
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


# --- texts too short ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_a_text_of_one_token_is_refused_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path, out = tmp_path / "text.txt", tmp_path / "out"
    path.write_text("a")
    argv = ["tokenise", str(path), "--tokenizer", name, "--out", str(out)]
    assert main(argv) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.endswith("text.txt has 1 token to train on and no next one to predict; use a longer text")
    assert (out.exists(), printed.out) == (False, "")
    path.write_text("ab")
    assert main(argv) == 0
    assert len(open_shards(out)[0]) == 2


@pytest.mark.parametrize(
    ("characters", "words"),
    [
        (5, "note: 0 tokens are held out, and a preset's windows have 64 and more: it can be read and not trained on;"),
        (40, "note: 3 tokens are held out, and a preset's windows have 64 and more: train with --seq-len 2 at most"),
        (1260, "note: 64 tokens are held out, and a preset's windows have 64 and more: train with --seq-len 63 at"),
        (1280, ""),
    ],
)
def test_a_short_text_is_said_to_be_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], characters: int, words: str
) -> None:
    path, out = tmp_path / "text.txt", tmp_path / "out"
    path.write_text("x" * characters)
    assert main(["tokenise", str(path), "--tokenizer", "bytes", "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    manifest = json.loads(printed.out)
    assert manifest["documents"] == 1
    said = [line for line in printed.err.splitlines() if line.startswith("note:")]
    assert len(said) == bool(words)
    assert not words or said[0].startswith(words)
    longest = min(manifest["train_tokens"], manifest["tokens"] - manifest["train_tokens"]) - 1
    if longest < 1:
        return
    corpus = load_corpus(str(out), vocab_size=300)
    require_length(corpus, longest)
    with pytest.raises(ValueError, match="the held-out split has"):
        require_length(corpus, longest + 1)
