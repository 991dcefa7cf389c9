"""The page on adding a bound does what it says: its code is run, attacked, measured, rendered and drawn."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

import theory
from empirics import norm_samples
from empirics.attack import attack
from figures import statements as plot
from theory.__main__ import main
from theory.records import write_record
from theory.statements import _REGISTRY, catalogue, find

PAGE = Path(__file__).resolve().parents[1] / "docs" / "add-a-bound.md"
NAMES = ("ffn-balanced-upper", "ffn-limit-sharp")


@pytest.fixture(scope="module", autouse=True)
def added(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The page's two files in theory's path; taken out again."""
    folder = tmp_path_factory.mktemp("bounds")
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == len(NAMES)
    files = [folder / f"bounds_page_{place}.py" for place in range(len(blocks))]
    for file, block in zip(files, blocks, strict=True):
        file.write_text(block)
    before = set(catalogue())
    theory.__path__.append(str(folder))
    yield
    theory.__path__.remove(str(folder))
    for file in files:
        sys.modules.pop(f"theory.{file.stem}", None)
    for name in NAMES:
        _REGISTRY.pop(name, None)
    assert set(catalogue()) == before


def test_one_file_is_enough() -> None:
    assert set(NAMES) <= set(catalogue())


def test_attack_breaks_it_only_when_it_is_shrunk_or_wrong() -> None:
    statement = find("ffn-balanced-upper")
    assert attack(statement, budget=200)["violations"] == 0
    assert attack(statement, budget=200, shrink=0.9)["violations"] > 0
    minus = replace(statement, formula=lambda lipschitz, opnorm_1, opnorm_2: lipschitz * abs(opnorm_1**2 - opnorm_2**2))
    assert attack(minus, budget=100)["violations"] > 0
    assert attack(replace(statement, covers={}), budget=100)["violations"] > 0  # a gated layer is another matter


def test_sharp_value_gets_rows() -> None:
    statement = find("ffn-limit-sharp")
    rows = norm_samples.settings(statement)
    assert {setting.inside(statement) for setting in rows} == {True, False}
    quick = next(setting for setting in rows if setting.inside(statement))
    row = norm_samples.measure(statement, quick)
    assert abs(row["predicted"] / row["measured"] - 1) <= row["target"]
    assert "ffn-limit-sharp" in norm_samples.sharp_statements()


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["derive", name]) == 0
    text = capsys.readouterr().out
    assert name in text
    assert find(name).why in text


def test_it_has_a_line_in_the_plot() -> None:
    kinds = {name: statement.kind for name, statement in catalogue().items()}
    row = {"target": 0.04, "predicted": 1.0, "measured": 1.1, "standard_error": 0.01, "in_domain": True}
    ratios = {"median": 0.5, "plain": 0.0, "attacked": 1.0}
    figure = plot.draw(kinds, {"ffn-balanced-upper": ratios}, {"ffn-limit-sharp": [row]})
    labels = [text.get_text() for axes in figure.axes for text in axes.get_yticklabels()]
    assert set(NAMES) <= set(labels)
    assert "ffn-upper (not measured)" in labels


def test_plot_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["statements", "--plot", str(tmp_path / "all.png"), "--records", str(tmp_path)]
    assert main(command) == 2
    assert "attack all" in capsys.readouterr().err
    found = {"worst_ratio": 1.0, "tightness": {"median": 0.5, "plain": 0.2}}
    write_record(tmp_path / "attacks.json", kind="attacks", body={"attacks": {"ffn-upper": found}})
    assert main(command) == 0
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("wrote")


def test_nothing_of_the_plot_is_cut_off() -> None:
    figure = plot.draw({statement.name: statement.kind for statement in catalogue().values()}, {}, {})
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        label = axes.xaxis.label.get_window_extent()
        assert figure.bbox.x0 <= label.x0 < label.x1 <= figure.bbox.x1
