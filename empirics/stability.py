"""The probes on anyone's decoder, while its owner trains it: those of our own trainings, by the same names.

A probed step gives the residual stream's standard deviation and gradients place by place, the variance of the attention
logits and the entropy of attention layer by layer, and of every matrix the gradient that the optimizer got, the update
and its ratio to the matrix. Attention is seen where the class calls `scaled_dot_product_attention`,
`nn.MultiheadAttention` or a softmax; an update where an optimizer of torch makes it. On request, since they are dear,
spectra and distributions of the matrices and of the stream, and norms of Jacobians: of each layer, of its half-layers,
branches and sub-layers, and of all layers (`StabilityMonitor(model, probes="default,half_layer_jacobian@1000")`;
`python -m empirics probes --list` has the names). What cannot be had of a class is named in the record's `left_out`,
with the reason.

A norm is a lower estimate, over the whole first sequence as the step's first pass has it: a block is run again where it
is called, with the arguments of that sequence alone, without dropout, and in float32 where its weights are in less.
Hooks that others have put inside a block are called then too, its modules in eval mode; those on the block are not.
What has no second derivative, such as flash or flex attention, has no norm.
"""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from empirics.anatomy import Anatomy, anatomy
from empirics.jacobian_probes import functions_of
from empirics.registry import Probe, Reading, find, reason, schedule
from empirics.running import run_eagerly
from empirics.stability_record import StabilityRecord
from empirics.training_probes import PLACES
from empirics.watched import Steps, Watched


def require_steps(every: Any) -> None:
    """Refuse an interval that is none.

    Raises:
        ValueError: it is no whole number, or below 1.
    """
    try:
        operator.index(every)
    except TypeError:
        raise ValueError(f"every={every!r} is not a whole number of steps; use for example 100") from None
    if every < 1:
        raise ValueError(f"every={every} is not a positive number of steps; use 1 to probe each step")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Which probes look at which steps.

    Attributes:
        every: steps between probed ones.
        wanted: probes, with the steps between theirs; None for the first probed step alone.
    """

    every: int
    wanted: tuple[tuple[Probe, int | None], ...]

    def due(self, step: int) -> bool:
        """Whether a step's turn has come."""
        return step % self.every == 0 or any(step % at == 0 for _, at in self.wanted if at)

    def probes(self, step: int, *, first: bool) -> list[Probe]:
        """Which look at a probed step; at one whose turn has not come all that look at each `every`-th."""
        asked = not self.due(step)  # for itself
        return [
            probe
            for probe, at in self.wanted
            if (first if at is None else step % at == 0 or (asked and at == self.every))
        ]


FIELDS = ("residual_std", "place_gradient", "token_gradient")  # that every record has, probes or none
Found = tuple[dict[str, Reading], dict[str, str]]


class ProbedStep:
    """A step with its hooks: on the model until `finish`, then on its optimizers until one has stepped.

    Args:
        probes: which look at it.
        eager: run it uncompiled even where the model does not show that it is compiled.
    """

    def __init__(self, model: nn.Module, found: Anatomy, probes: Sequence[Probe], *, eager: bool) -> None:
        self._model, self._probes = model, probes
        self.in_passes = True  # whether the model carries hooks
        self._record: StabilityRecord | None = None
        axes = {(probe.quantity.axis, probe.cost) for probe in probes}
        self._uncompiled = ExitStack()
        self._uncompiled.enter_context(run_eagerly(model, always=eager))
        self._watched = Watched(
            model,
            found,
            streams=("place", "dear") in axes,
            attention=bool(axes & {("layer", "cheap"), ("head", "dear")}),
            steps=any(probe.in_training for probe in probes),
            norms=functions_of([probe.name for probe in probes], parallel=found.parallel),
        )
        # The matrices as they are in this step's passes.
        self._before = measured(self._watched, [probe for probe in probes if of_weights(probe)])

    def finish(self, step: int) -> StabilityRecord | None:
        """End the passes: the record, completed when an optimizer steps; None if no forward pass was seen."""
        watched = self._watched
        self._unhook()
        if not watched.n_tokens:
            self.detach()
            return None
        places = watched.place_statistics
        passes = [probe for probe in self._probes if not (probe.in_training or of_weights(probe))]
        found, missing = measured(watched, passes)
        found, without = _of_places(found, watched.gaps)
        self._record = StabilityRecord(
            step=step,
            places=tuple(watched.place_labels),
            residual_std=tuple(places["residual_std"]),
            place_gradient=tuple(places["place_gradient"]),
            token_gradient=tuple(places["token_gradient"]),
            n_tokens=watched.n_tokens,
            probes=self._before[0] | found,
            left_out=self._before[1] | missing | without,
        )
        watched.let_go()
        if watched.steps is not None:
            self._await(watched.steps)
        return self._record

    def detach(self) -> None:
        """Remove every hook, and look at no optimizer."""
        self._unhook()
        if self._watched.steps is not None:
            self._watched.steps.detach()

    def _unhook(self) -> None:
        self.in_passes = False
        self._watched.unhook()
        self._uncompiled.close()

    def _await(self, steps: Steps) -> None:
        """Put the optimizer's step into the record: now, or when it comes."""
        self._complete()
        if steps.changes or all(parameter.grad is None for parameter in self._model.parameters()):
            self.detach()
            return
        me = weakref.ref(self)  # with nothing that refers to itself, hooks go when the monitor does

        def then() -> None:
            probed = me()
            if probed is not None:
                probed._complete()

        steps.then = then

    def _complete(self) -> None:
        assert self._record is not None
        probes = [probe for probe in self._probes if probe.in_training]
        found, missing = measured(self._watched, probes)
        for probe in probes:
            self._record.left_out.pop(probe.name, None)
        self._record.probes.update(found)
        self._record.left_out.update(missing)


