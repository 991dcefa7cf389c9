"""Tokens on disk: a text tokenised once into shards, which a training maps into memory and never reads whole.

A folder of shards:

    tokenizer.json, tokenizer_config.json   what made the ids, with the name of the end-of-document token
    00000.bin, 00001.bin, ...               ids, little-endian uint16 (uint32 for a vocabulary above 65536), nothing
                                            else; whole documents, each followed by its end
    00000.documents.npy, ...                int64 (n, 2): where each document of the shard ends, in tokens (its end
                                            included) and in characters, from the shard's start
    manifest.json                           sizes and SHA-256 of every file, counts, where the held-out part begins, and
                                            after each shard where in the text it ends; written after each shard

Every file is written whole or not at all, so that tokenising that is killed goes on after the last shard of the
manifest, and leaves the bytes of an undisturbed one. The text is streamed: a shard of tokens is in memory at a time.

The last documents are held out as in `texts.split`. A text of less than some two million characters is split before the
tokenizer is trained, exactly as `load_corpus` splits it; a longer one when its length is known, and where no document
ends near the cut it lies inside one, at the token where a line through the counts puts it.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from empirics.texts import HELDOUT, Documents, boundary, cut_range, describe, groups, split
from empirics.tokenizer import CONFIG, FILE, TRAINED_ON, Tokenizer, make_tokenizer, read_tokenizer
from theory.records import write_bytes, write_json
from theory.words import counted

FORMAT = 1  # of the folder: raise it when an older reader would misread it.
MANIFEST = "manifest.json"
OURS = ("[0-9]*.bin", "[0-9]*.documents.npy", ".[0-9]*.*", f".{MANIFEST}.*")  # shards, and writes that were cut short
SHARD_TOKENS = 50_000_000  # 100 MB of uint16; what a kill can cost.
GROUP = 1 << 22  # characters read at a time; shards end between groups.
# A text of so many characters holds out nothing of the first two million, on which a BPE is trained.
SHORT = round(TRAINED_ON / (1 - 2 * HELDOUT))
SMALLEST = 2  # tokens that a training can be of: one, and the one that follows it
CHECKED = 2_000_000_000  # bytes: above, `open_shards` compares sizes and leaves checksums to `tokenise`.

OnGroup = Callable[[int, int], None]


class ShardedTokens:
    """Token ids of several arrays in a row, as one that is read where it is asked for.

    Args:
        shards: one dimension each; memory maps, or anything that numpy slices.
        first, last: of all their tokens, those that this one shows.
    """

    def __init__(self, shards: Sequence[NDArray[Any]], first: int = 0, last: int | None = None) -> None:
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])
        total = int(self._ends[-1]) if shards else 0
        self._first, self._last = first, total if last is None else last

    def __len__(self) -> int:
        return self._last - self._first

    def part(self, first: int, last: int) -> ShardedTokens:
        """Its tokens from `first` to before `last`."""
        return ShardedTokens(self._shards, self._first + first, self._first + last)

    def windows(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """The `length` tokens from each start on, (number of starts, length)."""
        rows = np.empty((len(starts), length), np.int64)
        for row, start in zip(rows, (np.asarray(starts) + self._first).tolist(), strict=True):
            n = int(np.searchsorted(self._ends, start, side="right"))
            filled = 0
            while filled < length:
                shard = self._shards[n]
                offset = start + filled - int(self._ends[n]) + len(shard)
                part = shard[offset : offset + length - filled]
                row[filled : filled + len(part)] = part
                filled, n = filled + len(part), n + 1
        return rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All of them in memory: for short texts."""
        return self.windows(np.zeros(1, np.int64), len(self))[0].astype(dtype or np.int64)


def is_shards(spec: str) -> bool:
    """Whether a text's name is that of a folder of shards."""
    return (Path(spec).expanduser() / MANIFEST).is_file()


