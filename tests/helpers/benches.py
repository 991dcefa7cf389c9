"""Sub-layers set by hand, and what the bench of a quantity sees on them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn

from empirics.adversaries import STYLES
from empirics.attack import Observation, observe
from empirics.bench_sublayers import Branch
from empirics.benches import Case, Undefined, find_bench
from empirics.model import Attention, FeedForward, make_norm
from helpers.weights import architecture
from theory.statements import Statement, find


@st.composite
def cases(draw: st.DrawFn, statement: Statement) -> Case:
    """The cases that an attack draws, with every choice made by hypothesis."""
    random, style = draw(st.randoms(use_true_random=False)), draw(st.sampled_from(STYLES))
    try:
        return find_bench(statement.quantity.name).draw(random, style, statement.covers, attempts=1)
    except Undefined:
        reject()


def seen(name: str, module: nn.Module, x: Tensor, **choices: Any) -> Observation:
    """What the bound of that name and its truth are evaluated at."""
    return observe(find(name), module, x, **choices)


def filled(module: nn.Module, **parameters: Tensor) -> Any:
    """A float64 module with the named parameters set and the others zero."""
    module.double().requires_grad_(False)
    for name, parameter in module.named_parameters():
        parameter.copy_(parameters.pop(name, torch.zeros_like(parameter)))
    assert not parameters, f"no parameter is called {', '.join(parameters)}"
    return module


def eye(rows: int, columns: int | None = None) -> Tensor:
    return torch.eye(rows, columns or rows, dtype=torch.float64)


def vector(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)


def unit_norm(kind: str, width: int, eps: float = 1e-5) -> nn.Module:
    return make_norm(architecture(d_model=width, norm=kind, eps=eps)).double().requires_grad_(False)


def attention(
    *,
    d: int = 4,
    heads: int = 1,
    groups: int = 1,
    width: int = 2,
    positions: str = "none",
    kind: type[Attention] = Attention,
    **weights: Tensor,
) -> Attention:
    names = {"W_Q": "query", "W_K": "key", "W_V": "value", "W_O": "output", "b_Q": "query", "b_K": "key"}
    module = kind(
        architecture(d_model=d, n_heads=heads, n_kv_heads=groups, d_head=width, positions=positions, biases=True)
    )
    parameters = {
        f"{names[name]}.{'weight' if name.startswith('W') else 'bias'}": given for name, given in weights.items()
    }
    return filled(module, **parameters)


def identity_branch(width: int) -> Branch:
    """A LayerNorm, then identity matrices."""
    module = FeedForward(architecture(d_model=width, d_ffn=width, activation="identity"))
    filled(module, **{"enter.weight": eye(width), "leave.weight": eye(width)})
    return Branch(unit_norm("layernorm", width), module)
