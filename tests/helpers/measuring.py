"""The `measure` command in this process, a small Llama to give it, and no network."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from empirics.__main__ import main

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 300, "max_position_embeddings": 64,
}  # fmt: skip
QUICK = ["--seeds", "1", "--batch", "2", "--seq-len", "12"]


def measure(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Status and answer of the command."""
    status = main(["measure", *argv, "--json"])
    return status, json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def write(path: Path, config: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    return str(path)


def forbid_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reaches for a network fails."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a network was reached for")

    monkeypatch.setattr(socket.socket, "connect", never)
