"""The scales of the reproduction: the steps of each, what a step computes and what it costs.

Torch is imported where a step's specifications are asked for, and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from empirics.run_spec import RunSpec
from theory.architecture import METHODS, Architecture, method, preset
from theory.words import counted

FOUR = tuple(METHODS)[:4]
PAPER_SIZES = ("350m", "1.7b", "13b")
PAPER_BATCH, PAPER_TOKENS, PAPER_STEPS, PAPER_WARMUP = 528, 2048, 50_000, 2000  # recalled, not confirmed
PAPER_BYTES = 2_000_000_000  # of C4, held in memory; the paper's 54 billion tokens would be about 100 times this
FULL_STEPS = 5000
PAPER_RATES = {"350m": 5e-4, "1.7b": 5e-4, "13b": 3e-4}
CHECK = "gpu-smoke"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One line of the list: what it makes and what it costs."""

    name: str
    purpose: str
    minutes: float
    specs: Callable[[], list[Any]]


def training(
    architecture: Architecture, label: str, experiment: str, seed: int, rate: float, **changes: Any
) -> RunSpec:
    """A run of a method, of 90 short steps where `changes` says nothing else."""
    base: dict[str, Any] = {"steps": 90, "batch_size": 8, "seq_len": 64, "warmup": 20, "schedule": "cosine"}
    return RunSpec(
        architecture=method(architecture, label), label=label, experiment=experiment, seed=seed, learning_rate=rate,
        **(base | changes),
    )  # fmt: skip


def initialisation(
    name: str,
    label: str,
    tokens: str,
    seeds: Sequence[int],
    seq_len: int,
    jacobian_tokens: int,
    data: str = "sympy",
    device: str = "cpu",
) -> Any:
    """What a preset with a method has before training; `tokens` is random or text."""
    from empirics.initialisation import InitialisationSpec

    return InitialisationSpec(
        architecture=method(preset(name), label),
        label=label,
        preset=name,
        seeds=tuple(seeds),
        seq_len=seq_len,
        batch_size=4,
        tokens=tokens,  # type: ignore[arg-type]
        jacobian_tokens=jacobian_tokens,
        data=data if tokens == "text" else "sympy",  # random ids do not depend on any text
        device=device,
    )


def llama_style(architecture: Architecture) -> Architecture:
    """RMSNorm and SwiGLU at the same number of parameters (a hidden width of 8/3 d, in eights)."""
    hidden = round(8 * architecture.d_model / 3 / 8) * 8
    return replace(architecture, norm="rmsnorm", activation="silu", gated=True, d_ffn=hidden)


def predictions() -> Step:
    def specs() -> list[Any]:
        return [initialisation(name, label, "random", (), 1024, 0) for name in PAPER_SIZES for label in METHODS]

    return Step(name="predictions", purpose="theory at the paper's sizes, nothing built", minutes=0.3, specs=specs)


def smoke(seeds: Sequence[int], device: str, data: str) -> list[Step]:
    """Four methods, one learning rate: the whole path in about a minute."""
    tiny = preset("tiny")

    def initial() -> list[Any]:
        return [initialisation("tiny", label, "random", seeds, 64, 16, data, device) for label in FOUR]

    def sweep() -> list[Any]:
        return [
            training(tiny, label, "sweep", seed, 1e-2, steps=60, device=device, data=data)
            for seed in seeds
            for label in FOUR
        ]

    return [
        Step(name="initialisation", purpose="growth and Jacobian norms before training", minutes=0.3, specs=initial),
        Step(name="sweep", purpose="four methods at lr 1e-2", minutes=0.5, specs=sweep),
    ]


def cpu(seeds: Sequence[int], device: str, data: str) -> list[Step]:
    """Everything that two CPU cores can show in some six minutes: 60 trainings at three seeds."""
    tiny = preset("tiny")

    def initial() -> list[Any]:
        tiny_ones = [initialisation("tiny", label, "random", seeds, 64, 64, data, device) for label in METHODS]
        wide = [
            initialisation("wide", label, tokens, seeds, 64, 0, data, device)
            for tokens in ("random", "text")
            for label in METHODS
        ]
        return tiny_ones + wide

    def sweep() -> list[Any]:
        return [
            training(tiny, label, "sweep", seed, rate, device=device, data=data)
            for rate in (3e-3, 1e-2, 3e-2)
            for seed in seeds
            for label in METHODS
        ]

    def long() -> list[Any]:
        return [
            training(tiny, label, "long", seed, 1.5e-2, steps=200, schedule="constant", device=device, data=data)
            for seed in seeds
            for label in ("Vanilla", "Scaled Embed")
        ]

    def short() -> list[Any]:
        return [
            training(
                tiny, "Vanilla", "short-sequences", seed, 3e-2, seq_len=32, batch_size=16, device=device, data=data
            )
            for seed in seeds
        ]

    def llama() -> list[Any]:
        return [
            training(llama_style(tiny), label, "llama-style", seed, 1e-2, device=device, data=data)
            for seed in seeds
            for label in ("Vanilla", "Scaled Embed")
        ]

    return [
        predictions(),
        Step(
            name="initialisation",
            purpose="growth, Jacobian norms, normality before training",
            minutes=0.7,
            specs=initial,
        ),
        Step(name="sweep", purpose="five methods at three learning rates", minutes=3.3, specs=sweep),
        Step(name="long", purpose="a high constant rate, for spikes", minutes=0.8, specs=long),
        Step(
            name="short-sequences", purpose="half the sequence length at equal tokens a batch", minutes=0.3, specs=short
        ),
        Step(name="llama-style", purpose="RMSNorm and SwiGLU", minutes=0.6, specs=llama),
    ]


