"""The probes on anyone's decoder, on the real classes of transformers and on hand-written ones."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")

from helpers.decoders import NanoGPT, Shortcutless, Titan
from helpers.real_classes import REAL, blocks, build

from empirics.anatomy import capture, find_blocks
from empirics.block_norms import block_norms
from empirics.comparison import disagreements
from empirics.model import build as build_own
from empirics.monitor import StabilityMonitor, check, describe, series
from empirics.probes import gradient_profile, layer_norms
from empirics.running import first_tensor, replaced
from theory.architecture import Architecture, preset
from theory.initialisation import flat

# The monitor sums in float64 what the reference sums in float64, over at most 2^11 entries.
TOLERANCE = 2.0**-40


class Truth(NamedTuple):
    """What a class is known to be: its block, its multipliers, and which child holds the stream in mid-layer."""

    config: dict[str, Any]
    middle: str | None  # None in a parallel block
    block: str = "pre-ln"
    embedding: float | None = 1.0  # None where it is normalised
    residual: float = 1.0
    tied: bool = False


def _llama(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    return sizes | {"num_key_value_heads": 2, "max_position_embeddings": 64} | more


_GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
_OPT = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 96,
    "max_position_embeddings": 64,
}
_OPT |= {"word_embed_proj_dim": 64}
AFTER = "post_attention_layernorm"
TRUTH: dict[str, Truth] = {
    "gpt2": Truth(_GPT, "ln_2", tied=True),
    "gpt_neo": Truth(
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 5, "max_position_embeddings": 64,
         "attention_types": [[["global", "local"], 1]]}, "ln_2", tied=True,
    ),
    "gpt_neox": Truth(_llama(), None),
    "gptj": Truth(_GPT | {"rotary_dim": 8}, None),
    "opt": Truth(_OPT, "final_layer_norm", tied=True),
    "opt post": Truth(_OPT | {"do_layer_norm_before": False}, "self_attn_layer_norm!", block="post-ln", tied=True),
    "bloom": Truth({"hidden_size": 64, "n_layer": 3, "n_head": 4}, AFTER, embedding=None, tied=True),
    "falcon": Truth({"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}, None, tied=True),
    "falcon serial": Truth(
        {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "parallel_attn": False}, AFTER, tied=True
    ),
    "mpt": Truth({"d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}, "norm_2", tied=True),
    "phi": Truth(_llama(), None),
    "phi3": Truth(_llama(pad_token_id=None), AFTER),
    "llama": Truth(_llama(), AFTER),
    "mistral": Truth(_llama(sliding_window=5), AFTER),
    "mixtral": Truth(_llama(num_local_experts=4), AFTER),
    "qwen2": Truth(_llama(), AFTER),
    "qwen3": Truth(_llama(head_dim=24), AFTER),
    "gemma": Truth(_llama(head_dim=24), AFTER, embedding=8.0, tied=True),
    "gemma2": Truth(_llama(head_dim=24), "pre_feedforward_layernorm", block="peri-ln", embedding=8.0, tied=True),
    "gemma3_text": Truth(_llama(head_dim=24), "pre_feedforward_layernorm", block="peri-ln", embedding=8.0, tied=True),
    "olmo": Truth(_llama(), AFTER),
    "olmo2": Truth(_llama(), "mlp", block="branch-ln"),
    "cohere": Truth(_llama(), None, tied=True),
    "granite": Truth(_llama(embedding_multiplier=12, residual_multiplier=0.22), AFTER, embedding=12.0, residual=0.22),
    "starcoder2": Truth(_llama(), AFTER, tied=True),
    "stablelm": Truth(_llama(), AFTER),
    "stablelm parallel": Truth(_llama(use_parallel_residual=True), None),
    "smollm3": Truth(_llama(pad_token_id=None), AFTER, tied=True),
}  # fmt: skip
KINDS = pytest.mark.parametrize("kind", TRUTH)


@cache
def real(kind: str) -> Any:
    return build({"model_type": kind.split()[0], "vocab_size": 50} | TRUTH[kind].config)


def some_batch(seed: int = 0) -> Tensor:
    return torch.randint(2, 50, (2, 12), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of each of the models here."""
    if isinstance(model, NanoGPT):
        return model(tokens, tokens.roll(-1, 1))[1]
    answer = model(tokens)
    return nn.functional.cross_entropy(getattr(answer, "logits", answer).flatten(0, 1), tokens.roll(-1, 1).flatten())


