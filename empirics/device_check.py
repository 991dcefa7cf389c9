"""What a device computes, beside the same on a CPU: one record a measurement.

Nothing is judged here: `figures.devices` holds the records against each other. What is measured, `device_specs` says.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from empirics.command_line import check_device
from empirics.data import random_tokens
from empirics.data_sheets import DEVICES
from empirics.device_specs import CheckSpec, NormSpec, ProbeSpec, SpeedSpec
from empirics.initialisation import InitialisationSpec
from empirics.model import build
from empirics.norm_samples import Heads, half_layer, measure, sharp_statements, sub_layer
from empirics.plan import flops_per_token, memory
from empirics.probes import gradient_profile, layer_norms
from empirics.run import corpus_of, run
from empirics.run_spec import RunSpec
from empirics.surroundings import environment, true_float32
from empirics.sweep import run_all
from empirics.train import train
from theory.records import plain, read_record, write_record

NORM_TOLERANCE = 1e-4
SETTLED = 8  # steps before the clock is read: compilation, the first probe, the allocator
MATMUL = {"cpu": 1024, "cuda": 8192}  # side of the matrices whose product is timed


def probe(spec: ProbeSpec) -> dict[str, Any]:
    """The record's body: residual standard deviation and gradient norm at every place, norms layer by layer."""
    a, dtype = spec.architecture, torch.float64 if spec.precision == "float64" else torch.float32
    layers: list[dict[str, float]] = []
    with true_float32("medium" if spec.role == "control" else "highest"):
        surroundings = environment(spec.device)
        model = build(a, seed=spec.seed, device=spec.device, dtype=dtype)
        pair = random_tokens(a.vocab_size, seed=spec.seed, batch_size=spec.batch_size, seq_len=spec.seq_len)
        tokens, targets = (torch.from_numpy(part).to(spec.device) for part in pair)
        deviation, gradient = gradient_profile(model, tokens, targets)
        if spec.jacobian_tokens:
            layers = layer_norms(model, tokens[:1, : spec.jacobian_tokens], tolerance=NORM_TOLERANCE)
    return {
        "id": spec.identity,
        "spec": plain(spec),
        "environment": surroundings,
        "residual_std": deviation,
        "gradient": gradient,
        "jacobians": {"tolerance": NORM_TOLERANCE, "lower_estimate": True, "layers": plain(layers)},
    }


def speed(spec: SpeedSpec, out: Path) -> dict[str, Any]:
    """The record's body: tokens and FLOPs a second of the training loop as it is, probes and norms included.

    Seconds are the median of the steps after the first `SETTLED`, on the wall; every step waits for the device, since
    its norms are read. Memory is the peak over the same steps, where the device tells.
    """
    asked = spec.run
    cuda = asked.device.startswith("cuda")
    total = torch.cuda.get_device_properties(asked.device).total_memory if cuda else None
    fitted = replace(asked, micro_batch=_micro_batch(asked, total))
    clock: list[float] = []
    peak: int | None = None

    def on_step(step: int, _: Mapping[str, float]) -> None:
        nonlocal peak
        clock.append(time.perf_counter())
        if cuda and step == SETTLED:
            torch.cuda.reset_peak_memory_stats(asked.device)
        if cuda and step == asked.steps - 1:
            peak = torch.cuda.max_memory_allocated(asked.device)

    surroundings = environment(asked.device)
    train(fitted, corpus_of(asked, out), on_step=on_step)
    a, tokens = asked.architecture, asked.batch_size * asked.seq_len
    seconds = float(np.median(np.diff(clock)[SETTLED:]))
    return {
        "id": spec.identity,
        "spec": plain(fitted),
        "environment": surroundings,
        "seconds_a_step": seconds,
        "tokens_a_second": tokens / seconds,
        "flops_a_second": tokens * flops_per_token(a, asked.seq_len) / seconds,
        "matmul_peak": matmul_peak(asked.device, asked.precision),
        "sheet_peak": sheet_peak(surroundings["device"], asked.precision),
        "peak_bytes": peak,
        "planned_bytes": _planned(fitted, probed=False),
        "device_bytes": total,
    }


