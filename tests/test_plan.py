"""The plan of a run: against counts by hand and by torch, and its refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from empirics.__main__ import main
from empirics.model import build
from empirics.plan import plan
from theory.architecture import preset


def test_flops_are_those_that_torch_counts() -> None:
    """One forward and backward pass; written out, attention multiplies all pairs of tokens, twice the causal ones."""
    a = replace(preset("tiny"), context=64)
    model = build(a, seed=0)
    tokens = torch.randint(a.vocab_size, (2, 64))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(tokens, tokens).backward()
    counted = counter.get_total_flops()
    found = plan(a, device="h100", devices=1, steps=1, batch_size=2, seq_len=64)
    attention = 6 * 64 * a.n_heads * a.d_head * a.n_layers * 128
    assert counted == found.flops + attention


def test_numbers_by_hand() -> None:
    """Chinchilla's rule for 1.7 billion parameters: 6 N D, and 16 bytes a parameter over 8 devices."""
    a = preset("1.7b")
    found = plan(a, device="a100", devices=8, steps=100, batch_size=64, seq_len=1024)
    assert found.tokens == 100 * 64 * 1024
    assert found.state_bytes == 2 * a.n_parameters
    tables = 2 * a.vocab_size * a.d_model  # token table and head, with their gradients in float32
    layer = (a.n_parameters - tables) / a.n_layers
    assert found.gathered_bytes == pytest.approx(8 * tables + 2 * 3 * layer, rel=1e-12)
    assert plan(a, device="a100", devices=1, steps=1, batch_size=1, seq_len=8).gathered_bytes == 0
    assert found.hours == pytest.approx(found.flops / (8 * 312e12 * 0.4 * 3600), rel=1e-12)
    assert 5.5 * a.n_parameters * found.tokens < found.flops < 7.5 * a.n_parameters * found.tokens
    doubled = plan(a, device="a100", devices=16, steps=100, batch_size=64, seq_len=1024)
    assert doubled.hours == pytest.approx(found.hours / 2, rel=1e-12)
    assert plan(
        a, device="a100", devices=8, steps=100, batch_size=64, seq_len=1024, precision="float32"
    ).hours > 1.9 * (found.hours)


def test_a_network_that_does_not_fit_says_so() -> None:
    big = plan(preset("13b"), device="h100", devices=1, steps=1, batch_size=1, seq_len=1024)
    assert not big.fits
    assert "or more --devices" in str(big)
    shared = plan(preset("13b"), device="h100", devices=8, steps=1, batch_size=32, seq_len=1024, micro_batch=1)
    assert shared.fits
    assert not plan(preset("13b"), device="h100", devices=8, steps=1, batch_size=32, seq_len=1024).fits
    assert "does not fit" not in str(shared)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "13b", "--plan", "h100", "--devices", "64", "--batch", "128", "--steps", "10"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "13b on 64 x h100" in text
    assert "hours" in text
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["kind"] == "estimate"
    assert record["tokens"] == 10 * 128 * preset("13b").context


def test_command_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "plan.txt"
    assert main(["train", "13b", "--plan", "h100", "--plan-out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    assert "13b on 1 x h100" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plan", "abacus"], "use one of a100"),
        (["--plan", "h100", "--devices", "3"], "use a multiple"),
        ([], "--out"),
    ],
)
def test_refusals(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "350m", *arguments]) == 2
    assert words in capsys.readouterr().err
