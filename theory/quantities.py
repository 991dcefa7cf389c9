"""The shared vocabulary: what theory predicts and empirics measures, under one name each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A measurable thing.

    Attributes:
        name: the key in records.
        meaning: one line, precise enough to measure it.
        axis: what its values run over: `none`, `token`, `half-layer`, `layer`, `place` (the places of
            the residual stream: embedding, then after every update; 2N+1, or N+1 in a parallel network) or `step`.
        norm: the norm taken, if any.
    """

    name: str
    meaning: str
    axis: str
    norm: str = ""


_ALL = (
    Quantity(name="norm_jacobian", meaning="Jacobian of a normalisation at one token", axis="none", norm="spectral"),
    Quantity(
        name="norm_jacobian_inverse",
        meaning="one over the norm of the Jacobian of a normalisation at one token",
        axis="none",
        norm="spectral",
    ),
    Quantity(
        name="embedding_jacobian",
        meaning="Jacobian of the stream's start in the token and position tables, over the whole sequence",
        axis="none",
        norm="spectral",
    ),
    Quantity(name="softmax_jacobian", meaning="Jacobian of one softmax row", axis="none", norm="spectral"),
    Quantity(name="matrix_opnorm", meaning="a matrix with independent normal entries", axis="none", norm="spectral"),
    Quantity(
        name="attention_probability",
        meaning="the softmax matrix of one head over the sequence, causal or not",
        axis="none",
        norm="spectral",
    ),
    Quantity(
        name="ffn_jacobian",
        meaning="Jacobian of the feed-forward sub-layer in its normalised input, largest over tokens",
        axis="layer",
        norm="spectral",
    ),
    Quantity(
        name="ffn_branch",
        meaning="Jacobian of the normalised feed-forward branch in the residual stream, largest over tokens",
        axis="layer",
        norm="spectral",
    ),
    Quantity(
        name="experts_jacobian",
        meaning="Jacobian of experts behind a router in their normalised input, largest over tokens",
        axis="layer",
        norm="spectral",
    ),
    Quantity(
        name="attention_jacobian",
        meaning="Jacobian of the attention sub-layer in its normalised input, over the whole sequence",
        axis="layer",
        norm="spectral",
    ),
    Quantity(
        name="attention_branch",
        meaning="Jacobian of the normalised attention branch in the residual stream, over the whole sequence",
        axis="layer",
        norm="spectral",
    ),
    Quantity(
        name="half_layer_jacobian",
        meaning="Jacobian of residual plus branch, over the whole sequence",
        axis="half-layer",
        norm="spectral",
    ),
    Quantity(
        name="gradient_growth",
        meaning="gradient norm entering the first block over that leaving the last, before the final norm",
        axis="none",
        norm="Frobenius",
    ),
    Quantity(
        name="gradient_profile",
        meaning="gradient norm at each place of the residual stream over that at the last",
        axis="place",
        norm="Frobenius",
    ),
    Quantity(name="residual_std", meaning="standard deviation of the residual stream's entries", axis="place", norm=""),
)

QUANTITIES: dict[str, Quantity] = {quantity.name: quantity for quantity in _ALL}


def quantity(name: str) -> Quantity:
    """The quantity of that name."""
    if name not in QUANTITIES:
        raise ValueError(f"unknown quantity {name!r}; use one of {', '.join(QUANTITIES)}")
    return QUANTITIES[name]
