"""Names, paths and options of a command: bad ones are refused in one line, near ones suggested; tables line up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import ROOT, Main, Result, assert_refused, call

import empirics.__main__
import paper_repro
import theory.__main__

TOO_LONG = "a" * 5000
UP_TO_600 = ",".join(map(str, range(1, 601)))  # 600 x 600 x 4 methods are more than a million
COMMANDS: dict[str, list[str]] = {
    "no command": [],
    "unknown command": ["chek", "tiny"],
    "no configuration": ["check"],
    "unknown preset": ["check", "70b"],
    "empty name": ["check", ""],
    "name too long": ["check", TOO_LONG],
    "path too long": ["check", f"./{TOO_LONG}/config.json"],
    "unknown flag": ["check", "tiny", "--sequence", "7"],
    "second configuration": ["check", "tiny", "small"],
    "unknown embedding": ["check", "tiny", "--embedding", "large"],
    "unknown initialisation": ["check", "tiny", "--init", "he"],
    "missing file": ["check", "none/config.json"],
    "folder without a config": ["check", "tests"],
    "file as a folder": ["check", "README.md/config.json"],
    "device as a file": ["check", "/dev/null"],
    **{f"sequence {n}": ["check", "tiny", "--seq-len", n] for n in ("0", "-1", "1.5", "x", "", "1000001", "9" * 5000)},
    **{f"layers {n}": ["check", "tiny", "--layers", n] for n in ("0", "-3", "nan", "4097", "1000000000", "9" * 30)},
    "output in a file": ["check", "tiny", "--seq-len", "4", "--out", "README.md/x.json"],
    "output is a folder": ["check", "tiny", "--seq-len", "4", "--out", "tests"],
    "output nowhere": ["check", "tiny", "--seq-len", "4", "--out", "/proc/none/x.json"],
    "output name too long": ["check", "tiny", "--seq-len", "4", "--out", TOO_LONG],
    "unknown derivation": ["derive", "nonsense"],
    "unknown format": ["derive", "ffn", "--format", "html"],
    "sweep of nothing": ["sweep", "--widths", ","],
    "sweep of zero": ["sweep", "--depths", "0"],
    "sweep of words": ["sweep", "--widths", "wide"],
    "sweep of too many tokens": ["sweep", "--seq-len", "1000000000"],
    "sweep beyond all sizes": ["sweep", "--depths", "1000000001"],
    "sweep of too many": ["sweep", "--depths", UP_TO_600, "--widths", UP_TO_600],
    "statements of nothing": ["statements", "ffn"],
    "statements of no kind": ["statements", "--kind", "lower"],
    "statements of no quantity": ["statements", "--quantity", "ffn"],
    "statements that nobody made": ["statements", "--kind", "estimate", "--quantity", "ffn_jacobian"],
    "plot of no records": ["statements", "--plot", "all.png", "--records", "none"],
    "plot of empty records": ["statements", "--plot", "all.png", "--records", "tests/helpers"],
    "plot of another format": ["statements", "--plot", "all.gif"],
    "plot as JSON": ["statements", "--plot", "all.png", "--json"],
    "every derivation and one": ["derive", "ffn", "--all"],
    "derivation without a name": ["derive", ""],
    "derivations nowhere": ["derive", "--out", "/proc/none/x"],
}


@pytest.mark.parametrize("argv", COMMANDS.values(), ids=[name[:30] for name in COMMANDS])
def test_bad_command(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert_refused(call(theory.__main__.main, argv, capsys))


@pytest.mark.parametrize(
    ("command", "option", "remedy"),
    [
        ("check", ["--layers", "0"], "use 1 to 4096"),
        ("check", ["--layers", "5000"], "use 1 to 4096"),
        ("check", ["--seq-len", "0"], "use 1 to 131072"),
        ("check", ["--seq-len", "9" * 300], "9... (300 characters) is out of range; use 1 to 131072"),
        ("train", ["--seed", "-1"], "use 0 to 1000000000"),
        ("train", ["--weight-decay", "-1"], "use 0 or one above it"),
        ("train", ["--weight-decay", "nan"], "use 0 or one above it"),
        ("train", ["--clip", "0"], "or off for none"),
        ("train", ["--lr", "0"], "use one above 0"),
    ],
)
def test_a_range_is_what_is_taken(
    command: str, option: list[str], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = theory.__main__.main if command == "check" else empirics.__main__.main
    assert_refused(call(main, [command, "tiny", *option], capsys), remedy)


@pytest.mark.parametrize(
    ("main", "argv", "command"),
    [
        (theory.__main__.main, ["check", "tiny", "--foo"], "spikecheck check"),
        (empirics.__main__.main, ["attack", "ffn-upper", "--foo"], "python -m empirics attack"),
        (paper_repro.main, ["--foo"], "paper_repro.py"),
    ],
)
def test_an_unknown_option_points_to_its_commands_help(
    main: Main, argv: list[str], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(call(main, argv, capsys), f"{command}: unrecognized arguments: --foo; see {command} --help")


MEANT: dict[str, tuple[list[str], str]] = {
    "preset": (["check", "tinny"], "did you mean tiny?"),
    "preset in capitals": (["check", "350M"], "did you mean 350m?"),
    "derivation": (["derive", "fnn"], "did you mean ffn?"),
    "statement": (["derive", "attention-uper-apriori"], "did you mean attention-upper-apriori"),
    "command": (["chek", "tiny"], "did you mean check?"),
    "initialisation": (["check", "tiny", "--init", "xavierr"], "did you mean xavier?"),
    "quantity": (["statements", "--quantity", "ffn_jacobean"], "did you mean ffn_jacobian"),
}


@pytest.mark.parametrize(("argv", "question"), MEANT.values(), ids=MEANT)
def test_a_close_name_is_suggested(argv: list[str], question: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(call(theory.__main__.main, argv, capsys), question)


def test_statements_are_a_table_of_a_hundred_columns(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(theory.__main__.main, ["statements"], capsys)
    head, *lines = out.splitlines()
    assert (status, head.split()) == (0, ["name", "kind", "quantity", "source"])
    assert max(map(len, lines)) <= 100
    places = [head.index(name) for name in head.split()]
    named = [line for line in lines if not line.startswith(" ")]
    assert len(named) == len(json.loads(call(theory.__main__.main, ["statements", "--json"], capsys)[1]))
    for line in named:  # every cell begins where its column does
        assert all(line[place - 2 : place] == "  " and line[place] != " " for place in places[1:]), line
    assert all(len(line) - len(line.lstrip()) == places[3] for line in lines if line not in named)


def test_one_is_no_plural(capsys: pytest.CaptureFixture[str]) -> None:
    out = call(theory.__main__.main, ["check", "tiny", "--layers", "1", "--seq-len", "1"], capsys)[1]
    assert "1 layer, 2 heads" in out
    assert out.splitlines()[0].endswith(" 1 token")
    options = ["--layers", "1", "--seq-len", "1", "--seeds", "1", "--batch", "1"]
    out = call(empirics.__main__.main, ["measure", "tiny", *options], capsys)[1]
    assert "1 token: gradient growth" in out
    assert "(1 seed of weights and tokens)" in out
    assert "1 layer, pre-ln" in out
    assert not re.search(r"\b1 [a-z]+s\b", out)


@pytest.mark.parametrize("kind", ["upper", "sharp", "estimate"])
def test_statements_of_a_kind_or_a_quantity(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    def rows(*argv: str) -> list[dict[str, Any]]:
        status, out, _ = call(theory.__main__.main, ["statements", "--json", *argv], capsys)
        assert status == 0
        return json.loads(out)

    every, of_kind = rows(), rows("--kind", kind)
    assert of_kind == [row for row in every if row["kind"] == kind]
    assert 0 < len(of_kind) < len(every)
    quantity = of_kind[0]["quantity"]
    assert rows("--quantity", quantity) == [row for row in every if row["quantity"] == quantity]
    assert rows("--kind", kind, "--quantity", quantity) == [row for row in of_kind if row["quantity"] == quantity]


@pytest.mark.parametrize(("main", "package"), [(theory.__main__.main, "sympy"), (empirics.__main__.main, "torch")])
def test_versions(main: Main, package: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(main, ["--version"], capsys)
    assert (status, err) == (0, "")
    assert out.startswith("spikecheck ")
    assert re.search(rf"\b{package} \d+\.\d+", out)
    assert out.count("\n") == 1


def test_a_sweep_costs_what_its_rows_do(capsys: pytest.CaptureFixture[str]) -> None:
    """A billion layers as much as one: the estimate's growth does not move, its excess falls like 1/sqrt(N)."""
    argv = ["sweep", "--widths", "1024,1000000000", "--depths", "1,10000000,1000000000"]
    began = time.process_time()
    status, out, _ = call(theory.__main__.main, [*argv, "--json"], capsys)
    assert time.process_time() - began < 5.0
    assert status == 0
    rows = {(row["embedding"], row["d_model"], row["n_layers"]): row for row in json.loads(out)}
    assert len(rows) == 4 * 6
    for (embedding, width, depth), row in rows.items():
        assert row["growth"] == pytest.approx(rows[embedding, width, 1]["growth"], rel=1e-12)
        if depth == 10**9:
            excess = rows[embedding, width, 10**7]["ffn_excess"]
            assert row["ffn_excess"] == pytest.approx(excess / 10, rel=1e-3)
    _, out, _ = call(theory.__main__.main, argv, capsys)
    assert all(len(line.split()) == 5 for line in out.splitlines()[1:])  # no column runs into the next


def start(*command: str) -> Result:
    """Status, standard output and standard error of a fresh process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], check=False, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


PROCESSES: dict[str, list[str]] = {
    "unknown preset": ["-m", "theory", "check", "70b"],
    "no arguments": ["-m", "theory"],
    "name too long": ["-m", "theory", "check", TOO_LONG],
    "nested": ["-m", "theory", "check", "nested.json"],
    "unknown step": ["paper_repro.py", "--only", "nonsense"],
}


@pytest.mark.parametrize("command", PROCESSES.values(), ids=PROCESSES)
def test_bad_command_in_a_process(command: list[str], tmp_path: Path) -> None:
    nested = tmp_path / "nested.json"
    nested.write_bytes(b"[" * 100_000)
    assert_refused(start(*[str(nested) if part == nested.name else part for part in command]))
