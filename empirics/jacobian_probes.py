"""Probes of Jacobians over the whole first sequence: matrix-free, in the weights' precision, lower estimates.

The feed-forward sub-layer acts on tokens alone, so that its norm over the sequence is the largest over tokens. A
monitor takes them of anyone's decoder as well, without dropout (`empirics.block_functions`).
"""

from __future__ import annotations

import math
from collections.abc import Collection

from empirics.registry import Reading, Unavailable, estimated, probe
from empirics.spectral import NormEstimate
from empirics.subject import Seen

FUNCTIONS = {
    "layer_jacobian": "layer",
    "attention_jacobian": "attention",
    "attention_heads_jacobian": "J_Z",
    "attention_branch": "attention_branch",
    "ffn_jacobian": "feedforward",
    "experts_jacobian": "feedforward",
    "ffn_branch": "feedforward_branch",
    "stack_jacobian": "stack",
}


def functions_of(names: Collection[str], *, parallel: bool) -> set[str]:
    """What the probes of those names take the norms of, by its names in `probes.layer_functions`."""
    halves = {"half_layer_jacobian", "half_layer_product"} & set(names)
    return {FUNCTIONS[name] for name in FUNCTIONS.keys() & set(names)} | (set(_updates(parallel)) if halves else set())


def _updates(parallel: bool) -> dict[str, str]:
    """The updates of the residual stream in a layer, and what their labels end with."""
    return {"layer": ""} if parallel else {"attention_half": " attention", "feedforward_half": " feedforward"}


def _norms(subject: Seen, name: str) -> list[NormEstimate]:
    return subject.norms(name)


def _of_layers(subject: Seen, quantity: str) -> Reading:
    return estimated(quantity, subject.layer_labels, subject.shared(_norms, FUNCTIONS[quantity]))


@probe("layer_jacobian", of="first sequence", kind="lower estimate", cost="dear")
def layer_jacobian(subject: Seen) -> Reading:
    """Both sub-layers; in a parallel layer the one half-layer."""
    return _of_layers(subject, "layer_jacobian")


@probe("attention_jacobian", of="first sequence", kind="lower estimate", cost="dear")
def attention_jacobian(subject: Seen) -> Reading:
    """The sub-layer alone, output matrix included."""
    return _of_layers(subject, "attention_jacobian")


@probe("attention_heads_jacobian", of="first sequence", kind="lower estimate", cost="dear")
def attention_heads_jacobian(subject: Seen) -> Reading:
    """Before the output matrix."""
    return _of_layers(subject, "attention_heads_jacobian")


@probe("attention_branch", of="first sequence", kind="lower estimate", cost="dear")
def attention_branch(subject: Seen) -> Reading:
    """Norms and residual multiplier included."""
    return _of_layers(subject, "attention_branch")


@probe("ffn_jacobian", of="first sequence", kind="lower estimate", cost="dear")
def ffn_jacobian(subject: Seen) -> Reading:
    """The sub-layer alone; not of experts."""
    if subject.experts:
        raise Unavailable("the feed-forward sub-layers are experts; see experts_jacobian")
    return _of_layers(subject, "ffn_jacobian")


@probe("experts_jacobian", of="first sequence", kind="lower estimate", cost="dear")
def experts_jacobian(subject: Seen) -> Reading:
    """The sub-layer alone, router included, its choices held."""
    if not subject.experts:
        raise Unavailable("there are no experts; see ffn_jacobian")
    return _of_layers(subject, "experts_jacobian")


@probe("ffn_branch", of="first sequence", kind="lower estimate", cost="dear")
def ffn_branch(subject: Seen) -> Reading:
    """Norms and residual multiplier included."""
    return _of_layers(subject, "ffn_branch")


def _half_layers(subject: Seen) -> tuple[list[str], list[NormEstimate]]:
    """Every update of the residual stream, in its order."""
    updates = _updates(subject.parallel)
    columns = [subject.shared(_norms, name) for name in updates]
    labels = [f"{layer}{part}" for layer in subject.layer_labels for part in updates.values()]
    return labels, [estimate for row in zip(*columns, strict=True) for estimate in row]


@probe("half_layer_jacobian", of="first sequence", kind="lower estimate", cost="dear")
def half_layer_jacobian(subject: Seen) -> Reading:
    """Every update of the residual stream, post-ln's norm included; a parallel layer has one."""
    return estimated("half_layer_jacobian", *subject.shared(_half_layers))


def _stack_label(subject: Seen) -> str:
    return "layers {} to {}".format(*subject.stack)


@probe("stack_jacobian", of="first sequence", kind="lower estimate", cost="dear")
def stack_jacobian(subject: Seen) -> Reading:
    """All layers, or those asked for; embedding, final norm and head are outside."""
    return estimated("stack_jacobian", [_stack_label(subject)], [subject.stack_norm()])


@probe("half_layer_product", of="first sequence", kind="lower estimate", cost="dear")
def half_layer_product(subject: Seen) -> Reading:
    """What submultiplicativity makes of `half_layer_jacobian`; the real norm of the stack is at most the real product.

    The residuals' sum bounds, to first order, how far the product of the singular values found is from one of real
    ones.
    """
    _, estimates = subject.shared(_half_layers)
    (first, last), each = subject.stack, len(_updates(subject.parallel))
    taken = estimates[first * each : (last + 1) * each]
    if any(math.isnan(estimate.value) for estimate in taken):
        raise Unavailable("a half-layer has no norm; see half_layer_jacobian")
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
