"""The model is the one that is described: embeddings, block layouts, the residual stream's places and the head."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.weights import architecture, disturb, generator
from torch import Tensor, nn

from empirics.model import ACTIVATIONS, Transformer, build
from theory.architecture import Architecture, preset

VOCAB, LENGTH = 61, 16
MODERATE: dict[str, Any] = {
    "d_model": 24, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_head": 6, "d_ffn": 40, "vocab_size": 300,
    "context": 50, "positions": "learned", "gated": True, "biases": True,
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "pre-ln": {},
    "post-ln": {"block": "post-ln"},
    "post-ln without a final norm": {"block": "post-ln", "final_norm": False},
    "peri-ln": {"block": "peri-ln"},
    "branch-ln": {"block": "branch-ln"},
    "parallel": {"parallel": True},
    "parallel with one norm": {"parallel": True, "shared_norm": True},
    "deepnorm": {"block": "post-ln", "shortcut_multiplier": 1.7},
    "multipliers": {"shortcut_multiplier": 0.9, "residual_multiplier": 0.3},
    "multipliers, peri-ln": {"block": "peri-ln", "shortcut_multiplier": 0.9, "residual_multiplier": 0.3},
    "multipliers, branch-ln": {"block": "branch-ln", "shortcut_multiplier": 1.2, "residual_multiplier": 0.3},
    "multipliers, parallel": {"parallel": True, "shortcut_multiplier": 0.9, "residual_multiplier": 0.3},
    "depth scaling": {"norm_depth_scaling": True},
    "depth scaling, post-ln": {"norm_depth_scaling": True, "block": "post-ln"},
    "depth scaling, peri-ln": {"norm_depth_scaling": True, "block": "peri-ln"},
    "depth scaling, branch-ln": {"norm_depth_scaling": True, "block": "branch-ln"},
    "depth scaling, parallel": {"norm_depth_scaling": True, "parallel": True, "shared_norm": True},
    "nothing at the end": {"final_norm": False, "tied": True},
}  # fmt: skip


def random_batch(seed: int = 0, batch: int = 3, length: int = LENGTH, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    both = torch.randint(0, vocab, (2, batch, length), generator=generator(seed))
    return both[0], both[1]


# --- embedding treatments ---------------------------------------------------------------------------------------


def gradients(a: Architecture, seed: int = 5) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Logits, gradients at every place and parameter gradients."""
    model = build(a, seed=seed)
    tokens, targets = random_batch(seed, vocab=a.vocab_size)
    places: list[Tensor] = []
    model.loss(tokens, targets, places).backward()
    with torch.no_grad():
        logits = model(tokens)
    assert len(places) == len(a.updates) * a.n_layers + 1
    return logits, [place.grad for place in places], {name: p.grad for name, p in model.named_parameters()}  # type: ignore[misc]


@pytest.mark.parametrize("layout", ["pre-ln", "post-ln", "parallel"])
@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal", "none"])
def test_embed_detach_changes_the_embedding_gradient_alone(positions: Any, layout: str) -> None:
    vanilla = architecture(**(MODERATE | {"positions": positions} | LAYOUTS[layout]))
    detached = vanilla.with_embedding("embed-detach")
    logits, places, parameters = gradients(vanilla)
    logits_d, places_d, parameters_d = gradients(detached)
    assert torch.equal(logits, logits_d)  # bit for bit
    assert all(torch.equal(g, g_d) for g, g_d in zip(places, places_d, strict=True))
    for name, gradient in parameters.items():
        if name in ("tokens.weight", "positions.weight"):
            # A tenth of each token's gradient, exactly; then tokens that occur twice are added up in float32.
            torch.testing.assert_close(parameters_d[name], 0.1 * gradient, rtol=1e-5, atol=1e-9)
        else:
            assert torch.equal(parameters_d[name], gradient), name


def test_embed_detach_gradient_is_exactly_a_tenth() -> None:
    """Tokens that all differ: nothing is added up, and the factor is seen bare."""
    vanilla = architecture(d_model=8, d_head=4, vocab_size=40, context=40)
    tokens = torch.arange(1, 33)[None]
    tables = []
    for a in (vanilla, vanilla.with_embedding("embed-detach")):
        model = build(a, seed=0, dtype=torch.float64)
        model.loss(tokens, tokens.flip(1)).backward()
        tables.append(model.tokens.weight.grad)
    assert torch.equal(tables[1], tables[0] * 0.1)


