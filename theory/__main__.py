"""`spikecheck`: check a configuration, derive a bound, sweep a grid. Needs no torch."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from theory.architecture import EMBEDDINGS, INITS, PRESETS, Architecture, preset
from theory.hf_config import AS_CLASS, Config, UnknownArchitecture, read_config
from theory.names import meant, unknown
from theory.quantities import QUANTITIES
from theory.words import as_typed, brief, counted, short, table

T = TypeVar("T")

EXIT_STABLE, EXIT_AT_RISK, EXIT_BAD_INPUT, EXIT_UNKNOWN = 0, 1, 2, 3
DEFAULT_SEQ_LEN = 2048
LARGEST_SEQ_LEN = 2**17  # the averaging norm is found in about a second at this length
LARGEST_DEPTH = 4096  # the recursion keeps every half-layer's Gram: about 2 GB at this depth
ALONE = "--- statements without a chain of their own name ---"
# Options by what a message of the code calls what they set.
OPTIONS = {
    "batch_size": "--batch",
    "micro_batch": "--micro-batch",
    "seq_len": "--seq-len",
    "n_tokens": "--seq-len",
    "steps": "--steps",
    "warmup": "--warmup",
    "learning_rate": "--lr",
    "schedule": "--schedule",
    "decay_fraction": "--decay-fraction",
    "clip": "--clip",
    "beta_1": "--beta1",
    "beta_2": "--beta2",
    "weight_decay": "--weight-decay",
    "z_loss": "--z-loss",
    "attention": "--attention",
    "probe_every": "--probe-every",
    "seed": "--seed",
    "vocab_size": "--vocab",
    "limit": "--limit",
    "shard_tokens": "--shard-tokens",
    "context": "--context",
    "stride": "--stride",
}


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message)
        if choice is not None and (question := meant(choice[1], choice[2].replace("'", "").split(", "))):
            message = f"{message}; {question}"
        print(f"{self.prog}: {message}{'' if message.endswith('?') else ';'} see {self.prog} --help", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)


def whole(text: str) -> int:
    """A positive whole number for argparse."""
    return _between(text, 1, 10**9)


def _between(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{brief(text)} is not a whole number; write for example 64") from None
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{brief(value)} is out of range; use {least} to {most}")
    return value


def _depth(text: str) -> int:
    return _between(text, 1, LARGEST_DEPTH)


def _length(text: str) -> int:
    return _between(text, 1, LARGEST_SEQ_LEN)


def natural_list(text: str) -> list[int]:
    """Whole numbers from 0, separated by commas, for argparse."""
    return listed(text, natural)


def listed(text: str, value: Callable[[str], T]) -> list[T]:
    """Values separated by commas for argparse; twice the same one would count as two."""
    parts = text.split(",")
    if not all(part.strip() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty place; write values with single commas between them")
    values = [value(part) for part in parts]
    seen: set[T] = set()
    for part, one in zip(parts, values, strict=True):
        if one in seen:
            raise argparse.ArgumentTypeError(f"{part.strip()} is there twice; name each once")
        seen.add(one)
    return values


def natural(text: str) -> int:
    """A whole number from 0 for argparse."""
    return _between(text, 0, 10**9)


def load(config: str) -> Config:
    """A preset by name, or a `config.json` by path.

    Raises:
        ValueError: neither; UnknownArchitecture: a class without a prediction.
    """
    if config in PRESETS:
        positions = "the paper's positions and activation are not confirmed: RoPE and ReLU"
        return Config(preset(config), (positions,))
    path = Path(config)
    if not os.path.exists(path) and path.suffix != ".json" and "/" not in config:
        raise ValueError(f"{unknown('preset', config, PRESETS)} or the path of a config.json")
    return read_config(path)


class _Version(argparse.Action):
    """Print versions as they are installed, and leave."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        def of(package: str) -> str:
            try:
                return f"{package} {version(package)}"
            except PackageNotFoundError:
                return f"{package} (not installed)"

        python = f"python {sys.version.split()[0]}"
        print(", ".join([*map(of, ("spikecheck", *self.const)), python]))
        parser.exit()


def add_version(parser: argparse.ArgumentParser, *packages: str) -> None:
    """`--version`: of spikecheck, of these packages and of Python."""
    parser.add_argument("--version", action=_Version, nargs=0, const=packages, help="print versions and leave")


