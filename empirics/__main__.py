"""`python -m empirics`: measure networks, train one on a text, or attack a bound."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from empirics.command_line import check_device, check_memory, positive
from empirics.data import Batch, batch, load_corpus, random_tokens
from empirics.perplexity_command import add_command as add_perplexity
from empirics.probes import measure_growth
from empirics.spike_definitions import DEFINITIONS
from empirics.tokenise_command import add_command as add_tokenise
from empirics.train_command import add_command as add_train
from theory.__main__ import (
    EXIT_UNKNOWN,
    Parser,
    add_architecture_options,
    add_version,
    chosen,
    emit,
    natural,
    run_command,
    whole,
)
from theory.architecture import Architecture
from theory.growth import gradient_growth
from theory.hf_config import UnknownArchitecture
from theory.records import plain

LARGEST_SEEDS = 100_000
MEASURE_SEQ_LEN = 128  # default where the context is longer: activations of the whole batch are kept


def batches_of(
    architecture: Architecture, *, batch_size: int, seq_len: int, data: str | None, cache: Path | None
) -> Callable[[int], Batch]:
    """Batches by seed: uniformly random ids, or text where `data` names some."""
    if data is None:
        return lambda seed: random_tokens(architecture.vocab_size, seed=seed, batch_size=batch_size, seq_len=seq_len)
    corpus = load_corpus(data, vocab_size=architecture.vocab_size, cache=cache)
    return lambda seed: batch(corpus, seed=seed, step=0, batch_size=batch_size, seq_len=seq_len)


def _measure(arguments: argparse.Namespace) -> int:
    try:
        architecture, longest, _ = chosen(arguments)
    except UnknownArchitecture as reason:
        answer = {"verdict": "unknown", "why": [str(reason)]}
        emit(json.dumps(answer) if arguments.json else f"unknown: {reason}", arguments.out)
        return EXIT_UNKNOWN
    device = check_device(arguments.device)
    if arguments.seeds > LARGEST_SEEDS:
        raise ValueError(f"--seeds {arguments.seeds} is out of range; use at most {LARGEST_SEEDS}")
    seq_len = arguments.seq_len or min(longest, MEASURE_SEQ_LEN)
    check_memory(architecture, arguments.batch * seq_len)
    batches = batches_of(
        architecture, batch_size=arguments.batch, seq_len=seq_len, data=arguments.data, cache=arguments.cache
    )
    with tqdm(total=arguments.seeds, desc="seeds", unit="seed", disable=arguments.seeds < 2) as bar:
        growth, profile, residual = measure_growth(
            architecture,
            seeds=tuple(range(arguments.seeds)),
            batches=batches,
            device=device,
            on_seed=lambda _: bar.update(1),
        )
    predicted = gradient_growth(architecture, seq_len)
    log_sd = None if growth.log_sd is None or not math.isfinite(growth.log_sd[0]) else growth.log_sd[0]
    answer: dict[str, Any] = {
        "architecture": architecture,
        "seq_len": seq_len,
        "batch": arguments.batch,
        "tokens": arguments.data or "uniformly random",
        "gradient_growth": {"value": growth.values[0], "log_sd": log_sd, "seeds": list(growth.seeds)},
        "gradient_profile": {"values": profile.values, "log_sd": profile.log_sd},
        "residual_std": {"values": residual.values, "log_sd": residual.log_sd},
        "predicted": {
            "gradient_growth": predicted.value,
            "kind": "sharp",
            "in_domain": predicted.in_domain,
            "reasons": predicted.reasons,
            "gradient_profile": predicted.gradient,
            "residual_std": predicted.residual_std,
        },
    }
    if arguments.json:
        emit(json.dumps(plain(answer), indent=2, allow_nan=False), arguments.out)
        return 0
    spread = "" if log_sd is None else f" (log sd {log_sd:.3f} over {arguments.seeds} seeds)"
    domain = "" if predicted.in_domain else ", outside its domain"
    lines = [
        f"{architecture.name}, {seq_len} tokens: gradient growth {growth.values[0]:.4g}{spread}",
        f"predicted {predicted.value:.4g} (sharp{domain}): {predicted.value / growth.values[0] - 1:+.2%}",
        f"{'place':>6}{'residual std':>14}{'gradient':>12}{'predicted':>12}",
        *(
            f"{n:>6}{std:>14.4g}{g:>12.4g}{p:>12.4g}"
            for n, (std, g, p) in enumerate(zip(residual.values, profile.values, predicted.gradient, strict=True))
        ),
    ]
    emit("\n".join(lines), arguments.out)
    return 0


def _accuracy(arguments: argparse.Namespace) -> int:
    from empirics.accuracy import cases, markdown, norm_rows
    from empirics.norm_samples import sharp_statements
    from empirics.run import run_all

    only = arguments.only or ""
    chosen_cases = [case for case in cases() if only in case.label]
    sharp = {name: statement for name, statement in sharp_statements().items() if only in name}
    if arguments.list:
        print("\n".join(f"{case.group:8} {case.label}" for case in chosen_cases))
        print("\n".join(f"norms    {name}" for name in sharp))
        return 0
    if not chosen_cases and not sharp:
        raise ValueError(f"no case or sharp statement has {only!r} in its name; --list prints them")
    norms = norm_rows(Path(arguments.out), sharp)
    records = run_all([case.spec for case in chosen_cases], Path(arguments.out), title="networks")
    emit(markdown(records, norms), arguments.markdown)
    return 0


def _attack(arguments: argparse.Namespace) -> int:
    from empirics.falsify import command

    return command(arguments)


def _spikes(arguments: argparse.Namespace) -> int:
    from empirics.spike_log import read_log, tell, text

    log = read_log(arguments.run_log, arguments.column)
    reference = None if arguments.reference is None else read_log(arguments.reference, arguments.column)
    told = tell(log, reference, arguments.definition or list(DEFINITIONS))
    emit(json.dumps(told, indent=2, allow_nan=False) if arguments.json else text(told), arguments.out)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(
        prog="python -m empirics",
        description="Measure real transformers, at initialisation, in training or on a text; attack bounds.",
    )
    add_version(top, "torch", "numpy", "scipy", "sympy")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    measure = commands.add_parser(
        "measure",
        help="gradient growth of a network at initialisation",
        description="Build the network (float32, no dropout) and measure its gradient growth beside the prediction.",
    )
    add_architecture_options(measure)
    measure.add_argument("--batch", type=whole, default=4, metavar="B", help="sequences (default 4)")
    measure.add_argument("--seeds", type=whole, default=3, metavar="K", help="seeds 0..K-1 (default 3)")
    measure.add_argument("--data", metavar="TEXT", help="text to measure on, as train takes it; default random ids")
    measure.add_argument("--cache", type=Path, metavar="DIR", help="folder that keeps tokenised text")
    measure.add_argument("--json", action="store_true", help="print JSON")
    measure.add_argument("--out", metavar="FILE", help="write to a file instead of standard output")
    measure.set_defaults(run=_measure)

    train = add_train(commands)
    add_tokenise(commands)
    perplexity = add_perplexity(commands)

    accuracy = commands.add_parser(
        "accuracy",
        help="predicted against measured growth, over a grid of sizes and every variant",
        description="Measure every case (about four minutes on 2 cores; a killed run resumes) and print the table.",
    )
    accuracy.add_argument("--only", metavar="TEXT", help="cases with this in their name")
    accuracy.add_argument("--list", action="store_true", help="list the cases")
    accuracy.add_argument("--out", default="results/accuracy", metavar="DIR", help="records (default results/accuracy)")
    accuracy.add_argument("--markdown", metavar="FILE", help="write the table, for example docs/accuracy.md")
    accuracy.set_defaults(run=_accuracy)

    attack = commands.add_parser(
        "attack",
        help="try to break an upper bound",
        description="Try to break an upper bound with random cases, structured ones, and gradient ascent on the "
        "ratio of the true norm (an explicit float64 Jacobian) to the bound, over weights and inputs. Prints the "
        "worst ratio and the witness that replays it. `attack all` keeps one record a statement and resumes. "
        "Exit status: 0 no violation, 1 a violation (ratio above 1 by more than rounding), 2 bad input.",
    )
    attack.add_argument("name", nargs="?", metavar="NAME", help="an upper bound (see --list), or all")
    attack.add_argument("--list", action="store_true", help="name every upper bound, and run nothing")
    attack.add_argument("--budget", type=whole, default=200, metavar="N", help="Jacobian evaluations (default 200)")
    attack.add_argument("--seed", type=natural, default=0, help="default 0")
    attack.add_argument(
        "--shrink", type=positive, metavar="F", help="multiply the bound (default 1); 0.9 must break a tight one"
    )
    attack.add_argument("--replay", metavar="FILE", help="recompute the ratio of the witness that --out or --json gave")
    attack.add_argument("--processes", type=whole, default=2, metavar="K", help="for all: at a time (default 2)")
    attack.add_argument("--markdown", metavar="FILE", help="write the table of ratios")
    attack.add_argument("--json", action="store_true", help="print JSON")
    attack.add_argument(
        "--out", metavar="FILE", help="keep the record; for all, every record (default results/attacks.json)"
    )
    attack.set_defaults(run=_attack)

    spikes = commands.add_parser(
        "spikes",
        help="spikes of a run, by every definition side by side",
        description="Find the spikes of a logged loss by published definitions, side by side, and say of each whether "
        "it recovered. Most raw ones of a small run are hard batches: --reference takes those out.",
    )
    spikes.add_argument(
        "run_log", type=Path, metavar="RUN", help="a run's folder, its losses.jsonl, a training record, or a CSV"
    )
    spikes.add_argument("--reference", type=Path, metavar="RUN", help="a calm run on the same batches, to pair with")
    spikes.add_argument("--column", default="loss", metavar="NAME", help="column or series (default loss)")
    spikes.add_argument("--definition", action="append", choices=DEFINITIONS, help="only this one; may be given again")
    spikes.add_argument("--json", action="store_true", help="print JSON")
    spikes.add_argument("--out", metavar="FILE", help="write to a file instead of standard output")
    spikes.set_defaults(run=_spikes)
    for command in (measure, train, perplexity):
        command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m empirics`."""
    return run_command(parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
