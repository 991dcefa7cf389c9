"""What the commands share: numbers from the command line, and refusals before any work is begun."""

from __future__ import annotations

import argparse
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from empirics.footprint import footprint
from empirics.plan import GRADIENT_BYTES
from theory.architecture import Architecture
from theory.words import counted


def positive(text: str) -> float:
    """A positive finite number for argparse."""
    value = _number(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive finite number; use one above 0")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; write for example 0.001") from None


def not_negative(text: str) -> float:
    """0 or a positive finite number for argparse."""
    value = _number(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or a positive finite number; use 0 or one above it")
    return value


def positive_or_off(text: str) -> float:
    """A positive finite number, or infinity for `off`, for argparse."""
    if text.strip() == "off":
        return math.inf
    value = _number(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive finite number; use one above 0, or off for none")
    return value


def device_name(text: str) -> str:
    """What torch takes for a device, here or on another machine, for argparse."""
    try:
        torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; use cpu, cuda or, of several, cuda:1") from None
    return text


def add_text_options(command: argparse.ArgumentParser) -> None:
    """Let a measurement be on a text in place of random ids: --data and --cache."""
    command.add_argument(
        "--data", metavar="TEXT",
        help="text to measure on (sympy, a file, hf:NAME), by the tokenizer.json of a folder that has one; default "
        "random ids",
    )  # fmt: skip
    command.add_argument("--cache", type=Path, metavar="DIR", help="folder that keeps tokenised text")


def require_whole_page(page: str | None, only: str) -> None:
    """Refuse to write a page of what --only chooses over one that has rows of more.

    Raises:
        ValueError: such a page is there; a row's first cell is its name.
    """
    if page is None or not os.path.isfile(page):
        return
    lines = Path(page).read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [line for line, after in pairwise([*lines, ""]) if line.startswith("| ") and not after.startswith("|--")]
    others = [name for row in rows if only not in (name := row.removeprefix("| ").split(" | ")[0])]
    if others:
        raise ValueError(
            f"{page} has {counted(len(others), 'row')} of others than {only!r}, {others[0]} for one, which a page of "
            "these alone would lose; leave out --only, or write another file"
        )


def check_device(device: str) -> str:
    """The device, if torch can reach it here and now.

    Raises:
        ValueError: it cannot.
    """
    try:
        torch.zeros(1, device=device).item()  # the meta device makes tensors and holds no numbers
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {device!r} is not available here; use --device cpu") from None
    return device


def check_memory(
    architecture: Architecture, *, batch_size: int, seq_len: int, state: int = 8, runs: int = 1, **step: Any
) -> None:
    """Refuse a network and batch that cannot fit in this machine's memory.

    Args:
        batch_size: sequences that go through the network at once, forwards and backwards.
        state: bytes a number that are held between passes; weights and gradients, unless told otherwise.
        runs: networks at a time, each with such a batch.
        step: what else `footprint` is to know.
    """
    found = footprint(architecture, batch_size=batch_size, seq_len=seq_len, **step)
    parameters = architecture.n_parameters
    needed = runs * max(state * parameters, (state - GRADIENT_BYTES) * parameters + found.total)
    require_memory(f"{architecture.name} with {counted(runs * batch_size * seq_len, 'token')} at once", needed)


def require_memory(what: str, needed: float, *, smaller: str = "fewer --layers or a smaller preset") -> None:
    """Refuse what needs more bytes than this machine has.

    Raises:
        ValueError: with the remedy; `smaller` names the options that make the network smaller.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.9 * total:
        raise ValueError(
            f"{what} needs {needed / 1e9:.3g} GB and this machine has {total / 1e9:.3g} GB; "
            f"use a smaller --batch or --seq-len, {smaller}"
        )
