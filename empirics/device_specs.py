"""What a device is asked to compute, and the CPU beside it: the specification of every record of a device check.

Both sides draw the same initial weights, on the CPU, and read the same tokens. Every reference is there in two
precisions, so that what rounding does is measured and not assumed. What is compared uses GELU and a moderate learning
rate: a ReLU whose input is a rounding from 0, and a training that is about to spike, make much of little (float32 was
found 1e-3 from float64 after 20 steps at a rate of 1e-2 with ReLU, and 1e-7 at 3e-3 with GELU).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from empirics.initialisation import InitialisationSpec
from empirics.run import Spec
from empirics.run_spec import RunSpec
from theory.architecture import METHODS, Architecture, method, preset
from theory.records import fingerprint, slug

Role = Literal["reference", "device", "control"]
TRAINED = ("Vanilla", "Scaled Embed")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSpec:
    """A network at initialisation, on one device in one precision, for one batch of random tokens.

    Attributes:
        role: the side of the comparison; two sides may be the same device. The control multiplies as coarsely as a
            GPU can (TF32), which the comparison must notice.
        jacobian_tokens: length of the sequence whose Jacobian norms are measured; 0 for none.
    """

    architecture: Architecture
    label: str
    seed: int
    seq_len: int
    batch_size: int
    role: Role
    device: str = "cpu"
    precision: Literal["float32", "float64"] = "float32"
    jacobian_tokens: int = 0

    @property
    def identity(self) -> str:
        """Name of the record."""
        name = f"{self.role}-{self.architecture.name}-{slug(self.label)}-{self.precision}-seed{self.seed}"
        return f"probe-{name}-{fingerprint(self)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedSpec:
    """A training that is timed; its numbers are its own, so that nothing is compared with them."""

    run: RunSpec

    @property
    def device(self) -> str:
        """Where it runs."""
        return self.run.device

    @property
    def identity(self) -> str:
        """Name of the record."""
        return f"speed-{self.run.identity}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """Attention of a network's widths by itself, on normal tokens, for the sharp values of its Jacobian's norm.

    Attributes:
        logit_variance: of its logits; the paper's initialisation has (2/5)^2.
        strength: of the half-layer beside its identity, as `norm_samples.half_layer` has it; None for the sub-layer.
        seeds: how many weights and inputs are drawn.
    """

    architecture: Architecture
    seq_len: int
    logit_variance: float
    strength: float | None
    seeds: int
    device: str = "cpu"

    @property
    def identity(self) -> str:
        """Name of the record."""
        what = "attention" if self.strength is None else "half-layer"
        return f"norm-{what}-{self.architecture.name}-{fingerprint(self)}"


CheckSpec = Spec | ProbeSpec | SpeedSpec | NormSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Which networks the check is of.

    Attributes:
        probed: at initialisation, every method.
        trained, shallow: trained for `steps`; the second `compiled` too, which takes as long as a network is deep.
        fast: whose speed is measured, `batch` sequences of `seq_len` tokens in bfloat16, `fast_compiled` or not.
        grown: held against theory alone, at `seq_len`, over `growth_seeds` seeds; and the norm of their attention, at
            each of `norm_lengths`, of the half-layer at `half_length`.
    """

    probed: tuple[Architecture, ...]
    trained: Architecture
    shallow: Architecture
    steps: int
    compiled: bool
    fast: Architecture
    fast_compiled: bool
    batch: int
    seq_len: int
    grown: tuple[Architecture, ...]
    growth_seeds: int
    norm_lengths: tuple[int, ...]
    half_length: int


LARGE = ("350m", "1.7b", "13b")
PAPER_LOGITS = 0.16  # variance of attention's logits where queries and keys are drawn with std sqrt(2/(5 d))


def holds(device: str, architecture: Architecture, seq_len: int) -> bool:
    """Whether a device has room for a forward and backward pass of one sequence; assumed of one that is not here.

    Counted generously: the weights, and a layer's activations at forty numbers a coordinate of a token.
    """
    if not torch.cuda.is_available():
        return True
    a = architecture
    needed = 4 * (a.n_parameters + seq_len * (40 * a.d_model * a.n_layers + 4 * a.vocab_size))
    return needed <= 0.95 * torch.cuda.get_device_properties(device).total_memory


