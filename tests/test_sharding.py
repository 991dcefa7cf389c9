"""A large model in shards: every rank's part by count, on the meta device."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

from helpers.ranks import ROOT

from theory.architecture import preset

FAKE = """
import json, sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from empirics.distributed import Ranks, local
from empirics.sharding import shard
from empirics.model import Transformer
from theory.architecture import preset

sizes = []
for rank in (0, 31, 62, 63):
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=64)
    with torch.device("meta"):
        model = Transformer(preset("13b"))
    shard(model, Ranks(rank=rank, size=64), device="cpu")
    sizes.append(sum(local(parameter).numel() for parameter in model.parameters()))
    dist.destroy_process_group()
memory = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
print(json.dumps([[list(parameter.shape) for parameter in model.parameters()], sizes, memory]))
"""


def test_13b_shards_on_the_meta_device() -> None:
    """13 billion parameters over 64 ranks: every rank's part by count, in seconds and in no memory."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FAKE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shapes, sizes, kilobytes = json.loads(done.stdout)
    assert sum(map(math.prod, shapes)) == preset("13b").n_parameters
    assert preset("13b").n_parameters > 12e9
    # Of n rows the ranks get ceil(n / 64) each, as long as there are some.
    expected = [
        sum(math.prod(rest) * min(max(rows - rank * -(-rows // 64), 0), -(-rows // 64)) for rows, *rest in shapes)
        for rank in range(64)
    ]
    assert sum(expected) == sum(map(math.prod, shapes))
    assert sizes == [expected[rank] for rank in (0, 31, 62, 63)]
    assert max(expected) < 1.02 * min(expected)
    assert kilobytes < 2e6
