"""The report's section on what a GPU has shown: the rows of a device check, or that there is none."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from figures.devices import AGREES, DIFFERS, MEASURED, Row

COMMAND = "python paper_repro.py --scale gpu-smoke"
# verdict: class name and symbol, as in the table of claims.
VERDICTS = {AGREES: ("yes", "&#10003;"), DIFFERS: ("no", "&#10007;"), MEASURED: ("open", "&#9675;")}
COLUMNS = ("verdict", "quantity", "reference", "device", "difference", "tolerance", "where the tolerance comes from")
NOT_A_GPU = "This is a self-test of the program, a CPU held against a CPU. It is no evidence about any GPU."


def heading(record: Mapping[str, Any]) -> str:
    """What was compared, with what, when."""
    e = record["environment"]
    cuda = f", CUDA {e['cuda']}" if e.get("cuda") else ""
    left_out = f" Not run: {', '.join(record['missing'])}." if record["missing"] else ""
    about = "" if record["gpu"] else f" {NOT_A_GPU}"
    return f"{e['device']}, torch {e['torch']}{cuda}, {record['date']}.{about}{left_out}"


def title(record: Mapping[str, Any] | None) -> str:
    """Of the section."""
    return "On a GPU" if record is None or record["gpu"] else "Self-test of the comparison with a GPU"


def counted(record: Mapping[str, Any]) -> str:
    """Verdicts in numbers."""
    verdicts = [row["verdict"] for row in record["rows"]]
    many = {AGREES: "agree", DIFFERS: "differ"}
    counts = {each: verdicts.count(each) for each in VERDICTS if each in verdicts}
    return ", ".join(f"{n} {each if n == 1 else many.get(each, each)}" for each, n in counts.items())


def number(value: float | None) -> str:
    """Six digits, so that what differs in the last can be seen; a dash for what there is not."""
    return "-" if value is None else f"{value:.6g}"


def small(value: float | None) -> str:
    """A difference or a tolerance."""
    return "-" if value is None else f"{value:.1e}" if value else "0"


def text_table(record: Mapping[str, Any]) -> str:
    """The rows for a terminal."""
    lines = [heading(record)]
    for row in record["rows"]:
        difference, tolerance = small(row["difference"]), small(row["tolerance"])
        if row["difference"] is None and row["tolerance"] is not None:
            difference = "infinite"
        at = f"{number(row['reference']):>11} {number(row['device']):>11} {difference:>9} {tolerance:>8}"
        lines.append(f"{row['verdict']:9}{at}  {row['quantity']} ({row['where']})")
    legend = f"{'':9}{'reference':>11} {'device':>11} {'apart':>9} {'allowed':>8}"
    return "\n".join([lines[0], legend, *lines[1:], counted(record)])


def section(record: Mapping[str, Any] | None) -> str:
    """The section's HTML, without its heading."""
    if record is None:
        return (
            "<p>No record of a check on a GPU was found: nothing here shows how a GPU's numbers compare with a CPU's. "
            f"Where there is a CUDA device, <code>{COMMAND}</code> makes one in about five minutes.</p>"
        )
    head = "".join(f'<th scope="col">{column}</th>' for column in COLUMNS)
    body = "".join(_row(row) for row in record["rows"])
    return (
        f"<p>{escape(heading(record))}</p><p>{escape(counted(record))}. Differences are relative.</p>"
        f'<table class="rows devices"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    )


def _row(row: Row) -> str:
    name, symbol = VERDICTS[row["verdict"]]
    infinite = row["difference"] is None and row["tolerance"] is not None
    of = f'<div class="about">{escape(row["reference_is"])}</div>' if row["reference_is"] else ""
    cells = (
        f'<span class="verdict {name}"><span aria-hidden="true">{symbol}</span> {row["verdict"]}</span>',
        f'<div>{escape(row["quantity"])}<div class="about">{escape(row["where"])}</div></div>',
        f"<div>{number(row['reference'])}{of}</div>",
        number(row["device"]),
        "infinite" if infinite else small(row["difference"]),
        small(row["tolerance"]),
        escape(row["basis"]),
    )
    content = "".join(f'<td data-column="{column}">{cell}</td>' for column, cell in zip(COLUMNS, cells, strict=True))
    return f"<tr>{content}</tr>"
