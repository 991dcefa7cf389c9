"""What a training run will need, from its sizes alone: no number is drawn and nothing is measured.

State is counted number by number of the network's parameters, and by `footprint` what a step holds beside it; all else
is an estimate that says what it assumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any, Literal

import torch
from torch import nn

from empirics.data_sheets import DEVICES
from empirics.footprint import Moment, footprint
from empirics.model import Kernel, Transformer
from empirics.run_spec import require_even
from theory.architecture import Architecture
from theory.records import plain
from theory.words import counted

SHARE_OF_PEAK = 0.4  # a convention: what well-tuned runs report at these sizes
ROOM = 0.9  # of a device's memory; the rest is for what is not in the count
MANY = 2**20  # devices, among which a share of anything is next to nothing
# A number of a parameter, all float32: weight, gradient, the two moments of Adam, and the weight before the step, whose
# distance from the one after it is the update norm. AdamW's counters, 4 bytes a tensor, and where the norm of a
# matrix's row belongs, 8 bytes a row, are left out. Gradients come as activations go.
GRADIENT_BYTES = 4
STATE_BYTES = 16 + GRADIENT_BYTES
PROBE_BYTES = 4  # a number of a matrix: what a probed step compares itself with


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Numbers in a network's parameters.

    Attributes:
        parameters: all, gains and biases too; a tied head once.
        matrices: in tables and weights of linear maps.
        products: in the weights that activations are multiplied with; a tied head's is one.
        layers: in the layers.
    """

    parameters: int
    matrices: int
    products: int
    layers: int