# --- what is probed -------------------------------------------------------------------------------------------------


def reference(model: Any, middle: str | None, tokens: Tensor) -> list[Tensor]:
    """The stream at every place, by the names of the class's own children; each keeps its gradient."""
    places: list[Tensor] = []

    def keep(x: Tensor) -> None:
        x.retain_grad()
        places.append(x)

    def entering(_: Any, args: Any, kwargs: Any) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    def leaving(_: Any, __: Any, out: Any) -> None:
        keep(out[0] if isinstance(out, tuple) else out)

    handles = [blocks(model)[0].register_forward_pre_hook(entering, with_kwargs=True)]
    for block in blocks(model):
        if middle is not None:
            child = getattr(block, middle.rstrip("!"))
            if middle.endswith("!"):
                handles.append(child.register_forward_hook(leaving))
            else:
                handles.append(child.register_forward_pre_hook(entering, with_kwargs=True))
        handles.append(block.register_forward_hook(leaving))
    loss_of(model, tokens).backward()
    for handle in handles:
        handle.remove()
    return places


@KINDS
def test_the_stream_and_its_gradient_are_those_of_the_class(kind: str) -> None:
    model, truth = real(kind), TRUTH[kind]
    monitor = StabilityMonitor(model)
    with monitor.probe(7):
        loss_of(model, some_batch()).backward()
    record = monitor.records[-1]
    places = reference(model, truth.middle, some_batch())
    assert record.step == 7
    assert record.n_tokens == 24
    assert len(record.places) == len(places) == 1 + len(blocks(model)) * (1 if truth.middle is None else 2)
    for n, x in enumerate(places):
        assert x.grad is not None
        gradient = x.grad.double().reshape(24, -1)
        rows = x.detach().double().reshape(24, -1)
        deviation = math.sqrt(float((rows - rows.mean(1, keepdim=True)).square().mean()))
        assert record.residual_std[n] == pytest.approx(deviation, rel=TOLERANCE)
        assert record.place_gradient[n] == pytest.approx(float(gradient.square().sum().sqrt()), rel=TOLERANCE)
        assert record.token_gradient[n] == pytest.approx(float(gradient.norm(dim=1).mean()), rel=TOLERANCE)
    assert record.growth == record.place_gradient[0] / record.place_gradient[-1]
    # And by the class's own account of its layers; its last one is normalised.
    with torch.no_grad():
        states = model(some_batch(), output_hidden_states=True).hidden_states
    ends = [n for n, name in enumerate(record.places) if not name.endswith("attention")]
    for n, state in list(zip(ends, states, strict=True))[:-1]:
        expected = math.sqrt(float(state.double().var(-1, unbiased=False).mean()))
        assert record.residual_std[n] == pytest.approx(expected, rel=TOLERANCE)


@KINDS
def test_the_architecture_is_measured(kind: str) -> None:
    truth, seen = TRUTH[kind], describe(real(kind))
    assert (seen.n_layers, seen.d_model) == (len(blocks(real(kind))), 64)
    assert (seen.block, seen.parallel, seen.tied) == (truth.block, truth.middle is None, truth.tied)
    assert seen.embedding_norm == (truth.embedding is None)
    assert seen.embedding_multiplier == (None if truth.embedding is None else pytest.approx(truth.embedding, rel=1e-3))
    assert seen.shortcut_multiplier == pytest.approx(1, rel=1e-3)
    assert seen.residual_multiplier == pytest.approx(truth.residual, rel=1e-3)


# Ending of a parameter's name -> role; several names of one role for several classes.
NAMES = {
    "query_key_value": ("query_key_value", "c_attn", "Wqkv", "qkv_proj"),
    "query": ("q_proj", "wq"), "key": ("k_proj", "wk"), "value": ("v_proj", "wv"),
    "output": ("o_proj", "out_proj", "attn.c_proj", "attention.dense", "self_attn.dense", "wo"),
    "ffn_in_gate": ("gate_up_proj",), "ffn_gate": ("up_proj", "w3"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "phi3", "llama", "qwen3", "gemma2", "phi"])
def test_matrices_are_told_apart_by_what_they_do(kind: str) -> None:
    """Each scaled by a factor of its own, so that one taken for another would show."""
    model = copy.deepcopy(real(kind))
    expected: dict[str, float] = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            path = name.removesuffix(".weight")
            role = next((r for r, ends in NAMES.items() if path.endswith(ends)), None)
            if role and p.ndim == 2 and ".1." in name:
                p.mul_(1.5 + 0.5 * len(expected))
                expected[role] = math.sqrt(float(p.double().square().mean()))
    assert len(expected) >= 2
    stds = describe(model).stds
    for role, std in expected.items():
        assert stds[role][1] == pytest.approx(std, rel=1e-3), role


