"""Where a file is written: whole, through links, and into what is no file; and that a record is what was written."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from theory.records import SCHEMA, read_record, read_records, write_bytes, write_record

BODY: dict[str, Any] = {
    "id": "caf\u00e9",
    "series": {"loss": [5.5403, 0.1 + 0.2, 1e-17, -0.0, float("nan")], "steps": (1, 2**60)},
    "rows": [{"b": None, "a": True, 3: np.float32(0.1)}],
}
READ = {
    "schema": SCHEMA,
    "kind": "training",
    "id": "caf\u00e9",
    "series": {"loss": [5.5403, 0.1 + 0.2, 1e-17, -0.0, None], "steps": [1, 2**60]},
    "rows": [{"b": None, "a": True, "3": float(np.float32(0.1))}],
}


def test_a_record_is_what_was_written(tmp_path: Path) -> None:
    """However it is laid out, and if what was read is written again."""
    path = tmp_path / "a.json"
    write_record(path, kind="training", body=BODY)
    content = path.read_bytes()
    assert read_record(path) == READ
    path.write_text(json.dumps(json.loads(content), indent=2, sort_keys=True))
    assert read_record(path) == READ
    write_record(path, kind="training", body=READ)
    assert path.read_bytes() == content
    assert read_records(tmp_path) == [READ]


@pytest.mark.parametrize(
    ("kept", "changed"),
    [
        ("5.5403", "5.5402"), ("0.30000000000000004", "0.3000000000000001"),
        ("1152921504606846976", "1152921504606846977"),
        ("true", "false"), ('"b"', '"c"'), ('"kind":"training"', '"kind":"trainine"'), ("null],", "0],"),
    ],
)  # fmt: skip
def test_a_record_with_a_changed_character_is_damaged(tmp_path: Path, kept: str, changed: str) -> None:
    path = tmp_path / "a.json"
    write_record(path, kind="training", body=BODY)
    whole = path.read_text()
    assert whole.count(kept) == 1
    path.write_text(whole.replace(kept, changed))
    json.loads(path.read_text())  # it still is JSON
    assert read_record(path) is None
    assert read_records(tmp_path) == []
    path.write_text(whole)
    assert read_record(path) == READ


def test_an_older_record_has_no_digest_and_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(READ))
    assert read_record(path) == READ
    path.write_text(json.dumps(READ | {"sha256": None}))  # a writer that made it null is taken for one of those
    assert read_record(path) == READ
    path.write_text(json.dumps(READ | {"shb256": "0" * 64}))  # its name is damaged, and it would be of no use
    assert read_record(path) is None
    for other in ("", 0, [], "0" * 64):
        path.write_text(json.dumps(READ | {"sha256": other}))
        assert read_record(path) is None


def test_a_link_goes_on_naming_its_target(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_bytes(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_bytes(pipe, b"content")
    reader.join(timeout=10)
    assert read == [b"content"]
    assert pipe.is_fifo()


def test_a_device_stays_one() -> None:
    write_bytes(Path(os.devnull), b"content")
    assert Path(os.devnull).is_char_device()
