"""Several processes as one: who this one is, what is summed over all, and how they end together.

`torchrun --nproc-per-node K -m empirics train ...` starts K ranks. Each takes its share of every batch; what is
written down is summed over them, so that a run's numbers do not depend on how many there are (but for the order of
float32 sums), and a run that was killed goes on with another number. The model's part of it is in `sharding`.

A rank that fails says why, in one line; the others end without a word, with its status. Every rank needs the same
folder for its output.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

TIMEOUT = timedelta(minutes=30)  # the longest that ranks wait for one: to tokenise a text, to write a checkpoint
BAD_INPUT, INTERRUPTED = 2, 130
FAILED = "spikecheck/failed"  # the key under which the first rank that fails leaves its number


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process's place among `size`; alone, nothing is communicated."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sum over ranks, the same bits on each."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def totals(self, values: list[float]) -> list[float]:
        """Sums over ranks, in float64."""
        return values if self.size == 1 else self.total(torch.tensor(values, dtype=torch.float64)).tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank."""
        return flag if self.size == 1 else self.totals([float(flag)])[0] > 0

    def each(self, value: Any) -> list[Any]:
        """What every rank says, by rank."""
        if self.size == 1:
            return [value]
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, value)
        return said

    def wait(self) -> None:
        """Until all are here."""
        self.any(False)

    def share(self, batch_BT: Any) -> Any:
        """This rank's sequences of a batch; all of them where they do not go evenly over the ranks."""
        each, left = divmod(batch_BT.shape[0], self.size)
        return batch_BT if left else batch_BT[each * self.rank : each * (self.rank + 1)]

    def gathered(self, tensor: Tensor, batch_size: int) -> Tensor:
        """What every rank computed from its `share` of so many sequences, one after the other."""
        if self.size == 1 or batch_size % self.size:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)


ALONE = Ranks()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; the tensor itself if it is not."""
    # A DTensor by what it can do: its module takes half a second to import.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, gathered by every rank at once; the tensor itself if it is not."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]


def release(model: nn.Module) -> None:
    """Let go of what a model in shards has gathered, so that its parameters are this rank's parts again.

    Tables and head stay gathered after a forward pass without a backward one, in memory that is freed later.
    """
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def silenced_after_first() -> Iterator[bool]:
    """Whether this is a rank after the first, which then prints nothing: what all would say, one says."""
    if not launched() or os.environ["RANK"] == "0":
        yield False
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield True


@contextmanager
def ranks_of(device: str) -> Iterator[Ranks]:
    """Join the other ranks; alone if no launcher started several.

    The first rank that fails raises; the others exit with its status and without a word.

    Raises:
        ValueError: bad input on a rank, or a rank was lost.
    """
    if not launched():
        yield ALONE
        return
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    try:
        _join(device, store, rank, size)
        yield Ranks(rank=rank, size=size)
        dist.destroy_process_group()
    except KeyboardInterrupt:
        if rank == 0:
            raise
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, MemoryError, RuntimeError) as error:
        if not _claim(store, rank):
            raise SystemExit(BAD_INPUT) from None
        if isinstance(error, RuntimeError) and _is_connection(error):
            raise ValueError(
                f"rank {rank} lost the others ({_brief(error)}); run the same command again, on as many ranks as there "
                "are: it resumes"
            ) from None
        raise


def _join(device: str, store: Any, rank: int, size: int) -> None:
    kind = device.split(":")[0]
    if kind == "cuda":
        place = int(os.environ.get("LOCAL_RANK", "0"))
        if device != "cuda":
            raise ValueError(f"--device {device} names one device for {size} ranks; use --device cuda, a device each")
        if place >= torch.cuda.device_count():
            raise ValueError(f"rank {rank} finds {torch.cuda.device_count()} CUDA devices; start one rank a device")
        torch.cuda.set_device(place)
    # Small numbers and messages go over the CPU, and do not wait for a device.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def _is_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "Connection", "NCCL"))


def _brief(error: RuntimeError) -> str:
    """Without the place in torch's sources, and the advice that follows."""
    return re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0]).split(" [")[0].split(". ")[0]


def _claim(store: Any, rank: int) -> bool:
    """Whether this is the first rank to fail; the launcher's store outlives it."""
    try:
        return store.compare_set(FAILED, "", str(rank)).decode() == str(rank)
    except dist.DistError:  # it went with the rank that kept it
        return rank == 1
