"""What is measured on a network: one probe a quantity, sharing no formula with the theory it tests.

Shapes: B batch, T tokens, D d_model, H heads, E head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor

from empirics.data import Batch
from empirics.distributed import ALONE, Ranks, whole
from empirics.model import Attention, Experts, Layer, Transformer, build
from empirics.residual_stream import length_sums, n_tokens, variance_sum
from empirics.spectral import NormEstimate, lanczos_opnorms
from empirics.stacked import batches, stacked
from empirics.surroundings import true_float32
from theory.architecture import Architecture
from theory.records import Measurement

QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
# Entries by which a law is told from the normal one. A prime, so that evenly spaced ones are of all columns alike.
SAMPLE = 49_999
PIECE = 1 << 18  # entries that are taken to float64 at once


def place_statistics(places: list[Tensor]) -> tuple[list[float], list[float]]:
    """Standard deviation of the residual stream and norm of its gradient, at each place.

    The standard deviation is over the D entries of a token (mean removed), its square averaged over tokens.
    """
    deviation = [math.sqrt(float(variance_sum(x)) / n_tokens(x)) for x in places]
    gradient = [math.nan if x.grad is None else math.sqrt(float(length_sums(x.grad)[0])) for x in places]
    return deviation, gradient


def distribution(values: Tensor) -> dict[str, Any]:
    """Moments, quantiles and distance to normality of a tensor's entries.

    The moments are of all `size` entries. Quantiles and distance are of `entries` of them, evenly spaced, and estimates
    where these are fewer: `normal_distance` is Kolmogorov's, the largest gap between their empirical distribution
    function and that of the normal law with their mean and standard deviation; 19 of 20 normal samples of n entries
    show less than 0.886/sqrt(n) (lilliefors1967normality). `standard_errors` are those of independent entries:
    sqrt(6/n) and sqrt(24/n) of a normal sample's skewness and kurtosis, and of the distance to first order where the
    gap is widest at one place, the scatter of the fitted mean and deviation included. Entries of a residual stream
    share tokens and directions, and scatter more.
    """
    flat = values.detach().reshape(-1)
    mean, deviation, skewness, kurtosis = moments(flat)
    found: dict[str, Any] = {"mean": mean, "std": deviation, "size": flat.numel(), "entries": _entries(flat.numel())}
    if not 0 < deviation < math.inf:
        return found
    ordered = _ordered(flat)
    found |= {"skewness": skewness, "excess_kurtosis": kurtosis}
    found["quantiles"] = [float(q) for q in np.quantile(ordered, QUANTILES)]
    errors = {"skewness": math.sqrt(6 / flat.numel()), "excess_kurtosis": math.sqrt(24 / flat.numel())}
    if 0 < ordered.std() < math.inf:
        found["normal_distance"], errors["normal_distance"] = _normal_distance(ordered)
    return found | {"standard_errors": errors}


def moments(flat: Tensor) -> tuple[float, float, float, float]:
    """Mean, standard deviation, skewness and excess kurtosis of all entries, in float64 and in bounded memory.

    Without any spread, or where an entry is not finite, the last two are not numbers.
    """
    low, high = (float(end) for end in flat.aminmax())
    if not low < high:
        return low, high - low, math.nan, math.nan
    pieces, n = flat.split(PIECE), flat.numel()
    mean = sum(float(piece.sum(dtype=torch.float64)) for piece in pieces) / n
    scale = max(high - mean, mean - low)  # so that no power of an entry overflows
    sums = flat.new_zeros(3, dtype=torch.float64)
    for piece in pieces:
        z = piece.to(torch.float64, copy=True).sub_(mean).div_(scale)
        squares = z * z
        sums += torch.stack([squares.sum(), squares.dot(z), squares.dot(squares)])
    variance, third, fourth = (sums / n).tolist()
    return mean, scale * math.sqrt(variance), third / variance**1.5, fourth / variance**2 - 3


def _entries(size: int) -> int:
    """How many entries stand for `size` of them: all, or as many as the distance between them is no number of rows."""
    return size if size <= SAMPLE else SAMPLE - 8 * (size % SAMPLE == 0)


def _ordered(flat: Tensor) -> NDArray[np.float64]:
    """At most `SAMPLE` entries, evenly spaced, in ascending order."""
    n, count = flat.numel(), _entries(flat.numel())
    sample = flat if n == count else flat[torch.arange(count, device=flat.device) * n // count]
    # Sorted as they are, which is twice as fast as in float64; numpy has no bfloat16. A copy, since what shards a model
    # could not free memory that numpy has seen.
    copied = sample.to("cpu", torch.promote_types(flat.dtype, torch.float32), copy=True).numpy()
    copied.sort()
    return copied.astype(np.float64)


def _normal_distance(ordered: NDArray[np.float64]) -> tuple[float, float]:
    """Kolmogorov's distance of a sorted sample from the normal law fitted to it, and its standard error."""
    z = (ordered - ordered.mean()) / ordered.std()
    expected = ndtr(z)
    rank = np.arange(1, z.size + 1) / z.size
    gaps = np.maximum(rank - expected, expected - rank + 1 / z.size)
    widest = int(gaps.argmax())
    # What one entry adds to the gap: to the empirical function, and by the mean and the deviation to the fitted one.
    density = math.exp(-(z[widest] ** 2) / 2) / math.sqrt(2 * math.pi)
    influence = (np.arange(z.size) <= widest) + density * (z + z[widest] * (z**2 - 1) / 2)
    return float(gaps[widest]), float(influence.std()) / math.sqrt(z.size)


