"""What probing costs a training: the same run with the default probes and with none, in turns.

Both runs are in one process and on one thread: one takes a step, then the other, so that whatever else the machine does
falls on both. Their losses are the same, bit for bit, which is checked. A step's time is the processor's, of that run
alone; it has everything that the loop does. What is measured once a run, before the first step and after the last, is
the difference of runs of one step, in turns too.

    python benchmarks/probes.py [--scale full] [--out results/benchmarks/probes.json]
"""

from __future__ import annotations

import argparse
import platform
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a module of this folder is called theory too

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.timing import one_core, report  # noqa: E402
from empirics.data import Corpus, load_corpus  # noqa: E402
from empirics.run_spec import RunSpec  # noqa: E402
from empirics.train import train  # noqa: E402
from theory.architecture import preset  # noqa: E402

TARGET = 0.05  # of training time, at the default interval
EVERY = next(field.default for field in fields(RunSpec) if field.name == "probe_every")
PROBES = ("none", "default")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A training; `intervals` between probes are timed, after one that is not, and `pairs` of runs of one step."""

    preset: str
    batch_size: int
    seq_len: int
    intervals: int
    pairs: int


SCALES: dict[str, tuple[Task, ...]] = {
    "full": (
        Task(preset="tiny", batch_size=8, seq_len=64, intervals=20, pairs=9),
        Task(preset="wide", batch_size=8, seq_len=64, intervals=10, pairs=5),
    ),
    "tiny": (Task(preset="tiny", batch_size=2, seq_len=8, intervals=1, pairs=1),),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one training's probes cost.

    Attributes:
        step: seconds of a step without probes, median.
        probed_step: seconds by which a probed step is longer than the same step without, median.
        once: seconds by which a run is longer for what is measured before its first step and after its last, median.
        cost: of probing at the steps, relative to training: `probed_step` over the interval's steps.
        total: by how much all timed steps of the probed run are longer, relative; it has the control in it.
        control: the same of the steps that neither run probes: what two equal runs differ by.
    """

    preset: str
    batch_size: int
    seq_len: int
    every: int
    steps: int
    step: float
    probed_step: float
    once: float
    cost: float
    total: float
    control: float
    same_losses: bool


def specification(task: Task, probes: str, steps: int) -> RunSpec:
    """A training of so many steps."""
    return RunSpec(
        architecture=preset(task.preset), label="Vanilla", experiment="probes", seed=0, learning_rate=1e-3,
        batch_size=task.batch_size, seq_len=task.seq_len, warmup=0, schedule="constant", probes=probes,
        steps=steps, probe_every=EVERY,
    )  # fmt: skip


def in_turns(task: Task, corpus: Corpus) -> tuple[dict[str, np.ndarray], dict[str, list[float]]]:
    """Seconds of every step, and losses, of both runs; each step of one follows the same step of the other."""
    turns = {probes: threading.Semaphore(int(probes == PROBES[0])) for probes in PROBES}
    seconds: dict[str, list[float]] = {probes: [] for probes in PROBES}
    losses: dict[str, list[float]] = {}
    failures: list[BaseException] = []

    def take(probes: str, other: str) -> None:
        start = 0.0

        def on_step(step: int, values: Mapping[str, float]) -> None:
            nonlocal start
            seconds[probes].append(time.thread_time() - start)
            if failures:
                raise RuntimeError("the other run has failed")
            turns[other].release()
            turns[probes].acquire()
            start = time.thread_time()

        turns[probes].acquire()
        try:
            start = time.thread_time()
            spec = specification(task, probes, EVERY * (task.intervals + 1))  # one interval more than is timed
            losses[probes] = train(spec, corpus, on_step=on_step)["series"]["loss"]
        except BaseException as error:  # raised below, once the other thread has ended too
            failures.append(error)
        finally:
            turns[other].release()

    threads = [threading.Thread(target=take, args=pair) for pair in (PROBES, PROBES[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return {probes: np.array(taken) for probes, taken in seconds.items()}, losses


def longer(task: Task, corpus: Corpus) -> float:
    """Seconds by which a run of one step, the first of which is probed, takes longer with probes; median."""

    def seconds(probes: str) -> float:
        start = time.thread_time()
        train(specification(task, probes, 1), corpus)
        return time.thread_time() - start

    return float(np.median([-seconds("none") + seconds("default") for _ in range(task.pairs)]))


def measure(task: Task, corpus: Corpus) -> Row:
    """Both runs, and how much longer the probed one takes."""
    seconds, losses = in_turns(task, corpus)
    bare, probed = (seconds[probes].reshape(-1, EVERY)[1:] for probes in PROBES)
    step, more = float(np.median(bare)), float(np.median(probed[:, 0] - bare[:, 0]))
    return Row(
        preset=task.preset,
        batch_size=task.batch_size,
        seq_len=task.seq_len,
        every=EVERY,
        steps=bare.size,
        step=step,
        probed_step=more,
        once=longer(task, corpus) - more,
        cost=more / (EVERY * step),
        total=float(probed.sum() / bare.sum() - 1),
        control=float(probed[:, 1:].sum() / bare[:, 1:].sum() - 1),
        same_losses=losses["none"] == losses["default"],
    )


def table(rows: Sequence[Row]) -> str:
    """As in the README."""
    lines = [
        "| preset | batch | every | steps | step, ms | probed step, ms more | once, ms | probing, % of training "
        "| all steps, % | control, % | same losses |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.preset} | {row.batch_size} x {row.seq_len} | {row.every} | {row.steps} | {1e3 * row.step:.1f} | "
            f"{1e3 * row.probed_step:.1f} | {1e3 * row.once:.0f} | {100 * row.cost:.2f} "
            f"| {100 * row.total:.1f} | {100 * row.control:.1f} | "
            f"{'yes' if row.same_losses else 'NO'} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description="What the default probes cost a training, beside the same without.")
    parser.add_argument("--scale", choices=list(SCALES), default="full", help="default full, about three minutes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record there too")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    one_core()

    def measured() -> tuple[str, dict[str, Any]]:
        rows: list[Row] = []
        for task in SCALES[arguments.scale]:
            corpus = load_corpus("sympy", vocab_size=preset(task.preset).vocab_size, cache=None)
            rows.append(measure(task, corpus))
        return table(rows), {
            "torch": torch.__version__, "machine": platform.machine(), "target": TARGET,
            "rows": [asdict(row) for row in rows],
        }  # fmt: skip

    return report(arguments.scale, arguments.out, measured)


if __name__ == "__main__":
    raise SystemExit(main())
