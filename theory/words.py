"""What messages and tables have in common: a number with its noun, and the names that their reader typed."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LONGEST = 80  # characters of a value in a message
UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def counted(number: int, one: str, several: str = "") -> str:
    """A number and what it counts.

    >>> counted(1, "token"), counted(2, "token"), counted(0, "loss", "losses")
    ('1 token', '2 tokens', '0 losses')
    """
    return f"{number} {one if number == 1 else several or one + 's'}"


def short(number: int) -> str:
    """A number to three digits, in thousands, millions and so on.

    >>> short(512), short(405_012_480), short(999_600_000), short(46_702_792_704)
    ('512', '405M', '1B', '46.7B')
    """
    rounded = float(f"{number:.3g}")
    unit, letter = next((pair for pair in UNITS if rounded >= pair[0]), (1.0, ""))
    return f"{rounded / unit:.3g}{letter}"


def brief(value: Any) -> str:
    """A value as Python writes it, and of a long one the beginning.

    >>> brief("gpt2"), brief(64), brief(10**399)
    ("'gpt2'", '64', '1000000000000000000000000000000000000000... (400 characters)')
    """
    written = repr(value)
    return written if len(written) <= LONGEST else f"{written[:40]}... ({len(written)} characters)"


def as_typed(message: str, names: Mapping[str, str]) -> str:
    """A message of the code with the options, or the keys of a file, that its reader set in place of arguments.

    Args:
        names: by the name of the argument.

    >>> as_typed("batch_size=4 does not go evenly over 3 ranks", {"batch_size": "--batch"})
    '--batch 4 does not go evenly over 3 ranks'
    >>> as_typed("d_model=64 is not divisible by n_heads=5; use d_model=60 or 65", {"d_model": "n_embd"})
    'n_embd=64 is not divisible by n_heads=5; use n_embd=60 or 65'
    """

    def typed(found: re.Match[str]) -> str:
        name = names.get(found[1])
        return found[0] if name is None else f"{name} " if name.startswith("-") else f"{name}="

    return re.sub(r"(?<![\w./'-])([a-z]\w*)=", typed, message)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, width: int = 100) -> str:
    """Columns as wide as their widest cell, the last one wrapped at `width` characters.

    >>> print(table(["name", "kind", "source"], [["ffn", "upper", "by hand"], ["b", "sharp", "a law of it"]], width=20))
    name  kind   source
    ffn   upper  by hand
    b     sharp  a law of
                 it
    """
    cells = [head, *rows]
    widths = [max(len(row[column]) for row in cells) + 2 for column in range(len(head) - 1)]
    indent = sum(widths)
    lines: list[str] = []
    for row in cells:
        first = "".join(f"{cell:<{size}}" for cell, size in zip(row, widths))
        wrapped = textwrap.wrap(row[-1], max(width - indent, 8), break_long_words=False, break_on_hyphens=False) or [""]
        lines += [(first + wrapped[0]).rstrip(), *(" " * indent + more for more in wrapped[1:])]
    return "\n".join(lines)
