"""A device held against a CPU: rows of numbers with their tolerances, from records alone.

A tolerance is measured, not chosen. In exact arithmetic both sides are equal, so that they may differ by rounding
alone, and what rounding does is known from the CPU: the distance of its float32 from its float64, or of its bfloat16
from its float32. A device sums in another order, and its distance is another draw: `MARGIN` times the CPU's is
allowed. CPU runs that differ in the order of summation alone were found up to 1.7 times apart in that measure, over 24
steps of a network whose activation is smooth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

from figures.criteria import ACCURACY
from figures.selection import METHODS, Record, Records
from theory.words import counted

MARGIN = 10.0
FLOAT32 = 2.0**-23  # no float32 number is known better than this, relatively
# One number's distance can be small by chance. Float32's is not taken below FLOAT32, where most first losses lie;
# bfloat16's is the largest of so many first steps at least.
FIRST_STEPS = {"float32": 1, "bfloat16": 5}
AGREES, DIFFERS, MEASURED = "agrees", "differs", "measured"
Row = dict[str, Any]


class Pair(NamedTuple):
    """One number on both sides, where it is from, and how far apart they may be, relatively."""

    where: str
    reference: float | None
    value: float | None
    tolerance: float


def compare(records: Records) -> list[Row]:
    """Every row that the records have both sides of.

    A row has the quantity, the reference's value and what the reference is, the device's value, their difference
    (relative, or for a count the count), the tolerance and its basis, and the verdict: `agrees`, `differs`, or
    `measured` where there is nothing to agree with. Of many numbers, the row shows the one closest to, or farthest
    beyond, its tolerance. In a `control`, which must not be within its tolerance, `agrees` says that it is not.
    """
    records = sorted(records, key=lambda record: _place(record.get("label") or record.get("spec", {}).get("label")))
    return [*_probes(records), *_trainings(records), *_repeats(records), *_theory(records), *_speeds(records)]


def _place(label: str | None) -> int:
    """A method's place in the paper's order."""
    return METHODS.index(label) if label in METHODS else len(METHODS)


def _row(quantity: str, pairs: Iterable[Pair], *, reference: str, basis: str) -> Row:
    every = list(pairs)
    worst = max(every, key=lambda pair: distance(pair.reference, pair.value) / pair.tolerance)
    apart = distance(worst.reference, worst.value)
    return {
        "quantity": quantity,
        "where": f"{worst.where}, worst of {len(every)}" if len(every) > 1 else worst.where,
        "reference": worst.reference,
        "reference_is": reference,
        "device": worst.value,
        "difference": apart,
        "tolerance": worst.tolerance,
        "basis": basis,
        "verdict": AGREES if apart <= worst.tolerance else DIFFERS,
    }


def distance(reference: float | None, value: float | None) -> float:
    """|value / reference - 1|; infinite where a side is missing or not finite, or the reference 0 and the value not."""
    if reference is None or value is None or not (math.isfinite(reference) and math.isfinite(value)):
        return math.inf
    if reference == 0:
        return 0.0 if value == 0 else math.inf
    return abs(value / reference - 1)


# --- initialisation ------------------------------------------------------------------------------------------------


def _probes(records: Records) -> Iterator[Row]:
    found: dict[tuple[str, str, int], dict[tuple[str, str], Record]] = {}
    for record in records:
        if record["kind"] == "probe":
            spec = record["spec"]
            key = (spec["architecture"]["name"], spec["label"], spec["seed"])
            found.setdefault(key, {})[spec["role"], spec["precision"]] = record
    sides = [("reference", "float32"), ("reference", "float64"), ("device", "float32")]
    whole = {key: each for key, each in found.items() if all(side in each for side in sides)}
    for name in dict.fromkeys(name for name, _, _ in whole):
        group = {key[1:]: each for key, each in whole.items() if key[0] == name}
        trios = {key: [each[side] for side in sides] for key, each in group.items()}
        yield from _profiles(name, trios)
        yield from _norms(name, trios)
        controls = {key: each["control", "float32"] for key, each in group.items() if ("control", "float32") in each}
        yield from _controls(name, trios, controls)


def _profiles(name: str, group: Mapping[tuple[str, int], list[Record]]) -> Iterator[Row]:
    quantities: list[tuple[str, Callable[[Record], list[float]]]] = [
        ("gradient growth along the depth", lambda r: [g / r["gradient"][-1] for g in r["gradient"]]),
        ("gradient norms", lambda r: r["gradient"]),
        ("residual standard deviation", lambda r: r["residual_std"]),
    ]
    for quantity, values in quantities:
        trios = [(key, *(values(record) for record in trio)) for key, trio in group.items()]
        rounding = _rounding(group, values)
        allowed = MARGIN * rounding
        basis = f"{MARGIN:g} x {rounding:.1e}, the CPU's float32 from its float64"
        pairs = [
            Pair(f"{label}, place {place}", reference, value, allowed)
            for (label, _), at, _, there in trios
            for place, (reference, value) in enumerate(zip(at, there, strict=True))
        ]
        if quantity.startswith("gradient growth"):  # the number that this is all about has a row a method
            for label in dict.fromkeys(label for label, _ in group):
                own = [pair for pair in pairs if pair.where == f"{label}, place 0"]
                yield _row(f"gradient growth, {name}, {label}", own, reference="CPU, float32", basis=basis)
        yield _row(f"{quantity}, {name}", pairs, reference="CPU, float32", basis=basis)


def _rounding(group: Mapping[tuple[str, int], list[Record]], values: Callable[[Record], list[float]]) -> float:
    """The CPU's largest distance of float32 from float64, at any place of any method."""
    apart = [
        distance(exact, value)
        for reference, truth, _ in group.values()
        for exact, value in zip(values(truth), values(reference))
    ]
    return max([FLOAT32, *apart])


