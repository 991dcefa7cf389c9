"""Logs of a training: read from what `train` writes, a record or a CSV, and told by every definition of a spike."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from empirics.spike_definitions import DEFINITIONS, Definition, Series, finite
from empirics.spikes import RULE, Outcome, events, pair, series_of
from theory.records import read_record
from theory.sources import REFERENCES
from theory.words import counted

SHOWN = 12  # events printed a line; JSON has them all
# What decides a run's batches beside the tokens themselves, by the words for it.
DECIDES = {"seed": "seed", "sequences a batch": "batch_size", "tokens a sequence": "seq_len", "order": "order"}
# What decides the tokens; the same tokens may come from another copy of a text.
TOKENS = {"text": "data", "tokenizer": "tokenizer", "bytes of text": "data_bytes"}
LOSSES = "losses.jsonl"  # of a run's folder
RECORDED, ON_TRUST = "recorded", "on trust"


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """One number an entry.

    Attributes:
        steps: shape (entries,), increasing; the entries' numbers where the file names no step.
        values: shape (entries,); what is not finite is a divergence.
        record: of the run that it is the log of, where there is one.
        unfinished: whether the run goes on from here, so that what has not come back is undecided.
    """

    path: Path
    column: str
    steps: NDArray[np.int64]
    values: Series
    record: Mapping[str, Any] | None = None
    unfinished: bool = False

    @property
    def diverged_at(self) -> int | None:
        """Step of the first value that is not finite, or where its record says that the run diverged."""
        whole = finite(self.values).size
        return int(self.steps[whole]) if whole < self.values.size else _diverged_at(self.record)

    @property
    def ended(self) -> Series:
        """The values, and one that is not finite after a finite loss whose gradient was not."""
        whole = finite(self.values).size == self.values.size
        return np.append(self.values, np.nan) if whole and self.diverged_at is not None else self.values


def read_log(path: Path, column: str) -> Log:
    """A run's folder, losses.jsonl (or other lines of JSON), a training record, or a CSV with a header.

    An unfinished run is read from its newest whole checkpoint. A record is read once.

    Raises:
        ValueError: it cannot be read, or has no such numbers; the message names the remedy.
    """
    try:
        if not path.exists():
            raise ValueError(f"{path} does not exist; name a run's folder or its losses.jsonl")
        if path.is_dir():
            return _of_folder(path, column)
        if path.suffix == ".json":
            return _of_record(path, column, _whole_record(path))
        if path.suffix not in (".jsonl", ".csv"):
            raise ValueError(f"{path} is not a log; use a run's folder, or a file named .jsonl, .json or .csv")
        return _of_lines(path, column, _trainings(path.parent) if path.name == LOSSES else {})
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; name a run's folder or its losses.jsonl") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not text that can be read: {error}; save it as UTF-8") from None


def read_beside(path: Path, log: Log, column: str) -> Log:
    """Another number of what `path` is the log of: from its record where it has one, which is not read again.

    Raises:
        ValueError: as `read_log`.
    """
    return read_log(path, column) if log.record is None else _of_record(log.path, column, log.record)


def _of_folder(folder: Path, column: str) -> Log:
    """The file of a run's folder that has the column, or the checkpoint of one that is not finished."""
    trainings, losses = _trainings(folder), folder / LOSSES
    if losses.is_file():
        if column == "loss":
            return _of_lines(losses, column, trainings)
    elif not trainings and (begun := _begun(folder, column)) is not None:
        return begun
    if len(trainings) != 1:
        remedy = "name one of them" if trainings else "finish the run (train again goes on), or name a file with losses"
        kept = "" if trainings else " and no checkpoint of one run alone"
        raise ValueError(f"{folder} has {len(trainings)} training records{kept}; {remedy}")
    ((path, record),) = trainings.items()
    return _of_record(path, column, record)


def _of_lines(path: Path, column: str, beside: Mapping[Path, Mapping[str, Any]]) -> Log:
    """A file of lines; `beside` are the training records of its folder, of which the only one is the run's."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines) if path.suffix == ".csv" else _objects(lines, path)
        values, steps = _columns(rows, path, column)
    return _log(path, column, values, steps, record=next(iter(beside.values())) if len(beside) == 1 else None)


def _columns(rows: Iterable[Mapping[str, Any]], path: Path, column: str) -> tuple[list[float], list[float]]:
    """Values and steps, row by row: a long log is never held as rows."""
    values: list[float] = []
    steps: list[float] = []
    numbered = False
    for n, row in enumerate(rows):
        if n == 0:
            numbered = "step" in row
            if column not in row:
                raise ValueError(f"{path} has no {column!r}; choose with --column from {', '.join(map(str, row))}")
        value, step = row.get(column), row.get("step") if numbered else n
        try:
            values.append(_number(value))
            steps.append(_number(step))
        except (TypeError, ValueError, OverflowError):
            raise ValueError(
                f"entry {n + 1} of {path} has {value!r} for {column} and {step!r} for step, which are not numbers; "
                "drop the entry, or write nan where the run diverged"
            ) from None
    return values, steps


def _begun(folder: Path, column: str) -> Log | None:
    """What the newest whole checkpoint has of the only run of a folder."""
    runs = sorted((folder / "checkpoints").glob("*/"))
    if len(runs) != 1:
        return None
    from empirics.checkpoints import SERIES, Checkpoints, step_name  # torch, which no other log needs

    kept = Checkpoints(runs[0], runs[0].name)
    if (found := kept.series()) is None:
        return None
    step, series = found
    log = _of_record(runs[0] / step_name(step) / SERIES, column, {"series": series, "final": series})
    return replace(log, unfinished=log.diverged_at is None and series.get("diverged_at") is None)


def _trainings(folder: Path) -> dict[Path, Mapping[str, Any]]:
    """The training records of a run's folder, by their files."""
    paths = [*sorted((folder / "records").glob("*.json")), *sorted(folder.glob("*.json"))]
    records = ((path, read_record(path)) for path in paths)
    return {path: record for path, record in records if record is not None and record.get("kind") == "training"}


