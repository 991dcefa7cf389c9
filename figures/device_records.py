"""The record of a device check: written from the records of its two sides, and found again for a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from figures.devices import compare
from figures.selection import Record, Records
from theory.records import fingerprint, plain, read_record, read_records, slug, write_record

KIND = "device-check"


def check_path(out: Path, device: str) -> Path:
    """Where the check of a device is written."""
    return out / "records" / f"{KIND}-{slug(device)}.json"


def write_check(out: Path, records: Records, *, device: str, missing: Sequence[str]) -> None:
    """Hold the two sides against each other, and write the rows down.

    The date is that of the rows: the same rows are not written again.

    Args:
        missing: steps of the check that have not been run.
    """
    device_side = [record for record in records if _asked_for(record) == device and "environment" in record]
    body = {
        "environment": device_side[-1]["environment"] if device_side else {"device": device},
        "gpu": not device.startswith("cpu"),
        "missing": list(missing),
        "rows": plain(compare(records)),
    }
    identity, path = fingerprint(body), check_path(out, device)
    if (read_record(path) or {}).get("id") != identity:
        today = datetime.now(UTC).date().isoformat()
        write_record(path, kind=KIND, body={"id": identity, "date": today, **body})


def read_check(path: Path) -> Record:
    """The check in a file.

    Raises:
        ValueError: there is none.
    """
    record = read_record(path)
    if record is None or record["kind"] != KIND:
        raise ValueError(f"{path} is no record of a device check; --scale gpu-smoke writes one into its records")
    return record


def latest_check(folders: Iterable[Path]) -> Record | None:
    """The latest of the checks on a GPU, or the latest of all if none was on one; None if there is none."""
    found = [record for folder in folders for record in read_records(folder) if record["kind"] == KIND]
    return max(found, key=lambda record: (record["gpu"], record["date"]), default=None)


def _asked_for(record: Record) -> str | None:
    return record.get("spec", {}).get("device")
