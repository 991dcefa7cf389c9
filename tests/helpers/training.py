"""A training of a few milliseconds a step, on a text that has something to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from empirics.run import checkpoints_of, corpus_of, record_path
from empirics.run_spec import RunSpec
from empirics.train import train
from helpers.weights import architecture


def write_text(folder: Path) -> Path:
    """Thirty thousand characters."""
    path = folder / "text.txt"
    path.write_text("".join(f"{n} plus {n % 7} is {n + n % 7}\n" for n in range(1500)))
    return path


def specification(text: Path, **changes: Any) -> RunSpec:
    """Nine steps of the small architecture; `architecture` may give what differs in it."""
    sizes: dict[str, Any] = {
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 2,
        "d_head": 8,
        "d_ffn": 32,
        "vocab_size": 258,
        "context": 32,
        "positions": "rope",
    }
    if isinstance(changes.get("architecture"), dict):
        changes = changes | {"architecture": architecture(**sizes | changes["architecture"])}
    fields: dict[str, Any] = {
        "architecture": architecture(**sizes),
        "label": "Vanilla",
        "experiment": "test",
        "seed": 0,
        "steps": 9,
        "batch_size": 2,
        "seq_len": 16,
        "learning_rate": 3e-3,
        "warmup": 2,
        "schedule": "cosine",
        "data": str(text),
        "tokenizer": "bytes",
        "probe_every": 3,
    }  # fmt: skip
    return RunSpec(**(fields | changes))


def record_bytes(spec: RunSpec, out: Path) -> bytes:
    return record_path(spec, out).read_bytes()


class Interrupted(Exception):
    pass


def train_until(spec: RunSpec, out: Path, last: int, *, every: int = 1) -> Path:
    """Start a run and break it off after step `last`; returns the folder of its checkpoints."""
    checkpoints = checkpoints_of(spec, out)

    def stop(step: int, values: object) -> None:
        if step == last:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(spec, corpus_of(spec, out), checkpoints=checkpoints, checkpoint_every=every, on_step=stop)
    return checkpoints.folder


def files(folder: Path) -> dict[str, bytes]:
    """Everything that a run leaves, by its name; the tokenised text aside."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("data")}


def cut(path: Path) -> None:
    """Half of a file is lost."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit of a file is another; of its last byte, which is contents in every format here."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
