"""What a training run will need, from its sizes alone: no number is drawn and nothing is measured.

State is counted exactly, number by number of the network's parameters; everything else is an estimate that says what it
assumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from empirics.data_sheets import DEVICES
from empirics.model import Transformer
from theory.architecture import Architecture
from theory.records import plain
from theory.words import counted

SHARE_OF_PEAK = 0.4  # a convention: what well-tuned runs report at these sizes
# A number of a parameter, all float32: weight, gradient, the two moments of Adam, and the weight before the step, whose
# distance from the one after it is the update norm. AdamW's counters, 4 bytes a tensor, and where the norm of a
# matrix's row belongs, 8 bytes a row, are left out.
STATE_BYTES = 20
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
    """Bytes on one of several devices that share weights, gradients and optimizer state evenly (FSDP).

    They are added up as if all were there at once, and are more than that: gradients come as activations go. Of what is
    not held between steps, a CPU's allocator was seen to peak at 0.34 to 0.71 of the sum in float32, where its loss
    keeps no logits, and at 0.55 to 0.98 in bfloat16 (three widths, ReLU and SwiGLU, fused attention). On an H200 the
    peak of all was 0.59 of the sum of all in one run (350M, bfloat16, compiled, 16,384 tokens).

    Attributes:
        state: from the first step to the last, `STATE_BYTES` a number.
        probes: at a probed step, a copy of the matrices as they were.
        casts: what autocast rounds to bfloat16 and keeps until the backward pass: weights that are not gathered so.
        gathered: of several devices: two layers whole and one's gradient in the run's precision; tables and head with
            their gradients in float32.
        activations: of a step, kept in the run's precision for the backward pass.
    """

    state: float
    probes: float
    casts: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        return self.state + self.probes + self.casts + self.gathered + self.activations


def memory(
    architecture: Architecture, *, n_tokens: int, precision: str, devices: int = 1, probed: bool = True
) -> Memory:
    """What a training needs on each of `devices`, `n_tokens` going through the network at once on each.

    Args:
        probed: whether a probe looks at steps, as the default ones do.
    """
    a, counts, halved = architecture, count(architecture), precision == "bfloat16"
    outside = counts.parameters - counts.layers
    casts = (counts.products if devices == 1 else a.vocab_size * a.d_model) if halved else 0
    return Memory(
        state=STATE_BYTES * counts.parameters / devices,
        probes=PROBE_BYTES * counts.matrices / devices if probed else 0.0,
        casts=2.0 * casts,
        gathered=3 * (2 if halved else 4) * counts.layers / a.n_layers + 8 * outside if devices > 1 else 0.0,
        activations=activation_bytes(a, n_tokens, precision),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run on `devices` devices that share weights, gradients and optimizer state evenly (FSDP).

    Attributes:
        parameters: numbers in them, gains and biases too.
        flops: of the whole run: 6 a weight and token that meet, and 6 T H E a layer and token for causal attention.
        memory: on one device.
        peak: operations a second of one device, by its data sheet.
        hours: at `SHARE_OF_PEAK` of the device's peak.
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

    @property
    def fits(self) -> bool:
        """Whether a tenth of the device's memory is left."""
        return self.memory.total <= 0.9 * self.device_bytes

    def __str__(self) -> str:
        remedy = "" if self.fits else "it does not fit: use a smaller --micro-batch or --seq-len, or more --devices"
        m, shared = self.memory, ", shared" if self.devices > 1 else ""
        parts = (
            (
                m.state,
                f"state: {STATE_BYTES} bytes a number{shared}: weight, gradient, Adam's two moments, last weight",
            ),
            (m.probes, f"for probed steps: the matrices once more{shared} (not with --probes none)"),
            (m.casts, "weights rounded to bfloat16"),
            (m.gathered, "gathered: two layers, a gradient, tables and head"),
            (m.activations, "activations (kept, not computed again)"),
        )
        lines = (
            f"{self.name} on {self.devices} x {self.device}, {self.precision} (estimates; nothing was built)",
            f"parameters   {self.parameters / 1e9:.3g} billion",
            f"tokens       {self.tokens / 1e9:.4g} billion: {self.steps:,} {'step' if self.steps == 1 else 'steps'} of "
            f"{counted(self.batch_size, 'sequence')} of {self.seq_len}",
            f"FLOPs        {self.flops:.3g}",
            f"memory       {m.total / 1e9:.3g} of {self.device_bytes / 1e9:.3g} GB a device, all at once:",
            *(f"{'':13}{size / 1e9:8.3g}  {what}" for size, what in parts if size),
            f"hours        {self.hours:.3g} at {SHARE_OF_PEAK:.0%} of {self.peak / 1e12:.4g} TFLOP/s a device",
            f"data sheet   {DEVICES[self.device].cited}",
            remedy,
        )
        return "\n".join(line for line in lines if line)

    def record(self) -> dict[str, object]:
        """JSON-ready."""
        sheet = DEVICES[self.device]
        extra = {"fits": self.fits, "kind": "estimate", "share_of_peak": SHARE_OF_PEAK}
        return {**plain(self), **extra, "source": sheet.source, "evidence": sheet.evidence}


def kept_numbers(architecture: Architecture) -> int:
    """What one token's forward pass keeps for the backward pass: about 16 vectors of the width and 4 of the hidden
    width (of each expert that it goes to) a layer, and 4 of the vocabulary."""
    a = architecture
    hidden = (a.experts_per_token if a.n_experts else 1) * a.d_ffn
    return a.n_layers * (16 * a.d_model + 4 * hidden) + 4 * a.vocab_size


def flops_per_token(architecture: Architecture, seq_len: int) -> float:
    """FLOPs of a training step a token: 6 a weight that it meets, and 6 T H E a layer for causal attention.

    A causal token sees half of the sequence; logits and mixing, forwards once and backwards twice.
    """
    a = architecture
    attention = 6 * seq_len * a.n_heads * a.d_head * a.n_layers
    embeddings = 0 if a.tied else a.vocab_size * a.d_model  # looked up, not multiplied
    return 6.0 * (a.active_weights - embeddings) + attention


def activation_bytes(architecture: Architecture, n_tokens: int, precision: str) -> float:
    """Memory that the forward pass of `n_tokens` tokens keeps, in the run's precision."""
    return float((2 if precision == "bfloat16" else 4) * kept_numbers(architecture) * n_tokens)


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
    probed: bool = True,
) -> Plan:
    """Plan a run of `steps` batches of `batch_size` sequences, shared evenly between the devices.

    Args:
        micro_batch: sequences that a device takes at once, gradients being accumulated; all of its share if None.
        probed: as in `memory`.

    Raises:
        ValueError: the device is not in the table, or there are more devices than sequences.
    """
    if device not in DEVICES:
        raise ValueError(f"no data sheet for device {device!r}; use one of {', '.join(DEVICES)}")
    if batch_size % devices:
        raise ValueError(f"batch_size={batch_size} does not go evenly over {devices} devices; use a multiple of those")
    a, sheet = architecture, DEVICES[device]
    tokens = steps * batch_size * seq_len
    flops = tokens * flops_per_token(a, seq_len)
    peak = sheet.bfloat16 if precision == "bfloat16" else sheet.float32
    at_once = seq_len * min(micro_batch or batch_size, batch_size // devices)
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
        memory=memory(a, n_tokens=at_once, precision=precision, devices=devices, probed=probed),
        device_bytes=sheet.memory,
        peak=peak,
        hours=flops / (devices * peak * SHARE_OF_PEAK) / 3600,
    )
