"""Folders whose files are checked before use: size and SHA-256 of each, in a manifest that is written last."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from theory.words import counted

MANIFEST = "manifest.json"
Seals = Mapping[str, tuple[int, str]]  # size and SHA-256 by the name of the file


def seal(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest, once its bytes are on the disk."""
    flush(path)
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def flush(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before what comes next."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(folder: Path) -> tuple[Mapping[str, Any], Seals]:
    """All that the manifest of a folder says, and the files that it seals.

    Raises:
        ValueError: it is missing or damaged, in a few words.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = manifest["files"]
        return manifest, {file: (files[file]["bytes"], files[file]["sha256"]) for file in files}
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"{MANIFEST} cannot be read") from None


def broken(folder: Path, seals: Seals) -> str:
    """Which file is not the one that was sealed, in a few words; empty if all of them are."""
    return next(filter(None, (_difference(folder / file, *seals[file]) for file in sorted(seals))), "")


def _difference(path: Path, size: int, digest: str) -> str:
    try:
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != size:
            return f"{path.name} has {counted(path.stat().st_size, 'byte')} and not {size}"
        return "" if _digest(path) == digest else f"{path.name} has another SHA-256"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
