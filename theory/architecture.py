"""A transformer as a value: what is needed to predict its gradient before it exists.

`Architecture` is the one description that theory evaluates and empirics builds. `Init` is a recipe
(rules, not numbers), so that `dataclasses.replace(architecture, d_model=512)` changes the standard
deviations with the width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

Rule = float | Literal["small", "xavier", "fan-in"]
Activation = Literal["identity", "relu", "gelu", "gelu-tanh", "silu"]
Norm = Literal["layernorm", "rmsnorm"]
Positions = Literal["none", "rope", "learned"]
EmbeddingTreatment = Literal["vanilla", "embed-detach", "scaled-embed", "embed-ln"]

EMBEDDINGS: tuple[EmbeddingTreatment, ...] = get_args(EmbeddingTreatment)
LARGEST_SIZE = 10**9
DETACH_FACTOR = 0.1  # GLM-130B's value; that the paper uses it too is recalled, not confirmed.


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
    head: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Init:
    """A recipe for the standard deviations of normally distributed weights.

    A rule is a number or one of `small` sqrt(2/(5 d_model)), `xavier` sqrt(2/(fan_in + fan_out)),
    `fan-in` 1/sqrt(fan_in). Biases start at 0, gains at 1.

    Attributes:
        hidden: rule of every matrix inside a layer.
        embedding, position, head: rules of the token table, the position table and the output head.
        depth_scaled: multiply the two matrices that write to the residual stream (attention output,
            second feed-forward matrix) by 1/sqrt(2 n_layers).
    """

    name: str
    hidden: Rule
    embedding: Rule
    position: Rule
    head: Rule
    depth_scaled: bool

    def __post_init__(self) -> None:
        for field in ("hidden", "embedding", "position", "head"):
            rule = getattr(self, field)
            if isinstance(rule, str):
                if rule not in ("small", "xavier", "fan-in"):
                    raise ValueError(
                        f"{field}={rule!r} is not an initialisation rule; use small, xavier, fan-in or a number"
                    )
            elif isinstance(rule, bool) or not 0 <= rule <= LARGEST_SIZE:
                raise ValueError(f"{field}={rule!r} is not a standard deviation; use 0 to {LARGEST_SIZE}")


INITS: dict[str, Init] = {
    "paper": Init(name="paper", hidden="small", embedding="small", position="small", head="small", depth_scaled=True),
    "xavier": Init(
        name="xavier", hidden="xavier", embedding="small", position="small", head="small", depth_scaled=False
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder-only Pre-LN transformer, validated.

    Attributes:
        d_model, n_layers, n_heads, n_kv_heads, d_head, d_ffn, vocab_size: sizes.
        context: the longest sequence it is meant for, in tokens.
        activation, gated: feed-forward `W_2 F(W_1 u)`, or gated `W_2 (F(W_1 u) * W_3 u)`.
        norm, eps: the normalisation before each sub-layer and before the head.
        positions: `rope` acts inside attention, `learned` adds a table to the embeddings.
        biases: linear layers and LayerNorms have biases (zero at initialisation).
        tied: the head is the token table.
        embedding_multiplier, embedding_norm: what is done to the embeddings before the first block.
        embedding_gradient: factor on the gradient that reaches the token table; the forward pass is
            unchanged (`g*x + (1-g)*stopgrad(x)`).
        padding_row: the class zeroes one row of the token table, the padding token's.

    Raises:
        ValueError: a size is out of range or the sizes contradict each other; the message names a remedy.
    """

    name: str
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_ffn: int
    vocab_size: int
    context: int
    activation: Activation = "relu"
    gated: bool = False
    norm: Norm = "layernorm"
    eps: float = 1e-5
    positions: Positions = "rope"
    biases: bool = False
    tied: bool = False
    embedding_multiplier: float = 1.0
    embedding_norm: bool = False
    embedding_gradient: float = 1.0
    padding_row: bool = False
    init: Init = INITS["paper"]

    def __post_init__(self) -> None:
        sizes = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_ffn", "vocab_size", "context")
        for field in sizes:
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{field}={value!r} is not a whole number; write it as an integer, for example 64")
            if not 1 <= value <= LARGEST_SIZE:
                raise ValueError(f"{field}={value} is out of range; use 1 to {LARGEST_SIZE}")
        if self.n_heads % self.n_kv_heads:
            fits = [k for k in range(1, min(self.n_heads, 4096) + 1) if self.n_heads % k == 0]
            raise ValueError(
                f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}; "
                f"use n_kv_heads={_nearest(fits, self.n_kv_heads)}"
            )
        if self.positions == "rope" and self.d_head % 2:
            raise ValueError(f"d_head={self.d_head} is odd and rotary positions need pairs; use an even head width")
        choices: list[tuple[str, tuple[str, ...]]] = [
            ("activation", get_args(Activation)),
            ("norm", get_args(Norm)),
            ("positions", get_args(Positions)),
        ]
        for field, allowed in choices:
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not known; use one of {', '.join(allowed)}")
        for field, lowest in (("eps", 0.0), ("embedding_multiplier", 0.0), ("embedding_gradient", 0.0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{field}={value!r} is not a number; write it as a number")
            if not lowest <= value <= LARGEST_SIZE:
                raise ValueError(f"{field}={value!r} is out of range; use {lowest:g} to {LARGEST_SIZE}")

    @property
    def stds(self) -> Stds:
        """Standard deviation of each matrix under `init`."""
        d, m, heads = self.d_model, self.d_ffn, self.n_heads * self.d_head
        kv = self.n_kv_heads * self.d_head
        depth = 1 / math.sqrt(2 * self.n_layers) if self.init.depth_scaled else 1.0

        def std(rule: Rule, fan_in: int, fan_out: int) -> float:
            if rule == "small":
                return math.sqrt(2 / (5 * d))
            if rule == "xavier":
                return math.sqrt(2 / (fan_in + fan_out))
            if rule == "fan-in":
                return 1 / math.sqrt(fan_in)
            return float(rule)

        init = self.init
        embedding = std(init.embedding, self.vocab_size, d)
        return Stds(
            embedding=embedding,
            position=std(init.position, self.context, d),
            query=std(init.hidden, d, heads),
            key=std(init.hidden, d, kv),
            value=std(init.hidden, d, kv),
            output=std(init.hidden, heads, d) * depth,
            ffn_in=std(init.hidden, d, m),
            ffn_gate=std(init.hidden, d, m),
            ffn_out=std(init.hidden, m, d) * depth,
            head=embedding if self.tied else std(init.head, d, self.vocab_size),
        )

    @property
    def n_parameters(self) -> int:
        """Number of trained numbers in the matrices (gains and biases are left out)."""
        heads, kv = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        layer = self.d_model * (2 * heads + 2 * kv + (3 if self.gated else 2) * self.d_ffn)
        tables = self.vocab_size * (1 if self.tied else 2) + (self.context if self.positions == "learned" else 0)
        return self.n_layers * layer + tables * self.d_model

    def with_embedding(self, treatment: EmbeddingTreatment) -> Architecture:
        """This architecture with one of the paper's four embedding treatments.

        Source: takase2025spike (the methods compared).
        """
        changes: dict[EmbeddingTreatment, tuple[float, bool, float]] = {
            "vanilla": (1.0, False, 1.0),
            "embed-detach": (1.0, False, DETACH_FACTOR),
            "scaled-embed": (math.sqrt(self.d_model), False, 1.0),
            "embed-ln": (1.0, True, 1.0),
        }
        if treatment not in changes:
            raise ValueError(f"unknown embedding treatment {treatment!r}; use one of {', '.join(EMBEDDINGS)}")
        multiplier, norm, gradient = changes[treatment]
        return replace(self, embedding_multiplier=multiplier, embedding_norm=norm, embedding_gradient=gradient)

    def with_init(self, init: str | Init) -> Architecture:
        """This architecture with another initialisation, by name or as a value."""
        if isinstance(init, str):
            if init not in INITS:
                raise ValueError(f"unknown initialisation {init!r}; use one of {', '.join(INITS)}")
            init = INITS[init]
        return replace(self, init=init)


def _nearest(choices: list[int], wanted: int) -> int:
    return min(choices, key=lambda choice: abs(choice - wanted))


def head_width(d_model: int, n_heads: int) -> int:
    """Width of a head when the heads share the model's width.

    Raises:
        ValueError: the heads do not divide the width; the message names the nearest widths that work.
    """
    if n_heads < 1 or d_model % n_heads:
        below = d_model // max(n_heads, 1) * n_heads
        fits = " or ".join(str(width) for width in (below, below + n_heads) if width > 0)
        raise ValueError(f"d_model={d_model} is not divisible by n_heads={n_heads}; use d_model={fits}")
    return d_model // n_heads


def _preset(name: str, d_model: int, n_layers: int, n_heads: int, vocab_size: int, context: int) -> Architecture:
    return Architecture(
        name=name,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=head_width(d_model, n_heads),
        d_ffn=4 * d_model,
        vocab_size=vocab_size,
        context=context,
    )


# The paper's sizes are recalled (1.7b: Narayanan et al. 2021); its positions and activation are not confirmed.
PRESETS: dict[str, Callable[[], Architecture]] = {
    "tiny": lambda: _preset("tiny", 64, 12, 2, 512, 64),
    "small": lambda: _preset("small", 128, 12, 4, 2048, 128),
    "wide": lambda: _preset("wide", 256, 8, 4, 2048, 64),
    "350m": lambda: _preset("350m", 1024, 24, 16, 50257, 2048),
    "1.7b": lambda: _preset("1.7b", 2304, 24, 24, 50257, 2048),
    "13b": lambda: _preset("13b", 5120, 40, 40, 50257, 2048),
}


def preset(name: str) -> Architecture:
    """A named architecture, with the Vanilla embedding and the paper's initialisation.

    >>> preset("tiny").d_model
    64
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; use one of {', '.join(PRESETS)} or the path of a config.json")
    return PRESETS[name]()


# The five methods that every figure shows, in the paper's order.
METHODS: dict[str, tuple[EmbeddingTreatment, str]] = {
    "Vanilla": ("vanilla", "paper"),
    "Embed Detach": ("embed-detach", "paper"),
    "Scaled Embed": ("scaled-embed", "paper"),
    "Embed LN": ("embed-ln", "paper"),
    "Xavier + Scaled Embed": ("scaled-embed", "xavier"),
}


def method(architecture: Architecture, name: str) -> Architecture:
    """`architecture` trained by one of the compared `METHODS`."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; use one of {', '.join(METHODS)}")
    embedding, init = METHODS[name]
    return architecture.with_embedding(embedding).with_init(init)
