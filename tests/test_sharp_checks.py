"""The checks inside the chains of sharp statements are as sharp as what they claim: a factor of 1.05 is seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from theory.derivation import DERIVATIONS, Derivation, derivation

CHAINS = {
    chain.statement: chain
    for name in DERIVATIONS
    for chain in (derivation(name), *derivation(name).family)
    if chain.target is not None and chain.kind == "sharp"
}
WRONG = 1.05


@pytest.mark.parametrize("statement", CHAINS)
def test_a_conclusion_that_is_a_twentieth_off_fails(statement: str) -> None:
    chain: Derivation = CHAINS[statement]
    step = chain.conclusion
    assert step.tolerance < WRONG - 1
    drawn = step.sample(np.random.default_rng(0))
    held = replace(step, sample=lambda _: drawn, uses=(), proof=None)
    assert held.check(np.random.default_rng(0)).passed
    for factor in (WRONG, 1 / WRONG):
        assert not replace(held, right=factor * step.right).check(np.random.default_rng(0)).passed
