"""`spikecheck check` as a test calls it, and a file to call it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from theory.__main__ import main

STATUS: dict[str, int] = {"stable": 0, "at risk": 1, "unstable": 1, "unknown": 3}


def checked(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    """Status and answer of `spikecheck check ... --json`; NaN and Infinity, which are not JSON, fail."""
    status = main(["check", *argv, "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    return status, json.loads(out, parse_constant=pytest.fail)


def llama(path: Path, std: float, **keys: Any) -> str:
    config = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 256, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 4, "intermediate_size": 512, "initializer_range": std} | keys
    path.write_text(json.dumps(config))
    return str(path)
