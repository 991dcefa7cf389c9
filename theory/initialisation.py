"""How weights are drawn, as a value: rules, not numbers, so that another width changes the standard deviations.

A rule is a number or a name:

    small       sqrt(2/(5 d_model))              paper; Nguyen and Salazar 2019
    xavier      sqrt(2/(fan_in + fan_out))       Glorot and Bengio 2010
    kaiming     sqrt(2/fan_in)                   He et al. 2015
    fan-in      1/sqrt(fan_in)                   LeCun et al. 1998; OLMo's `fan_in`
    width       1/sqrt(d_model)                  OLMo's `mitchell`
    torch       1/sqrt(3 fan_in)                 the weights of `torch.nn.Linear` by itself (uniform)
    inverse     1/fan_in                         the head under muP
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

RuleName = Literal["small", "xavier", "kaiming", "fan-in", "width", "torch", "inverse"]
Rule = float | RuleName
Depth = Literal["none", "network", "layer"]
Law = Literal["normal", "truncated", "uniform"]
Distribution = Law | Literal["torch"]

RULES: tuple[RuleName, ...] = get_args(RuleName)
DISTRIBUTIONS: tuple[Distribution, ...] = (*get_args(Law), "torch")
LARGEST_STD = 10**9


class Stds(NamedTuple):
    """True standard deviation of each matrix's entries."""

    embedding: float
    position: float
    query: float
    key: float
    value: float
    output: float
    ffn_in: float
    ffn_gate: float
    ffn_out: float
    router: float
    head: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Init:
    """A recipe for the standard deviations of independent weights. Biases start at 0, gains at 1.

    Attributes:
        hidden: rule of every matrix inside a layer that has none of its own.
        embedding, position, head: rules of the token table, the position table and the output head.
        depth_scaled: multiply the two residual writers (attention output, second feed-forward matrix) by
            1/sqrt(2 n_layers).
        layer_scaled: multiply them by 1/sqrt(2 (n + 1)) in layer n = 0, 1, ... (OLMo's `mitchell`).
        writers: rule of the residual writers, if not `hidden`.
        query_key, value: rules of those matrices, if not `hidden`.
        branch_gain: factor on value, output and feed-forward matrices (DeepNorm's beta).
        distribution, cutoff: `truncated` cuts a normal at `cutoff` standard deviations, which lowers the true one;
            `torch` is uniform but for the tables of tokens and positions, which are normal. Predictions read the
            standard deviations alone; of the bounds, those for random weights read `gaussian_factor` too.
    """

    name: str
    hidden: Rule
    embedding: Rule
    position: Rule
    head: Rule
    depth_scaled: bool = False
    layer_scaled: bool = False
    writers: Rule | None = None
    query_key: Rule | None = None
    value: Rule | None = None
    branch_gain: float = 1.0
    distribution: Distribution = "normal"
    cutoff: float = 3.0

    def __post_init__(self) -> None:
        for field in ("hidden", "embedding", "position", "head", "writers", "query_key", "value"):
            rule = getattr(self, field)
            if rule is None and field in ("writers", "query_key", "value"):
                continue
            if isinstance(rule, str):
                if rule not in RULES:
                    raise ValueError(
                        f"{field}={rule!r} is not an initialisation rule; use a number or one of {', '.join(RULES)}"
                    )
            elif isinstance(rule, bool) or not isinstance(rule, int | float) or not 0 <= rule <= LARGEST_STD:
                raise ValueError(f"{field}={rule!r} is not a standard deviation; use 0 to {LARGEST_STD}")
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution={self.distribution!r} is not known; use one of {', '.join(DISTRIBUTIONS)}")
        if not 0 < self.cutoff <= LARGEST_STD:
            raise ValueError(f"cutoff={self.cutoff!r} is out of range; a truncated normal is cut at 2 or 3")
        if not 0 <= self.branch_gain <= LARGEST_STD:
            raise ValueError(f"branch_gain={self.branch_gain!r} is out of range; use 0 to {LARGEST_STD}")
        if self.depth_scaled and self.layer_scaled:
            raise ValueError("depth_scaled and layer_scaled both shrink the residual writers; use one of them")

    def std(self, rule: Rule, *, d_model: int, fan_in: int, fan_out: int) -> float:
        """True standard deviation that `rule` gives a (fan_out, fan_in) matrix."""
        if not isinstance(rule, str):
            nominal = float(rule)
        elif rule == "small":
            nominal = math.sqrt(2 / (5 * d_model))
        elif rule == "xavier":
            nominal = math.sqrt(2 / (fan_in + fan_out))
        elif rule == "kaiming":
            nominal = math.sqrt(2 / fan_in)
        elif rule == "fan-in":
            nominal = 1 / math.sqrt(fan_in)
        elif rule == "width":
            nominal = 1 / math.sqrt(d_model)
        elif rule == "torch":
            nominal = 1 / math.sqrt(3 * fan_in)
        else:
            nominal = 1 / fan_in
        return nominal * (truncated_std(self.cutoff) if self.distribution == "truncated" else 1.0)

    def law(self, *, table: bool = False) -> Law:
        """Of the entries of a matrix, or of a table of tokens or positions."""
        if self.distribution != "torch":
            return self.distribution
        return "normal" if table else "uniform"

    @property
    def gaussian_factor(self) -> float:
        """A normal of this many true standard deviations dominates an entry: it is a 1-Lipschitz image of it.

        A normal cut at +-c is one of the uncut normal (Caffarelli's contraction theorem), U(-b, b) = b (2 Phi(g) - 1)
        of a normal of deviation b sqrt(2/pi) (its slope is largest at 0). Entries are then also smaller than the
        normal's, so that by the contraction principle the bounds on Gaussian matrices hold.
        """
        if self.distribution == "truncated":
            return 1 / truncated_std(self.cutoff)
        return math.sqrt(6 / math.pi) if self.law() == "uniform" else 1.0


