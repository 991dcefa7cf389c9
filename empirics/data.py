"""Text to tokens to batches: the same numbers for every method, process and machine.

The default text needs no download: the sources of the installed `sympy`, which are the same bytes
wherever the pinned version is installed. Nothing here needs torch.

Token ids: 0 is never produced, because some model classes zero or ignore one row of the token table,
the padding row. Real tokens are 1 .. vocab_size - 1.

Shapes: B sequences in a batch, T tokens in a sequence.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

TokenizerKind = Literal["bytes", "bpe"]
Batch = tuple[NDArray[np.int64], NDArray[np.int64]]

DEFAULT_BYTES = 6_000_000  # taken of `sympy` and of a stream; a file is read whole unless a limit is given.
HELDOUT = 0.05  # share of the characters, at the end of the text.
TOKENIZER_CHARACTERS = 2_000_000  # the tokenizer is trained on at most this prefix of the training split.
SMALLEST_VOCAB = 257  # every byte, and the unused id 0.
CACHE_FORMAT = 1  # part of every cache key: raise it whenever the tokens of an unchanged text would change.
PIECE = 1 << 16  # characters encoded at a time, so that one long document is spread over the cores too.
# Generated tables of numbers and parser states, which are not prose; and tests, which an install may leave out.
LEFT_OUT = {"tests", "benchmarks", "_antlr", "test-examples"}
DEFAULT_CONFIGS = {"allenai/c4": "en"}  # data sets whose configuration has to be named.


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """Documents in a fixed order, and what identifies them.

    Attributes:
        documents: non-empty texts.
        description: where they come from, for a record or a caption.
        digest: sha256 (hex) of the documents with their lengths.
    """

    documents: tuple[str, ...]
    description: str
    digest: str


# Compared by `digest`: the equality that a dataclass writes is ambiguous for arrays.
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corpus:
    """A tokenised text, split.

    Attributes:
        train, heldout: token ids in 1 .. vocab_size - 1, one dimension, read-only.
        vocab_size: the bound on the ids, as asked for; a short text may use fewer of them.
        digest: sha256 (hex) of the text's digest, the tokenizer, the vocabulary size and the tokens.
        description: the text, as in `TextSource`.
    """

    train: NDArray[np.int32]
    heldout: NDArray[np.int32]
    vocab_size: int
    digest: str
    description: str


def load_text(spec: str = "sympy", *, limit: int | None = None) -> TextSource:
    """Documents named by `spec`, cut to at most `limit` bytes of UTF-8.

    Args:
        spec: one of
            `sympy`: the installed package's `*.py`, ordered by the sha256 of their relative path, so that a prefix
                of any length, and the end that is held out, are fair samples of the whole package;
            a path: `.jsonl` (key `text`), `.parquet` (column `text`), anything else is one UTF-8 document;
            `hf:NAME[:CONFIG]`: the training split of a data set on the Hugging Face Hub, streamed. Only data is
                read: no code of the data set runs.
        limit: bytes; None means 6 MB of `sympy` or a stream, and the whole of a file.

    Raises:
        ValueError: there is no such text, it is empty, or it is not in the format that its name says.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} bytes is no text; use a positive number, for example {DEFAULT_BYTES}")
    if spec == "sympy":
        found, name, limit = _sympy_files(), f"sympy {importlib.metadata.version('sympy')}", limit or DEFAULT_BYTES
    elif spec.startswith("hf:"):
        found, name, limit = _hub_documents(spec), spec, limit or DEFAULT_BYTES
    else:
        found, name = _file_documents(spec), Path(spec).name
    documents = tuple(_take(found, limit))
    if not documents:
        raise ValueError(f"{spec} holds no text; use a text that is not empty, for example sympy")
    digest, size = hashlib.sha256(), 0
    for document in documents:
        encoded = document.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
        size += len(encoded)
    noun = "document" if len(documents) == 1 else "documents"
    description = f"{name}, {len(documents)} {noun}, {size / 1e6:.3g} MB"
    return TextSource(documents=documents, description=description, digest=digest.hexdigest())


