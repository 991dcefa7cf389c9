"""How close the bounds on attention come at the paper's initialisation, and why none from weights alone comes closer.

Weights are normal with the paper's std sqrt(2 / (5 d)), seeded; tokens are normal vectors after a LayerNorm.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.weights import architecture
from torch import Tensor

from empirics.attack import bound_of, observe
from empirics.attention_slopes import observe_blocks
from empirics.bench_sublayers import FullAttention
from empirics.model import Attention
from empirics.observables import observe_attention_weights, observe_softmax, true_attention
from empirics.probes import PlainAttention
from empirics.spectral import lanczos_opnorm
from theory.statements import find

# Tenths of the entries of 16 tokens before their LayerNorm, found by ascent on the Jacobian's norm at seed 0.
LOUD = Path(__file__).parent / "data" / "loud_tokens.json"


def paper_attention(d: int, seed: int, *, heads: int = 4) -> tuple[Attention, torch.Generator]:
    shape: dict[str, Any] = {"d_model": d, "n_heads": heads, "n_kv_heads": heads, "d_head": d // heads}
    module = Attention(architecture(**shape)).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * math.sqrt(2 / (5 * d)))
    return module, generator


def normalised(x_TD: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x_TD, x_TD.shape[-1:])


def normal_tokens(length: int, d: int, generator: torch.Generator) -> Tensor:
    return normalised(torch.randn(length, d, generator=generator, dtype=torch.float64))


def bound(name: str, module: Attention, u_TD: Tensor) -> tuple[float, float]:
    observed = observe(find(name), module, u_TD)
    return observed.truth, bound_of(find(name), observed)


@pytest.mark.parametrize("seed", range(3))
def test_a_posteriori_within_its_target(seed: int) -> None:
    """At d 64, T 16 and four heads: at most 4.4 where the truth is about 1.5."""
    module, generator = paper_attention(64, seed)
    truth, limit = bound("attention-blocks-upper", module, normal_tokens(16, 64, generator))
    assert 1.4 < truth < 1.6
    assert truth <= limit <= 4.4


def test_a_posteriori_within_four_times_the_truth() -> None:
    """At d 256, T 128, against a lower estimate of the norm."""
    module, generator = paper_attention(256, 0)
    u_TD = normal_tokens(128, 256, generator)
    truth = lanczos_opnorm(PlainAttention(module), u_TD[None]).value
    observers = (observe_attention_weights, observe_softmax, observe_blocks)
    values = {name: float(value) for observer in observers for name, value in observer(module, u_TD).items()}
    limit = float(find("attention-blocks-upper").evaluate(values))
    assert truth <= limit <= 4 * truth


def test_no_bound_from_the_weights_alone_is_small() -> None:
    """At these weights some normalised tokens have a norm over 18, twelve times that of normal ones: 10.9 would be
    violated.

    A bound that knows the weights and the length of the tokens holds for these tokens too.
    """
    module, generator = paper_attention(64, 0)
    loud = normalised(torch.tensor(json.loads(LOUD.read_text()), dtype=torch.float64) / 10)
    truth, limit = bound("attention-general-upper", module, loud)
    assert 18 < truth <= limit
    quiet_truth, quiet = bound("attention-general-upper", module, normal_tokens(16, 64, generator))
    assert quiet_truth < 1.6
    assert quiet < 3 * truth  # what is lost to the loudest tokens, not to the normal ones
    # The older bound is twice as far.
    assert bound("attention-upper-apriori", module, loud)[1] > 2 * limit


def test_without_a_mask() -> None:
    module, generator = paper_attention(64, 0)
    module.__class__ = FullAttention
    u_TD = normal_tokens(16, 64, generator)
    truth = float(true_attention(module, u_TD))
    for name in ("attention-blocks-upper", "attention-full-upper"):
        found, limit = bound(name, module, u_TD)
        assert found == pytest.approx(truth, rel=1e-12)
        assert truth <= limit
