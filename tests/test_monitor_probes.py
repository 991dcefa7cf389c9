"""What the monitor finds beside the stream on anyone's decoder: attention, the optimizer's step, matrices."""

from __future__ import annotations

import copy
import gc
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

pytest.importorskip("transformers")

from helpers.decoders import Encoder, NanoGPT, Titan
from helpers.known_decoders import KINDS, OURS, TINY, loss_of, real, some_batch
from helpers.real_classes import blocks

from empirics.attention_view import AttentionView
from empirics.model import build as build_own
from empirics.monitor import StabilityMonitor, StabilityRecord, series
from empirics.registry import probes
from empirics.subject import Subject

CHEAP = {name for name, found in probes().items() if found.cost == "cheap"} - {"residual_std", "place_gradient"}
ROWS = ["logit_variance", "attention_entropy", "attention_entropy_relative", "attention_entropy_lowest"]
UPDATES = {"update_norm", "update_ratio", "matrix_gradient"}


def trained(model: nn.Module, monitor: StabilityMonitor, *, inside: bool = True, clip: float = 0.1) -> StabilityRecord:
    """One step of a training as its owner writes it, the optimizer inside the step's context or after it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()

    optimizer.zero_grad()
    with monitor.step():
        loss_of(model, some_batch()).backward()
        if inside:
            update()
    if not inside:
        update()
    return monitor.records[-1]


def values(record: StabilityRecord, name: str) -> dict[str, float]:
    found = record.probes[name]
    return dict(zip(found.labels, found.values, strict=True))


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """By name, those of experts in one tensor each."""
    found: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if p.ndim == 3:
            found |= {f"{name}[{k}]": matrix for k, matrix in enumerate(p.detach().clone())}
        elif p.ndim == 2:
            found[name] = p.detach().clone()
    return found


# --- attention ----------------------------------------------------------------------------------------------------


def sharpened(kind: str) -> Any:
    """A class whose attention is far from uniform."""
    model = copy.deepcopy(real(kind)).eval()
    with torch.no_grad():
        for p in (p for block in blocks(model) for p in block.parameters() if p.ndim > 1):
            p.mul_(8)
    return model


def class_says(model: Any) -> list[Tensor]:
    """The probabilities (H, T, T) of the first sequence, layer by layer, that the class returns when asked to."""
    asked = copy.deepcopy(model)
    asked.set_attn_implementation("eager")
    with torch.no_grad():
        return [p[0].double() for p in asked(some_batch(), output_attentions=True).attentions]


@KINDS
def test_attention_is_what_the_class_says_of_it(kind: str) -> None:
    """Of a row, logits vary as the logs of its probabilities do."""
    model = sharpened(kind)
    monitor = StabilityMonitor(model)
    with monitor.probe():
        loss_of(model, some_batch()).backward()
    record = monitor.records[-1]
    assert set(record.left_out) == UPDATES
    for n, p in enumerate(class_says(model)):
        seen = p > 0
        count, rows = seen.sum(-1), seen.sum(-1) > 1
        logs = p.log().masked_fill(~seen, 0)
        variance = (logs.square().sum(-1) / count - (logs.sum(-1) / count) ** 2)[rows].mean()
        entropy = torch.special.entr(p).sum(-1)
        relative = (entropy / count.log())[rows].reshape(len(p), -1).mean(-1)
        expected = {
            "logit_variance": variance,
            "attention_entropy": entropy[rows].mean(),
            "attention_entropy_relative": relative.mean(),
            "attention_entropy_lowest": relative.min(),
        }
        for name, value in expected.items():  # the class's own softmax is in float32
            assert values(record, name)[f"layer {n}"] == pytest.approx(float(value), rel=1e-4, abs=1e-8), name
    assert max(values(record, "logit_variance").values()) > 1e-2


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_fused_attention_shows_the_rows_that_are_written_out(kind: str) -> None:
    """Whose weights the class does not return; shared keys, windows and padding too."""
    model, found = sharpened(kind), []
    padding = torch.ones_like(some_batch())
    padding[:, :2] = 0
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        monitor = StabilityMonitor(model)
        for mask in (None, padding):
            with monitor.probe():
                model(some_batch(), attention_mask=mask, labels=some_batch()).loss.backward()
        assert all(set(record.left_out) == UPDATES for record in monitor.records)
        found.append([values(record, name) for record in monitor.records for name in ROWS])
    for fused, plain in zip(*reversed(found), strict=True):
        assert fused == pytest.approx(plain, rel=1e-5)
    assert found[0][0] != found[0][len(ROWS)]  # the padding counts


def test_fused_attention_in_anyones_module_shows_its_rows() -> None:
    """Of scaled_dot_product_attention under any name: what the same products by hand give."""
    model, softmax = NanoGPT().eval(), torch.softmax
    model.transformer["h"][0].attn.c_attn.weight.data.mul_(4)
    found = []
    for by_hand in (False, True):
        for block in model.transformer["h"] if by_hand else ():
            block.attn = Spelled(block.attn, softmax)
        monitor = StabilityMonitor(model)
        with monitor.probe():
            loss_of(model, some_batch()).backward()
        assert set(monitor.records[-1].left_out) == UPDATES
        found.append([values(monitor.records[-1], name) for name in ROWS])
    for fused, plain in zip(*found, strict=True):
        assert fused == pytest.approx(plain, rel=1e-5)
    assert found[0][0]["layer 0"] > 10 * found[0][0]["layer 1"] > 0


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_attention_by_torchs_own_layers_is_what_they_say_of_it(norm_first: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    model = Encoder(norm_first=norm_first, batch_first=batch_first).eval()
    for layer in model.encoder.layers:
        layer.self_attn.in_proj_weight.data.mul_(3)
    monitor = StabilityMonitor(model)
    assert [place.name for place in monitor.anatomy.places[:3]] == ["embedding", "layer 0 attention", "layer 0"]
    said: list[Tensor] = []

    def ask(attention: Any, args: Any, kwargs: Any, _: Any) -> None:
        with torch.no_grad():
            asked = {"attn_mask": kwargs["attn_mask"], "need_weights": True, "average_attn_weights": False}
            said.append(attention.forward(*args, **asked)[1][0].double())

    handles = [
        layer.self_attn.register_forward_hook(ask, with_kwargs=True)
        for layer in model.encoder.layers  # asked of the class itself, outside of what is watched
    ]
    with monitor.probe():
        loss_of(model, some_batch()).backward()
    for handle in handles:
        handle.remove()
    record = monitor.records[-1]
    assert set(record.left_out) == UPDATES
    for n, p in enumerate(said[-3:]):
        logs = p.log().masked_fill(p == 0, 0)
        count = (p > 0).sum(-1)
        variance = (logs.square().sum(-1) / count - (logs.sum(-1) / count) ** 2)[:, 1:].mean()
        entropy = torch.special.entr(p).sum(-1)[:, 1:].mean()
        assert values(record, "logit_variance")[f"layer {n}"] == pytest.approx(float(variance), rel=1e-4)
        assert values(record, "attention_entropy")[f"layer {n}"] == pytest.approx(float(entropy), rel=1e-4)
        assert variance > 1e-2


@pytest.mark.parametrize("separate", [False, True])
def test_masks_and_padding_of_torchs_attention_are_seen(separate: bool) -> None:
    """In either kind: what is hidden is True, or is added."""
    torch.manual_seed(0)
    own = {"kdim": 16, "vdim": 8} if separate else {}
    attention = nn.MultiheadAttention(16, 2, batch_first=True, bias=not separate, **own)
    x = torch.randn(3, 6, 16)
    keys = (x, torch.randn(3, 6, 8)) if separate else (x, x)
    hidden = torch.ones(6, 6).triu(1).bool()
    padding = torch.zeros(3, 6).bool()
    padding[:, 5] = True
    added = [torch.zeros(mask.shape).masked_fill(mask, -math.inf) for mask in (hidden, padding)]
    p = attention(x, *keys, attn_mask=hidden, key_padding_mask=padding, average_attn_weights=False)[1][0].double()
    expected = torch.special.entr(p).sum(-1)[:, 1:].mean(-1)
    for mask, pad in ((hidden, padding), added, (hidden.repeat(6, 1, 1), padding)):
        seen: list[Any] = []
        with AttentionView(3, seen.append):
            attention(x, *keys, attn_mask=mask, key_padding_mask=pad)
        (rows,) = seen
        assert rows.entropy.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    seen = []
    with AttentionView(3, seen.append):
        nn.MultiheadAttention(16, 2, batch_first=True, add_zero_attn=True)(x, x, x)
    assert seen == ["its nn.MultiheadAttention has keys that are no token's"]


class Spelled(nn.Module):
    """Attention by hand: the same product, and a softmax of its own making unless one is given."""

    def __init__(self, attention: Any, softmax: Any = None) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.softmax = attention.c_attn, attention.c_proj, softmax

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        logits = q @ k.mT / 4
        if self.softmax is None:
            weights = logits.exp().tril()
            weights = weights / weights.sum(-1, keepdim=True)
        else:
            weights = self.softmax(logits.masked_fill(torch.ones_like(logits).tril() == 0, -math.inf), -1)
        return self.c_proj((weights @ v).transpose(1, 2).flatten(2))


def test_what_cannot_be_seen_is_said() -> None:
    model = NanoGPT()
    for block in model.transformer["h"]:
        block.attn = Spelled(block.attn)
    record = trained(model, StabilityMonitor(model))
    unseen = {name for name in CHEAP if "entropy" in name} | {"logit_variance"}
    assert set(record.left_out) == unseen
    assert set(record.probes) == CHEAP - unseen
    for reason in record.left_out.values():
        assert reason.startswith("layer 0: its class calls neither scaled_dot_product_attention nor nn.Multi")
    assert record.row()["left_out"] == record.left_out
    said = str(record).splitlines()
    assert f"attention_entropy: left out; {record.left_out['attention_entropy']}" in said
    assert any(line.startswith("update_ratio: ") and line.endswith(" over 14") for line in said)


def test_a_sequence_without_rows_is_said_and_not_fatal() -> None:
    model = Titan()
    monitor = StabilityMonitor(model)
    with monitor.probe():
        loss_of(model, some_batch()[:, :1]).backward()
    assert "use more tokens" in monitor.records[-1].left_out["attention_entropy"]


# --- the optimizer's step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "nano", "titan"])
def test_updates_are_those_of_the_optimizer(kind: str, inside: bool) -> None:
    torch.manual_seed(0)
    model = {"nano": NanoGPT, "titan": Titan}.get(kind, lambda: copy.deepcopy(real(kind)))().eval()
    before, monitor = matrices(model), StabilityMonitor(model)
    record = trained(model, monitor, inside=inside)
    after = matrices(model)
    assert set(record.probes) == CHEAP
    assert record.left_out == {}
    norms, ratios = values(record, "update_norm"), values(record, "update_ratio")
    assert norms.keys() == before.keys()
    for name, matrix in before.items():
        change = float((after[name] - matrix).double().norm())
        assert change > 0
        assert norms[name] == pytest.approx(change, rel=1e-5)  # float32
        assert ratios[name] == pytest.approx(change / float(matrix.double().norm()), rel=1e-5)
    gradients = values(record, "matrix_gradient")
    assert gradients.keys() == before.keys()
    given = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None and p.ndim > 1)
    assert sum(value**2 for value in gradients.values()) == pytest.approx(given, rel=1e-5)
    assert sum(value**2 for value in gradients.values()) <= 0.1**2 * (1 + 1e-5)  # clipped
    assert n_optimizer_hooks() == 0 or not inside
    monitor.detach()
    assert n_optimizer_hooks() == 0


def n_optimizer_hooks() -> int:
    return len(torch_optimizer._global_optimizer_pre_hooks) + len(torch_optimizer._global_optimizer_post_hooks)


def test_only_the_probed_step_is_looked_at() -> None:
    """The optimizer steps outside of the context: the next step's update is not taken for the probed one's."""
    model = Titan()
    monitor = StabilityMonitor(model, every=10)
    first = trained(model, monitor, inside=False)
    kept = dict(first.probes)
    trained(model, monitor, inside=False)
    assert first.probes == kept
    assert len(monitor.records) == 1
    assert n_optimizer_hooks() == 0


def test_two_optimizers_make_one_step() -> None:
    model = Titan()
    halves = [[p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False)]
    first, rest = list(model.tok_embeddings.parameters()), halves[0][1:] + halves[1]
    optimizers = [torch.optim.SGD(some, lr=0.1) for some in (first, rest)]
    before, monitor = matrices(model), StabilityMonitor(model)
    with monitor.step():
        loss_of(model, some_batch()).backward()
    record = monitor.records[-1]
    assert set(record.left_out) == UPDATES
    for optimizer in optimizers:
        optimizer.step()
    assert values(record, "update_norm").keys() == before.keys()
    assert record.left_out == {}


def test_without_an_optimizer_of_torch_there_is_no_update() -> None:
    model, monitor = Titan(), None
    monitor = StabilityMonitor(model)
    with monitor.step():
        loss_of(model, some_batch()).backward()
        torch.optim.SGD(Titan().parameters(), lr=0.1).step()  # another model's
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.1 * p.grad)
    assert set(monitor.records[-1].left_out) == UPDATES
    assert "no optimizer of torch" in monitor.records[-1].left_out["update_norm"]
    del monitor, model  # nothing of them is kept by torch's hooks
    gc.collect()
    assert n_optimizer_hooks() == 0


# --- as our own ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_our_own_transformer_gives_what_its_own_probes_give(name: str) -> None:
    """All that do not look at a step or at a Jacobian, the dear ones too; Jacobians in test_monitor_norms.py."""
    wanted = [
        probe
        for probe in probes().values()
        if not probe.in_training and probe.kind == "exact" and probe.name not in ("residual_std", "place_gradient")
    ]
    model = build_own(OURS[name], seed=0)
    with torch.no_grad():
        for p in model.layers.parameters():
            p.mul_(2)  # attention far from uniform
    batch = some_batch(0), some_batch(1)
    monitor = StabilityMonitor(model, probes=",".join(probe.name for probe in wanted))
    with monitor.probe():
        model.loss(*batch).backward()
    record = monitor.records[-1]
    assert record.left_out == {}
    assert set(record.probes) == {probe.name for probe in wanted}
    seen = Subject(model, *batch)
    for probe in wanted:
        expected = probe.measure(seen)
        found = record.probes[probe.name]
        assert found.labels == expected.labels, probe.name
        if probe.quantity.axis != "place" or probe.cost == "cheap":
            assert found.values == pytest.approx(expected.values, rel=1e-5, nan_ok=True), probe.name


def test_series_are_those_of_a_training_record() -> None:
    model = build_own(TINY, seed=0)
    monitor = StabilityMonitor(model, every=2, probes="default,weight_opnorm@3,weight_norm")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []
    for n in range(5):
        norms.append(float(matrices(model)["head.weight"].norm()))
        with monitor.step():
            optimizer.zero_grad()
            model.loss(some_batch(n), some_batch(n + 1)).backward()
            optimizer.step()
    told = series(monitor.records)
    assert told["probe_step"] == [0, 2, 3, 4]
    steps = {name: found["steps"] for name, found in told["probes"].items()}
    assert steps["weight_opnorm"] == [0, 3]
    assert steps["weight_norm"] == [0]
    assert steps["update_norm"] == steps["attention_entropy"] == [0, 2, 4]
    for found in told["probes"].values():
        assert all(len(row) == len(found["labels"]) for row in found["values"])
    first = dict(zip(told["probes"]["weight_norm"]["labels"], told["probes"]["weight_norm"]["values"][0]))
    assert first["head.weight"] == pytest.approx(norms[0], rel=1e-5)  # before the step


def test_a_step_without_a_backward_pass_says_so() -> None:
    model = Titan()
    monitor = StabilityMonitor(model)
    with monitor.probe():
        loss_of(model, some_batch())
    record = monitor.records[-1]
    assert {"place_gradient", "token_gradient"} <= record.left_out.keys()
    assert "backward()" in record.left_out["place_gradient"]
    assert not any(math.isnan(value) for found in record.probes.values() for value in found.values)


def test_none_and_names_that_are_none() -> None:
    model = Titan()
    record = trained(model, StabilityMonitor(model, probes="none"))
    assert record.probes == record.left_out == {}
    assert record.residual_std
    record = trained(model, StabilityMonitor(model, probes="bound_ratio"))
    assert record.left_out.keys() == {"bound_ratio"}
    assert "our own networks alone" in record.left_out["bound_ratio"]
    with pytest.raises(ValueError, match=r"unknown probe 'entropy'; did you mean head_entropy\? use one of"):
        StabilityMonitor(model, probes="entropy")
