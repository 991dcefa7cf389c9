"""The probes on anyone's decoder, on the real classes of transformers and on hand-written ones."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")

from helpers.decoders import NanoGPT, Shortcutless, Titan
from helpers.known_decoders import KINDS, OURS, TINY, TRUTH, loss_of, real, some_batch
from helpers.real_classes import blocks

from empirics.comparison import disagreements
from empirics.model import build as build_own
from empirics.monitor import StabilityMonitor, check, describe, series
from empirics.probes import gradient_profile
from empirics.running import unwrapped

# The monitor sums in float64 what the reference sums in float64, over at most 2^11 entries.
TOLERANCE = 2.0**-40


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
            assert all(record.left_out == {} for record in monitor.records)
        results.append([*losses, *(p.detach() for p in twin.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len({float(loss) for loss in results[0][:8]}) == 8  # control: it did train


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_hooks_are_gone_after_an_error_and_after_detach() -> None:
    model = Titan()
    monitor = StabilityMonitor(model)
    with pytest.raises(ZeroDivisionError), monitor.probe():
        _ = 1 / (n_hooks(model) - len(monitor.anatomy.places) - 2 * len(monitor.anatomy.blocks))
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


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_without_gradients_beside_checkpointing_is_not_taken_for_one_with_them(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a teacher that is the model itself, or an evaluation in between."""
    model = Titan()
    monitor = StabilityMonitor(model)
    layers = [*model.layers.values()]
    for called in (layers, [partial(checkpoint, layer, use_reentrant=reentrant) for layer in layers]):
        monkeypatch.setattr(model.layers, "values", lambda called=called: called)
        with monitor.probe():
            with torch.no_grad():
                loss_of(model, some_batch())
            loss_of(model, some_batch()).backward()
    plain, again = monitor.records
    assert "place_gradient" not in again.left_out
    for name in ("place_gradient", "token_gradient"):
        assert getattr(again, name) == pytest.approx(getattr(plain, name), rel=1e-5)


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
    unmeasured = {"place_gradient", "token_gradient", "token_gradient_max", "gradient_growth"}
    assert unmeasured <= record.left_out.keys()
    for name in unmeasured:
        assert record.left_out[name].startswith("embedding: no gradient arrives, since nothing before it is trained")
    assert "gradient_growth" not in record.probes  # its one value is no number
    assert len(record.probes["token_gradient_max"].values) == len(record.places)
    assert f"gradient_growth: left out; {record.left_out['gradient_growth']}" in str(record).splitlines()
    assert record.row()["left_out"] == record.left_out
    growth, profile, residual = record.measurements()
    assert math.isnan(growth.values[0])
    assert profile.values[-1] == 1
    assert residual.values == record.residual_std
    # What the reason names as the remedy is one.
    model.tok_embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_())
    with monitor.probe():
        loss_of(model, some_batch()).backward()
    assert monitor.records[-1].place_gradient[1:] == record.place_gradient[1:]
    assert math.isfinite(monitor.records[-1].growth)
    assert unmeasured.isdisjoint(monitor.records[-1].left_out)


def test_frozen_layers_are_named_together() -> None:
    model = Titan()
    model.tok_embeddings.requires_grad_(False)
    block = unwrapped(StabilityMonitor(model).anatomy.blocks[0]).requires_grad_(False)
    monitor = StabilityMonitor(model, probes="none")
    with monitor.probe():
        loss_of(model, some_batch()).backward()
    record = monitor.records[-1]
    assert record.left_out.keys() == {"place_gradient", "token_gradient"}
    assert record.left_out["place_gradient"].startswith("embedding, layer 0 attention, layer 0: no gradient arrives")
    assert all(p.grad is None for p in block.parameters())  # it is watched, and not changed


def test_a_loss_scaler_scales_gradients_and_not_the_growth() -> None:
    """As the class says: by a power of two, so to the bit."""
    records = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        model = Titan()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        monitor = StabilityMonitor(model)
        with monitor.step():
            scaler.scale(loss_of(model, some_batch())).backward()
            scaler.step(optimizer)
        records.append(monitor.records[-1])
    plain, scaled = records
    for name in ("place_gradient", "token_gradient"):
        assert getattr(scaled, name) == tuple(1024 * x for x in getattr(plain, name))
    assert scaled.probes["token_gradient_max"].values == tuple(
        1024 * x for x in plain.probes["token_gradient_max"].values
    )
    assert scaled.growth == plain.growth
    for name in ("gradient_growth", "matrix_gradient", "update_norm"):
        assert scaled.probes[name].values == plain.probes[name].values


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
        (3, "3 is not a model"),
        (nn.Linear(4, 4), "no list of equal blocks"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "no nn.Embedding"),
        (nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 4)), "no list of equal blocks"),
        (Renamed(table=nn.Embedding(50, 4), layers=nn.ModuleList([nn.Linear(4, 4)])), "does not run"),
    ],
)
def test_what_is_no_decoder_is_refused(model: Any, words: str) -> None:
    for refuses in (StabilityMonitor, describe, check):
        with pytest.raises(ValueError, match=words) as error:
            refuses(model)
        assert "\n" not in str(error.value)
        assert "; " in str(error.value)
    assert isinstance(model, int) or n_hooks(model) == 0


def test_a_period_of_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="every=0"):
        StabilityMonitor(Titan(), every=0)
    for every in ("x", None, 2.5):
        with pytest.raises(ValueError, match="is not a whole number of steps; use"):
            StabilityMonitor(Titan(), every=every)  # pyright: ignore[reportArgumentType]


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
    assert done.stdout.count("updated") == 4


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
    wanted = {"probes": "default,weight_norm,half_layer_jacobian,stack_jacobian"}
    monitors = [StabilityMonitor(plain, **wanted)] + ([StabilityMonitor(model, **wanted)] if before else [])
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    monitors += [] if before else [StabilityMonitor(model, **wanted)]
    for monitor, network in zip(monitors, (plain, model)):
        with monitor.probe():
            torch.nn.functional.cross_entropy(network(rows).flatten(0, 1), rows.roll(-1, 1).flatten()).backward()
    a, b = (monitor.records[0] for monitor in monitors)
    # Of a stack the weights of one layer are there at a time.
    del a.probes["stack_jacobian"]
    assert "in shards" in b.left_out.pop("stack_jacobian"), b.left_out
    assert "half_layer_jacobian" in b.probes, b.left_out
    assert a == b, (a, b)
    print("equal", flush=True)

    # The update that the record of a sharded model is completed with is that of whole matrices.
    def whole():
        return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters() if p.ndim == 2}

    start = whole()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, matrix in whole().items():
        found = b.probes["update_norm"]
        change = float((matrix - start[name]).norm())
        assert abs(dict(zip(found.labels, found.values))[name] - change) <= 1e-5 * change, name
    print("updated", flush=True)
dist.destroy_process_group()
"""
