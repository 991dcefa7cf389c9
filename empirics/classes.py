"""`docs/classes.md`: every decoder class of transformers that is predicted, measured as what it is and beside it.

One record a case, resumable; predictions are not in the records but made anew with the page, from the config alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from empirics import real_classes
from empirics.agreement import ACCURACY, Scatter, decides
from empirics.class_configs import CASES, DEEPER
from empirics.comparison import disagreements, initial_stds
from empirics.decoder_growth import DecoderGrowth, distinct_tokens, measure_decoder
from empirics.measured import Measured
from theory.growth import gradient_growth
from theory.hf_config import UnknownArchitecture, parse_config
from theory.records import fingerprint, plain, read_record, slug, write_record

SEEDS, DEEPER_SEEDS, BATCH, LENGTH = 32, 24, 4, 48


def measured_class(config: Mapping[str, Any], *, seeds: Sequence[int], batch: int, seq_len: int) -> DecoderGrowth:
    """The class with the weights of its own initialiser, on distinct random tokens.

    Raises:
        ValueError: transformers has no such class, or it has no residual stream.
    """
    configuration, _ = real_classes.settings(config)
    return measure_decoder(
        lambda seed: real_classes.build(configuration, seed),
        seeds=tuple(seeds),
        batches=lambda model, seed: distinct_tokens(model, seed, batch_size=batch, seq_len=seq_len),
    )


def records(out: Path, *, only: str = "", seeds: int | None = None) -> dict[str, dict[str, Any]]:
    """The record of every case with `only` in its name; what is there for it is not measured again.

    Args:
        seeds: of every case; None for SEEDS, and DEEPER_SEEDS of the deeper ones.
    """
    import torch
    import transformers

    found: dict[str, dict[str, Any]] = {}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for label, config in tqdm(
        [(label, config) for label, config in CASES.items() if only in label],
        desc="classes",
        unit="class",
        disable=None,
    ):
        count = seeds or (DEEPER_SEEDS if label in DEEPER else SEEDS)
        spec = {"config": config, "seeds": count, "batch": BATCH, "seq_len": LENGTH, "versions": versions}
        path = out / f"{slug(label)}-{fingerprint(spec)}.json"
        record = read_record(path)
        if record is None:
            if path.exists():
                print(f"record {path} is damaged; it is made again", file=sys.stderr)
            grown = measured_class(config, seeds=range(count), batch=BATCH, seq_len=LENGTH)
            body = {
                "label": label,
                "spec": spec,
                "architecture": plain(grown.architecture),
                "growth": plain(grown.growth),
            }
            write_record(path, kind="class", body=body)
            record = read_record(path)
            assert record is not None
        found[label] = record
    return found


class Row(NamedTuple):
    """One case: what it was measured to be, and its growth beside the prediction; errors are of the logarithm."""

    label: str
    measured: Measured
    growth: float
    scatter: Scatter
    predicted: float | None
    reasons: tuple[str, ...]
    differences: tuple[str, ...]
    worst_std: float | None

    @property
    def standard_error(self) -> float:
        return self.scatter.log_sd / math.sqrt(self.scatter.averaged)

    @property
    def error(self) -> float | None:
        return None if self.predicted is None else math.log(self.predicted / self.growth)


def row(record: Mapping[str, Any]) -> Row:
    """A record beside what is predicted now."""
    seen = record["architecture"]
    measured = Measured(**(seen | {"stds": {role: tuple(values) for role, values in seen["stds"].items()}}))
    growth = record["growth"]
    seeds = len(growth["seeds"])
    scatter = Scatter(growth["log_sd"][0], seeds, seeds)
    start = Row(record["label"], measured, growth["values"][0], scatter, None, (), (), None)
    try:
        architecture = parse_config(record["spec"]["config"]).architecture
    except UnknownArchitecture as reason:
        return start._replace(reasons=(str(reason),))
    predicted = gradient_growth(architecture, record["spec"]["seq_len"], distinct=True)
    ratios = [
        abs(std / said - 1)
        for role, stds in initial_stds(measured, architecture).items()
        for std, said in zip(measured.stds[role], stds)
    ]
    return start._replace(
        predicted=predicted.value,
        reasons=predicted.reasons,
        differences=disagreements(measured, architecture),
        worst_std=max(ratios),
    )


def markdown(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The page."""
    rows = [row(record) for record in found.values()]
    first = next(iter(found.values()))
    spec = first["spec"]
    count, *others = dict.fromkeys(record["spec"]["seeds"] for record in found.values())
    seeds = f"{count} seeds" + "".join(f" ({other} of the deeper)" for other in others)
    versions = ", ".join(f"{name} {version}" for name, version in spec["versions"].items())
    lines = [
        "# The real classes of transformers, measured",
        "",
        "Made by `python -m empirics classes --markdown docs/classes.md`; do not edit. Each class is built from",
        "a config of d about 250 and 6 layers (12 and 24 where it says so) with its own initialiser (float32, no",
        f"dropout): {seeds},",
        f"{spec['batch']} sequences of {spec['seq_len']} distinct random tokens of {spec['config']['vocab_size']}",
        f"({versions}). What it is (block, order, multipliers, standard deviation of",
        "every matrix) is measured by perturbing its forward pass; the prediction is from the config alone. Error is",
        "log(predicted / measured), in per cent, with the standard error of the measurement. `agrees`: within",
        f"{100 * ACCURACY:g} %, the stated accuracy, by a measurement that chance moves by no more (else it would be",
        "undecided), and measured to be what the config says. Matrices: the largest deviation of a matrix's measured",
        "standard deviation from what the config says it is drawn with, in any layer.",
        "",
        _summary(rows),
        "",
        "| class | block | order | embedding | residual | growth measured | standard error | predicted | error "
        "| matrices | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(_line(r) for r in rows),
    ]
    notes = [f"- {r.label}: {note}." for r in rows for note in (*r.reasons, *r.differences)]
    return "\n".join([*lines, *(["", "## Where no verdict is given, and why", "", *notes] if notes else [])])


