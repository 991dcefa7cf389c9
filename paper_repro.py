"""Reproduce the paper's figures and judge its claims: `python paper_repro.py`.

A scale is a list of steps (`empirics.scales`); every step leaves records, a record that exists is not made again, and
the figures, claims and report are drawn from the records alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from empirics.scales import CHECK, SCALES, Step
from figures.selection import Record
from theory.__main__ import Parser, natural_list, run_command, whole
from theory.names import unknown
from theory.records import fingerprint, read_record, read_records, write_json, write_record
from theory.words import counted

CHECKED = Path(__file__).resolve().parent / "docs" / "gpu"  # device checks that come with the code
REFERENCES = ("Embed LN", "Scaled Embed")  # whose runs stand for an undisturbed one when spikes are paired


def compute(steps: Sequence[Step], out: Path, processes: int) -> None:
    """Make every record that is missing; spikes are counted once the trainings are there."""
    from empirics.spikes import count_events
    from empirics.sweep import prepare_texts, run_all

    # Text that is missing is found out before anything is computed.
    prepare_texts([spec for step in steps for spec in step.specs()], out)
    for step in steps:
        run_all(step.specs(), out, processes=processes, title=step.name)
    trainings = [record for record in own_records(steps, out) if record["kind"] == "training"]
    rows = count_events(trainings, REFERENCES)
    identity = fingerprint(rows)  # so that a definition that changes is counted again
    if trainings and (read_record(out / "records" / "spikes.json") or {}).get("id") != identity:
        write_record(out / "records" / "spikes.json", kind="spikes", body={"id": identity, "rows": rows})


def check(steps: Sequence[Step], every: Sequence[Step], out: Path, device: str, processes: int) -> None:
    """Make the device check's records that are missing, and the one that holds the two sides against each other."""
    from empirics.device_check import make_all
    from figures.device_records import write_check

    for step in steps:
        make_all(step.specs(), out, processes=processes, title=step.name)
    records = own_records(every, out)
    there = {record["id"] for record in records}
    missing = [step.name for step in every if not {spec.identity for spec in step.specs()} <= there]
    write_check(out, records, device=device, missing=missing)


def own_records(steps: Sequence[Step], out: Path) -> list[Record]:
    """The folder's records that these steps make, and the spikes; others, of other seeds or texts, are let lie."""
    names = {spec.identity for step in steps for spec in step.specs()}
    return [record for record in read_records(out / "records") if record["id"] in names or record["kind"] == "spikes"]


def draw(steps: Sequence[Step], out: Path, scale: str, checked: Record | None) -> str:
    """Figures, claims and report from the steps' records alone, and the device check beside them; the verdicts."""
    from figures.reproduction import draw_all, draw_check

    records = own_records(steps, out)
    if not records:
        raise ValueError(f"there are no records in {out / 'records'}; run without --draw-only first")
    if scale == CHECK:
        assert checked is not None  # its own
        return draw_check(records, out, scale, checked)
    return draw_all(records, out, scale, checked)


def _require(device: str, scale: str) -> None:
    from empirics.command_line import check_device

    try:
        check_device(device)
    except ValueError:
        if scale == CHECK:
            raise ValueError(
                f"scale {scale} needs a CUDA device and {device} is not here; run it where one is, or add --device cpu "
                "for a self-test of the program on this CPU, which is no evidence about a GPU"
            ) from None
        raise ValueError(
            f"scale {scale} on {device} needs that device and it is not here; use --scale cpu, or --device cpu"
        ) from None


def _device(text: str) -> str:
    """As `empirics.command_line.device_name`, which needs torch, as much else here does not."""
    from empirics.command_line import device_name

    return device_name(text)


def _settings_of(out: Path, scale: str) -> dict[str, Any]:
    """What the folder was last computed with; empty for a new one.

    Raises:
        ValueError: it belongs to another scale.
    """
    try:
        found = json.loads((out / "scale.json").read_text())
    except (OSError, ValueError):
        return {}
    if found.get("scale") != scale:
        raise ValueError(
            f"{out} holds the scale {found.get('scale')!r}; use --scale {found.get('scale')} or another --out"
        )
    return found


def _checked(arguments: argparse.Namespace, out: Path, device: str) -> Record | None:
    """The device check that the report shows: that of this run, or the one named, or the best at hand."""
    from figures.device_records import check_path, latest_check, read_check

    if arguments.scale == CHECK:
        return read_check(check_path(out, device))
    if arguments.gpu_record is not None:
        return read_check(arguments.gpu_record)
    return latest_check((CHECKED, out.parent / CHECK / "records"))


def _run(arguments: argparse.Namespace) -> int:
    build, default_seeds, default_device, default_data = SCALES[arguments.scale]
    out = Path(arguments.out or Path("results") / arguments.scale)
    before = _settings_of(out, arguments.scale) if arguments.draw_only else {}
    seeds = arguments.seeds or before.get("seeds") or range(default_seeds)
    device = arguments.device or before.get("device") or default_device
    data = arguments.data or before.get("data") or default_data
    steps = every = build(tuple(seeds), device, data)
    if arguments.only:
        known = [step.name for step in steps]
        for name in arguments.only:
            if name not in known:
                raise ValueError(unknown(f"{arguments.scale} step", name, known))
        steps = [step for step in steps if step.name in arguments.only]
    if arguments.list:
        for step in steps:
            cost = f"{step.minutes:.1f} min" if step.minutes < 100 else f"{step.minutes / 60:.0f} h"
            print(f"{step.name:16}{counted(len(step.specs()), 'record'):>11} {cost:>9}  {step.purpose}")
        return 0
    if not arguments.draw_only:
        _require(device, arguments.scale)
    start = time.monotonic()
    if not arguments.draw_only:
        _settings_of(out, arguments.scale)
        chosen = {"scale": arguments.scale, "seeds": list(seeds), "device": device, "data": data}
        write_json(out / "scale.json", chosen)
        if arguments.scale == CHECK:
            check(steps, every, out, device, arguments.processes)
        else:
            compute(steps, out, 1 if device.startswith("cuda") else arguments.processes)
    print(draw(every, out, arguments.scale, _checked(arguments, out, device)))
    print(f"{math.ceil(time.monotonic() - start)} s; report: {out / 'report.html'}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(prog="paper_repro.py", description="Reproduce the paper's figures and judge its claims.")
    top.add_argument("--scale", choices=list(SCALES), default="cpu", help="default cpu, about six minutes on 2 cores")
    top.add_argument("--only", action="append", metavar="STEP", help="run this step alone (repeatable)")
    top.add_argument("--list", action="store_true", help="print the steps with their cost, and stop")
    top.add_argument("--draw-only", action="store_true", help="draw again from the records; compute nothing")
    top.add_argument("--out", metavar="DIR", help="default results/SCALE")
    top.add_argument(
        "--seeds", type=natural_list, metavar="S,S,...", help="default 0,1,2; of cpu-full 0 to 4; of the others 0"
    )
    top.add_argument("--data", metavar="TEXT", help="sympy, files, hf:NAME, or shards (default: the scale's)")
    top.add_argument("--device", type=_device, metavar="DEVICE", help="cpu or cuda (default: the scale's)")
    top.add_argument(
        "--gpu-record", type=Path, metavar="FILE",
        help=f"the device check that the report shows (default: the latest in docs/gpu or results/{CHECK}/records)",
    )  # fmt: skip
    top.add_argument("--processes", type=whole, default=2, metavar="K", help="runs at a time on a CPU (default 2)")
    top.set_defaults(run=_run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
