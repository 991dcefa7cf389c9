"""Jacobian norms in a training step that they do not change: checkpoints, batches, stacks, compiled code, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")

from helpers.decoders import Encoder, NanoBlock, NanoGPT, Titan
from helpers.known_decoders import loss_of, real, some_batch
from helpers.norms import ALL, LENGTH, NORMS, Doubled, decoder, exact, is_estimate, probed, values

from empirics.anatomy import Block
from empirics.block_calls import of_one_sequence
from empirics.monitor import StabilityMonitor, check
from empirics.registry import Unavailable

FEW = "layer_jacobian,attention_jacobian,stack_jacobian"


# --- nothing is changed -------------------------------------------------------------------------------------------


class Checkpointed(Titan):
    """Attention, or the whole block, keeps no activation."""

    def __init__(self, reentrant: bool, whole: bool) -> None:
        super().__init__()
        implementation = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
        for name, layer in list(self.layers.items()):
            if whole:
                self.layers[name] = checkpoint_wrapper(layer, checkpoint_impl=implementation)
            else:
                layer.attention = checkpoint_wrapper(layer.attention, checkpoint_impl=implementation)


def patched() -> nn.Module:
    """A block whose forward method is a checkpoint's."""
    model = Titan()
    for layer in model.layers.values():
        plain = layer.forward
        layer.forward = lambda *args, plain=plain: checkpoint(plain, *args, use_reentrant=False)
    return model


def checkpointing(kind: str) -> nn.Module:
    model = copy.deepcopy(real(kind))
    model.activation_checkpointing_enable()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: copy.deepcopy(real("gpt2")),
    "falcon": lambda: copy.deepcopy(real("falcon")),
    "nano": NanoGPT,
    "encoder": Encoder,
    "llama, checkpointing": lambda: checkpointing("llama"),
    "attention checkpointed": lambda: Checkpointed(False, False),
    "attention checkpointed, reentrant": lambda: Checkpointed(True, False),
    "blocks checkpointed": lambda: Checkpointed(False, True),
    "blocks checkpointed, reentrant": lambda: Checkpointed(True, True),
    "patched": patched,
}


OFTEN = ("gpt2", "encoder", "llama, checkpointing", "attention checkpointed, reentrant")


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [k if k in OFTEN else pytest.param(k, marks=pytest.mark.slow) for k in MODELS])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # reentrant, where the stream is looked for
def test_training_is_bitwise_the_same(name: str, autocast: bool) -> None:
    torch.manual_seed(1)
    model = MODELS[name]()
    results = []
    for monitored in (False, True):
        twin = copy.deepcopy(model) if name != "patched" else MODELS[name]()
        twin.load_state_dict(model.state_dict())
        monitor = StabilityMonitor(twin, probes=ALL) if monitored else None
        twin.train()
        optimizer, losses = torch.optim.AdamW(twin.parameters(), lr=1e-2), list[Tensor]()
        torch.manual_seed(3)
        before = [buffer.clone() for buffer in twin.buffers()]
        for n in range(2):
            if monitor is not None and n == 0:
                monitor.start()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(twin, some_batch(n))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if monitor is not None and n == 0:
                monitor.finish()
            losses.append(loss.detach())
        assert all(torch.equal(a, b) for a, b in zip(twin.buffers(), before, strict=True))
        assert all(p.requires_grad for p in twin.parameters())
        assert all(module.training for module in twin.modules())
        results.append([*losses, torch.random.get_rng_state(), *(p.detach() for p in twin.parameters())])
        if monitor is not None:
            record = monitor.records[0]
            assert record.left_out == {}
            assert record.n_tokens == 24
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert float(results[0][0]) != float(results[0][1])  # control: it did train


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpoints_do_not_change_the_norms() -> None:
    torch.manual_seed(0)
    plain = Titan()
    expected = values(probed(plain, FEW))
    for reentrant, whole in ((True, False), (False, True)):
        model = Checkpointed(reentrant, whole)
        state = {name.replace("._checkpoint_wrapped_module", ""): p for name, p in model.named_parameters()}
        for key, p in plain.named_parameters():
            state[key].data.copy_(p)
        assert values(probed(model, FEW)) == expected