def truncated_std(cutoff: float) -> float:
    r"""Standard deviation of a standard normal cut at +-cutoff, :math:`\sqrt{1 - 2 c \phi(c) / (2\Phi(c) - 1)}`.

    >>> round(truncated_std(2.0), 6)
    0.879626
    """
    density = math.exp(-cutoff * cutoff / 2) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * cutoff * density / math.erf(cutoff / math.sqrt(2))
    if cutoff < 0.05:  # the difference above cancels; c^2/3 is its limit
        variance = cutoff * cutoff / 3
    return math.sqrt(variance)


def flat(std: float, *, name: str = "flat", depth_scaled: bool = False) -> Init:
    """Every matrix normal with the same standard deviation (GPT-2 and Megatron: writers times 1/sqrt(2N))."""
    return Init(name=name, hidden=std, embedding=std, position=std, head=std, depth_scaled=depth_scaled)


def deepnorm(n_layers: int) -> Init:
    """DeepNorm's initialisation of a decoder of n layers: Xavier, with (8 n)^(-1/4) on values, output and FFN.

    Source: Wang et al. 2022; the matching shortcut multiplier is (2 n)^(1/4).
    """
    return Init(
        name="deepnorm",
        hidden="xavier",
        embedding="small",
        position="small",
        head="xavier",
        branch_gain=(8 * n_layers) ** -0.25,
    )


INITS: dict[str, Init] = {
    "paper": Init(name="paper", hidden="small", embedding="small", position="small", head="small", depth_scaled=True),
    "xavier": Init(name="xavier", hidden="xavier", embedding="small", position="small", head="small"),
    "small": Init(name="small", hidden="small", embedding="small", position="small", head="small"),
    "kaiming": Init(name="kaiming", hidden="kaiming", embedding="small", position="small", head="small"),
    "fan-in": Init(name="fan-in", hidden="fan-in", embedding=0.02, position=0.02, head="fan-in"),
    "width": Init(name="width", hidden="width", embedding="width", position="width", head="width"),
    "gpt2": flat(0.02, name="gpt2", depth_scaled=True),
    "flat": flat(0.02),
    "megatron": flat(0.006, name="megatron", depth_scaled=True),
    "mitchell": Init(
        name="mitchell", hidden="width", writers="fan-in", embedding="width", position="width", head="width",
        layer_scaled=True, distribution="truncated",
    ),
    "truncated": Init(
        name="truncated", hidden=0.02, embedding=0.02, position=0.02, head=0.02, distribution="truncated", cutoff=2.0
    ),
    # Weights alone: where an architecture has biases, they start at 0 as in every recipe, and nn.Linear's do not.
    "torch": Init(name="torch", hidden="torch", embedding=1.0, position=1.0, head="torch", distribution="torch"),
    "mup": Init(name="mup", hidden="fan-in", embedding=1.0, position=1.0, head="inverse"),
    "zero-output": Init(
        name="zero-output", hidden="small", embedding="small", position="small", head="small", writers=0.0
    ),
}  # fmt: skip
