"""Ranks without a launcher: a process that has torch imported forks them, so that a test waits for no import.

It reads a request a line and answers a line: `Launcher` is the tests' end of it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.kills import tell_steps, wait_for

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120.0  # seconds: ranks that have not ended by then, and a second for every step, hang


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How ranks ended: exit statuses by rank (negative: by that signal), and what they printed, together.

    Attributes:
        step: the last one before a kill.
    """

    statuses: list[int]
    said: str
    seconds: float
    step: int | None = None


class Launcher:
    """Starts `python -m empirics ARGV` on so many ranks."""

    def __init__(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "helpers.ranks"], cwd=ROOT, env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, ranks: int, argv: Sequence[str], **request: Any) -> Ended:
        """Run to the end.

        Args:
            stop_after: stop, as Ctrl-C does, after so many steps.
            kill: when all are killed, as `kills.spread` has it.
            steps: how many they take.
            fault: of one rank, after one step: {"rank", "step", "what": "error" or "killed"}.
            signal: that every rank gets after step 3.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"ranks": ranks, "argv": list(argv), **request}) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait(timeout=10)


def _serve() -> None:
    import torch
    import torch._dynamo
    import torch.distributed.checkpoint.hf_storage

    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(_launch(json.loads(line))), flush=True)


def _launch(request: dict[str, Any]) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as said:
        start = time.monotonic()
        limit = LIMIT + request.get("steps", 0)
        store = _fork_store(port, limit)
        told, tells = os.pipe()
        children = [_fork(request, rank, port, said.fileno(), tells) for rank in range(request["ranks"])]
        os.close(tells)
        kill = request.get("kill")
        step = None if kill is None else wait_for(told, kill, limit)
        statuses = _wait(children, start + limit if kill is None else 0.0)
        os.close(told)
        _wait([store], 0.0)
        said.seek(0)
        text = said.read().decode()
    return {"statuses": statuses, "said": text, "seconds": time.monotonic() - start, "step": step}


def _wait(children: list[int], deadline: float) -> list[int]:
    """Their exit statuses; those that are late are killed, all before one of them can miss another."""
    ended: dict[int, int] = {}
    while len(ended) < len(children) and time.monotonic() < deadline:
        for child in children:
            found, status = (0, 0) if child in ended else os.waitpid(child, os.WNOHANG)
            ended |= {child: status} if found else {}
        time.sleep(0.005)
    late = [child for child in children if child not in ended]
    for child in late:
        os.kill(child, signal.SIGKILL)
    ended |= {child: os.waitpid(child, 0)[1] for child in late}
    return [os.waitstatus_to_exitcode(ended[child]) for child in children]


def _fork_store(port: int, limit: float) -> int:
    """Where ranks meet, outside of them, as a launcher keeps it."""
    child = os.fork()
    if child == 0:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        time.sleep(2 * limit)
        del store
        os._exit(0)
    return child


def _fork(request: dict[str, Any], rank: int, port: int, said: int, tells: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(request["ranks"]), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        _disturb(request, rank)
        if rank == 0 and "kill" in request:
            tell_steps(tells)
        from empirics.__main__ import main

        status = main(request["argv"])
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _disturb(request: dict[str, Any], rank: int) -> None:
    import empirics.run

    honest = empirics.run.train
    last, fault, number = request.get("stop_after"), request.get("fault"), request.get("signal")
    steps: list[int] = []

    def disturbed(*arguments: Any, on_step: Any, stop: Any, **options: Any) -> Any:
        def after(step: int, values: Any) -> None:
            on_step(step, values)
            steps.append(step)
            if fault is not None and (rank, step) == (fault["rank"], fault["step"]):
                if fault["what"] == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("the disk is on fire; fetch water")
            if number is not None and step == 3:
                os.kill(os.getpid(), number)

        # Only one rank is told to stop: the others must do as it does.
        told = rank == request["ranks"] - 1 and last is not None
        return honest(*arguments, on_step=after, stop=lambda: stop() or (told and len(steps) == last), **options)

    empirics.run.train = disturbed


if __name__ == "__main__":
    _serve()
