"""The README's Python runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_there_are_examples() -> None:
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("place", range(len(BLOCKS)))
def test_example_runs_and_prints_what_it_says(place: int, capsys: pytest.CaptureFixture[str]) -> None:
    block = BLOCKS[place]
    if "transformers" in block:
        pytest.importorskip("transformers")
    exec(compile(block, f"README block {place}", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.strip()
    for said in re.findall(r"^print\(.*\)  # ([\d.]+)$", block, flags=re.MULTILINE):
        assert f"{float(printed.split()[-1]):.4g}" == said