def _diverged_at(record: Mapping[str, Any] | None) -> int | None:
    final = (record or {}).get("final")
    at = final.get("diverged_at") if isinstance(final, Mapping) else None
    return at if isinstance(at, int) else None


def _batches(log: Log) -> dict[str, Any] | None:
    """What a run's record says of its batches, by the words for it; None where nothing does."""
    spec, data = ((log.record or {}).get(part) for part in ("spec", "data"))
    if not (isinstance(spec, Mapping) and isinstance(data, Mapping) and isinstance(data.get("digest"), str)):
        return None
    spec = {"order": "random", **spec}  # the oldest records know no other
    said = {words: spec.get(name) for words, name in (TOKENS | DECIDES).items()}
    return said | {"vocabulary": data.get("vocab_size"), "tokens": data["digest"]}


def _other_batches(log: Log, reference: Log) -> str | None:
    """In what the batches of two runs differ, in words; empty where they are the same, None where nobody knows."""
    ours, theirs = _batches(log), _batches(reference)
    if ours is None or theirs is None:
        return None
    names = list(DECIDES)
    if ours["tokens"] != theirs["tokens"]:
        names = [*TOKENS, "vocabulary", *names]
    differing = [f"{name} {theirs[name]} and not {ours[name]}" for name in names if ours[name] != theirs[name]]
    if ours["tokens"] != theirs["tokens"] and not differing:
        differing = ["a text that has changed since"]
    return ", ".join(differing)


def _whole_record(path: Path) -> Mapping[str, Any]:
    path.open().close()  # a file that is not there is told apart from one that is no record
    record = read_record(path)
    if record is None or record.get("kind") != "training":
        what = "damaged, or not a training record" if record is None else "not a training record"
        raise ValueError(f"{path} is {what}; name one, or a run's losses.jsonl")
    return record


def _of_record(path: Path, column: str, record: Mapping[str, Any]) -> Log:
    series = record.get("series")
    if not isinstance(series, dict):
        raise ValueError(f"{path} is not a training record; name one, or a run's losses.jsonl")
    whole = [name for name, values in series.items() if _is_flat(values)]
    if column not in whole:
        raise ValueError(f"{path} has no series {column!r}; choose with --column from {', '.join(whole)}")
    try:
        values = series_of(record, column).tolist()
    except OverflowError:
        raise ValueError(f"{column} of {path} has a number beyond all floats; write null for it") from None
    at = _diverged_at(record)
    values = values if at is None else values[: at + 1]  # no step was taken after it
    return _log(path, column, values, list(range(len(values))), record=record)


def _is_flat(values: Any) -> bool:
    return isinstance(values, list) and all(value is None or isinstance(value, int | float) for value in values)


def _objects(lines: Iterator[str], path: Path) -> Iterator[Mapping[str, Any]]:
    for n, line in enumerate(lines):
        try:
            found = json.loads(line) if line.strip() else None
        except ValueError:
            found = line
        if isinstance(found, Mapping):
            yield found
        elif found is not None:
            raise ValueError(f"line {n + 1} of {path} is not a JSON object; write one a line, as train does")


def _number(value: Any) -> float:
    """A number; null and nan stand for one that was not finite. An empty cell is not taken for either."""
    if isinstance(value, bool):
        raise TypeError
    return math.nan if value is None else float(value)


def _log(
    path: Path, column: str, values: Sequence[float], steps: Sequence[float], *, record: Mapping[str, Any] | None
) -> Log:
    if not len(values):
        raise ValueError(f"{path} has no entries; train first, or name another file")
    numbers = np.array(steps, dtype=np.float64)
    if not (np.isfinite(numbers) & (np.abs(numbers) < 2**53) & (numbers == np.floor(numbers))).all():
        raise ValueError(f"a step of {path} is not a whole number; number the entries, or drop the column")
    back = np.flatnonzero(np.diff(numbers) <= 0)
    if back.size:
        before, after = numbers[back[0] : back[0] + 2]
        raise ValueError(f"in {path} step {after:.0f} follows step {before:.0f}; keep one entry a step, in order")
    series = np.array(values, dtype=np.float64)
    return Log(path=path, column=column, steps=numbers.astype(np.int64), values=series, record=record)


