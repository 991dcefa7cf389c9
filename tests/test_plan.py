"""The plan of a run: against counts by hand, by torch and of the tensors of a training, and its refusals."""

from __future__ import annotations

import gc
import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import specification
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from empirics.__main__ import main
from empirics.data_sheets import DEVICES
from empirics.model import build
from empirics.plan import memory, plan
from empirics.run import corpus_of
from empirics.shards import tokenise
from empirics.subject import Subject
from empirics.tokenizer import GPT2_VOCAB
from empirics.train import train
from theory.architecture import Architecture, preset


def test_flops_are_those_that_torch_counts() -> None:
    """One forward and backward pass; written out, attention multiplies all pairs of tokens, twice the causal ones."""
    a = replace(preset("tiny"), context=64)
    model = build(a, seed=0)
    tokens = torch.randint(a.vocab_size, (2, 64))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(tokens, tokens).backward()
    counted = counter.get_total_flops()
    found = plan(a, device="h100", devices=1, steps=1, batch_size=2, seq_len=64)
    attention = 6 * 64 * a.n_heads * a.d_head * a.n_layers * 128
    assert counted == found.flops + attention


def test_numbers_by_hand() -> None:
    """Chinchilla's rule for 1.7 billion parameters: 6 N D, and 16 bytes a number over 8 devices."""
    a = preset("1.7b")
    found = plan(a, device="a100", devices=8, steps=100, batch_size=64, seq_len=1024)
    gains = (2 * a.n_layers + 1) * a.d_model
    assert found.tokens == 100 * 64 * 1024
    assert found.parameters == a.n_parameters == a.n_weights + gains
    assert found.memory.state == 16 * found.parameters / 8
    assert found.memory.probes == 4 * a.n_weights / 8
    tables = 2 * a.vocab_size * a.d_model  # token table and head, with their gradients in float32
    layers = a.n_parameters - tables - a.d_model
    assert found.memory.gathered == pytest.approx(8 * (tables + a.d_model) + 2 * 3 * layers / a.n_layers, rel=1e-12)
    assert found.memory.casts == tables  # the head alone, two bytes a number: layers are gathered in bfloat16
    assert found.hours == pytest.approx(found.flops / (8 * 312e12 * 0.4 * 3600), rel=1e-12)
    assert 5.5 * a.n_weights * found.tokens < found.flops < 7.5 * a.n_weights * found.tokens
    doubled = plan(a, device="a100", devices=16, steps=100, batch_size=64, seq_len=1024)
    assert doubled.hours == pytest.approx(found.hours / 2, rel=1e-12)
    single = plan(a, device="a100", devices=1, steps=1, batch_size=1, seq_len=8, precision="float32", probed=False)
    assert (single.memory.gathered, single.memory.casts, single.memory.probes) == (0, 0, 0)
    assert single.hours * found.tokens / single.tokens > 8 * 1.9 * found.hours


GATED: dict[str, Any] = {"norm": "rmsnorm", "activation": "silu", "gated": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "pre-ln": {},
    "tied, learned positions": {"tied": True, "positions": "learned"},
    "biases, post-ln": {"biases": True, "block": "post-ln", "embedding_norm": True},
    "grouped, gated, qk-norm": GATED | {"n_kv_heads": 1, "qk_norm": "head"},
    "experts": {"n_experts": 3, "experts_per_token": 2},
}  # fmt: skip


def small(**changes: Any) -> Architecture:
    a = replace(preset("tiny"), name="planned", d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, d_head=8, d_ffn=40)
    return replace(a, vocab_size=258, context=16, **changes)


def tensors() -> Iterator[Tensor]:
    """Every tensor that Python holds, and their gradients."""
    for each in gc.get_objects():
        if type(each) in (Tensor, nn.Parameter):
            yield each.detach()
            if each.is_leaf and each.grad is not None:
                yield each.grad.detach()


def held() -> dict[int, int]:
    """Their bytes, by where these are."""
    gc.collect()
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors() if t.numel()}