def test_scaled_embedding_multiplies() -> None:
    a = preset("tiny")
    tokens, _ = random_batch(vocab=a.vocab_size)
    plain, scaled = build(a, seed=0), build(a.with_embedding("scaled-embed"), seed=0)
    assert torch.equal(scaled.embed(tokens), plain.embed(tokens) * 8.0)  # sqrt(64), a power of two: no rounding
    halved = build(replace(a, embedding_multiplier=0.5), seed=0)
    assert torch.equal(halved.embed(tokens), plain.tokens(tokens) / 2)


def test_normalised_embedding() -> None:
    a = preset("tiny").with_embedding("embed-ln")
    tokens, _ = random_batch(vocab=a.vocab_size)
    model = build(a, seed=0, dtype=torch.float64)
    x = model.tokens(tokens)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + a.eps).sqrt()
    torch.testing.assert_close(model.embed(tokens), expected, rtol=1e-12, atol=1e-12)


# --- block layouts ----------------------------------------------------------------------------------------------


def by_hand(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """The residual stream at every place, from `Architecture`'s own definition of the layouts."""
    a = model.architecture
    alpha, r = a.shortcut_multiplier, a.residual_multiplier
    x = model.embed(tokens)
    places = [x]
    for n, layer in enumerate(model.layers):

        def norm(module: Any, x: Tensor, n: int = n) -> Tensor:
            if a.norm == "layernorm":
                x = x - x.mean(-1, keepdim=True)
            x = x / (x.square().mean(-1, keepdim=True) + a.eps).sqrt() * module.weight
            if getattr(module, "bias", None) is not None:
                x = x + module.bias
            return x / math.sqrt(n + 1) if a.norm_depth_scaling else x

        subs = (layer.attention, layer.attention_norm, layer.attention_out_norm), (
            layer.feedforward, layer.feedforward_norm or layer.attention_norm, layer.feedforward_out_norm
        )  # fmt: skip
        if a.parallel:
            (f, norm_f, _), (g, norm_g, _) = subs
            x = alpha * x + r * (f(norm(norm_f, x)) + g(norm(norm_g, x)))
            places.append(x)
            continue
        for f, before, after in subs:
            if a.block == "pre-ln":
                x = alpha * x + r * f(norm(before, x))
            elif a.block == "post-ln":
                x = norm(after, alpha * x + r * f(x))
            elif a.block == "peri-ln":
                x = alpha * x + r * norm(after, f(norm(before, x)))
            else:
                x = alpha * x + r * norm(after, f(x))
            places.append(x)
    return places


def logits_by_hand(model: Transformer, x: Tensor) -> Tensor:
    a = model.architecture
    z = a.logit_multiplier * (model.norm(x) @ model.head.weight.T)
    return a.logit_softcap * torch.tanh(z / a.logit_softcap) if a.logit_softcap else z


def disturbed(layout: str, **changes: Any) -> Transformer:
    model = build(architecture(**(MODERATE | LAYOUTS[layout] | changes)), seed=0, dtype=torch.float64)
    disturb(model, 5)
    return model


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_their_definitions(layout: str, norm: Any) -> None:
    model = disturbed(layout, norm=norm)
    tokens, _ = random_batch(vocab=300)
    places: list[Tensor] = []
    logits = model(tokens, places)
    expected = by_hand(model, tokens)
    assert len(places) == len(expected) == len(model.architecture.updates) * 3 + 1
    for found, wanted in zip(places, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits, logits_by_hand(model, expected[-1]), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_is_another(layout: str) -> None:
    """Control: the definition of every other layout that has the same norms gives something else."""
    model = disturbed(layout)
    tokens, _ = random_batch(vocab=300)
    found = model(tokens)
    names = set(model.state_dict())
    compared = 0
    for other, changes in LAYOUTS.items():
        a = architecture(**(MODERATE | changes))
        if other == layout or set(Transformer(a).state_dict()) - {"head.weight"} != names - {"head.weight"}:
            continue
        twin = Transformer(a).double()
        twin.load_state_dict(model.state_dict())
        expected = logits_by_hand(twin, by_hand(twin, tokens)[-1])
        assert float((expected - found).detach().abs().max()) > 1e-3, other
        compared += 1
    assert compared or layout in ("post-ln without a final norm", "nothing at the end", "parallel with one norm")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_are_shortcut_plus_branches(layout: str) -> None:
    """`updates` compose to the network; `branches` are what they add, where nothing is normalised afterwards."""
    model = disturbed(layout)
    a = model.architecture
    tokens, _ = random_batch(vocab=300)
    places: list[Tensor] = []
    model(tokens, places)
    x, count = places[0], len(a.updates)
    for n, layer in enumerate(model.layers):
        assert len(layer.updates) == count
        for k, update in enumerate(layer.updates):
            branches = layer.branches if a.parallel else layer.branches[k : k + 1]
            total = a.shortcut_multiplier * x + sum(branch(x) for branch in branches)
            x = update(x)
            assert torch.equal(x, places[n * count + k + 1])
            if a.block == "post-ln":
                norm = (layer.attention_out_norm, layer.feedforward_out_norm)[k]
                total = norm(total) * (1 / math.sqrt(n + 1) if a.norm_depth_scaling else 1.0)
            torch.testing.assert_close(x, total, rtol=1e-13, atol=1e-13)


def test_pre_ln_adds_its_branch_and_nothing_else() -> None:
    """Bit for bit: no multiplier of one, no copy, no other order."""
    model = build(preset("tiny"), seed=0)
    tokens, _ = random_batch(vocab=512)
    places: list[Tensor] = []
    logits = model(tokens, places)
    x = model.tokens(tokens)
    for n, layer in enumerate(model.layers):
        assert torch.equal(places[2 * n], x)
        x = x + layer.attention(layer.attention_norm(x))
        assert torch.equal(places[2 * n + 1], x)
        x = x + layer.feedforward(layer.feedforward_norm(x))
    assert torch.equal(logits, model.head(model.norm(x)))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feedforward_is_its_definition(activation: Any, gated: bool) -> None:
    feedforward = disturbed("pre-ln", activation=activation, gated=gated).layers[0].feedforward
    u = torch.randn(5, 24, generator=generator(0), dtype=torch.float64)

    def linear(module: nn.Linear, x: Tensor) -> Tensor:
        return x @ module.weight.T + module.bias

    z = linear(feedforward.enter, u)
    hidden = {
        "identity": z,
        "relu": z.clamp(min=0),
        "relu-squared": z.clamp(min=0) ** 2,
        "gelu": z * (1 + torch.erf(z / math.sqrt(2))) / 2,
        "gelu-tanh": z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
        "silu": z / (1 + torch.exp(-z)),
    }[activation]
    if gated:
        hidden = hidden * linear(feedforward.gate, u)
    torch.testing.assert_close(feedforward(u), linear(feedforward.leave, hidden), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("multiplier", "cap"), [(1.0, 0.0), (0.3, 0.0), (1.0, 2.0), (3.0, 2.0)])
def test_logits_are_multiplied_then_capped(multiplier: float, cap: float) -> None:
    model = disturbed("pre-ln", logit_multiplier=multiplier, logit_softcap=cap)
    tokens, _ = random_batch(vocab=300)
    places: list[Tensor] = []
    logits = model(tokens, places)
    torch.testing.assert_close(logits, logits_by_hand(model, places[-1]), rtol=1e-13, atol=1e-13)
    assert not cap or float(logits.detach().abs().max()) < cap


# --- the whole --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal", "alibi"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_takes_part_in_the_loss(layout: str, positions: Any) -> None:
    model = build(architecture(**(MODERATE | LAYOUTS[layout] | {"positions": positions, "qk_norm": "head"})), seed=0)
    places: list[Tensor] = []
    model.loss(*random_batch(vocab=300), places).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(float(place.grad.norm()) > 0 for place in places)  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_future_tokens_change_nothing(layout: str) -> None:
    model = disturbed(layout, norm="rmsnorm", positions="rope")
    tokens, _ = random_batch(vocab=300)
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 300
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=1e-12, atol=1e-12)
    assert float((before - after)[:, 10:].detach().abs().amax(-1).min()) > 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeping_places_changes_no_bit(layout: str) -> None:
    results = []
    for places in (None, []):
        model = build(architecture(**(MODERATE | LAYOUTS[layout])), seed=0)
        loss = model.loss(*random_batch(vocab=300), places)
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
