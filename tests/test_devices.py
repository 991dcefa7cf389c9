"""A device held against a CPU: run on miniatures with the CPU as the device, and on a GPU where there is one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.device_checks import Records, mini, rows_by_name
from torch import Tensor

import paper_repro
from empirics import device_specs
from empirics.data import random_tokens
from empirics.device_check import matmul_peak
from empirics.device_specs import ProbeSpec, Sizes
from empirics.model import build
from empirics.probes import gradient_profile
from figures.device_records import check_path, read_check, write_check
from figures.devices import AGREES, DIFFERS, MEASURED
from figures.report_device import NOT_A_GPU, section, text_table
from theory.architecture import METHODS
from theory.records import read_records


def miniature(_: str) -> Sizes:
    m = mini()
    return Sizes(
        probed=(m,), trained=m, shallow=replace(m, name="mini-1", n_layers=1), steps=12, compiled=False, fast=m,
        fast_compiled=False, batch=8, seq_len=16, grown=(m,), growth_seeds=1, norm_lengths=(4,), half_length=4,
    )  # fmt: skip


def of_cpu(out: Path, text: Path) -> list[str]:
    return ["--scale", "gpu-smoke", "--device", "cpu", "--out", str(out), "--data", str(text)]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The folder of a whole check of the CPU against itself."""
    out = tmp_path_factory.mktemp("check") / "gpu-smoke"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_specs, "sizes", miniature)
        assert paper_repro.main([*of_cpu(out, text), "--processes", "1"]) == 0
    return out


@pytest.fixture
def records(checked: Path) -> Records:
    return read_records(checked / "records")


# --- the whole check -------------------------------------------------------------------------------------------------


def test_the_check_of_a_cpu_says_that_it_is_one(checked: Path) -> None:
    record = read_check(check_path(checked, "cpu"))
    assert not record["gpu"]
    assert record["missing"] == []
    assert record["environment"]["float32_products"] == "highest"
    assert record["environment"]["torch"] == torch.__version__
    assert NOT_A_GPU in text_table(record)
    page = (checked / "report.html").read_text()
    assert NOT_A_GPU in page
    assert "Self-test of the comparison" in page
    assert "On a GPU" not in page
    assert str(record["date"]) in page


def test_every_step_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    listed: dict[str, list[str]] = {}
    for device in ("cpu", "cuda"):
        assert paper_repro.main(["--scale", "gpu-smoke", "--device", device, "--list"]) == 0
        listed[device] = capsys.readouterr().out.splitlines()
    assert len(listed["cpu"]) == len(listed["cuda"]) == 6
    assert listed["cpu"][0] == listed["cuda"][0]  # the CPU's own part
    assert all("estimated" not in line for lines in listed.values() for line in lines)  # all were run


def test_every_comparison_is_made_and_agrees(records: Records) -> None:
    """Beside theory, these networks are narrower than the predictions' targets speak of."""
    rows = rows_by_name(records)
    for label in METHODS:
        assert f"gradient growth, mini, {label}" in rows
    for quantity in ("attention branch", "attention half", "feedforward branch", "feedforward half", "J^Z"):
        assert f"Jacobian norm of {quantity}, mini" in rows
    for label in device_specs.TRAINED:
        for precision, size in (("float32", "mini"), ("bfloat16", "mini"), ("float32", "mini-1")):
            for words in ("loss", "gradient norm"):
                assert f"{words} of training in {precision}, {size}, {label}, seed 0" in rows
        assert rows[f"deterministic training twice, {label}, seed 0"]["difference"] == 0
    for name, row in rows.items():
        speed = name.startswith(("tokens a second", "TFLOP/s", "share of the matmul peak"))
        assert row["verdict"] == (MEASURED if speed else AGREES) or row["reference_is"].startswith("theory"), name


def test_halves_of_a_batch_round_otherwise(records: Records) -> None:
    """What is compared is not a copy: the CPU as a device sums in another order."""
    row = rows_by_name(records)["loss of training in float32, mini, Vanilla, seed 0"]
    assert 0 < row["difference"] < row["tolerance"] < 1e-3


def test_a_finished_check_is_not_computed_again(checked: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_specs, "sizes", miniature)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished step was computed again")

    for name in ("probe", "speed", "run"):
        monkeypatch.setattr(f"empirics.device_check.{name}", fail)
    monkeypatch.setattr("empirics.sweep.Parallel", fail)
    before = {path: path.read_bytes() for path in checked.rglob("*") if path.is_file()}
    arguments = of_cpu(checked, text)
    assert paper_repro.main(arguments) == 0
    assert paper_repro.main([*arguments, "--draw-only"]) == 0
    assert {path: path.read_bytes() for path in checked.rglob("*") if path.is_file()} == before
    gone = next((checked / "records").glob("probe-device-*.json"))
    gone.unlink()
    with pytest.raises(AssertionError, match="computed again"):
        paper_repro.main(arguments)
    gone.write_bytes(before[gone])