def load_corpus(
    spec: str = "sympy",
    *,
    vocab_size: int,
    tokenizer: TokenizerKind = "bpe",
    limit: int | None = None,
    cache: Path | None = None,
) -> Corpus:
    """The text `spec` as tokens, split into training and held-out parts.

    The last 5 % is held out, by whole documents where a boundary lies near, else by whole lines; neither the
    tokenizer nor training sees it. `bytes` maps a byte to itself plus one. `bpe` is a byte-level BPE trained on the
    start of the training split; it does not depend on the number of threads, because the library breaks ties
    between equally frequent pairs by their ids.

    Args:
        spec, limit: as in `load_text`.
        vocab_size: of the architecture, at least 257.
        cache: folder that keeps the tokens, made if missing. Files are looked up by the digest of the text (for a
            stream: by its name and `limit`, so that a run resumes without the network), verified, and rebuilt with a
            line on stderr if damaged. Any number of processes may share it.

    Raises:
        ValueError: as `load_text`; unknown tokenizer; vocabulary too small; the cache folder cannot be written.
    """
    if tokenizer not in get_args(TokenizerKind):
        raise ValueError(f"unknown tokenizer {tokenizer!r}; use one of {', '.join(get_args(TokenizerKind))}")
    if not SMALLEST_VOCAB <= vocab_size < 2**31:
        raise ValueError(
            f"vocab_size={vocab_size} is out of range; use at least {SMALLEST_VOCAB} (256 bytes and an unused id 0)"
        )
    source = None if spec.startswith("hf:") else load_text(spec, limit=limit)
    if cache is None:
        return _tokenise(source or load_text(spec, limit=limit), tokenizer, vocab_size)
    identity = source.digest if source else f"{spec} {limit or DEFAULT_BYTES}"
    recipe = [CACHE_FORMAT, identity, tokenizer, vocab_size, importlib.metadata.version("tokenizers")]
    path = cache / f"{tokenizer}-{vocab_size}-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]}.tokens"
    if path.exists():
        try:
            return _read(path)
        except (ValueError, OSError) as error:
            print(f"cached tokens {path} are unusable ({error}); rebuilding them", file=sys.stderr)
    corpus = _tokenise(source or load_text(spec, limit=limit), tokenizer, vocab_size)
    _write(path, corpus)
    return corpus


def batch(corpus: Corpus, *, seed: int, step: int, batch_size: int, seq_len: int) -> Batch:
    """Training tokens and next tokens of one step, (B, T) each: a pure function of `seed` and `step`.

    Any step's batch is had without replaying the earlier ones, and every method sees the same data. Sequences start
    anywhere, with replacement.

    Raises:
        ValueError: the training split is shorter than seq_len + 1; seed or step is negative or beyond 64 bits.
    """
    places = _places(corpus.train, seq_len, "training")
    starts = _raw(seed, step, "batch", batch_size) % np.uint64(places)
    return _windows(corpus.train, starts.astype(np.int64), seq_len)


def heldout_batches(corpus: Corpus, *, batch_size: int, seq_len: int, count: int) -> list[Batch]:
    """`count` batches of held-out tokens and next tokens, (B, T) each; the same in every call.

    Windows lie at even distances; they overlap only if the split is too short. Each batch spans the whole split.

    Raises:
        ValueError: the held-out split is shorter than seq_len + 1.
    """
    places = _places(corpus.heldout, seq_len, "held-out")
    windows = batch_size * count
    starts = np.arange(windows, dtype=np.int64) * places // max(windows, 1)
    return [_windows(corpus.heldout, starts[first::count], seq_len) for first in range(count)]


def random_tokens(vocab_size: int, *, seed: int, batch_size: int, seq_len: int) -> Batch:
    """Tokens and, independent of them, next tokens, (B, T) each, uniform on 1 .. vocab_size - 1.

    >>> tokens, targets = random_tokens(512, seed=0, batch_size=2, seq_len=3)
    >>> tokens.shape, bool((tokens > 0).all() and (targets < 512).all())
    ((2, 3), True)
    """
    if vocab_size < 2:
        raise ValueError(f"vocab_size={vocab_size} leaves no token beside the unused id 0; use at least 2")
    drawn = 1 + (_raw(seed, 0, "random", 2 * batch_size * seq_len) % np.uint64(vocab_size - 1)).astype(np.int64)
    tokens, targets = drawn.reshape(2, batch_size, seq_len)
    return tokens, targets