def add_architecture_options(
    parser: argparse.ArgumentParser, *, most_tokens: int = DEFAULT_SEQ_LEN, **config: Any
) -> None:
    """The options that choose and vary an architecture, shared by every command; `config` goes to CONFIG's argument.

    Args:
        most_tokens: the default of --seq-len where the context is longer; for its help.
    """
    argument: dict[str, Any] = {"help": f"{', '.join(PRESETS)}, or the path of a config.json"} | config
    parser.add_argument("config", metavar="CONFIG", **argument)
    parser.add_argument(
        "--embedding", choices=EMBEDDINGS, metavar="NAME",
        help=f"embedding treatment: {', '.join(EMBEDDINGS)} (default vanilla, or the file's)",
    )  # fmt: skip
    parser.add_argument(
        "--init", choices=list(INITS), metavar="NAME",
        help=f"initialisation: {', '.join(INITS)} (default paper, or that of the file's class)",
    )  # fmt: skip
    parser.add_argument(
        "--seq-len",
        type=_length,
        metavar="T",
        help=f"tokens of a sequence (default the context, at most {most_tokens})",
    )
    parser.add_argument("--layers", type=_depth, metavar="N", help="number of layers (default the configuration's)")


def chosen(arguments: argparse.Namespace) -> tuple[Architecture, int, tuple[str, ...]]:
    """Architecture, sequence length and assumptions that the options ask for."""
    architecture, assumed = load(arguments.config)
    if arguments.layers:
        architecture = replace(architecture, n_layers=arguments.layers)
    if arguments.embedding:
        architecture = architecture.with_embedding(arguments.embedding)
    if arguments.init:
        architecture = architecture.with_init(arguments.init)
        assumed = tuple(line for line in assumed if not line.startswith(AS_CLASS))
    seq_len = arguments.seq_len or min(architecture.context, DEFAULT_SEQ_LEN)
    if architecture.n_layers > LARGEST_DEPTH:
        raise ValueError(f"{architecture.n_layers} layers are out of range; use at most {LARGEST_DEPTH}")
    if architecture.positions == "learned" and seq_len > architecture.context:
        raise ValueError(f"--seq-len {seq_len} exceeds the {architecture.context} learned positions; use fewer tokens")
    return architecture, seq_len, assumed


def emit(text: str, out: str | None) -> None:
    """Print, or write to a file."""
    if out is None:
        print(text)
        return
    from theory.records import write_bytes

    write_bytes(Path(out), (text + "\n").encode())
    print(f"wrote {out}", file=sys.stderr)


def _check(arguments: argparse.Namespace) -> int:
    from theory.verdict import check, unknown

    try:
        architecture, seq_len, assumed = chosen(arguments)
    except UnknownArchitecture as reason:
        answer = unknown(str(reason))
        emit(json.dumps(answer, indent=2) if arguments.json else f"unknown: {reason}", arguments.out)
        return EXIT_UNKNOWN
    verdict = check(architecture, seq_len, assumed=assumed)
    if arguments.json:
        emit(json.dumps(verdict.as_json(), indent=2, allow_nan=False), arguments.out)
    else:
        emit(_verdict_text(verdict), arguments.out)
    return {"stable": EXIT_STABLE, "unknown": EXIT_UNKNOWN}.get(verdict.outcome, EXIT_AT_RISK)


def _verdict_text(verdict: Any) -> str:
    a = verdict.architecture
    domain = "" if verdict.growth.in_domain else ", outside its domain"
    growth = f"{verdict.growth.value:.4g} (sharp{domain})"
    if not math.isfinite(verdict.growth.value):
        growth = f"unknown: {verdict.growth.reasons[-1]}"
    paper, rigorous = verdict.paper.log10_product, f"{verdict.rigorous.log10_product:.4g} (rigorous upper)"
    if verdict.rigorous.log10_product == math.inf:
        rigorous = f"none that is rigorous: {'; '.join(verdict.rigorous.assumptions)}"
    lines = [
        f"{a.name}: d_model {a.d_model}, {counted(a.n_layers, 'layer')}, {counted(a.n_heads, 'head')}, "
        f"d_ffn {a.d_ffn}, {short(a.n_parameters)} parameters, init {a.init.name}, "
        f"{counted(verdict.seq_len, 'token')}",
        f"verdict: {verdict.outcome}",
        f"gradient growth: {growth}",
        f"log10 of the bound on it: {'unknown' if math.isnan(paper) else f'{paper:.4g}'} (the paper's estimate), "
        f"{rigorous}",
        *(f"why: {reason}" for reason in verdict.why),
        *(f"next: {step}" for step in verdict.next),
        *(f"assumed: {assumption}" for assumption in verdict.assumed),
    ]
    return "\n".join(lines)


