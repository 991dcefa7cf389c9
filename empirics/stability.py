"""The probes on anyone's decoder: what its residual stream and its gradient do while its owner trains it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from empirics.anatomy import Place, anatomy
from empirics.residual_stream import length_sums, n_tokens, variance_sum
from empirics.running import first_tensor, run_eagerly
from theory.records import Measurement
from theory.words import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class StabilityRecord:
    """One probed step. Every tuple runs over the places of the residual stream.

    `residual_std` and `place_gradient` are what a training record of `python -m empirics train` has by these names.

    Attributes:
        step: the step's number.
        places: `embedding`, then `layer N attention` (serial blocks) and `layer N`.
        residual_std: over the entries of a token, its square averaged over tokens.
        place_gradient: norm of the loss gradient over all tokens of the step; not a number where none arrives.
        token_gradient: mean over tokens of the norm of the loss gradient at that token.
        n_tokens: tokens of the step, padding included.
    """

    step: int
    places: tuple[str, ...]
    residual_std: tuple[float, ...]
    place_gradient: tuple[float, ...]
    token_gradient: tuple[float, ...]
    n_tokens: int

    def __str__(self) -> str:
        rows = zip(self.places, self.residual_std, self.place_gradient, self.token_gradient)
        return "\n".join(
            [
                f"step {self.step}, {counted(self.n_tokens, 'token')}: gradient growth {self.growth:.4g}",
                f"{'place':<20}{'residual std':>14}{'gradient':>12}{'a token':>12}",
                *(f"{name:<20}{std:>14.4g}{norm:>12.4g}{token:>12.4g}" for name, std, norm, token in rows),
            ]
        )

    @property
    def growth(self) -> float:
        """Gradient norm at the first place over that at the last."""
        return self.place_gradient[0] / self.place_gradient[-1] if self.place_gradient[-1] else math.nan

    def measurements(self) -> tuple[Measurement, Measurement, Measurement]:
        """Gradient growth, gradient profile and residual profile, as `empirics.probes.measure_growth` gives them."""
        last = self.place_gradient[-1] or math.nan
        values = {
            "gradient_growth": (self.growth,),
            "gradient_profile": tuple(value / last for value in self.place_gradient),
            "residual_std": self.residual_std,
        }
        growth, gradient, residual = (
            Measurement(quantity=name, values=it, seeds=(), log_sd=None, lower_estimate=False)
            for name, it in values.items()
        )
        return growth, gradient, residual


def series(records: Sequence[StabilityRecord]) -> dict[str, Any]:
    """Probed steps as a training record's `series` has them: `probe_step`, and a list a step of the rest."""
    return {
        "probe_step": [record.step for record in records],
        "residual_std": [list(record.residual_std) for record in records],
        "place_gradient": [list(record.place_gradient) for record in records],
    }


class _Sums:
    """What one place has seen in a step, over its micro-batches; kept on the device until the step ends."""

    def __init__(self) -> None:
        self.variance: list[Tensor] = []
        self.lengths: list[Tensor] = []
        self.n_tokens: list[int] = []
        self.unhooked = 0  # forward passes whose tensor needs no gradient yet

    def see(self, x: Tensor) -> None:
        recomputed = torch._C._current_graph_task_id() != -1  # activation checkpointing runs it again
        if not recomputed:
            self.variance.append(variance_sum(x))
            self.n_tokens.append(n_tokens(x))
            self.unhooked += not x.requires_grad
        if x.requires_grad and (not recomputed or self.unhooked):
            self.unhooked -= recomputed
            x.register_hook(self.receive)

    def receive(self, gradient: Tensor) -> None:
        self.lengths.append(length_sums(gradient))

    def statistics(self) -> tuple[float, float, float]:
        """Standard deviation, gradient norm and mean gradient norm of a token."""
        tokens = sum(self.n_tokens)
        deviation = math.sqrt(float(torch.stack(self.variance).sum()) / tokens)
        if not self.lengths:
            return deviation, math.nan, math.nan
        square, length, _ = torch.stack(self.lengths).sum(0).tolist()
        return deviation, math.sqrt(square), length / tokens


