"""A callback for the Trainer of transformers that writes down the stability of a run; extra `hf`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from empirics.registry import schedule
from empirics.stability import StabilityMonitor, require_steps


class StabilityCallback(TrainerCallback):
    """Probes every `every`-th optimiser step and appends a line to a file; the training itself is not changed.

    With several processes each probes its own tokens, and the first one writes. With `torch_compile` the probed steps
    run uncompiled. A resumed training goes on in its file; one that starts anew needs a new one. With `fp16` gradients
    at the places have the loss scaler's factor, as in `StabilityMonitor`.

    Args:
        out: JSON lines, one a probed step: the step, standard deviation and gradient norm at every place, the growth,
            what the probes found, and what could not be had.
        probes: which, as in `StabilityMonitor`.
    """

    def __init__(self, out: str | Path, *, every: int = 100, probes: str = "default") -> None:
        require_steps(every)  # before a run is set up around it
        schedule(probes, every)
        self.out, self.every, self.probes = Path(out), every, probes
        self.monitor: StabilityMonitor | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Find the residual stream, before any step is spent on a model that has none.

        Raises:
            ValueError: it has none, or the training starts anew and the file has another one's steps.
        """
        assert model is not None  # the Trainer passes it to every event
        again = self.out.is_file() and self.out.stat().st_size > 0
        if again and not getattr(state, "global_step", 0) and getattr(state, "is_world_process_zero", True):
            raise ValueError(f"{self.out} has the steps of another run; give another path, or remove it")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.monitor = StabilityMonitor(
            model, every=self.every, eager=bool(getattr(args, "torch_compile", False)), probes=self.probes
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.monitor is not None and self.monitor.due(state.global_step):
            self.monitor.start(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.monitor is None or not self.monitor.active:
            return
        record = self.monitor.finish(state.global_step - 1)  # the Trainer has counted the step already
        if record is not None and getattr(state, "is_world_process_zero", True):
            with self.out.open("a") as file:
                file.write(json.dumps(record.row(), allow_nan=False) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.monitor is not None:
            self.monitor.detach()
