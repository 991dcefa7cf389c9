"""Attention in every variant: the definition token by token, what a token sees, and positions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.weights import architecture, disturb, generator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from empirics.model import (
    PLAIN_TOKENS,
    Attention,
    alibi_slopes,
    build,
    faster_attention,
    rotary_table,
    rotate,
    sinusoidal_table,
)
from empirics.probes import PlainAttention
from theory.architecture import Architecture

LENGTH = 9
SIZES: dict[str, Any] = {"d_model": 10, "n_heads": 6, "n_kv_heads": 2, "d_head": 6, "n_layers": 3, "biases": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "one head a key": {"n_kv_heads": 6},
    "one key": {"n_kv_heads": 1},
    "no biases": {"biases": False},
    "rope": {"positions": "rope"},
    "rope, part of a head": {"positions": "rope", "rope_fraction": 0.67},
    "rope, none of a head": {"positions": "rope", "rope_fraction": 0.0},
    "rope, another base": {"positions": "rope", "rope_base": 50.0},
    "alibi": {"positions": "alibi"},
    "alibi, four heads": {"positions": "alibi", "n_heads": 4},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "window as long as the text": {"window": LENGTH},
    "window with rope": {"window": 4, "positions": "rope"},
    "window with alibi": {"window": 4, "positions": "alibi"},
    "qk norm": {"qk_norm": "head"},
    "qk norm, rope": {"qk_norm": "head", "positions": "rope", "norm": "rmsnorm"},
    "full qk norm": {"qk_norm": "full", "positions": "rope", "rope_fraction": 0.34},
    "full qk norm, rms": {"qk_norm": "full", "norm": "rmsnorm"},
    "scale": {"attention_scale": 0.9},
    "scale of zero": {"attention_scale": 0.0},
    "soft-cap": {"attention_softcap": 0.8},
    "soft-cap with everything": {
        "attention_softcap": 0.8, "window": 3, "positions": "alibi", "qk_norm": "full", "attention_scale": 0.7,
    },
}  # fmt: skip


def disturbed(a: Architecture, layer: int = 0) -> Attention:
    """A layer's attention with every parameter moved off its initial value by enough to make attention uneven."""
    attention = build(a, seed=0, dtype=torch.float64).layers[layer].attention
    disturb(attention, 3)
    return attention


def inputs(a: Architecture, batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, a.d_model, generator=generator(0), dtype=torch.float64)


