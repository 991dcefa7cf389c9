"""Pages and `docs/theory.md`: complete, current, and drawable everywhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import matplotlib as mpl
import pytest

import theory.__main__
from theory import statements
from theory.asymptotics import ASYMPTOTICS
from theory.derivation import DERIVATIONS, derivation
from theory.documentation import (
    COMMAND,
    QUESTIONS,
    arriving,
    catalogue,
    document,
    page,
    render_statement,
    statement_formula,
    titles,
)
from theory.quantities import Quantity
from theory.sources import REFERENCES, Source
from theory.statements import Statement, register
from theory.symbols import FUNCTIONS, SYMBOLS

ROOT = Path(__file__).resolve().parents[1]
STATEMENTS = tuple(catalogue())
ENGINE = next((engine for engine in ("tectonic", "pdflatex", "lualatex", "xelatex") if shutil.which(engine)), None)


@cache
def written() -> str:
    return (ROOT / "docs" / "theory.md").read_text()


def run_derive(*argv: str, before: str = "", seed: str = "0") -> str:
    """What the command prints in a fresh interpreter, after `before`."""
    code = f"{before}\nimport sys\nfrom theory.__main__ import main\nsys.exit(main(['derive', *sys.argv[1:]]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_document_is_current() -> None:
    # In another order of imports and of hashes, neither of which may be seen in the bytes.
    found = run_derive(
        "--all", "--format", "markdown", before="import theory.derivations_shortcut, theory.attention", seed="7"
    )
    assert found == written(), f"docs/theory.md is stale; run {COMMAND}"


def test_the_document_says_everything() -> None:
    text = written()
    for name in DERIVATIONS:
        assert f"#### Derivation {name}\n" in text
        assert derivation(name).title in text
    for name in STATEMENTS:
        assert f"#### Statement {name}\n" in text
        assert f"](#statement-{name})" in text
    for build in ASYMPTOTICS.values():
        assert build().statement in text
    assert all(f"`{key}`:" in text for key in REFERENCES)
    assert all(f"`{name}`" in text for name in SYMBOLS)
    assert COMMAND in text
    assert {name for _, names in QUESTIONS for name in names} <= set(DERIVATIONS)


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", written(), flags=re.MULTILINE)
    places = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#([^)]*)\)", written()))
    assert len(links) > len(DERIVATIONS) + len(STATEMENTS)
    assert links <= places


def test_markup_is_closed() -> None:
    text = written()
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    fences = re.findall(r"^```.*$", text, flags=re.MULTILINE)
    assert fences[0::2] == ["```math"] * (len(fences) // 2)
    assert set(fences[1::2]) == {"```"}
    prose = re.sub(r"^```math\n.*?\n```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "$" not in re.sub(r"\$`[^`]*`\$", "", prose)  # no formula outside of what GitHub reads literally
    for row in (line for line in prose.splitlines() if line.startswith("|")):
        assert len(re.findall(r"(?<!\\)\|", row)) in (3, 4, 5, 6, 7), row


@cache
def drawn(formula: str) -> float:
    mpl.use("agg")
    from matplotlib.mathtext import MathTextParser

    return float(MathTextParser("agg").parse(f"${formula}$").width)


@pytest.mark.parametrize("name", STATEMENTS)
def test_statement_page(name: str) -> None:
    statement = catalogue()[name]
    assert drawn(statement_formula(statement)) > 0
    for style in ("text", "markdown", "latex"):
        own, found = render_statement(statement, style), page(name, style)
        assert str(statement.source).partition(",")[0] in own
        assert statement.kind in own
        assert "Norm(" not in own
        if name in DERIVATIONS:
            assert found.count(derivation(name).title) == 1
        elif arriving(name):
            assert all(chain.title in found for chain in arriving(name))
        else:
            assert found == own
    assert render_statement(statement).isascii()


def test_a_statement_has_every_derivation_that_arrives() -> None:
    assert [chain.name for chain in arriving("norm-jacobian-upper")] == ["layernorm", "rmsnorm"]
    assert [chain.name for chain in arriving("ffn-estimate")] == ["ffn"]
    (silu,) = arriving("half-layer-sharp-gated-silu")
    assert silu.name == "half-layer-sharp-gated-relu"
    assert "gated_residual_edge_silu" in page("half-layer-sharp-gated-silu")


def test_every_statement_has_a_chain() -> None:
    """But a file of one's own, theory/bounds_NAME.py, whose page may say that it has none."""
    own = {name for name, build in statements._REGISTRY.items() if ".bounds_" in build.__module__}
    assert [name for name in STATEMENTS if name not in own and not arriving(name)] == []
    for name in set(STATEMENTS) - own:
        first = arriving(name)[0].name
        assert f"- derived in [{first}](#derivation-{first})" in written()


