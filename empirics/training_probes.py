"""Probes while training: which are due at a step, and the series they leave in the record.

A probe reads what the step's own passes leave, or runs the network once more; it never writes to the model, its
gradients, the optimizer or a random state, so that the numbers of a training are the same, bit for bit, with any.

A record's `series.probes` has, for every probe, its `labels`, the `steps` it was taken at and a row of `values` each;
lower estimates say so in `lower_estimate`. What says how sure a value is has a row each too: `residuals` and
`likely_upper` of lower estimates, `standard_errors` and `entries` of statistics of entries. A value at step s is of the
weights after s steps, or of step s itself. `series.left_out` has, by probe, the steps at which it could not be taken,
by reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from empirics.distributed import ALONE, Ranks
from empirics.model import Transformer
from empirics.registry import Probe, Reading, Unavailable, find, schedule
from empirics.subject import Subject, whole_model

Probed = dict[str, dict[str, Any]]
LeftOut = dict[str, dict[str, list[int]]]  # steps, by probe and reason
Batch = Callable[[], tuple[Tensor, Tensor]]  # tokens and next tokens, (B, T) each
# These have a place in the record from before there was a list of probes: `probe_step` and a series each.
PLACES = ("residual_std", "place_gradient")


class TrainingProbes:
    """The probes of one training.

    Args:
        wanted, every: as in `registry.schedule`.
        sequences: how many sequences of a batch a pass of a probe's own takes; all if None.
        ranks: over which the model and its batches are spread. All of them take every probe together; for dear ones
            each makes a copy of the whole model.
        left_out: what is added to where a probe cannot be taken.
    """

    def __init__(
        self,
        wanted: str,
        every: int,
        sequences: int | None = None,
        ranks: Ranks = ALONE,
        *,
        left_out: LeftOut,
    ) -> None:
        self.sequences, self.ranks, self.left_out = sequences, ranks, left_out
        self._wanted: list[tuple[Probe, int | None]] = [(find(n), at) for n, at in schedule(wanted, every).items()]

    @property
    def on(self) -> bool:
        """Whether anything is probed at all."""
        return bool(self._wanted)

    def due(self, step: int) -> bool:
        """Whether a probe looks at the step's own passes."""
        return any(self._in_passing(step))

    def places_due(self, step: int) -> bool:
        """Whether the stream's statistics go to their places in the record."""
        return any(probe.name in PLACES for probe in self._in_passing(step))

    def before(self, series: Probed, step: int, model: Transformer, batch: Batch) -> None:
        """Take the dear probes that are due on the weights as they are; the whole batch is asked for if any is."""
        dear = [p for p, at in self._wanted if p.cost == "dear" and (step == 0 if at is None else step % at == 0)]
        self._take(series, step, dear, lambda: self._subject(model, batch))

    def after_all(self, series: Probed, step: int, model: Transformer, batch: Batch) -> None:
        """Take the dear probes once more in the end."""
        dear = [p for p, _ in self._wanted if p.cost == "dear"]
        self._take(series, step, dear, lambda: self._subject(model, batch))

    def watch(self, step: int, model: Transformer, tokens_BT: Tensor, targets_BT: Tensor) -> Subject | None:
        """The step, if a probe is due: to be shown its passes, and to be handed to `passed` and `stepped`.

        Args:
            tokens_BT, targets_BT: this rank's share of the batch.
        """
        probes = self._in_passing(step)
        if not probes:
            return None
        subject = Subject(model, tokens_BT, targets_BT, ranks=self.ranks)
        if any(probe.in_training for probe in probes):
            subject.remember()
        return subject

    def passed(self, series: Probed, step: int, subject: Subject) -> None:
        """Take the probes of a step's passes, before the weights move."""
        probes = [p for p in self._in_passing(step) if not (p.in_training or p.name in PLACES)]
        self._take(series, step, probes, lambda: subject)

    def stepped(self, series: Probed, step: int, subject: Subject) -> None:
        """Take the probes of how the weights have moved."""
        subject.compare()
        self._take(series, step, [p for p in self._in_passing(step) if p.in_training], lambda: subject)

    def _in_passing(self, step: int) -> Sequence[Probe]:
        return [p for p, at in self._wanted if p.cost == "cheap" and step % (at or 1) == 0]

    def _subject(self, model: Transformer, batch: Batch) -> Subject:
        tokens_BT, targets_BT = batch()
        seen = model if self.ranks.size == 1 else whole_model(model)
        return Subject(seen, tokens_BT[: self.sequences], targets_BT[: self.sequences])

    def _take(self, series: Probed, step: int, probes: Sequence[Probe], subject: Callable[[], Subject]) -> None:
        """Add a row to the series of each probe, or to what is left out of it."""
        if not probes:
            return
        seen = subject()
        for probe in probes:
            try:
                found = probe.measure(seen)
            except Unavailable as why:
                self.left_out.setdefault(probe.name, {}).setdefault(str(why), []).append(step)
                continue
            add(series, probe.name, step, found)


def add(series: Probed, name: str, step: int, found: Reading) -> None:
    """Add a row to the series of a probe; what only some steps have is not a number at the others."""
    kept = series.setdefault(name, {"labels": list(found.labels), "steps": [], "values": []})
    if new := [label for label in found.labels if label not in kept["labels"]]:
        kept["labels"] += new
        for row in (row for what in kept.keys() - {"labels", "steps", "lower_estimate"} for row in kept[what] if row):
            row += [math.nan] * len(new)
    if found.lower_estimate:
        kept["lower_estimate"] = True
    for what, values in ({"values": found.values} | found.sureness).items():
        there = dict(zip(found.labels, values, strict=True))
        earlier = [None] * len(kept["steps"])  # of a run that began before this was kept
        kept.setdefault(what, earlier).append([there.get(label, math.nan) for label in kept["labels"]])
    kept["steps"].append(step)
