"""What benchmarks share: a command on one core with its cost, the best of some repetitions, tables and numbers out."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theory.records import SCHEMA, write_json

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds on the wall and on the processor, and peak memory in MB."""

    seconds: float
    cpu_seconds: float
    megabytes: float


def measure(command: list[str]) -> tuple[Cost, str]:
    """Run a command on one core: its wall time, its peak memory, and what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):  # 1 is a verdict: at risk
        raise ValueError(f"{' '.join(command)} failed; run it by itself to see why")
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes there, kilobytes elsewhere
    busy = usage.ru_utime + usage.ru_stime
    return Cost(seconds=seconds, cpu_seconds=busy, megabytes=usage.ru_maxrss / unit), output


def best_of(run: Callable[[], object], repeats: int) -> list[float]:
    """Best wall and processor time of something in this process, in seconds."""
    best = [math.inf, math.inf]
    for _ in range(repeats):
        before = time.perf_counter(), time.process_time()
        run()
        after = time.perf_counter(), time.process_time()
        best = [min(b, end - start) for b, start, end in zip(best, before, after, strict=True)]
    return best


def one_core() -> None:
    """Stay on one core, children included, where the system can be told so."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def report(scale: str, out: Path | None, measured: Callable[[], tuple[str, Mapping[str, Any]]]) -> int:
    """Measure, print the tables and write the numbers.

    Args:
        out: file to write the numbers to, as JSON; its folder is made before a minute of measuring, not after it.
        measured: gives the tables and the numbers.

    Returns:
        Exit status: 0 measured, 2 bad input, which is said in one line.
    """
    try:
        if out is not None:
            _make(out.parent)
        tables, numbers = measured()
        print(tables)
        if out is not None:
            write_json(out, {"schema": SCHEMA, "scale": scale, "python": platform.python_version(), **numbers})
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another --out") from None
