"""A text as tokens, split into what is trained on and what is held out.

The default text needs no download: the sources of the installed `sympy`, which are the same bytes wherever the pinned
version is installed. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from empirics.shards import GROUP, ShardedTokens, is_shards, open_shards
from empirics.texts import DEFAULT_BYTES, TextSource, groups, load_text, split
from empirics.tokenizer import SMALLEST_VOCAB, Tokenizer, make_tokenizer, require_room, require_vocabulary, train_bpe
from theory.records import slug

Tokens = NDArray[np.int32] | ShardedTokens

# Part of every cache key, and of the name of every record on text: raise it whenever the tokens of an unchanged text
# would change. 2: every document is followed by an end-of-document token.
TOKENS_FORMAT = 2


# Compared by `digest`: the equality that a dataclass writes is ambiguous for arrays.
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corpus:
    """A tokenised text, split.

    Attributes:
        train, heldout: token ids below vocab_size, one dimension, read-only; in memory, or mapped from shards.
        vocab_size: the bound on the ids, as asked for; a short text may use fewer of them.
        digest: sha256 (hex) of the text's digest, the tokenizer, the vocabulary size and the tokens; of shards, of
            their checksums.
        description: the text, as in `TextSource`.
        tokenizer: what made the ids, and the name and id of the token that ends a document; None if not known.
    """

    train: Tokens
    heldout: Tokens
    vocab_size: int
    digest: str
    description: str
    tokenizer: Tokenizer | None = None


def load_corpus(
    spec: str = "sympy",
    *,
    vocab_size: int,
    tokenizer: str = "bpe",
    limit: int | None = None,
    cache: Path | None = None,
) -> Corpus:
    """The text `spec` as tokens, split into training and held-out parts.

    The last 5 % (at most ten million characters) is held out, by whole documents where a boundary lies near, else by
    whole lines; neither a tokenizer that is trained nor training sees it. Every document is followed by the
    tokenizer's end-of-document token.

    Args:
        spec: a folder of shards, which are mapped and not read and bring their own tokenizer; or a text as
            `load_text` takes it, which is held in memory.
        tokenizer: `bpe`, `bytes`, `gpt2` or a path, as in `empirics.tokenizer`; not used for shards.
        limit: bytes of text, as in `load_text`; not used for shards.
        vocab_size: of the architecture, at least 258.
        cache: folder that keeps the tokens, made if missing; not used for shards. Files are looked up by the digest of
            the text (for a stream: by its name and `limit`, so that a run resumes without the network), verified, and
            rebuilt with a line on stderr if damaged. Any number of processes may share it.

    Raises:
        ValueError: as `load_text`, `make_tokenizer` and `open_shards`; the cache folder cannot be written.
    """
    if is_shards(spec):
        return _from_shards(Path(spec).expanduser(), vocab_size)
    require_vocabulary(vocab_size)
    # One that is trained on the text has to wait for it.
    fixed = None if tokenizer == "bpe" else make_tokenizer(tokenizer, (), vocab_size)
    source = None if spec.startswith("hf:") else load_text(spec, limit=limit)
    if cache is None:
        return _tokenise(source or load_text(spec, limit=limit), fixed, vocab_size)
    identity = source.digest if source else f"{spec} {limit or DEFAULT_BYTES}"
    recipe = [TOKENS_FORMAT, identity, _name(fixed), vocab_size, importlib.metadata.version("tokenizers")]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    path = cache / f"{slug(Path(tokenizer).name)}-{vocab_size}-{key}.tokens"
    if path.exists():
        try:
            return _read(path)
        except (ValueError, OSError) as error:
            print(f"cached tokens {path} are unusable ({error}); rebuilding them", file=sys.stderr)
    corpus = _tokenise(source or load_text(spec, limit=limit), fixed, vocab_size)
    _write(path, corpus)
    return corpus


def _name(fixed: Tokenizer | None) -> str:
    return "bpe" if fixed is None else hashlib.sha256(fixed.file.encode()).hexdigest()


def _from_shards(folder: Path, vocab_size: int) -> Corpus:
    tokens, tokenizer, manifest = open_shards(folder)
    other = f"tokenise the text with --tokenizer bpe --vocab {max(vocab_size, SMALLEST_VOCAB)}"
    require_room(tokenizer, vocab_size, f"the tokenizer of {folder}", other=other)
    return Corpus(
        train=tokens.part(0, manifest["train_tokens"]),
        heldout=tokens.part(manifest["train_tokens"], len(tokens)),
        vocab_size=vocab_size,
        digest=manifest["digest"],
        description=manifest["description"],
        tokenizer=tokenizer,
    )


def _tokenise(source: TextSource, fixed: Tokenizer | None, vocab_size: int) -> Corpus:
    train, heldout, is_whole = split(source.documents)
    made = fixed or train_bpe(train, vocab_size)
    digest = hashlib.sha256(f"{source.digest} {_name(fixed)} {vocab_size}\n".encode())
    parts: list[NDArray[np.int32]] = []
    for documents, ends in ((train, is_whole), (heldout, True)):
        ids = _encode(made, documents, ends=ends)
        ids.flags.writeable = False
        digest.update(len(ids).to_bytes(8, "little") + _stored(ids))
        parts.append(ids)
    return Corpus(
        train=parts[0],
        heldout=parts[1],
        vocab_size=vocab_size,
        digest=digest.hexdigest(),
        description=source.description,
        tokenizer=made,
    )


def _encode(tokenizer: Tokenizer, documents: Sequence[str], *, ends: bool) -> NDArray[np.int32]:
    """All documents in a row, each followed by its end; the last one only if `ends`."""
    end = np.array([tokenizer.end_id], np.int32)
    ids = [part for group in groups(documents, GROUP) for one in tokenizer.encode(group) for part in (one, end)]
    return np.concatenate([np.empty(0, np.int32), *(ids if ends else ids[:-1])])


# --- the cache ------------------------------------------------------------------------------------------------------


def _write(path: Path, corpus: Corpus) -> None:
    """Write a checksum, a header line and the tokens, so that a reader sees the whole file or none."""
    assert corpus.tokenizer is not None
    train, heldout = np.asarray(corpus.train), np.asarray(corpus.heldout)
    header: dict[str, str | int] = {name: getattr(corpus, name) for name in ("vocab_size", "digest", "description")}
    header |= {"tokenizer": corpus.tokenizer.file, "end_of_document": corpus.tokenizer.end_of_document}
    header["n_train"] = len(train)
    body = json.dumps(header).encode() + b"\n" + _stored(train) + _stored(heldout)
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
    tokenizer = Tokenizer(header.pop("tokenizer"), header.pop("end_of_document"))
    return Corpus(train=ids[:n_train], heldout=ids[n_train:], tokenizer=tokenizer, **header)


def _stored(ids: NDArray[np.int32]) -> bytes:
    return ids.astype("<i4").tobytes()
