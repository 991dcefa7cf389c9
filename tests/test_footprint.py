"""What a step holds, counted without memory: against what autograd saves and what the CPU's allocator sees."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import specification
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from empirics import footprint as footprints
from empirics import head_loss
from empirics.footprint import Footprint, footprint
from empirics.model import build
from empirics.plan import memory
from empirics.run import corpus_of
from empirics.subject import Subject
from empirics.train import objective, train
from theory.architecture import Architecture, method, preset

BATCH, LENGTH = 4, 64
TOKENS = 2 * 8 * BATCH * LENGTH  # bytes of the tokens and the targets
LOSS = 4
# What kernels take for themselves at the moment of the peak: sums of a row, a block of probabilities.
SCRATCH = 1024

GATED: dict[str, Any] = {"norm": "rmsnorm", "activation": "silu", "gated": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "pre-ln": {},
    "gated": GATED,
    "post-ln, biases": {"block": "post-ln", "biases": True, "embedding_norm": True},
    "peri-ln": {"block": "peri-ln", "norm": "rmsnorm"},
    "branch-ln": {"block": "branch-ln", "norm": "rmsnorm"},
    "parallel": {"parallel": True, "shared_norm": True},
    "tied, learned positions": {"tied": True, "positions": "learned"},
    "alibi": {"positions": "alibi"},
    "window": {"window": 16, "global_every": 2},
    "grouped, qk-norm": GATED | {"n_kv_heads": 1, "qk_norm": "head"},
    "soft caps": {"attention_softcap": 20.0, "logit_softcap": 20.0},
    "detached embedding": {"embedding_gradient": 0.1},
    "experts": {"n_experts": 3, "experts_per_token": 2},
    "gated expert": GATED | {"n_experts": 4, "experts_per_token": 1},
}  # fmt: skip


def network(**changes: Any) -> Architecture:
    return replace(preset("tiny"), name="counted", n_layers=3, context=LENGTH, **changes)


def allocated(profiler: profile, folder: Path) -> int:
    """The peak of the CPU's allocator, beyond what there was in the beginning."""
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    told = sorted((e["ts"], e["args"]) for e in events if e.get("name") == "[memory]")
    before = told[0][1]["Total Allocated"] - told[0][1]["Bytes"]
    return max(each["Total Allocated"] for _, each in told) - before


class Step:
    """A step on real tensors."""

    def __init__(self, a: Architecture, precision: str, attention: Any = "auto", z_loss: float = 0.0) -> None:
        self.halved, self.z_loss = precision == "bfloat16", z_loss
        self.model = build(a, seed=0)
        dtype = torch.bfloat16 if self.halved else torch.float32
        self.model.attend(attention, device="cpu", dtype=dtype, n_tokens=LENGTH)
        g = torch.Generator().manual_seed(0)
        self.tokens, self.targets = (torch.randint(a.vocab_size, (BATCH, LENGTH), generator=g) for _ in range(2))

    def __call__(self, subject: Subject | None = None) -> None:
        places: list[Tensor] | None = None if subject is None else []
        with torch.autocast("cpu", torch.bfloat16, enabled=self.halved):
            loss, _ = objective(self.model, self.z_loss, self.tokens, self.targets, places)
        loss.backward()
        if subject is not None and places is not None:
            subject.see(places)

    @property
    def saved(self) -> int:
        """Bytes that autograd saves for the backward pass: distinct memory, parameters and the batch left out."""
        given = (*self.model.parameters(), self.tokens, self.targets)
        known = {x.untyped_storage().data_ptr() for x in given}
        found: dict[int, torch.UntypedStorage] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage
            return x

        with saved_tensors_hooks(pack, lambda x: x):
            self()
        return sum(storage.nbytes() for storage in found.values())

    def peak(self, folder: Path, *, probed: bool = False, passes: int = 1) -> int:
        """Bytes of the allocator's peak in the last of some passes, beyond what there is before the first."""
        self()
        self.model.zero_grad(set_to_none=True)
        subject = Subject(self.model, self.tokens, self.targets) if probed else None
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            for _ in range(passes):
                self(subject)
        return allocated(profiler, folder)


