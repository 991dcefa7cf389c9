"""`python -m empirics probes`: any probe on a network at initialisation, or on one that a training kept."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from empirics.bounds import BOUNDED, a_posteriori_bounds, over_random
from empirics.command_line import add_text_options, check_device, check_memory, positive
from empirics.data import Batch, batch, load_corpus, random_tokens
from empirics.kept import REMEDY, architecture_of, load_model, model_folder
from empirics.measure_tokens import tokenizer_of
from empirics.model import Transformer, build
from empirics.registry import Probe, Reading, Unavailable, find, probes
from empirics.subject import TOLERANCE, Subject
from theory.__main__ import add_architecture_options, chosen, emit, natural, whole
from theory.architecture import PRESETS
from theory.records import plain
from theory.sources import REFERENCES

SEQ_LEN = 128  # default where the context is longer
FOOTNOTES = (
    "exact: up to rounding; estimate: by fewer entries where there are more; lower estimate: can only be too small",
    "a training takes dear ones of its first micro-batch, a monitor those of the stream of its first sequence",
)


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add `probes` to the commands of a parser."""
    command = commands.add_parser(
        "probes",
        help="measure a network, by any of the probes",
        description="Measure a network at initialisation, or the model that `train` left (with --keep-checkpoint, or a "
        "checkpoint of an unfinished run): standard deviations and gradients of the residual stream, attention "
        "entropy, Jacobian norms, weight spectra, distance from normality. Norms of Jacobians are lower estimates, and "
        "come with a residual.",
    )
    what = f"{', '.join(PRESETS)}, the path of a config.json, or the folder of a run of `train`"
    add_architecture_options(command, most_tokens=SEQ_LEN, nargs="?", help=what)
    command.add_argument("--list", action="store_true", help="name every probe with what it measures, and stop")
    command.add_argument("--only", action="append", metavar="NAME", help="this probe alone; may be given again")
    command.add_argument("--bounds", action="store_true", help="put rigorous upper bounds beside the norms (slow)")
    command.add_argument(
        "--stack", type=_layers, metavar="A:B", help="layers of stack_jacobian, first and last (default all)"
    )
    command.add_argument(
        "--tolerance", type=positive, default=TOLERANCE, metavar="R",
        help=f"relative error of Jacobian norms (default {TOLERANCE:g})",
    )  # fmt: skip
    command.add_argument("--batch", type=whole, default=4, metavar="B", help="sequences (default 4)")
    command.add_argument("--seed", type=natural, default=0, help="of the weights and of the tokens (default 0)")
    add_text_options(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--out", metavar="FILE", help="write to a file instead of standard output")
    command.set_defaults(run=run)
    return command


def _layers(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not two layers; write for example 0:3")
    return int(first), int(last)


def run(arguments: argparse.Namespace) -> int:
    """Run `probes`.

    Raises:
        ValueError: bad input, in one line.
    """
    wanted = [find(name) for name in arguments.only] if arguments.only else list(probes().values())
    if not (arguments.only or arguments.list or arguments.bounds):
        wanted = [probe for probe in wanted if probe.name != "bound_ratio"]
    if arguments.list:
        rows = [_described(probe) for probe in wanted]
        emit(json.dumps(rows, indent=2) if arguments.json else _list(rows), arguments.out)
        return 0
    if arguments.config is None:
        raise ValueError("nothing to measure; name a preset, a config.json or a model's folder, or use --list")
    model, about, seq_len, kept = _model(arguments)
    tokens, targets = (torch.from_numpy(part).to(arguments.device) for part in _batch(arguments, model, seq_len, kept))
    stack = arguments.stack
    if stack is not None and not 0 <= stack[0] <= stack[1] < len(model.layers):
        last = len(model.layers) - 1
        raise ValueError(f"--stack {stack[0]}:{stack[1]} is out of range; use layers 0 to {last}, in order")
    subject = Subject(model, tokens, targets, stack=stack, tolerance=arguments.tolerance)
    readings: dict[str, Reading] = {}
    left_out: dict[str, str] = {}
    for probe in wanted:
        try:
            readings[probe.name] = probe.measure(subject)
        except Unavailable as reason:
            if arguments.only:
                raise ValueError(f"{probe.name} cannot be measured: {reason}; drop it, or name another model") from None
            left_out[probe.name] = str(reason)
    beside = _beside(subject, readings, bounds=arguments.bounds)
    if arguments.json:
        answer = _answer(model, about, arguments, seq_len, readings, left_out, beside)
        emit(json.dumps(plain(answer), indent=2, allow_nan=False), arguments.out)
    else:
        head = f"{about}, {arguments.batch} x {seq_len} {arguments.data or 'random'} tokens"
        emit("\n".join([head, *_text(readings, left_out, beside)]), arguments.out)
    return 0


def _model(arguments: argparse.Namespace) -> tuple[Transformer, str, int, Path | None]:
    """The model, what it is in a few words, the tokens of a sequence, and the folder that it was kept in."""
    device = check_device(arguments.device)
    folder = Path(arguments.config)
    if folder.is_dir():
        if arguments.embedding or arguments.init or arguments.layers:
            raise ValueError("a kept model is what it is; drop --embedding, --init and --layers, or name a preset")
        found = model_folder(folder)
        if found is None:
            raise ValueError(f"{folder} holds no model of `train`; name the folder of a run, or {REMEDY}")
        a = architecture_of(found)
        seq_len = arguments.seq_len or min(a.context, SEQ_LEN)
        if a.positions == "learned" and seq_len > a.context:
            raise ValueError(f"--seq-len {seq_len} exceeds the {a.context} learned positions; use fewer tokens")
        check_memory(a, batch_size=arguments.batch, seq_len=seq_len, all_logits=True)
        return load_model(found).to(device), f"{found}", seq_len, found
    a, longest, _ = chosen(arguments)
    seq_len = arguments.seq_len or min(longest, SEQ_LEN)
    check_memory(a, batch_size=arguments.batch, seq_len=seq_len, all_logits=True)
    about = f"{a.name} at initialisation, seed {arguments.seed}"
    return build(a, seed=arguments.seed, device=device), about, seq_len, None


def _batch(arguments: argparse.Namespace, model: Transformer, seq_len: int, kept: Path | None) -> Batch:
    size, vocabulary = arguments.batch, model.architecture.vocab_size
    if arguments.data is None:
        return random_tokens(vocabulary, seed=arguments.seed, batch_size=size, seq_len=seq_len)
    tokenizer, _ = tokenizer_of(arguments.data, kept, trained=kept is not None)
    corpus = load_corpus(arguments.data, vocab_size=vocabulary, tokenizer=tokenizer, cache=arguments.cache)
    return batch(corpus, seed=arguments.seed, step=0, batch_size=size, seq_len=seq_len)


class _Beside(NamedTuple):
    """What theory puts beside the values, by quantity and label: upper bounds, and sharp values of normal matrices."""

    upper: dict[str, Sequence[float]]
    over_random: dict[str, float]


def _beside(subject: Subject, readings: Mapping[str, Reading], *, bounds: bool) -> _Beside:
    bounded = [name for name in readings if name in BOUNDED] if bounds else []
    found = subject.shared(a_posteriori_bounds) if bounded else {}
    random: dict[str, float] = {}
    if {"weight_opnorm", "weight_norm"} <= readings.keys():
        shapes = {name: tuple(matrix.shape) for name, matrix in subject.matrices.items()}
        random = over_random(readings["weight_opnorm"], readings["weight_norm"], shapes)
    return _Beside({name: found[name] for name in bounded}, random)


# --- what is printed ----------------------------------------------------------------------------------------------


def _described(probe: Probe) -> dict[str, Any]:
    q = probe.quantity
    source = None if q.source is None or q.source.key == "convention" else f"{REFERENCES[q.source.key]}"
    return {
        "name": probe.name,
        "meaning": q.meaning,
        "about": probe.about,
        "axis": q.axis,
        "norm": q.norm or None,
        "unit": q.unit or None,
        "kind": probe.kind,
        "of": probe.of,
        "cost": probe.cost,
        "in_training_only": probe.in_training,
        "source": None if source is None else " ".join(filter(None, [source, q.source.label if q.source else ""])),
    }


def _list(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{'name':28}{'over':12}{'kind':16}{'of':24}{'cost':7}meaning"]
    for row in rows:
        where = " (in training only)" if row["in_training_only"] else ""
        lines.append(
            f"{row['name']:28}{row['axis']:12}{row['kind']:16}{row['of']:24}{row['cost']:7}{row['meaning']}{where}"
        )
    lines += ["", *FOOTNOTES]
    return "\n".join(lines)


def _answer(
    model: Transformer,
    about: str,
    arguments: argparse.Namespace,
    seq_len: int,
    readings: Mapping[str, Reading],
    left_out: Mapping[str, str],
    beside: _Beside,
) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, found in readings.items():
        row = _described(find(name)) | {"labels": found.labels, "values": found.values} | found.sureness
        if name in beside.upper:
            row["upper_bounds"] = beside.upper[name]
            row["over_bound"] = [value / bound for value, bound in zip(found.values, beside.upper[name], strict=True)]
        rows[name] = row
    answer = {
        "model": about,
        "architecture": model.architecture,
        "tokens": arguments.data or "uniformly random",
        "batch": arguments.batch,
        "seq_len": seq_len,
        "tolerance": arguments.tolerance,
        "probes": rows,
        "left_out": dict(left_out),
    }
    return answer | ({"weight_opnorm_over_random": beside.over_random} if beside.over_random else {})


def _text(readings: Mapping[str, Reading], left_out: Mapping[str, str], beside: _Beside) -> list[str]:
    """A table an axis, then what the columns are."""
    axes: dict[str, dict[str, Mapping[str, float]]] = {}
    for name, found in readings.items():
        columns = axes.setdefault(find(name).quantity.axis, {})
        columns[name] = dict(zip(found.labels, found.values, strict=True))
        if name in beside.upper:
            ratios = [value / bound for value, bound in zip(found.values, beside.upper[name], strict=True)]
            columns[f"{name}/bound"] = dict(zip(found.labels, ratios, strict=True))
        if name == "weight_opnorm" and beside.over_random:
            columns["weight_opnorm/random"] = beside.over_random
    lines: list[str] = []
    for axis, columns in axes.items():
        lines += ["", *_table("network" if axis == "none" else axis, columns)]
    lines.append("")
    for name, found in readings.items():
        lines += _note(name, found)
    if beside.upper:
        lines.append("/bound: over a rigorous upper bound at the same weights and input")
    if beside.over_random:
        lines.append("/random: over that of independent normal entries of the same mean square (sharp)")
    return lines + [f"{name}: left out; {reason}" for name, reason in left_out.items()]


def _table(axis: str, columns: Mapping[str, Mapping[str, float]]) -> list[str]:
    rows = list(dict.fromkeys(label for values in columns.values() for label in values))
    first = max(len(axis), *(len(row) for row in rows))
    widths = [max(len(name), 10) for name in columns]
    lines = [" ".join([f"{axis:<{first}}", *(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True))])]
    for row in rows:
        cells = [f"{values[row]:.4g}" if row in values else "" for values in columns.values()]
        lines.append(" ".join([f"{row:<{first}}", *(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))]))
    return lines


def _note(name: str, found: Reading) -> list[str]:
    """What a column is: meaning, kind, and how sure it is."""
    probe = find(name)
    q = probe.quantity
    of = probe.of
    if found.entries:
        fewest, most = min(found.entries), max(found.entries)
        of = f"{fewest:,} entries each" if fewest == most else f"{fewest:,} to {most:,} entries"
    sure = f"{probe.kind}, of {of}"
    if found.residuals:
        sure += f", residual at most {max(found.residuals):.1e}"
    if found.likely_upper:
        excess = max(upper / value if value else math.nan for upper, value in zip(found.likely_upper, found.values))
        sure += f", likely within {excess - 1:.1e}"
    if found.standard_errors:
        sure += f", standard error at most {max(found.standard_errors):.1e} of independent entries"
    norm, unit = f", {q.norm} norm" if q.norm else "", f", in {q.unit}" if q.unit else ""
    return [f"{name}: {q.meaning}{norm}{unit} ({sure})"]
