"""One process trains a run: two at once would write over each other's checkpoints."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path

from filelock import FileLock, Timeout

NO_LOCKS = (ENOSYS, EOPNOTSUPP, ENOLCK)  # what a file system without locks answers


@contextmanager
def sole_trainer(path: Path, run: str) -> Iterator[None]:
    """Hold a run's lock, which says who holds it. The kernel lets go of it when that process ends, however it does.

    The file may be removed once the run's record is written, and not before: whoever has opened the old file and
    whoever makes a new one would both hold a lock.

    Raises:
        ValueError: another process has it, or the folder cannot be written; the message names the remedy.
    """
    lock = FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        path.write_text(f"process {os.getpid()} on {platform.node()}\n")
    except Timeout:
        raise ValueError(
            f"{run} is being trained by {_holder(path)}; wait for it, or end it and run the same command again: it "
            "resumes"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise ValueError(f"cannot write {path}: {error.strerror}; choose a writable folder with --out") from None
        print(
            f"{path.parent} is on a file system without locks; see to it that no other process trains {run}",
            file=sys.stderr,
        )
    try:
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether a process holds a run's lock; where there are no locks, none does."""
    try:
        with FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip() or "another process"
    except OSError:
        return "another process"
