"""What a user does on one device: run on the CPU at every commit, and on a GPU by `-m gpu`."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers.decoders import Titan
from helpers.known_decoders import loss_of, some_batch
from helpers.training import record_bytes, specification, train_until
from torch.nn.attention import SDPBackend, sdpa_kernel

from empirics.__main__ import main
from empirics.monitor import StabilityMonitor, check
from empirics.run import run
from empirics.subject import TOLERANCE

DEAR = "default,stack_jacobian@4,half_layer_jacobian@3,bound_ratio,weight_opnorm@3,residual_kurtosis@2"
ON = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@ON
def test_a_stopped_training_resumes_to_the_same_bytes(device: str, text: Path, tmp_path: Path) -> None:
    spec = specification(text, device=device, deterministic=True, probes=DEAR)
    run(spec, tmp_path / "undisturbed")
    train_until(spec, tmp_path / "stopped", 4)
    run(spec, tmp_path / "stopped")
    assert record_bytes(spec, tmp_path / "stopped") == record_bytes(spec, tmp_path / "undisturbed")


@ON
def test_probes_change_no_bit_there(device: str, text: Path, tmp_path: Path) -> None:
    specs = [specification(text, device=device, deterministic=True, probes=wanted) for wanted in (DEAR, "none")]
    probed, bare = (run(spec, tmp_path) for spec in specs)
    assert probed["series"]["probes"].keys() > {"stack_jacobian", "half_layer_jacobian", "bound_ratio", "update_ratio"}
    for name in ("loss", "gradient_norm", "update_norm"):
        assert probed["series"][name] == bare["series"][name], name


@pytest.mark.gpu
def test_first_probes_are_those_of_the_cpu(text: Path, tmp_path: Path) -> None:
    """Before any step: exact ones to float32's rounding, norms to the tolerance of their iteration."""
    here, there = (
        run(specification(text, device=device, probes=DEAR), tmp_path)["series"]["probes"] for device in ("cpu", "cuda")
    )
    assert here.keys() == there.keys()
    for name, found in there.items():
        if name.startswith("update"):
            continue  # Adam's first step is the sign of a gradient, however small it is
        rel = TOLERANCE if found.get("lower_estimate") else 1e-3
        assert found["labels"] == here[name]["labels"]
        assert found["values"][0] == pytest.approx(here[name]["values"][0], rel=rel, abs=1e-4), name


@ON
def test_a_monitored_decoder_trains_the_same(device: str) -> None:
    """Attention in plain products, whose sums have one order on a GPU too."""
    torch.manual_seed(1)
    model, losses = Titan().to(device), []
    for monitored in (False, True):
        twin = copy.deepcopy(model)
        optimiser = torch.optim.AdamW(twin.parameters(), lr=1e-2)
        monitor = StabilityMonitor(twin, every=1 if monitored else 100, probes="default,half_layer_jacobian@1")
        with sdpa_kernel(SDPBackend.MATH):
            for n in range(3):
                with monitor.step() if monitored else torch.enable_grad():
                    loss = loss_of(twin, some_batch(n).to(device))
                    loss.backward()
                optimiser.step()
                optimiser.zero_grad()
                losses.append(loss.item())
    assert losses[:3] == losses[3:]
    assert [record.step for record in monitor.records] == [0, 1, 2]
    for record in monitor.records:
        assert record.left_out == {}
        assert min(record.probes["half_layer_jacobian"].values) > 0.9  # a residual stream
        assert record.probes.keys() > {"logit_variance", "attention_entropy", "matrix_gradient", "update_ratio"}
    answer = check(model)
    assert answer.architecture.block == "pre-ln"
    assert answer.record.growth == pytest.approx(check(model.cpu()).record.growth, rel=1e-4)


@pytest.mark.gpu
def test_a_class_is_measured_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300,
        "intermediate_size": 64, "max_position_embeddings": 64,
    }))  # fmt: skip
    answers = []
    for where in ("cuda", "cpu"):
        argv = ["measure", str(config), "--norms", "--seeds", "1", "--seq-len", "16", "--json", "--device", where]
        assert main(argv) == 0
        answers.append(json.loads(capsys.readouterr().out))
    there, here = answers
    assert there["verdict"] == here["verdict"]
    assert there["gradient_growth"]["value"] == pytest.approx(here["gradient_growth"]["value"], rel=1e-4)
    values = [{name: norm["value"] for name, norm in layer.items()} for side in answers for layer in side["norms"]]
    assert len(values) == 4
    for one, other in zip(values[:2], values[2:]):
        assert one == pytest.approx(other, rel=TOLERANCE)
