"""What the monitor cannot measure, or not in every step: that it says so, and what it makes of the rest."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.decoders import HEADS, VOCAB, WIDTH, NanoGPT, Titan, TitanFeedForward
from helpers.known_decoders import loss_of, some_batch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from empirics.monitor import StabilityMonitor, StabilityRecord, describe

FIELDS = ("residual_std", "place_gradient", "token_gradient")
UPDATES = {"update_norm", "update_ratio", "matrix_gradient"}


def probed(monitor: StabilityMonitor, *losses: Tensor | Any) -> StabilityRecord:
    """The record of a step in which each loss is made and run backwards in turn."""
    with monitor.probe():
        for loss in losses:
            loss().backward()
    return monitor.records[-1]


# --- passes of other kinds ------------------------------------------------------------------------------------------


def test_a_pass_without_gradient_does_not_count_in_gradients() -> None:
    """As of a teacher or of an evaluation: the mean is over the tokens at which a gradient arrives."""
    model = Titan()
    monitor = StabilityMonitor(model)
    alone = probed(monitor, lambda: loss_of(model, some_batch()))

    def after_another() -> Tensor:
        with torch.no_grad():
            model(some_batch(1))
        return loss_of(model, some_batch())

    record = probed(monitor, after_another)
    assert record.n_tokens == 2 * alone.n_tokens
    assert record.residual_std != alone.residual_std  # of all tokens
    assert record.token_gradient == alone.token_gradient
    assert record.place_gradient == alone.place_gradient
    assert record.probes["token_gradient_max"].values == alone.probes["token_gradient_max"].values
    assert record.left_out == alone.left_out


def test_gradients_that_arrive_twice_are_named() -> None:
    """The gradients add, and their norms do not."""
    model = Titan()
    monitor = StabilityMonitor(model)

    def losses() -> tuple[Tensor, Tensor]:
        logits = model(some_batch())
        return nn.functional.cross_entropy(logits.flatten(0, 1), some_batch(1).flatten()), logits.square().mean()

    with monitor.probe():
        first, second = losses()
        first.backward(retain_graph=True)
        second.backward()
    record = monitor.records[-1]
    for name in ("place_gradient", "token_gradient", "token_gradient_max", "gradient_growth"):
        assert "embedding to layer 2: gradients arrived twice in one forward pass" in record.left_out[name]
        assert "on the sum of the losses" in record.left_out[name]
    assert all(map(math.isnan, (*record.place_gradient, *record.token_gradient, record.growth)))
    assert all(map(math.isfinite, record.residual_std))
    # The remedy is one.
    record = probed(monitor, lambda: sum(losses()))
    assert record.left_out.keys() == UPDATES
    assert all(map(math.isfinite, (*record.place_gradient, *record.token_gradient, record.growth)))


def test_what_is_not_finite_is_named() -> None:
    model = Titan()
    monitor = StabilityMonitor(model)
    record = probed(monitor, lambda: loss_of(model, some_batch()) * math.nan)
    for name in ("place_gradient", "token_gradient", "token_gradient_max", "gradient_growth"):
        assert record.left_out[name] == "embedding to layer 2: the gradient is not finite"
    assert "residual_std" not in record.left_out
    record = probed(monitor, lambda: loss_of(model, some_batch()) * 0)
    assert record.left_out["gradient_growth"] == "the gradient at the last place is zero"
    assert record.place_gradient == (0.0,) * 7
    with torch.no_grad():
        model.layers["1"].feed_forward.w2.weight[0, 0] = math.inf
    record = probed(monitor, lambda: loss_of(model, some_batch()))
    assert record.left_out["residual_std"] == "layer 1, layer 2 attention, layer 2: the stream is not finite"
    assert [math.isfinite(x) for x in record.residual_std] == [True] * 4 + [False] * 3
    assert record.row()["left_out"] == record.left_out


# --- layers that do not run -----------------------------------------------------------------------------------------


class Dropping(Titan):
    """A layer may be skipped, as LayerDrop does it."""

    skip: int | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        layers = self.layers
        if self.skip is not None:
            self.layers = nn.ModuleDict({name: it for name, it in layers.items() if name != str(self.skip)})
        try:
            return super().forward(tokens)
        finally:
            self.layers = layers


def test_a_layer_that_does_not_run_is_named() -> None:
    torch.manual_seed(0)
    model = Dropping()
    monitor = StabilityMonitor(model, probes="default,residual_kurtosis,half_layer_jacobian,stack_jacobian")
    model.skip = 1
    record = probed(monitor, lambda: loss_of(model, some_batch()))
    assert record.n_tokens == 24
    missing = "layer 1 attention, layer 1: it did not run in this step"
    for name in (*FIELDS, "token_gradient_max", "residual_kurtosis"):
        assert record.left_out[name] == missing
    assert record.left_out["logit_variance"] == "layer 1: it did not run in this step"
    assert "layer 1" in record.left_out["half_layer_jacobian"]
    assert "called" in record.left_out["stack_jacobian"]
    assert "gradient_growth" not in record.left_out
    # The rest is what the model is without that layer.
    plain = Titan(n_layers=2)
    plain.load_state_dict(
        {
            name.replace("layers.2.", "layers.1."): value
            for name, value in model.state_dict().items()
            if "layers.1." not in name
        }
    )
    expected = probed(StabilityMonitor(plain), lambda: loss_of(plain, some_batch()))
    kept = [n for n, place in enumerate(record.places) if "layer 1" not in place]
    for name in FIELDS:
        assert tuple(getattr(record, name)[n] for n in kept) == getattr(expected, name)
        assert all(math.isnan(x) for n, x in enumerate(getattr(record, name)) if n not in kept)
    assert record.growth == expected.growth
    # Without the last layer there is no growth either.
    model.skip = 2
    record = probed(monitor, lambda: loss_of(model, some_batch()))
    assert record.left_out["gradient_growth"] == "layer 2 attention, layer 2: it did not run in this step"
    model.skip = None
    monitor = StabilityMonitor(model, probes="stack_jacobian")
    model.skip = 2
    record = probed(monitor, lambda: loss_of(model, some_batch()))
    assert record.left_out["stack_jacobian"] == "not all of its layers were called"


def test_a_layer_that_runs_in_some_passes_has_no_norm_of_the_step() -> None:
    torch.manual_seed(0)
    model = Dropping()
    monitor = StabilityMonitor(model)

    def loss(skip: int | None, seed: int) -> Tensor:
        model.skip = skip
        return loss_of(model, some_batch(seed))

    record = probed(monitor, lambda: loss(None, 0), lambda: loss(2, 1))
    said = "layer 2 attention, layer 2: a gradient arrived at 24 of 48 tokens"
    assert record.left_out["place_gradient"] == record.left_out["gradient_growth"] == said
    assert {"residual_std", "token_gradient", "token_gradient_max"}.isdisjoint(record.left_out)
    assert [math.isnan(x) for x in record.place_gradient] == [False] * 5 + [True] * 2
    alone = probed(monitor, lambda: loss(None, 0))
    assert record.residual_std[-1] == alone.residual_std[-1]
    assert record.token_gradient[-1] == alone.token_gradient[-1]


# --- what is refused ------------------------------------------------------------------------------------------------


class Called(Titan):
    """Its layers called by number."""

    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.numbers = numbers

    def forward(self, tokens: Tensor) -> Tensor:
        layers = self.layers
        self.layers = _Chosen([layers[str(n)] for n in self.numbers])  # type: ignore[assignment]
        try:
            return super().forward(tokens)
        finally:
            self.layers = layers


class _Chosen(nn.Module):
    def __init__(self, blocks: list[Any]) -> None:
        super().__init__()
        self._blocks = tuple(blocks)

    def values(self) -> tuple[Any, ...]:
        return self._blocks


class Pairs(nn.Module):
    """Attention and feed-forward in a list, which is no block that could be called."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleList([NanoGPT(n_layers=1).transformer["h"][0].attn, TitanFeedForward()]) for _ in range(3)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for attend, feed in self.layers:
            x = x + attend(x)
            x = x + feed(x)
        return x @ self.table.weight.T


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Called(0, 0, 1, 1, 2, 2), r"more than once in a forward pass \(layer 0 2 times, layer 1 2 times, layer 2 2"),
        (Called(0, 2), "does not call layer 1 in a forward pass in eval mode; "),
        (Called(1, 0, 2), "in another order than its list has; put them"),
        (Pairs(), r"never calls its 3 blocks \(ModuleList\), at most what is in them; make each a module whose"),
    ],
)
def test_blocks_that_are_not_called_once_each_are_said_to_be(model: Any, words: str) -> None:
    for refuses in (StabilityMonitor, describe):
        with pytest.raises(ValueError, match=words) as error:
            refuses(model)
        assert "\n" not in str(error.value)


