"""`python -m empirics attack`: what it prints, keeps and resumes, and what a new statement needs to be attacked."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from helpers.catalogue import QUANTITIES, TIGHT, UPPER

import empirics.__main__
import theory.__main__
from empirics import falsify
from empirics.benches import find_bench
from theory import statements
from theory.quantities import quantity
from theory.records import write_record
from theory.statements import Statement, find

Result = tuple[int, str, str]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> Result:
    """Status, standard output and standard error of `python -m empirics attack`."""
    try:
        status = empirics.__main__.main(["attack", *argv])
    except SystemExit as leave:
        status = int(leave.code or 0)
    return (status, *capsys.readouterr())


# --- a new statement ----------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalogue that forgets what a test adds."""
    find("ffn-upper")
    monkeypatch.setattr(statements, "_REGISTRY", dict(statements._REGISTRY))


def add(name: str, formula: Callable[..., Any], **fields: Any) -> Statement:
    """Register a bound on the feed-forward sub-layer."""
    base = find("ffn-upper")

    def build() -> Statement:
        return replace(base, name=name, formula=formula, **fields)

    build.__name__ = name.replace("-", "_")
    statements.register(build)
    return find(name)


@pytest.mark.usefixtures("registry")
def test_registering_a_bound_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    add("ffn-frobenius-upper", lambda lipschitz, opnorm_1, opnorm_2: 2 * lipschitz * opnorm_1 * opnorm_2, tight=False)
    add("ffn-false-upper", lambda opnorm_1, opnorm_2: opnorm_1 * opnorm_2 / 2, tight=False)
    listed = json.loads(run(capsys, "--list", "--json")[1])
    assert {"ffn-frobenius-upper", "ffn-false-upper"} <= {row["name"] for row in listed}
    status, out, _ = run(capsys, "ffn-frobenius-upper", "--budget", "40", "--json")
    assert status == 0
    assert json.loads(out)["worst_ratio"] <= 0.5 + 1e-9
    status, out, _ = run(capsys, "ffn-false-upper", "--budget", "40", "--json")
    assert status == 1
    assert json.loads(out)["violations"] > 0


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("formula", "fields", "words"),
    [
        (lambda opnorm_1, nuclear_2: opnorm_1 * nuclear_2, {}, ("nothing observes nuclear_2", "observables.py")),
        (lambda opnorm_2, gate_slope: opnorm_2 * gate_slope, {"covers": {}}, ("gate_slope", "covers")),
        (lambda opnorm_1: opnorm_1, {"covers": {"gatd": (True,)}}, ("gatd", "use one of")),
        (lambda opnorm_1: opnorm_1, {"covers": {"activation": ("tanh",)}}, ("leaves no activation", "add one")),
        (lambda s: s, {"quantity": quantity("gradient_growth")}, ("no bench draws gradient_growth", "write a Bench")),
    ],
    ids=["symbol", "variant", "cover", "covers nothing", "quantity"],
)
def test_what_is_missing_is_said_in_one_line(
    formula: Callable[..., Any], fields: dict[str, Any], words: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    add("ffn-new-upper", formula, **fields)
    status, out, err = run(capsys, "ffn-new-upper", "--budget", "40")
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert all(word in err for word in words), err


@pytest.mark.usefixtures("registry")
def test_a_formula_that_raises_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    add("ffn-raising-upper", lambda opnorm_1: opnorm_1 * (1 / 0), tight=False)
    status, out, err = run(capsys, "ffn-raising-upper", "--budget", "4")
    assert (status, out) == (2, "")
    assert "formula of ffn-raising-upper in test_attack_command.py raises ZeroDivisionError" in err.splitlines()[-1]


OWN = """
from dataclasses import replace
from theory.statements import _REGISTRY, register

@register
def {function}():
    return replace(_REGISTRY["softmax-jacobian"](), name="{name}")
"""


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def (", ("cannot load theory/bounds_own.py: SyntaxError",)),
        ("1 / 0", ("cannot load theory/bounds_own.py: ZeroDivisionError",)),
        (OWN.format(function="ffn_upper", name="ffn-upper"), ("'ffn-upper', in theory/feedforward.py and in", "_own")),
        (
            OWN.format(function="ffn_new_upper", name="ffn-upper"),
            (
                "ffn_new_upper in theory/bounds_own.py",
                "'ffn-upper', a name that theory/feedforward.py has",
                "function's",
            ),
        ),
        (OWN.format(function="ffn_new_upper", name="ffn-other-upper"), ("bounds_own.py states 'ffn-other-upper';",)),
    ],
    ids=["syntax", "import", "two functions", "two names", "another name"],
)
def test_a_file_of_ones_own_that_is_wrong_is_named(
    text: str,
    words: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bounds_own.py").write_text(text)
    monkeypatch.setattr(theory, "__path__", [*theory.__path__, str(tmp_path)])
    try:
        status, out, err = run(capsys, "ffn-upper", "--budget", "4")
        assert theory.__main__.main(["statements"]) == 2
    finally:
        sys.modules.pop("theory.bounds_own", None)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert all(word in err for word in words), err


# --- the command --------------------------------------------------------------------------------------------------


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(run(capsys, "--list", "--json")[1])
    assert [row["name"] for row in rows] == list(UPPER)
    assert {row["name"] for row in rows if row["tight"]} == set(TIGHT)
    assert all(row["kind"] == "upper" and row["quantity"] in QUANTITIES for row in rows)
    text = run(capsys, "--list")[1].splitlines()
    assert [line.split()[0] for line in text] == list(UPPER)


def test_one_attack_replayed_and_shrunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "found.json")
    status, out, _ = run(capsys, "ffn-upper", "--budget", "50", "--seed", "7", "--json", "--out", path)
    found = json.loads(out)
    assert status == 0
    assert found == json.loads(Path(path).read_text())
    assert {"name", "evaluations", "worst_ratio", "witness"} <= found.keys()
    assert found["evaluations"] == 50
    status, out, _ = run(capsys, "--replay", path, "--json")
    assert status == 0
    assert json.loads(out)["worst_ratio"] == pytest.approx(found["worst_ratio"], rel=1e-12)
    status, out, _ = run(capsys, "--replay", path, "--shrink", "0.5")
    assert status == 1
    assert out.startswith("ffn-upper: ratio ")
    status, out, _ = run(capsys, "ffn-upper", "--shrink", "0.9", "--out", path)
    assert status == 1
    assert "VIOLATED" in out
    assert "witness" in out
    assert re.search(r"largest ratio .*\n.*: median \S+, smallest \S+, largest \S+;", out)
    assert run(capsys, "--replay", path)[0] == 1  # with the shrink that was saved


