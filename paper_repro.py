"""Reproduce the paper's figures and judge its claims: `python paper_repro.py`.

A scale is a list of steps; every step leaves records, a record that exists is not made again, and the figures,
claims and report are drawn from the records alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from figures.selection import Record
from theory.__main__ import Parser, natural_list, run_command, whole
from theory.architecture import METHODS, Architecture, method, preset
from theory.names import unknown
from theory.records import fingerprint, read_record, read_records, write_json, write_record
from theory.words import counted

FOUR = tuple(METHODS)[:4]
PAPER_SIZES = ("350m", "1.7b", "13b")
PAPER_BATCH, PAPER_TOKENS, PAPER_STEPS, PAPER_WARMUP = 528, 2048, 50_000, 2000  # recalled, not confirmed
PAPER_BYTES = 2_000_000_000  # of C4, held in memory; the paper's 54 billion tokens would be about 100 times this
FULL_STEPS = 5000
PAPER_RATES = {"350m": 5e-4, "1.7b": 5e-4, "13b": 3e-4}
CHECK = "gpu-smoke"
CHECKED = Path(__file__).resolve().parent / "docs" / "gpu"  # device checks that come with the code
REFERENCES = ("Embed LN", "Scaled Embed")  # whose runs stand for an undisturbed one when spikes are paired


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One line of the list: what it makes and what it costs."""

    name: str
    purpose: str
    minutes: float
    specs: Callable[[], list[Any]]


def _training(architecture: Architecture, label: str, experiment: str, seed: int, rate: float, **changes: Any) -> Any:
    from empirics.run_spec import RunSpec

    base: dict[str, Any] = {
        "steps": 90,
        "batch_size": 8,
        "seq_len": 64,
        "warmup": 20,
        "schedule": "cosine",
    }
    return RunSpec(
        architecture=method(architecture, label),
        label=label,
        experiment=experiment,
        seed=seed,
        learning_rate=rate,
        **(base | changes),
    )


def _initial(
    name: str,
    label: str,
    tokens: str,
    seeds: Sequence[int],
    seq_len: int,
    jacobian_tokens: int,
    data: str = "sympy",
    device: str = "cpu",
) -> Any:
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


def _predictions() -> Step:
    def specs() -> list[Any]:
        return [_initial(name, label, "random", (), 1024, 0) for name in PAPER_SIZES for label in METHODS]

    return Step(name="predictions", purpose="theory at the paper's sizes, nothing built", minutes=0.3, specs=specs)