def by_hand(a: Architecture, attention: Attention, u_TD: np.ndarray, layer: int = 0) -> np.ndarray:
    """One sequence, from the definition: a head, a token and a key at a time."""

    def linear(module: nn.Module, x: np.ndarray) -> np.ndarray:
        return x @ module.weight.detach().numpy().T + (0 if module.bias is None else module.bias.detach().numpy())

    def norm(module: Any, x: np.ndarray) -> np.ndarray:
        if a.norm == "layernorm":
            x = x - x.mean()
        x = x / math.sqrt((x * x).mean() + a.eps) * module.weight.detach().numpy()
        return x if getattr(module, "bias", None) is None else x + module.bias.detach().numpy()

    def turned(x: np.ndarray, t: int) -> np.ndarray:
        width = int(a.rope_fraction * a.d_head) if a.positions == "rope" else 0
        pairs = x[: width // 2] + 1j * x[width // 2 : width]
        pairs = pairs * np.exp([1j * t / a.rope_base ** (2 * i / width) for i in range(width // 2)])
        return np.concatenate([pairs.real, pairs.imag, x[width:]])

    def projected(name: str, t: int, head: int) -> np.ndarray:
        row = linear(getattr(attention, name), u_TD[t])
        part = slice(head * a.d_head, (head + 1) * a.d_head)
        if name == "value" or a.qk_norm == "none":
            return row[part]
        module = getattr(attention, f"{name}_norm")
        return norm(module, row)[part] if a.qk_norm == "full" else norm(module, row[part])

    scale = 1 / math.sqrt(a.d_head) if a.attention_scale is None else a.attention_scale
    slopes = {6: [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8], 4: [1 / 4, 1 / 16, 1 / 64, 1 / 256]}[a.n_heads]
    window = a.window_at(layer) or len(u_TD)
    rows = []
    for t in range(len(u_TD)):
        heads = []
        for h in range(a.n_heads):
            group = h // (a.n_heads // a.n_kv_heads)
            query, weights, values = turned(projected("query", t, h), t), [], []
            for j in range(max(0, t - window + 1), t + 1):
                z = query @ turned(projected("key", j, group), j) * scale
                if a.attention_softcap:
                    z = a.attention_softcap * math.tanh(z / a.attention_softcap)
                if a.positions == "alibi":
                    z -= slopes[h] * (t - j)
                weights.append(math.exp(z))
                values.append(projected("value", j, group))
            heads.append(np.array(weights) @ np.array(values) / sum(weights))
        rows.append(linear(attention.output, np.concatenate(heads)))
    return np.array(rows)


@pytest.mark.parametrize("name", VARIANTS)
def test_attention_written_out_token_by_token(name: str) -> None:
    a = architecture(**(SIZES | VARIANTS[name]))
    attention, u = disturbed(a), inputs(a)
    expected = np.stack([by_hand(a, attention, sequence.numpy()) for sequence in u])
    # float64 sums of a few dozen terms of order one
    np.testing.assert_allclose(attention(u).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, changes in VARIANTS.items() if set(changes) - set(SIZES)])
def test_the_option_matters(name: str) -> None:
    """Control: without the option the same weights compute something else, but for the two that say nothing."""
    a = architecture(**(SIZES | VARIANTS[name]))
    without = architecture(**{key: getattr(a, key) for key in SIZES})
    attention, u = disturbed(a), inputs(a)
    other = Attention(without).double()
    other.load_state_dict({k: v for k, v in attention.state_dict().items() if k in other.state_dict()})
    same = name in ("window as long as the text", "rope, none of a head")
    assert torch.allclose(attention(u), other(u), rtol=1e-9, atol=1e-9) == same


@pytest.mark.parametrize("name", VARIANTS)
def test_fused_attention_is_plain_attention(name: str) -> None:
    """Outputs and all gradients, of the fused kernel, of torch's own elementary operations and of the probe's."""
    a = architecture(**(SIZES | VARIANTS[name]))
    attention, u = disturbed(a), inputs(a).requires_grad_()
    cotangent = torch.randn(u.shape, generator=generator(5), dtype=torch.float64)

    def everything(function: Any) -> list[Tensor]:
        out = function(u)
        return [out, *torch.autograd.grad(out, [u, *attention.parameters()], cotangent)]

    expected = everything(attention)
    with sdpa_kernel(SDPBackend.MATH):
        elementary = everything(attention)
    attention.kernel = "plain"
    for found in (everything(PlainAttention(attention)), elementary, everything(attention)):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_the_faster_attention_is_a_table() -> None:
    """Plain for short sequences in bfloat16 on a CPU; the rule is told apart from both kernels by its bits."""
    attention, u = build(architecture(**SIZES), seed=0).layers[0].attention, inputs(architecture(**SIZES)).float()
    for device, dtype, n_tokens, kernel in (
        ("cpu", torch.bfloat16, PLAIN_TOKENS, "plain"), ("cpu", torch.bfloat16, PLAIN_TOKENS + 1, "fused"),
        ("cpu", torch.float32, 16, "fused"), ("cpu", torch.float64, 16, "fused"), ("cuda", torch.bfloat16, 16, "fused"),
    ):  # fmt: skip
        assert faster_attention(device, dtype, n_tokens) == attention.kernel_at(device, dtype, n_tokens) == kernel

    def output(kernel: Any, precision: torch.dtype, length: int = LENGTH) -> Tensor:
        attention.kernel = kernel
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            return attention(u.repeat(1, math.ceil(length / LENGTH), 1)[:, :length])

    for precision, length, faster, slower in (
        (torch.bfloat16, LENGTH, "plain", "fused"), (torch.bfloat16, PLAIN_TOKENS + 1, "fused", "plain"),
        (torch.float32, LENGTH, "fused", "plain"),
    ):  # fmt: skip
        assert output(None, precision, length).equal(output(faster, precision, length))
        assert not output(None, precision, length).equal(output(slower, precision, length))
    exact = output("fused", torch.float32)
    for kernel in ("fused", "plain"):  # a few roundings of 8 bits each
        assert float((output(kernel, torch.bfloat16) - exact).norm()) < 0.02 * float(exact.norm())


@pytest.mark.parametrize("kernel", ["fused", "plain"])
def test_rmsnorm_in_autocast_is_taken_in_its_gain_s_precision(kernel: Any) -> None:
    """Queries, keys and what a branch writes are bfloat16 there; torch's RMSNorm would take them so, with a warning."""
    for qk_norm in ("head", "full"):
        model = build(architecture(norm="rmsnorm", qk_norm=qk_norm, block="peri-ln", **SIZES), seed=0)
        for layer in model.layers:
            layer.attention.kernel = kernel
        tokens = torch.randint(model.head.out_features, (2, LENGTH), generator=generator(0))
        exact = model.loss(tokens, tokens)
        with torch.autocast("cpu", torch.bfloat16):
            read = model.norm(torch.ones(model.norm.weight.shape, dtype=torch.bfloat16))
            rounded = model.loss(tokens, tokens)
        assert read.dtype == torch.float32
        torch.testing.assert_close(rounded, exact, rtol=2**-8, atol=0.0)


def test_no_fused_kernel_has_a_soft_cap() -> None:
    for changes in ({"attention_softcap": 0.8}, {"attention_scale": 0.0}):
        attention = Attention(architecture(**SIZES | changes))
        attention.kernel = "fused"
        assert attention.kernel_at("cpu", torch.float32, 16) == "plain"


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_products_are_those_of_the_plain_attention(name: str) -> None:
    a = architecture(**(SIZES | VARIANTS[name]))
    attention, u = disturbed(a).requires_grad_(False), inputs(a)
    direction = torch.randn(u.shape, generator=generator(5), dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        fused = torch.func.jvp(attention, (u,), (direction,))[1]
    plain = torch.func.jvp(PlainAttention(attention), (u,), (direction,))[1]
    torch.testing.assert_close(fused, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_token_sees_its_window_and_no_more(name: str) -> None:
    """By perturbing one token at a time; and the probabilities are zero elsewhere and sum to 1."""
    a = architecture(**(SIZES | VARIANTS[name]))
    attention, u = disturbed(a), inputs(a, batch=1)
    window = a.window or LENGTH
    with torch.no_grad():
        before = attention(u)[0]
        for j in range(LENGTH):
            moved = u.clone()
            moved[0, j] += 1.0
            change = (attention(moved)[0] - before).abs().amax(-1)
            for t in range(LENGTH):
                assert (float(change[t]) > 1e-8) == (0 <= t - j < window), (j, t)
        logits, probabilities = attention.probabilities(u)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    seen = (distance >= 0) & (distance < window)
    assert logits.isfinite().all()
    assert torch.equal((probabilities > 0).all(dim=1)[0], seen)
    assert torch.equal(probabilities == 0, ~seen.expand_as(probabilities))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(1, a.n_heads, LENGTH, dtype=torch.float64))
    torch.testing.assert_close(logits.masked_fill(~seen, -math.inf).softmax(-1), probabilities)


@pytest.mark.parametrize("changes", [{}, {"positions": "alibi"}, {"window": 3}, {"attention_softcap": 1.0}], ids=str)
def test_one_token_sees_itself(changes: dict[str, Any]) -> None:
    a = architecture(**(SIZES | changes))
    attention, u = disturbed(a), inputs(a, length=1)
    value = attention.value(u).unflatten(-1, (2, 6)).repeat_interleave(3, dim=-2).flatten(-2)
    torch.testing.assert_close(attention(u), attention.output(value))


@pytest.mark.parametrize(("global_every", "reach"), [(0, (2, 4, 6)), (2, (2, 9, 9)), (1, (9, 9, 9)), (3, (2, 4, 9))])
def test_windows_by_layer(global_every: int, reach: tuple[int, ...]) -> None:
    """How far back a token of each layer's output depends on the text, with windows of three tokens."""
    a = architecture(**SIZES, vocab_size=30, window=3, global_every=global_every)
    model = build(a, seed=0, dtype=torch.float64)
    for parameter in model.parameters():
        parameter.data *= 3  # so that attention is uneven and changes are not lost
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        before: list[Tensor] = []
        model(tokens, before)
        far = [0] * 3
        for j in range(10):
            changed, after = tokens.clone(), []
            changed[0, j] = 29
            model(changed, after)
            for n in range(3):
                change = (after[2 * n + 2] - before[2 * n + 2]).abs().amax(-1)[0]
                assert not change[:j].any()
                if float(change[9]) > 1e-9:
                    far[n] = max(far[n], 9 - j)
    assert tuple(far) == reach


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_each_layer_has_its_window(layer: int) -> None:
    a = architecture(**SIZES, window=3, global_every=2)
    attention, u = disturbed(a, layer), inputs(a, batch=1)
    expected = by_hand(a, attention, u[0].numpy(), layer)
    np.testing.assert_allclose(attention(u)[0].detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    assert attention.window == (0 if layer == 1 else 3)


# --- positions --------------------------------------------------------------------------------------------------


def test_slopes_of_alibi() -> None:
    assert alibi_slopes(1) == [2.0**-8]
    assert alibi_slopes(2) == [2.0**-4, 2.0**-8]
    assert alibi_slopes(3) == [2.0**-4, 2.0**-8, 2.0**-2]
    assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(12) == [2.0**-h for h in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]


def test_slopes_of_alibi_are_the_published_classes() -> None:
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    for heads in range(1, 40):
        theirs = _get_alibi_slopes(heads, torch.device("cpu"))
        torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), theirs, rtol=1e-6, atol=0)  # float32


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_rotary_angles(base: float, dtype: torch.dtype, error: float) -> None:
    """t / base^(2i/width); in float32 an angle of 20 is known to 1e-6."""
    cosine, sine = rotary_table(20, 6, torch.device("cpu"), dtype, base)
    assert cosine.dtype == sine.dtype == dtype
    for t in range(20):
        for i in range(6):
            angle = t / base ** (2 * (i % 3) / 6)
            assert float(cosine[t, i]) == pytest.approx(math.cos(angle), abs=error)
            assert float(sine[t, i]) == pytest.approx(math.sin(angle), abs=error)


@pytest.mark.parametrize("width", [8, 6, 2])
def test_rotation_keeps_norms_and_depends_on_distance_alone(width: int) -> None:
    cosine, sine = rotary_table(20, width, torch.device("cpu"), torch.float64)
    q, k = torch.randn(2, 8, generator=generator(0), dtype=torch.float64)
    rotated_q, rotated_k = rotate(q.expand(20, 8), cosine, sine), rotate(k.expand(20, 8), cosine, sine)
    torch.testing.assert_close(rotated_q.norm(dim=1), q.norm().expand(20), rtol=1e-14, atol=0)
    assert torch.equal(rotated_q[:, width:], q[width:].expand(20, 8 - width))
    products = rotated_q @ rotated_k.T
    for distance in range(-19, 20):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-12, atol=1e-12)
    assert float((products[0] - products[0, 0]).abs().max()) > 0.1


@pytest.mark.parametrize("width", [8, 6, 2])
def test_one_vector_turns_by_several_angles(width: int) -> None:
    cosine, sine = rotary_table(5, width, torch.device("cpu"), torch.float64)
    x_31E = torch.randn(3, 1, 8, generator=generator(0), dtype=torch.float64)
    assert torch.equal(rotate(x_31E, cosine, sine), rotate(x_31E.expand(3, 5, 8), cosine, sine))


@pytest.mark.parametrize("width", [1, 2, 7, 8])
def test_sinusoidal_positions(width: int) -> None:
    table = sinusoidal_table(11, width, torch.device("cpu"), torch.float64)
    for t in range(11):
        for i in range(width):
            angle = t / 10_000 ** (2 * (i // 2) / width)
            expected = math.cos(angle) if i % 2 else math.sin(angle)
            assert float(table[t, i]) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_positions_are_added_after_the_multiplier_and_before_the_norm(positions: Any) -> None:
    a = architecture(d_model=7, d_head=7, vocab_size=30, positions=positions, embedding_multiplier=3.0)
    tokens = torch.randint(0, 30, (2, 9), generator=generator(0))
    model = build(a, seed=0, dtype=torch.float64)
    table = sinusoidal_table(9, 7, torch.device("cpu"), torch.float64)
    if model.positions is not None:
        table = model.positions.weight[:9]
    expected = 3.0 * model.tokens.weight[tokens] + table
    torch.testing.assert_close(model.embed(tokens), expected, rtol=1e-14, atol=1e-14)
    normed = build(replace(a, embedding_norm=True), seed=0, dtype=torch.float64)
    torch.testing.assert_close(normed.embed(tokens), torch.nn.functional.layer_norm(expected, (7,), eps=a.eps))


@pytest.mark.parametrize("positions", ["none", "rope", "learned", "sinusoidal", "alibi"])
def test_positions_tell_an_order(positions: Any) -> None:
    """Two tokens before the last in another order: the last one's logits differ unless there are no positions."""
    a = architecture(d_model=12, d_head=6, n_heads=2, n_kv_heads=2, vocab_size=30, positions=positions)
    model = build(a, seed=0, dtype=torch.float64)
    logits = [model(torch.tensor([tokens]))[0, -1] for tokens in ([3, 7, 5, 9], [7, 3, 5, 9])]
    assert torch.allclose(*logits, rtol=1e-10, atol=1e-10) == (positions == "none")
