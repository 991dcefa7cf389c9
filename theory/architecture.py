"""A transformer as a value: what is needed to predict its gradient before it exists.

`Architecture` is the one description that theory evaluates and empirics builds. Its `Init` is a recipe
(rules, not numbers), so that `dataclasses.replace(architecture, d_model=512)` changes the standard
deviations with the width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from theory.initialisation import INITS, Init, Rule, Stds
from theory.names import unknown

Activation = Literal["identity", "relu", "gelu", "gelu-tanh", "silu", "relu-squared"]
Norm = Literal["layernorm", "rmsnorm"]
Positions = Literal["none", "rope", "learned", "sinusoidal", "alibi"]
Block = Literal["pre-ln", "post-ln", "peri-ln", "branch-ln"]
QKNorm = Literal["none", "head", "full"]
EmbeddingTreatment = Literal["vanilla", "embed-detach", "scaled-embed", "embed-ln"]

EMBEDDINGS: tuple[EmbeddingTreatment, ...] = get_args(EmbeddingTreatment)
LARGEST_SIZE = 10**9
NUMBERS = (
    "eps", "embedding_multiplier", "embedding_gradient", "residual_multiplier", "shortcut_multiplier",
    "rope_fraction", "rope_base", "attention_softcap", "logit_softcap", "logit_multiplier",
    "rope_stretch", "rope_low", "rope_high",
)  # fmt: skip
DETACH_FACTOR = 0.1  # GLM-130B's value; that the paper uses it too is recalled, not confirmed.


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    r"""A decoder-only transformer, validated.

    A layer updates the residual stream x by its sub-layers f, normalisations n, shortcut multiplier alpha and
    residual multiplier r:

        pre-ln      x <- alpha x + r f(n(x))            GPT-2, LLaMA, the paper
        post-ln     x <- n(alpha x + r f(x))            the first transformer; DeepNorm
        peri-ln     x <- alpha x + r n'(f(n(x)))        Gemma 2 (sandwich)
        branch-ln   x <- alpha x + r n(f(x))            OLMo 2

    Attributes:
        d_model, n_layers, n_heads, n_kv_heads, d_head, d_ffn, vocab_size: sizes.
        context: the longest sequence it is meant for, in tokens.
        activation, gated: feed-forward `W_2 F(W_1 u)`, or gated `W_2 (F(W_1 u) * W_3 u)`.
        n_experts: feed-forwards of a layer, each of width d_ffn, behind a router; 0 for a single one without router.
        experts_per_token: a token goes to this many of them, those of the largest router logits.
        gates_renormalised: their outputs are weighted by a softmax over the chosen; else over all experts.
        norm, eps: the normalisation before each sub-layer and before the head.
        block: where a layer normalises, as above.
        parallel: both sub-layers read the same x and add to it together. Whether they share a norm
            (`shared_norm`) makes no difference at initialisation.
        final_norm: the residual stream is normalised before the head.
        residual_multiplier, shortcut_multiplier: r and alpha above.
        norm_depth_scaling: what layer n = 1, 2, ... normalises is multiplied by 1/sqrt(n) (LayerNorm scaling).
        positions: `rope` and `alibi` act inside attention, `learned` and `sinusoidal` add to the embeddings.
        rope_fraction, rope_base: share of a head's width that turns, and the base of its frequencies.
        nope_every: in every k-th layer nothing turns (SmolLM3); 0 for none.
        window, global_every: a token sees the last `window` tokens (0: all), but in every k-th layer all.
        global_first: that layer is the first of each k (GPT-Neo), not the last.
        rope_stretch: divisor of the rotary frequencies (linear scaling), but of a window's own base.
        rope_original, rope_low, rope_high: frequencies that turn `rope_high` times or more in that many tokens are left
            as they are, those of at most `rope_low` turns divided, others interpolated (Llama 3.1); 0: all divided.
        window_rope_base: base of the rotary frequencies where there is a window (Gemma 3); None for `rope_base`.
        qk_norm: queries and keys are normalised, each head by itself or the full projection at once.
        attention_scale: factor on q.k; None for 1/sqrt(d_head).
        attention_softcap, logit_softcap: c tanh(z/c) on attention logits and on the output (0: none).
        biases: linear layers and LayerNorms have biases (zero at initialisation).
        tied: the head is the token table.
        logit_multiplier: factor on the output logits.
        embedding_multiplier, embedding_norm: what is done to the embeddings before the first block.
        embedding_gradient: factor on the gradient that reaches the tables and the embedding norm; the forward pass is
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
    n_experts: int = 0
    experts_per_token: int = 2
    gates_renormalised: bool = True
    norm: Norm = "layernorm"
    eps: float = 1e-5
    block: Block = "pre-ln"
    parallel: bool = False
    shared_norm: bool = False
    final_norm: bool = True
    residual_multiplier: float = 1.0
    shortcut_multiplier: float = 1.0
    norm_depth_scaling: bool = False
    positions: Positions = "rope"
    rope_fraction: float = 1.0
    rope_base: float = 10_000.0
    nope_every: int = 0
    window: int = 0
    global_every: int = 0
    global_first: bool = False
    window_rope_base: float | None = None
    rope_stretch: float = 1.0
    rope_original: int = 0
    rope_low: float = 1.0
    rope_high: float = 4.0
    qk_norm: QKNorm = "none"
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    logit_multiplier: float = 1.0
    biases: bool = False
    tied: bool = False
    embedding_multiplier: float = 1.0
    embedding_norm: bool = False
    embedding_gradient: float = 1.0
    padding_row: bool = False
    init: Init = INITS["paper"]

    def __post_init__(self) -> None:
        for field in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_ffn", "vocab_size", "context"):
            _require_whole(field, getattr(self, field), lowest=1)
        for field in ("window", "global_every", "nope_every", "n_experts", "rope_original"):
            _require_whole(field, getattr(self, field), lowest=0)
        _require_whole("experts_per_token", self.experts_per_token, lowest=1)
        if 0 < self.n_experts < self.experts_per_token:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} exceeds n_experts={self.n_experts}; "
                f"use at most {self.n_experts}"
            )
        if self.n_heads % self.n_kv_heads:
            fits = [k for k in range(1, min(self.n_heads, 4096) + 1) if self.n_heads % k == 0]
            raise ValueError(
                f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}; "
                f"use n_kv_heads={_nearest(fits, self.n_kv_heads)}"
            )
        choices: list[tuple[str, tuple[str, ...]]] = [
            ("activation", get_args(Activation)),
            ("norm", get_args(Norm)),
            ("positions", get_args(Positions)),
            ("block", get_args(Block)),
            ("qk_norm", get_args(QKNorm)),
        ]
        for field, allowed in choices:
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not known; use one of {', '.join(allowed)}")
        for field in NUMBERS:
            _require_number(field, getattr(self, field))
        for field in ("attention_scale", "window_rope_base"):
            if getattr(self, field) is not None:
                _require_number(field, getattr(self, field))
        if self.rope_fraction > 1:
            raise ValueError(f"rope_fraction={self.rope_fraction!r} is above 1; use the share of a head that turns")
        if self.positions == "rope":
            if self.d_head % 2 and self.rope_fraction == 1:
                raise ValueError(f"d_head={self.d_head} is odd and rotary positions need pairs; use an even head width")
            if self.rope_width % 2:
                raise ValueError(
                    f"rope_fraction={self.rope_fraction:g} of d_head={self.d_head} is {self.rope_width}, which is odd; "
                    "rotary positions need pairs, so use a share that makes it even"
                )
        if self.rope_stretch <= 0:
            raise ValueError(
                f"rope_stretch={self.rope_stretch!r} divides frequencies; use a number above 0, 1 for none"
            )
        if self.rope_original and not 0 < self.rope_low < self.rope_high:
            raise ValueError(
                f"rope_low={self.rope_low:g} turns and rope_high={self.rope_high:g} leave nothing between them; "
                "use a positive rope_low below rope_high, for example 1 and 4"
            )
        if self.parallel and self.block != "pre-ln":
            raise ValueError(f"parallel sub-layers are known with block='pre-ln' only, not {self.block!r}")
        if self.shared_norm and not self.parallel:
            raise ValueError("shared_norm=True needs parallel=True: sub-layers in a row have a norm each")

    @property
    def rope_width(self) -> int:
        """Coordinates of a head that rotary positions turn."""
        return int(self.rope_fraction * self.d_head)

    @property
    def logit_scale(self) -> float:
        """Factor on q.k."""
        return self.attention_scale if self.attention_scale is not None else 1 / math.sqrt(self.d_head)

    def window_at(self, layer: int) -> int:
        """How many tokens a token of layer 0, 1, ... sees, itself included; 0 for all that came before."""
        return 0 if _is_kth(layer, self.global_every, first=self.global_first) else self.window

    def norm_factor_at(self, layer: int) -> float:
        """What LayerNorm scaling multiplies the norms of layer 0, 1, ... by; 1 without it."""
        return 1 / math.sqrt(layer + 1) if self.norm_depth_scaling else 1.0

    def rope_base_at(self, layer: int) -> float | None:
        """Base of the rotary frequencies in layer 0, 1, ...; None where nothing turns."""
        if self.positions != "rope" or _is_kth(layer, self.nope_every):
            return None
        return self.window_rope_base if self.window_rope_base and self.window_at(layer) else self.rope_base

    def rope_slowing(self, layer: int) -> tuple[float, ...]:
        """What the frequency of each pair of a head's coordinates is multiplied by in layer 0, 1, ...; empty for 1.

        Source: Chen et al. 2023 (positions interpolated linearly); Llama 3.1's report and code for the rest.
        """
        base, width = self.rope_base_at(layer), self.rope_width
        if base is None or self.rope_stretch == 1 or (self.window_rope_base and self.window_at(layer)):
            return ()
        if not self.rope_original:
            return (1 / self.rope_stretch,) * (width // 2)
        turns = [self.rope_original * base ** (-2 * i / width) / (2 * math.pi) for i in range(width // 2)]
        kept = [min(max((turn - self.rope_low) / (self.rope_high - self.rope_low), 0.0), 1.0) for turn in turns]
        return tuple(share + (1 - share) / self.rope_stretch for share in kept)

    @property
    def updates(self) -> tuple[tuple[str, ...], ...]:
        """What is added to the residual stream together, in one layer: both sub-layers at once if parallel."""
        return (("attention", "feedforward"),) if self.parallel else (("attention",), ("feedforward",))

    @property
    def stds(self) -> Stds:
        """Standard deviation of each matrix under `init`, in the first layer."""
        return self.layer_stds(0)

    def layer_stds(self, layer: int) -> Stds:
        """Standard deviation of each matrix under `init`, in layer 0, 1, ..."""
        d, m, heads = self.d_model, self.d_ffn, self.n_heads * self.d_head
        kv, init = self.n_kv_heads * self.d_head, self.init
        depth = 1.0
        if init.depth_scaled or init.layer_scaled:
            depth = 1 / math.sqrt(2 * (self.n_layers if init.depth_scaled else layer + 1))

        def std(rule: Rule, fan_in: int, fan_out: int) -> float:
            return init.std(rule, d_model=d, fan_in=fan_in, fan_out=fan_out)

        query_key = init.hidden if init.query_key is None else init.query_key
        value = init.hidden if init.value is None else init.value
        writers = init.hidden if init.writers is None else init.writers
        embedding = std(init.embedding, self.vocab_size, d)
        gain = init.branch_gain
        return Stds(
            embedding=embedding,
            position=std(init.position, self.context, d),
            query=std(query_key, d, heads),
            key=std(query_key, d, kv),
            value=std(value, d, kv) * gain,
            output=std(writers, heads, d) * depth * gain,
            ffn_in=std(init.hidden, d, m) * gain,
            ffn_gate=std(init.hidden, d, m) * gain,
            ffn_out=std(writers, m, d) * depth * gain,
            router=std(init.hidden, d, max(self.n_experts, 1)),
            head=embedding if self.tied else std(init.head, d, self.vocab_size),
        )

    @property
    def n_parameters(self) -> int:
        """Number of trained numbers, gains and biases too; a tied head once."""
        heads, kv, a_norm = self.n_heads * self.d_head, self.n_kv_heads * self.d_head, self._norm_parameters
        before, after = self.block in ("pre-ln", "peri-ln"), self.block != "pre-ln"
        norms = (0 if not before else 1 if self.shared_norm else 2) + (2 if after else 0)
        layer = norms * a_norm(self.d_model)
        if self.qk_norm != "none":
            layer += sum(map(a_norm, (heads, kv) if self.qk_norm == "full" else (self.d_head, self.d_head)))
        if self.biases:
            units = (2 if self.gated else 1) * self.d_ffn
            layer += heads + 2 * kv + self.d_model + max(self.n_experts, 1) * (units + self.d_model)
        outside = a_norm(self.d_model) * (self.embedding_norm + self.final_norm)
        return self.n_weights + self.n_layers * layer + outside

    @property
    def n_weights(self) -> int:
        """Those of `n_parameters` in matrices: tables and weights of linear maps."""
        heads, kv = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        router = self.n_experts * self.d_model
        layer = self.d_model * (2 * heads + 2 * kv) + max(self.n_experts, 1) * self._feedforward_weights + router
        tables = self.vocab_size * (1 if self.tied else 2) + (self.context if self.positions == "learned" else 0)
        return self.n_layers * layer + tables * self.d_model

    @property
    def active_weights(self) -> int:
        """Those of `n_weights` that one token is multiplied with or looked up in: of the experts, its own."""
        idle = max(self.n_experts - self.experts_per_token, 0)
        return self.n_weights - self.n_layers * idle * self._feedforward_weights

    def _norm_parameters(self, width: int) -> int:
        return width * (2 if self.norm == "layernorm" and self.biases else 1)

    @property
    def _feedforward_weights(self) -> int:
        return self.d_model * (3 if self.gated else 2) * self.d_ffn

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


def _is_kth(layer: int, k: int, *, first: bool = False) -> bool:
    """Whether layer 0, 1, ... is the last (or first) of its k; never for k = 0."""
    return k > 0 and (layer if first else layer + 1) % k == 0


def _require_whole(field: str, value: object, *, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{field}={value!r} is not a whole number; write it as an integer, for example 64")
    if not lowest <= value <= LARGEST_SIZE:
        raise ValueError(f"{field}={value} is out of range; use {lowest} to {LARGEST_SIZE}")


def _require_number(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{field}={value!r} is not a number; write it as a number")
    if not 0 <= value <= LARGEST_SIZE:
        raise ValueError(f"{field}={value!r} is out of range; use 0 to {LARGEST_SIZE}")


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
        raise ValueError(f"{unknown('preset', name, PRESETS)} or the path of a config.json")
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
