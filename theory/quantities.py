"""The shared vocabulary: what theory predicts and empirics measures, under one name each."""

from __future__ import annotations

from dataclasses import dataclass

from theory.sources import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A measurable thing.

    Attributes:
        name: the key in records.
        meaning: one line, precise enough to measure it.
        axis: what its values run over: `none`, `token`, `half-layer`, `layer`, `head`, `matrix`, `place` (the places
            of the residual stream: embedding, then after every update; 2N+1, or N+1 in a parallel network) or `step`.
        norm: the norm taken, if any.
        unit: of its values; "" for a plain number.
        source: where the definition is from, if it is not the obvious one.
    """

    name: str
    meaning: str
    axis: str
    norm: str = ""
    unit: str = ""
    source: Source | None = None


_ZHAI = Source(key="zhai2023entropy", label="attention entropy; over log t here, since causal rows see t keys")
_LILLIEFORS = Source(key="lilliefors1967normality", label="his statistic")

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
    Quantity(
        name="tied_jacobian",
        meaning="Jacobian of the logits in a token table that is the head as well, over the whole sequence",
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
    # --- measured only -------------------------------------------------------------------------------------------
    Quantity(
        name="place_gradient",
        meaning="gradient of the mean loss in the residual stream, over all tokens of the batch",
        axis="place",
        norm="Frobenius",
        unit="nats",
    ),
    Quantity(
        name="token_gradient",
        meaning="gradient of the mean loss in the residual stream at one token, mean over tokens",
        axis="place",
        norm="Euclidean",
        unit="nats",
    ),
    Quantity(
        name="token_gradient_max",
        meaning="gradient of the mean loss in the residual stream at one token, largest over tokens",
        axis="place",
        norm="Euclidean",
        unit="nats",
    ),
    Quantity(
        name="residual_skewness",
        meaning="third central moment of the residual stream's entries over the cube of their standard deviation",
        axis="place",
    ),
    Quantity(
        name="residual_kurtosis",
        meaning="fourth central moment of the residual stream's entries over their squared variance, less 3",
        axis="place",
    ),
    Quantity(
        name="residual_normal_distance",
        meaning="largest gap between the distribution function of the residual stream's entries and the normal one of "
        "their mean and variance",
        axis="place",
        source=_LILLIEFORS,
    ),
    Quantity(
        name="weight_skewness",
        meaning="third central moment of a matrix's entries over the cube of their standard deviation",
        axis="matrix",
    ),
    Quantity(
        name="weight_kurtosis",
        meaning="fourth central moment of a matrix's entries over their squared variance, less 3",
        axis="matrix",
    ),
    Quantity(
        name="weight_normal_distance",
        meaning="largest gap between the distribution function of a matrix's entries and the normal one of their mean "
        "and variance",
        axis="matrix",
        source=_LILLIEFORS,
    ),
    Quantity(
        name="logit_variance",
        meaning="variance of a row's attention logits over the keys it sees, mean over heads and the first sequence's "
        "rows of two keys or more",
        axis="layer",
        source=Source(key="wortsman2023proxies", label="section 3.1.1, which follows the largest logit"),
    ),
    Quantity(
        name="attention_entropy",
        meaning="entropy of an attention row, mean over heads and the first sequence's rows of two keys or more",
        axis="layer",
        unit="nats",
        source=_ZHAI,
    ),
    Quantity(
        name="attention_entropy_relative",
        meaning="entropy of an attention row over log t, the most that t seen keys allow; mean over heads and the "
        "first sequence's rows of two keys or more",
        axis="layer",
        source=_ZHAI,
    ),
    Quantity(
        name="attention_entropy_lowest",
        meaning="the same mean over rows in the head where it is lowest",
        axis="layer",
        source=_ZHAI,
    ),
    Quantity(
        name="head_entropy",
        meaning="entropy of an attention row over log t, mean over the first sequence's rows of two keys or more",
        axis="head",
        source=_ZHAI,
    ),
    Quantity(
        name="attention_heads_jacobian",
        meaning="Jacobian of the concatenated heads in what attention reads, over the whole sequence",
        axis="layer",
        norm="spectral",
        source=Source(key="takase2025spike", label="J^Z of eq. (20)"),
    ),
    Quantity(
        name="layer_jacobian",
        meaning="Jacobian of what leaves a layer in what enters it, over the whole sequence",
        axis="layer",
        norm="spectral",
    ),
    Quantity(
        name="stack_jacobian",
        meaning="Jacobian of what leaves a stack of layers in what enters it, over the whole sequence",
        axis="none",
        norm="spectral",
    ),
    Quantity(
        name="bound_ratio",
        meaning="norm of a half-layer's Jacobian over a rigorous upper bound on it at the same weights and input",
        axis="half-layer",
        norm="spectral",
    ),
    Quantity(
        name="half_layer_product",
        meaning="product of the half-layers' Jacobian norms over the same stack",
        axis="none",
        norm="spectral",
    ),
    Quantity(name="weight_opnorm", meaning="largest singular value of a matrix", axis="matrix", norm="spectral"),
    Quantity(name="weight_smallest", meaning="smallest singular value of a matrix", axis="matrix"),
    Quantity(name="weight_norm", meaning="a weight matrix", axis="matrix", norm="Frobenius"),
    *(
        Quantity(
            name=f"weight_quantile_{share}",
            meaning=f"{share} % quantile of a matrix's singular values, interpolated linearly",
            axis="matrix",
        )
        for share in (10, 50, 90)
    ),
    Quantity(
        name="weight_stable_rank",
        meaning="squared Frobenius norm of a matrix over its squared spectral norm",
        axis="matrix",
        source=Source(key="rudelson2007sampling", label="the ratio of squared norms of its abstract"),
    ),
    Quantity(
        name="weight_effective_rank",
        meaning="exponential of the entropy of a matrix's singular values over their sum",
        axis="matrix",
        source=Source(key="roy2007effective"),
    ),
    Quantity(
        name="matrix_gradient",
        meaning="gradient of the loss in a matrix, as the optimizer gets it",
        axis="matrix",
        norm="Frobenius",
    ),
    Quantity(name="update_norm", meaning="change of a matrix in one step", axis="matrix", norm="Frobenius"),
    Quantity(
        name="update_ratio",
        meaning="change of a matrix in one step over the matrix before it",
        axis="matrix",
        norm="Frobenius",
        source=Source(key="convention"),
    ),
)

QUANTITIES: dict[str, Quantity] = {quantity.name: quantity for quantity in _ALL}


def quantity(name: str) -> Quantity:
    """The quantity of that name."""
    if name not in QUANTITIES:
        raise ValueError(f"unknown quantity {name!r}; use one of {', '.join(QUANTITIES)}")
    return QUANTITIES[name]