def _raw(seed: int, step: int, stream: Literal["batch", "random"], count: int) -> NDArray[np.uint64]:
    """64 random bits per entry. Philox's raw output is fixed for ever; numpy may change its distributions."""
    for name, value in (("seed", seed), ("step", step)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name}={value} is out of range; use 0 to 2**64 - 1")
    key = np.array([seed, ("batch", "random").index(stream)], dtype=np.uint64)
    # Philox counts in the first word: with the step in the second, no two steps can share a block.
    counter = np.array([0, step, 0, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def _places(ids: NDArray[np.int32], seq_len: int, split: str) -> int:
    """Number of places where a window of `seq_len` tokens and its next tokens fit."""
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} is no sequence; use at least 1")
    if len(ids) <= seq_len:
        raise ValueError(
            f"the {split} split has {len(ids)} tokens, fewer than seq_len + 1 = {seq_len + 1}; "
            "use a longer text or a shorter sequence"
        )
    return len(ids) - seq_len


def _windows(ids: NDArray[np.int32], starts: NDArray[np.int64], seq_len: int) -> Batch:
    block = ids[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)
    return block[:, :-1].copy(), block[:, 1:].copy()


def _take(documents: Iterable[str], limit: int | None) -> Iterator[str]:
    """Documents that are not blank, up to `limit` bytes; the last is cut, between characters."""
    left = limit
    for document in filter(str.strip, documents):
        # JSON can spell half of a surrogate pair, which has no UTF-8; it becomes a question mark.
        encoded = document.encode("utf-8", "replace")[:left]
        if text := encoded.decode("utf-8", "ignore"):
            yield text
        if left is not None:
            left -= len(encoded)
            if left <= 0:
                return


def _sympy_files() -> Iterator[str]:
    spec = importlib.util.find_spec("sympy")
    if spec is None or spec.origin is None:
        raise ValueError("sympy, the default text, is not installed; pip install sympy or name a text file")
    root = Path(spec.origin).parent
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = [name.as_posix() for name in names if not LEFT_OUT.intersection(name.parts)]
    for name in sorted(kept, key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield (root / name).read_bytes().decode()


def _file_documents(spec: str) -> Iterator[str]:
    path = Path(spec).expanduser()
    if not path.exists():
        raise ValueError(
            f"there is no text {spec!r}; use sympy, hf:NAME[:CONFIG], or the path of a .txt, .jsonl or .parquet file"
        )
    readers: dict[str, Callable[[Path], Iterator[str]]] = {".jsonl": _jsonl, ".parquet": _parquet}
    try:
        yield from readers.get(path.suffix.lower(), lambda path: iter([path.read_bytes().decode("utf-8-sig")]))(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; convert it, for example with iconv -t UTF-8") from error
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror or error}); name a readable text file") from error


def _jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number} is not JSON; write one object a line") from error
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f'{path} line {number} has no string "text"; write {{"text": "..."}} on every line')
            yield row["text"]


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("reading .parquet needs pyarrow; pip install 'spikecheck[hf]', or use .jsonl") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise ValueError(f'{path} has no column "text", only {", ".join(file.schema_arrow.names)}; rename one')
            for rows in file.iter_batches(batch_size=1024, columns=["text"]):
                for value in rows.column(0).to_pylist():
                    if value is not None and not isinstance(value, str):
                        raise ValueError(f'column "text" of {path} holds {type(value).__name__}; make it a string')
                    yield value or ""
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a readable parquet file; write it again, or use .jsonl") from error