def test_a_part_of_the_check_says_what_is_missing(checked: Path, tmp_path: Path) -> None:
    some = [record for record in read_records(checked / "records") if record["kind"] in ("probe", "training")]
    write_check(tmp_path, some, device="cpu", missing=["speed", "growth"])
    record = read_check(check_path(tmp_path, "cpu"))
    assert "Not run: speed, growth." in text_table(record)
    assert not any(row["verdict"] == MEASURED for row in record["rows"])


def test_speed_is_the_loops_own(records: Records) -> None:
    (record,) = (record for record in records if record["kind"] == "speed")
    tokens = 8 * 16
    assert record["tokens_a_second"] == pytest.approx(tokens / record["seconds_a_step"])
    a = mini()
    attention = 6 * 16 * a.n_heads * a.d_head * a.n_layers
    by_hand = tokens * (6 * (a.n_weights - a.vocab_size * a.d_model) + attention) / record["seconds_a_step"]
    assert record["flops_a_second"] == pytest.approx(by_hand)
    assert 0 < record["matmul_peak"] < 1e16
    assert matmul_peak("cpu", "float32", repeats=1) > 1e8


def test_without_a_gpu_one_line_names_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def absent(device: str) -> str:
        raise ValueError(f"device {device!r} is not available here; use --device cpu")

    monkeypatch.setattr("empirics.command_line.check_device", absent)
    assert paper_repro.main(["--scale", "gpu-smoke", "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "--device cpu" in captured.err
    assert "no evidence about a GPU" in captured.err
    assert not (tmp_path / "out").exists()


def test_what_is_compared_is_smooth() -> None:
    """A ReLU a rounding from its kink was found to move gradient norms by 8e-5 in float32, which would hide TF32."""
    for device in ("cpu", "cuda"):
        size = device_specs.sizes(device)
        assert {a.activation for a in (*size.probed, size.trained, size.shallow)} == {"gelu"}
        assert len({a.name for a in (*size.probed, size.shallow, *size.grown)}) == 3 + len(size.grown)


# --- negative controls -----------------------------------------------------------------------------------------------


def probed(records: Records, label: str) -> dict[str, Any]:
    """The device's probe of a method."""
    (found,) = (
        record
        for record in records
        if record["kind"] == "probe" and (record["spec"]["role"], record["spec"]["label"]) == ("device", label)
    )
    return found


def trained(records: Records, label: str, experiment: str = "device", precision: str = "float32") -> dict[str, Any]:
    """The series of the device's training of a method."""
    wanted = ("mini-1" if experiment.startswith("device-") else "mini", label, experiment, precision)
    (found,) = (
        record["series"]
        for record in records
        if record["kind"] == "training"
        if (record["spec"]["architecture"]["name"], *(record["spec"][k] for k in ("label", "experiment", "precision")))
        == wanted
    )
    return found


def spoil_growth(records: Records) -> None:
    probed(records, "Vanilla")["gradient"][0] *= 1 + 1e-4


def spoil_norm(records: Records) -> None:
    probed(records, "Embed LN")["jacobians"]["layers"][1]["feedforward_half"] *= 1.001


def spoil_spread(records: Records) -> None:
    probed(records, "Scaled Embed")["residual_std"][2] = None


def spoil_loss(records: Records) -> None:
    trained(records, "Vanilla")["loss"][7] *= 1.01


def spoil_half(records: Records) -> None:
    trained(records, "Vanilla", precision="bfloat16")["loss"][7] *= 1.2


def spoil_end(records: Records) -> None:
    """It diverged: its last loss is not finite, and there is no gradient norm."""
    series = trained(records, "Scaled Embed")
    series["loss"][-1] = None
    series["gradient_norm"].pop()


def spoil_repeat(records: Records) -> None:
    loss = trained(records, "Vanilla", "device-repeat-2")["loss"]
    loss[3] = float(np.nextafter(loss[3], 10.0))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (
            spoil_growth,
            {"gradient growth, mini, Vanilla", "gradient growth along the depth, mini", "gradient norms, mini"},
        ),
        (spoil_norm, {"Jacobian norm of feedforward half, mini"}),
        (spoil_spread, {"residual standard deviation, mini"}),
        (spoil_loss, {"loss of training in float32, mini, Vanilla, seed 0"}),
        (spoil_half, {"loss of training in bfloat16, mini, Vanilla, seed 0"}),
        (
            spoil_end,
            {f"{words} of training in float32, mini, Scaled Embed, seed 0" for words in ("loss", "gradient norm")},
        ),
        (spoil_repeat, {"deterministic training twice, Vanilla, seed 0"}),
    ],
)  # fmt: skip
def test_one_wrong_number_differs(
    spoil: Callable[[Records], None], expected: set[str], records: Records, checked: Path
) -> None:
    before = {name for name, row in rows_by_name(records).items() if row["verdict"] == DIFFERS}
    wrong = copy.deepcopy(records)
    spoil(wrong)
    after = {name for name, row in rows_by_name(wrong).items() if row["verdict"] == DIFFERS}
    assert after - before == expected
    write_check(checked.parent / spoil.__name__, wrong, device="cpu", missing=[])
    record = read_check(check_path(checked.parent / spoil.__name__, "cpu"))
    assert "differs" in text_table(record)
    assert '<span class="verdict no">' in section(record)