def require_steps(every: int) -> None:
    """Refuse an interval that is none.

    Raises:
        ValueError: it is below 1.
    """
    if every < 1:
        raise ValueError(f"every={every} is not a positive number of steps; use 1 to probe each step")


class StabilityMonitor:
    """Measures a decoder's residual stream and gradient in the steps that it is asked to, and changes nothing.

    In a step that is not probed the model carries no hook. A probed step may have several micro-batches; they count
    as one batch. Of a compiled model, or one of compiled blocks, the probed steps run uncompiled, since a compiled
    graph calls no hook: their losses differ by rounding, all other steps are as they were. Of a sharded model
    (`fully_shard`, DistributedDataParallel) make a monitor on every rank; a record is of the rank's own tokens, and of
    the loss as the rank scales it.

    Args:
        model: any decoder with a list of equal blocks that add to a residual stream.
        every: `step()` probes each `every`-th step, from the first on.
        tokens: (B, T) ids to find the stream with; random ones unless given.
        eager: run probed steps uncompiled; needed where what is called is a compiled wrapper around this model.

    Raises:
        ValueError: no residual stream is found; the message says why.
    """

    def __init__(self, model: nn.Module, *, every: int = 1, tokens: Tensor | None = None, eager: bool = False) -> None:
        require_steps(every)
        self.eager = eager
        self.anatomy, _ = anatomy(model, tokens)
        self._model = model
        self.every = every
        self.records: list[StabilityRecord] = []
        self._steps = 0
        self._sums: list[_Sums] = []
        self._hooks: list[Any] = []
        self._eager = ExitStack()

    @property
    def active(self) -> bool:
        """Whether a step is being probed: only then does the model carry hooks."""
        return bool(self._hooks)

    def start(self) -> None:
        """Begin a probed step."""
        self.detach()
        self._sums = [_Sums() for _ in self.anatomy.places]
        self._eager.enter_context(run_eagerly(self._model, always=self.eager))
        self._hooks = [hook(place, sums) for place, sums in zip(self.anatomy.places, self._sums, strict=True)]

    def finish(self, step: int | None = None) -> StabilityRecord | None:
        """End a probed step: its record, also kept in `records`; None if no forward pass was seen."""
        self.detach()
        sums, self._sums = self._sums, []
        if not sums or not all(it.n_tokens for it in sums):
            return None
        deviation, gradient, token_gradient = zip(*(it.statistics() for it in sums))
        record = StabilityRecord(
            step=len(self.records) if step is None else step,
            places=tuple(place.name for place in self.anatomy.places),
            residual_std=deviation,
            place_gradient=gradient,
            token_gradient=token_gradient,
            n_tokens=sum(sums[0].n_tokens),
        )
        self.records.append(record)
        return record

    def detach(self) -> None:
        """Remove every hook; the records stay."""
        for handle in self._hooks:
            handle.remove()
        self._hooks = []
        self._eager.close()

    @contextmanager
    def probe(self, step: int | None = None) -> Iterator[None]:
        """Probe the forward and backward passes inside."""
        self.start()
        try:
            yield
            self.finish(step)
        finally:
            self.detach()

    @contextmanager
    def step(self) -> Iterator[None]:
        """One training step, probed if its turn has come."""
        step, self._steps = self._steps, self._steps + 1
        if step % self.every:
            yield
            return
        with self.probe(step):
            yield

    def __enter__(self) -> StabilityMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def hook(place: Place, sums: _Sums) -> Any:
    """A hook that shows a place's tensor to `sums`."""
    if place.side == "input":

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _see(sums, (*args, *kwargs.values()))

        return place.module.register_forward_pre_hook(before, with_kwargs=True)
    return place.module.register_forward_hook(lambda _, __, output: _see(sums, (output,)))


def _see(sums: _Sums, values: tuple[Any, ...]) -> None:
    x = first_tensor(values)
    if x is not None:
        sums.see(x)
