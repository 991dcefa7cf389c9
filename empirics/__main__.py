"""`python -m empirics`: measure networks, train one on a text, or attack a bound."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from empirics.command_line import device_name, positive, require_whole_page
from empirics.distributed import silenced_after_first
from empirics.measure_command import add_command as add_measure
from empirics.perplexity_command import add_command as add_perplexity
from empirics.probes_command import add_command as add_probes
from empirics.spike_definitions import DEFINITIONS
from empirics.sweep_command import add_command as add_sweep
from empirics.tokenise_command import add_command as add_tokenise
from empirics.train_command import add_command as add_train
from theory.__main__ import Parser, add_version, emit, natural, run_command, whole


def _accuracy(arguments: argparse.Namespace) -> int:
    from empirics.accuracy import cases, markdown, norm_rows
    from empirics.norm_samples import sharp_statements
    from empirics.sweep import run_all

    only = arguments.only or ""
    chosen_cases = [case for case in cases() if only in case.label]
    sharp = {name: statement for name, statement in sharp_statements().items() if only in name}
    if arguments.list:
        print("\n".join(f"{case.group:8} {case.label}" for case in chosen_cases))
        print("\n".join(f"norms    {name}" for name in sharp))
        return 0
    if not chosen_cases and not sharp:
        raise ValueError(f"no case or sharp statement has {only!r} in its name; --list prints them")
    require_whole_page(arguments.markdown, only)
    norms = norm_rows(Path(arguments.out), sharp)
    out = Path(arguments.out)
    records = run_all([case.spec for case in chosen_cases], out, title="networks")
    emit(markdown(list(zip(chosen_cases, records, strict=True)), norms, out / "data"), arguments.markdown)
    return 0


def _classes(arguments: argparse.Namespace) -> int:
    from empirics.class_configs import CASES
    from empirics.classes import markdown, records

    only = arguments.only or ""
    if not any(only in label for label in CASES):
        raise ValueError(f"no class has {only!r} in its name; use one of {'; '.join(CASES)}")
    require_whole_page(arguments.markdown, only)
    emit(markdown(records(Path(arguments.out), only=only, seeds=arguments.seeds)), arguments.markdown)
    return 0


def _attack(arguments: argparse.Namespace) -> int:
    from empirics.falsify import command

    return command(arguments)


def _spikes(arguments: argparse.Namespace) -> int:
    from empirics.spike_lag import lag_text, tell_lags
    from empirics.spike_log import read_log, tell, text

    log = read_log(arguments.run_log, arguments.column)
    reference = None if arguments.reference is None else read_log(arguments.reference, arguments.column)
    names = arguments.definition or list(DEFINITIONS)
    told = tell(log, reference, names)
    shown = text(told)
    if arguments.lag:
        told["lag"] = tell_lags(arguments.run_log, log, arguments.reference, reference, names)
        shown += "\n" + lag_text(told["lag"])
    emit(json.dumps(told, indent=2, allow_nan=False) if arguments.json else shown, arguments.out)
    return 0


def _several(text: str) -> int:
    """A whole number from 2 for argparse: a standard error needs two."""
    if (value := whole(text)) < 2:
        raise argparse.ArgumentTypeError(f"{value} seed has no standard error; use at least 2")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(
        prog="python -m empirics",
        description="Measure real transformers, at initialisation, in training, after it or on a text; attack bounds.",
    )
    add_version(top, "torch", "numpy", "scipy", "sympy")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    measure = add_measure(commands)
    train = add_train(commands)
    sweep = add_sweep(commands)
    add_tokenise(commands)
    perplexity = add_perplexity(commands)

    accuracy = commands.add_parser(
        "accuracy",
        help="predicted against measured growth, over a grid of sizes and every variant",
        description="Measure every case and print the table: some twenty minutes on 2 cores; a killed run resumes.",
    )
    accuracy.add_argument("--only", metavar="TEXT", help="cases with this in their name")
    accuracy.add_argument("--list", action="store_true", help="list the cases")
    accuracy.add_argument(
        "--out", default="results/accuracy", metavar="DIR", help="of the records (default results/accuracy)"
    )
    accuracy.add_argument("--markdown", metavar="FILE", help="write the table, for example docs/accuracy.md")
    accuracy.set_defaults(run=_accuracy)

    classes = commands.add_parser(
        "classes",
        help="every decoder class of transformers: what it is, and its growth beside the prediction",
        description="Measure every class at d about 250, 6 layers and some at 12 and 24 (about fifteen minutes on one "
        "core; a killed run resumes) and print the table.",
    )
    classes.add_argument("--only", metavar="TEXT", help="classes with this in their name")
    classes.add_argument("--seeds", type=_several, metavar="K", help="seeds 0..K-1 (default 32, deeper ones 24)")
    classes.add_argument(
        "--out", default="results/classes", metavar="DIR", help="of the records (default results/classes)"
    )
    classes.add_argument("--markdown", metavar="FILE", help="write the table, for example docs/classes.md")
    classes.set_defaults(run=_classes)

    attack = commands.add_parser(
        "attack",
        help="try to break an upper bound",
        description="Try to break an upper bound with random cases, structured ones, and gradient ascent on the "
        "ratio of the true norm (an explicit float64 Jacobian) to the bound, over weights and inputs. Prints the "
        "largest ratio and the witness that replays it. `attack all` keeps one record a statement and resumes. "
        "Exit status: 0 no violation, 1 a violation (ratio above 1 by more than rounding), 2 bad input.",
    )
    attack.add_argument("name", nargs="?", metavar="NAME", help="an upper bound (see --list), or all")
    attack.add_argument("--list", action="store_true", help="name every upper bound, and run nothing")
    attack.add_argument("--budget", type=whole, default=200, metavar="N", help="Jacobian evaluations (default 200)")
    attack.add_argument("--seed", type=natural, default=0, help="of the search (default 0)")
    attack.add_argument(
        "--shrink", type=positive, metavar="F", help="multiply the bound (default 1); 0.9 must break a tight one"
    )
    attack.add_argument("--replay", metavar="FILE", help="recompute the ratio of the witness that --out or --json gave")
    attack.add_argument("--processes", type=whole, default=2, metavar="K", help="bounds at a time, for all (default 2)")
    attack.add_argument("--markdown", metavar="FILE", help="write the table of ratios")
    attack.add_argument("--json", action="store_true", help="print JSON")
    attack.add_argument(
        "--out", metavar="FILE", help="keep the record; for all, every record (default results/attacks.json)"
    )
    attack.set_defaults(run=_attack)

    unpublished = ", ".join(name for name, definition in DEFINITIONS.items() if not definition.published)
    spikes = commands.add_parser(
        "spikes",
        help="spikes of a run, by every definition side by side",
        description="Find the spikes of a logged loss by the definitions in use, side by side, and say of each whether "
        f"it recovered. Each is shown with the source that published it, but for {unpublished}, which has none. Most "
        "raw ones of a small run are hard batches: --reference takes those out.",
    )
    spikes.add_argument(
        "run_log", type=Path, metavar="RUN", help="a run's folder, its losses.jsonl, a training record, or a CSV"
    )
    spikes.add_argument(
        "--reference", type=Path, metavar="RUN",
        help="a calm run to pair with; where both have a record, refused unless it saw the same batches",
    )  # fmt: skip
    spikes.add_argument("--column", default="loss", metavar="NAME", help="column or series (default loss)")
    spikes.add_argument(
        "--lag",
        action="store_true",
        help="by how many steps gradient and update spikes lead or lag the loss's, and each other's",
    )
    spikes.add_argument(
        "--definition", action="append", choices=DEFINITIONS, metavar="NAME",
        help=f"this one alone, of {', '.join(DEFINITIONS)}; may be given again",
    )  # fmt: skip
    spikes.add_argument("--json", action="store_true", help="print JSON")
    spikes.add_argument("--out", metavar="FILE", help="write to a file instead of standard output")
    spikes.set_defaults(run=_spikes)
    probes = add_probes(commands)
    for command in (measure, train, sweep, perplexity, probes):
        command.add_argument("--device", type=device_name, default="cpu", help="cpu (default), cuda, cuda:1, ...")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m empirics`."""
    with silenced_after_first() as silenced:
        if silenced:
            parser().parse_args(argv)
    return run_command(parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
