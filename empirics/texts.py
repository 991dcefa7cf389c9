"""Texts as documents in a fixed order: sympy's sources, files, folders and globs of files, streams of the Hub.

A document is held whole; a text is not, unless `load_text` is asked for all of it. Nothing here needs torch.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from empirics.hub import hub
from theory.words import counted

HELDOUT = 0.05  # share of the characters, at the end of the text,
HELDOUT_CHARACTERS = 10_000_000  # and at most so many: more would say nothing more precisely.
DEFAULT_BYTES = 6_000_000  # taken of `sympy` and of a stream; a file is read whole unless a limit is given.
# Generated tables of numbers and parser states, which are not prose; and tests, which an install may leave out.
LEFT_OUT = {"tests", "benchmarks", "_antlr", "test-examples"}
DEFAULT_CONFIGS = {"allenai/c4": "en"}  # data sets whose configuration has to be named.
LINES = {".jsonl", ".json"}  # JSON lines, as C4's files are; each may end in .gz.
KNOWN = (".txt", *sorted(LINES), ".parquet")  # what is read of a folder
WHOLE_FILES = "whole files"
SPECS = "use sympy, hf:NAME[:CONFIG[:SPLIT]], or the path of .txt, .jsonl or .parquet files, a folder or a glob of them"


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


def load_text(spec: str = "sympy", *, limit: int | None = None) -> TextSource:
    """Documents named by `spec`, cut to at most `limit` bytes of UTF-8.

    Args:
        spec: as in `Documents`.
        limit: bytes; None means 6 MB of `sympy` or a stream, and the whole of files.

    Raises:
        ValueError: there is no such text, it is empty, or it is not in the format that its name says.
    """
    if limit is None and (spec == "sympy" or spec.startswith("hf:")):
        limit = DEFAULT_BYTES
    found = Documents(spec, limit=limit)
    documents = tuple(found)
    digest, size = hashlib.sha256(), 0
    for document in documents:
        encoded = document.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
        size += len(encoded)
    return TextSource(
        documents=documents, description=describe(found.name, len(documents), size), digest=digest.hexdigest()
    )


def describe(name: str, documents: int, size: int) -> str:
    """A text in a few words.

    >>> describe("a.txt", 1, 1_500_000)
    'a.txt, 1 document, 1.5 MB'
    """
    return f"{name}, {counted(documents, 'document')}, {size / 1e6:.3g} MB"


class Documents:
    """The documents of a text, one at a time, to be iterated over once.

    Those that are blank are left out; the last is cut where `limit` bytes of UTF-8 end, between two characters. Half of
    a surrogate pair, which JSON can spell and UTF-8 cannot, becomes a question mark.

    Args:
        spec: one of
            `sympy`: the installed package's `*.py`, ordered by the sha256 of their relative path, so that a prefix
                of any length, and the end that is held out, are fair samples of the whole package;
            a path: `.jsonl` or `.json` (an object with the key `text` a line), either with `.gz`; `.parquet` (column
                `text`); any other file is one document of UTF-8;
            a folder: every .txt, .jsonl, .json, .gz of these, and .parquet file in it and below, in the order of
                their paths; a glob: every file that it names, in that order;
            `hf:NAME[:CONFIG[:SPLIT]]`: a data set on the Hugging Face Hub, or in a local folder, streamed; the split
                is `train` unless it is named. Only data is read: no code of the data set runs.
        limit: bytes of UTF-8; all if None.
        position: where an earlier reading stopped, as `position` told it.

    Raises:
        ValueError: there is no such text, it is empty, or it is not in the format that its name says.
    """

    def __init__(self, spec: str, *, limit: int | None = None, position: dict[str, Any] | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit} bytes is no text; use a positive number, for example {DEFAULT_BYTES}")
        self.spec, self.limit = spec, limit
        self._rows, self._bytes = (0, 0) if position is None else (position["rows"], position["bytes"])
        self._hub_state: Any = None if position is None else position["stream"]
        self._stream: Any = None
        self.files: list[Path] = []
        if spec == "sympy":
            self.name = f"sympy {importlib.metadata.version('sympy')}"
        elif spec.startswith("hf:"):
            self.name = spec
        else:
            self.files, self.name = _files(spec), Path(spec).name

    @property
    def formats(self) -> tuple[str, ...]:
        """What its documents are, in words: a row each, or a file each."""
        if self.spec.startswith("hf:"):
            return ("rows of a data set",)
        return tuple(sorted({_format(file) for file in self.files})) or (WHOLE_FILES,)

    @property
    def position(self) -> dict[str, Any]:
        """Where to go on after the last document, as JSON: rows and bytes taken, and the stream's own state."""
        stream = self._stream.state_dict() if hasattr(self._stream, "state_dict") else None
        return {"rows": self._rows, "bytes": self._bytes, "stream": stream}

    @property
    def identity(self) -> list[Any]:
        """What tells one text from another without reading it: the spec, and versions or names and sizes of files."""
        return [self.spec, self.name, [[path.as_posix(), path.stat().st_size] for path in self.files]]

    def __iter__(self) -> Iterator[str]:
        empty = self._bytes == 0
        for row in self._from_position():
            self._rows += 1
            if not row.strip():
                continue
            encoded = row.encode("utf-8", "replace")
            if self.limit is not None:
                encoded = encoded[: self.limit - self._bytes]
            self._bytes += len(encoded)
            if text := encoded.decode("utf-8", "ignore"):
                empty = False
                yield text
            if self.limit is not None and self._bytes >= self.limit:
                break
        if empty:
            raise ValueError(f"{self.spec} holds no text; use a text that is not empty, for example sympy")

    def _from_position(self) -> Iterator[str]:
        if self.limit is not None and self._bytes >= self.limit:
            return
        if self.spec.startswith("hf:"):
            self._stream = _hub_stream(self.spec)
            if self._hub_state is not None:
                self._stream.load_state_dict(self._hub_state)
                yield from _hub_rows(self.spec, self._stream)
                return
            rows = _hub_rows(self.spec, self._stream)
        else:
            rows = rows_of(self.spec)
        for n, row in enumerate(rows, start=-self._rows):
            if n >= 0:
                yield row