def test_mathtext_draws_every_limit() -> None:
    formulas = re.findall(r"```math\n(.*?)\n```", page("asymptotics", "markdown"), flags=re.DOTALL)
    assert len(formulas) == len(ASYMPTOTICS)
    assert all(r"\to" in formula and drawn(formula) > 0 for formula in formulas)


def test_mathtext_draws_every_symbol() -> None:
    letters = re.findall(r"^\| \$`(.*?)`\$ \| `", written(), flags=re.MULTILINE)
    assert len(letters) == len(SYMBOLS) + len(FUNCTIONS)
    assert all(drawn(letter) > 0 for letter in letters)


def test_a_registered_statement_has_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """One function, no other file: not even a letter for its quantity."""
    monkeypatch.setattr(statements, "_REGISTRY", dict(statements._REGISTRY))

    @register
    def trace_of_things() -> Statement:
        return Statement(
            name="trace-of-things",
            kind="sharp",
            quantity=Quantity(name="some_trace", meaning="a trace of things", axis="none"),
            formula=lambda sigma, d: sigma * d,
            source=Source(key="spikecheck"),
            assumptions=("d > 3 <things>",),
            why="because of 2 * 3",
            target=0.05,
        )

    assert "some_trace ~= sigma d" in page("trace-of-things")
    assert "relative error at most 5 %" in page("trace-of-things")
    assert r"\mathrm{some\ trace} \simeq \sigma d" in page("trace-of-things", "markdown")
    assert r"2 \* 3" in page("trace-of-things", "markdown")
    assert r"d > 3 \<things>" in page("trace-of-things", "markdown")
    assert "$<$things$>$" in page("trace-of-things", "latex")
    assert "#### Statement trace-of-things" in document()
    assert "trace-of-things" in titles()
    with pytest.raises(ValueError, match="unknown derivation 'trace'; run `spikecheck derive` to list them"):
        page("trace")


@pytest.mark.parametrize("name", ["ffn", "norm-jacobian-upper", "gaussian-opnorm-sharp", "asymptotics"])
def test_the_command_prints_a_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for style in ("text", "markdown", "latex"):
        assert theory.__main__.main(["derive", name, "--format", style]) == 0
        printed = capsys.readouterr().out
        assert printed == page(name, style).rstrip("\n") + "\n"


def test_the_command_lists_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert theory.__main__.main(["derive"]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = lines.index(theory.__main__.ALONE)
    listed = [line.split()[0] for line in lines if line != theory.__main__.ALONE]
    assert listed == list(titles())
    assert set(listed[:place]) == {*DERIVATIONS, "asymptotics"}
    assert {*DERIVATIONS, *STATEMENTS, "asymptotics"} == set(listed)
    assert theory.__main__.main(["derive", "ffn", "--all"]) == 2
    assert "leave out one of them" in capsys.readouterr().err
    target = tmp_path / "theory.txt"
    assert theory.__main__.main(["derive", "--all", "--out", str(target)]) == 0
    assert target.read_text() == document("text")
    assert target.read_text().isascii()


@pytest.mark.skipif(ENGINE is None, reason="no LaTeX engine on PATH: install tectonic or texlive-latex-base")
def test_latex_compiles(tmp_path: Path) -> None:
    source = tmp_path / "theory.tex"
    source.write_text(document("latex"))
    assert ENGINE is not None
    options = [] if ENGINE == "tectonic" else ["-interaction=nonstopmode", "-halt-on-error"]
    done = subprocess.run([ENGINE, *options, source.name], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "theory.pdf").stat().st_size > 10_000
    log = "" if ENGINE == "tectonic" else (tmp_path / "theory.log").read_text(errors="replace")
    wide = [float(points) for points in re.findall(r"Overfull \\hbox \(([\d.]+)pt", log)]
    assert max(wide, default=0.0) < 25, wide  # less than half a margin: no formula leaves the page


def test_latex_is_balanced() -> None:
    text = document("latex")
    assert text.isascii()
    for environment in ("document", "align", "enumerate", "itemize"):
        assert text.count(rf"\begin{{{environment}}}") == text.count(rf"\end{{{environment}}}") > 0
    assert text.count("{") == text.count("}")
