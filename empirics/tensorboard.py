"""TensorBoard as an optional sink: the numbers of every step, beside the record and never in its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes one run's scalars to a folder; what a resumed run takes again replaces what was written after its start.

    Raises:
        ValueError: the package is missing, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "--tensorboard needs the package tensorboard; run pip install 'spikecheck[tensorboard]'"
            ) from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write {folder}: {error.strerror}; choose another --tensorboard") from None
        self._make, self._folder = SummaryWriter, folder
        self._writer: Any = None

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._make(str(self._folder), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still held."""
        if self._writer is not None:
            self._writer.close()
