"""The networks whose growth is predicted and measured: a grid of sizes, every other choice, deep ones, and a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from empirics.initialisation import InitialisationSpec
from theory.architecture import Architecture, method, preset
from theory.initialisation import INITS, deepnorm

SEEDS = (0, 1, 2)
MORE_SEEDS = tuple(range(8))  # deep, and on a text: growth of one network differs by 7 to 8 % from the next one's
MANY_SEEDS = tuple(range(32))  # deep and Post-LN: by 20 %
BATCH = 4
VOCABULARY = 8192  # large, so that few tokens of a sequence are equal
WIDTHS, DEPTHS, LENGTHS = (64, 128, 256, 512), (4, 8, 24), (32, 128)
GRID_METHODS = ("Vanilla", "Scaled Embed", "Embed LN")
BASE_WIDTH, BASE_DEPTH, BASE_LENGTH = 256, 8, 64
DEEP = 24
TEXT = "sympy"


class Case(NamedTuple):
    """A row of the table.

    Attributes:
        text: whose tokens the networks read; the prediction knows which of them are equal. Empty for random tokens,
            two of which are equal once in V.
    """

    group: str
    label: str
    architecture: Architecture
    seq_len: int
    seeds: tuple[int, ...] = SEEDS
    text: str = ""

    @property
    def spec(self) -> InitialisationSpec:
        return InitialisationSpec(
            architecture=self.architecture,
            label=self.label,
            preset=self.group,
            seeds=self.seeds,
            seq_len=self.seq_len,
            batch_size=BATCH,
            tokens="text" if self.text else "random",
            jacobian_tokens=0,
            **({"data": self.text} if self.text else {}),
        )


def network(d_model: int, n_layers: int) -> Architecture:
    """The paper's transformer at a size, with heads of 32 or 64."""
    heads = max(2, d_model // 64)
    sizes: dict[str, Any] = {
        "d_model": d_model, "n_layers": n_layers, "n_heads": heads, "n_kv_heads": heads, "d_head": d_model // heads,
        "d_ffn": 4 * d_model, "vocab_size": VOCABULARY, "context": 128,
    }  # fmt: skip
    return replace(preset("tiny"), **sizes)


def grid() -> Iterator[Case]:
    """Every width, depth, length and method."""
    for name in GRID_METHODS:
        for d in WIDTHS:
            for n in DEPTHS:
                for t in LENGTHS:
                    yield Case("grid", f"{name}, d {d}, N {n}, T {t}", method(network(d, n), name), t)


def variants() -> Iterator[Case]:
    """Every other choice varied one at a time from d 256, N 8, T 64 with Scaled Embed."""
    plain = network(BASE_WIDTH, BASE_DEPTH)
    base = plain.with_embedding("scaled-embed")
    large = base.with_init("xavier")  # branches of order one: the hard case
    loud = replace(INITS["xavier"], query_key=1 / 16)
    windows = replace(large, window=8, global_every=2)
    changes: dict[str, Architecture] = {
        **{f"init {name}": base.with_init(name) for name in INITS},
        "Vanilla, init xavier": plain.with_init("xavier"),
        "Embed Detach": plain.with_embedding("embed-detach"),
        **{f"activation {name}": replace(large, activation=name) for name in ("identity", "gelu", "gelu-tanh", "silu")},
        "activation relu-squared": replace(base, activation="relu-squared"),
        "SwiGLU": replace(large, activation="silu", gated=True),
        "GeGLU": replace(large, activation="gelu", gated=True),
        "ReGLU": replace(large, activation="relu", gated=True),
        "bilinear": replace(large, activation="identity", gated=True),
        "gated squared ReLU": replace(large, activation="relu-squared", gated=True),
        "experts, 2 of 8": replace(large, n_experts=8),
        "experts, 3 of 12, gates over all": replace(
            large, n_experts=12, experts_per_token=3, gates_renormalised=False, d_ffn=BASE_WIDTH
        ),
        "RMSNorm": replace(large, norm="rmsnorm"),
        "grouped heads": replace(large, n_kv_heads=1),
        **{f"positions {name}": replace(large, positions=name) for name in ("none", "learned", "alibi")},
        "positions sinusoidal": replace(base, positions="sinusoidal"),
        "half of RoPE": replace(large, rope_fraction=0.5),
        "a quarter of RoPE": replace(large, rope_fraction=0.25),
        "RoPE, base 100": replace(large, rope_base=100.0),
        "RoPE of a quarter of the frequency": replace(large, rope_stretch=4.0),
        "every second layer without positions": replace(large, nope_every=2),
        "window 8": replace(large, window=8),
        "window 8, every second layer whole": windows,
        "window 8, every second layer whole, RoPE of base 100 in a window": replace(windows, window_rope_base=100.0),
        "window 8, ALiBi": replace(large, window=8, positions="alibi"),
        "QK-norm a head": replace(large, qk_norm="head", norm="rmsnorm"),
        "QK-norm, full": replace(large, qk_norm="full", norm="rmsnorm"),
        "logit variance 1": replace(large, init=loud),
        "logit variance 4": replace(large, init=loud, attention_scale=2 / 8),
        "logit variance 16 (outside)": replace(large, init=loud, attention_scale=4 / 8),
        "soft-cap 2": replace(large, init=loud, attention_softcap=2.0),
        "parallel": replace(large, parallel=True, shared_norm=True),
        "parallel, two norms": replace(large, parallel=True),
        "Post-LN": replace(base, block="post-ln", final_norm=False),
        "Post-LN, init xavier": replace(large, block="post-ln", final_norm=False),
        "DeepNorm": replace(
            base.with_init(deepnorm(base.n_layers)), block="post-ln", shortcut_multiplier=16**0.25, final_norm=False
        ),
        "Peri-LN": replace(base, block="peri-ln"),
        "Peri-LN, Vanilla": replace(plain, block="peri-ln"),
        "OLMo 2's order": replace(base, block="branch-ln", norm="rmsnorm", qk_norm="full"),
        "residual multiplier 0.22": replace(large, residual_multiplier=0.22),
        "LayerNorm scaling": replace(large, norm_depth_scaling=True),
        "logit multiplier 8, logits capped at 2": replace(large, logit_multiplier=8.0, logit_softcap=2.0),
        "biases and a tied head": replace(base, biases=True, tied=True),
        "a tied head, Vanilla": replace(plain, tied=True),
        "no final norm": replace(large, final_norm=False),
        "Peri-LN, no final norm, init xavier": replace(large, block="peri-ln", final_norm=False),
        "Post-LN with a final norm": replace(base, block="post-ln"),
        "eps 0.1, Vanilla": replace(plain, eps=0.1),
        "narrow, d 16 (outside)": network(16, 8).with_embedding("scaled-embed"),
    }
    return (Case("variant", label, a, BASE_LENGTH) for label, a in changes.items())


def deep() -> Iterator[Case]:
    """Branches of order one in 24 layers, where errors of a layer would add up."""
    base = network(BASE_WIDTH, DEEP).with_embedding("scaled-embed")
    large = base.with_init("xavier")
    changes = {
        "init xavier": large,
        "Peri-LN": replace(base, block="peri-ln"),
        "Peri-LN, init xavier": replace(large, block="peri-ln"),
        "OLMo 2's order": replace(base, block="branch-ln", norm="rmsnorm", qk_norm="full"),
        "Post-LN, init xavier": replace(large, block="post-ln", final_norm=False),
        "parallel, two norms, init xavier": replace(large, parallel=True),
    }
    for label, a in changes.items():
        seeds = MANY_SEEDS if a.block == "post-ln" else MORE_SEEDS
        yield Case("deep", f"N {DEEP}, {label}", a, BASE_LENGTH, seeds)


def on_text() -> Iterator[Case]:
    """A text in place of random tokens."""
    for name in (*GRID_METHODS, "Xavier + Scaled Embed"):
        a = method(network(BASE_WIDTH, BASE_DEPTH), name)
        yield Case("text", f"{TEXT}, {name}", a, BASE_LENGTH, MORE_SEEDS, TEXT)


def cases() -> list[Case]:
    """Every row."""
    return [*grid(), *variants(), *deep(), *on_text()]