# --- nothing is changed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "falcon", "mixtral", "nano", "titan"])
def test_training_is_bitwise_the_same(kind: str) -> None:
    torch.manual_seed(1)
    model = NanoGPT() if kind == "nano" else Titan() if kind == "titan" else copy.deepcopy(real(kind))
    results = []
    for monitored in (False, True):
        twin = copy.deepcopy(model)
        torch.manual_seed(3)
        twin.train()
        optimiser = torch.optim.AdamW(twin.parameters(), lr=1e-2)
        monitor = StabilityMonitor(twin, every=2) if monitored else None
        if monitored:
            check(twin)
        assert all(module.training for module in twin.modules())
        losses: list[Tensor] = []

        def step(n: int) -> None:
            optimiser.zero_grad()  # noqa: B023
            for part in range(2):
                loss = loss_of(twin, some_batch(2 * n + part)) / 2  # noqa: B023
                loss.backward()
                losses.append(loss.detach())  # noqa: B023
            optimiser.step()  # noqa: B023

        for n in range(4):
            if monitor is None:
                step(n)
            else:
                with monitor.step():
                    assert monitor.active == (n % 2 == 0)
                    step(n)
                assert n_hooks(twin) == n_hooks(model)
        if monitor is not None:
            assert [record.step for record in monitor.records] == [0, 2]
            assert monitor.records[0].n_tokens == 48  # both micro-batches
        results.append([*losses, *(p.detach() for p in twin.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len({float(loss) for loss in results[0][:8]}) == 8  # control: it did train


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_hooks_are_gone_after_an_error_and_after_detach() -> None:
    model = Titan()
    monitor = StabilityMonitor(model)
    with pytest.raises(ZeroDivisionError), monitor.probe():
        _ = 1 / (n_hooks(model) - len(monitor.anatomy.places))
    assert n_hooks(model) == 0
    assert monitor.records == []
    with monitor as inside:
        inside.start()
        assert n_hooks(model) > 0
    assert n_hooks(model) == 0
    monitor.start()
    assert monitor.finish() is None  # nothing ran
    assert n_hooks(model) == 0


def test_micro_batches_count_as_one_batch() -> None:
    """Of a loss that sums, two halves give what the whole gives, up to float32's rounding."""
    model = Titan()
    monitor = StabilityMonitor(model)
    tokens = torch.cat([some_batch(0), some_batch(1)])

    def total(rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(rows).flatten(0, 1), rows.roll(-1, 1).flatten(), reduction="sum")

    with monitor.probe():
        total(tokens).backward()
    with monitor.probe():
        for half in tokens.chunk(2):
            total(half).backward()
    whole, halves = monitor.records
    assert halves.n_tokens == whole.n_tokens == 48
    for name in ("residual_std", "place_gradient", "token_gradient"):
        assert getattr(halves, name) == pytest.approx(getattr(whole, name), rel=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_seen_once(reentrant: bool) -> None:
    model = Titan()
    monitor = StabilityMonitor(model)
    with monitor.probe():
        loss_of(model, some_batch()).backward()
    for layer in model.layers.values():
        plain = layer.forward
        layer.forward = lambda *args, plain=plain: checkpoint(plain, *args, use_reentrant=reentrant)
    with monitor.probe():
        loss_of(model, some_batch()).backward()
    plain_record, again = monitor.records
    assert again.n_tokens == plain_record.n_tokens
    for name in ("residual_std", "place_gradient", "token_gradient"):
        assert getattr(again, name) == pytest.approx(getattr(plain_record, name), rel=1e-5)


# --- hand-written decoders ------------------------------------------------------------------------------------------


def test_a_nanogpt() -> None:
    torch.manual_seed(0)
    seen = describe(NanoGPT())
    assert (seen.block, seen.parallel, seen.tied, seen.embedding_multiplier) == (
        "pre-ln",
        False,
        True,
        pytest.approx(1),
    )
    assert set(seen.stds) == {"embedding", "query_key_value", "output", "ffn_in", "ffn_out"}
    answer = check(NanoGPT())
    assert (answer.verdict, answer.reasons) == (
        "unknown",
        ("the module has no config to predict from; give check(module, architecture=...)",),
    )


def test_a_nanogpt_held_to_an_architecture() -> None:
    """A module without a config of its own; its biases are torch's, until they are what the architecture says."""
    torch.manual_seed(0)
    model = NanoGPT()
    said = Architecture(
        name="nano", d_model=64, n_layers=3, n_heads=4, n_kv_heads=4, d_head=16, d_ffn=256, vocab_size=50, context=128,
        activation="gelu", positions="learned", biases=True, tied=True, init=flat(0.1),
    )  # fmt: skip
    assert check(model, architecture=said).reasons[0].startswith("a bias has root mean square")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    answer = check(model, architecture=said)
    assert (answer.verdict, answer.reasons) == ("agrees", ())
    wrong = check(model, architecture=replace(said, parallel=True))
    assert wrong.reasons == ("parallel is measured False, the config says True",)


def test_a_titan() -> None:
    torch.manual_seed(0)
    model = Titan()
    seen = describe(model)
    assert (seen.block, seen.parallel, seen.tied, seen.embedding_multiplier) == (
        "pre-ln",
        False,
        False,
        pytest.approx(1),
    )
    # Layer by layer: the second feed-forward matrix shrinks with the depth.
    layer = model.layers["1"]
    parts = {"ffn_out": layer.feed_forward.w2, "ffn_gate": layer.feed_forward.w3, "value": layer.attention.wv}
    for role, part in parts.items():
        assert seen.stds[role][1] == pytest.approx(float(part.weight.detach().square().mean().sqrt()), rel=1e-4)


def test_without_norm_modules_there_are_layers_only() -> None:
    """What the sub-layers add is then in no module's hands; a half-layer is left out rather than guessed."""
    model = NanoGPT(functional_norm=True)
    monitor = StabilityMonitor(model)
    assert not monitor.anatomy.half_layers
    assert [place.name for place in monitor.anatomy.places] == ["embedding", "layer 0", "layer 1", "layer 2"]
    assert describe(model).block == "pre-ln"


def test_an_untrained_part_has_no_gradient() -> None:
    model = Titan()
    model.tok_embeddings.requires_grad_(False)
    monitor = StabilityMonitor(model)
    with monitor.probe():
        loss_of(model, some_batch()).backward()
    record = monitor.records[-1]
    assert math.isnan(record.place_gradient[0])
    assert math.isfinite(record.place_gradient[1])
    growth, profile, residual = record.measurements()
    assert math.isnan(growth.values[0])
    assert profile.values[-1] == 1
    assert residual.values == record.residual_std


# --- what is refused ------------------------------------------------------------------------------------------------


class Renamed(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Shortcutless(), "has no residual stream"),
        (nn.Linear(4, 4), "no list of equal blocks"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "no nn.Embedding"),
        (nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 4)), "no list of equal blocks"),
        (Renamed(table=nn.Embedding(50, 4), layers=nn.ModuleList([nn.Linear(4, 4)])), "does not run"),
    ],
)
def test_what_is_no_decoder_is_refused(model: nn.Module, words: str) -> None:
    for refuses in (StabilityMonitor, describe, check):
        with pytest.raises(ValueError, match=words) as error:
            refuses(model)
        assert "\n" not in str(error.value)
        assert "; " in str(error.value)
    assert n_hooks(model) == 0


