"""The table of what is known: every cell is a statement, a derivation or a reason, and follows the catalogue."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from theory import statements
from theory.activations import activation_slope
from theory.coverage import COLUMNS, SubLayer, column_of, sublayers, table
from theory.derivation import DERIVATIONS, derivation
from theory.statements import Statement, catalogue, find

ROWS = {row.label: row for row in sublayers()}
WRITTEN = (Path(__file__).resolve().parents[1] / "docs" / "theory.md").read_text()


@pytest.mark.parametrize("label", ROWS)
def test_every_cell_is_a_statement_or_a_reason(label: str) -> None:
    row = ROWS[label]
    assert row.derived
    for name in row.derived:
        assert name in DERIVATIONS
        assert any(step.kind == "exact" for step in derivation(name).steps) or derivation(name).kind == "upper"
    for column in COLUMNS:
        names = row.names(column)
        assert set(names) <= set(catalogue())
        assert names or row.reasons[column].strip(), column
        assert all(column_of(find(name)) == column for name in names)
    assert set(row.without) <= row.reasons.keys()


def test_the_table_is_at_the_top_of_the_page() -> None:
    lines = list(table())
    assert len(lines) == 2 + len(ROWS)
    assert "\n".join(lines) in WRITTEN
    assert WRITTEN.index("## Coverage") < WRITTEN.index("## Contents")


def test_every_statement_of_a_sub_layer_is_in_the_table() -> None:
    """What is left are matrices and softmax rows, which are parts of sub-layers."""
    quantities = {name for row in ROWS.values() for name in row.quantities}
    shown = {name for row in ROWS.values() for column in COLUMNS for name in row.names(column)}
    missing = {name for name, one in catalogue().items() if one.quantity.name in quantities} - shown
    assert not missing
    parts = {one.quantity.name for name, one in catalogue().items() if name not in shown}
    assert {"softmax_jacobian", "matrix_opnorm", "attention_probability"} <= parts


def test_columns() -> None:
    assert column_of(find("ffn-estimate")) == "estimate"
    assert column_of(find("attention-sharp")) == "sharp"
    assert column_of(find("attention-upper-apriori")) == "upper a priori"
    for name in ("attention-upper-aposteriori", "attention-blocks-upper", "ffn-gated-upper", "norm-jacobian-upper"):
        assert column_of(find(name)) == "upper a posteriori"


def test_variants_are_told_apart() -> None:
    def names(label: str) -> set[str]:
        return {name for column in COLUMNS for name in ROWS[label].names(column)}

    for name in ("attention-full-upper", "attention-full-sharp", "attention-full-half-layer-sharp"):
        assert name in names("attention, without a mask") - names("attention, causal")
    assert "attention-sharp" not in names("attention, without a mask")
    assert "ffn-sharp-gated-relu-squared" in names("feed-forward, relu-squared, gated")
    assert "attention-upper-apriori" in names("attention, RoPE") - names("attention, ALiBi")
    assert "attention-upper-apriori" not in names("attention, sliding window")
    assert "attention-sharp" in names("attention, causal") - names("attention, ALiBi")
    assert "ffn-sharp-gated-silu" in names("feed-forward, silu, gated") - names("feed-forward, silu")
    assert "embedding-sharp" in names("embedding, normalised") - names("embedding, scaled")
    assert not any(name.startswith("half-layer") for name in names("attention, causal"))


def test_a_new_statement_is_picked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    base = find("attention-sharp")
    monkeypatch.setattr(statements, "_REGISTRY", dict(statements._REGISTRY))
    row = ROWS["attention, ALiBi"]
    before = set(row.names("sharp"))

    def attention_alibi_sharp() -> Statement:
        return replace(base, name="attention-alibi-sharp", covers={"positions": ("alibi",)})

    statements.register(attention_alibi_sharp)
    assert set(row.names("sharp")) == before | {"attention-alibi-sharp"}
    assert "attention-alibi-sharp" in "\n".join(table())
    assert "attention-alibi-sharp" not in ROWS["attention, RoPE"].names("sharp")

    def attention_windowed_sharp() -> Statement:
        def formula(
            c_VO: Any, d: Any, n_heads: Any, d_head: Any, kv_group: Any, n_tokens: Any, n_seen: Any
        ) -> Any:  # fmt: skip
            return base.formula(c_VO, d, n_heads, d_head, kv_group, n_tokens) / n_seen

        return replace(base, name="attention-windowed-sharp", formula=formula)

    statements.register(attention_windowed_sharp)  # its symbol says what it speaks of
    assert "attention-windowed-sharp" in ROWS["attention, sliding window"].names("sharp")
    assert "attention-windowed-sharp" not in ROWS["attention, RoPE"].names("sharp")


def test_a_cell_without_either_is_an_error() -> None:
    bare = SubLayer(label="bare", quantities=("ffn_jacobian",), derived=("ffn-upper",), reasons={}, variant={"x": (1,)})
    assert not bare.names("sharp")
    with pytest.raises(KeyError):
        bare.reasons["sharp"]


def test_slopes_shared_leave_closed_units_out() -> None:
    """5.83 of the derivation ffn-upper-aposteriori, beside 9 and 3.33: ReLU, d_ffn = 4d."""
    rng, d = np.random.default_rng(0), 256
    first, second = rng.standard_normal((4 * d, d)), rng.standard_normal((d, 4 * d))
    u = rng.standard_normal(d)
    slope = activation_slope("relu", first @ (u * math.sqrt(d) / np.linalg.norm(u)))
    root = np.sqrt(np.abs(slope))

    def opnorm(matrix: Any) -> float:
        return float(np.linalg.norm(matrix, 2)) / math.sqrt(d)

    statement = find("ffn-upper-aposteriori")
    shared = statement.evaluate({"open_1": opnorm(root[:, None] * first), "open_2": opnorm(second * root)})
    assert shared == pytest.approx((1 + math.sqrt(2)) ** 2, rel=0.03)  # the edge's finite-width offset, 1 to 2 %
    assert opnorm(first) * opnorm(second) == pytest.approx(9, rel=0.03)
    sharp = find("ffn-sharp-relu").evaluate({"sigma_1": 1.0, "sigma_2": 1.0, "d": d, "d_ffn": 4 * d}) / d
    assert 3.33 * 0.97 <= sharp <= 3.34
    # A draw varies by the Tracy-Widom deviation, d^(-2/3) of the norm times about a half: four of them.
    assert opnorm(second * slope @ first) / math.sqrt(d) == pytest.approx(sharp, rel=2 * d ** (-2 / 3))
