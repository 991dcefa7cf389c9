"""Figures drawn from records, the claims judged from them, and the report that holds both.

Nothing here computes a prediction or a measurement: records are read, arranged and drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from figures.selection import Records

NAMES = (
    "gradient_growth",
    "gradient_bounds",
    "jacobian_norms",
    "loss_curves",
    "gradient_norms",
    "learning_rates",
    "distributions",
    "while_training",
)


class FigureModule(Protocol):
    """What every figure's module offers. Both raise ValueError where the records hold nothing to draw."""

    def draw(self, records: Records) -> Figure: ...

    def caption(self, records: Records) -> str: ...


class _Modules(Mapping[str, FigureModule]):
    """Modules by name, imported when asked for: the command line starts without matplotlib."""

    def __getitem__(self, name: str) -> FigureModule:
        if name not in NAMES:
            raise KeyError(f"unknown figure {name!r}; use one of {', '.join(NAMES)}")
        return import_module(f"figures.{name}")  # type: ignore[return-value]

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


FIGURES: Mapping[str, FigureModule] = _Modules()


def save(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Write a figure as `folder/name.png` (200 dpi) and `folder/name.svg`, whole or not at all.

    The same figure gives the same bytes: no date, no version and no random identifier is written.
    """
    from figures import style
    from theory.records import write_bytes

    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    write_bytes(png, style.render(figure, "png"))
    write_bytes(svg, style.render(figure, "svg"))
    return png, svg


__all__ = ["FIGURES", "NAMES", "FigureModule", "save"]
