"""What a training run will need, from its sizes alone: nothing is built and nothing is measured.

Every line is an estimate, and says what it assumes.
"""

from __future__ import annotations

from dataclasses import dataclass

from theory.architecture import Architecture
from theory.records import plain
from theory.words import counted

SHARE_OF_PEAK = 0.4  # a convention: what well-tuned runs report at these sizes
STATE_BYTES = 16  # a parameter: float32 weight, gradient and the two moments of Adam


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU by its maker's data sheet: operations a second of dense matrix products, memory in bytes.

    Attributes:
        bfloat16, float32: in that precision (float32 itself, not TF32); half of what a sheet says "with sparsity".
        source: the sheet.
    """

    bfloat16: float
    float32: float
    memory: float
    source: str


DEVICES = {
    "a100": Device(
        bfloat16=312e12, float32=19.5e12, memory=80e9, source="NVIDIA A100 Tensor Core GPU data sheet, 80GB SXM"
    ),
    "h100": Device(bfloat16=989e12, float32=67e12, memory=80e9, source="NVIDIA H100 Tensor Core GPU data sheet, SXM"),
    "h200": Device(bfloat16=989e12, float32=67e12, memory=141e9, source="NVIDIA H200 Tensor Core GPU data sheet, SXM"),
    "l40s": Device(bfloat16=362e12, float32=91.6e12, memory=48e9, source="NVIDIA L40S GPU data sheet"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run on `devices` devices that share weights, gradients and optimiser state evenly (FSDP).

    Attributes:
        flops: of the whole run: 6 a weight and token that meet, and 6 T H E a layer and token for causal attention.
        state_bytes, activation_bytes: on one device; activations of a step, kept in the run's precision.
        gathered_bytes: on one of several devices: two layers whole and one's gradient in the run's precision, tables
            and head with their gradients in float32.
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
    state_bytes: float
    gathered_bytes: float
    activation_bytes: float
    device_bytes: float
    peak: float
    hours: float

    @property
    def fits(self) -> bool:
        """Whether a tenth of the device's memory is left."""
        return self.needed_bytes <= 0.9 * self.device_bytes

    @property
    def needed_bytes(self) -> float:
        """On one device, all together."""
        return self.state_bytes + self.gathered_bytes + self.activation_bytes

    def __str__(self) -> str:
        remedy = "" if self.fits else "it does not fit: use a smaller --micro-batch or --seq-len, or more --devices"
        gathered = f"gathered {self.gathered_bytes / 1e9:.3g}, " if self.gathered_bytes else ""
        lines = (
            f"{self.name} on {self.devices} x {self.device}, {self.precision} (estimates; nothing was built)",
            f"parameters   {self.parameters / 1e9:.3g} billion",
            f"tokens       {self.tokens / 1e9:.4g} billion: {self.steps:,} {'step' if self.steps == 1 else 'steps'} of "
            f"{counted(self.batch_size, 'sequence')} of {self.seq_len}",
            f"FLOPs        {self.flops:.3g}",
            f"memory       {self.needed_bytes / 1e9:.3g} of {self.device_bytes / 1e9:.3g} GB a device: state "
            f"{self.state_bytes / 1e9:.3g} ({STATE_BYTES} bytes a parameter, shared), {gathered}activations "
            f"{self.activation_bytes / 1e9:.3g} (kept, not computed again)",
            f"hours        {self.hours:.3g} at {SHARE_OF_PEAK:.0%} of {self.peak / 1e12:.0f} TFLOP/s a device "
            f"({DEVICES[self.device].source})",
            remedy,
        )
        return "\n".join(line for line in lines if line)

    def record(self) -> dict[str, object]:
        """JSON-ready."""
        extra = {"fits": self.fits, "kind": "estimate", "share_of_peak": SHARE_OF_PEAK}
        return {**plain(self), **extra, "source": DEVICES[self.device].source}


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
    return 6.0 * (a.active_parameters - embeddings) + attention


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
) -> Plan:
    """Plan a run of `steps` batches of `batch_size` sequences, shared evenly between the devices.

    Args:
        micro_batch: sequences that a device takes at once, gradients being accumulated; all of its share if None.

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
    tables = a.vocab_size * a.d_model * (1 if a.tied else 2) + (
        a.context * a.d_model if a.positions == "learned" else 0
    )
    gathered = 3 * (2 if precision == "bfloat16" else 4) * (a.n_parameters - tables) / a.n_layers + 8 * tables
    return Plan(
        name=a.name,
        device=device,
        devices=devices,
        precision=precision,
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        parameters=a.n_parameters,
        tokens=tokens,
        flops=flops,
        state_bytes=STATE_BYTES * a.n_parameters / devices,
        gathered_bytes=gathered if devices > 1 else 0.0,
        activation_bytes=activation_bytes(
            a, seq_len * min(micro_batch or batch_size, batch_size // devices), precision
        ),
        device_bytes=sheet.memory,
        peak=peak,
        hours=flops / (devices * peak * SHARE_OF_PEAK) / 3600,
    )