@pytest.mark.parametrize(
    ("changes", "precision"),
    [*((changes, "float32") for changes in VARIANTS.values()), ({}, "bfloat16")],
    ids=[*VARIANTS, "bfloat16"],
)
def test_state_is_what_a_training_holds_to_the_byte(
    changes: dict[str, Any], precision: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps, and the copies of a probed step before it lets them go."""
    a = small(**changes)
    spec = specification(text, architecture=a, steps=2, probe_every=2, precision=precision)
    corpus, before, between, copies = corpus_of(spec, tmp_path), held(), dict[int, int](), list[int]()
    compare = Subject.compare

    def counted(subject: Subject) -> None:
        copies.append(sum(matrix.nbytes for matrix in subject._before.values()))
        compare(subject)

    def on_step(step: int, _: Mapping[str, float]) -> None:
        between[step] = sum(size for place, size in held().items() if place not in before)

    monkeypatch.setattr(Subject, "compare", counted)
    train(spec, corpus, on_step=on_step)
    planned = memory(a, batch_size=1, seq_len=2, precision=precision)
    parameters = list(build(a, seed=0).parameters())
    counters, order = 4 * len(parameters), 8 * sum(map(len, parameters))  # AdamW's; where a row's norm belongs
    gradients = 4 * sum(p.numel() for p in parameters)
    assert between == dict.fromkeys(range(2), planned.state + gradients + counters + order)
    assert copies == [planned.probes]


def test_every_data_sheet_is_named_with_how_far_it_is_confirmed() -> None:
    for name, sheet in DEVICES.items():
        assert sheet.source.startswith(f"NVIDIA {name.upper()}")
        assert "data sheet" in sheet.source
        text = str(plan(preset("tiny"), device=name, devices=1, steps=1, batch_size=1, seq_len=8))
        assert f"{sheet.source}, {sheet.evidence}" in text
        assert 2.5 < sheet.bfloat16 / sheet.float32 < 20  # neither is TF32, nor "with sparsity"


def test_a_network_that_does_not_fit_says_so() -> None:
    a, sizes = preset("1.7b"), {"device": "h100", "steps": 1, "batch_size": 256, "seq_len": 1024}
    big = plan(a, devices=1, **sizes)
    assert not big.fits
    assert "use a smaller --micro-batch or a smaller --seq-len or more --devices" in str(big)
    assert not plan(a, devices=8, **sizes).fits
    shared = plan(a, devices=8, **sizes, micro_batch=1)
    assert shared.fits
    assert shared.remedies == ()
    assert "does not fit" not in str(shared)


@pytest.mark.parametrize(
    ("n_layers", "changes", "helps"),
    [
        (40, {"micro_batch": 1}, ["more --devices"]),
        (8, {"micro_batch": 1}, ["--probes none", "more --devices"]),
        (40, {"devices": 5, "batch_size": 320, "seq_len": 1024}, ["a smaller --seq-len", "more --devices"]),
        (
            40,
            {"devices": 4, "batch_size": 64, "micro_batch": 16, "seq_len": 1024},
            ["a smaller --micro-batch with more --devices", "a smaller --seq-len with more --devices"],
        ),
        (40, {"batch_size": 1, "seq_len": 100_000}, ["a smaller --seq-len with more --devices"]),
    ],
    ids=["state", "state and probes", "activations", "of a micro-batch that stays", "state and activations"],
)
def test_a_remedy_is_one_that_helps(n_layers: int, changes: dict[str, Any], helps: list[str]) -> None:
    """Of the weights' 16 bytes a number no smaller step takes any away."""
    a = replace(preset("13b"), n_layers=n_layers)
    sizes: dict[str, Any] = {"device": "h100", "devices": 1, "steps": 1, "batch_size": 8, "seq_len": 64} | changes
    found = plan(a, **sizes)
    assert list(found.remedies) == helps
    assert str(found).endswith(f"it does not fit: use {' or '.join(helps)}")
    assert found.record()["remedies"] == helps
    if "--probes none" in helps:
        assert plan(a, **sizes, probed=False).fits


def test_a_layer_larger_than_a_device() -> None:
    """It is gathered whole, however many devices share it."""
    a = replace(preset("13b"), d_ffn=3_000_000)
    found = plan(a, device="h100", devices=64, steps=1, batch_size=64, seq_len=64)
    assert found.memory.gathered > found.device_bytes
    assert found.remedies == ()
    assert "use a smaller preset or a GPU with more memory" in str(found)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "13b", "--plan", "h100", "--devices", "64", "--batch", "128", "--steps", "10"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "13b on 64 x h100" in text
    assert "16 bytes a number, shared" in text
    assert "GB a device at the peak, in the backward pass" in text
    assert "hours" in text
    assert "the matrices once more" in text
    assert main([*command, "--probes", "none"]) == 0
    assert "the matrices once more" not in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["kind"] == "estimate"
    assert record["tokens"] == 10 * 128 * preset("13b").context
    assert record["memory"]["state"] == 16 * record["parameters"] / 64
    assert "not read" in record["evidence"]


def test_command_says_what_it_does_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "tiny", "--plan", "h100"]
    assert main(command) == 0
    assert "not counted" not in capsys.readouterr().out
    command += ["--mask-documents", "--probes", "default,stack_jacobian,bound_ratio@10"]
    assert main(command) == 0
    said = "not counted  memory and time of --mask-documents, stack_jacobian, bound_ratio\n"
    assert said in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    left_out = json.loads(capsys.readouterr().out)["left_out"]
    assert left_out == ["--mask-documents", "stack_jacobian", "bound_ratio"]


