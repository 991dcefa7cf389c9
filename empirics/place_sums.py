"""What hooks are shown of the residual stream at one place in a step of someone else's training, and what they are not.

Shapes: B batch, T tokens, D width; a stream is (B, T, D) or (T, B, D).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from empirics.residual_stream import length_sums, n_tokens, variance_sum
from empirics.running import first_sequence, recomputing

FROZEN = (
    "no gradient arrives, since nothing before it is trained; to have it, let the output of the embeddings require one "
    "(transformers: model.enable_input_require_grads())"
)
ABSENT = "it did not run in this step"
NO_BACKWARD = "no gradient arrived; run backward() in the probed step"
TWICE = (
    "gradients arrived twice in one forward pass, and their norms do not add; call backward() once, on the sum of the "
    "losses"
)
NOTHING = (math.nan, math.nan, math.nan)


class PlaceSums:
    """What one place has seen in a step, over its micro-batches; kept on the device until the step ends.

    Args:
        keep: also keep the first sequence.
        batch_axis: the axis of sequences.
    """

    def __init__(self, keep: bool, batch_axis: int = 0) -> None:
        self.keep, self.batch_axis = keep, batch_axis
        self.first: Tensor | None = None
        self.variance: list[Tensor] = []
        self.lengths: list[Tensor] = []
        self.n_tokens = 0
        self.n_reached = 0  # tokens at which a gradient has arrived
        self.repeated = False  # whether one has arrived twice
        self.passes = 0
        self.hooked = False  # whether a forward pass has shown a tensor that needs a gradient
        self.unhooked = 0  # forward passes whose tensor needs no gradient yet

    def see(self, x: Tensor) -> None:
        again = recomputing()
        if not again:
            if self.keep and self.first is None:
                self.first = first_sequence(x, self.batch_axis).clone()
            self.variance.append(variance_sum(x))
            self.n_tokens += n_tokens(x)
            self.passes += 1
            self.unhooked += not x.requires_grad
            self.hooked |= x.requires_grad
        # Where a forward pass shows what needs a gradient, what does not is a pass without, and is not run again.
        if x.requires_grad and (not again or (self.unhooked and not self.hooked)):
            self.unhooked -= again
            x.register_hook(self._receiver())

    def _receiver(self) -> Callable[[Tensor], None]:
        """What takes the gradients of one tensor."""
        arrived = False

        def receive(gradient: Tensor) -> None:
            nonlocal arrived
            self.repeated |= arrived
            self.n_reached += 0 if arrived else n_tokens(gradient)
            arrived = True
            self.lengths.append(length_sums(gradient))

        return receive

    @cached_property
    def deviation(self) -> float:
        """Standard deviation of the stream; not a number where it is not finite or nothing was seen."""
        variance = float(torch.stack(self.variance).sum()) / self.n_tokens if self.variance else math.nan
        return math.sqrt(variance) if math.isfinite(variance) else math.nan

    @cached_property
    def gradient(self) -> tuple[float, float, float]:
        """Norm of the gradient, mean and largest norm of a token's; no numbers where `without_gradient` says why."""
        if not self.lengths or self.repeated:
            return NOTHING
        lengths = torch.stack(self.lengths)
        square, length, _ = lengths.sum(0).tolist()
        if not math.isfinite(square):
            return NOTHING
        return math.sqrt(square), length / self.n_reached, float(lengths[:, 2].max())

    @property
    def without_stream(self) -> str:
        """Why there is no deviation; empty if there is."""
        return "" if math.isfinite(self.deviation) else "the stream is not finite" if self.n_tokens else ABSENT

    @property
    def without_gradient(self) -> str:
        """Why there is no gradient; empty if there is."""
        if not self.n_tokens:
            return ABSENT
        if not self.lengths:
            return FROZEN if self.unhooked == self.passes else "no gradient arrived"
        return TWICE if self.repeated else "" if math.isfinite(self.gradient[0]) else "the gradient is not finite"


def by_reason(labels: Sequence[str], whys: Iterable[str]) -> str:
    """What is missing where, and why, in one line: of each reason that is not empty, where it holds.

    >>> by_reason(["a", "b", "c"], ["", "late", "late"])
    'b, c: late'
    >>> by_reason(["a", "b", "c"], ["late"] * 3)
    'a to c: late'
    """
    where: dict[str, list[str]] = {}
    for label, why in zip(labels, whys, strict=True):
        if why:
            where.setdefault(why, []).append(label)
    every = f"{labels[0]} to {labels[-1]}" if len(labels) > 2 else ""  # of a hundred layers, not all their names
    said = {why: every if every and len(it) == len(labels) else ", ".join(it) for why, it in where.items()}
    return "; ".join(f"{places}: {why}" for why, places in said.items())