def _controls(
    name: str, group: Mapping[tuple[str, int], list[Record]], controls: Mapping[tuple[str, int], Record]
) -> Iterator[Row]:
    """The same device with TF32 products must be beyond the tolerance; a device without any says nothing."""
    allowed = MARGIN * _rounding(group, lambda record: record["gradient"])
    for (label, seed), control in controls.items():
        reference, _, device = group[label, seed]
        apart = max(map(distance, reference["gradient"], control["gradient"]))
        none = control["gradient"] == device["gradient"]
        row = _measured(
            f"control: gradient norms with TF32 products, {name}, {label}",
            control["gradient"][0],
            "place 0; the difference is the largest of all places",
            "the device has no coarser products" if none else "TF32 products, which must not be within it",
        )
        verdict = MEASURED if none else AGREES if apart > allowed else DIFFERS
        yield row | {
            "reference": reference["gradient"][0],
            "reference_is": "CPU, float32",
            "difference": apart,
            "tolerance": allowed,
            "verdict": verdict,
            "control": True,
        }


def _norms(name: str, group: Mapping[tuple[str, int], list[Record]]) -> Iterator[Row]:
    """Both estimates lie within Lanczos' tolerance below the norm."""
    pairs: dict[str, list[Pair]] = {}
    for (label, _), (reference, _, device) in group.items():
        allowed = reference["jacobians"]["tolerance"] + 64 * FLOAT32
        layers = zip(reference["jacobians"]["layers"], device["jacobians"]["layers"])
        for n, (at, there) in enumerate(layers, start=1):
            for quantity in [key for key in at if key.endswith(("_branch", "_half", "J_Z"))]:
                where = f"{label}, layer {n}"
                pairs.setdefault(quantity, []).append(Pair(where, at[quantity], there[quantity], allowed))
    for quantity, own in pairs.items():
        words = quantity.replace("_", " ").replace("J Z", "J^Z")
        basis = "Lanczos' relative tolerance and its rounding (64 float32 units)"
        yield _row(f"Jacobian norm of {words}, {name}", own, reference="CPU, float32", basis=basis)