def test_gpt2_is_not_fetched_for_a_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it has room; the network's vocabulary stays."""
    monkeypatch.setattr("empirics.tokenizer.load_tokenizer", lambda spec: pytest.fail(f"{spec} was fetched"))
    assert main(["train", "350m", "--plan", "h100", "--json", "--tokenizer", "gpt2"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == preset("350m").n_parameters


@pytest.mark.parametrize("options", [[], ["--tokenizer", "bytes"], ["--data", "SHARDS"], ["--tokenizer", "gpt2"]])
def test_a_plan_refuses_the_vocabulary_that_a_training_does(
    options: list[str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, shards, gpt2 = tmp_path / "config.json", tmp_path / "shards", "gpt2" in options
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 300 if gpt2 else 100}
    config.write_text(json.dumps({"model_type": "gpt2"} | sizes))
    if "SHARDS" in options:
        tokenise(str(text), shards, tokenizer="bytes")
    if gpt2:
        monkeypatch.setattr("empirics.tokenizer.load_tokenizer", lambda _: Namespace(vocab_size=GPT2_VOCAB))
    options = ["--data", str(text), *(str(shards) if option == "SHARDS" else option for option in options)]
    refusals: list[str] = []
    for end in (["--plan", "h100"], ["--out", str(tmp_path / "run")]):
        assert main(["train", str(config), *options, "--batch", "1", *end]) == 2
        refusals.append(capsys.readouterr().err)
    plans, trainings = refusals
    assert "300" in plans if gpt2 else "100" in plans
    assert plans.split("; use")[0] == trainings.split("; use")[0]


def test_command_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "plan.txt"
    assert main(["train", "13b", "--plan", "h100", "--plan-out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    assert "13b on 1 x h100" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plan", "abacus"], "use one of a100"),
        (["--plan", "h100", "--devices", "3"], "--batch 8 does not go evenly over 3 devices; use a multiple of 3"),
        (["--plan", "h100", "--devices", "2", "--micro-batch", "8"], "over 2 devices of --micro-batch 8; use a mul"),
        (["--plan", "h100", "--micro-batch", "3"], "--micro-batch 3 does not divide --batch 8"),
        (["--plan", "h100", "--micro-batch", "16"], "--micro-batch 16 does not divide --batch 8"),
        (["--plan", "h100", "--steps", "1", "--warmup", "5"], "--warmup 5 never reaches the peak rate in --steps 1"),
        (["--plan", "h100", "--decay-fraction", "0.2"], "of no use to the schedule cosine"),
        (["--devices", "4"], "torchrun --nproc-per-node 4"),
        (["--devices", "4", "--out", "/proc/none"], "--devices 4 is for a plan; add --plan GPU"),
        (["--plan", "h100", "--probes", "gradient"], "unknown probe 'gradient'"),
        ([], "--out"),
    ],
)
def test_refusals(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "350m", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "fits"),
    [([], True), (["--batch", "2000000"], False), (["--attention", "plain", "--seq-len", "131072"], False)],
    ids=["", "tokens", "pairs of tokens"],
)
def test_a_training_must_fit_in_this_machine(
    arguments: list[str], fits: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is built; where it fits, the text is what is missed."""
    text = ["--data", str(tmp_path / "nowhere.txt"), "--out", str(tmp_path / "run")]
    assert main(["train", "tiny", "--batch", "1", *text, *arguments]) == 2
    assert ("GB and this machine has" in capsys.readouterr().err) is not fits