def tell(log: Log, reference: Log | None, names: Sequence[str]) -> dict[str, Any]:
    """Every event of every definition, raw and paired with the reference, as JSON.

    Raises:
        ValueError: the reference has other steps, or its record says that it saw other batches.
    """
    pairing = None if reference is None else _pairing(log, reference)
    return {
        "file": str(log.path),
        "column": log.column,
        "reference": None if reference is None else str(reference.path),
        "same_batches": pairing,
        "entries": log.values.size,
        "steps": [int(log.steps[0]), int(log.steps[-1])],
        "diverged_at": log.diverged_at,
        "unfinished": log.unfinished,
        "recovery": asdict(RULE),
        "definitions": [_told(DEFINITIONS[name], log, reference) for name in names],
    }


def _pairing(log: Log, reference: Log) -> str:
    """How it is known that two runs saw the same batches."""
    remedy = "name a reference that saw the same batches, or leave --reference out"
    length = min(log.steps.size, reference.steps.size)
    if not np.array_equal(log.steps[:length], reference.steps[:length]):
        raise ValueError(f"{reference.path} has other steps than {log.path}; {remedy}")
    if other := _other_batches(log, reference):
        raise ValueError(f"{reference.path} is of other batches than {log.path}: {other}; {remedy}")
    return ON_TRUST if other is None else RECORDED


def _told(definition: Definition, log: Log, reference: Log | None) -> dict[str, Any]:
    def found(series: Series) -> dict[str, Any]:
        listed = [event | {"step": int(log.steps[event["step"]])} for event in events(definition, series)]
        if log.unfinished:  # what has not come back yet may
            listed = [e | {"outcome": Outcome.UNDECIDED.value} if e["after"] is None else e for e in listed]
        return {"entries": finite(series).size, "events": listed}

    cited = [REFERENCES[definition.source.key]] if definition.published else []
    return {
        "name": definition.name,
        "statement": definition.statement,
        "source": " ".join([*cited, definition.source.label]),
        "deviation": definition.deviation or None,
        "parameters": dict(definition.parameters),
        "begins": definition.begins,
        "raw": found(log.ended),
        "paired": None if reference is None else found(pair(definition, log.column, log.ended, reference.values)),
    }


def text(told: Mapping[str, Any]) -> str:
    """The table of all definitions side by side, then what each of them says."""
    first, last = told["steps"]
    ended = "" if told["diverged_at"] is None else f"; diverged at step {told['diverged_at']}"
    entries = counted(told["entries"], "entry", "entries")
    lines = [f"{told['file']}: {told['column']}, {entries}, steps {first} to {last}{ended}"]
    if told["unfinished"]:
        lines.append(f"note: the run is unfinished, read from its checkpoint up to step {last}; train again goes on")
    if last - first + 1 != told["entries"]:
        lines.append("note: not every step is there; windows and times to recover count entries")
    if told["reference"] is not None:
        how = "on the same batches, as both records say"
        if told["same_batches"] == ON_TRUST:
            how = "taken on trust to have seen the same batches: not both have a record"
        lines.append(f"paired with {told['reference']}, {how}")
    lines.append(f"{'definition':<25}{'series':<8}{'events':>6}  step: outcome (steps from its first value)")
    for definition in told["definitions"]:
        lines.append(_line(definition["name"], "raw", definition))
        if definition["paired"] is not None:
            lines.append(_line("", "paired", definition))
    rule = told["recovery"]
    lines += [
        "",
        f"recovered: {rule['hold']} steps running at most the median of the {rule['window']} steps before + "
        f"{rule['deviations']:g} x 1.4826 x their median absolute deviation (at least half a step of its rounding);",
        f"quickly within {rule['quick']} steps, slowly later, never if not by the end ({rule['patience']} or more "
        "steps later) or if it diverged first, else undecided",
    ]
    for definition in told["definitions"]:
        lines += ["", f"{definition['name']}: {definition['statement']}", f"  source: {definition['source']}"]
        if definition["deviation"]:
            lines.append(f"  departs from it: {definition['deviation']}")
    return "\n".join(lines)


def _line(name: str, series: str, definition: Mapping[str, Any]) -> str:
    """One row of the table; a series too short for any event is not said to have none."""
    entries, found = definition[series]["entries"], definition[series]["events"]
    if entries <= definition["begins"]:
        needed = f"{definition['begins'] + 1} entries needed, {entries} there"
        return f"{name:<25}{series:<8}{'-':>6}  too short: {needed}"
    shown = [
        f"{event['step']}: {event['outcome']}" + ("" if event["after"] is None else f" ({event['after']})")
        for event in found[:SHOWN]
    ]
    more = [f"and {len(found) - SHOWN} more (--json has all)"] if len(found) > SHOWN else []
    return f"{name:<25}{series:<8}{len(found):>6}  {', '.join(shown + more)}".rstrip()
