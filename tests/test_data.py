"""The corpus is the same everywhere, its splits share nothing, and a damaged cache or a bad request says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from empirics import corpus as corpora
from empirics.data import Corpus, batch, heldout_batches, load_corpus, load_text, random_tokens
from empirics.texts import HELDOUT
from empirics.tokenizer import SMALLEST_VOCAB

SMALL = 300_000  # bytes of text: enough for 512 ids, and tokenised in a fraction of a second.
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(vocab_size=512, limit=SMALL)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """A hundred documents that share no word."""
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"text": f"x{i}x " * 20}) + "\n" for i in range(100)), encoding="utf-8")
    return path


END = 257  # of a document, in bytes


def as_text(ids: Any) -> str:
    """Undo the `bytes` tokenizer, without the ends of documents."""
    ids = np.asarray(ids)
    return (ids[ids != END] - 1).astype(np.uint8).tobytes().decode()


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_corpus_does_not_depend_on_hash_seed_or_threads(tokenizer: str) -> None:
    code = (
        "from empirics.data import load_corpus, batch;"
        f"c = load_corpus(vocab_size=512, limit={SMALL}, tokenizer={tokenizer!r});"
        "print(c.digest, batch(c, seed=3, step=7, batch_size=2, seq_len=5)[0].tolist())"
    )

    def elsewhere(hash_seed: str, threads: str) -> str:
        environment = os.environ | {
            "PYTHONHASHSEED": hash_seed,
            "RAYON_NUM_THREADS": threads,
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    here = load_corpus(vocab_size=512, limit=SMALL, tokenizer=tokenizer)
    tokens = batch(here, seed=3, step=7, batch_size=2, seq_len=5)[0].tolist()
    assert {elsewhere("1", "1"), elsewhere("2", "4")} == {f"{here.digest} {tokens}"}


def test_digest_covers_text_tokenizer_and_vocabulary(documents: Path) -> None:
    def digest(**changes: object) -> str:
        return load_corpus(str(documents), **({"vocab_size": 300, "tokenizer": "bytes"} | changes)).digest  # type: ignore[arg-type]

    first = digest()
    others = [digest(vocab_size=301), digest(tokenizer="bpe"), digest(limit=500)]
    documents.write_text(documents.read_text(encoding="utf-8").replace("x7x", "x8y", 1), encoding="utf-8")
    assert digest() == digest()
    assert len({first, *others, digest()}) == 5


@pytest.mark.parametrize("vocab_size", [258, 300, 512])
def test_ids_leave_zero_free_and_fit_the_vocabulary(tmp_path: Path, vocab_size: int) -> None:
    path = tmp_path / "odd.txt"
    # What id 0 is called, the first byte of the alphabet (!) on its own, a zero byte, characters of two to four bytes.
    path.write_text("<pad> 7!7 caf\u00e9 \u4e2d\u6587 \U0001f600 \0 \r\n\n" * 200, encoding="utf-8", newline="")
    for tokenizer in ("bytes", "bpe"):
        corpus = load_corpus(str(path), vocab_size=vocab_size, tokenizer=tokenizer)
        for ids in (corpus.train, corpus.heldout):
            assert 1 <= ids.min() <= ids.max() < vocab_size
            with pytest.raises(ValueError, match="read-only"):
                ids[0] = 0


def test_bytes_lose_nothing(tmp_path: Path) -> None:
    text = "caf\u00e9 <pad>\r\n\tx = 1\n" * 50
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8", newline="")
    corpus = load_corpus(str(path), vocab_size=258, tokenizer="bytes")
    assert as_text(corpus.train) + as_text(corpus.heldout) == text


def test_bpe_shortens_text(corpus: Corpus) -> None:
    n_bytes = SMALL * (1 - HELDOUT)
    assert 0.3 < len(corpus.train) / n_bytes < 0.7
    train = np.asarray(corpus.train)
    merged = np.unique(train[train >= SMALLEST_VOCAB])
    assert len(merged) > 0.9 * (512 - SMALLEST_VOCAB)


def test_heldout_shares_no_document_with_training(documents: Path) -> None:
    corpus = load_corpus(str(documents), vocab_size=258, tokenizer="bytes")
    train, heldout = (set(as_text(ids).split()) for ids in (corpus.train, corpus.heldout))
    assert train.isdisjoint(heldout)
    assert heldout == {f"x{i}x" for i in range(95, 100)}


def test_tokenizer_never_sees_the_heldout_text(documents: Path) -> None:
    """Another held-out document leaves the training tokens as they are; another training document does not."""
    original = documents.read_text(encoding="utf-8")

    def train_tokens(before: str, after: str) -> list[int]:
        documents.write_text(original.replace(before, after), encoding="utf-8")
        return load_corpus(str(documents), vocab_size=280).train.tolist()

    assert train_tokens("x99x", "zzzz") == train_tokens("", "")
    assert train_tokens("x10x", "zzzz") != train_tokens("", "")


def test_batch_is_a_pure_function_of_seed_and_step(corpus: Corpus) -> None:
    def tokens(seed: int, step: int) -> bytes:
        return batch(corpus, seed=seed, step=step, batch_size=4, seq_len=16)[0].tobytes()

    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2**32), (2**32, 0), (2**64 - 1, 2**64 - 1)]
    forward = [tokens(*key) for key in keys]
    assert [tokens(*key) for key in reversed(keys)] == forward[::-1]
    assert len(set(forward)) == len(keys)


def test_batches_never_change() -> None:
    """Fixed numbers: a changed generator would silently give every old record another data order."""
    corpus = Corpus(
        train=np.arange(1, 1001, dtype=np.int32),
        heldout=np.arange(1, 101, dtype=np.int32),
        vocab_size=1001,
        digest="",
        description="",
    )
    tokens, targets = batch(corpus, seed=1, step=2, batch_size=4, seq_len=3)
    assert tokens[:, 0].tolist() == [749, 578, 509, 107]
    assert (targets == tokens + 1).all()
    assert tokens.dtype == targets.dtype == np.int64
    assert tokens.shape == targets.shape == (4, 3)


def test_batches_reach_both_ends_of_the_text() -> None:
    ids = np.arange(1, 9, dtype=np.int32)
    corpus = Corpus(train=ids, heldout=ids, vocab_size=9, digest="", description="")
    tokens, targets = batch(corpus, seed=0, step=0, batch_size=200, seq_len=4)
    assert set(tokens[:, 0]) == {1, 2, 3, 4}
    assert targets.max() == 8


def test_heldout_batches_are_fixed_distinct_and_span_the_split(corpus: Corpus) -> None:
    batches = heldout_batches(corpus, batch_size=4, seq_len=32, count=5)
    again = heldout_batches(corpus, batch_size=4, seq_len=32, count=5)
    for (tokens, targets), (tokens_again, _) in zip(batches, again):
        assert (tokens == tokens_again).all()
        assert (tokens[:, 1:] == targets[:, :-1]).all()
        assert tokens.shape == targets.shape == (4, 32)
    numbers = Corpus(
        train=corpus.train, heldout=np.arange(1, 801, dtype=np.int32), vocab_size=801, digest="", description=""
    )
    seen = np.concatenate([tokens for tokens, _ in heldout_batches(numbers, batch_size=4, seq_len=32, count=5)])
    assert len(np.unique(seen)) == seen.size
    assert np.ptp(heldout_batches(numbers, batch_size=4, seq_len=32, count=5)[0][0]) > 500


def test_random_tokens_are_uniform_and_independent() -> None:
    """Bins of 1 .. V-1 within five standard deviations; a target equals its token with probability 1/(V-1)."""
    vocab_size, size = 11, 40_000
    tokens, targets = random_tokens(vocab_size, seed=5, batch_size=40, seq_len=1000)
    assert tokens.shape == targets.shape == (40, 1000)
    share = 1 / (vocab_size - 1)
    band = 5 * np.sqrt(size * share * (1 - share))
    for ids in (tokens, targets):
        counts = np.bincount(ids.ravel(), minlength=vocab_size)
        assert counts[0] == 0
        assert np.abs(counts[1:] - size * share).max() < band
    assert abs((tokens == targets).sum() - size * share) < band
    assert abs((tokens[:, 1:] == targets[:, :-1]).sum() - size * share) < band
    assert (random_tokens(vocab_size, seed=5, batch_size=40, seq_len=1000)[0] == tokens).all()
    assert (random_tokens(vocab_size, seed=6, batch_size=40, seq_len=1000)[0] != tokens).any()


def test_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    built = load_corpus(vocab_size=300, limit=50_000, cache=tmp_path / "data")
    monkeypatch.setattr(corpora, "_tokenise", lambda *_: pytest.fail("tokenised again"))
    read = load_corpus(vocab_size=300, limit=50_000, cache=tmp_path / "data")
    assert (np.asarray(read.train) == built.train).all()
    assert (np.asarray(read.heldout) == built.heldout).all()
    assert read.tokenizer is not None
    assert built.tokenizer is not None
    assert (read.tokenizer.file, read.tokenizer.end_id) == (built.tokenizer.file, built.tokenizer.end_id)
    assert (read.digest, read.vocab_size, read.description) == (built.digest, built.vocab_size, built.description)
    with pytest.raises(ValueError, match="read-only"):
        read.train[0] = 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", ["empty", "truncated", "one bit", "text"])
def test_damaged_cache_is_rebuilt(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    built = load_corpus(vocab_size=300, limit=50_000, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes({"empty": b"", "truncated": whole[:-7], "one bit": bytes(flipped), "text": b"hello\n"}[damage])
    again = load_corpus(vocab_size=300, limit=50_000, cache=tmp_path)
    notice = capsys.readouterr().err
    assert again.digest == built.digest
    assert path.read_bytes() == whole
    assert notice.count("\n") == 1
    assert "rebuilding" in notice


def test_changed_file_is_not_served_from_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    digests = set()
    for text in ("one\n" * 100, "two\n" * 100):
        path.write_text(text, encoding="utf-8")
        digests.add(load_corpus(str(path), vocab_size=300, cache=tmp_path / "data").digest)
    assert len(digests) == 2


def test_writers_at_once_leave_one_whole_file(tmp_path: Path, corpus: Corpus) -> None:
    path = tmp_path / "data" / "a.tokens"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: corpora._write(path, corpus), range(24)))
    assert corpora._read(path).digest == corpus.digest
    assert [file.name for file in path.parent.iterdir()] == ["a.tokens"]


def test_bad_requests_name_the_remedy(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no tokenizer 'words'; use bytes, gpt2"):
        load_corpus(tokenizer="words", vocab_size=512)
    with pytest.raises(ValueError, match="vocab_size=257 is out of range; use at least 258"):
        load_corpus(vocab_size=257)
    with pytest.raises(ValueError, match="limit=0"):
        load_text(limit=0)
    with pytest.raises(ValueError, match=r"training split has .* tokens, fewer than the"):
        batch(corpus, seed=0, step=0, batch_size=1, seq_len=len(corpus.train))
    with pytest.raises(ValueError, match=r"held-out split has .* tokens, fewer than the"):
        heldout_batches(corpus, batch_size=1, seq_len=len(corpus.heldout), count=1)
    with pytest.raises(ValueError, match="seed=-1 is out of range"):
        batch(corpus, seed=-1, step=0, batch_size=1, seq_len=4)
    with pytest.raises(ValueError, match="vocab_size=1 "):
        random_tokens(1, seed=0, batch_size=1, seq_len=1)
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot write .*; choose another folder"):
        load_corpus(vocab_size=300, limit=5000, cache=tmp_path / "file")


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_document_is_followed_by_its_end(documents: Path, tokenizer: str) -> None:
    corpus = load_corpus(str(documents), vocab_size=300, tokenizer=tokenizer)
    assert corpus.tokenizer is not None
    for ids, count in ((np.asarray(corpus.train), 95), (np.asarray(corpus.heldout), 5)):
        assert ids[-1] == corpus.tokenizer.end_id
        assert (ids == corpus.tokenizer.end_id).sum() == count
        texts = [corpus.tokenizer.decode(part[:-1]) for part in np.split(ids, np.flatnonzero(ids == ids[-1]) + 1)[:-1]]
        assert all(text == f"{text.split()[0]} " * 20 for text in texts)


def test_a_document_that_is_cut_has_one_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some lines\n" * 100)
    corpus = load_corpus(str(path), vocab_size=258, tokenizer="bytes")
    assert END not in np.asarray(corpus.train)
    assert (np.asarray(corpus.heldout) == END).sum() == 1
