"""The report: one HTML file with verdicts, figures and settings, that opens from disk and loads nothing."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from figures import report_device
from figures.claims import NOT_REPRODUCED, NOT_TESTED, REPRODUCED
from figures.report_style import CSS
from theory.records import write_bytes

# verdict: class name, symbol. The word, the symbol and the colour say the same.
VERDICTS = {
    REPRODUCED: ("yes", "&#10003;"),
    NOT_REPRODUCED: ("no", "&#10007;"),
    NOT_TESTED: ("open", "&#9675;"),
}
COLUMNS = ("verdict", "claim", "criterion", "observed", "predicted", "error", "seeds")
SCREEN, PRINTED = 920, 1440  # width of a full figure: on the screen, and in its file (7.2 inches at 200 dpi)
TYPES = {".png": "image/png", ".svg": "image/svg+xml"}

HOW_TO_READ = (
    ("measured", "Measured", "Observed on a network. Markers; bands or bars are the spread over seeds."),
    (
        "sharp",
        "Sharp prediction",
        "The value itself, from the configuration, before the network exists. Solid lines; judged by its error.",
    ),
    (
        "estimate",
        "Estimate",
        "What the paper writes with &ldquo;~&rdquo; or under simplifying assumptions. Dashed lines; it may be "
        "violated, and a violation refutes no theorem.",
    ),
    (
        "upper",
        "Rigorous upper bound",
        "An inequality that holds without exception under stated assumptions. Dotted lines; one violation refutes it.",
    ),
)
DASHES = {"sharp": "none", "estimate": "7 3", "upper": "2 2.5"}


def write_report(
    path: Path,
    *,
    title: str,
    claims: Sequence[Mapping[str, Any]],
    figures: Sequence[tuple[str, Path, str]],
    settings: Mapping[str, Any],
    notes: Sequence[str],
    device: Mapping[str, Any] | None = None,
    device_figures: Sequence[tuple[str, Path, str]] = (),
) -> None:
    """Write the report, whole or not at all; the same arguments give the same bytes.

    Args:
        claims: mappings with id, claim, kind, verdict, criterion, observed, predicted, error, seeds and source;
            what is absent or None is shown as a dash.
        figures: name, SVG or PNG file and caption of each figure, in order.
        settings: settings and library versions; values may be mappings or lists.
        notes: what the reader should know, a paragraph each.
        device: the record of a device check; without one the report says that no GPU was checked.
        device_figures: figures of it, as `figures`.

    Raises:
        ValueError: a verdict or an image format is not known, or an image cannot be read.
    """
    body = "\n".join(
        (
            f"<header><h1>{escape(title)}</h1>{_summary(claims)}</header>",
            _section("claims", "Claims", _claims(claims)) if claims else "",
            _section("reading", "How to read this", _how_to_read()) if claims or figures or device is None else "",
            _section("notes", "Notes", "".join(f"<p>{_text(note)}</p>" for note in notes)) if notes else "",
            _section("figures", "Figures", "".join(_figure(*figure) for figure in figures)) if figures else "",
            _section(
                "gpu",
                report_device.title(device),
                report_device.section(device) + "".join(_figure(*each) for each in device_figures),
            ),
            _section("settings", "Settings and versions", _settings(settings)),
        )
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
    write_bytes(path, page.encode())


def _text(value: Any) -> str:
    """A value as escaped text: numbers to four digits, lists joined, nothing as a dash."""
    if value is None or value == "" or (isinstance(value, list | tuple) and not value):
        return "&ndash;"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Real) and not isinstance(value, Integral):
        return escape(f"{float(value):.4g}")
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(str(key))}: {_text(item)}" for key, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return ", ".join(_text(item) for item in value)
    return escape(str(value))


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{content}</section>'


def _verdict(verdict: str) -> str:
    if verdict not in VERDICTS:
        raise ValueError(f"unknown verdict {verdict!r}; use one of {', '.join(VERDICTS)}")
    name, symbol = VERDICTS[verdict]
    return f'<span class="verdict {name}"><span aria-hidden="true">{symbol}</span> {verdict}</span>'


def _summary(claims: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(claim["verdict"] for claim in claims)
    parts = [f"<li><b>{counts[verdict]}</b> {_verdict(verdict)}</li>" for verdict in VERDICTS if counts[verdict]]
    return f'<ul class="summary">{"".join(parts)}</ul>' if parts else ""


def _claims(claims: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f'<th scope="col">{column}</th>' for column in COLUMNS)
    rows = "".join(_claim(claim) for claim in claims)
    return f'<table class="rows claims"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _claim(claim: Mapping[str, Any]) -> str:
    about = "; ".join(_text(claim[field]) for field in ("kind", "source") if claim.get(field))
    cells = {column: _text(claim.get(column)) for column in COLUMNS[2:]}
    cells["verdict"] = _verdict(claim["verdict"])
    identifier = f'<span class="id">{_text(claim["id"])}</span> ' if claim.get("id") is not None else ""
    cells["claim"] = f'<div>{identifier}{_text(claim.get("claim"))}<div class="about">{about}</div></div>'
    content = "".join(f'<td data-column="{column}">{cells[column]}</td>' for column in COLUMNS)
    return f"<tr>{content}</tr>"


def _how_to_read() -> str:
    items = "".join(f"<dt>{_sample(kind)} {name}</dt><dd>{meaning}</dd>" for kind, name, meaning in HOW_TO_READ)
    return f'<dl class="kinds">{items}</dl>'


def _sample(kind: str) -> str:
    """A piece of the line that a kind is drawn with."""
    inside = (
        "".join(f'<circle cx="{x}" cy="6" r="3"/>' for x in (7, 20, 33))
        if kind == "measured"
        else f'<line x1="2" x2="38" y1="6" y2="6" stroke-dasharray="{DASHES[kind]}"/>'
    )
    return f'<svg class="sample" viewBox="0 0 40 12" aria-hidden="true">{inside}</svg>'


def _figure(name: str, path: Path, caption: str) -> str:
    path = Path(path)
    if path.suffix not in TYPES:
        raise ValueError(f"{path.name} is neither .png nor .svg; save the figure in one of these formats")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; draw the figure before the report") from None
    heading = escape(name.replace("_", " ").capitalize())
    source = f"data:{TYPES[path.suffix]};base64,{base64.b64encode(content).decode()}"
    return (
        f'<figure id="{escape(name)}"><h3>{heading}</h3>'
        f'<img style="max-width: {_width(path, content)}px" alt="{heading}" src="{source}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _width(path: Path, content: bytes) -> int:
    """Pixels on the screen: a narrow figure stays narrow, so that letters are of one size."""
    pixels = int.from_bytes(content[16:20], "big") if path.suffix == ".png" else PRINTED  # from the PNG's header
    return round(SCREEN * min(1.0, pixels / PRINTED))


def _settings(settings: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{_text(key)}</dt><dd>{_value(value)}</dd>" for key, value in settings.items())
    return f'<dl class="settings">{items}</dl>'


def _value(value: Any) -> str:
    """A setting; a mapping becomes a list inside the list."""
    return _settings(value) if isinstance(value, Mapping) and value else _text(value)
