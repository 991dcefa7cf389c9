"""Results on disk: what was predicted and what was measured, with everything needed to trust it.

A record is one JSON file. It carries its schema version, the full specification it came from, the versions
of the libraries, the digest of the data, and lists of `Prediction`s and `Measurement`s. Last is the SHA-256 of all of
that, which is checked when it is read; the oldest records have none. It holds no clock time, so an interrupted and
resumed run writes the same bytes as an undisturbed one.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from theory.architecture import Architecture, Init

SCHEMA = 1
DIGEST = "sha256"  # of a record's other entries, by their values: how they are written down does not matter
HEX = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What theory says of one quantity; from the configuration alone.

    Attributes:
        kind: estimate, upper or sharp.
        statement: which statement or recursion it is from, with `source`.
        values: over the quantity's axis.
        in_domain, reasons: whether the statement's assumptions hold here, and which do not.
    """

    quantity: str
    kind: str
    statement: str
    source: str
    values: tuple[float, ...]
    in_domain: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What was observed of one quantity.

    Attributes:
        values: over the quantity's axis.
        seeds: what was averaged over; `log_sd` is the standard deviation of the log over them, where known.
        lower_estimate: an iterative norm, which can only be too small.
    """

    quantity: str
    values: tuple[float, ...]
    seeds: tuple[int, ...]
    log_sd: tuple[float, ...] | None
    lower_estimate: bool


def plain(value: Any) -> Any:
    """JSON-ready form: dataclasses and tuples opened, non-finite numbers as null (JSON has none)."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return plain(value.item()) if isinstance(value, np.generic) else value


def fingerprint(value: Any) -> str:
    """Twelve hexadecimal digits that identify a specification."""
    return _sha256(plain(value))[:12]


def _sha256(value: Any) -> str:
    """Of what is JSON-ready; equal for equal values, and unchanged by writing and reading them."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def slug(text: str) -> str:
    """A label as part of a file name: lower case, nothing that could name another folder.

    >>> slug("Xavier + Scaled Embed"), slug("../a/config.json")
    ('xavier-scaled-embed', 'a-config.json')
    """
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def architecture_from(data: Mapping[str, Any]) -> Architecture:
    """The `Architecture` that `plain` wrote."""
    fields = dict(data)
    fields["init"] = Init(**fields["init"])
    return Architecture(**fields)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; a link goes on naming its target, and a device or pipe is written to.

    Raises:
        ValueError: the folder cannot be written; the message names the remedy.
    """
    try:
        if path.is_relative_to("/dev") or (path.exists() and not path.is_file() and not path.is_dir()):
            path.write_bytes(content)
            return
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)  # it is gone where a signal comes right after the replacement
            raise
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; choose a writable folder with --out") from None


def remove_unfinished(path: Path) -> None:
    """Remove what writers of a file or folder that were killed have left beside it; nobody may be writing it now."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with suppress(OSError):
                left.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    text = json.dumps(plain(value), indent=None, separators=(",", ":"), allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


def write_record(path: Path, *, kind: str, body: Mapping[str, Any]) -> None:
    """Write one record, with its digest."""
    record = plain({"schema": SCHEMA, "kind": kind, **body})
    write_json(path, record | {DIGEST: _sha256(record)})


def read_record(path: Path) -> dict[str, Any] | None:
    """A record without its digest; None where there is none or it is damaged (then it has to be made again)."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        return None
    digest = record.pop(DIGEST, None)
    if digest is None:  # of an older version, unless its digest goes by a damaged name
        return None if any(isinstance(value, str) and HEX.fullmatch(value) for value in record.values()) else record
    return record if digest == _sha256(record) else None


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Every whole record of a folder, in the order of their names."""
    records = (read_record(path) for path in sorted(folder.glob("*.json")))
    return [record for record in records if record is not None]