@lru_cache
def count(architecture: Architecture) -> Counts:
    """Count a network on the meta device, where it has shapes and no memory."""
    with torch.device("meta"):
        model = Transformer(architecture)
    return Counts(
        parameters=sum(p.numel() for p in model.parameters()),
        matrices=sum(p.numel() for p in model.parameters() if p.ndim == 2),
        products=sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)),
        layers=sum(p.numel() for p in model.layers.parameters()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one of several devices that share weights, gradients and optimizer state evenly (FSDP), at the peak.

    Of one device all that tensors hold is counted. On a CPU a step's passes peaked at the count to within a kilobyte (4
    to 270 MB), and whole trainings at the plan and at most half a per cent above (6 to 19 MB; what `STATE_BYTES` leaves
    out). `footprint` says what is left out, and what is assumed of a GPU, of which no step has been seen that was not
    compiled. A compiled one needs less: on an H200 25.2 GB of 30.1 (350M, bfloat16, 16,384 tokens). On several devices
    the pass and what is gathered are added up as if each were largest at once.

    Attributes:
        state: from the first step to the last: weights, moments and the weights before the step.
        probes: at a probed step, a copy of the matrices as they were.
        gradients: those that there are at the peak.
        casts: what autocast rounds to bfloat16 and keeps until the backward pass: weights that are not gathered so.
        gathered: of several devices: two layers whole and one's gradient in the run's precision; tables and head with
            their gradients in float32.
        activations: what the forward pass keeps for the backward pass, and what is there for a moment.
        moment: when the peak is.
    """

    state: float
    probes: float
    gradients: float
    casts: float
    gathered: float
    activations: float
    moment: Moment

    @property
    def total(self) -> float:
        return self.state + self.probes + self.gradients + self.casts + self.gathered + self.activations


def memory(
    architecture: Architecture,
    *,
    batch_size: int,
    seq_len: int,
    precision: str,
    gpu: bool = True,
    devices: int = 1,
    attention: Kernel | Literal["auto"] = "auto",
    z_loss: float = 0.0,
    probed: bool = True,
    accumulated: bool = False,
) -> Memory:
    """What a training needs on each of `devices`, `batch_size` sequences going through the network at once on each.

    Args:
        gpu, attention, z_loss: as in `footprint`.
        probed: whether a probe looks at steps, as the default ones do.
        accumulated: whether a step is several passes.
    """
    a, counts = architecture, count(architecture)
    found = footprint(
        a, batch_size=batch_size, seq_len=seq_len, precision=precision, gpu=gpu, devices=devices, attention=attention,
        z_loss=z_loss, probed=probed, accumulated=accumulated,
    )  # fmt: skip
    width = 2 if precision == "bfloat16" else 4
    outside = counts.parameters - counts.layers
    state = (STATE_BYTES - GRADIENT_BYTES) * counts.parameters / devices
    probes = PROBE_BYTES * counts.matrices / devices if probed else 0.0
    passing = Memory(
        state=state,
        probes=probes,
        gradients=found.gradients / devices,
        casts=float(found.casts),
        gathered=3 * width * counts.layers / a.n_layers + 8 * outside if devices > 1 else 0.0,
        activations=float(found.activations),
        moment=found.moment,
    )
    stepping = Memory(
        state=state,
        probes=probes,
        gradients=GRADIENT_BYTES * counts.parameters / devices,
        casts=0.0,
        gathered=0.0,
        activations=float(found.left),
        moment="the optimizer's step",
    )
    return max(passing, stepping, key=lambda each: each.total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run on `devices` devices that share weights, gradients and optimizer state evenly (FSDP).

    Attributes:
        parameters: numbers in them, gains and biases too.
        flops: of the whole run: 6 a weight and token that meet, and 6 T H E a layer and token for causal attention.
        memory: on one device.
        peak: operations a second of one device, by its data sheet.
        hours: at `SHARE_OF_PEAK` of the device's peak.
        left_out: what the run does beside, whose memory and time are not in the count.
        remedies: where it does not fit, what would let it: any one of them.
    """

    name: str
    device: str
    devices: int
    precision: str
    steps: int
    batch_size: int
    seq_len: int
    parameters: int
    tokens: int
    flops: float
    memory: Memory
    device_bytes: float
    peak: float
    hours: float
    left_out: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether a tenth of the device's memory is left."""
        return self.memory.total <= ROOM * self.device_bytes

    def __str__(self) -> str:
        more = self.remedies or ("a smaller preset", "a GPU with more memory")
        remedy = "" if self.fits else f"it does not fit: use {' or '.join(more)}"
        m, shared = self.memory, ", shared" if self.devices > 1 else ""
        parts = (
            (
                m.state,
                f"{STATE_BYTES - GRADIENT_BYTES} bytes a number{shared}: weight, Adam's two moments, last weight",
            ),
            (m.gradients, f"gradients by then{shared} ({GRADIENT_BYTES} bytes a number in the end)"),
            (m.probes, f"for probed steps: the matrices once more{shared} (not with --probes none)"),
            (m.casts, "weights rounded to bfloat16"),
            (m.gathered, "gathered: two layers, a gradient, tables and head"),
            (m.activations, "activations: what is kept for the backward pass, and what is there for a moment"),
        )
        of_device = f"{m.total / 1e9:.3g} of {self.device_bytes / 1e9:.3g} GB a device"
        lines = (
            f"{self.name} on {self.devices} x {self.device}, {self.precision} (nothing was built)",
            f"parameters   {self.parameters / 1e9:.3g} billion",
            f"tokens       {self.tokens / 1e9:.4g} billion: {self.steps:,} {'step' if self.steps == 1 else 'steps'} of "
            f"{counted(self.batch_size, 'sequence')} of {self.seq_len}",
            f"FLOPs        {self.flops:.3g}",
            f"memory       {of_device} at the peak, in {m.moment}:",
            *(f"{'':13}{size / 1e9:8.3g}  {what}" for size, what in parts if size),
            f"{'':13}in tensors: kernels' scratch memory and the allocator's losses come on top;",
            f"{'':13}with --compile, steps that are not probed need less",
            f"not counted  memory and time of {', '.join(self.left_out)}" if self.left_out else "",
            f"hours        about {self.hours:.3g}, at {SHARE_OF_PEAK:.0%} of {self.peak / 1e12:.4g} TFLOP/s a device",
            f"data sheet   {DEVICES[self.device].cited}",
            remedy,
        )
        return "\n".join(line for line in lines if line)

    def record(self) -> dict[str, object]:
        """JSON-ready."""
        sheet = DEVICES[self.device]
        extra = {"fits": self.fits, "kind": "estimate", "share_of_peak": SHARE_OF_PEAK}
        return {**plain(self), **extra, "source": sheet.source, "evidence": sheet.evidence}