def smoke(seeds: Sequence[int], device: str, data: str) -> list[Step]:
    """Four methods, one learning rate: the whole path in about a minute."""
    tiny = preset("tiny")

    def initial() -> list[Any]:
        return [_initial("tiny", label, "random", seeds, 64, 16, data, device) for label in FOUR]

    def sweep() -> list[Any]:
        return [
            _training(tiny, label, "sweep", seed, 1e-2, steps=60, device=device, data=data)
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
        tiny_ones = [_initial("tiny", label, "random", seeds, 64, 64, data, device) for label in METHODS]
        wide = [
            _initial("wide", label, tokens, seeds, 64, 0, data, device)
            for tokens in ("random", "text")
            for label in METHODS
        ]
        return tiny_ones + wide

    def sweep() -> list[Any]:
        return [
            _training(tiny, label, "sweep", seed, rate, device=device, data=data)
            for rate in (3e-3, 1e-2, 3e-2)
            for seed in seeds
            for label in METHODS
        ]

    def long() -> list[Any]:
        return [
            _training(tiny, label, "long", seed, 1.5e-2, steps=200, schedule="constant", device=device, data=data)
            for seed in seeds
            for label in ("Vanilla", "Scaled Embed")
        ]

    def short() -> list[Any]:
        return [
            _training(
                tiny, "Vanilla", "short-sequences", seed, 3e-2, seq_len=32, batch_size=16, device=device, data=data
            )
            for seed in seeds
        ]

    def llama() -> list[Any]:
        return [
            _training(llama_style(tiny), label, "llama-style", seed, 1e-2, device=device, data=data)
            for seed in seeds
            for label in ("Vanilla", "Scaled Embed")
        ]

    return [
        _predictions(),
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
        return [_initial("small", label, "random", seeds, 128, 64, data, device) for label in METHODS]

    def trainings(experiment: str, labels: Sequence[str], rates: Sequence[float], schedule: str) -> list[Any]:
        return [
            _training(
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
        _predictions(),
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
            _training(
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
        _predictions(),
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


def compute(steps: Sequence[Step], out: Path, processes: int) -> None:
    """Make every record that is missing; spikes are counted once the trainings are there."""
    from empirics.spikes import count_events
    from empirics.sweep import prepare_texts, run_all

    # Text that is missing is found out before anything is computed.
    prepare_texts([spec for step in steps for spec in step.specs()], out)
    for step in steps:
        run_all(step.specs(), out, processes=processes, title=step.name)
    trainings = [record for record in own_records(steps, out) if record["kind"] == "training"]
    rows = count_events(trainings, REFERENCES)
    identity = fingerprint(rows)  # so that a definition that changes is counted again
    if trainings and (read_record(out / "records" / "spikes.json") or {}).get("id") != identity:
        write_record(out / "records" / "spikes.json", kind="spikes", body={"id": identity, "rows": rows})


def check(steps: Sequence[Step], every: Sequence[Step], out: Path, device: str, processes: int) -> None:
    """Make the device check's records that are missing, and the one that holds the two sides against each other."""
    from empirics.device_check import make_all
    from figures.device_records import write_check

    for step in steps:
        make_all(step.specs(), out, processes=processes, title=step.name)
    records = own_records(every, out)
    there = {record["id"] for record in records}
    missing = [step.name for step in every if not {spec.identity for spec in step.specs()} <= there]
    write_check(out, records, device=device, missing=missing)


def own_records(steps: Sequence[Step], out: Path) -> list[Record]:
    """The folder's records that these steps make, and the spikes; others, of other seeds or texts, are let lie."""
    names = {spec.identity for step in steps for spec in step.specs()}
    return [record for record in read_records(out / "records") if record["id"] in names or record["kind"] == "spikes"]


def draw(steps: Sequence[Step], out: Path, scale: str, checked: Record | None) -> str:
    """Figures, claims and report from the steps' records alone, and the device check beside them; the verdicts."""
    from figures.reproduction import draw_all, draw_check

    records = own_records(steps, out)
    if not records:
        raise ValueError(f"there are no records in {out / 'records'}; run without --draw-only first")
    if scale == CHECK:
        assert checked is not None  # its own
        return draw_check(records, out, scale, checked)
    return draw_all(records, out, scale, checked)


def _require(device: str, scale: str) -> None:
    from empirics.command_line import check_device

    try:
        check_device(device)
    except ValueError:
        if scale == CHECK:
            raise ValueError(
                f"scale {scale} needs a CUDA device and {device} is not here; run it where one is, or add --device cpu "
                "for a self-test of the program on this CPU, which is no evidence about a GPU"
            ) from None
        raise ValueError(
            f"scale {scale} on {device} needs that device and it is not here; use --scale cpu, or --device cpu"
        ) from None


def _device(text: str) -> str:
    """As `empirics.command_line.device_name`, which needs torch, as much else here does not."""
    from empirics.command_line import device_name

    return device_name(text)


def _settings_of(out: Path, scale: str) -> dict[str, Any]:
    """What the folder was last computed with; empty for a new one.

    Raises:
        ValueError: it belongs to another scale.
    """
    try:
        found = json.loads((out / "scale.json").read_text())
    except (OSError, ValueError):
        return {}
    if found.get("scale") != scale:
        raise ValueError(
            f"{out} holds the scale {found.get('scale')!r}; use --scale {found.get('scale')} or another --out"
        )
    return found


def _checked(arguments: argparse.Namespace, out: Path, device: str) -> Record | None:
    """The device check that the report shows: that of this run, or the one named, or the best at hand."""
    from figures.device_records import check_path, latest_check, read_check

    if arguments.scale == CHECK:
        return read_check(check_path(out, device))
    if arguments.gpu_record is not None:
        return read_check(arguments.gpu_record)
    return latest_check((CHECKED, out.parent / CHECK / "records"))


def _run(arguments: argparse.Namespace) -> int:
    build, default_seeds, default_device, default_data = SCALES[arguments.scale]
    out = Path(arguments.out or Path("results") / arguments.scale)
    before = _settings_of(out, arguments.scale) if arguments.draw_only else {}
    seeds = arguments.seeds or before.get("seeds") or range(default_seeds)
    device = arguments.device or before.get("device") or default_device
    data = arguments.data or before.get("data") or default_data
    steps = every = build(tuple(seeds), device, data)
    if arguments.only:
        known = [step.name for step in steps]
        for name in arguments.only:
            if name not in known:
                raise ValueError(unknown(f"{arguments.scale} step", name, known))
        steps = [step for step in steps if step.name in arguments.only]
    if arguments.list:
        for step in steps:
            cost = f"{step.minutes:.1f} min" if step.minutes < 100 else f"{step.minutes / 60:.0f} h"
            print(f"{step.name:16}{counted(len(step.specs()), 'record'):>11} {cost:>9}  {step.purpose}")
        return 0
    if not arguments.draw_only:
        _require(device, arguments.scale)
    start = time.monotonic()
    if not arguments.draw_only:
        _settings_of(out, arguments.scale)
        chosen = {"scale": arguments.scale, "seeds": list(seeds), "device": device, "data": data}
        write_json(out / "scale.json", chosen)
        if arguments.scale == CHECK:
            check(steps, every, out, device, arguments.processes)
        else:
            compute(steps, out, 1 if device.startswith("cuda") else arguments.processes)
    print(draw(every, out, arguments.scale, _checked(arguments, out, device)))
    print(f"{math.ceil(time.monotonic() - start)} s; report: {out / 'report.html'}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(prog="paper_repro.py", description="Reproduce the paper's figures and judge its claims.")
    top.add_argument("--scale", choices=list(SCALES), default="cpu", help="default cpu, about six minutes on 2 cores")
    top.add_argument("--only", action="append", metavar="STEP", help="run this step alone (repeatable)")
    top.add_argument("--list", action="store_true", help="print the steps with their cost, and stop")
    top.add_argument("--draw-only", action="store_true", help="draw again from the records; compute nothing")
    top.add_argument("--out", metavar="DIR", help="default results/SCALE")
    top.add_argument(
        "--seeds", type=natural_list, metavar="S,S,...", help="default 0,1,2; of cpu-full 0 to 4; of the others 0"
    )
    top.add_argument("--data", metavar="TEXT", help="sympy, files, hf:NAME, or shards (default: the scale's)")
    top.add_argument("--device", type=_device, metavar="DEVICE", help="cpu or cuda (default: the scale's)")
    top.add_argument(
        "--gpu-record", type=Path, metavar="FILE",
        help=f"the device check that the report shows (default: the latest in docs/gpu or results/{CHECK}/records)",
    )  # fmt: skip
    top.add_argument("--processes", type=whole, default=2, metavar="K", help="runs at a time on a CPU (default 2)")
    top.set_defaults(run=_run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
