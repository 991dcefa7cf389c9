"""Everything that decides a training run's numbers, and the learning rate of its every step."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

import numpy as np

from empirics.data import ORDERS, TOKENS_FORMAT, Order
from theory.architecture import Architecture
from theory.records import fingerprint, plain, slug
from theory.words import counted

Schedule = Literal["cosine", "linear", "constant", "wsd"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
Precision = Literal["float32", "bfloat16", "float64"]
COSINE_FLOOR = 0.1
DECAY_FRACTION = 0.1
LARGEST_RATE = float(np.finfo(np.float32).max)
# Fields younger than the first records: left out of the fingerprint where they are not used, so that those stay valid.
LATER = (
    "decay_fraction", "decay_embeddings", "z_loss", "deterministic", "order", "attention", "probes", "mask_documents",
)  # fmt: skip
# Those of an architecture by the first of each group, which at its default leaves the others without use.
LATER_OF_ARCHITECTURE = {
    "n_experts": ("n_experts", "experts_per_token", "gates_renormalised"),
    "rope_stretch": ("rope_stretch", "rope_original", "rope_low", "rope_high"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """Everything that decides a training run's numbers.

    Attributes:
        label: the method's name in figures.
        experiment: which question the run belongs to.
        warmup: steps of linear warm-up, before any schedule.
        schedule: after it, the rate is constant; or falls to a tenth by a cosine; or linearly to 0; or is constant and
            falls linearly to 0 over the last steps (wsd: warm-up, stable, decay).
        decay_fraction: of all steps, the share over which wsd falls.
        clip: gradient norms above this are scaled down to it; infinite for none.
        weight_decay: what a step takes off a decaying number is the rate times this times the number.
        decay_embeddings: token and position tables decay too. A decaying table's entries shrink, and with them the
            shortcut that a remedy made large.
        z_loss: weight of the mean squared log of the softmax's normalisation, which is added to the loss.
        precision: float32; bfloat16 for the products alone (autocast); float64 for all, a reference for the rounding of
            the other two.
        deterministic: only algorithms of torch that give the same bits every time; an error where there is none.
        data: a text, or a folder of shards.
        tokenizer: of a text, `bpe`, `bytes`, `gpt2` or a path; shards bring their own.
        order: `random` windows of the text, with replacement; or by `epoch`, each window once before any comes again.
        mask_documents: no token attends to another document of its window; in the held-out loss neither.
        attention: the way to attend; auto for the faster one by `empirics.model.faster_attention`, a function of the
            type of device, the precision and the length alone. The record says which it was.
        probe_every: steps between probes; they change no number of the run.
        probes: which, as in `empirics.registry.schedule`.
        data_bytes: how much of the text is read; the reader's own limit if None.
        micro_batch: sequences that go through the network at once, gradients being accumulated; all if None.

    Raises:
        ValueError: a field is out of range, or of no use with the others; the message names the remedy.
    """

    architecture: Architecture
    label: str
    experiment: str
    seed: int
    steps: int
    batch_size: int
    seq_len: int
    learning_rate: float
    warmup: int
    schedule: Schedule
    decay_fraction: float = DECAY_FRACTION
    clip: float = 1.0
    beta_1: float = 0.9
    beta_2: float = 0.95
    weight_decay: float = 0.0
    decay_embeddings: bool = False
    z_loss: float = 0.0
    precision: Precision = "float32"
    device: str = "cpu"
    compile: bool = False
    attention: Literal["auto", "fused", "plain"] = "auto"
    deterministic: bool = False
    micro_batch: int | None = None
    data: str = "sympy"
    data_bytes: int | None = None
    tokenizer: str = "bpe"
    order: Order = "random"
    mask_documents: bool = False
    probe_every: int = 20
    probes: str = "default"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "probe_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not a positive whole number; use 1 or more")
        if self.order not in ORDERS:
            raise ValueError(f"unknown order {self.order!r}; use one of {', '.join(ORDERS)}")
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch_size % self.micro_batch):
            raise ValueError(
                f"micro_batch={self.micro_batch} does not divide batch_size={self.batch_size}; use a divisor of it"
            )
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} is not positive; use a number above 0")
        if self.learning_rate > LARGEST_RATE:
            raise ValueError(
                f"learning_rate={self.learning_rate!r} is beyond float32, in which the weights are; use a smaller one, "
                "for example 0.001"
            )
        for name in ("weight_decay", "z_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} is negative or not finite; use 0 or more")
        for name in ("beta_1", "beta_2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range; use 0 or more, and less than 1")
        if self.decay_embeddings and not self.weight_decay:
            raise ValueError(f"embeddings do not decay at weight_decay={self.weight_decay:g}; give a weight decay")
        if self.attention == "fused" and (self.architecture.attention_softcap or not self.architecture.logit_scale):
            raise ValueError("no fused attention has a scale of 0 or a soft cap; use attention=plain or auto")
        if self.seq_len > self.architecture.context and self.architecture.positions == "learned":
            raise ValueError(
                f"seq_len={self.seq_len} exceeds the {self.architecture.context} learned positions; use fewer tokens"
            )
        self._check_schedule()
        if self.probes not in ("default", "none"):
            from empirics.registry import schedule  # its probes need torch, which a specification does not

            schedule(self.probes, self.probe_every)

    def _check_schedule(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; use one of {', '.join(SCHEDULES)}")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction={self.decay_fraction!r} is out of range; use more than 0, at most 1")
        if self.schedule != "wsd":
            if self.decay_fraction != _default("decay_fraction"):
                raise ValueError(
                    f"decay_fraction={self.decay_fraction:g} is of no use to the schedule {self.schedule}; "
                    "leave it out, or use schedule=wsd"
                )
        elif self.warmup + self.decay_steps > self.steps:
            raise ValueError(
                f"warmup={self.warmup} and the {counted(self.decay_steps, 'step')} of "
                f"decay_fraction={self.decay_fraction:g} do not fit into steps={self.steps}; use fewer, or more steps "
                "in all"
            )

    @property
    def identity(self) -> str:
        """Name of the run's record: readable parts and a fingerprint of every field."""
        parts = plain(self) | {"tokens_format": TOKENS_FORMAT}
        for name in LATER:
            if parts[name] == _default(name):
                del parts[name]
        for first, group in LATER_OF_ARCHITECTURE.items():
            if getattr(self.architecture, first) == Architecture.__dataclass_fields__[first].default:
                for name in group:
                    del parts["architecture"][name]
        return f"{self.experiment}-{slug(self.label)}-lr{self.learning_rate:g}-seed{self.seed}-{fingerprint(parts)}"

    @property
    def decay_steps(self) -> int:
        """Steps over which wsd falls."""
        return decay_steps(self.steps, self.decay_fraction)

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0; a rate that falls to 0 would be 0 at the step after the last."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "wsd":
            return self.learning_rate * min(1.0, (self.steps - step) / self.decay_steps)
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.schedule == "linear":
            return self.learning_rate * (1 - progress)
        return self.learning_rate * (COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def decay_steps(steps: int, decay_fraction: float = DECAY_FRACTION) -> int:
    """Steps over which wsd falls: the nearest whole number, at least 1."""
    return max(1, round(decay_fraction * steps))


def _default(name: str) -> object:
    return next(field.default for field in fields(RunSpec) if field.name == name)


def require_even(batch_size: int, n: int, micro_batch: int | None, what: str) -> None:
    """Refuse a batch that does not go evenly over `n` of what takes it, each `micro_batch` sequences at a time.

    Raises:
        ValueError: it does not.
    """
    together = n * (micro_batch or 1)
    if batch_size % together:
        micro = "" if micro_batch is None else f" of micro_batch={micro_batch}"
        raise ValueError(
            f"batch_size={batch_size} does not go evenly over {counted(n, what)}{micro}; use a multiple of {together}"
        )