class Flat(nn.Module):
    """Its attention is in the block itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.feed = nn.RMSNorm(WIDTH), nn.Sequential(nn.RMSNorm(WIDTH), TitanFeedForward())
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        q, k, v = (f(self.norm(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.feed(x)


def test_attention_in_the_block_itself_is_said_to_be_missing() -> None:
    model = Titan()
    model.layers = nn.ModuleDict({str(n): Flat() for n in range(2)})
    record = probed(StabilityMonitor(model), lambda: loss_of(model, some_batch()))
    assert record.places == ("embedding", "layer 0", "layer 1")
    assert record.left_out["logit_variance"].startswith("layer 0: no attention was found in it: not one of its chil")
    assert "give attention a module of its own" in record.left_out["logit_variance"]
    assert math.isfinite(record.growth)


# --- other ways to hand on the stream -------------------------------------------------------------------------------


class Handing(nn.Module):
    """Takes and gives the stream in a tuple, as in a Sequential."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attention, self.feed_forward = block.attention, block.feed_forward
        self.attention_norm, self.ffn_norm = block.attention_norm, block.ffn_norm

    def forward(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, turns = given
        h = x + self.attention(self.attention_norm(x), turns)
        return h + self.feed_forward(self.ffn_norm(h)), turns


class Sequence(nn.Module):
    def __init__(self, model: Titan) -> None:
        super().__init__()
        self.titan = model
        model.layers = nn.Sequential(*(Handing(layer) for layer in model.layers.values()))  # type: ignore[assignment]

    def forward(self, tokens: Tensor) -> Tensor:
        half = WIDTH // HEADS // 2
        angles = torch.arange(tokens.shape[1])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        x, _ = self.titan.layers((self.titan.tok_embeddings(tokens), torch.polar(torch.ones_like(angles), angles)))
        return self.titan.output(self.titan.norm(x))


def test_streams_in_tuples_are_seen() -> None:
    """With the numbers of the same layers called one by one, norms of Jacobians too."""
    torch.manual_seed(0)
    model, probes = Titan(), "default,half_layer_jacobian,stack_jacobian"
    expected = probed(StabilityMonitor(model, probes=probes), lambda: loss_of(model, some_batch()))
    handing = Sequence(model)
    record = probed(StabilityMonitor(handing, probes=probes), lambda: loss_of(handing, some_batch()))
    assert record.left_out.keys() == UPDATES
    assert all(getattr(record, name) == getattr(expected, name) for name in ("places", *FIELDS))
    for name in ("logit_variance", "half_layer_jacobian", "stack_jacobian"):
        assert record.probes[name].values == pytest.approx(expected.probes[name].values, rel=1e-5)


class Prompt(nn.Module):
    """Puts learned vectors before the tokens, or takes them away."""

    def __init__(self, *, away: bool) -> None:
        super().__init__()
        self.prompt = None if away else nn.Parameter(torch.randn(1, 4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 4:] if self.prompt is None else torch.cat([self.prompt.expand(len(x), -1, -1), x], 1)


def test_a_prompt_counts_as_tokens() -> None:
    model = NanoGPT()
    model.transformer["drop"] = Prompt(away=False)
    model.transformer["ln_f"] = nn.Sequential(model.transformer["ln_f"], Prompt(away=True))
    record = probed(StabilityMonitor(model), lambda: loss_of(model, some_batch()))
    assert record.n_tokens == some_batch().numel() + 4 * len(some_batch())
    assert record.left_out.keys() == UPDATES
    assert "layer 0 attention" in record.places


# --- devices --------------------------------------------------------------------------------------------------------


class WithoutFloat64(TorchFunctionMode):
    """The CPU as a device without float64, as MPS is one; what is copied with `cpu()` is the host's, which has it."""

    refused = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        host = all(hasattr(x, "host") for x in given) and (bool(given) or "device" not in kwargs)
        result = func(*args, **kwargs)
        if func is Tensor.cpu:
            result, host = result.clone(), True
        for x in (x for x in tree_leaves(result) if isinstance(x, Tensor)):
            if host:
                x.host = True  # type: ignore[attr-defined]
            elif x.dtype == torch.float64:
                self.refused += 1
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype; use float32 instead")
        return result


def test_a_training_without_float64_is_not_ended_by_the_monitor() -> None:
    """It is measured in float32 there, a few rounding errors away."""
    records, without = [], WithoutFloat64()
    for device in (nullcontext(), without):
        torch.manual_seed(0)
        model = Titan()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with device:
            monitor = StabilityMonitor(model)
            with monitor.step():
                loss = loss_of(model, some_batch())
                # `backward` by what is inside it: inside a function that a mode has been shown, it is off.
                engine = torch.autograd.Variable._execution_engine
                engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
                optimizer.step()
        records.append(monitor.records[-1])
    assert without.refused  # control: it was asked for
    full, short = records
    for name in FIELDS:
        assert getattr(short, name) == pytest.approx(getattr(full, name), rel=1e-5)
    assert short.left_out == full.left_out == {}
    for name in UPDATES | {"gradient_growth", "attention_entropy", "logit_variance"}:
        assert short.probes[name].values == pytest.approx(full.probes[name].values, rel=1e-5)
