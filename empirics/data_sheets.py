"""GPUs by their makers' data sheets: what a plan and the share of a peak are reckoned with."""

from __future__ import annotations

from dataclasses import dataclass

QUOTED = "as others quote it; the sheet itself was not read"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU by its maker's data sheet: operations a second of dense matrix products, memory in bytes.

    Attributes:
        bfloat16, float32: in that precision (float32 itself, not TF32); half of what a sheet says "with sparsity".
        source: the sheet.
        evidence: how the three numbers are known.
    """

    bfloat16: float
    float32: float
    memory: float
    source: str
    evidence: str

    @property
    def cited(self) -> str:
        """The sheet, and how far it is confirmed."""
        return f"{self.source}, {self.evidence}"


DEVICES = {
    "a100": Device(
        bfloat16=312e12, float32=19.5e12, memory=80e9, evidence=QUOTED,
        source="NVIDIA A100 Tensor Core GPU data sheet (nvidia-1758950-r4), 80GB SXM",
    ),
    "h100": Device(
        bfloat16=1979e12 / 2, float32=67e12, memory=80e9, evidence=QUOTED,
        source="NVIDIA H100 Tensor Core GPU data sheet, SXM",
    ),
    "h200": Device(
        bfloat16=1979e12 / 2, float32=67e12, memory=141e9, evidence=f"preliminary by its own words, {QUOTED}",
        source="NVIDIA H200 Tensor Core GPU data sheet (hpc-datasheet-sc23-h200), SXM",
    ),
    "l40s": Device(
        bfloat16=362.05e12, float32=91.6e12, memory=48e9, evidence=QUOTED,
        source="NVIDIA L40S data sheet (l40s-datasheet-28413)",
    ),
}  # fmt: skip