def rows_of(spec: str) -> Iterator[str]:
    """Every row of a text as it is, blank ones too: a line of JSON, a row of a table, a file that is neither.

    Raises:
        ValueError: as `Documents`, but for an empty text.
    """
    if spec == "sympy":
        return _sympy_files()
    if spec.startswith("hf:"):
        return _hub_rows(spec, _hub_stream(spec))
    return (row for path in _files(spec) for row in _file_rows(path))


def groups(documents: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Runs of whole documents that hold at least so many characters, but for the last."""
    group: list[str] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def split(documents: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """Training and held-out documents, and whether the last training one is whole.

    Cut at the document boundary of `boundary`; where none is near, at a line in a document.
    """
    ends = np.cumsum([len(document) for document in documents])
    if (count := boundary(ends, int(ends[-1]))) is not None:
        return list(documents[:count]), list(documents[count:]), True
    low, target, _ = cut_range(int(ends[-1]))
    n = min(int(np.searchsorted(ends, target, side="right")), len(documents) - 1)
    start, document = int(ends[n]) - len(documents[n]), documents[n]
    cut = document.rfind("\n", max(0, round(low) - start), round(target) - start) + 1 or round(target) - start
    after = [document[cut:]] if document[cut:] else []
    return [*documents[:n], document[:cut]], [*after, *documents[n + 1 :]], False


def boundary(ends: NDArray[np.int64], total: int) -> int | None:
    """How many documents of those that end at these characters are trained on; None if no end is near the cut.

    The share that is held out is 5 % of the characters and at most ten million; a document's end is near if it makes
    that half to twice as much.
    """
    low, target, high = cut_range(total)
    nearest = int(np.abs(ends - target).argmin())
    return nearest + 1 if low <= ends[nearest] <= high else None


def cut_range(total: int) -> tuple[float, float, float]:
    """Of a text of so many characters: the least, the wanted and the most that the training part has."""
    heldout = min(HELDOUT * total, HELDOUT_CHARACTERS)
    return total - 2 * heldout, total - heldout, total - heldout / 2


def _sympy_files() -> Iterator[str]:
    spec = importlib.util.find_spec("sympy")
    if spec is None or spec.origin is None:
        raise ValueError("sympy, the default text, is not installed; pip install sympy or name a text file")
    root = Path(spec.origin).parent
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = [name.as_posix() for name in names if not LEFT_OUT.intersection(name.parts)]
    for name in sorted(kept, key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield (root / name).read_bytes().decode()


def _files(spec: str) -> list[Path]:
    path = Path(spec).expanduser()
    if (path / "manifest.json").is_file():
        raise ValueError(f"{spec} holds tokens and not a text; name the text that they were made of")
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and _suffix(file) in KNOWN]
        if not found:
            raise ValueError(f"no file of {spec} ends in {', '.join(KNOWN)}; name a glob, for example '{spec}/**/*.md'")
    elif path.exists():
        found = [path]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
        if not found:
            raise ValueError(f"there is no text {spec!r}; {SPECS}")
    return sorted(found, key=lambda file: file.as_posix())


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _format(path: Path) -> str:
    suffix = _suffix(path)
    return "lines of JSON" if suffix in LINES else "rows of parquet" if suffix == ".parquet" else WHOLE_FILES


def _file_rows(path: Path) -> Iterator[str]:
    suffix = _suffix(path)
    try:
        if suffix == ".parquet":
            yield from _parquet(path)
        elif suffix in LINES:
            yield from _jsonl(path)
        else:
            content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
            yield content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; convert it, for example with iconv -t UTF-8") from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file; fetch or write it again") from error
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror or error}); name a readable text file") from error


def _jsonl(path: Path) -> Iterator[str]:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig") as lines:
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


def _hub_stream(spec: str) -> Any:
    name, *rest = spec.removeprefix("hf:").split(":")
    config, split = (*rest, "", "")[:2]
    if not name or len(rest) > 2:
        raise ValueError(f"{spec!r} names no data set; use hf:NAME[:CONFIG[:SPLIT]], for example hf:allenai/c4:en")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{spec} needs the datasets library; pip install 'spikecheck[hf]', or use sympy") from error
    try:
        config = config or DEFAULT_CONFIGS.get(name)
        with nullcontext() if Path(name).is_dir() else hub():
            return datasets.load_dataset(name, config, split=split or "train", streaming=True)
    except Exception as error:  # The library raises the errors of several network clients.
        raise _unreachable(spec, error) from error


def _hub_rows(spec: str, stream: Iterable[Any]) -> Iterator[str]:
    try:
        for row in stream:
            yield row["text"]
    except KeyError as error:
        raise ValueError(f'{spec} has no column "text"; use a data set that has one, or a .jsonl file') from error
    except Exception as error:
        raise _unreachable(spec, error) from error


def _unreachable(spec: str, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ValueError(f"cannot stream {spec} ({reason}); check its name and the network, or use sympy")
