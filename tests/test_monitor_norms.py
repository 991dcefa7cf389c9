"""Jacobian norms of anyone's blocks in a training step, against whole Jacobians of what the class does by its names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from helpers.decoders import Encoder, NanoGPT, Titan
from helpers.known_decoders import KINDS, OURS, real, some_batch
from helpers.norms import ALL, HEADS, LENGTH, NORMS, decoder, exact, is_estimate, probed
from helpers.real_classes import blocks

from empirics.model import build as build_own
from empirics.monitor import StabilityMonitor
from empirics.registry import find, probes
from empirics.subject import TOLERANCE, Subject

# --- the explicit Jacobian ----------------------------------------------------------------------------------------

Module = Any
Sub = Callable[..., Tensor]
# The class's own modules. `after` and `ffn_after` normalise the stream.
PARTS: dict[str, Callable[[Module], dict[str, Any]]] = {
    "gpt2": lambda b: {"norm": b.ln_1, "attention": b.attn, "ffn_norm": b.ln_2, "ffn": b.mlp},
    "llama": lambda b: {
        "norm": b.input_layernorm, "attention": b.self_attn, "ffn_norm": b.post_attention_layernorm, "ffn": b.mlp,
    },
    "gpt_neox": lambda b: {
        "norm": b.input_layernorm, "attention": b.attention, "ffn_norm": b.post_attention_layernorm, "ffn": b.mlp,
        "parallel": True,
    },
    "olmo2": lambda b: {
        "attention": b.self_attn, "attention_out": b.post_attention_layernorm, "ffn": b.mlp,
        "ffn_out": b.post_feedforward_layernorm,
    },
    "gemma2": lambda b: {
        "norm": b.input_layernorm, "attention": b.self_attn, "attention_out": b.post_attention_layernorm,
        "ffn_norm": b.pre_feedforward_layernorm, "ffn": b.mlp, "ffn_out": b.post_feedforward_layernorm,
    },
    "granite": lambda b: {
        "norm": b.input_layernorm, "attention": b.self_attn, "ffn_norm": b.post_attention_layernorm, "ffn": b.mlp,
        "residual": 0.5,
    },
    "opt post": lambda b: {
        "attention": b.self_attn, "after": b.self_attn_layer_norm, "ffn_after": b.final_layer_norm,
        "ffn": lambda h: b.fc2(torch.relu(b.fc1(h))),
    },
    "nano": lambda b: {"norm": b.ln_1, "attention": b.attn, "ffn_norm": b.ln_2, "ffn": b.mlp},
    "titan": lambda b: {
        "norm": b.attention_norm, "attention": b.attention, "ffn_norm": b.ffn_norm, "ffn": b.feed_forward,
    },
    "encoder": lambda b: {
        "norm": b.norm1, "attention": attend(b), "ffn_norm": b.norm2,
        "ffn": lambda h: b.linear2(torch.relu(b.linear1(h))),
    },
    "encoder post": lambda b: {
        "attention": attend(b), "after": b.norm1, "ffn_after": b.norm2,
        "ffn": lambda h: b.linear2(torch.relu(b.linear1(h))),
    },
}  # fmt: skip


def attend(layer: Any) -> Sub:
    return lambda u, src_mask, **_: layer.self_attn(u, u, u, attn_mask=src_mask, need_weights=False)


def blocks_of(model: Any) -> Any:
    if isinstance(model, NanoGPT):
        return model.transformer["h"]
    if isinstance(model, Titan):
        return list(model.layers.values())
    return model.encoder.layers if isinstance(model, Encoder) else blocks(model)


def written_out(kind: str, block: Any, x: Tensor, args: Any, kwargs: Any, *, without_norm: bool = False) -> Any:
    """Function and point of every norm by its probe's name, from the class's own modules.

    Args:
        x, args, kwargs: the stream, and what else the block is given.
    """

    def same(x: Tensor) -> Tensor:
        return x

    parts = PARTS[kind](block)
    norm, out, after = (parts.get(name, same) for name in ("norm", "attention_out", "after"))
    ffn_norm, ffn_out, ffn_after = (parts.get(name, same) for name in ("ffn_norm", "ffn_out", "ffn_after"))
    if without_norm:
        norm = out = after = ffn_norm = ffn_out = ffn_after = same
    residual, parallel = parts.get("residual", 1.0), parts.get("parallel", False)

    def attention(u: Tensor) -> Tensor:
        found = parts["attention"](u, *args, **kwargs)
        return found[0] if isinstance(found, tuple) else found

    def attention_branch(x: Tensor) -> Tensor:
        return residual * out(attention(norm(x)))

    def ffn_branch(h: Tensor) -> Tensor:
        return residual * ffn_out(parts["ffn"](ffn_norm(h)))

    def half(x: Tensor) -> Tensor:
        return after(x + attention_branch(x))

    def second(h: Tensor) -> Tensor:
        return ffn_after(h + ffn_branch(h))

    def layer(x: Tensor) -> Tensor:
        return x + attention_branch(x) + ffn_branch(x) if parallel else second(half(x))

    h = x if parallel else half(x)
    return {
        "layer_jacobian": [(layer, x)],
        "half_layer_jacobian": [(layer, x)] if parallel else [(half, x), (second, h)],
        "attention_branch": [(attention_branch, x)],
        "ffn_branch": [(ffn_branch, h)],
        "attention_jacobian": [(attention, norm(x))],
        "ffn_jacobian": [(parts["ffn"], ffn_norm(h))],
    }


UNCALLED = "its attention calls no output matrix as a module"
OUTPUTS = ("attn.c_proj", "self_attn.o_proj", "attention.dense", "self_attn.out_proj", "attention.wo")


def before_output(block: Any, attention: Sub) -> Sub:
    """What the output matrix of an attention reads."""
    (output,) = (module for name, module in block.named_modules() if name in OUTPUTS)

    def heads(u: Tensor) -> Tensor:
        read: list[Tensor] = []
        handle = output.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        attention(u)
        handle.remove()
        return read[0]

    return heads


SELDOM = ("olmo2", "granite", "opt post", "titan")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in SELDOM else k for k in PARTS])
def test_norms_are_those_of_explicit_jacobians(kind: str) -> None:
    """In a training step of two sequences, with dropout where the class has it; of the last layer."""
    model = decoder(kind)
    block, seen = blocks_of(model)[-1], list[tuple[Tensor, Any]]()

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        seen.append((x.detach()[:1].clone(), (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})))

    tokens = torch.randint(2, 50, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    handle = block.register_forward_pre_hook(before, with_kwargs=True)
    record = probed(model.train(), f"{NORMS},{HEADS}", tokens)
    model.eval()(tokens[:1], **({"use_cache": False} if hasattr(model, "config") else {}))
    handle.remove()
    (x, _), (_, (args, kwargs)) = seen[-2:]  # the stream of the step, and what else is given to one sequence
    assert record.left_out == ({HEADS: f"layer 0: {UNCALLED}"} if kind.startswith("encoder") else {})
    for name, functions in written_out(kind, block, x, args, kwargs).items():
        found = record.probes[name]
        assert found.lower_estimate
        for (function, at), value in zip(functions, found.values[-len(functions) :], strict=True):
            assert is_estimate(value, exact(function, at)), name
    if HEADS in record.probes:
        function, at = written_out(kind, block, x, args, kwargs)["attention_jacobian"][0]
        assert is_estimate(record.probes[HEADS].values[-1], exact(before_output(block, function), at))
    # Control: without its norms a half-layer is another function.
    changed = written_out(kind, block, x, args, kwargs, without_norm=True)["half_layer_jacobian"]
    for (function, at), value in zip(
        changed, record.probes["half_layer_jacobian"].values[-len(changed) :], strict=True
    ):
        assert not is_estimate(value, exact(function, at))


@pytest.mark.slow
@KINDS
def test_every_class_has_every_norm(kind: str) -> None:
    """Or no more than one update a layer, and either experts or none."""
    record = probed(real(kind), f"{ALL},{HEADS},experts_jacobian")
    assert record.left_out.keys() == {"ffn_jacobian" if kind == "mixtral" else "experts_jacobian"}
    labels = record.probes["half_layer_jacobian"].labels
    assert len(labels) == len(record.places) - 1
    # Submultiplicativity, of lower estimates.
    stack, product = (record.probes[name].values[0] for name in ("stack_jacobian", "half_layer_product"))
    assert stack <= product * (1 + TOLERANCE) ** len(labels)


# --- as our own ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pre-ln", "deepnorm", "parallel, one norm", "experts"])
def test_our_own_transformer_gives_what_its_own_probes_give(name: str) -> None:
    wanted = [probe for probe in probes().values() if probe.kind == "lower estimate"]
    model = build_own(OURS[name].with_init("xavier"), seed=0)
    batch = some_batch(0), some_batch(1)
    monitor = StabilityMonitor(model, probes=",".join(probe.name for probe in wanted))
    with monitor.probe():
        model.loss(*batch).backward()
    record, subject = monitor.records[-1], Subject(model, *batch)
    assert record.left_out.keys() == {"bound_ratio", "ffn_jacobian" if name == "experts" else "experts_jacobian"}
    for found in record.probes.values():
        expected = find(found.quantity).measure(subject)
        assert found.labels == expected.labels
        several = len(expected.values) if found.quantity == "half_layer_product" else 1
        allowed = TOLERANCE * (2 * model.architecture.n_layers if several else 1)
        assert found.values == pytest.approx(expected.values, rel=allowed), found.quantity
