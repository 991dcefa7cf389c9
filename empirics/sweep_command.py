"""`python -m empirics sweep`: methods x learning rates x seeds, on this machine's cores or a cluster's nodes."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from empirics.command_line import check_device, check_memory, positive
from empirics.plan import STATE_BYTES
from empirics.run import Record, checkpoints_of, record_path
from empirics.run_spec import RunSpec
from empirics.train_command import add_run_options, specification, unscheduled
from theory.__main__ import add_architecture_options, chosen, emit, listed, natural_list, whole
from theory.architecture import METHODS, method
from theory.names import unknown
from theory.records import read_record, slug
from theory.words import counted

EXPERIMENT = "sweep"
NAMES = {slug(name): name for name in METHODS}
AS_GIVEN = "config"


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add `sweep` to the commands of a parser."""
    sweep = commands.add_parser(
        "sweep",
        help="methods x learning rates x seeds, with a table at the end",
        description="Train every combination; finished runs are skipped, killed ones resume, and one that fails does "
        "not stop the others. Exit status: 0 all are finished, also where some diverged, which the table counts; 2 bad "
        "input, or a run failed. Ctrl-C or SIGTERM keeps a checkpoint of each and ends with status 130.",
    )
    add_architecture_options(sweep)
    sweep.add_argument(
        "--methods", type=_methods, default=list(NAMES), metavar="A,B",
        help=f"of {', '.join(NAMES)} (default all); or {AS_GIVEN}, the configuration as it is given",
    )  # fmt: skip
    sweep.add_argument("--lr", type=_rates, default=[1e-3], metavar="A,B", help="peak learning rates (default 1e-3)")
    sweep.add_argument("--seed", type=natural_list, default=[0], metavar="A,B", help="seeds (default 0)")
    add_run_options(sweep)
    sweep.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the records")
    sweep.add_argument("--processes", type=whole, default=2, metavar="K", help="one-thread runs at a time (default 2)")
    sweep.add_argument(
        "--slurm", nargs="*", metavar="NAME=VALUE",
        help="submit one job a run instead (extra slurm); parameters of submitit, for example timeout_min=240 "
        "gpus_per_node=1 slurm_partition=gpu; DIR must be seen by every node",
    )  # fmt: skip
    sweep.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    sweep.add_argument("--json", action="store_true", help="the table, or the list, as JSON")
    sweep.add_argument("--table", metavar="FILE", help="write it to a file instead of standard output")
    sweep.set_defaults(run=command)
    return sweep


def _methods(text: str) -> list[str]:
    names = listed(text, slug)
    for name in names:
        if name not in (*NAMES, AS_GIVEN):
            raise argparse.ArgumentTypeError(unknown("method", name, (*NAMES, AS_GIVEN)))
    return names


def _rates(text: str) -> list[float]:
    return listed(text, positive)


def command(arguments: argparse.Namespace) -> int:
    """Run `sweep`.

    Raises:
        ValueError: bad input or runs that failed, in one line.
    """
    from empirics.sweep import run_all, submit

    specs, out = specifications(arguments), arguments.out
    if arguments.list:
        rows = [{"run": spec.identity, "state": state(spec, out)} for spec in specs]
        lines = [f"{row['state']:<9}{row['run']}" for row in rows]
        emit(json.dumps(rows, indent=2) if arguments.json else "\n".join(lines), arguments.table)
        return 0
    if arguments.slurm is not None:
        jobs = submit(specs, out, _parameters(arguments.slurm), checkpoint_every=arguments.checkpoint_every)
        submitted = f"{len(jobs)} of {counted(len(specs), 'run')} submitted"
        print(f"{submitted}; the same command with --list says which are finished")
        return 0
    architecture = specs[0].architecture
    check_device(arguments.device)
    if arguments.device == "cpu":
        runs = min(arguments.processes, len(specs))  # at a time, a network each
        at_once = arguments.micro_batch or arguments.batch
        check_memory(
            architecture, batch_size=at_once, seq_len=specs[0].seq_len, state=STATE_BYTES, runs=runs,
            precision=arguments.precision, attention=arguments.attention, z_loss=arguments.z_loss,
        )  # fmt: skip
    records = run_all(specs, out, processes=arguments.processes, checkpoint_every=arguments.checkpoint_every)
    rows = summary(specs, records)
    if said := unscheduled(specs[0]):
        print(said, file=sys.stderr)
    emit(json.dumps(rows, indent=2, allow_nan=False) if arguments.json else table(rows), arguments.table)
    return 0


def specifications(arguments: argparse.Namespace) -> list[RunSpec]:
    """Every combination, methods innermost: what is compared runs side by side.

    Raises:
        ValueError: bad input, in one line.
    """
    given, longest, _ = chosen(arguments)
    seq_len = arguments.seq_len or longest
    if arguments.methods != [AS_GIVEN] and (arguments.embedding or arguments.init):
        raise ValueError("--embedding and --init are of no use where --methods sets them; add --methods config")
    return [
        specification(
            arguments, given if name == AS_GIVEN else method(given, NAMES[name]), seq_len,
            label=NAMES.get(name, given.name), experiment=EXPERIMENT, seed=seed, learning_rate=rate,
        )
        for rate in arguments.lr
        for seed in arguments.seed
        for name in arguments.methods
    ]  # fmt: skip


def state(spec: RunSpec, out: Path) -> str:
    """Whether a run is finished, begun or neither."""
    if read_record(record_path(spec, out)) is not None:
        return "finished"
    return "begun" if checkpoints_of(spec, out).folder.exists() else "to run"


def summary(specs: Sequence[RunSpec], records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row a method and learning rate: held-out loss over the seeds that did not diverge, in nats a token."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for spec, record in zip(specs, records, strict=True):
        groups.setdefault((spec.label, spec.learning_rate), []).append(record["final"])
    rows: list[dict[str, Any]] = []
    for (label, rate), finals in groups.items():
        losses = [final["heldout_loss"] for final in finals if final["heldout_loss"] is not None]
        rows.append(
            {
                "method": label,
                "learning_rate": rate,
                "seeds": len(finals),
                "diverged": len(finals) - len(losses),
                "heldout_loss": statistics.fmean(losses) if losses else None,
                "heldout_loss_sd": statistics.stdev(losses) if len(losses) > 1 else None,
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `summary` for a terminal."""

    def number(value: float | None) -> str:
        return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"

    head = f"{'method':<24}{'lr':>9}{'seeds':>7}{'diverged':>10}{'held-out loss':>15}{'sd':>9}"
    return "\n".join(
        [
            head,
            *(
                f"{row['method']:<24}{row['learning_rate']:>9g}{row['seeds']:>7}{row['diverged']:>10}"
                f"{number(row['heldout_loss']):>15}{number(row['heldout_loss_sd']):>9}"
                for row in rows
            ),
        ]
    )


def _parameters(pairs: Sequence[str]) -> dict[str, str]:
    split = [pair.partition("=") for pair in pairs]
    for name, sign, value in split:
        if not (name and sign and value):
            raise ValueError(f"--slurm {name}{sign}{value} is not NAME=VALUE; write for example timeout_min=240")
    return {name: value for name, _, value in split}