def flops_per_token(architecture: Architecture, seq_len: int) -> float:
    """FLOPs of a training step a token: 6 a weight that it meets, and 6 T H E a layer for causal attention.

    A causal token sees half of the sequence; logits and mixing, forwards once and backwards twice.
    """
    a = architecture
    attention = 6 * seq_len * a.n_heads * a.d_head * a.n_layers
    embeddings = 0 if a.tied else a.vocab_size * a.d_model  # looked up, not multiplied
    return 6.0 * (a.active_weights - embeddings) + attention


def plan(
    architecture: Architecture,
    *,
    device: str,
    devices: int,
    steps: int,
    batch_size: int,
    seq_len: int,
    precision: str = "bfloat16",
    micro_batch: int | None = None,
    attention: Kernel | Literal["auto"] = "auto",
    z_loss: float = 0.0,
    probed: bool = True,
    left_out: Sequence[str] = (),
) -> Plan:
    """Plan a run of `steps` batches of `batch_size` sequences, shared evenly between the devices.

    Args:
        micro_batch: sequences that a device takes at once, gradients being accumulated; all of its share if None.
        attention, z_loss, probed: as in `memory`.
        left_out: as in `Plan`, which names it.

    Raises:
        ValueError: the device is not in the table, or the batch does not go evenly over the devices.
    """
    if device not in DEVICES:
        raise ValueError(f"no data sheet for device {device!r}; use one of {', '.join(DEVICES)}")
    require_even(batch_size, devices, micro_batch, "device")
    a, sheet = architecture, DEVICES[device]
    tokens = steps * batch_size * seq_len
    flops = tokens * flops_per_token(a, seq_len)
    peak = sheet.bfloat16 if precision == "bfloat16" else sheet.float32
    here = batch_size // devices
    at_once = micro_batch or here
    sizes: dict[str, Any] = {
        "batch_size": at_once, "seq_len": seq_len, "precision": precision, "devices": devices, "attention": attention,
        "z_loss": z_loss, "probed": probed, "accumulated": at_once < here,
    }  # fmt: skip
    needed = memory(a, **sizes)
    return Plan(
        name=a.name,
        device=device,
        devices=devices,
        precision=precision,
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        parameters=count(a).parameters,
        tokens=tokens,
        flops=flops,
        memory=needed,
        device_bytes=sheet.memory,
        peak=peak,
        hours=flops / (devices * peak * SHARE_OF_PEAK) / 3600,
        left_out=tuple(left_out),
        remedies=() if needed.total <= (room := ROOM * sheet.memory) else _remedies(a, sizes, room, here, micro_batch),
    )


def _remedies(
    architecture: Architecture, sizes: dict[str, Any], room: float, here: int, micro_batch: int | None
) -> tuple[str, ...]:
    """Which options let a step fit, each taken to its end: those that do alone, or else the fewest that do together.

    Args:
        sizes: what `memory` was given.
        room: bytes that a step may need.
        here: sequences of a batch on one device, which it takes at once if `micro_batch` is None.
    """
    ends: dict[str, dict[str, Any]] = {
        "a smaller --micro-batch": {"batch_size": 1, "accumulated": here > 1},
        "a smaller --seq-len": {"seq_len": 1},
        "--probes none": {"probed": False},
        "more --devices": {"batch_size": micro_batch or 1, "accumulated": False, "devices": MANY},
    }

    def fits(names: Sequence[str]) -> bool:  # of the two that set the batch the first counts: the smaller one
        changes = {name: value for option in reversed(names) for name, value in ends[option].items()}
        return memory(architecture, **{**sizes, **changes}).total <= room

    for n in range(1, len(ends) + 1):
        if found := [" with ".join(names) for names in combinations(ends, n) if fits(names)]:
            return tuple(found)
    return ()