# --- trainings -----------------------------------------------------------------------------------------------------


def _trainings(records: Records) -> Iterator[Row]:
    """Losses and gradient norms step by step; the CPU's distance is the largest up to the step."""
    runs: dict[tuple[str, str, int], dict[tuple[str, str], Record]] = {}
    for record in records:
        if record["kind"] == "training":
            spec = record["spec"]
            key = (spec["architecture"]["name"], spec["label"], spec["seed"])
            runs.setdefault(key, {})[spec["experiment"], spec["precision"]] = record
    single, double, half = (("reference", precision) for precision in ("float32", "float64", "bfloat16"))
    comparisons = (  # the device's run, what it is held against, and the two whose distance is the CPU's rounding
        (("device", "float32"), single, (single, double), "CPU, float32"),
        (("device", "bfloat16"), single, (half, single), "CPU, float32"),
        (("device-compiled", "float32"), ("device", "float32"), (single, double), "device, not compiled"),
    )
    for (name, label, seed), group in runs.items():
        for run, against, (coarse, fine), reference in comparisons:
            if not {run, against, coarse, fine} <= group.keys():
                continue
            for quantity, words in (("loss", "loss"), ("gradient_norm", "gradient norm")):
                series = [group[side]["series"][quantity] for side in (run, against, coarse, fine)]
                pairs = list(_steps(*series, first=FIRST_STEPS[run[1]]))
                yield _row(
                    f"{words} of training in {run[1]}{', compiled' if 'compiled' in run[0] else ''}, {name}, {label}, "
                    f"seed {seed}",
                    pairs,
                    reference=reference,
                    basis=f"{MARGIN:g} x the CPU's {coarse[1]} from its {fine[1]}, the largest up to the step",
                )


def _steps(
    device: list[Any], reference: list[Any], coarse: list[Any], fine: list[Any], *, first: int
) -> Iterator[Pair]:
    """Step by step; one that a side does not have, since it diverged, differs."""
    around = [distance(exact, value) for exact, value in zip(fine, coarse)]
    for step in range(max(len(device), len(reference))):
        known = [each for each in around[: max(step + 1, first)] if math.isfinite(each)]
        at, value = (series[step] if step < len(series) else None for series in (reference, device))
        yield Pair(f"step {step}", at, value, MARGIN * max([FLOAT32, *known]))


def _repeats(records: Records) -> Iterator[Row]:
    twins: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        if record["kind"] == "training" and record["spec"]["deterministic"]:
            twins.setdefault((record["spec"]["label"], record["spec"]["seed"]), []).append(record["series"])
    for (label, seed), own in twins.items():
        if len(own) < 2:
            continue
        steps = [list(zip_longest(*(series[name] for series in own))) for name in ("loss", "gradient_norm")]
        unequal = sum(any(len(set(each)) > 1 for each in both) for both in zip_longest(*steps, fillvalue=()))
        yield {
            "quantity": f"deterministic training twice, {label}, seed {seed}",
            "where": f"{len(steps[0])} steps",
            "reference": 0,
            "reference_is": "steps that may differ",
            "device": unequal,
            "difference": unequal,
            "tolerance": 0,
            "basis": "the same bits: steps whose loss or gradient norm is not equal",
            "verdict": DIFFERS if unequal else AGREES,
        }


# --- beside theory, and speed ----------------------------------------------------------------------------------------