def sizes(device: str) -> Sizes:
    """A GPU's: five minutes on a fast one. The CPU's: small, since they only show that the check runs."""
    tiny, wide = (replace(preset(name), name=f"{name}-gelu", activation="gelu") for name in ("tiny", "wide"))
    shallow = replace(tiny, name="tiny-gelu-4", n_layers=4)
    common: dict[str, Any] = {
        "probed": (tiny, wide),
        "trained": tiny,
        "shallow": shallow,
        "steps": 24,
        "compiled": True,
    }
    if device.startswith("cpu"):
        return Sizes(
            **common, fast=tiny, fast_compiled=False, batch=8, seq_len=64, grown=(preset("wide"),), growth_seeds=4,
            norm_lengths=(16,), half_length=16,
        )  # fmt: skip
    return Sizes(
        **common, fast=preset("350m"), fast_compiled=True, batch=8, seq_len=2048, growth_seeds=4,
        norm_lengths=(128, 2048), half_length=64,
        grown=tuple(a for a in map(preset, LARGE) if holds(device, a, 2048)),
    )  # fmt: skip


def specifications(size: Sizes, *, device: str, seeds: Sequence[int], data: str) -> dict[str, list[CheckSpec]]:
    """What is computed, by step."""

    def probes(
        role: Role,
        on: str,
        precision: Literal["float32", "float64"] = "float32",
        labels: Sequence[str] = tuple(METHODS),
    ) -> list[CheckSpec]:
        norms = precision == "float32" and role != "control"
        return [
            ProbeSpec(
                architecture=method(a, label), label=label, seed=seed, seq_len=64, batch_size=4, role=role, device=on,
                precision=precision, jacobian_tokens=32 if norms else 0,
            )
            for a in size.probed
            for label in labels
            for seed in seeds
        ]  # fmt: skip

    def trainings(
        experiment: str, a: Architecture, on: str, labels: Sequence[str] = TRAINED, **changes: Any
    ) -> list[CheckSpec]:
        return [
            _training(method(a, label), label, experiment, seed, size.steps, on, data, **changes)
            for label in labels
            for seed in seeds
        ]

    # A CPU beside itself would be equal bit for bit; two halves of a batch, one after the other, round otherwise.
    halves: dict[str, Any] = {"micro_batch": 4} if device.startswith("cpu") else {}
    references = [
        *trainings("reference", size.trained, "cpu"),
        *trainings("reference", size.trained, "cpu", precision="bfloat16"),
        *trainings("reference", size.trained, "cpu", precision="float64"),
        *trainings("reference", size.shallow, "cpu"),
        *trainings("reference", size.shallow, "cpu", precision="float64"),
    ]
    fast = _training(
        method(size.fast, "Scaled Embed"), "Scaled Embed", "speed", 0, 40, device, data, batch_size=size.batch,
        seq_len=size.seq_len, precision="bfloat16", compile=size.fast_compiled,
    )  # fmt: skip
    grown = [
        InitialisationSpec(
            architecture=method(a, label), label=label, preset=a.name, seeds=tuple(range(size.growth_seeds)),
            seq_len=size.seq_len, batch_size=1, tokens="random", jacobian_tokens=0, device=device,
        )
        for a in size.grown
        for label in ("Vanilla", "Scaled Embed", "Embed LN")
    ]  # fmt: skip
    norms = [
        NormSpec(architecture=a, seq_len=length, logit_variance=PAPER_LOGITS, strength=strength, seeds=4, device=device)
        for a in size.grown
        for length, strength in (*((length, None) for length in size.norm_lengths), (size.half_length, 0.5))
    ]
    return {
        "references": [*references, *probes("reference", "cpu"), *probes("reference", "cpu", "float64")],
        "initialisation": [
            *probes("device", device),
            *([] if device.startswith("cpu") else probes("control", device, labels=TRAINED[:1])),
        ],
        "trainings": [
            *trainings("device", size.trained, device, **halves),
            *trainings("device", size.trained, device, precision="bfloat16", **halves),
            *trainings("device", size.shallow, device, **halves),
            *(
                trainings("device-compiled", size.shallow, device, TRAINED[:1], compile=True, **halves)
                if size.compiled
                else []
            ),
            *trainings("device-repeat-1", size.shallow, device, deterministic=True),
            *trainings("device-repeat-2", size.shallow, device, deterministic=True),
        ],
        "speed": [SpeedSpec(run=fast)],
        "growth": list[CheckSpec](grown),
        "norms": list[CheckSpec](norms),
    }


def _training(
    architecture: Architecture, label: str, experiment: str, seed: int, steps: int, device: str, data: str,
    **changes: Any,
) -> RunSpec:  # fmt: skip
    """Probed at the first step alone, since a probed step is never compiled; bytes need no tokenizer."""
    settings: dict[str, Any] = {"batch_size": 8, "seq_len": 64, "warmup": min(20, steps), "probe_every": steps}
    return RunSpec(
        architecture=architecture, label=label, experiment=experiment, seed=seed, steps=steps, learning_rate=3e-3,
        schedule="cosine", device=device, data=data, tokenizer="bytes", **settings | changes,
    )  # fmt: skip
