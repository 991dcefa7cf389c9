"""The Trainer's callback, driven event by event as the Trainer drives it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from empirics.registry import find
from empirics.subject import TOLERANCE

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
        assert row["left_out"] == {}
        assert row["probes"]["attention_entropy"]["labels"] == ["layer 0", "layer 1"]
        updates = row["probes"]["update_norm"]
        assert updates["labels"][:2] == ["transformer.wte.weight", "transformer.wpe.weight"]
        assert all(value > 0 for value in updates["values"])
    assert isinstance(StabilityCallback(out), transformers.TrainerCallback)


def test_callback_takes_norms_on_request(tmp_path: Path) -> None:
    from empirics.hugging_face import StabilityCallback

    out = tmp_path / "stability.jsonl"
    wanted = "half_layer_jacobian@2,stack_jacobian"
    assert train(StabilityCallback(out, every=1, probes=wanted), steps=3) == train(None, steps=3)
    rows = [json.loads(line)["probes"] for line in out.read_text().splitlines()]
    assert [sorted(row) for row in rows] == [["half_layer_jacobian", "stack_jacobian"], [], ["half_layer_jacobian"]]
    halves = rows[0]["half_layer_jacobian"]
    assert halves["labels"] == ["layer 0 attention", "layer 0 feedforward", "layer 1 attention", "layer 1 feedforward"]
    assert len(halves["residuals"]) == 4
    # The stack's norm is at most the product of its half-layers', and they are lower estimates.
    product = math.prod(halves["values"])
    assert 1 < rows[0]["stack_jacobian"]["values"][0] <= product * (1 + TOLERANCE) ** 4


def test_callback_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    from empirics.hugging_face import StabilityCallback

    with pytest.raises(ValueError, match="every=0 is not a positive number of steps"):
        StabilityCallback(tmp_path / "x.jsonl", every=0)
    with pytest.raises(ValueError, match="unknown probe 'entropy'"):
        StabilityCallback(tmp_path / "x.jsonl", probes="entropy")
    with pytest.raises(ValueError, match="block"):
        StabilityCallback(tmp_path / "x.jsonl").on_train_begin(None, None, None, model=torch.nn.Linear(2, 2))


def test_a_run_that_starts_anew_does_not_go_on_in_another_ones_file(tmp_path: Path) -> None:
    from empirics.hugging_face import StabilityCallback

    out = tmp_path / "stability.jsonl"
    out.touch()  # nothing in it
    train(StabilityCallback(out, every=2), steps=3)
    before = out.read_text()
    with pytest.raises(
        ValueError, match=r"stability\.jsonl has the steps of another run; give another path, or remove"
    ):
        train(StabilityCallback(out, every=2), steps=3)
    assert out.read_text() == before
    resumed = StabilityCallback(out, every=2)  # control: at a later step it is the same run
    resumed.on_train_begin(None, SimpleNamespace(global_step=3), None, model=tiny())
    out.unlink()
    train(StabilityCallback(out, every=2), steps=3)
    assert out.read_text() == before


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    from empirics.hugging_face import StabilityCallback

    out = tmp_path / "stability.jsonl"
    callback, state = StabilityCallback(out, every=1), SimpleNamespace(global_step=0, is_world_process_zero=False)
    model = tiny()
    callback.on_train_begin(None, state, None, model=model)
    callback.on_step_begin(None, state, None)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    model(tokens, labels=tokens).loss.backward()
    state.global_step = 1
    callback.on_step_end(None, state, None)
    assert not out.exists()
    assert callback.monitor is not None
    assert len(callback.monitor.records) == 1


# --- the real Trainer ---------------------------------------------------------------------------------------------


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        row = torch.randint(64, (16,), generator=torch.Generator().manual_seed(place))
        return {"input_ids": row, "labels": row}


def trainer(out: Path, callbacks: list[Any], **options: Any) -> Any:
    """Six steps of two micro-batches, done."""
    pytest.importorskip("accelerate")
    transformers.set_seed(0)
    arguments = transformers.TrainingArguments(
        str(out), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    done = transformers.Trainer(tiny(), arguments, train_dataset=Tokens(), callbacks=callbacks)
    done.train()
    return done


def losses(done: Any) -> list[float]:
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def test_the_trainer_is_watched_and_not_changed(tmp_path: Path) -> None:
    from empirics.hugging_face import StabilityCallback

    out = tmp_path / "stability.jsonl"
    plain = trainer(tmp_path, [])
    watched = trainer(tmp_path, [StabilityCallback(out, every=2)])
    assert len(losses(plain)) == 6
    assert losses(watched) == losses(plain)
    assert all(torch.equal(a, b) for a, b in zip(watched.model.parameters(), plain.model.parameters(), strict=True))
    rows = rows_of(out)
    assert [row["step"] for row in rows] == [0, 2, 4]
    for row in rows:
        assert row["n_tokens"] == 2 * 2 * 16  # both micro-batches
        assert row["places"] == ["embedding", "layer 0 attention", "layer 0", "layer 1 attention", "layer 1"]
        assert row["growth"] == row["place_gradient"][0] / row["place_gradient"][-1] > 1
        assert row["left_out"] == {}
        for probe in (find(name) for name in ("update_ratio", "matrix_gradient", "logit_variance")):
            found = row["probes"][probe.name]
            assert len(found["labels"]) == len(found["values"]) > 1
            assert all(value > 0 for value in found["values"])
        # The Trainer clips: what the optimizer gets is at most 1 long.
        assert sum(value**2 for value in row["probes"]["matrix_gradient"]["values"]) <= 1 + 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiling_trainer_is_watched(tmp_path: Path) -> None:
    """The Trainer compiles a wrapper that the callback is not shown."""
    from empirics.hugging_face import StabilityCallback

    out = tmp_path / "stability.jsonl"
    trainer(tmp_path, [StabilityCallback(out, every=3)], torch_compile=True, torch_compile_backend="aot_eager")
    assert [row["step"] for row in rows_of(out)] == [0, 3]
    assert all(row["growth"] > 1 for row in rows_of(out))