def test_norms_are_of_the_weights_in_float32_whatever_the_pass_is_in() -> None:
    model = copy.deepcopy(real("llama"))
    expected = values(probed(model, FEW))
    monitor = StabilityMonitor(model, probes=FEW)
    with monitor.probe():
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, some_batch())
        loss.backward()
    found = values(monitor.records[-1])
    assert found["layer_jacobian"][0] == expected["layer_jacobian"][0]  # the stream enters it as it did
    low = values(probed(model.bfloat16(), FEW))
    for name, norms in expected.items():
        assert found[name] == pytest.approx(norms, rel=0.05), name  # bfloat16 moves the stream by 1 in 256
        assert low[name] == pytest.approx(norms, rel=0.05), name


# --- one sequence of a batch --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "batch"), [("bloom", 3), ("llama", 12), ("mpt", 3), ("mpt", 4), ("sequence first", 3)]
)
def test_the_first_sequence_counts_whatever_the_batch(kind: str, batch: int) -> None:
    """Masks and biases by sequence and head are cut with it; 12 is the number of tokens too, and 4 of heads."""
    torch.manual_seed(0)
    model = (Encoder(batch_first=False) if kind == "sequence first" else real(kind)).eval()
    tokens = torch.cat([some_batch(n) for n in range(batch)])[:batch]
    names = "layer_jacobian,attention_jacobian,ffn_branch"
    expected, found = (values(probed(model, names, rows)) for rows in (tokens[:1], tokens))
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def test_padding_and_a_cache_are_as_in_the_step() -> None:
    """A mask of the batch is the function's; a cache is neither read nor written."""
    model, tokens = real("llama"), some_batch()
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    monitor, expected = StabilityMonitor(model, probes=ALL), values(probed(model))
    with monitor.probe():
        answer = model(tokens, labels=tokens, attention_mask=mask, use_cache=True)
        answer.loss.backward()
    assert answer.past_key_values.get_seq_length() == 12
    found = values(monitor.records[-1])
    assert monitor.records[-1].left_out == {}
    assert all(found[name] != expected[name] for name in ("layer_jacobian", "attention_jacobian", "stack_jacobian"))


class Changed(NanoBlock):
    """A block that does something else to its output."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(functional_norm=False)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x, super().forward(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: y + x.mean(0), "it cannot be called on one sequence of the batch alone"),
        (lambda x, y: Doubled.apply(y), "its derivative is not that of its values"),
        (lambda x, y: 2 * y - y.detach(), "its derivative is not that of its values"),
    ],
)
def test_what_has_no_norm_says_why_and_the_step_goes_on(change: Any, words: str) -> None:
    torch.manual_seed(0)
    model = NanoGPT()
    model.transformer["h"] = nn.ModuleList(Changed(change) for _ in range(2))
    model.eval()
    expected, record = probed(model, "default"), probed(model, f"default,{NORMS}")
    assert record.left_out["layer_jacobian"].startswith(f"layer 0: {words}"), record.left_out
    assert record.residual_std == expected.residual_std
    assert record.place_gradient == expected.place_gradient


class Cache:
    """Of keys and values, as those of transformers are."""

    def update(self) -> None:
        """Unused."""

    def get_seq_length(self, number: int) -> int:
        return 3 * number


def flex_mask() -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: q >= k, None, None, 4, 4, device="cpu")


@pytest.mark.parametrize(
    ("batch", "given", "words"),
    [
        (1, flex_mask(), "flex attention has no second derivative"),
        (1, Cache(), "cache has earlier tokens"),
        (2, torch.tensor([0, 3, 5, 7, 8]), "a list that is neither of tokens nor of sequences"),
        (2, object(), "it is given a object for the whole batch; probe one sequence"),
    ],
)
def test_arguments_that_one_sequence_cannot_be_called_with(batch: int, given: Any, words: str) -> None:
    with pytest.raises(Unavailable, match=words):
        of_one_sequence(Block(nn.Linear(2, 2), (torch.ones(batch, 4, 2), given), {}), 1, 0)


# --- a stack ------------------------------------------------------------------------------------------------------


class Between(NanoGPT):
    """The stream is scaled between blocks."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        hooks = [block.register_forward_hook(lambda _, __, out: 0.5 * out) for block in self.transformer["h"]]
        try:
            return super().forward(idx, targets)
        finally:
            for hook in hooks:
                hook.remove()


