"""Probes of Jacobians over the whole first sequence: matrix-free, in the weights' precision, lower estimates.

The feed-forward sub-layer acts on tokens alone, so that its norm over the sequence is the largest over tokens.
"""

from __future__ import annotations

import math

from torch import Tensor

from empirics.probes import constant, layer_functions, layer_opnorms
from empirics.registry import Reading, Unavailable, estimated, probe
from empirics.spectral import NormEstimate, lanczos_opnorm
from empirics.subject import Subject


def _norms(subject: Subject, name: str) -> list[NormEstimate]:
    """Of one Jacobian in every layer, by its name in `layer_functions`."""
    call, at = layer_functions(subject.layers, subject.entering)[name]
    with constant(subject.model):
        return layer_opnorms(subject.layers, call, at, tolerance=subject.tolerance)


def _of_layers(subject: Subject, quantity: str, name: str) -> Reading:
    return estimated(quantity, subject.layer_labels, subject.shared(_norms, name))


@probe("attention_jacobian", kind="lower estimate", cost="dear")
def attention_jacobian(subject: Subject) -> Reading:
    """The sub-layer alone, output matrix included."""
    return _of_layers(subject, "attention_jacobian", "attention")


@probe("attention_heads_jacobian", kind="lower estimate", cost="dear")
def attention_heads_jacobian(subject: Subject) -> Reading:
    """Before the output matrix."""
    return _of_layers(subject, "attention_heads_jacobian", "J_Z")


@probe("attention_branch", kind="lower estimate", cost="dear")
def attention_branch(subject: Subject) -> Reading:
    """Norms and residual multiplier included."""
    return _of_layers(subject, "attention_branch", "attention_branch")


@probe("ffn_jacobian", kind="lower estimate", cost="dear")
def ffn_jacobian(subject: Subject) -> Reading:
    """The sub-layer alone; not of experts."""
    if subject.model.architecture.n_experts:
        raise Unavailable("the feed-forward sub-layers are experts; see experts_jacobian")
    return _of_layers(subject, "ffn_jacobian", "feedforward")


@probe("experts_jacobian", kind="lower estimate", cost="dear")
def experts_jacobian(subject: Subject) -> Reading:
    """The sub-layer alone, router included, its choices held."""
    if not subject.model.architecture.n_experts:
        raise Unavailable("there are no experts; see ffn_jacobian")
    return _of_layers(subject, "experts_jacobian", "feedforward")


@probe("ffn_branch", kind="lower estimate", cost="dear")
def ffn_branch(subject: Subject) -> Reading:
    """Norms and residual multiplier included."""
    return _of_layers(subject, "ffn_branch", "feedforward_branch")


def _half_layers(subject: Subject) -> tuple[list[str], list[NormEstimate]]:
    """Every update of the residual stream, in its order."""
    serial = {"attention_half": " attention", "feedforward_half": " feedforward"}
    names = {"layer": ""} if subject.layers[0].parallel else serial
    columns = [subject.shared(_norms, name) for name in names]
    labels = [f"{layer}{part}" for layer in subject.layer_labels for part in names.values()]
    return labels, [estimate for row in zip(*columns, strict=True) for estimate in row]


@probe("half_layer_jacobian", kind="lower estimate", cost="dear")
def half_layer_jacobian(subject: Subject) -> Reading:
    """Every update of the residual stream, post-ln's norm included; a parallel layer has one."""
    return estimated("half_layer_jacobian", *subject.shared(_half_layers))


def _stack(subject: Subject) -> NormEstimate:
    first, last = subject.stack
    layers, x_BTD = subject.layers[first : last + 1], subject.entering[first][0]

    def through(x: Tensor) -> Tensor:
        for layer in layers:
            for update in layer.updates:
                x = update(x)
        return x

    with constant(subject.model):
        return lanczos_opnorm(through, x_BTD, tolerance=subject.tolerance)


def _stack_label(subject: Subject) -> str:
    return "layers {} to {}".format(*subject.stack)


@probe("stack_jacobian", kind="lower estimate", cost="dear")
def stack_jacobian(subject: Subject) -> Reading:
    """All layers, or those asked for; embedding, final norm and head are outside."""
    return estimated("stack_jacobian", [_stack_label(subject)], [subject.shared(_stack)])


@probe("half_layer_product", kind="lower estimate", cost="dear")
def half_layer_product(subject: Subject) -> Reading:
    """What submultiplicativity makes of `half_layer_jacobian`; the real norm of the stack is at most the real product.

    The residuals' sum bounds, to first order, how far the product of the singular values found is from one of real
    ones.
    """
    _, estimates = subject.shared(_half_layers)
    (first, last), each = subject.stack, len(subject.layers[0].updates)
    taken = estimates[first * each : (last + 1) * each]
    return Reading(
        quantity="half_layer_product",
        labels=(_stack_label(subject),),
        values=(math.prod(estimate.value for estimate in taken),),
        seeds=(),
        log_sd=None,
        lower_estimate=True,
        residuals=(sum(estimate.residual for estimate in taken),),
        likely_upper=(math.prod(estimate.likely_upper for estimate in taken),),
    )