def test_a_period_of_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="every=0"):
        StabilityMonitor(Titan(), every=0)


def test_the_blocks_are_the_heaviest_list() -> None:
    model = real("mixtral")
    assert list(find_blocks(model)) == list(model.model.layers)


# --- measured beside predicted --------------------------------------------------------------------------------------


SLOW_REAL = [pytest.param(kind, marks=pytest.mark.slow) for kind in REAL if kind not in ("gpt2", "olmo2")]


@pytest.mark.parametrize("kind", ["gpt2", "olmo2", *SLOW_REAL])
def test_a_fresh_class_agrees(kind: str) -> None:
    """About 256 wide, where one network does not scatter by much."""
    answer = check(build(REAL[kind]))
    assert (answer.verdict, answer.reasons) == ("agrees", ())
    assert f"predicted {answer.predicted:.4g} (sharp)" in str(answer)
    assert str(answer).count("\n") == 2 + len(answer.record.places)


def test_a_network_that_is_not_as_initialised_is_unknown() -> None:
    model = copy.deepcopy(real("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3)
    answer = check(model)
    assert answer.verdict == "unknown"
    assert "ffn_out of layer 1" in answer.reasons[0]


def test_a_config_that_lies_is_told() -> None:
    model = copy.deepcopy(real("granite"))
    model.config.residual_multiplier = 1.0
    answer = check(model)
    assert answer.verdict == "unknown"
    assert answer.reasons == ("residual_multiplier is measured 0.22, the config says 1",)


def test_a_class_without_a_prediction_is_unknown() -> None:
    model = copy.deepcopy(real("mixtral"))
    model.config.router_jitter_noise = 0.1
    answer = check(model)
    assert (answer.verdict, answer.predicted) == ("unknown", None)
    assert answer.measured > 0


def test_check_leaves_no_gradient() -> None:
    model = copy.deepcopy(real("gpt2")).train()
    before = torch.get_rng_state()
    check(model, some_batch())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(before, torch.get_rng_state())
    assert model.training


# --- our own transformer ------------------------------------------------------------------------------------------

TINY = replace(preset("tiny"), n_layers=2)
OURS: dict[str, Architecture] = {
    "pre-ln": TINY,
    "scaled": TINY.with_embedding("scaled-embed"),
    "normalised": TINY.with_embedding("embed-ln"),
    "detached": TINY.with_embedding("embed-detach"),
    "parallel": replace(TINY, parallel=True),
    "parallel, one norm": replace(TINY, parallel=True, shared_norm=True),
    "post-ln": replace(TINY, block="post-ln", final_norm=False),
    "deepnorm": replace(TINY, block="post-ln", shortcut_multiplier=2.0, final_norm=False),
    "peri-ln": replace(TINY, block="peri-ln"),
    "branch-ln": replace(TINY, block="branch-ln", norm="rmsnorm", qk_norm="full"),
    "multipliers": replace(TINY, residual_multiplier=0.3, shortcut_multiplier=1.2),
    "gated, grouped": replace(TINY, gated=True, activation="silu", n_kv_heads=1),
    "experts": replace(TINY, n_experts=4),
    "learned, tied, biases": replace(TINY, positions="learned", tied=True, biases=True),
    "sinusoidal": replace(TINY, positions="sinusoidal"),
    "alibi": replace(TINY, positions="alibi"),
    "window, soft-cap": replace(TINY, window=3, attention_softcap=2.0),
}


@pytest.mark.parametrize("name", OURS)
def test_our_own_transformer_is_one_more_decoder(name: str) -> None:
    """Measured to be what its architecture says, and seen where it shows its places itself."""
    model = build_own(OURS[name], seed=0)
    assert disagreements(describe(model), OURS[name]) == ()
    tokens, targets = (some_batch(seed) for seed in (0, 1))
    monitor = StabilityMonitor(model)
    with monitor.probe():
        model.loss(tokens, targets).backward()
    deviation, gradient = gradient_profile(model, tokens, targets)
    assert monitor.records[-1].residual_std == pytest.approx(deviation, rel=TOLERANCE)
    assert monitor.records[-1].place_gradient == pytest.approx(gradient, rel=TOLERANCE)


def test_a_record_has_the_fields_of_a_training_record() -> None:
    """By the same names, with the same numbers of the same steps."""
    from empirics.train import Series

    model, other = build_own(TINY, seed=0), build_own(TINY, seed=0)
    monitor = StabilityMonitor(model, every=2)
    for n in range(3):
        with monitor.step():
            model.loss(some_batch(n), some_batch(n + 1)).backward()
    told = series(monitor.records)
    assert set(told) <= {field.name for field in fields(Series)}
    assert told["probe_step"] == [0, 2]
    for n, step in enumerate(told["probe_step"]):
        deviation, gradient = gradient_profile(other, some_batch(step), some_batch(step + 1))
        assert told["residual_std"][n] == pytest.approx(deviation, rel=TOLERANCE)
        assert told["place_gradient"][n] == pytest.approx(gradient, rel=TOLERANCE)


def test_our_own_transformer_agrees() -> None:
    answer = check(build_own(replace(preset("wide"), n_layers=3), seed=0))
    assert (answer.verdict, answer.reasons) == ("agrees", ())


# --- norms of blocks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pre-ln", "peri-ln", "branch-ln", "post-ln", "parallel", "experts", "multipliers"])
def test_norms_of_blocks_are_those_of_the_probes(name: str) -> None:
    """Found by perturbation, against the same norms of the same sub-layers called by their names."""
    architecture = OURS[name].with_init("xavier")
    model = build_own(architecture, seed=0)
    tokens = some_batch()[:1]
    rows = block_norms(model, StabilityMonitor(model).anatomy, tokens)
    for row, expected in zip(rows, layer_norms(model, tokens), strict=True):
        halves = {"attention_half", "feedforward_half"} & row.keys()
        wanted = {"parallel": set(), "post-ln": {"attention_half"}, "multipliers": {"attention_half"}}
        assert halves == wanted.get(name, {"attention_half", "feedforward_half"})
        for key in halves | ({"layer"} if name == "parallel" else set()):
            assert row[key].value == pytest.approx(expected[key], rel=2e-3)  # either is known to 1e-3
            assert row[key].kind == "lower estimate"
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "bloom", "falcon", "gemma2"])
def test_norms_of_a_real_block_are_those_of_its_jacobian(kind: str) -> None:
    """The whole Jacobian of the block, called with the arguments that the model calls it with."""
    model = copy.deepcopy(real(kind)).double()
    found = StabilityMonitor(model).anatomy
    tokens = torch.arange(2, 7)[None]
    (row, *_), block = block_norms(model, found, tokens), capture(model, found.blocks, tokens)[0]

    def layer(x: Tensor) -> Tensor:
        args, kwargs = replaced(block.args, block.kwargs, block.x, x)
        return first_tensor((block.module(*args, **kwargs),))  # type: ignore[return-value]

    jacobian = torch.autograd.functional.jacobian(layer, block.x).reshape(5 * 64, -1)  # type: ignore[union-attr]
    assert row["layer"].value == pytest.approx(float(torch.linalg.matrix_norm(jacobian, ord=2)), rel=2e-3)


