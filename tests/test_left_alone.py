"""A training that is watched is left alone, whatever its blocks note, collect, keep and are given."""

from __future__ import annotations

import copy
import gc
import pickle
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

pytest.importorskip("transformers")

from helpers.decoders import VOCAB, WIDTH, NanoBlock, NanoGPT
from helpers.known_decoders import loss_of, real, some_batch
from helpers.norms import exact, is_estimate

from empirics.anatomy import Block
from empirics.block_calls import of_one_sequence, undisturbed
from empirics.monitor import StabilityMonitor, StabilityRecord
from empirics.registry import Unavailable

FEW = "layer_jacobian,attention_jacobian,stack_jacobian"
Call = Callable[[nn.Module, Tensor, int], Tensor]


class Given(nn.Module):
    """Blocks of any kind, called in any way.

    Args:
        call: (block, stream, number) -> stream.
    """

    def __init__(self, block: Callable[[], nn.Module], call: Call = lambda block, x, n: block(x)) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.call = call

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for n, block in enumerate(self.blocks):
            x = self.call(block, x, n)
        return self.head(x)


def plain() -> NanoBlock:
    return NanoBlock(functional_norm=False)


def step(
    model: nn.Module, probes: str | None, loss: Callable[[nn.Module, Tensor], Tensor] = loss_of
) -> tuple[list[Tensor], StabilityRecord | None]:
    """Gradients of a step in training mode, and what a monitor has seen."""
    monitor = None if probes is None else StabilityMonitor(model, probes=probes)
    model.train().zero_grad()
    torch.manual_seed(0)
    if monitor is not None:
        monitor.start()
    loss(model, some_batch()).backward()
    record = None if monitor is None else monitor.finish()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], record


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- what blocks note ---------------------------------------------------------------------------------------------


class Notes(NanoBlock):
    """A block that counts its calls in every way, eval mode or not, and keeps a loss of its own."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__(functional_norm=False)
        self.calls, self.seen, self.by_name, self.kinds = 0, list[float](), dict[str, int](), set[int]()
        self.register_buffer("total", torch.zeros(()))
        self.sum = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(random.random() + np.random.rand())  # noqa: NPY002 (the global one)
        self.by_name[str(self.calls)] = self.calls
        self.kinds.add(self.calls)
        self.total.add_(1)
        self.sum.add_(1)
        out = super().forward(x)
        self.own_loss = out.square().mean()
        return out

    @property
    def notes(self) -> Any:
        return self.calls, self.seen, self.by_name, self.kinds, float(self.total), float(self.sum)


def test_what_blocks_note_is_of_the_training_alone() -> None:
    torch.manual_seed(0)
    model = Given(Notes)
    twin = copy.deepcopy(model)

    def loss(model: Any, tokens: Tensor) -> Tensor:
        return loss_of(model, tokens) + sum(block.own_loss for block in model.blocks)

    results: list[Any] = []
    for each, probes in ((model, None), (twin, FEW)):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        gradients, record = step(each, probes, loss)
        drawn = random.random(), np.random.rand()  # noqa: NPY002
        results.append((gradients, [block.notes for block in each.blocks], *drawn))
    assert record is not None
    assert record.left_out == {}
    assert same(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]
    assert results[0][1][0][0] == 1  # control: there was one call


def test_what_a_class_collects_is_of_the_training_alone() -> None:
    """Routers' logits, of which the loss has a part, are collected by hooks inside the blocks."""

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        return model(tokens, labels=tokens, output_router_logits=True).loss

    model = copy.deepcopy(real("mixtral"))
    (expected, _), (found, record) = (step(model, probes, loss) for probes in (None, "layer_jacobian"))
    assert record is not None
    assert "layer_jacobian" in record.probes
    assert same(found, expected)
    assert not same(step(model, None)[0], expected)  # control: the routers' part counts


@pytest.mark.parametrize("probes", ["default", FEW])
def test_selective_checkpointing_keeps_what_the_training_computes(probes: str) -> None:
    """Of operations that a probe uses too, the results are kept in their order."""
    aten = torch.ops.aten
    kept = [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.mul.Tensor,
        aten.mean.dim,
        aten.pow.Tensor_Scalar,
    ]
    contexts = partial(create_selective_checkpoint_contexts, kept)
    torch.manual_seed(0)
    model = Given(plain, lambda block, x, n: checkpoint(block, x, use_reentrant=False, context_fn=contexts))  # type: ignore[arg-type]
    (expected, _), (found, record) = (step(model, it) for it in (None, probes))
    assert record is not None
    assert probes == "default" or record.left_out == {}
    assert same(found, expected)


def test_nothing_is_kept_after_a_step() -> None:
    """Neither graphs nor the stream; each of two steps would leave some."""

    def numbers() -> int:
        gc.collect()
        return sum(x.numel() for x in gc.get_objects() if issubclass(type(x), Tensor))

    torch.manual_seed(0)
    model = NanoGPT()
    sizes: list[int] = []
    monitor = StabilityMonitor(model, probes=f"residual_kurtosis@1,{FEW.replace(',', '@1,')}@1")
    for _ in range(3):
        with monitor.probe():
            loss_of(model, some_batch()).backward()
        assert {"layer_jacobian", "residual_kurtosis"} <= monitor.records[-1].probes.keys()
        model.zero_grad()
        sizes.append(numbers())
    one_stream = some_batch()[0].numel() * WIDTH
    assert max(sizes[1:]) - sizes[0] < one_stream
    monitor.detach()
    del monitor
    assert sizes[0] - numbers() < one_stream