class Tf32(torch.autograd.Function):
    """A number with eleven bits, on the way back too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return Tf32.forward(ctx, gradients[0])


def tf32_probe(spec: ProbeSpec) -> list[float]:
    """Gradient norms as a GPU with TF32 has them: both factors of every matrix's products have eleven bits."""
    a = spec.architecture
    model = build(a, seed=spec.seed)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = Tf32.apply(module.weight.data)
            module.register_forward_pre_hook(lambda _, given: (Tf32.apply(given[0]),))
            module.register_forward_hook(lambda _, given, result: Tf32.apply(result))
    pair = random_tokens(a.vocab_size, seed=spec.seed, batch_size=spec.batch_size, seq_len=spec.seq_len)
    return gradient_profile(model, *map(torch.from_numpy, pair))[1]


@pytest.mark.parametrize("label", METHODS)
def test_tf32_is_not_taken_for_float32(label: str, records: Records) -> None:
    spec = next(
        spec
        for spec in device_specs.specifications(miniature("cpu"), device="cpu", seeds=(0,), data="sympy")[
            "initialisation"
        ]
        if isinstance(spec, ProbeSpec) and spec.label == label
    )
    device = probed(records, label)
    assert device["id"] == spec.identity
    device["gradient"] = tf32_probe(spec)
    row = rows_by_name(records)["gradient norms, mini"]
    assert row["verdict"] == DIFFERS
    assert row["difference"] > 5 * row["tolerance"]


def test_tf32_products_that_pass_are_a_failed_control(records: Records) -> None:
    """The control's numbers a rounding away from the reference: the tolerance would not notice TF32."""
    reference = next(r for r in records if r["id"].startswith("probe-reference-mini-vanilla-float32"))
    control = copy.deepcopy(probed(records, "Vanilla"))
    control["spec"]["role"] = "control"
    records.append(control)
    name = "control: gradient norms with TF32 products, mini, Vanilla"
    assert rows_by_name(records)[name]["verdict"] == MEASURED  # the device's own numbers: it has no TF32
    for factor, verdict in ((1 + 1e-4, AGREES), (1 + 1e-9, DIFFERS)):
        control["gradient"] = [value * factor for value in reference["gradient"]]
        assert rows_by_name(records)[name]["verdict"] == verdict


def test_bfloat16_is_not_taken_for_float32(records: Records) -> None:
    trained(records, "Vanilla").update(trained(records, "Vanilla", precision="bfloat16"))
    row = rows_by_name(records)["loss of training in float32, mini, Vanilla, seed 0"]
    assert row["verdict"] == DIFFERS
    assert row["difference"] > 2 * row["tolerance"]


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("full", [False, True])
def test_a_gpu_agrees_with_the_cpu(full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not full:
        monkeypatch.setattr(device_specs, "sizes", miniature)
    out = tmp_path / "gpu-smoke"
    assert paper_repro.main(["--scale", "gpu-smoke", "--out", str(out), "--processes", "2"]) == 0
    record = read_check(check_path(out, "cuda"))
    assert record["gpu"]
    assert record["environment"]["device"] == torch.cuda.get_device_name()
    judged = [row for row in record["rows"] if full or not row["reference_is"].startswith("theory")]
    assert [row["quantity"] for row in judged if row["verdict"] == DIFFERS] == []
