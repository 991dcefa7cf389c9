"""The Trainer's callback, driven event by event as the Trainer drives it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")


def tiny() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def train(callback: Any | None, steps: int = 5, parts: int = 2) -> list[float]:
    """Losses of a loop that fires the events of the Trainer, with gradient accumulation."""
    model = tiny()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state, losses = SimpleNamespace(global_step=0), []
    events = [] if callback is None else [callback]
    for event in events:
        event.on_train_begin(None, state, None, model=model)
    for step in range(steps):
        for event in events:
            event.on_step_begin(None, state, None, model=model)
        for part in range(parts):
            g = torch.Generator().manual_seed(10 * step + part)
            tokens = torch.randint(64, (2, 16), generator=g)
            loss = model(tokens, labels=tokens).loss / parts
            loss.backward()
            losses.append(float(loss.detach()))
        optimiser.step()
        optimiser.zero_grad()
        state.global_step += 1
        for event in events:
            event.on_step_end(None, state, None, model=model)
    for event in events:
        event.on_train_end(None, state, None, model=model)
    return losses


def test_callback_writes_the_probed_steps_and_changes_nothing(tmp_path: Path) -> None:
    from empirics.hugging_face import StabilityCallback

    out = tmp_path / "run" / "stability.jsonl"
    assert train(StabilityCallback(out, every=2)) == train(None)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4]
    for row in rows:
        assert row["n_tokens"] == 2 * 2 * 16  # both parts of the step
        assert row["growth"] == pytest.approx(row["place_gradient"][0] / row["place_gradient"][-1], rel=1e-12)
        assert len(row["places"]) == len(row["residual_std"]) == len(row["place_gradient"])
    assert isinstance(StabilityCallback(out), transformers.TrainerCallback)


def test_callback_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    from empirics.hugging_face import StabilityCallback

    with pytest.raises(ValueError, match="every=0 is not a positive number of steps"):
        StabilityCallback(tmp_path / "x.jsonl", every=0)
    with pytest.raises(ValueError, match="block"):
        StabilityCallback(tmp_path / "x.jsonl").on_train_begin(None, None, None, model=torch.nn.Linear(2, 2))