def test_a_copy_or_a_file_of_a_watched_model_is_not_watched() -> None:
    torch.manual_seed(0)
    model = NanoGPT()
    monitor = StabilityMonitor(model, probes=f"default,{FEW}")
    with monitor.probe():
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for twin in twins:
            loss_of(twin, some_batch())
        loss_of(model, some_batch()).backward()
    assert monitor.records[-1].n_tokens == some_batch().numel()


# --- a stack ------------------------------------------------------------------------------------------------------


def test_a_stack_of_blocks_that_are_given_their_stream_by_name() -> None:
    class Named(NanoBlock):
        def forward(self, *, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(hidden_states)

    torch.manual_seed(0)
    model = Given(lambda: Named(functional_norm=False), lambda block, x, n: block(hidden_states=x))
    _, record = step(model, FEW)
    assert record is not None
    assert record.left_out == {}
    first, second, third = model.eval().blocks
    x = model.table(some_batch()[:1]).double()
    model.double()

    def through(x: Tensor) -> Tensor:
        return third(hidden_states=second(hidden_states=first(hidden_states=x)))

    # Some norms are in float32.
    assert is_estimate(record.probes["stack_jacobian"].values[0] * (1 - 1e-6), exact(through, x))


def test_a_stack_that_others_change_or_reorder_has_no_norm() -> None:
    torch.manual_seed(0)
    model = Given(plain)
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: 0.5 * out)
    _, record = step(model, FEW)
    assert record is not None
    assert record.left_out == {"stack_jacobian": "what enters layer 1 is not what leaves the one before it"}

    passes: list[int] = []

    def dropping(block: nn.Module, x: Tensor, n: int) -> Tensor:
        """The middle layer is left out of the first pass in training."""
        passes.append(n)
        return x if n == 1 and block.training and passes.count(1) == 1 else block(x)

    model = Given(plain)
    monitor = StabilityMonitor(model, probes=FEW)
    model.train().call = dropping
    with monitor.probe():
        for n in range(2):
            passes.append(1) if n else passes.clear()
            loss_of(model, some_batch(n)).backward()
    assert monitor.records[-1].left_out == {
        "stack_jacobian": "its layers are not called in their order",
        "place_gradient": "layer 1 attention, layer 1: a gradient arrived at 24 of 48 tokens",
    }


# --- what has no norm ---------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_named() -> None:
    torch.manual_seed(0)
    model = NanoGPT()
    monitor = StabilityMonitor(model, probes=f"weight_opnorm,attention_entropy,{FEW}")
    with torch.no_grad():
        model.transformer["h"][1].mlp[0].weight[0, 0] = torch.nan
    with monitor.probe():
        loss_of(model, some_batch()).backward()
    assert monitor.records[-1].left_out == {
        "residual_std": "layer 1, layer 2 attention, layer 2: the stream is not finite",
        "place_gradient": "embedding to layer 2: the gradient is not finite",
        "token_gradient": "embedding to layer 2: the gradient is not finite",
        "weight_opnorm": "transformer.h.1.mlp.0.weight is not finite",
        "attention_entropy": "layer 2: its logits are not finite",
        "layer_jacobian": "layer 1, layer 2: its output is not finite",
        "attention_jacobian": "layer 1, layer 2: its output is not finite",
        "stack_jacobian": "layer 1: its output is not finite",
    }
    with pytest.raises(ValueError, match=r"layer 1 \(NanoBlock\) gives values that are not finite"):
        StabilityMonitor(model)


def test_inference_mode_is_named() -> None:
    model = NanoGPT()
    monitor = StabilityMonitor(model, probes=FEW)
    with torch.inference_mode(), monitor.probe():
        model(some_batch(), some_batch())
    assert monitor.records[-1].left_out["layer_jacobian"] == "layer 0: the pass is in inference mode; use torch.no_grad"


def test_an_argument_is_cut_rightly_where_the_stream_is_large() -> None:
    """What the block adds is a ten thousandth of the stream; cut at the wrong axis the bias is of the first head."""

    class Biased(nn.Linear):
        def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
            return x + super().forward(x) / 1e4 * (1 if bias.shape[0] == 1 else 2)

    torch.manual_seed(0)
    module, x, bias = Biased(4, 4), torch.randn(2, 3, 4), torch.randn(2, 1, 5)
    with undisturbed(module):
        found = of_one_sequence(Block(module, (x, bias), {}), 0, 0)
        assert found.args[1].shape == bias.shape  # of two, which is no batch

        class Averaged(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return x + super().forward(x.mean(0)) / 1e4

        with pytest.raises(Unavailable, match="cannot be called on one sequence"):
            of_one_sequence(Block(Averaged(4, 4), (x,), {}), 0, 0)