def _hub_documents(spec: str) -> Iterator[str]:
    name, _, config = spec.removeprefix("hf:").partition(":")
    if not name:
        raise ValueError(f"{spec!r} names no data set; use hf:NAME[:CONFIG], for example hf:allenai/c4:en")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{spec} needs the datasets library; pip install 'spikecheck[hf]', or use sympy") from error
    try:
        rows = datasets.load_dataset(name, config or DEFAULT_CONFIGS.get(name), split="train", streaming=True)
        for row in rows:
            yield row["text"]
    except KeyError as error:
        raise ValueError(f'{spec} has no column "text"; use a data set that has one, or a .jsonl file') from error
    except Exception as error:  # The library raises the errors of several network clients.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot stream {spec} ({reason}); check its name and the network, or use sympy") from error


def _split(documents: tuple[str, ...]) -> tuple[str, str]:
    """Training and held-out text: cut at the document boundary nearest to 95 %, or at a line where none is near."""
    text = "\n".join(documents)
    cut = round(len(text) * (1 - HELDOUT))
    ends = np.cumsum([len(document) + 1 for document in documents])
    nearest = int(ends[np.abs(ends - cut).argmin()])
    if not 1 - 2 * HELDOUT <= nearest / len(text) <= 1 - HELDOUT / 2:
        nearest = text.rfind("\n", round(len(text) * (1 - 2 * HELDOUT)), cut) + 1 or cut
    return text[:nearest], text[nearest:]


def _tokenise(source: TextSource, tokenizer: TokenizerKind, vocab_size: int) -> Corpus:
    texts = _split(source.documents)
    encode = _bytes if tokenizer == "bytes" else _train_bpe(texts[0], vocab_size)
    train, heldout = (encode(text) for text in texts)
    digest = hashlib.sha256(f"{source.digest} {tokenizer} {vocab_size}\n".encode())
    for ids in (train, heldout):
        ids.flags.writeable = False
        digest.update(len(ids).to_bytes(8, "little") + _stored(ids))
    known = {"vocab_size": vocab_size, "digest": digest.hexdigest(), "description": source.description}
    return Corpus(train=train, heldout=heldout, **known)


def _bytes(text: str) -> NDArray[np.int32]:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) + np.int32(1)


def _train_bpe(text: str, vocab_size: int) -> Callable[[str], NDArray[np.int32]]:
    """A byte-level BPE of at most `vocab_size` ids, trained on the start of `text`, as a function of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=["<pad>"],  # Special tokens come first: this one takes id 0.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_pieces(text[:TOKENIZER_CHARACTERS]), trainer=trainer)
    bpe.encode_special_tokens = True  # Otherwise a text that spells <pad> would produce id 0.

    def encode(text: str) -> NDArray[np.int32]:
        pieces = _pieces(text)
        groups = (pieces[first : first + 64] for first in range(0, len(pieces), 64))  # Bounds the memory of one call.
        ids = [np.array(encoding.ids, np.int32) for group in groups for encoding in bpe.encode_batch_fast(group)]
        return np.concatenate([np.empty(0, np.int32), *ids])

    return encode


def _pieces(text: str) -> list[str]:
    return [text[first : first + PIECE] for first in range(0, len(text), PIECE)]


def _write(path: Path, corpus: Corpus) -> None:
    """Write a checksum, a header line and the tokens, so that a reader sees the whole file or none."""
    header: dict[str, str | int] = {name: getattr(corpus, name) for name in ("vocab_size", "digest", "description")}
    header["n_train"] = len(corpus.train)
    body = json.dumps(header).encode() + b"\n" + _stored(corpus.train) + _stored(corpus.heldout)
    # A name of its own for each writer; the last of several to finish replaces the same bytes.
    partial = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror or error}); choose another folder") from error


def _read(path: Path) -> Corpus:
    checksum, _, body = path.read_bytes().partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        raise ValueError("its checksum does not match")
    line, _, tokens = body.partition(b"\n")
    header, ids = json.loads(line), np.frombuffer(tokens, dtype="<i4")
    n_train = header.pop("n_train")
    return Corpus(train=ids[:n_train], heldout=ids[n_train:], **header)


def _stored(ids: NDArray[np.int32]) -> bytes:
    return ids.astype("<i4").tobytes()
