"""Imports run one way: theory knows no network, probes know no formula, figures know neither."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("theory", "empirics", "figures")
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

# A probe may share types with the theory it tests, never a formula.
TYPES = {"theory.architecture", "theory.initialisation", "theory.records", "theory.quantities", "theory.sources"}
TYPES |= {"theory.words", "theory.names"}  # how a number and its noun are written, and what a slip meant
# The doors: these put a prediction, or a bound, beside a measurement.
DOORS = {"empirics.__main__", "empirics.initialisation", "empirics.run", "empirics.comparison"}
DOORS |= {"empirics.tokenise_command", "empirics.perplexity_command"}  # the options and output of every command
DOORS |= {"empirics.measure_command", "empirics.classes", "empirics.networks"}
DOORS |= {"empirics.bounds", "empirics.probes_command", "empirics.sweep_command", "empirics.train_command"}
DOORS |= {"empirics.attack", "empirics.falsify", "empirics.accuracy", "empirics.norm_samples"}
DOORS |= {"empirics.norm_settings", "empirics.routed_samples"}  # which it is made of


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str, package: str) -> Iterator[str]:
    """Every module that a file imports, anywhere in it; `from a import b` gives `a` and `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package if node.level else ""
            base = f"{base}.{node.module}".strip(".") if node.module else base
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            for argument in node.args[:1]:
                text = argument.values[0] if isinstance(argument, ast.JoinedStr) else argument
                if isinstance(text, ast.Constant):
                    yield str(text.value).strip(".")


def imported(path: Path) -> set[str]:
    return set(imports(path.read_text(), path.parent.name))


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def test_the_walk_sees_every_kind_of_import() -> None:
    source = (
        "import torch.nn as nn\ndef f():\n    from theory import stack\n    from . import model\n"
        "import importlib\nimportlib.import_module(f'figures.{x}')\n"
    )
    found = set(imports(source, "empirics"))
    assert {"torch.nn", "theory", "theory.stack", "empirics.model", "figures"} <= found
    assert len(MODULES) > 40


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name == "theory"], ids=name_of)
def test_theory_knows_no_network(path: Path) -> None:
    assert not roots(path) & {"torch", "transformers", "empirics"}
    if name_of(path) != "theory.__main__":
        assert "figures" not in roots(path)


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name == "figures"], ids=name_of)
def test_figures_draw_from_records(path: Path) -> None:
    assert not roots(path) & {"torch", "transformers", "empirics"}
    modules = {name for name in imported(path) if name.startswith("theory.")}
    known = {"theory.architecture", "theory.records", "theory.words"}
    assert {".".join(name.split(".")[:2]) for name in modules} <= known
    assert "theory" not in imported(path)


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name == "empirics"], ids=name_of)
def test_probes_take_types_from_theory_and_no_formula(path: Path) -> None:
    assert "figures" not in roots(path)
    if name_of(path) in DOORS:
        return
    modules = {".".join(name.split(".")[:2]) for name in imported(path) if name.startswith("theory")}
    assert modules <= TYPES, f"{name_of(path)} imports {', '.join(sorted(modules - TYPES))}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_from_theory_name_its_modules(path: Path) -> None:
    """`from theory import x` would hide which module x is from, and with it the rule above."""
    if path.parent.name == "empirics":
        assert "theory" not in imported(path)


def loaded(statement: str) -> set[str]:
    """Top-level names in sys.modules after a statement, in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


def test_importing_theory_is_light() -> None:
    found = loaded("import theory; theory.gradient_growth(theory.preset('tiny'), 8)")
    assert "theory" in found
    assert not found & {"torch", "sympy", "matplotlib", "transformers", "empirics", "figures"}


def test_evaluating_every_statement_needs_no_algebra_system() -> None:
    # Counts are 1 but for widths, which a sharp value wants large; a sixteenth of them is even, as rotary pairs are.
    code = """
from theory.statements import catalogue
from theory.symbols import SYMBOLS
for statement in catalogue().values():
    counts = {name: 64 if name.startswith("d") else 1 for name in statement.parameters if SYMBOLS[name].integer}
    counts |= {name: 0 for name in statement.parameters if SYMBOLS[name].range.startswith("0 or 1")}
    statement.evaluate({name: counts.get(name, 1 / 16) for name in statement.parameters})
"""
    assert not loaded(code) & {"torch", "sympy", "matplotlib"}


def test_figures_draw_without_torch() -> None:
    names = [name_of(path) for path in MODULES if path.parent.name == "figures"]
    found = loaded("import matplotlib\nmatplotlib.use('Agg')\n" + "\n".join(f"import {name}" for name in names))
    assert "matplotlib" in found
    assert not found & {"torch", "empirics", "transformers"}


def test_data_needs_no_torch() -> None:
    assert "torch" not in loaded("import empirics.data, empirics.spikes")