@true_float32()
def norms(spec: NormSpec) -> dict[str, Any]:
    """The record's body: a sharp statement's prediction, and the mean norm over draws with its standard error."""
    a = spec.architecture
    heads = Heads(a.n_heads, a.d_head)
    asked: dict[str, Any] = {"heads": heads, "seeds": spec.seeds, "device": spec.device}
    if spec.strength is None:
        name, setting = "attention-sharp", sub_layer(a.d_model, spec.seq_len, spec.logit_variance, **asked)
    else:
        name = "attention-half-layer-sharp"
        setting = half_layer(a.d_model, spec.seq_len, spec.logit_variance, spec.strength, **asked)
    row = measure(sharp_statements()[name], setting)
    return {"id": spec.identity, "spec": plain(spec), "environment": environment(spec.device), **row}


def _planned(run: RunSpec, *, probed: bool) -> float:
    """Bytes at the peak of a step that is not compiled."""
    at_once = run.micro_batch or run.batch_size
    return memory(
        run.architecture, batch_size=at_once, seq_len=run.seq_len, precision=run.precision,
        gpu=run.device.startswith("cuda"), attention=run.attention, z_loss=run.z_loss, probed=probed,
        accumulated=at_once < run.batch_size,
    ).total  # fmt: skip


def _micro_batch(run: RunSpec, available: int | None) -> int:
    """The largest halving of the batch that is planned to take half of the device's memory."""
    size = run.batch_size
    while available is not None and size % 2 == 0:
        if _planned(replace(run, micro_batch=size), probed=True) <= 0.5 * available:
            break
        size //= 2
    return size


@true_float32()
def matmul_peak(
    device: str,
    precision: str,
    *,
    side: int | None = None,
    repeats: int = 10,
    now: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOPs a second of the best of some products of square matrices, in seconds of the clock `now`.

    `side` is that of the matrices; without one they are as large as the kind of device wants them.
    """
    kind = device.split(":")[0]
    side = side or MATMUL.get(kind, MATMUL["cpu"])
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a = torch.randn(side, side, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    best = float("inf")
    for _ in range(repeats):
        start = now()
        float((a @ a)[0, 0])  # waits for the product
        best = min(best, now() - start)
    return 2.0 * side**3 / best


def sheet_peak(name: str, precision: str) -> float | None:
    """The data sheet's FLOPs a second of a device of that name, or None; the sheets are of boards in full power."""
    if precision not in ("bfloat16", "float32") or re.search(r"\b(pcie|nvl|mig)\b", name.lower()):
        return None
    sheet = next((sheet for key, sheet in DEVICES.items() if re.search(rf"\b{key}\b", name.lower())), None)
    return None if sheet is None else getattr(sheet, precision)


def make(spec: CheckSpec, out: Path) -> None:
    """One record, if it is not there."""
    path = _path(spec, out)
    if isinstance(spec, RunSpec | InitialisationSpec):
        run(spec, out)
    elif read_record(path) is None:
        kind, body = _measured(spec, out)
        write_record(path, kind=kind, body=body)


def _measured(spec: ProbeSpec | SpeedSpec | NormSpec, out: Path) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, ProbeSpec):
        return "probe", probe(spec)
    return ("norm", norms(spec)) if isinstance(spec, NormSpec) else ("speed", speed(spec, out))


def _path(spec: CheckSpec, out: Path) -> Path:
    return out / "records" / f"{spec.identity}.json"


def make_all(specs: Sequence[CheckSpec], out: Path, *, processes: int, title: str) -> None:
    """All records that are missing: trainings on the CPU side by side, one thread each, the rest one after another.

    Raises:
        ValueError: the device is not here, or torch.compile does not work here.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product: deterministic runs need it
    for device in {spec.device for spec in specs}:
        check_device(device)
    side_by_side = [spec for spec in specs if isinstance(spec, RunSpec) and spec.device == "cpu"]
    if side_by_side:
        with _one_line_if_compiled(any(spec.compile for spec in side_by_side)):
            run_all(side_by_side, out, processes=processes, title=title)
    rest = [spec for spec in specs if read_record(_path(spec, out)) is None]
    for spec in tqdm(rest, desc=title, disable=not rest):
        run_spec = spec.run if isinstance(spec, SpeedSpec) else spec
        with _one_line_if_compiled(isinstance(run_spec, RunSpec) and run_spec.compile):
            make(spec, out)


@contextmanager
def _one_line_if_compiled(compiled: bool) -> Iterator[None]:
    """What torch.compile says where it fails, for want of a compiler say, as bad input."""
    try:
        yield
    except RuntimeError as error:
        if not compiled or "memory" in str(error):
            raise
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"torch.compile fails here: {first}; the other steps run with --only STEP") from None