def verdict(r: Row) -> str:
    """In the page's words."""
    if r.predicted is None:
        return "unknown: no prediction"
    if r.differences:
        return "**not what the config says**"
    if r.reasons:
        return "unknown: outside the domain"
    assert r.error is not None
    if abs(r.error) > math.log1p(ACCURACY):
        return "**differs**"
    return "agrees" if decides(r.scatter) else "undecided: too few seeds"


def _line(r: Row) -> str:
    m = r.measured
    embedding = "normalised" if m.embedding_norm else _plain(m.embedding_multiplier)
    cells = (
        r.label,
        m.block or "unknown",
        {True: "parallel", False: "serial", None: "unknown"}[m.parallel],
        embedding,
        _plain(m.residual_multiplier),
        f"{r.growth:.4g}",
        f"{100 * r.standard_error:.1f} %",
        _plain(r.predicted),
        "" if r.error is None else f"{100 * r.error:+.1f} %",
        "" if r.worst_std is None else f"{100 * r.worst_std:.1f} %",
        verdict(r),
    )
    return "| " + " | ".join(cells) + " |"


def _plain(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _summary(rows: Sequence[Row]) -> str:
    inside = [r for r in rows if r.error is not None and not r.reasons]
    if not inside:
        return "No class measured is inside the domain."
    errors = np.array([abs(r.error or 0.0) for r in inside])
    worst = inside[int(errors.argmax())]
    agree = sum(verdict(r) == "agrees" for r in inside)
    return (
        f"{len(inside)} of {len(rows)} are inside the domain, and {agree} of them agree: median error "
        f"{100 * np.median(errors):.1f} %, worst {100 * (worst.error or 0.0):+.1f} % ({worst.label}; standard error "
        f"{100 * worst.standard_error:.1f} %)."
    )