def tokenise(
    spec: str,
    out: Path,
    *,
    tokenizer: str,
    vocab_size: int | None = None,
    limit: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    on_group: OnGroup = lambda size, tokens: None,
) -> dict[str, Any]:
    """Write the shards of a text, or what is missing of them, and return the manifest.

    A folder that is there is checked, checksums included: a damaged shard is named, and made again with those
    behind it.

    Args:
        spec: a text as `Documents` takes it.
        tokenizer, vocab_size: as `make_tokenizer` takes them.
        limit: bytes of text; all if None.
        shard_tokens: a shard ends with the group of documents that makes it as long as this.
        on_group: called with the bytes and tokens so far.

    Raises:
        ValueError: as `Documents` and `make_tokenizer`; the text is too short for a token and the next one; the folder
            holds shards of another text or tokenizer, or cannot be written.
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens} is no shard; use 1 or more, for example {SHARD_TOKENS}")
    recipe = {
        "text": Documents(spec, limit=limit).identity, "limit": limit, "tokenizer": tokenizer,
        "vocab_size": vocab_size, "shard_tokens": shard_tokens,
    }  # fmt: skip
    manifest = _whole_part(out, recipe)
    if manifest is None:
        documents = Documents(spec, limit=limit)
        head, is_short = _head(documents)
        if is_short:
            return _tokenise_short(documents, head, out, recipe)
        made = make_tokenizer(tokenizer, head, vocab_size)
        manifest = _begin(out, recipe, made, documents.name, is_short=False)
    if manifest["complete"]:
        return manifest
    made = read_tokenizer(out)
    shards = manifest["shards"]
    documents = Documents(spec, limit=limit, position=shards[-1]["position"] if shards else None)
    shard = _Shard(out, made, manifest)
    for group in groups(documents, GROUP):
        shard.add(group)
        on_group(documents.position["bytes"], manifest["tokens"] + shard.tokens)
        if shard.tokens >= shard_tokens:
            shard.write(documents.position)
    if shard.tokens:
        shard.write(documents.position)
    return _finish(out, manifest, _cut(out, manifest), shards[-1]["position"]["bytes"])


def longest_window(manifest: dict[str, Any]) -> int:
    """The longest sequence that finished shards can be trained and tested on; below 1 there is none."""
    trained = manifest["train_tokens"]
    return min(trained, manifest["tokens"] - trained) - 1


def kept(out: Path) -> tuple[int, int]:
    """Shards and tokens that `tokenise` would go on after: of a text that it would begin anew, none."""
    if not (out / MANIFEST).is_file():
        return 0, 0
    manifest = _manifest(out)
    begun_anew = manifest["short"] and not manifest["complete"]
    return (0, 0) if begun_anew else (len(manifest["shards"]), manifest["tokens"])


def open_shards(folder: Path) -> tuple[ShardedTokens, Tokenizer, dict[str, Any]]:
    """All tokens, the tokenizer and the manifest of a folder.

    Sizes are compared with the manifest, and of up to two gigabytes the SHA-256 too.

    Raises:
        ValueError: the folder is unfinished or damaged; the message names the file and the remedy.
    """
    manifest = _manifest(folder)
    if not manifest["complete"]:
        raise ValueError(f"{folder} is not finished; run the same tokenise command again, it goes on")
    checksums = sum(shard["bytes"] for shard in manifest["shards"]) <= CHECKED
    for entry in [*manifest["tokenizer"]["files"], *manifest["shards"], *(s["index"] for s in manifest["shards"])]:
        if reason := _damage(folder, entry, checksums=checksums):
            raise ValueError(f"{folder / entry['file']} {reason}; run the same tokenise command again, it is repaired")
    maps = [np.memmap(folder / s["file"], dtype=manifest["dtype"], mode="r") for s in manifest["shards"]]
    return ShardedTokens(maps), read_tokenizer(folder), manifest


# --- writing --------------------------------------------------------------------------------------------------------


class _Shard:
    """The shard that is being filled."""

    def __init__(self, out: Path, tokenizer: Tokenizer, manifest: dict[str, Any]) -> None:
        self.out, self.tokenizer, self.manifest = out, tokenizer, manifest
        self._clear()

    def _clear(self) -> None:
        self.tokens = 0
        self._ids: list[NDArray[np.int32]] = []
        self._lengths: list[tuple[int, int]] = []

    def add(self, documents: Sequence[str], *, ends: bool = True) -> None:
        """Documents, the last of them without its end if `ends` is false."""
        end = np.array([self.tokenizer.end_id], np.int32)
        for n, (document, ids) in enumerate(zip(documents, self.tokenizer.encode(documents), strict=True), start=1):
            ids = np.concatenate([ids, end]) if ends or n < len(documents) else ids
            self._ids.append(ids)
            self._lengths.append((len(ids), len(document)))
            self.tokens += len(ids)

    def write(self, position: dict[str, Any] | None) -> None:
        """Write it and the manifest; `position` is where its text ends, None if it cannot be gone on from."""
        name = f"{len(self.manifest['shards']):05d}"
        index = np.cumsum(np.array(self._lengths, np.int64), axis=0)
        entry = _write(self.out, f"{name}.bin", np.concatenate(self._ids).astype(self.manifest["dtype"]).tobytes())
        stream = io.BytesIO()
        np.save(stream, index)
        entry |= {"tokens": self.tokens, "documents": len(index), "characters": int(index[-1, 1])}
        entry |= {"index": _write(self.out, f"{name}.documents.npy", stream.getvalue()), "position": position}
        self.manifest["shards"].append(entry)
        for count in ("tokens", "documents", "characters"):
            self.manifest[count] += entry[count]
        write_json(self.out / MANIFEST, self.manifest)
        self._clear()


def _head(documents: Documents) -> tuple[list[str], bool]:
    """The first documents, and whether they are all."""
    head: list[str] = []
    characters = 0
    for document in documents:
        head.append(document)
        characters += len(document)
        if characters >= SHORT:
            return head, False
    return head, True


def _tokenise_short(documents: Documents, head: list[str], out: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """A text that is read again rather than gone on with, split as in memory."""
    train, heldout, is_whole = split(head)
    made = make_tokenizer(recipe["tokenizer"], train, recipe["vocab_size"])
    first = made.encode(train[:2])
    tokens = sum(map(len, first)) + len(first) - (not is_whole)
    if tokens < SMALLEST:
        raise ValueError(
            f"{documents.spec} has {counted(tokens, 'token')} to train on and no next one to predict; use a longer text"
        )
    manifest = _begin(out, recipe, made, documents.name, is_short=True)
    shard = _Shard(out, made, manifest)
    cut = 0
    for part, ends in ((train, is_whole), (heldout, True)):
        for n, document in enumerate(part, start=1):
            shard.add([document], ends=ends or n < len(part))
            if shard.tokens >= recipe["shard_tokens"]:
                shard.write(None)
        cut = cut if part is heldout else manifest["tokens"] + shard.tokens
    if shard.tokens:
        shard.write(None)
    manifest["documents"] = len(head)  # one may lie in two parts
    return _finish(out, manifest, cut, documents.position["bytes"])


def _begin(out: Path, recipe: dict[str, Any], tokenizer: Tokenizer, name: str, *, is_short: bool) -> dict[str, Any]:
    tokenizer.save(out)
    end = {"token": tokenizer.end_of_document, "id": tokenizer.end_id}
    files = [_entry(file, (out / file).read_bytes()) for file in (FILE, CONFIG)]
    manifest = {
        "format": FORMAT, "complete": False, "short": is_short, "recipe": recipe, "name": name,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "end_of_document": end, "files": files},
        "dtype": "<u2" if tokenizer.vocab_size <= 2**16 else "<u4",
        "tokens": 0, "documents": 0, "characters": 0, "shards": [],
    }  # fmt: skip
    write_json(out / MANIFEST, manifest)
    return manifest


def _finish(out: Path, manifest: dict[str, Any], cut: int, size: int) -> dict[str, Any]:
    what = [manifest["dtype"], manifest["tokenizer"], [shard["sha256"] for shard in manifest["shards"]], cut]
    for shard in manifest["shards"]:
        if shard["position"] is not None:
            # A stream's own state also says how it was come by; rows alone are the same after a kill.
            shard["position"]["stream"] = None
    manifest |= {
        "complete": True, "train_tokens": cut, "bytes": size,
        "description": describe(manifest["name"], manifest["documents"], size),
        "digest": hashlib.sha256(json.dumps(what).encode()).hexdigest(),
    }  # fmt: skip
    write_json(out / MANIFEST, manifest)
    names = {entry["file"] for shard in manifest["shards"] for entry in (shard, shard["index"])}
    for path in chain.from_iterable(out.glob(each) for each in OURS):
        if path.name not in names:  # of a killed writer, or of an earlier tokenising that made more
            path.unlink(missing_ok=True)
    return manifest


def _cut(out: Path, manifest: dict[str, Any]) -> int:
    """Tokens of the training part."""
    low, target, high = cut_range(manifest["characters"])
    near: list[NDArray[np.int64]] = [np.zeros((1, 2), np.int64)]
    start = np.zeros(2, np.int64)
    for shard in manifest["shards"]:
        after = start + np.array([shard["tokens"], shard["characters"]])
        if after[1] >= low and start[1] <= high:
            near.append(start + np.load(out / shard["index"]["file"]))
        start = after
    tokens, characters = np.concatenate(near).T
    count = boundary(characters, manifest["characters"])
    return int(np.interp(target, characters, tokens)) if count is None else int(tokens[count - 1])


# --- files ----------------------------------------------------------------------------------------------------------


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        found = manifest["format"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged; delete {folder} and tokenise again") from error
    if found != FORMAT:
        raise ValueError(f"{path} is of format {found} and not {FORMAT}; delete {folder} and tokenise again")
    return manifest


def _whole_part(out: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of an earlier tokenising, down to the shards before the first damaged one; None to begin."""
    if not (out / MANIFEST).exists():
        # A kill can leave the tokenizer alone.
        if out.is_dir() and any(path.name not in (FILE, CONFIG) and path.name[0] != "." for path in out.iterdir()):
            raise ValueError(f"{out} holds other files; use an empty folder for --out, or a new one")
        return None
    manifest = _manifest(out)
    if manifest["recipe"] != json.loads(json.dumps(recipe)):
        raise ValueError(
            f"{out} holds shards of another text, tokenizer, vocabulary or limit, or its text has changed; use another "
            "--out, or delete it"
        )
    for entry in manifest["tokenizer"]["files"]:
        if reason := _damage(out, entry):
            print(f"{out / entry['file']} {reason}; everything is tokenised again", file=sys.stderr)
            return None
    for n, shard in enumerate(manifest["shards"]):
        for entry in (shard, shard["index"]):
            if reason := _damage(out, entry):
                print(f"{out / entry['file']} {reason}; it is made again, and all behind it", file=sys.stderr)
                return _cut_back(manifest, n)
    return manifest if manifest["complete"] or not manifest["short"] else None


def _cut_back(manifest: dict[str, Any], shards: int) -> dict[str, Any] | None:
    if manifest["short"]:
        return None
    manifest |= {"complete": False, "shards": manifest["shards"][:shards]}
    for count in ("tokens", "documents", "characters"):
        manifest[count] = sum(shard[count] for shard in manifest["shards"])
    for name in ("train_tokens", "bytes", "description", "digest"):
        manifest.pop(name, None)
    return manifest


def _write(out: Path, name: str, content: bytes) -> dict[str, Any]:
    write_bytes(out / name, content)
    return _entry(name, content)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _damage(folder: Path, entry: dict[str, Any], *, checksums: bool = True) -> str | None:
    """What is wrong with a file, in a few words."""
    path = folder / entry["file"]
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"is damaged (it has {counted(size, 'byte')} and not {entry['bytes']})"
    if checksums:
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != entry["sha256"]:
                return "is damaged (it has another SHA-256)"
    return None