def test_a_stack_is_the_composition_of_its_layers() -> None:
    model = decoder("nano")
    tokens = some_batch()[:1, :LENGTH]
    record = probed(model.eval(), "stack_jacobian", tokens)
    x = model.transformer["wte"](tokens) + model.transformer["wpe"](torch.arange(LENGTH))
    first, second = model.transformer["h"]
    (value,) = record.probes["stack_jacobian"].values
    assert record.probes["stack_jacobian"].labels == ("layers 0 to 1",)
    assert is_estimate(value, exact(lambda x: second(first(x)), x))
    assert not is_estimate(value, exact(first, x))  # control: one layer


def test_what_is_no_stack_says_so() -> None:
    torch.manual_seed(0)
    record = probed(Between(), "stack_jacobian,half_layer_jacobian")
    assert record.left_out == {"stack_jacobian": "what enters layer 1 is not what leaves the one before it"}


# --- compiled, checked, recorded ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # of dynamo
def test_a_compiled_model_has_the_same_norms() -> None:
    torch.manual_seed(0)
    plain = Titan()
    expected = values(probed(plain, FEW))
    model = torch.compile(copy.deepcopy(plain), backend="aot_eager")
    assert values(probed(model, FEW)) == expected  # type: ignore[arg-type]
    blocks_too = copy.deepcopy(plain)
    for layer in blocks_too.layers.values():
        layer.compile(backend="aot_eager")
    assert values(probed(blocks_too, FEW)) == expected
    inside = copy.deepcopy(plain)  # a function in a block, which no module shows
    for layer in inside.layers.values():
        layer.feed_forward.forward = torch.compile(layer.feed_forward.forward, backend="aot_eager")
    found = probed(inside, FEW)
    assert found.left_out == {}
    assert values(found) == expected
    torch._dynamo.reset()


def test_a_check_measures_norms_on_request() -> None:
    model = real("gpt2")
    found = check(model, probes="half_layer_jacobian")
    assert set(found.record.probes) == {"half_layer_jacobian"}
    assert any(line.startswith("half_layer_jacobian: ") for line in str(found).splitlines())
    assert check(model).record.probes == {}


def test_norms_are_taken_at_the_steps_asked_for() -> None:
    model = Titan()
    monitor = StabilityMonitor(model, every=2, probes="default,layer_jacobian@3")
    for n in range(4):
        with monitor.step():
            loss_of(model, some_batch(n)).backward()
    assert {record.step: "layer_jacobian" in record.probes for record in monitor.records} == {
        0: True,
        2: False,
        3: True,
    }
    row = monitor.records[0].row()["probes"]["layer_jacobian"]
    assert row["labels"] == ["layer 0", "layer 1", "layer 2"]
    assert len(row["residuals"]) == 3
    assert row["lower_estimate"] is True
    assert "lower_estimate" not in monitor.records[0].row()["probes"]["gradient_growth"]
    said = str(monitor.records[0]).splitlines()
    (norms,) = (line for line in said if line.startswith("layer_jacobian: "))
    assert norms.endswith("over 3 (lower estimate)")
    assert [line for line in said if "lower estimate" in line] == [norms]
