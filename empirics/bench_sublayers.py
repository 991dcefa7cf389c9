"""The benches: normalisation, softmax, a normal matrix, feed-forward, and the normalised branch."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor, nn

from empirics import observables
from empirics.benches import Bench, Choices, add_bench, small_architecture
from empirics.model import ACTIVATIONS, FeedForward, make_norm
from theory.architecture import Activation, Norm

# Relative rounding of a sum of a few dozen terms, 64 of them at 2.2e-16.
UNIT = 64 * 2.0**-52

WIDTHS = tuple(range(1, 9))
NORMS = {"norm": get_args(Norm), "eps": (0.0, 1e-12, 1e-5, 1e-3, 10.0)}
FEEDFORWARDS = {"activation": get_args(Activation), "gated": (False, True), "d_ffn": tuple(range(1, 13))}


def sequence(choices: Choices) -> tuple[int, int]:
    """Shape (T, D) of an input."""
    return choices["n_tokens"], choices["d_model"]


# --- normalisation ------------------------------------------------------------------------------------------------


def norm_module(choices: Choices) -> nn.Module:
    """The model's normalisation, of the kind and eps chosen."""
    return make_norm(small_architecture(choices))


def has_scale(norm: Any, x_TD: Tensor) -> bool:
    """Whether it divides every token by more than zero: with eps = 0 a constant token has no norm."""
    return bool(observables.observe_norm(norm, x_TD)["s"] > 0)


def norm_conditioning(norm: Any, x_TD: Tensor) -> float:
    """Relative rounding of a normalisation: the mean and the radius are subtracted from numbers of size |x|."""
    s = observables.observe_norm(norm, x_TD)["s"].item()
    return UNIT * (1 + x_TD.abs().max().item() / s) ** 2


def norm_size(norm: Any, x_TD: Tensor) -> float:
    """What bounds its Jacobian: the largest gain over the smallest normaliser."""
    values = observables.observe_norm(norm, x_TD)
    return (values["gain"] / values["s"]).item()


add_bench(
    Bench(
        quantity="norm_jacobian",
        choices={"d_model": WIDTHS, "n_tokens": (1, 2, 3), "biases": (False, True), **NORMS},
        module=norm_module,
        shape=sequence,
        truth=observables.true_tokenwise,
        symbols={("gain", "s"): observables.observe_norm},
        rounding=lambda norm, x_TD: norm_conditioning(norm, x_TD) * norm_size(norm, x_TD),
        defined=has_scale,
    )
)


def inner_gain(norm: Any, x_TD: Tensor) -> observables.Observed:
    """The third largest gain of a LayerNorm, the second of an RMSNorm, in size; and the token's normaliser."""
    place = 2 if isinstance(norm, nn.LayerNorm) else 1
    gains = norm.weight.abs().sort(descending=True).values
    return {"inner_gain": gains[place], "s": observables.observe_norm(norm, x_TD)["s"]}


def norm_inverse(norm: Any, x_TD: Tensor) -> Tensor:
    """One over the true norm of its Jacobian: a lower bound is attacked as an upper one of this."""
    return 1 / observables.true_tokenwise(norm, x_TD)


add_bench(
    Bench(
        quantity="norm_jacobian_inverse",
        choices={"d_model": WIDTHS[2:], "n_tokens": (1,), "biases": (False, True), **NORMS},
        module=norm_module,
        shape=sequence,
        truth=norm_inverse,
        symbols={("inner_gain", "s"): inner_gain},
        rounding=lambda norm, x_TD: (
            norm_conditioning(norm, x_TD) * norm_size(norm, x_TD) * norm_inverse(norm, x_TD).item() ** 2
        ),
        defined=lambda norm, x_TD: has_scale(norm, x_TD) and inner_gain(norm, x_TD)["inner_gain"].item() > 0,
    )
)


# --- softmax, random matrices -------------------------------------------------------------------------------------


add_bench(
    Bench(
        quantity="softmax_jacobian",
        choices={"n_logits": WIDTHS},
        module=lambda choices: nn.Softmax(-1),
        shape=lambda choices: (choices["n_logits"],),
        truth=observables.true_opnorm,
        symbols={},
    )
)