def _derive(arguments: argparse.Namespace) -> int:
    from theory.documentation import DERIVATIONS, LIMITS, document, page, titles

    if arguments.all and arguments.name is not None:
        raise ValueError(
            f"--all prints every page, {arguments.name!r} too; give a name or --all, leave out one of them"
        )
    if arguments.all:
        written = document(arguments.format)
    elif arguments.name is not None:
        written = page(arguments.name, arguments.format)
    else:
        width = max(map(len, titles()))
        lines = [f"{name:{width}} {title}" for name, title in titles().items()]
        chains = sum(name in DERIVATIONS or name == LIMITS for name in titles())  # they come first
        written = "\n".join([*lines[:chains], ALONE, *lines[chains:]])
    emit(written.rstrip("\n"), arguments.out)
    return EXIT_STABLE


def _statements(arguments: argparse.Namespace) -> int:
    from theory.statements import catalogue

    chosen = [
        statement
        for statement in catalogue().values()
        if arguments.kind in (None, statement.kind) and arguments.quantity in (None, statement.quantity.name)
    ]
    if not chosen:
        known = sorted({s.quantity.name for s in catalogue().values() if arguments.kind in (None, s.kind)})
        raise ValueError(f"no {arguments.kind or ''} statement is of that quantity; use one of {', '.join(known)}")
    if arguments.plot is not None:
        if arguments.json or arguments.out is not None:
            raise ValueError("--plot names the file of a figure; drop --json and --out, or use them without it")
        from figures import statements as plot
        from figures.style import render
        from theory.records import write_bytes

        path, records = Path(arguments.plot), Path(arguments.records)
        if path.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"cannot draw {path.name}; name a file ending in .png, .svg or .pdf")
        kinds = {statement.name: statement.kind for statement in chosen}
        tight, right = plot.tightness(records), plot.accuracy(records)
        if not kinds.keys() & (tight.keys() | right.keys()):
            raise ValueError(
                f"{records} has no record of these statements; run `python -m empirics attack all --budget 10000` "
                "(upper bounds, a quarter of an hour) or `python -m empirics accuracy` (sharp ones, some twenty "
                "minutes), or give --records"
            )
        write_bytes(path, render(plot.draw(kinds, tight, right), path.suffix.removeprefix(".")))
        print(f"wrote {arguments.plot}", file=sys.stderr)
        return EXIT_STABLE
    rows = [
        {
            "name": s.name,
            "kind": s.kind,
            "quantity": s.quantity.name,
            "meaning": s.quantity.meaning,
            "expression": str(s.expression),
            "assumptions": list(s.assumptions),
            "source": str(s.source),
            "target": s.target,
            "domain": {symbol: [x if math.isfinite(x) else None for x in ends] for symbol, ends in s.domain.items()},
            "relations": list(s.relations),
        }
        for s in chosen
    ]
    if arguments.json:
        emit(json.dumps(rows, indent=2), arguments.out)
    else:
        columns = ("name", "kind", "quantity", "source")
        emit(table(columns, [[row[column] for column in columns] for row in rows]), arguments.out)
    return EXIT_STABLE


def _sizes(text: str) -> list[int]:
    return listed(text, whole)


