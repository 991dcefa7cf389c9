"""Names that do not exist: what was meant instead."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

CLOSE = 0.65  # of difflib's ratio: one slip in three letters, where half of two names often agrees by chance


def meant(name: str, names: Iterable[str], *, close: float = CLOSE) -> str:
    """A question that names the closest of the names that there are; empty if none is close.

    >>> meant("fnn-uper", ["ffn-upper", "ffn", "softmax"])
    'did you mean ffn-upper?'
    >>> meant("350M", ["350m", "1.7b"]), meant("nonsense", ["ffn"])
    ('did you mean 350m?', '')
    >>> meant("mamba", ["llama"])
    ''
    """
    lower = {one.lower(): one for one in names}
    found = [lower[one] for one in get_close_matches(name.lower(), lower, n=3, cutoff=close)]
    return f"did you mean {' or '.join(found)}?" if found else ""


def unknown(what: str, name: str, names: Iterable[str], *, command: str = "") -> str:
    """One line for a name that does not exist: what may have been meant, and the names or the command that lists them.

    >>> unknown("preset", "tinny", ["tiny", "wide"])
    "unknown preset 'tinny'; did you mean tiny? use one of tiny, wide"
    """
    names = list(names)
    rest = f"run `{command}` to list them" if command else f"use one of {', '.join(names)}"
    return " ".join(filter(None, (f"unknown {what} {name!r};", meant(name, names), rest)))
