"""Speed beside data sheets, and the device check that a report shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.device_checks import rows_by_name

import paper_repro
from empirics import device_specs, scales
from empirics.device_check import sheet_peak
from empirics.surroundings import environment
from figures.criteria import ACCURACY
from figures.device_records import latest_check
from figures.devices import AGREES, DIFFERS, MEASURED
from figures.report_device import NOT_A_GPU, counted, section
from theory.architecture import method, preset
from theory.growth import gradient_growth
from theory.records import write_record

# --- speed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5e12),
        ("NVIDIA H200", "bfloat16", 989.5e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA L40S", "bfloat16", 362.05e12),
        ("NVIDIA L40S", "float32", 91.6e12),
        ("NVIDIA H100 PCIe", "bfloat16", None),
        ("NVIDIA H100 NVL", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA GH200 480GB", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3", "float32", 67e12),
        ("NVIDIA H100 80GB HBM3", "float64", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_a_data_sheet_is_found_by_name(name: str, precision: str, peak: float | None) -> None:
    assert sheet_peak(name, precision) == peak


def test_mfu_is_what_was_achieved_over_the_peak() -> None:
    spec = {
        "architecture": {"name": "350m"}, "precision": "bfloat16", "compile": True, "batch_size": 8, "seq_len": 1024,
        "micro_batch": 8,
    }  # fmt: skip
    record = {
        "kind": "speed", "spec": spec, "tokens_a_second": 1e5, "flops_a_second": 247.25e12, "sheet_peak": 989e12,
        "matmul_peak": 494.5e12, "peak_bytes": 30e9, "planned_bytes": 24e9,
    }  # fmt: skip
    rows = rows_by_name([record])
    assert rows["MFU, 350m, bfloat16, compiled"]["device"] == 0.25
    assert "989 TFLOP/s" in rows["MFU, 350m, bfloat16, compiled"]["basis"]
    assert rows["share of the matmul peak, 350m, bfloat16, compiled"]["device"] == 0.5
    memory = rows["peak memory in GB, 350m, bfloat16, compiled"]
    assert (memory["reference"], memory["device"], memory["verdict"]) == (24, 30, MEASURED)
    assert "MFU, 350m, bfloat16, compiled" not in rows_by_name([record | {"sheet_peak": None}])


# --- the report ------------------------------------------------------------------------------------------------------


def gpu_record(date: str, gpu: bool = True) -> dict[str, Any]:
    surroundings = environment("cpu") | ({"device": "NVIDIA H100 80GB HBM3", "cuda": "12.8"} if gpu else {})
    row = {
        "quantity": "a < b", "where": "here", "reference": 1.0, "reference_is": "CPU", "device": 1.0,
        "difference": 0.0, "tolerance": 1e-6, "basis": "rounding", "verdict": AGREES,
    }  # fmt: skip
    return {"id": date, "date": date, "gpu": gpu, "missing": [], "environment": surroundings, "rows": [row]}


def test_without_a_record_the_report_says_so() -> None:
    assert "No record of a check on a GPU was found" in section(None)
    assert "--scale gpu-smoke" in section(None)


def test_the_latest_check_on_a_gpu_is_shown(tmp_path: Path) -> None:
    assert latest_check([tmp_path / "none"]) is None
    for name, record in {
        "a": gpu_record("2026-01-02"), "b": gpu_record("2026-01-03"), "c": gpu_record("2026-02-01", gpu=False)
    }.items():  # fmt: skip
        write_record(tmp_path / name / "check.json", kind="device-check", body=record)
    found = latest_check([tmp_path / name for name in "abc"])
    assert found is not None
    assert found["date"] == "2026-01-03"
    page = section(found)
    assert "NVIDIA H100 80GB HBM3, torch" in page
    assert "CUDA 12.8, 2026-01-03" in page
    assert "a &lt; b" in page
    assert NOT_A_GPU not in page


def test_verdicts_are_counted_in_words() -> None:
    row = gpu_record("2026-01-02")["rows"][0]
    rows = [row, row, row | {"verdict": DIFFERS}, row | {"verdict": MEASURED}]
    assert counted({"rows": rows}) == "2 agree, 1 differs, 1 measured"


def test_a_report_of_any_scale_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of predictions alone: without a record, with one in the folder beside, with one named, with a wrong one."""

    def predictions(*_: Any) -> list[scales.Step]:
        one = [scales.initialisation("350m", "Vanilla", "random", (), 1024, 0)]
        return [scales.Step(name="predictions", purpose="one", minutes=0.1, specs=lambda: one)]

    monkeypatch.setitem(scales.SCALES, "smoke", (predictions, 1, "cpu", "sympy"))
    monkeypatch.setattr(paper_repro, "CHECKED", tmp_path / "none")
    out = tmp_path / "results" / "smoke"
    arguments = ["--scale", "smoke", "--out", str(out)]
    assert paper_repro.main(arguments) == 0
    assert "No record of a check on a GPU was found" in (out / "report.html").read_text()
    write_record(out.parent / "gpu-smoke" / "records" / "x.json", kind="device-check", body=gpu_record("2026-01-02"))
    assert paper_repro.main(arguments) == 0
    assert "NVIDIA H100 80GB HBM3" in (out / "report.html").read_text()
    write_record(tmp_path / "y.json", kind="device-check", body=gpu_record("2025-01-02"))
    assert paper_repro.main([*arguments, "--gpu-record", str(tmp_path / "y.json")]) == 0
    assert "2025-01-02" in (out / "report.html").read_text()
    capsys.readouterr()
    assert paper_repro.main([*arguments, "--gpu-record", str(out / "scale.json")]) == 2
    assert "no record of a device check" in capsys.readouterr().err


def test_the_record_that_comes_with_the_code_is_of_a_gpu_and_current() -> None:
    """It is what a report shows, its predictions are today's, and the README quotes it."""
    record = latest_check([paper_repro.CHECKED])
    assert record is not None
    assert record["gpu"]
    assert record["missing"] == []
    assert DIFFERS not in {row["verdict"] for row in record["rows"]}
    rows = {row["quantity"]: row for row in record["rows"]}
    assert len(rows) == len(record["rows"])
    readme = (paper_repro.CHECKED.parents[1] / "README.md").read_text()
    for size in device_specs.LARGE:
        for label in ACCURACY:
            row = rows[f"gradient growth beside theory, {size}, {label}"]
            growth = gradient_growth(method(preset(size), label), 2048)
            assert growth.in_domain
            assert growth.value == pytest.approx(row["reference"], rel=1e-6)
            digits = 2 if label == "Vanilla" else 4
            assert f"{row['reference']:.{digits}f} / {row['device']:.{digits}f}" in readme