@torch.no_grad()
def distributions(model: Transformer, tokens: Tensor, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Distributions of x and x' at every place and of every matrix, as (B, T) tokens see them.

    In shards, every rank computes its share of the sequences, and places and matrices are gathered one at a time.
    """
    places: list[Tensor] = []
    model(ranks.share(tokens), places)
    weights = {
        name: distribution(whole(parameter))
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2
        and (name.startswith(("layers.0.", f"layers.{len(model.layers) - 1}.", "tokens", "head")))
    }
    batch_size = tokens.shape[0]
    return {"places": [distribution(ranks.gathered(x, batch_size)) for x in places], "weights": weights}


def gradient_profile(model: Transformer, tokens: Tensor, targets: Tensor) -> tuple[list[float], list[float]]:
    """Residual standard deviation and gradient norm at every place, for one batch."""
    places: list[Tensor] = []
    model.zero_grad(set_to_none=True)
    model.loss(tokens, targets, places).backward()
    return place_statistics(places)


@true_float32()
def measure_growth(
    architecture: Architecture,
    *,
    seeds: tuple[int, ...],
    batches: Callable[[int], Batch],
    device: str = "cpu",
    on_seed: Callable[[int], object] | None = None,
) -> tuple[Measurement, Measurement, Measurement]:
    """Gradient growth, gradient profile and residual profile at initialisation, in float32.

    The growth is the geometric mean over seeds of the gradient norm at the first place (after embedding scale,
    positions and norm) over that at the last, where the last layer leaves the residual stream. Weights are drawn on
    the device, and no gradients of theirs are taken, so that a network fits that could not be trained there.

    Args:
        batches: (tokens, targets) of a seed.

    Raises:
        ValueError: the last place has no gradient, or a place no spread, so that there is nothing to compare with.
    """
    logs: list[list[float]] = []
    deviations: list[list[float]] = []
    for seed in seeds:
        model = build(architecture, seed=seed, device=device, drawn_on=device)
        tokens, targets = (torch.from_numpy(part).to(device) for part in batches(seed))
        model.requires_grad_(False)
        model.tokens.requires_grad_(True)  # so that the residual stream has one
        deviation, gradient = gradient_profile(model, tokens, targets)
        del model  # before the next one is built
        if 0.0 in (*gradient, *deviation):
            raise ValueError(
                f"{architecture.name}: the residual stream or its gradient is zero somewhere; "
                "use a width above 1 and an initialisation whose embedding and head are not zero"
            )
        logs.append([math.log(value / gradient[-1]) for value in gradient])
        deviations.append(deviation)
        if on_seed is not None:
            on_seed(seed)
    return growth_over_seeds(np.array(logs), np.log(np.array(deviations)), seeds)


def growth_over_seeds(
    log_profile: Any, log_deviation: Any, seeds: tuple[int, ...]
) -> tuple[Measurement, Measurement, Measurement]:
    """Gradient growth, gradient profile and residual profile as geometric means over seeds.

    Args:
        log_profile: (seeds, places) logs of the gradient norms over that at the last place.
        log_deviation: (seeds, places) logs of the residual stream's standard deviations.
    """

    def mean(quantity: str, logs: Any) -> Measurement:
        spread = logs.std(0, ddof=1) if len(seeds) > 1 else np.full(logs.shape[1], math.nan)
        return Measurement(
            quantity=quantity,
            values=tuple(float(v) for v in np.exp(logs.mean(0))),
            seeds=seeds,
            log_sd=tuple(float(v) for v in spread),
            lower_estimate=False,
        )

    return (
        mean("gradient_growth", log_profile[:, :1]),
        mean("gradient_profile", log_profile),
        mean("residual_std", log_deviation),
    )


def smallest_normaliser(norm: Any, x_TD: Tensor) -> float:
    """Smallest sqrt(var + eps) (LayerNorm) or sqrt(mean square + eps) (RMSNorm) over tokens."""
    layer_norm = isinstance(norm, torch.nn.LayerNorm)
    square = x_TD.var(-1, unbiased=False) if layer_norm else x_TD.square().mean(-1)
    return math.sqrt(float(square.min()) + float(norm.eps))


def layer_norms(
    model: Transformer, tokens: Tensor, *, tolerance: float = 1e-3, on_layer: Callable[[int], None] | None = None
) -> list[dict[str, float]]:
    """Spectral norms of every layer's real Jacobians on one sequence of T tokens; lower estimates.

    A layer's entry has the norm of its updates of the residual stream (`attention_half` and `feedforward_half`,
    post-ln's normalisation included; in a parallel layer `layer`, the whole), of the branches in the residual
    stream (`attention_branch`, `feedforward_branch`), of the concatenated heads in what attention reads (`J_Z`),
    of the weight matrices (experts': the largest), the standard deviation entering each update, and the smallest
    normaliser of each normalisation: `s_attention` and `s_feedforward` before a sub-layer, `s_attention_out` and
    `s_feedforward_out` after it.
    """
    places: list[Tensor] = []
    with torch.no_grad(), _normalisers(model) as normalisers:
        model(tokens, places)
    layers = [layer for layer in model.layers if isinstance(layer, Layer)]
    each = len(layers[0].updates)
    entering = [[x.detach() for x in places[n * each : (n + 1) * each]] for n in range(len(layers))]
    functions = layer_functions(layers, entering, model.documents(tokens))
    for name in {"attention", "feedforward", *([] if layers[0].parallel else ["layer"])}:
        del functions[name]
    rows: list[dict[str, float]] = [{} for _ in layers]
    with constant(model):
        for batch in _together(layers, entering[0][0].numel()):
            for name, (call, at) in functions.items():
                for n, estimate in zip(batch, _opnorms(layers, batch, call, at, tolerance), strict=True):
                    rows[n][name] = estimate.value
            for n in batch:
                layer, row = layers[n], rows[n]
                row |= dict(zip(("sigma_x", "sigma_xp"), place_statistics(entering[n])[0], strict=False))
                row |= normalisers[n]
                row["opnorm_O"] = _opnorm(layer.attention.output)
                row["opnorm_1"] = max(_opnorm(feedforward.enter) for feedforward in layer.feedforwards)
                row["opnorm_2"] = max(_opnorm(feedforward.leave) for feedforward in layer.feedforwards)
                if on_layer is not None:
                    on_layer(n)
    return rows


def _opnorm(linear: torch.nn.Linear) -> float:
    return float(torch.linalg.matrix_norm(linear.weight, ord=2))


LayerFunction = Callable[[Layer, Tensor], Tensor]


def layer_functions(
    layers: list[Layer], entering: list[list[Tensor]], documents_BT: Tensor | None
) -> dict[str, tuple[LayerFunction, list[Tensor]]]:
    """What a layer's Jacobians are of, and the points, a layer each, at which they are taken.

    `attention_half` and `feedforward_half` (not of a parallel layer), `attention_branch`, `feedforward_branch` and
    `J_Z` as in `layer_norms`; `layer` is the whole, `attention` and `feedforward` are the sub-layers in what they read.

    Args:
        entering: the residual stream where it enters each update, layer by layer.
        documents_BT: of the tokens that it is of, as `Transformer.documents` has them.
    """
    xs, middles = ([x[k] for x in entering] for k in (0, -1))
    with torch.no_grad():
        read = [layer.attention_input(x) for layer, x in zip(layers, xs, strict=True)]
        fed = [layer.feedforward_input(x) for layer, x in zip(layers, middles, strict=True)]
    functions: dict[str, tuple[LayerFunction, list[Tensor]]] = {
        "attention_branch": (lambda layer, x: layer.attention_branch(x, documents_BT), xs),
        "J_Z": (lambda layer, u: layer.attention.heads(u, documents_BT), read),
        "feedforward_branch": (Layer.feedforward_branch, middles),
        "attention": (lambda layer, u: layer.attention(u, documents_BT), read),
        "feedforward": (lambda layer, u: layer.feedforward(u), fed),
        "layer": (lambda layer, x: layer.forward(x, documents_BT=documents_BT), xs),
    }
    if layers[0].parallel:
        return functions
    return functions | {
        "attention_half": (lambda layer, x: layer.attention_update(x, documents_BT), xs),
        "feedforward_half": (Layer.feedforward_update, middles),
    }


def layer_opnorms(
    layers: list[Layer], call: LayerFunction, at: list[Tensor], *, tolerance: float
) -> list[NormEstimate]:
    """Norms of one Jacobian in every layer; lower estimates."""
    found: dict[int, NormEstimate] = {}
    for batch in _together(layers, at[0].numel()):
        found |= zip(batch, _opnorms(layers, batch, call, at, tolerance), strict=True)
    return [found[n] for n in range(len(layers))]


def _together(layers: list[Layer], numbers: int) -> list[list[int]]:
    """Which layers are taken at once."""
    # Which tokens an expert gets depends on the numbers, and only one layer at a time can look at them.
    experts = any(isinstance(layer.feedforward, Experts) for layer in layers)
    return [[n] for n in range(len(layers))] if experts else batches(layers, numbers)


def _opnorms(
    layers: list[Layer], batch: list[int], call: LayerFunction, at: list[Tensor], tolerance: float
) -> list[NormEstimate]:
    function = stacked([layers[n] for n in batch], call)
    return lanczos_opnorms(function, torch.stack([at[n] for n in batch]), tolerance=tolerance)


@contextmanager
def constant(model: torch.nn.Module) -> Iterator[None]:
    """Weights are constants inside: products differentiate in the input alone."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


@contextmanager
def _normalisers(model: Transformer) -> Iterator[list[dict[str, float]]]:
    """A dictionary a layer, which a forward pass inside fills with each normalisation's smallest normaliser."""
    rows: list[dict[str, float]] = []
    handles: list[Any] = []

    def keep(row: dict[str, float], name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda norm, inputs: row.update({name: smallest_normaliser(norm, inputs[0])})

    for layer in model.layers:
        assert isinstance(layer, Layer)
        row: dict[str, float] = {}
        norms = {
            "s_attention": layer.attention_norm,
            "s_feedforward": layer.attention_norm if layer.shared_norm else layer.feedforward_norm,
            "s_attention_out": layer.attention_out_norm,
            "s_feedforward_out": layer.feedforward_out_norm,
        }
        handles += [norm.register_forward_pre_hook(keep(row, name)) for name, norm in norms.items() if norm is not None]
        rows.append(row)
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


class PlainAttention:
    """Attention spelled out from its probabilities, for derivatives that no fused kernel has."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention

    def heads(self, u_BTD: Tensor) -> Tensor:
        """Concatenated head outputs, (B, T, H*E)."""
        attention = self.attention
        _, probabilities = attention.probabilities(u_BTD)
        value = attention.queries_keys_values(u_BTD)[2]
        value = value.repeat_interleave(attention.n_heads // attention.n_kv_heads, dim=1)
        mixed = probabilities @ value
        return mixed.transpose(1, 2).reshape(*u_BTD.shape[:2], -1)

    def __call__(self, u_BTD: Tensor) -> Tensor:
        return self.attention.output(self.heads(u_BTD))
