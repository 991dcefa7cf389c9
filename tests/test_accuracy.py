"""The accuracy page: a tiny grid end to end, resumed, and that the published page is the present one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from empirics import accuracy, norm_samples
from empirics.__main__ import main
from empirics.accuracy_cases import Case, network
from empirics.agreement import ACCURACY
from empirics.command_line import require_whole_page
from empirics.run import run
from theory.growth import gradient_growth
from theory.records import write_record
from theory.statements import find

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "accuracy.md").read_text()
QUICK = "gaussian-opnorm-sharp"


def row_of(label: str) -> str:
    found = [line for line in PAGE.splitlines() if line.startswith(f"| {label} |")]
    assert len(found) == 1, f"docs/accuracy.md is stale: run `python -m empirics accuracy`: {label}"
    return found[0]


def test_the_page_has_every_case_and_no_other() -> None:
    cases = accuracy.cases()
    labels = [case.label for case in cases]
    assert len(set(labels)) == len(labels)
    for label in labels:
        row_of(label)
    growth = PAGE.partition("## Norms of sub-layers")[0].splitlines()
    assert sum(line.endswith(("inside |", "unknown |")) for line in growth) == len(labels)


@pytest.mark.parametrize("group", ["grid", "variant", "deep", "text"])
def test_growth_is_as_accurate_as_stated(group: str) -> None:
    """Inside the domain: the worst by what is stated and a standard error, the median of many by a quarter of it."""
    found = [
        [c.strip() for c in row_of(case.label).strip("|").split("|")]
        for case in accuracy.cases()
        if case.group == group
    ]
    inside = [(abs(float(row[3].split()[0])), float(row[4].split()[0])) for row in found if row[-1] == "inside"]
    assert len(inside) >= len(found) - 2
    assert all(error <= 100 * ACCURACY + standard_error for error, standard_error in inside)
    if group != "deep":
        assert median(error for error, _ in inside) <= 25 * ACCURACY
    # Control: as if tokens were distinct, a text's growth is off by more.
    if group == "text":
        assert any(abs(float(row[6].split()[0])) > 100 * ACCURACY for row in found)


@pytest.mark.parametrize("place", range(0, len(accuracy.cases()), 7))
def test_printed_predictions_are_what_is_predicted_now(place: int) -> None:
    case = accuracy.cases()[place]
    predicted = gradient_growth(case.architecture, case.seq_len, distinct=case.text != "")
    cells = [cell.strip() for cell in row_of(case.label).strip("|").split("|")]
    assert cells[5 if case.text else 1] == f"{predicted.value:.4g}"  # on a text: as if its tokens were distinct
    assert cells[-1] == ("inside" if predicted.in_domain else "unknown")


def test_a_text_is_predicted_from_which_of_its_tokens_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    small = replace(network(64, 2), vocab_size=300)
    case = Case("text", "small", small, 32, (0, 1), str(text))
    monkeypatch.setattr(accuracy, "cases", lambda: [case])
    record = run(case.spec, tmp_path)
    page = accuracy.markdown([(case, record)], cache=tmp_path / "data")
    *_, line = page.splitlines()
    label, predicted, measured, error, _, distinct, its_error, _ = (cell.strip() for cell in line.strip("|").split("|"))
    assert (label, distinct) == ("small", f"{gradient_growth(small, 32, distinct=True).value:.4g}")
    assert abs(float(error.split()[0]) - 100 * math.log(float(predicted) / float(measured))) < 0.1
    # A record may be older than the theory: what it predicted is not printed.
    assert page == accuracy.markdown([(case, record | {"predictions": []})], cache=tmp_path / "data")
    # Control: the tokens of such lines repeat, and not to know it leaves a larger error, of the other sign here.
    assert abs(float(its_error.split()[0])) > abs(float(error.split()[0]))
    assert abs(math.log(float(predicted) / float(distinct))) > 0.05


SETTINGS = {name: norm_samples.settings(statement) for name, statement in norm_samples.sharp_statements().items()}
QUICKLY_SIMULATED = 2**12  # numbers in an input: of larger ones, or of wider heads, all draws take seconds


def norm_lines(name: str) -> list[str]:
    return [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]


def takes_seconds(name: str, setting: norm_samples.Setting) -> bool:
    values = setting.values
    if name.startswith("experts"):
        return "gated" in name or values["d"] > 64 or values["n_tokens"] > 16
    return "simulated" in name and (
        values["numbers"] > QUICKLY_SIMULATED or values.get("n_heads", 0) * values.get("d_head", 0) > values["d"]
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_every_norm_is_printed(name: str) -> None:
    lines = norm_lines(name)
    assert len(lines) == len(SETTINGS[name]), "docs/accuracy.md is stale: run `python -m empirics accuracy`"
    for line, setting in zip(lines, SETTINGS[name], strict=True):
        assert ("outside" not in line) == setting.inside(find(name))
        assert "missed" not in line


@pytest.mark.parametrize(
    ("name", "place"),
    [
        pytest.param(name, place, id=f"{name}: {s.label}", marks=[pytest.mark.slow] * takes_seconds(name, s))
        for name, settings in SETTINGS.items()
        for place, s in enumerate(settings)
    ],
)
def test_printed_norms_are_what_is_predicted_now(name: str, place: int) -> None:
    assert f"| {SETTINGS[name][place].predicted(find(name)):.4g} |" in norm_lines(name)[place]


def test_norms_are_resumed_and_a_damaged_record_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy, "cases", list)
    page, record = tmp_path / "page.md", tmp_path / f"norms-{QUICK}.json"
    command = ["accuracy", "--only", QUICK, "--out", str(tmp_path), "--markdown", str(page)]
    assert main(command) == 0
    first, whole = page.read_text(), record.read_text()
    assert first.count(f"`{QUICK}`") == len(norm_samples.settings(find(QUICK)))

    def never(*_: object) -> dict[str, object]:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(accuracy, "measure", never)
        assert main(command) == 0
        assert page.read_text() == first
        record.write_text(record.read_text()[:100])  # cut off
        with pytest.raises(AssertionError, match="measured again"):
            main(command)
    rows = json.loads(whole)["rows"]
    rows[0] |= {"predicted": 1e9, "in_domain": False}  # as of an older theory
    write_record(record, kind="norms", body={"rows": rows})
    with monkeypatch.context() as patch:
        patch.setattr(accuracy, "measure", never)
        assert main(command) == 0
        assert page.read_text() == first
    record.write_text('{"schema": -1}')
    assert main(command) == 0
    assert page.read_text() == first
    capsys.readouterr()


def test_a_missed_target_is_said() -> None:
    """The control of the page's last column."""
    row = {
        "statement": "s", "label": "l", "predicted": 1.1, "measured": 1.0, "standard_error": 0.0, "target": 0.05,
        "in_domain": True,
    }  # fmt: skip
    assert "**missed**" in accuracy.norms_markdown([row])[-1]
    assert "missed" not in accuracy.norms_markdown([row | {"in_domain": False}])[-1]


@pytest.mark.parametrize("command", ["accuracy", "classes"])
def test_a_page_of_a_few_rows_takes_no_others_place(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of either command, on the published page; nothing is measured before."""
    page, out = tmp_path / "page.md", tmp_path / "out"
    published = (ROOT / "docs" / f"{command}.md").read_text()
    page.write_text(published)
    only = {"accuracy": "gaussian-opnorm", "classes": "olmo2"}[command]
    assert main([command, "--only", only, "--out", str(out), "--markdown", str(page)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"rows of others than {only!r}" in said
    assert "leave out --only" in said
    assert page.read_text() == published
    assert not out.exists()
    # Of the chosen ones alone, or of all, it may be written over.
    rows = [line for line in published.splitlines() if not line.startswith("| ") or only in line.split(" | ")[0]]
    page.write_text("\n".join(rows))
    require_whole_page(str(page), only)
    page.write_text(published)
    require_whole_page(str(page), "")
    require_whole_page(str(tmp_path / "none.md"), only)


def test_only_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accuracy", "--only", "no such case"]) == 2
    assert "--list prints them" in capsys.readouterr().err
