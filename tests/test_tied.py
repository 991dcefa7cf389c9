"""A tied table's Jacobian by simulation: its action is the model's, and what it leaves out does not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from empirics.bench_embedding import TiedTable, true_tied
from empirics.norm_settings import Setting
from empirics.routed_samples import tied_tables
from theory.statements import find
from theory.tied import SimulatedTable, simulated_tables

WIDTH, LENGTH, WORDS, EPS, GRADIENT = 6, 3, 8, 1e-3, 0.4


def module() -> TiedTable:
    """Reads the first words once each, with a norm and nothing else before the head."""
    choices = {"sequence": range(LENGTH), "multiplier": 1.0, "embedding_gradient": GRADIENT, "averages": False}
    return TiedTable(choices | {"final_norm": True, "norm": "layernorm", "d_model": WIDTH, "eps": EPS}).double()


def test_a_draws_jacobian_is_the_models() -> None:
    drawn = SimulatedTable(WIDTH, LENGTH, WORDS, 0.5, EPS, GRADIENT, np.random.default_rng(0))
    table = torch.from_numpy(np.vstack([drawn.seen, drawn.others]))
    tied = module()

    def logits(E: torch.Tensor) -> torch.Tensor:
        return tied.read(table + GRADIENT * (E - table)) @ E.mT

    expected = torch.func.jacrev(logits)(table).reshape(LENGTH * WORDS, WORDS * WIDTH).detach().numpy()
    forward = np.stack([drawn.forward(c) for c in np.eye(expected.shape[1])], axis=1)
    backward = np.stack([drawn.backward(c) for c in np.eye(expected.shape[0])])
    np.testing.assert_allclose(forward, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(backward, expected, rtol=0, atol=1e-12)
    truth = true_tied(tied, table).item()
    assert drawn.norm(np.random.default_rng(0)) == pytest.approx(truth, rel=5e-3)
    assert truth == pytest.approx(np.linalg.norm(expected, 2), rel=1e-12)
    # Control: with the whole gradient through the embedding it is another.
    assert np.linalg.norm(expected, 2) < 0.8 * SimulatedTable(
        WIDTH, LENGTH, WORDS, 0.5, EPS, 1.0, np.random.default_rng(0)
    ).norm(np.random.default_rng(0))


def test_a_large_vocabulary_is_drawn_by_its_root() -> None:
    """One word above the width, or many: the mean over draws is that of the words themselves."""
    words, draws = LENGTH + 4 * WIDTH, 1500
    norms = np.empty((2, draws))
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        drawn = SimulatedTable(WIDTH, LENGTH, words, 0.5, EPS, 1.0, rng)
        norms[0, seed] = np.linalg.norm(drawn.others, 2)
        norms[1, seed] = np.linalg.norm(0.5 * rng.standard_normal((words - LENGTH, WIDTH)), 2)
    error = np.hypot(*norms.std(axis=1)) / np.sqrt(draws)
    assert drawn.others.shape == (WIDTH, WIDTH)
    assert abs(norms[0].mean() - norms[1].mean()) < 4 * error
    assert 4 * error < 0.03 * norms[0].mean()


def test_it_is_neither_path_alone() -> None:
    """The head's path or the stream's alone miss the norm by more than the target, where both matter."""
    setting = next(s for s in rows() if "gradient times 0.1" in s.label)
    whole = float(find("tied-simulated").evaluate(setting.values))
    head = float(find("tied-simulated").evaluate(setting.values | {"embedding_gradient": 0.0}))
    stream = 0.1 * float(find("tied-simulated").evaluate(setting.values | {"embedding_gradient": 1.0}))
    d, n_tokens = setting.values["d"], setting.values["n_tokens"]
    rows_alone = {"sigma": 1.0, "rows": n_tokens, "columns": d}  # but those of Y are all equally long
    assert head == pytest.approx(float(find("gaussian-opnorm-sharp").evaluate(rows_alone)), rel=0.05)
    assert head < 0.97 * whole
    assert stream < 0.5 * whole
    assert float(find("tied-upper").evaluate(
        {"embedding_gradient": 0.1, "multiplier": 1.0, "token_weight": 1.0, "head_input": head,
         "head_slope": 1 / 0.015, "opnorm_E": 0.02 * (d**0.5 + 512**0.5)}
    )) > whole  # fmt: skip


def rows() -> list[Setting]:
    return list(tied_tables(find("tied-simulated")))


def test_what_is_not_drawn_says_so() -> None:
    with pytest.raises(ValueError, match="use vocab_size=5 or more"):
        simulated_tables(64, 5, 4, 1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="use at most 32768 numbers"):
        simulated_tables(512, 65, 100, 1.0, 0.0, 1.0)
    values = rows()[0].values
    assert find("tied-simulated").predict(values).value is not None
    for change in ({"largest_count": 2}, {"vocab_size": 8}, {"d": 32}, {"numbers": 2**16}):
        assert find("tied-simulated").predict(values | change).value is None