class StabilityMonitor:
    """Measures a decoder and its training in the steps that it is asked to, and changes nothing.

    In a step that is not probed the model carries no hook. A probed step may have several micro-batches; they count
    as one batch, of which attention is that of the first sequence. The optimizer may step inside the step's context or
    after it; its matrices are held twice while it does. Of a compiled model, or one of compiled blocks, the probed
    steps run uncompiled, since a compiled graph calls no hook: their losses differ by rounding, all other steps are as
    they were. Of a sharded model (`fully_shard`, DistributedDataParallel) make a monitor on every rank; a record is of
    the rank's own tokens, of whole matrices, and of the loss as the rank scales it.

    Gradients are those of the losses on which backward() is called, once a forward pass; those that
    `torch.autograd.grad` takes in the step are among them. A loss scaler (`torch.amp.GradScaler`) makes
    `place_gradient`, `token_gradient` and `token_gradient_max` as many times too large as its scale; divide by
    `scaler.get_scale()` as it was in the step. The growth is a ratio and right as it is; `matrix_gradient` is what the
    optimizer got, unscaled unless the optimizer itself unscales (`fused=True`).

    Args:
        model: any decoder with a list of equal blocks that add to a residual stream. Each is a module that is called
            once in a forward pass, or now and then not at all (LayerDrop); blocks that layers share are refused.
            Attention is seen where it is a module inside the block.
        every: `step()` probes each `every`-th step, from the first on.
        tokens: (B, T) ids to find the stream with; random ones unless given.
        eager: run probed steps uncompiled; needed where what is called is a compiled wrapper around this model.
        probes: which, as in `train --probes`: `default` for the cheap ones, `none`, names, `NAME@N` for every N steps.
            A dear one without a number is measured in the first probed step. Those of Jacobians take as long as a
            few steps.

    Raises:
        ValueError: no residual stream is found, or there is no such probe; the message says why.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 1,
        tokens: Tensor | None = None,
        eager: bool = False,
        probes: str = "default",
    ) -> None:
        require_steps(every)
        wanted = ((find(name), at) for name, at in schedule(probes, every).items() if name not in PLACES)
        self.schedule, self.eager = Schedule(every=every, wanted=tuple(wanted)), eager
        self.anatomy, _ = anatomy(model, tokens)
        self._model = model
        self.records: list[StabilityRecord] = []
        self._n_steps = 0
        self._begun = False
        self._probed: ProbedStep | None = None  # the last one that began

    @property
    def active(self) -> bool:
        """Whether a step is being probed: only then does the model carry hooks."""
        return self._probed is not None and self._probed.in_passes

    def due(self, step: int) -> bool:
        """Whether a step's turn has come."""
        return self.schedule.due(step)

    def start(self, step: int | None = None) -> None:
        """Begin a probed step; by number, where a probe has an interval of its own."""
        self.detach()
        probes = self.schedule.probes(self._number(step), first=not self._begun)
        self._begun = True
        self._probed = ProbedStep(self._model, self.anatomy, probes, eager=self.eager)

    def finish(self, step: int | None = None) -> StabilityRecord | None:
        """End a probed step's passes: its record, also kept in `records`; None if no forward pass was seen.

        If no optimizer has stepped yet, the record is completed when one does.
        """
        if self._probed is None or not self._probed.in_passes:
            return None
        record = self._probed.finish(self._number(step))
        if record is not None:
            self.records.append(record)
        return record

    def _number(self, step: int | None) -> int:
        return len(self.records) if step is None else step

    def detach(self) -> None:
        """Remove every hook; the records stay."""
        if self._probed is not None:
            self._probed.detach()
            self._probed = None

    @contextmanager
    def probe(self, step: int | None = None) -> Iterator[None]:
        """Probe the passes inside, and the step of the optimizer inside or after them."""
        self.start(step)
        try:
            yield
            self.finish(step)
        except BaseException:
            self.detach()
            raise

    @contextmanager
    def step(self) -> Iterator[None]:
        """One training step, probed if its turn has come."""
        step, self._n_steps = self._n_steps, self._n_steps + 1
        if not self.due(step):
            yield
            return
        with self.probe(step):
            yield

    def __enter__(self) -> StabilityMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def of_weights(probe: Probe) -> bool:
    """Whether it looks at the matrices alone."""
    return probe.quantity.axis == "matrix" and not probe.in_training


def _of_places(found: dict[str, Reading], gaps: dict[str, str]) -> Found:
    """What is found where some places have no number, and why the rest is missing."""
    missing = {name: why for name, why in gaps.items() if name in FIELDS or name in found}
    growth = found.get("gradient_growth")
    if growth is not None and math.isnan(growth.values[0]):
        missing["gradient_growth"] = gaps.get("place_gradient", "the gradient at the last place is zero")
    empty = {name for name in missing.keys() & found.keys() if all(map(math.isnan, found[name].values))}
    return {name: it for name, it in found.items() if name not in empty}, missing


def measured(watched: Watched, probes: Sequence[Probe]) -> Found:
    """What probes find, and why others find nothing, by name."""
    found: dict[str, Reading] = {}
    missing: dict[str, str] = {}
    for probe in probes:
        try:
            found[probe.name] = probe.measure(watched)  # type: ignore[arg-type]
            gaps = watched.without(functions_of([probe.name], parallel=watched.parallel) - {"stack"})
            missing |= {probe.name: gaps} if gaps else {}
        except Exception as error:  # the training must not fail of it
            missing[probe.name] = reason(error)
    return found, missing