# --- compiled and sharded -----------------------------------------------------------------------------------------


def compiled(model: nn.Module, how: str) -> nn.Module:
    """A wrapper, the module itself, or its blocks, as trainers do it."""
    if how == "wrapper":
        return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]
    if how == "in place":
        model.compile(backend="aot_eager")
    else:
        for name, layer in model.layers.items():  # type: ignore[union-attr]
            model.layers[name] = torch.compile(layer, backend="aot_eager")  # type: ignore[index]
    return model


@pytest.mark.parametrize("how", ["wrapper", "blocks", pytest.param("in place", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # of dynamo
def test_a_compiled_model_is_probed_uncompiled(how: str) -> None:
    torch.manual_seed(0)
    plain = Titan()
    model = compiled(copy.deepcopy(plain), how)
    loss_of(model, some_batch()).backward()  # compiles
    expected, monitor = StabilityMonitor(plain), StabilityMonitor(model)
    assert [place.name for place in monitor.anatomy.places] == [place.name for place in expected.anatomy.places]
    with expected.probe():
        loss_of(plain, some_batch()).backward()
    compiled_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled_graphs > 0
    for _ in range(2):
        with monitor.probe():
            loss_of(model, some_batch()).backward()
        loss_of(model, some_batch()).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled_graphs  # nothing was compiled again
    for record in monitor.records:
        assert record.place_gradient == pytest.approx(expected.records[0].place_gradient, rel=1e-6)
        assert record.residual_std == pytest.approx(expected.records[0].residual_std, rel=1e-6)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_sharded_model_gives_what_each_rank_sees(tmp_path: Path) -> None:
    """`fully_shard` over two processes, the monitor made before and after it."""
    script = tmp_path / "shard.py"
    script.write_text(SHARDED)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 4


SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from helpers.decoders import Titan
from empirics.monitor import StabilityMonitor

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
rows = torch.randint(2, 50, (2, 2, 12), generator=torch.Generator().manual_seed(1))[dist.get_rank()]
for before in (True, False):
    torch.manual_seed(0)
    plain, model = Titan(), Titan()
    model.load_state_dict(plain.state_dict())
    monitors = [StabilityMonitor(plain)] + ([StabilityMonitor(model)] if before else [])
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    monitors += [] if before else [StabilityMonitor(model)]
    for monitor, network in zip(monitors, (plain, model)):
        with monitor.probe():
            torch.nn.functional.cross_entropy(network(rows).flatten(0, 1), rows.roll(-1, 1).flatten()).backward()
    a, b = (monitor.records[0] for monitor in monitors)
    assert a == b, (a, b)
    print("equal", flush=True)
dist.destroy_process_group()
"""
