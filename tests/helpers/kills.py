"""Kills of a training: spread over it, or exactly where it gives what it has written its name.

For the former it tells its steps through a pipe, and whoever reads them chooses the moment.
"""

from __future__ import annotations

import os
import random
import select
import signal
import time
from pathlib import Path
from typing import Any

# A step of a training: when it is taken, kill after so many times as long as the step before it took (at most 50 ms).
Kill = dict[str, float]


def spread(times: int, steps: int) -> list[Kill]:
    """Random steps from the first to the last but a few, in order, and up to two steps after each of them.

    A start goes on from its last checkpoint, so that each of them comes further than the one before; none ends.
    """
    chance = random.Random(times)
    at = sorted(chance.randrange(steps - 10) for _ in range(times))
    return [{"step": step, "later": chance.uniform(0.0, 2.0)} for step in at]


def tell_steps(pipe: int) -> None:
    """Make every training of this process write its steps to a pipe."""
    import empirics.run

    honest = empirics.run.train

    def told(*arguments: Any, on_step: Any, **options: Any) -> Any:
        def after(step: int, values: Any) -> None:
            os.write(pipe, b"%d\n" % step)
            on_step(step, values)

        return honest(*arguments, on_step=after, **options)

    empirics.run.train = told


def die_where_renamed(folder: Path, *, after: bool) -> None:
    """Have this process kill itself where something whole gets its name in a folder: right before, or right after."""
    honest = os.replace

    def replace(source: Any, target: Any) -> None:
        ours = Path(target).parent == folder
        if after or not ours:
            honest(source, target)
        if ours:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def wait_for(pipe: int, kill: Kill, limit: float) -> int:
    """Return at the moment to kill, or when no more steps come: the last step that was told, -1 if none was."""
    deadline, last, said = time.monotonic() + limit, -1, b""
    before, took = 0.0, 0.01  # the first step's time is that of starting
    while last < kill["step"]:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not ready or not (found := os.read(pipe, 4096)):
            return last
        *lines, said = (said + found).split(b"\n")
        if lines:
            last, now = int(lines[-1]), time.monotonic()
            before, took = now, min(now - before, 0.05) if before else took
    time.sleep(kill["later"] * took)
    return last
