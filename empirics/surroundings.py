"""What numbers depend on beside their specification: versions, device, and the precision of products."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def environment(device: str) -> dict[str, Any]:
    """Versions and settings, for a record; of a GPU also its name and CUDA's version."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "float32_products": torch.get_float32_matmul_precision(),  # highest: float32 throughout, no TF32
    }
    return found | {"cuda": torch.version.cuda} if device.startswith("cuda") else found


@contextmanager
def true_float32(precision: str = "highest") -> Iterator[None]:
    """Products of float32 numbers in float32, whatever the process was told before; afterwards as before.

    That is torch's own default, but some containers (by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE) and libraries change it to
    TF32, whose factors have eleven bits and not 24.

    Args:
        precision: another one of torch's, for a control: `medium` is as coarse as the device has it.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