def test_all_resumes_and_writes_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, table = tmp_path / "attacks.json", tmp_path / "tightness.md"
    options = ("all", "--budget", "8", "--processes", "1", "--out", str(out), "--markdown", str(table))
    calls: list[str] = []
    genuine = falsify.attack

    def interrupted(statement: Statement, **options: Any) -> dict[str, Any]:
        calls.append(statement.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return genuine(statement, **options)

    monkeypatch.setattr(falsify, "attack", interrupted)
    status, _, err = run(capsys, *options)
    assert status == 130
    assert "run the same command again" in err
    assert list(json.loads(out.read_text())["attacks"]) == list(UPPER)[:3]
    status, text, _ = run(capsys, *options)
    assert status == 0
    assert calls == [*list(UPPER)[:4], *list(UPPER)[3:]]
    once = out.read_bytes()
    assert run(capsys, *options)[0] == 0
    assert len(calls) == len(UPPER) + 1  # nothing was computed again
    assert out.read_bytes() == once
    lines = [line for line in table.read_text().splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == list(UPPER)
    assert text.count("not violated") == len(UPPER)
    records = json.loads(once)["attacks"]
    records["ffn-upper"]["identity"] = "of another formula"
    write_record(out, kind="attacks", body={"attacks": records})
    assert run(capsys, *options)[0] == 0
    assert calls[-1] == "ffn-upper"
    assert out.read_bytes() == once
    assert run(capsys, "--replay", str(out))[1].count("ratio") == len(UPPER)
    assert run(capsys, "ffn-upper", "--replay", str(out))[1].count("ratio") == 1


def test_published_page_has_every_bound_and_no_violation() -> None:
    text = (Path(__file__).parents[1] / "docs" / "tightness.md").read_text()
    assert "--budget 10000" in text
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    found = {row[0].strip("`"): dict(zip(head, row, strict=True)) for row in rows}
    listed = {name for name in UPPER if not statements._REGISTRY[name].__module__.startswith("theory.bounds_")}
    assert listed <= found.keys() <= UPPER.keys()  # a file of one's own need not be on the page
    for name, row in found.items():
        assert (row["cases"], row["violations"]) == ("10000", "0")
        assert (row["tight"] == "yes") == UPPER[name].tight
        assert (row["several tokens"] == "") == (find_bench(UPPER[name].quantity.name).several is None)


def saved(record: Any = None, **changes: Any) -> str:
    """A record that is damaged, or whose witness is."""
    witness = find_bench("softmax_jacobian").draw(Random(0)).witness()
    return json.dumps({"name": "softmax-jacobian", "witness": {**witness, **changes}, **(record or {})})


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no name and witness"),
        ("{}", "no name and witness"),
        ('{"name": "softmax-jacobian", "witness": 3}', "not a witness"),
        ('{"name": "softmax-jacobiam", "witness": {}}', "unknown bound"),
        ('{"name": "ffn-estimate", "witness": {}}', "only an upper bound"),
        (saved(quantity="ffn_jacobian"), "choices"),
        (saved(quantity="ffn"), "no bench"),
        (saved(quantity=["ffn"]), "no bench"),
        (saved(choices={"n_logits": 10**9}), "n_logits=1000000000"),
        (saved(choices={"n_logits": [1]}), "n_logits=[1]"),
        (saved(choices={}), "n_logits"),
        (saved(tensors={}), "input"),
        (saved(tensors={"input": [[1.0]]}), "shape"),
        (saved(tensors={"input": "one"}), "not an array"),
        (saved(tensors={"input": [None]}), "not an array"),
        (saved(tensors={"input": [10**400]}), "not an array"),
        (saved(tensors={"input": math.nan}), "shape"),
        *(
            (saved({"shrink": factor}), "not a positive finite")
            for factor in (-1, 0, math.nan, math.inf, True, "1", None)
        ),
    ],
)
def test_what_cannot_be_replayed(content: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "witness.json"
    path.write_text(content)
    status, out, err = run(capsys, "--replay", str(path))
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert word in err


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ((), "no bound is named"),
        (("nope",), "unknown bound 'nope'; run `python -m empirics attack --list` to list them"),
        (("ffn-uper",), "did you mean ffn-upper"),
        (("ffn-estimate",), "only an upper bound"),
        (("ffn-sharp-relu",), "only an upper bound"),
        (("ffn-upper", "--budget", "0"), "use 1 to"),
        (("ffn-upper", "--budget", "many"), "whole number"),
        (("ffn-upper", "--shrink", "-1"), "positive"),
        (("ffn-upper", "--seed", "-1"), "use"),
        (("--replay", "/no/such/file"), "cannot read"),
        (("all", "--budget", "1", "--out", "/proc/attacks.json"), "cannot write"),
    ],
)
def test_bad_input_is_one_line(argv: Sequence[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, ""), err
    assert len(err.splitlines()) == 1
    assert word in err


def test_help_documents_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(run(capsys, "--help")[1].split())
    for word in ("--list", "--budget", "--shrink", "--replay", "--markdown", "--out", "--seed", "Exit status"):
        assert word in text


def test_command_runs_as_a_module() -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "empirics", "attack", "softmax-jacobian", "--budget", "5", "--json"],
        cwd=root, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert json.loads(done.stdout)["evaluations"] == 5