def counted(a: Architecture, **changes: Any) -> Footprint:
    return footprint(a, batch_size=BATCH, seq_len=LENGTH, **changes)


@pytest.mark.parametrize("attention", ["fused", "plain"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_kept_is_what_autograd_saves_to_the_byte(changes: dict[str, Any], precision: str, attention: str) -> None:
    """However tokens are spread over experts."""
    a = network(**changes)
    found = counted(a, precision=precision, attention=attention)
    assert found.kept == Step(a, precision, attention).saved + LOSS + TOKENS


def test_kept_with_a_z_loss() -> None:
    found = counted(network(), z_loss=1e-4)
    assert found.kept == Step(network(), "float32", z_loss=1e-4).saved + LOSS + TOKENS
    assert found.kept > counted(network()).kept  # all logits


def test_two_numbers_a_token_are_too_narrow_where_a_cpu_normalises_bfloat16() -> None:
    """Torch's own shapes say that LayerNorm keeps its mean and deviation in bfloat16; the CPU's kernel has float32."""
    a = network(block="branch-ln")
    missing = 2 * 2 * a.n_layers * 2 * BATCH * LENGTH  # bytes, of two numbers, in two norms a layer, a token
    assert counted(a, precision="bfloat16").kept + missing == Step(a, "bfloat16").saved + LOSS + TOKENS


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["pre-ln", "grouped, qk-norm", "experts"])
def test_peak_is_the_allocators(name: str, precision: str, tmp_path: Path) -> None:
    """As torch's profiler sees it, but for what kernels take for themselves."""
    a = network(**VARIANTS[name])
    found = counted(a, precision=precision)
    seen = Step(a, precision).peak(tmp_path) + TOKENS
    assert 0 <= seen - found.total <= SCRATCH


def test_peak_of_a_loss_in_many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which two are counted."""
    monkeypatch.setattr(head_loss, "LEAST_TOKENS", 16)
    monkeypatch.setattr(head_loss, "AT_ONCE", 2**14)
    a = network(vocab_size=1024)
    seen = Step(a, "float32").peak(tmp_path) + TOKENS
    assert 0 <= seen - counted(a).total <= SCRATCH
    monkeypatch.setattr(head_loss, "AT_ONCE", 2**18)
    assert counted(replace(a, name="one part")).total > counted(a).total


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_peak_of_probed_and_accumulated_passes(precision: str, tmp_path: Path) -> None:
    """Gradients of the stream, of the parameters, and what the probe keeps of the first pass."""
    a = network()
    found = counted(a, precision=precision, probed=True, accumulated=True)
    seen = Step(a, precision).peak(tmp_path, probed=True, passes=2) + TOKENS
    assert 0 <= seen - found.total <= SCRATCH


@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bfloat16"}, {"micro_batch": 2}, {"probes": "none"}],
    ids=["float32", "bfloat16", "micro-batches", "no probes"],
)
def test_a_training_peaks_where_it_is_planned_to(changes: dict[str, Any], text: Path, tmp_path: Path) -> None:
    """From the first weight to the last step and the evaluation: the plan, and what it says that it leaves out."""
    a = replace(network(), vocab_size=512)
    spec = specification(text, architecture=a, steps=3, probe_every=2, batch_size=8, seq_len=LENGTH, **changes)
    corpus = corpus_of(spec, tmp_path)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(spec, corpus)
    at_once = spec.micro_batch or spec.batch_size
    planned = memory(
        a, batch_size=at_once, seq_len=LENGTH, precision=spec.precision, gpu=False, probed=spec.probes != "none",
        accumulated=at_once < spec.batch_size,
    ).total  # fmt: skip
    parameters = list(build(a, seed=0).parameters())
    counters, order = 4 * len(parameters), 8 * sum(map(len, parameters))  # AdamW's; where a row's norm belongs
    batch = 2 * 8 * spec.batch_size * LENGTH
    assert 0 <= allocated(profiler, tmp_path) - planned <= counters + order + batch + SCRATCH


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {"batch_size": 8, "seq_len": 32}),
        (GATED, {"batch_size": 1, "seq_len": 4, "probed": True, "accumulated": True}),
        ({"d_ffn": 8}, {"batch_size": 8, "seq_len": 32, "probed": True}),
        ({"n_experts": 3, "experts_per_token": 2}, {"batch_size": 2, "seq_len": 8, "gpu": True, "devices": 4}),
        ({"tied": True, "norm_depth_scaling": True}, {"batch_size": 1, "seq_len": 8, "precision": "bfloat16"}),
    ],
)
def test_a_deep_network_is_counted_at_two_depths(
    changes: dict[str, Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte as if it were counted whole, wherever the peak is."""
    a = replace(preset("tiny"), n_layers=11, **changes)
    found = footprint(replace(a, name="two depths"), **settings)
    monkeypatch.setattr(footprints, "DEPTHS", (98, 99))
    assert footprint(replace(a, name="whole"), **settings) == found


def test_a_gpus_attention_keeps_no_probabilities() -> None:
    """What is kept grows with the square of the length by ALiBi's mask alone, of every layer and head in bfloat16."""
    t = LENGTH // 2

    def bent(positions: Any) -> int:
        a = replace(network(positions=positions), context=4 * t)
        kept = [
            footprint(a, batch_size=BATCH, seq_len=n, precision="bfloat16", gpu=True).kept for n in (t, 2 * t, 4 * t)
        ]
        return kept[2] - 3 * kept[1] + 2 * kept[0]

    a = network()
    assert bent("none") == 0
    assert bent("alibi") == 2 * a.n_layers * a.n_heads * (4**2 - 3 * 2**2 + 2) * t**2


def test_a_gpus_loss_keeps_the_softmax_of_all_logits() -> None:
    """And not the head's gradient, which the CPU's has by then; and the weight of all targets, a number."""
    a = network()
    softmax, gradient = 4 * a.vocab_size * BATCH * LENGTH, 4 * a.vocab_size * a.d_model
    assert counted(a, gpu=True).kept - counted(a).kept == softmax - gradient + 4


def test_a_compiled_step_was_seen_below_its_plan() -> None:
    """On an H200: the loss, the norms and the activations are fused there. Its two arrays of all logits in float32, the
    softmax and the gradient, are the largest of a step that is not compiled."""
    record = json.loads((Path(__file__).parents[1] / "docs" / "gpu" / "h200.json").read_text())
    row = next(row for row in record["rows"] if row["quantity"] == "peak memory in GB, 350m, bfloat16, compiled")
    assert row["where"] == "8 x 2048 tokens a step, 8 sequences at once"
    a = method(preset("350m"), "Scaled Embed")
    planned = memory(a, batch_size=8, seq_len=2048, precision="bfloat16", probed=False).total / 1e9
    logits = 4 * 8 * 2048 * a.vocab_size / 1e9
    assert planned - 2 * logits < row["device"] < planned
    assert planned == pytest.approx(30.1, abs=0.05)  # as `Memory` says


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("probed", [False, True], ids=["", "probed"])
def test_a_gpus_peak_is_the_allocators(precision: str, probed: bool) -> None:
    """But for what kernels take for themselves, cuBLAS' 32 MiB for one, and blocks of 512 bytes."""
    a = replace(preset("350m"), n_layers=4)
    model = build(a, seed=0, device="cuda")
    tokens, targets = (torch.randint(a.vocab_size, (8, 1024), device="cuda") for _ in range(2))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        places: list[Tensor] | None = [] if probed else None
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model.loss(tokens, targets, places)
        loss.backward()
        if places is not None:
            Subject(model, tokens, targets).see(places)

    step()
    model.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated() - tokens.nbytes - targets.nbytes
    torch.cuda.reset_peak_memory_stats()
    step()
    seen = torch.cuda.max_memory_allocated() - before
    planned = footprint(a, batch_size=8, seq_len=1024, precision=precision, gpu=True, probed=probed).total
    assert abs(seen - planned) < 0.02 * planned + 2**26
