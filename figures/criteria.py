"""Criteria by which claims are judged from records; `figures.corruptions` has records under which they must fail."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from figures.selection import Record, Records, measurement, numbers, prediction

NORMAL_DISTANCE = 0.05  # Kolmogorov distance up to which a distribution counts as normal; a convention
# All tokens share what the biasless ReLU layers write on average, so a mean rests on d entries, not on T d: its
# standard error is std/sqrt(d). Four of them, since the largest of some hundred means is judged.
MEAN_ERRORS = 4.0
LARGE_EXCESS, SMALL_EXCESS = 10.0, 2.0  # "above 10" is a published summary's; "small" is a convention
WEAK = ("Vanilla", "Embed Detach")
STRONG = ("Scaled Embed", "Embed LN")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a criterion saw; `holds` None means that the records hold nothing to judge by."""

    holds: bool | None
    observed: str = ""
    predicted: str = ""
    error: float | None = None
    seeds: tuple[int, ...] = ()


# --- reading records ---------------------------------------------------------------------------------------------


def _of_kind(records: Records, kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def _runs(records: Records, experiment: str, *labels: str) -> list[Record]:
    found = [record for record in _of_kind(records, "training") if record["spec"]["experiment"] == experiment]
    return [record for record in found if not labels or record["spec"]["label"] in labels]


def _rates(runs: Sequence[Record]) -> list[float]:
    return sorted({run["spec"]["learning_rate"] for run in runs})


def _at(runs: Sequence[Record], rate: float, *labels: str) -> list[Record]:
    return [run for run in runs if run["spec"]["learning_rate"] == rate and run["spec"]["label"] in labels]


def _final(run: Record) -> float:
    """Held-out loss at the end; infinite for a diverged run."""
    value = run["final"]["heldout_loss"]
    return math.inf if value is None else float(value)


def _median_norm(run: Record) -> float:
    values = [math.inf if value is None else value for value in run["series"]["gradient_norm"]]
    return float(np.median(values)) if values else math.inf  # a loss that is not finite at step 0 has no gradient


def _seeds(runs: Sequence[Record]) -> tuple[int, ...]:
    return tuple(sorted({run["spec"]["seed"] for run in runs}))


def _band(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


# --- criteria ----------------------------------------------------------------------------------------------------


def half_layers_below(quantity: str, measured: str) -> Callable[[Records], Finding]:
    """Whether every measured half-layer's norm is at most 1 + the estimate of its branch.

    Args:
        quantity: the branch's, as it is predicted.
        measured: the half-layer's, as a layer's row of `jacobians` names it.
    """

    def judge(records: Records) -> Finding:
        ratios: list[float] = []
        seeds: set[int] = set()
        for record in _of_kind(records, "initialisation"):
            estimate = prediction(record, quantity, "estimate")
            if estimate is None or not record.get("jacobians"):
                continue
            rows = record["jacobians"]["layers"]
            ratios += [row[measured] / (1 + bound) for row, bound in zip(rows, estimate, strict=True)]
            seeds.add(record["jacobians"]["seed"])
        if not ratios:
            return Finding(holds=None)
        largest = float(np.max(ratios))  # not a number if one of them is not
        return Finding(
            holds=largest <= 1,
            observed=f"measured over bound {min(ratios):.3f} to {largest:.3f} in {len(ratios)} half-layers",
            predicted="at most 1",
            error=largest - 1,
            seeds=tuple(sorted(seeds)),
        )

    return judge


def norm_jacobian(records: Records) -> Finding:
    """Whether the normalisation's Jacobian has norm 1/sigma, and the paper's form misses one direction and no more."""
    found = [record for record in _of_kind(records, "initialisation") if record.get("norm_jacobian")]
    if not found:
        return Finding(holds=None)
    norm = max(abs(record["norm_jacobian"]["opnorm_sigma"] - 1) for record in found)
    exact = max(record["norm_jacobian"]["exact_gap"] for record in found)
    gaps = [record["norm_jacobian"]["paper_gap"] for record in found]
    allowed = [1.5 / math.sqrt(record["architecture"]["d_model"]) for record in found]
    return Finding(
        holds=norm < 1e-9 and all(gap < limit for gap, limit in zip(gaps, allowed, strict=True)),
        observed=f"norm 1/sigma to {norm:.1e}; the form misses 11'/d, {max(gaps):.3f} in Frobenius norm "
        f"(with it {exact:.1e})",
        predicted="norm exactly 1/sigma; one direction of d missing, 1/sqrt(d)",
        error=max(gaps),
        seeds=tuple(sorted({record["jacobians"]["seed"] for record in found})),
    )


def normality(records: Records) -> Finding:
    """Whether residual streams and weights are normal with mean 0 at step 0; the end of training is told beside."""
    runs = _runs(records, "sweep")
    if not runs:
        return Finding(holds=None)

    def worst(moment: str) -> tuple[float, float]:
        distance, shift = 0.0, 0.0
        for run in runs:
            entries = run["series"]["distributions"].get(moment)
            for item in (*entries["places"], *entries["weights"].values()) if entries else ():
                distance = max(distance, item.get("normal_distance", 1.0))
                shift = max(shift, abs(item["mean"]) / item["std"] if item["std"] else 1.0)
        return distance, shift

    (start, start_shift), (end, end_shift) = worst("start"), worst("end")
    allowed = MEAN_ERRORS / math.sqrt(min(run["spec"]["architecture"]["d_model"] for run in runs))
    return Finding(
        holds=start <= NORMAL_DISTANCE and start_shift <= allowed,
        observed=f"largest distance from normality {start:.3f} at initialisation, {end:.3f} after training; largest "
        f"|mean|/std {start_shift:.3f} and {end_shift:.3f}",
        predicted=f"at most {NORMAL_DISTANCE}, and {allowed:.2g} for the mean",
        error=start,
        seeds=_seeds(runs),
    )


def paper_sizes(records: Records) -> Finding:
    """Whether eq. (15) at 350M is large in the first layer of `WEAK`, and small in every layer of `STRONG`."""
    bounds = {
        record["label"]: prediction(record, "ffn_branch", "estimate")
        for record in _of_kind(records, "prediction")
        if record["preset"] == "350m"
    }
    if any(bounds.get(label) is None for label in (*WEAK, *STRONG)):
        return Finding(holds=None)
    first = {label: float(bounds[label][0]) for label in WEAK}  # type: ignore[index]
    largest = {label: float(np.max(bounds[label])) for label in STRONG}  # type: ignore[arg-type]
    return Finding(
        holds=all(value > LARGE_EXCESS for value in first.values())
        and all(value < SMALL_EXCESS for value in largest.values()),
        observed="excess over 1 at 350M: "
        + ", ".join(f"{name} {value:.3g} (first layer)" for name, value in first.items())
        + ", "
        + ", ".join(f"{name} {value:.3g} (largest)" for name, value in largest.items()),
        predicted="26.3, 26.3, 0.82, 0.52 with the std at the embedding",
    )


def _separated(
    runs: Sequence[Record], value: Callable[[Record], float], low: tuple[str, ...], high: tuple[str, ...], what: str
) -> Finding:
    """Whether every run of `high` lies above every run of `low`, at the highest learning rate."""
    if not runs:
        return Finding(holds=None)
    rate = _rates(runs)[-1]
    lows, highs = _at(runs, rate, *low), _at(runs, rate, *high)
    if not lows or not highs:
        return Finding(holds=None)
    if len(_seeds([*lows, *highs])) < 2:
        return Finding(holds=None, observed="one seed has no band; two are needed", seeds=_seeds([*lows, *highs]))
    low_values, high_values = [value(run) for run in lows], [value(run) for run in highs]
    return Finding(
        holds=min(high_values) > max(low_values),
        observed=f"{what} at lr {rate:g}: {' and '.join(high)} {_band(high_values)}, "
        f"{' and '.join(low)} {_band(low_values)}",
        predicted="no overlap of the seeds' bands",
        seeds=_seeds([*lows, *highs]),
    )


def gradient_norms(records: Records) -> Finding:
    """Whether the median gradient norms of `WEAK` lie above those of `STRONG`."""
    return _separated(_runs(records, "sweep"), _median_norm, STRONG, WEAK, "median gradient norm")


def final_losses(records: Records) -> Finding:
    """Whether the final held-out losses of `WEAK` lie above those of `STRONG`."""
    return _separated(_runs(records, "sweep"), _final, STRONG, WEAK, "final held-out loss")


def _event_rows(records: Records, quantity: str, definition: str) -> list[dict[str, Any]]:
    rows = [row for record in _of_kind(records, "spikes") for row in record["rows"]]
    return [row for row in rows if row["quantity"] == quantity and row["definition"] == definition]


def spikes(records: Records) -> Finding:
    """Whether every seed of Vanilla has a paired loss spike, and `STRONG` none."""
    losses = [row for row in _event_rows(records, "loss", "robust-deviation") if row["experiment"] != "short-sequences"]
    if not losses:
        return Finding(holds=None)
    rate = max(row["learning_rate"] for row in losses)
    at_rate = [row for row in losses if row["learning_rate"] == rate or row["experiment"] == "long"]
    paired = [row for row in at_rate if row["paired"] is not None]
    vanilla: dict[int, int] = {}
    for row in paired:
        if row["label"] == "Vanilla":
            vanilla[row["seed"]] = vanilla.get(row["seed"], 0) + len(row["paired"])
    others = sum(len(row["paired"]) for row in paired if row["label"] in STRONG)
    if not vanilla:
        return Finding(holds=None)
    if len(vanilla) < 2:
        return Finding(holds=None, observed="one seed is not judged; two are needed", seeds=tuple(vanilla))
    return Finding(
        holds=min(vanilla.values()) > 0 and others == 0,
        observed=f"paired loss spikes: Vanilla {sum(vanilla.values())} over {len(vanilla)} seeds{_outcomes(paired)}, "
        f"{' and '.join(STRONG)} {others}; " + _event_summary(records),
        predicted="at least one for Vanilla in every seed, none for the others",
        seeds=tuple(sorted(vanilla)),
    )


def _outcomes(rows: list[dict[str, Any]]) -> str:
    """How Vanilla's paired events ended, in brackets."""
    counts = Counter(end for row in rows if row["label"] == "Vanilla" for end in row.get("paired_outcomes") or ())
    return f" (outcomes: {', '.join(f'{count} {end}' for end, count in sorted(counts.items()))})" if counts else ""


def _event_summary(records: Records) -> str:
    rows = [
        row for row in _event_rows(records, "gradient_norm", "twice-median") if row["experiment"] in ("sweep", "long")
    ]
    parts: list[str] = []
    for label in dict.fromkeys(row["label"] for row in rows):
        own = [row for row in rows if row["label"] == label]
        raw = sum(len(row["raw"]) for row in own)
        paired = sum(len(row["paired"] or ()) for row in own)
        parts.append(f"{label} {raw} ({paired})")
    return "gradient-norm events raw (paired): " + ", ".join(parts)


def rate_gap(records: Records) -> Finding:
    """Whether the gap of mean final losses grows with the rate, and Scaled Embed trains at as high a rate."""
    runs = _runs(records, "sweep", "Vanilla", "Scaled Embed")
    rates = [rate for rate in _rates(runs) if _at(runs, rate, "Vanilla") and _at(runs, rate, "Scaled Embed")]
    if len(rates) < 2:
        return Finding(holds=None)
    means = {
        label: [float(np.mean([_final(run) for run in _at(runs, rate, label)])) for rate in rates]
        for label in ("Vanilla", "Scaled Embed")
    }
    gaps = [weak - strong for weak, strong in zip(means["Vanilla"], means["Scaled Embed"], strict=True)]
    best = {label: rates[int(np.argmin(values))] for label, values in means.items()}
    return Finding(
        holds=all(after > before for before, after in itertools.pairwise(gaps))
        and best["Scaled Embed"] >= best["Vanilla"],
        observed="loss gap "
        + ", ".join(f"{gap:.3f} at {rate:g}" for rate, gap in zip(rates, gaps, strict=True))
        + f"; best rate {best['Vanilla']:g} (Vanilla), {best['Scaled Embed']:g} (Scaled Embed)",
        predicted="a gap that grows with the rate, and a best rate at least as high",
        seeds=_seeds(runs),
    )


def short_sequences(records: Records) -> Finding:
    """Whether Vanilla has fewer gradient-norm events with half the sequence length, at the same rate and seeds."""
    rows = [row for row in _event_rows(records, "gradient_norm", "twice-median") if row["label"] == "Vanilla"]
    short = [row for row in rows if row["experiment"] == "short-sequences"]
    if not short:
        return Finding(holds=None)
    rate, seeds = short[0]["learning_rate"], {row["seed"] for row in short}
    long = [
        row for row in rows if row["experiment"] == "sweep" and row["learning_rate"] == rate and row["seed"] in seeds
    ]
    if not long:
        return Finding(holds=None)
    few, many = sum(len(row["raw"]) for row in short), sum(len(row["raw"]) for row in long)
    return Finding(
        holds=few < many,
        observed=f"gradient-norm events of Vanilla at lr {rate:g}: {few} with {short[0]['seq_len']} tokens a sequence, "
        f"{many} with {long[0]['seq_len']}",
        predicted="fewer with shorter sequences",
        seeds=tuple(sorted(seeds)),
    )


def xavier(records: Records) -> Finding:
    """Whether final losses without the depth factor lie above those of Scaled Embed."""
    return _separated(
        _runs(records, "sweep"), _final, ("Scaled Embed",), ("Xavier + Scaled Embed",), "final held-out loss"
    )


def llama_style(records: Records) -> Finding:
    """Whether Vanilla's losses and gradient norms lie above Scaled Embed's with RMSNorm and SwiGLU."""
    runs = _runs(records, "llama-style")
    loss = _separated(runs, _final, ("Scaled Embed",), ("Vanilla",), "final held-out loss")
    norm = _separated(runs, _median_norm, ("Scaled Embed",), ("Vanilla",), "median gradient norm")
    if loss.holds is None or norm.holds is None:
        return loss
    return Finding(
        holds=loss.holds and norm.holds,
        observed=f"{loss.observed}; {norm.observed}",
        predicted=loss.predicted,
        seeds=loss.seeds,
    )


def untested(records: Records) -> Finding:
    """Nothing to judge 13B by; what is predicted there."""
    at_13b = {
        record["label"]: prediction(record, "gradient_growth", "sharp")
        for record in _of_kind(records, "prediction")
        if record["preset"] == "13b"
    }
    words = ", ".join(f"{label} {float(value[0]):.3g}" for label, value in at_13b.items() if value is not None)
    return Finding(holds=None, predicted=f"sharp gradient growth at 13B: {words}" if words else "")


def post_ln(records: Records) -> Finding:
    """Nothing to judge Post-LN's training by; where its growth at initialisation is."""
    return Finding(
        holds=None, predicted="growth at initialisation: docs/accuracy.md has Post-LN, predicted and measured"
    )


def detach(records: Records) -> Finding:
    """Step 0 of runs that share seed, rate and batch: places' gradients equal, the embedding's a tenth."""
    runs = [run for run in _runs(records, "sweep", *WEAK) if run["series"]["place_gradient"]]  # its loss was finite
    pairs: dict[tuple[int, float], dict[str, Record]] = {}
    for run in runs:
        pairs.setdefault((run["spec"]["seed"], run["spec"]["learning_rate"]), {})[run["spec"]["label"]] = run
    whole = [pair for pair in pairs.values() if len(pair) == 2]
    if not whole:
        return Finding(holds=None)
    gaps: list[float] = []
    factor_gaps: list[float] = []
    for pair in whole:
        vanilla, detached = (numbers(pair[label]["series"]["place_gradient"][0]) for label in WEAK)
        gaps.append(float(np.max(np.abs(detached / vanilla - 1))))
        before, after = (numbers(pair[label]["series"]["embedding_gradient"][:1]) for label in WEAK)
        # The embedding norm of a factor-g gradient is g times Vanilla's only if nothing else changed.
        factor = pair["Embed Detach"]["spec"]["architecture"]["embedding_gradient"]
        factor_gaps.append(float(np.max(np.abs(after / before / factor - 1))))
    gap, factor_gap = float(np.max(gaps)), float(np.max(factor_gaps))  # not a number if one of them is not
    tolerance = 1e-5  # float32: sums of some ten thousand rounded terms
    return Finding(
        holds=gap <= tolerance and factor_gap <= tolerance,
        observed=f"activation gradients differ by {gap:.1e}, the embedding gradient's factor by {factor_gap:.1e}, "
        f"over {len(whole)} pairs at step 0",
        predicted="0 and 0",
        error=max(gap, factor_gap),
        seeds=_seeds(runs),
    )


ACCURACY = {"Vanilla": 0.05, "Scaled Embed": 0.01, "Embed LN": 0.01}  # the targets that the recursion claims


def accuracy(records: Records) -> Finding:
    """Whether predicted growth is within `ACCURACY` of the measured, at widths from 256."""
    found = [record for record in _of_kind(records, "initialisation") if record["label"] in ACCURACY]
    found = [record for record in found if record["architecture"]["d_model"] >= 256]
    if not found:
        return Finding(holds=None)
    parts: list[str] = []
    worst, holds = 0.0, True
    for record in found:
        predicted, measured = prediction(record, "gradient_growth", "sharp"), measurement(record, "gradient_growth")
        assert predicted is not None
        assert measured is not None
        error = float(predicted[0] / measured[0][0] - 1)
        standard = float(measured[1][0]) / math.sqrt(len(record["seeds"]))
        holds = holds and abs(error) <= ACCURACY[record["label"]]
        worst = max(worst, abs(error))
        parts.append(f"{record['label']} on {record['tokens']} tokens {error:+.2%} (se {standard:.2%})")
    return Finding(
        holds=holds,
        observed="predicted over measured growth less 1: " + ", ".join(parts),
        predicted="within 5 % for Vanilla, 1 % for Scaled Embed and Embed LN",
        error=worst,
        seeds=tuple(found[0]["seeds"]),
    )
