"""Commands run in this process, and what a refusal looks like."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REMEDY = re.compile(r"\b(use|write|add|give|name|run|fix|choose|see)\b")

Main = Callable[[Sequence[str]], int]
Result = tuple[int, str, str]


def call(main: Main, argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> Result:
    """Status, standard output and standard error of a command run in this process."""
    try:
        status = main(argv)
    except SystemExit as leave:
        status = int(leave.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def assert_refused(result: Result, *words: str) -> None:
    """Status 2, silence on standard output, and one line on standard error that says what to do."""
    status, out, err = result
    assert status == 2, (status, out, err)
    assert out == "", out
    assert err.count("\n") == 1, err
    assert err.endswith("\n"), err
    assert "Traceback" not in err, err
    assert REMEDY.search(err), err
    for word in words:
        assert word in err, err
