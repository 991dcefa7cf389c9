"""What theory allows the norms that were measured: bounds at the same weights and input, to be put beside them.

One of the doors between probe and theory: the symbols are observed on the model, the formulas are the statements'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from empirics.attention_slopes import observe_blocks
from empirics.model import Experts, FeedForward, Layer
from empirics.observables import observe_attention, observe_experts, observe_feedforward, observe_norm
from empirics.registry import Reading, find, probe
from empirics.subject import Subject, require_own
from theory.activations import lipschitz
from theory.architecture import Architecture
from theory.attention import attention_upper_aposteriori
from theory.attention_variants import attention_blocks_upper
from theory.experts import experts_upper
from theory.feedforward import ffn_gated_upper, ffn_upper
from theory.normalisation import norm_jacobian_upper
from theory.random_matrix import gaussian_opnorm_sharp
from theory.statements import Statement

BOUNDED = (
    "attention_jacobian", "attention_branch", "ffn_jacobian", "experts_jacobian", "ffn_branch", "half_layer_jacobian",
    "stack_jacobian",
)  # fmt: skip


def _value(statement: Statement, values: Mapping[str, Any]) -> float:
    return float(statement.evaluate({name: _number(values[name]) for name in statement.parameters}))


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _slope(layer: Layer, norm: nn.Module | None, x_TD: Tensor) -> float:
    """Bound on a norm's Jacobian at x, the factor of its depth included; 1 without one."""
    if norm is None:
        return 1.0
    return _value(norm_jacobian_upper(), observe_norm(norm, x_TD)) * layer.norm_factor


def attention_bound(a: Architecture, layer: Layer, u_TD: Tensor, documents_BT: Tensor | None = None) -> float:
    """With the real softmax matrices; the smaller of two where both speak of such an attention."""
    seen = observe_attention(layer.attention, u_TD, documents_BT)
    found = [_value(attention_blocks_upper(), seen | observe_blocks(layer.attention, u_TD, documents_BT))]
    statement = attention_upper_aposteriori()
    if all(getattr(a, name) in allowed for name, allowed in statement.covers.items()):
        found.append(_value(statement, seen))
    return min(found)


def feedforward_bound(a: Architecture, layer: Layer, u_TD: Tensor) -> float:
    """With the weights' norms, and the pre-activations or the experts' Jacobians of this input."""
    if isinstance(layer.feedforward, Experts):
        return _value(experts_upper(), observe_experts(layer.feedforward, u_TD))
    assert isinstance(layer.feedforward, FeedForward)
    seen = observe_feedforward(layer.feedforward, u_TD)
    if a.gated:
        return _value(ffn_gated_upper(), seen)
    reach = float(layer.feedforward.enter(u_TD).abs().max())
    return _value(ffn_upper(), seen | {"lipschitz": lipschitz(a.activation, reach)})


def _layer_bounds(
    a: Architecture, layer: Layer, entering: list[Tensor], documents_BT: Tensor | None
) -> dict[str, list[float]]:
    """Bounds on one layer's Jacobians; the half-layers' in the order of the updates."""
    found: dict[str, list[float]] = {}
    halves: list[float] = []
    roles = (
        (
            "attention",
            lambda u_TD: attention_bound(a, layer, u_TD, documents_BT),
            layer.attention_norm,
            layer.attention_out_norm,
            lambda u_BTD: layer.attention(u_BTD, documents_BT),
        ),
        (
            "ffn",
            lambda u_TD: feedforward_bound(a, layer, u_TD),
            layer.attention_norm if layer.shared_norm else layer.feedforward_norm,
            layer.feedforward_out_norm,
            layer.feedforward,
        ),
    )
    branches: list[float] = []
    for k, (name, bound, before, after, inner) in enumerate(roles):
        x_TD = entering[min(k, len(entering) - 1)][0]
        read = layer.attention_input(x_TD[None]) if k == 0 else layer.feedforward_input(x_TD[None])
        jacobian = bound(read[0])
        found["experts_jacobian" if name == "ffn" and a.n_experts else f"{name}_jacobian"] = [jacobian]
        branch = jacobian * _slope(layer, before, x_TD) * layer.residual
        if a.block in ("peri-ln", "branch-ln"):
            branch *= _slope(layer, after, inner(read)[0])
        found[f"{name}_branch"] = [branch]
        branches.append(branch)
        if a.block == "post-ln":
            added = x_TD * layer.shortcut + inner(read)[0] * layer.residual
            halves.append(_slope(layer, after, added) * (layer.shortcut + branch))
        else:
            halves.append(layer.shortcut + branch)
    found["half_layer_jacobian"] = [layer.shortcut + sum(branches)] if a.parallel else halves
    return found


def a_posteriori_bounds(subject: Subject) -> dict[str, tuple[float, ...]]:
    """Rigorous upper bounds at these weights and this input, over the axes of the quantities of `BOUNDED`.

    They are true of exact arithmetic; the symbols are observed in the weights' precision.
    """
    a = subject.model.architecture
    with torch.no_grad():
        pairs = zip(subject.layers, subject.entering, strict=True)
        layers = [_layer_bounds(a, layer, x, subject.documents) for layer, x in pairs]
    bounds = {name: tuple(value for layer in layers for value in layer[name]) for name in layers[0]}
    first, last = subject.stack
    halves = [value for layer in layers[first : last + 1] for value in layer["half_layer_jacobian"]]
    return bounds | {"stack_jacobian": (math.prod(halves),)}


@probe("bound_ratio", of="first sequence", kind="lower estimate", cost="dear")
def bound_ratio(subject: Subject) -> Reading:
    """At most 1; how much of the bound the network uses."""
    require_own(subject)
    norms = find("half_layer_jacobian").measure(subject)
    bounds = subject.shared(a_posteriori_bounds)["half_layer_jacobian"]
    assert norms.likely_upper is not None
    return replace(
        norms,
        quantity="bound_ratio",
        values=tuple(norm / bound for norm, bound in zip(norms.values, bounds, strict=True)),
        likely_upper=tuple(norm / bound for norm, bound in zip(norms.likely_upper, bounds, strict=True)),
    )


def over_random(opnorms: Reading, norms: Reading, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """Largest singular values over what independent normal entries of the same mean square would have.

    1 at a normal initialisation, up to the sharp value's half per cent and a matrix's own scatter; above it where a
    direction has grown. Only matrices within the domain of `gaussian-opnorm-sharp`, both sides at least 64.
    """
    statement = gaussian_opnorm_sharp()
    found: dict[str, float] = {}
    for label, value, size in zip(opnorms.labels, opnorms.values, norms.values, strict=True):
        rows, columns = shapes[label]
        expected = statement.predict(
            {"rows": rows, "columns": columns, "sigma": size / math.sqrt(rows * columns)}
        ).value
        if expected:
            found[label] = value / expected
    return found
