"""Texts to tokenise into shards, and what is then in their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from empirics import shards, tokenizer
from empirics.data import tokenise


class Killed(BaseException):
    """No `except Exception` sees it, as none sees a SIGKILL."""


def read_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of 5000 characters is a long one, read a few documents at a time."""
    monkeypatch.setattr(tokenizer, "TRAINED_ON", 4500)
    monkeypatch.setattr(shards, "SHORT", 5000)
    monkeypatch.setattr(shards, "GROUP", 700)


def write_documents(folder: Path) -> Path:
    """Eighty documents of some 150 characters, with blank ones between."""
    path = folder / "words.jsonl"
    texts = [f"document {n}: {n * n % 97} and {n % 7} caf\u00e9s \u4e2d\n" * 5 for n in range(80)]
    path.write_text("".join(json.dumps({"text": text}) + '\n{"text": " "}\n' for text in texts), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make(text: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return tokenise(str(text), out, **({"tokenizer": "bytes", "shard_tokens": 2000} | changes))
