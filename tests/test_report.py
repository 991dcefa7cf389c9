"""The report: one page that is whole by itself, says every verdict and escapes what it is given."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.figure_records import training

from figures import learning_rates, loss_curves, save
from figures.report import VERDICTS, write_report

VOID = {"meta", "img", "link", "br", "circle", "line"}


class Reader(HTMLParser):
    """Checks that tags nest, and collects addresses and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def claims() -> list[dict[str, Any]]:
    base = {
        "kind": "upper",
        "criterion": "a < b & c",
        "source": "someone, eq. (1)",
        "seeds": [0, 1],
        "error": 0.01234567,
    }
    return [
        {**base, "id": f"c{n}", "claim": f"<script>alert({n})</script>", "verdict": verdict, "observed": None}
        for n, verdict in enumerate(VERDICTS)
    ]


def report(path: Path, claims: list[dict[str, Any]]) -> tuple[str, Reader]:
    png, svg = save(loss_curves.draw([training("Vanilla")]), path.parent, "loss_curves")
    figures = [("loss_curves", png, "a <b>caption</b>"), ("again", svg, "the same as a drawing")]
    settings = {"scale": "smoke", "versions": {"numpy": "2"}, "rates": [0.01, 0.03]}
    write_report(path, title="A & B", claims=claims, figures=figures, settings=settings, notes=["1 < 2"])
    page = path.read_text()
    reader = Reader()
    reader.feed(page)
    reader.close()
    return page, reader


def test_report_is_whole_and_self_contained(tmp_path: Path, claims: list[dict[str, Any]]) -> None:
    page, reader = report(tmp_path / "report.html", claims)
    assert not reader.open
    assert "script" not in reader.tags
    assert "link" not in reader.tags
    assert len(reader.addresses) == 2
    assert all(address.startswith("data:image/") for address in reader.addresses)
    assert "url(" not in page
    assert "@import" not in page
    assert (tmp_path / "report.html").read_bytes().isascii()


def test_report_says_every_verdict_in_words_and_symbols(tmp_path: Path, claims: list[dict[str, Any]]) -> None:
    _, reader = report(tmp_path / "report.html", claims)
    for verdict, symbol in zip(VERDICTS, "\u2713\u2717\u25cb"):
        assert f"{symbol} {verdict}" in reader.text
    for kind in ("Sharp prediction", "Estimate", "Rigorous upper bound", "Measured"):
        assert kind in reader.text
    assert "0.01235" in reader.text
    assert "0, 1" in reader.text
    assert "versions" in reader.text


def test_report_escapes_what_it_is_given(tmp_path: Path, claims: list[dict[str, Any]]) -> None:
    page, reader = report(tmp_path / "report.html", claims)
    assert "<script>alert(0)</script>" in reader.text
    assert "<script>" not in page
    assert "a < b & c" in reader.text
    assert "a <b>caption</b>" in reader.text
    assert "1 < 2" in reader.text


def test_report_is_the_same_twice(tmp_path: Path, claims: list[dict[str, Any]]) -> None:
    assert report(tmp_path / "1.html", claims)[0] == report(tmp_path / "2.html", claims)[0]


def test_letters_of_a_narrow_figure_are_no_larger(tmp_path: Path) -> None:
    wide, _ = save(loss_curves.draw([training("Vanilla")]), tmp_path, "wide")
    narrow, vector = save(learning_rates.draw([training("Vanilla")]), tmp_path, "narrow")
    figures = [(path.name, path, "") for path in (wide, narrow, vector)]
    write_report(tmp_path / "r.html", title="t", claims=[], figures=figures, settings={}, notes=[])
    widths = [int(found) for found in re.findall(r'<img style="max-width: (\d+)px"', (tmp_path / "r.html").read_text())]
    assert widths == [920, round(0.62 * 920), 920]


def test_report_of_nothing_is_still_a_page(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", title="t", claims=[], figures=[], settings={}, notes=[])
    assert "How to read this" in (tmp_path / "r.html").read_text()


def test_report_names_the_remedy(tmp_path: Path, claims: list[dict[str, Any]]) -> None:
    claims[0]["verdict"] = "maybe"
    with pytest.raises(ValueError, match="use one of reproduced"):
        write_report(tmp_path / "r.html", title="t", claims=claims, figures=[], settings={}, notes=[])
    for path, remedy in ((tmp_path / "a.gif", "save the figure"), (tmp_path / "a.png", "draw the figure")):
        with pytest.raises(ValueError, match=remedy):
            write_report(tmp_path / "r.html", title="t", claims=[], figures=[("a", path, "")], settings={}, notes=[])
