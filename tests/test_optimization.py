"""What a step does with the gradient, by hand: schedules, clipping, weight decay, z-loss; deterministic mode, sinks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.training import Interrupted, specification
from helpers.weights import architecture

from empirics import train as train_module
from empirics.data import TOKENS_FORMAT, batch
from empirics.kept import load_model
from empirics.model import build
from empirics.optimization import Stepper, adamw
from empirics.run import corpus_of, model_path, run
from empirics.run_spec import LATER, LATER_OF_ARCHITECTURE
from empirics.tensorboard import TensorBoard
from empirics.train import objective, train
from theory.records import fingerprint, plain


def test_learning_rate_schedule(text: Path) -> None:
    spec = specification(text, steps=110, warmup=10)
    assert spec.rate(0) == pytest.approx(spec.learning_rate / 10)
    assert spec.rate(9) == spec.rate(10) == spec.learning_rate
    assert spec.rate(60) == pytest.approx(spec.learning_rate * 0.55)
    assert spec.rate(110) == pytest.approx(spec.learning_rate * 0.1)
    rates = [spec.rate(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)
    assert specification(text, schedule="constant", steps=110, warmup=10).rate(100) == spec.learning_rate
    assert specification(text, warmup=0).rate(0) == spec.learning_rate


def test_linear_schedule_by_hand(text: Path) -> None:
    """Two steps of warm-up, then an eighth less a step."""
    spec = specification(text, steps=10, warmup=2, schedule="linear", learning_rate=8.0)
    assert [spec.rate(step) for step in range(10)] == [4.0, 8.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]


def test_wsd_schedule_by_hand(text: Path) -> None:
    """Two steps of warm-up, four stable ones, and four over which it falls."""
    spec = specification(text, steps=10, warmup=2, schedule="wsd", decay_fraction=0.4, learning_rate=8.0)
    assert [spec.rate(step) for step in range(10)] == [4.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 6.0, 4.0, 2.0]
    assert specification(text, steps=10, schedule="wsd").decay_steps == 1
    whole = specification(text, steps=4, warmup=0, schedule="wsd", decay_fraction=1.0, learning_rate=8.0)
    assert [whole.rate(step) for step in range(4)] == [8.0, 6.0, 4.0, 2.0]


def test_fields_that_are_not_used_leave_the_identity(text: Path) -> None:
    """What it was before these fields were, so that its records are found."""
    spec = replace(specification(text), data="sympy")
    fields = plain(spec)
    for name in LATER:
        del fields[name]
    for group in LATER_OF_ARCHITECTURE.values():
        for name in group:
            del fields["architecture"][name]
    fields["tokens_format"] = TOKENS_FORMAT  # what an unchanged text gives
    assert spec.identity == f"test-vanilla-lr0.003-seed0-{fingerprint(fields)}"
    assert spec.identity == "test-vanilla-lr0.003-seed0-7fe2875708a6"
    used = {"decay_fraction": 0.2, "decay_embeddings": True, "z_loss": 1e-4, "deterministic": True, "order": "epoch"}
    used |= {"attention": "plain", "probes": "none", "mask_documents": True}
    assert set(used) == set(LATER)
    base = replace(spec, schedule="wsd", weight_decay=0.1)
    changed = {replace(base, **{name: value}).identity for name, value in used.items()}
    routed = {replace(base.architecture, n_experts=4, experts_per_token=k) for k in (1, 2)}
    stretched = {replace(base.architecture, rope_stretch=8.0, rope_original=k) for k in (0, 8192)}
    changed |= {replace(base, architecture=architecture).identity for architecture in routed | stretched}
    assert len(changed | {base.identity}) == 5 + len(used)


def test_clipping_bounds_the_gradient_that_is_used(text: Path, tmp_path: Path) -> None:
    """Adam ignores a common factor, but for eps: clipped and unclipped first steps agree, later ones do not."""
    free = run(specification(text, clip=math.inf), tmp_path)["series"]
    clipped = run(specification(text, clip=1e-2), tmp_path)["series"]
    assert clipped["gradient_norm"][0] == free["gradient_norm"][0] > 1e-2  # recorded before clipping
    assert clipped["loss"][1] == pytest.approx(free["loss"][1], rel=1e-3)


def test_both_norms_are_those_of_the_gradient(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What AdamW is given has the second norm, which is the first or the limit."""
    given: list[float] = []
    honest = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *arguments: Any) -> Any:
        gradients = [p.grad.double().flatten() for group in self.param_groups for p in group["params"]]
        given.append(float(torch.cat(gradients).norm()))
        return honest(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    middle = float(np.median(run(specification(text, clip=math.inf), tmp_path)["series"]["gradient_norm"]))
    given.clear()
    series = run(specification(text, clip=middle), tmp_path)["series"]
    np.testing.assert_allclose(series["clipped_gradient_norm"], given, rtol=1e-5)
    assert series["clipped_gradient_norm"] == [min(norm, middle) for norm in series["gradient_norm"]]
    assert min(given) < 0.999 * middle < middle < max(series["gradient_norm"])


def test_weight_decay_takes_the_rate_times_itself_off(text: Path, tmp_path: Path) -> None:
    """A token that the batch has not has no gradient: its row of the table moves by the decay alone, exactly."""
    spec = specification(text, steps=1, warmup=0, schedule="constant", weight_decay=0.5)
    before = build(spec.architecture, seed=0)
    tokens, _ = batch(corpus_of(spec, tmp_path), seed=0, step=0, batch_size=2, seq_len=16)
    unseen = torch.ones(258, dtype=torch.bool)
    unseen[torch.from_numpy(tokens).unique()] = False
    rows = before.tokens.weight.detach()[unseen]
    for decaying, factor in ((False, 1.0), (True, 1 - spec.learning_rate * 0.5)):
        changed = replace(spec, decay_embeddings=decaying)
        record = run(changed, tmp_path, keep_model=True)
        after = load_model(model_path(changed, tmp_path))
        assert torch.equal(after.tokens.weight.detach()[unseen], rows * factor)
        assert ("tokens.weight" in record["weight_decay"]["decaying"]) is decaying


def test_the_record_says_what_decays(text: Path, tmp_path: Path) -> None:
    matrices = ["query", "key", "value", "output"]
    expected = {f"layers.*.attention.{name}.weight" for name in matrices} | {"head.weight"}
    expected |= {f"layers.*.feedforward.{name}.weight" for name in ("enter", "leave")}
    sizes = {"positions": "learned", "biases": True, "qk_norm": "head"}
    spec = specification(text, steps=1, weight_decay=0.1, architecture=sizes)
    table = run(spec, tmp_path)["weight_decay"]
    assert set(table["decaying"]) == expected
    assert {"tokens.weight", "positions.weight", "norm.weight", "norm.bias", "layers.*.attention.query.bias"} < set(
        table["not_decaying"]
    )
    table = run(replace(spec, decay_embeddings=True), tmp_path)["weight_decay"]
    assert set(table["decaying"]) == expected | {"tokens.weight", "positions.weight"}
    tied = replace(spec, architecture=replace(spec.architecture, tied=True))
    assert set(run(tied, tmp_path)["weight_decay"]["decaying"]) == expected - {"head.weight"}
    assert run(replace(spec, weight_decay=0.0), tmp_path)["weight_decay"]["decaying"] == []


def test_the_record_says_how_it_attends(text: Path, tmp_path: Path) -> None:
    """By the values of the run alone; asked for, the other way is another run, the same up to rounding."""
    capped = {"positions": "rope", "attention_softcap": 5.0}
    found = {
        name: run(specification(text, **changes), tmp_path)
        for name, changes in {
            "float32": {}, "float32, plain": {"attention": "plain"}, "bfloat16": {"precision": "bfloat16"},
            "bfloat16, fused": {"precision": "bfloat16", "attention": "fused"},
            "bfloat16, plain": {"precision": "bfloat16", "attention": "plain"}, "capped": {"architecture": capped},
        }.items()
    }  # fmt: skip
    assert {name: record["attention"] for name, record in found.items()} == {
        "float32": "fused", "float32, plain": "plain", "bfloat16": "plain", "bfloat16, fused": "fused",
        "bfloat16, plain": "plain", "capped": "plain",
    }  # fmt: skip
    losses = {name: record["series"]["loss"] for name, record in found.items()}
    assert losses["bfloat16"] == losses["bfloat16, plain"] != losses["bfloat16, fused"]
    np.testing.assert_allclose(losses["float32, plain"], losses["float32"], rtol=1e-5)
    with pytest.raises(ValueError, match="soft cap; use attention=plain or auto"):
        specification(text, architecture=capped, attention="fused")


def test_norms_of_gradients_and_updates_by_hand(text: Path) -> None:
    """Group by group, from copies in float64; a clipped gradient and weight decay included."""
    spec = specification(text, weight_decay=0.1, architecture={"positions": "learned", "biases": True})
    model = build(spec.architecture, seed=0)
    stepper = Stepper(model, adamw(model, spec))
    tokens, targets = torch.arange(32).reshape(2, 16), torch.arange(1, 33).reshape(2, 16)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        model.loss(tokens, targets).backward()

        def norms(tensors: list[torch.Tensor]) -> dict[str, float]:
            by_id = dict(zip(map(id, stepper.parameters), tensors, strict=True))
            return {
                name: math.sqrt(sum(float(by_id[id(p)].double().square().sum()) for p in group))
                for name, group in stepper.groups.items()
            }

        before = [p.detach().double().clone() for p in stepper.parameters]
        assert stepper.gradient_norms() == pytest.approx(norms([p.grad for p in stepper.parameters]), rel=1e-5)  # type: ignore[misc]
        found = stepper.step(rate=1e-2, scale=0.5)
        change = [p.detach().double() - old for p, old in zip(stepper.parameters, before, strict=True)]
        assert found == pytest.approx(norms(change), rel=1e-5)
        assert set(found) == {"embedding", "layer 0", "layer 1", "head"}


def test_z_loss_by_hand() -> None:
    """Its gradient in a token's logits is 2 z log Z softmax / tokens, beside the cross entropy's."""
    model = build(architecture(vocab_size=11, context=8), seed=0).double()
    with torch.no_grad():
        model.head.weight.mul_(20)  # a softmax that is not uniform
    tokens, targets = torch.arange(12).reshape(2, 6) % 11, torch.arange(3, 15).reshape(2, 6) % 11
    total, entropy = objective(model, 0.3, tokens, targets)
    logits = model(tokens).detach().float()
    probability, log_z = logits.softmax(-1), logits.exp().sum(-1, keepdim=True).log()
    assert float((total - entropy).detach()) == pytest.approx(0.3 * float(log_z.square().mean()), rel=1e-5)
    assert entropy.equal(model.loss(tokens, targets))
    hot = torch.nn.functional.one_hot(targets, 11)
    by_hand = (probability - hot + 0.3 * 2 * log_z * probability) / 12
    hidden: list[torch.Tensor] = []
    handle = model.head.register_forward_hook(lambda _, __, output: hidden.append(output) or output.retain_grad())
    objective(model, 0.3, tokens, targets)[0].backward()
    handle.remove()
    assert hidden[0].grad is not None
    torch.testing.assert_close(hidden[0].grad.float(), by_hand.float(), rtol=1e-5, atol=1e-7)
    assert objective(model, 0.0, tokens, targets)[0].equal(model.loss(tokens, targets))


def test_z_loss_is_recorded_apart(text: Path, tmp_path: Path) -> None:
    without, with_it = (run(specification(text, z_loss=z), tmp_path)["series"] for z in (0.0, 0.1))
    assert without["z_loss"] == []
    assert len(with_it["z_loss"]) == 9
    # The cross entropy alone, from whole logits and not in parts: another order of sums in float32.
    assert with_it["loss"][0] == pytest.approx(without["loss"][0], rel=4 * torch.finfo(torch.float32).eps)
    # Logits of variance v give log Z = log 258 + v/2, v = 2/5 at the most.
    assert with_it["z_loss"][0] == pytest.approx(0.1 * (math.log(258) + 0.2) ** 2, rel=0.1)
    parts = run(specification(text, z_loss=0.1, batch_size=4, micro_batch=1), tmp_path)["series"]
    whole = run(specification(text, z_loss=0.1, batch_size=4), tmp_path)["series"]
    np.testing.assert_allclose(parts["z_loss"], whole["z_loss"], rtol=2e-3)


def test_deterministic_mode(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is on while the run lasts; on one thread of a CPU it changes no number."""
    seen: list[bool] = []
    train(
        specification(text, deterministic=True), corpus_of(specification(text), tmp_path),
        on_step=lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()),
    )  # fmt: skip
    assert seen == [True] * 9
    assert not torch.are_deterministic_algorithms_enabled()
    plain_run, strict = (run(specification(text, deterministic=flag), tmp_path) for flag in (False, True))
    assert strict["series"] == plain_run["series"]
    assert strict["id"] != plain_run["id"]

    def without(self: Any, *arguments: Any) -> torch.Tensor:
        raise RuntimeError("histc does not have a deterministic implementation, but you set it. You can turn it off.")

    monkeypatch.setattr(train_module.Transformer, "loss", without)
    with pytest.raises(ValueError, match=r"histc does not have a deterministic .*; run without --deterministic"):
        run(specification(text, deterministic=True, seed=1), tmp_path)


def test_tensorboard_has_every_step(text: Path, tmp_path: Path) -> None:
    """A run that is broken off after step 5 and resumed from step 4: each step once, with the record's numbers."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec, board = specification(text), tmp_path / "board"
    sink = TensorBoard(board)

    def broken(step: int, values: Any) -> None:
        sink(step, values)
        if step == 5:
            sink.close()
            raise Interrupted

    with pytest.raises(Interrupted):
        run(spec, tmp_path, checkpoint_every=4, sink=broken)
    sink = TensorBoard(board)
    series = run(spec, tmp_path, sink=sink)["series"]
    sink.close()
    events = EventAccumulator(str(board))
    events.Reload()
    names = {"loss", "learning_rate", "gradient_norm", "clipped_gradient_norm", "update_norm"}
    assert set(events.Tags()["scalars"]) == names
    for name in names:
        found = events.Scalars(name)
        assert [event.step for event in found] == list(range(9))  # 4 and 5, which were taken twice, replaced
        np.testing.assert_allclose([event.value for event in found], series[name], rtol=1e-6)