class NormalMatrix(nn.Module):
    """A matrix with independent N(0, sigma^2) entries; `weight` is what a plain draw makes of its shape."""

    def __init__(self, rows: int, columns: int, sigma: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.factor = sigma * math.sqrt(columns)  # a plain draw divides by the root of the columns

    def matrix(self) -> Tensor:
        """(rows, columns), of the standard deviation asked for."""
        return self.factor * self.weight


add_bench(
    Bench(
        quantity="matrix_opnorm",
        # At a deviation of 8 the bound fails once in e^32 draws.
        choices={
            "rows": tuple(range(1, 41)),
            "columns": tuple(range(1, 41)),
            "sigma": (1e-6, 0.02, 1.0, 1e6),
            "t": (8.0,),
        },
        module=lambda choices: NormalMatrix(choices["rows"], choices["columns"], choices["sigma"]),
        shape=lambda choices: (1,),
        truth=lambda module, x: observables.opnorm(module.matrix()),
        symbols={},
        lawful=True,
    )
)


# --- feed-forward -------------------------------------------------------------------------------------------------


def feedforward_module(choices: Choices) -> FeedForward:
    """The model's feed-forward sub-layer."""
    return FeedForward(small_architecture(choices))


def reach(feedforward: FeedForward, u_TD: Tensor) -> float:
    """The largest that a pre-activation could be."""
    radius = u_TD.norm(dim=-1).max()
    sizes = [
        observables.opnorm(linear.weight) * radius + (0.0 if linear.bias is None else linear.bias.norm())
        for linear in (feedforward.enter, feedforward.gate)
        if linear is not None
    ]
    return float(sum(size.item() for size in sizes))


def feedforward_rounding(feedforward: FeedForward, u_TD: Tensor) -> float:
    values = observables.observe_feedforward(feedforward, u_TD)
    entering = values.get("opnorm_13", values["opnorm_1"])
    # A pre-activation of size z is off by UNIT z, and so (|F''| is of order one) is the slope it is put into.
    return UNIT * (values["opnorm_2"] * entering).item() * (1 + reach(feedforward, u_TD)) ** 2


def slope_in_reach(feedforward: FeedForward, u_TD: Tensor) -> observables.Observed:
    """ReLU squared has no largest slope, but one for the pre-activations in reach; the others keep their constant."""
    unbounded = feedforward.activation is ACTIVATIONS["relu-squared"]
    return {"lipschitz": 2 * reach(feedforward, u_TD)} if unbounded else {}


FEEDFORWARD_SYMBOLS = ("opnorm_1", "opnorm_2", "opnorm_13", "gate_slope")

add_bench(
    Bench(
        quantity="ffn_jacobian",
        choices={"d_model": WIDTHS, "n_tokens": (1, 2, 3), "biases": (False, True), **FEEDFORWARDS},
        module=feedforward_module,
        shape=sequence,
        truth=observables.true_feedforward,
        symbols={
            FEEDFORWARD_SYMBOLS: observables.observe_feedforward,
            ("open_1", "open_2"): observables.observe_open_units,
            ("R",): observables.observe_reach,
            ("lipschitz",): slope_in_reach,
        },
        rounding=feedforward_rounding,
    )
)


class Branch(nn.Module):
    """A sub-layer of the normalised input."""

    def __init__(self, norm: nn.Module, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = norm, inner

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D), before it is added to the shortcut."""
        return self.inner(self.norm(x_TD))


def branch_rounding(branch: Any, x_TD: Tensor) -> float:
    """That of the norm, as the feed-forward's slopes carry it on."""
    u_TD = branch.norm(x_TD)
    values = observables.observe_feedforward(branch.inner, u_TD)
    entering = values.get("opnorm_13", values["opnorm_1"])
    size = (values["opnorm_2"] * entering).item() * norm_size(branch.norm, x_TD)
    return norm_conditioning(branch.norm, x_TD) * size * (1 + reach(branch.inner, u_TD)) ** 2


add_bench(
    Bench(
        quantity="ffn_branch",
        choices={"d_model": WIDTHS, "n_tokens": (1, 2, 3), "biases": (False, True), **NORMS, **FEEDFORWARDS},
        module=lambda choices: Branch(norm_module(choices), feedforward_module(choices)),
        shape=sequence,
        truth=observables.true_tokenwise,
        symbols={
            ("gain", "s"): lambda branch, x_TD: observables.observe_norm(branch.norm, x_TD),
            FEEDFORWARD_SYMBOLS: lambda branch, x_TD: observables.observe_feedforward(branch.inner, branch.norm(x_TD)),
            ("lipschitz",): lambda branch, x_TD: slope_in_reach(branch.inner, branch.norm(x_TD)),
        },
        rounding=branch_rounding,
        defined=lambda branch, x_TD: has_scale(branch.norm, x_TD),
    )
)
