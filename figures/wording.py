"""Settings in words, for captions: everything is read from the records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from figures.selection import Record, Records, by_setting, has_diverged, labels_of
from theory.words import counted

KINDS_IN_WORDS = {
    "measured": "markers are measured",
    "sharp": "solid lines are sharp predictions (of the value itself)",
    "estimate": "dashed lines are estimates (what the paper writes, which may be violated)",
    "upper": "dotted lines are rigorous upper bounds",
}


def listed(values: Iterable[Any], *, most: int = 8) -> str:
    """Distinct values in order; runs of whole numbers as a range.

    >>> listed([2, 0, 1, 1])
    '0-2'
    >>> listed([0.03, 0.01])
    '0.01, 0.03'
    """
    distinct = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    whole = [value for value in distinct if isinstance(value, int)]
    if len(whole) == len(distinct) > 2 and whole[-1] - whole[0] == len(whole) - 1:
        return f"{whole[0]}-{whole[-1]}"
    words = [f"{value:g}" if isinstance(value, float) else str(value) for value in distinct]
    return ", ".join(words if len(words) <= most else [*words[: most - 1], "...", words[-1]])


def kinds(names: Iterable[str]) -> str:
    """Which lines are which kind, as a sentence."""
    return f"{'; '.join(KINDS_IN_WORDS[name] for name in names)}.".capitalize()


def architectures(records: Iterable[dict[str, Any]]) -> str:
    """The sizes of the networks, each once; what the methods differ in is left out."""
    texts = [
        f"d_model {a['d_model']}, {a['n_layers']} layers, {a['n_heads']} heads, d_ffn {a['d_ffn']}, "
        f"vocabulary {a['vocab_size']}, {'gated ' if a['gated'] else ''}{a['activation']}, {a['norm']}, "
        f"positions: {a['positions']}"
        for a in records
    ]
    return "; ".join(dict.fromkeys(texts))


def training_settings(records: Records) -> str:
    """Sizes, batches, steps, rates, seeds and data of training runs, one clause a setting."""
    clauses = [_runs(panel.records) for panel in by_setting(records)]
    data = dict.fromkeys((record["data"]["source"], str(record["data"]["digest"])[:8]) for record in records)
    sources = "; ".join(f"{source} (digest {digest})" for source, digest in data)
    return (
        f"Settings: {architectures(record['spec']['architecture'] for record in records)}. Runs: {'; '.join(clauses)}. "
        f"Methods: {', '.join(labels_of(records))}. Data: {sources}."
    )


def _runs(records: Records) -> str:
    """Runs that differ in method, rate and seed alone."""
    specs = [record["spec"] for record in records]
    first, rates = specs[0], listed(spec["learning_rate"] for spec in specs)
    many = "rates" if "," in rates else "rate"
    return (
        f"{first['experiment']}, batches of {first['batch_size']} x {first['seq_len']} tokens, "
        f"{first['steps']} steps, {first['schedule']} schedule, peak learning {many} {rates}, "
        f"seeds {listed(spec['seed'] for spec in specs)} ({counted(len(records), 'run')})"
    )


def initialisation_settings(records: Records) -> str:
    """Sizes, tokens and seeds of networks at initialisation."""
    seeds = listed(seed for record in records for seed in record["seeds"])
    return (
        f"Settings: at initialisation, {listed(record['preset'] for record in records)} "
        f"({architectures(record['architecture'] for record in records)}), sequences of "
        f"{listed(record['seq_len'] for record in records)} {listed(record['tokens'] for record in records)} tokens, "
        f"seeds {seeds}; methods: {', '.join(labels_of(records))}."
    )


def diverged(records: Iterable[Record]) -> str:
    """How many runs diverged, as a sentence; empty if none."""
    lost = [record for record in records if has_diverged(record)]
    if not lost:
        return ""
    return f" A cross marks a run that diverged ({len(lost)} here); means and bands are over the runs still alive."