def _sweep(arguments: argparse.Namespace) -> int:
    from theory.evaluate import closed_form_sweep

    rows = closed_form_sweep(arguments.widths, arguments.depths, arguments.embedding, arguments.seq_len)
    if arguments.json:
        emit(json.dumps(rows, indent=None, allow_nan=False), arguments.out)
        return EXIT_STABLE
    header = f"{'embedding':14}{'d_model':>11}{'layers':>11}{'growth (estimate)':>19}{'eq. (15) excess (estimate)':>28}"
    body = [
        f"{r['embedding']:14}{r['d_model']:>11}{r['n_layers']:>11}{r['growth']:>19.5g}{r['ffn_excess']:>28.4g}"
        for r in rows
    ]
    emit("\n".join([header, *body]), arguments.out)
    return EXIT_STABLE


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(prog="spikecheck", description="Say whether a transformer will train, before it is trained.")
    add_version(top, "numpy", "scipy", "sympy")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    check = commands.add_parser(
        "check",
        help="judge an architecture from its configuration",
        description="Judge an architecture from its configuration. Exit status: 0 stable, 1 at risk or unstable, "
        "2 bad input, 3 unknown.",
    )
    add_architecture_options(check)
    check.set_defaults(run=_check)

    derive = commands.add_parser(
        "derive",
        help="print a derivation, step by step",
        description="Print a derivation or a statement, each line with its rule and source; without a name, list them.",
    )
    derive.add_argument("name", nargs="?", metavar="NAME", help="a derivation or a statement, for example ffn")
    derive.add_argument("--all", action="store_true", help="every page; with --format markdown this is docs/theory.md")
    derive.add_argument("--format", choices=("text", "markdown", "latex"), default="text", help="default: text")
    derive.set_defaults(run=_derive)

    statements = commands.add_parser(
        "statements",
        help="list every bound, prediction and estimate",
        description="List every bound (upper), prediction (sharp) and estimate, with its quantity and source.",
    )
    statements.add_argument("--kind", choices=("upper", "sharp", "estimate"), help="only this kind")
    statements.add_argument(
        "--quantity", choices=tuple(QUANTITIES), metavar="NAME", help="only of this quantity, for example ffn_jacobian"
    )
    statements.add_argument(
        "--plot", metavar="FILE", help="draw how tight or how right each is, a line a statement (PNG, SVG or PDF)"
    )
    statements.add_argument(
        "--records", default="results", metavar="DIR",
        help="where `python -m empirics attack all` and `accuracy` left their records (default results)",
    )  # fmt: skip
    statements.set_defaults(run=_statements)

    sweep = commands.add_parser(
        "sweep",
        help="closed-form growth over a grid of sizes",
        description="Closed-form growth, and the first layer's excess over 1 by the paper's eq. (15), over a grid of "
        "model widths and numbers of layers; both are estimates. Sizes cost nothing, rows do: there may be a million.",
    )
    sweep.add_argument(
        "--widths", type=_sizes, default=[256, 1024, 4096], metavar="D,D,...",
        help="default 256,1024,4096; each at most 10^9",
    )  # fmt: skip
    sweep.add_argument(
        "--depths", type=_sizes, default=[8, 24, 96], metavar="N,N,...", help="default 8,24,96; each at most 10^9"
    )
    sweep.add_argument(
        "--embedding", choices=EMBEDDINGS, action="append", metavar="NAME",
        help=f"{', '.join(EMBEDDINGS)}; may be given again (default all four)",
    )  # fmt: skip
    sweep.add_argument("--seq-len", type=_length, default=1024, metavar="T", help="tokens of a sequence (default 1024)")
    sweep.set_defaults(run=_sweep)

    for command in (check, statements, sweep):
        command.add_argument("--json", action="store_true", help="print JSON")
    for command in (check, derive, statements, sweep):
        command.add_argument("--out", metavar="FILE", help="write to a file instead of standard output")
    return top


def run_command(top: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse and run; bad input is one line on standard error and status 2, a broken pipe is silent.

    What an interruption says of itself is printed.
    """
    arguments, unrecognised = top.parse_known_args(argv)
    if unrecognised:
        command = " ".join(filter(None, (top.prog, getattr(arguments, "command", None))))
        print(f"{command}: unrecognized arguments: {' '.join(unrecognised)}; see {command} --help", file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        return int(arguments.run(arguments))
    except ValueError as error:
        print(f"{top.prog}: {as_typed(' '.join(str(error).split()), _options(arguments))}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except UnknownArchitecture as reason:
        print(f"{top.prog}: unknown: {reason}", file=sys.stderr)
        return EXIT_UNKNOWN
    except (MemoryError, RuntimeError) as error:
        # torch says "out of memory" and "can't allocate memory" by RuntimeError; any other one is a defect.
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        print(f"{top.prog}: out of memory; use a smaller batch, sequence or architecture", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt as stop:
        print(f"{top.prog}: {str(stop) or 'interrupted'}; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_STABLE


def _options(arguments: argparse.Namespace) -> dict[str, str]:
    """Those of `OPTIONS` that the command has."""
    return {name: option for name, option in OPTIONS.items() if hasattr(arguments, option.strip("-").replace("-", "_"))}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `spikecheck` and `python -m theory`."""
    return run_command(parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