def cpu_full(seeds: Sequence[int], device: str, data: str) -> list[Step]:
    """A larger network over 5,000 steps: where a CPU is likeliest to see spikes of the loss itself."""
    small = preset("small")
    minutes = 0.3 / 60 / 2  # a step: 0.3 s on one core, two side by side

    def initial() -> list[Any]:
        return [initialisation("small", label, "random", seeds, 128, 64, data, device) for label in METHODS]

    def trainings(experiment: str, labels: Sequence[str], rates: Sequence[float], schedule: str) -> list[Any]:
        return [
            training(
                small, label, experiment, seed, rate, steps=FULL_STEPS, seq_len=128, warmup=200, schedule=schedule,
                device=device, data=data,
            )
            for rate in rates
            for seed in seeds
            for label in labels
        ]  # fmt: skip

    def sweep() -> list[Any]:
        return trainings("sweep", tuple(METHODS), (3e-3, 1e-2), "cosine")

    def long() -> list[Any]:
        return trainings("long", ("Vanilla", "Scaled Embed"), (1e-2,), "constant")

    return [
        predictions(),
        Step(name="initialisation", purpose="growth, Jacobian norms before training", minutes=2, specs=initial),
        Step(
            name="sweep",
            purpose="five methods at two learning rates (estimated, not run)",
            minutes=minutes * FULL_STEPS * 10 * len(seeds),
            specs=sweep,
        ),
        Step(
            name="long",
            purpose="a high constant rate, for spikes (estimated, not run)",
            minutes=minutes * FULL_STEPS * 2 * len(seeds),
            specs=long,
        ),
    ]


def gpu_smoke(seeds: Sequence[int], device: str, data: str) -> list[Step]:
    """A device held against this CPU, in about five minutes of a fast GPU.

    With --device cpu the same program holds the CPU against itself, as a test of the program.
    """
    # Minutes: with a CPU as the device, processor time as measured, over the two cores where runs go side by side; with
    # a GPU, as an H200 beside 16 cores took them. Of the speed's three minutes, all but some seconds are compilation.
    purposes = {
        "references": ("the same on the CPU in two precisions, one thread a run", 0.8, 0.8),
        "initialisation": ("gradient growth, residual stream, Jacobian norms", 0.4, 0.2),
        "trainings": ("float32, bfloat16, compiled, deterministic twice", 0.4, 0.6),
        "speed": ("tokens a second, MFU, peak memory", 0.2, 3.0),
        "growth": ("growth of the paper's networks beside theory alone", 0.1, 0.7),
        "norms": ("norms of their attention beside theory alone", 0.1, 0.4),
    }
    on_cpu = device.startswith("cpu")

    def of(name: str) -> Callable[[], list[Any]]:
        def specs() -> list[Any]:
            from empirics.device_specs import sizes, specifications

            return specifications(sizes(device), device=device, seeds=seeds, data=data)[name]

        return specs

    return [
        Step(
            name=name,
            purpose=purpose,
            minutes=of_cpu if on_cpu else of_gpu,
            specs=of(name),
        )
        for name, (purpose, of_cpu, of_gpu) in purposes.items()
    ]


def paper(size: str, seeds: Sequence[int], device: str, data: str) -> list[Step]:
    """The paper's own sizes and settings, on a GPU; two gigabytes of C4 and a BPE trained on it, or `--data SHARDS`."""
    big = preset(size)
    limit = PAPER_BYTES if data.startswith("hf:") else None  # files are read whole, shards are not held in memory

    def specs() -> list[Any]:
        return [
            training(
                big, label, "sweep", seed, PAPER_RATES[size],
                steps=PAPER_STEPS, batch_size=PAPER_BATCH, micro_batch=4, seq_len=PAPER_TOKENS, warmup=PAPER_WARMUP,
                precision="bfloat16", compile=True, data=data, data_bytes=limit, probe_every=500, device=device,
            )
            for seed in seeds
            for label in METHODS
        ]  # fmt: skip

    hours = 6 * big.n_parameters * PAPER_STEPS * PAPER_BATCH * PAPER_TOKENS / 400e12 / 3600  # at 400 TFLOP/s
    trainings = counted(len(seeds) * len(METHODS), "training")
    purpose = f"{trainings}, each about {hours:.0f} hours of an H100 (estimated, not run)"
    return [
        predictions(),
        Step(name="sweep", purpose=purpose, minutes=60 * hours * len(seeds) * len(METHODS), specs=specs),
    ]


SCALES: dict[str, tuple[Callable[[Sequence[int], str, str], list[Step]], int, str, str]] = {
    "smoke": (smoke, 1, "cpu", "sympy"),
    "cpu": (cpu, 3, "cpu", "sympy"),
    "cpu-full": (cpu_full, 5, "cpu", "sympy"),
    CHECK: (gpu_smoke, 1, "cuda", "sympy"),
    **{
        size: (lambda seeds, device, data, size=size: paper(size, seeds, device, data), 1, "cuda", "hf:allenai/c4")
        for size in PAPER_SIZES
    },
}