def _theory(records: Records) -> Iterator[Row]:
    """The growth of a network that is too large for the CPU, beside its prediction."""
    records = sorted(records, key=_width)
    for record in records:
        if record["kind"] != "initialisation" or record["label"] not in ACCURACY:
            continue
        predicted = next(
            each["values"][0]
            for each in record["predictions"]
            if (each["quantity"], each["kind"]) == ("gradient_growth", "sharp")
        )
        growth = next(m for m in record["measurements"] if m["quantity"] == "gradient_growth")
        measured, seeds = growth["values"][0], len(growth["seeds"])
        where = f"{record['seq_len']} random tokens, {counted(seeds, 'seed')}"
        error = growth["log_sd"][0] / math.sqrt(seeds) if seeds > 1 else 0.0
        if seeds > 1:
            where += f", standard error {error:.1%}"
        pair = Pair(where, predicted, measured, ACCURACY[record["label"]] + 2 * error)
        yield _row(
            f"gradient growth beside theory, {record['preset']}, {record['label']}",
            [pair],
            reference="theory",
            basis=f"the target of the prediction, {ACCURACY[record['label']]:.0%}, and two standard errors",
        )
    for record in records:
        if record["kind"] == "norm":
            yield _sub_layer_norm(record)


def _width(record: Record) -> int:
    """Of the network that a record is of, to have them by size; 0 where it says none."""
    return record.get("architecture", record.get("spec", {}).get("architecture", {})).get("d_model", 0)


def _sub_layer_norm(record: Record) -> Row:
    """A norm beside the sharp statement of it; where the statement claims nothing, both numbers and no verdict."""
    spec, predicted, measured = record["spec"], record["predicted"], record["measured"]
    error = record["standard_error"]
    where = f"{counted(spec['seq_len'], 'normal token')}, logit variance {spec['logit_variance']:g}; "
    where += f"{counted(record['seeds'], 'draw')}, standard error {error:.1%}"
    quantity = f"{record['statement']} beside theory, {spec['architecture']['name']}, T {spec['seq_len']}"
    if record["in_domain"]:
        allowed = record["target"] + 2 * error
        pair = Pair(where, predicted, measured, allowed)
        basis = f"the statement's target, {record['target']:.1%}, and two standard errors"
        return _row(quantity, [pair], reference="theory", basis=basis)
    row = _measured(quantity, measured, where, "outside the statement's domain; no target")
    return row | {
        "reference": predicted,
        "reference_is": "theory, outside its domain",
        "difference": distance(predicted, measured),
    }


def _speeds(records: Records) -> Iterator[Row]:
    for record in records:
        if record["kind"] != "speed":
            continue
        run = record["spec"]
        name = f"{run['architecture']['name']}, {run['precision']}{', compiled' if run['compile'] else ''}"
        where = f"{run['batch_size']} x {run['seq_len']} tokens a step, {run['micro_batch']} sequences at once"
        achieved, sheet, matmul = record["flops_a_second"], record["sheet_peak"], record["matmul_peak"]
        yield _measured(f"tokens a second, {name}", record["tokens_a_second"], where, "median of the steps; no target")
        yield _measured(f"TFLOP/s, {name}", achieved / 1e12, where, "counted from the sizes; no target")
        if sheet is not None:
            basis = f"over the data sheet's {sheet / 1e12:.0f} TFLOP/s; no target"
            yield _measured(f"MFU, {name}", achieved / sheet, where, basis)
        basis = f"over {matmul / 1e12:.3g} TFLOP/s, the best product measured in the same run; no target"
        yield _measured(f"share of the matmul peak, {name}", achieved / matmul, where, basis)
        if record["peak_bytes"] is not None:
            basis = "the plan is of a step that is not compiled"
            row = _measured(f"peak memory in GB, {name}", record["peak_bytes"] / 1e9, where, basis)
            planned = record["planned_bytes"] / 1e9
            yield row | {
                "reference": planned,
                "reference_is": "planned",
                "difference": distance(planned, row["device"]),
            }


def _measured(quantity: str, value: float, where: str, basis: str) -> Row:
    return {
        "quantity": quantity,
        "where": where,
        "reference": None,
        "reference_is": "",
        "device": value,
        "difference": None,
        "tolerance": None,
        "basis": basis,
        "verdict": MEASURED,
    }
