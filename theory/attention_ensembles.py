"""Attention norms by simulation, in symbols: every kind of head and position, and half-layers with their shortcut."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from theory.architecture import Architecture
from theory.attention_simulation import OWN_KEYS, plain_attention, simulated, simulated_norms
from theory.random_matrix import elementwise
from theory.statements import Statement, register

VARIANT_DRAWS = 256
LARGEST_VARIANT = 2**13  # numbers in an input, with so many draws
QK_NORMS = ("none", "head", "full")


@register
def attention_half_layer_simulated() -> Statement:
    r"""Predict the mean |I + J| of an attention half-layer where softmax rows are uneven.

    .. math:: E \|I + J\|, \qquad \text{mean over 64 draws of weights and tokens}

    Holds: as `attention-simulated`, all tokens of one std s.
    Why: it is the definition, evaluated on the law that the configuration states. Where rows are even
        `attention-half-layer-sharp` is a closed form.
    """

    def formula(
        c_VO: Any, s: Any, d: Any, n_heads: Any, d_head: Any, n_tokens: Any, logit_variance: Any
    ) -> Any:  # fmt: skip
        def one(
            gain: Any, scale: Any, width: Any, heads: Any, width_of_head: Any, length: Any, variance: Any
        ) -> float:  # fmt: skip
            if gain == 0:
                return 1.0
            a = plain_attention(int(width), int(heads), int(width_of_head), int(length), float(variance))
            return float(simulated_norms(a, a.context, std=float(scale) / math.sqrt(gain)).mean())

        return elementwise("simulated_half_layer", one, c_VO, s, d, n_heads, d_head, n_tokens, logit_variance)

    return simulated(
        "attention-half-layer-simulated", "half_layer_jacobian", formula,
        drawn="independent normal weights and tokens of one std", positions="no positions inside", relations=OWN_KEYS,
    )  # fmt: skip


def variant(
    d: int, heads: int, d_head: int, kv_group: int, n_tokens: int, logit_variance: float, *, rotary: float,
    rope_base: float, alibi: float, n_seen: float, softcap: float, qk_norm: float,
) -> Architecture:  # fmt: skip
    """Attention of a kind, c_V c_O = 1, logits of this variance before a soft-cap and ALiBi.

    Args:
        rotary: fraction of a head's width that RoPE turns, 0 without it.
        alibi: 1 with ALiBi, which excludes RoPE.
        n_seen: tokens that a token sees at most.
        softcap: 0 without one.
        qk_norm: place in `QK_NORMS`; the logits' scale then makes their variance.

    Raises:
        ValueError: a value has no meaning, or two exclude each other; the message says which.
    """
    for name, holds, remedy in (
        ("kv_group", kv_group >= 1 and heads % max(kv_group, 1) == 0, f"use a divisor of the {heads} heads"),
        ("rotary", 0 <= rotary <= 1, "use a fraction from 0 to 1"),
        ("rope_base", 0 < rope_base < math.inf, "use a positive number"),
        ("alibi", alibi in (0, 1), "use 0 or 1"),
        ("alibi", not (alibi and rotary), "use rotary 0 with ALiBi"),
        ("n_seen", n_seen >= 1 and n_seen % 1 == 0, "use a whole number from 1"),
        ("softcap", 0 <= softcap < math.inf, "use a positive number, or 0 for none"),
        ("qk_norm", qk_norm in range(len(QK_NORMS)), "use 0 for none, 1 for each head or 2 for all together"),
    ):
        if not holds:
            raise ValueError(f"{name}={locals()[name]:g} is no setting of attention here; {remedy}")
    a = plain_attention(d, heads, d_head, n_tokens, logit_variance)
    return replace(
        a,
        n_kv_heads=heads // kv_group,
        positions="alibi" if alibi else "rope" if rotary else "none",
        rope_fraction=rotary or 1.0,
        rope_base=rope_base,
        window=int(n_seen) if n_seen < n_tokens else 0,
        attention_softcap=softcap,
        qk_norm=QK_NORMS[int(qk_norm)],
        attention_scale=math.sqrt(logit_variance / d_head) if qk_norm else None,
    )


@register
def attention_variants_simulated() -> Statement:
    r"""Predict the mean norm of the attention sub-layer's Jacobian for any kind of heads, positions and logits.

    .. math:: E \|J_u\|, \qquad \text{mean over 256 draws of weights and tokens}

    Holds: RoPE on all or part of a head or ALiBi, sliding windows, grouped heads, QK-norm of a head or in full,
        soft-caps, and any of them together; logit variance (before a cap and ALiBi) up to 4, widths from 64 to 512,
        at least 16 tokens and 4 heads of width 16, at most 2^13 numbers in a sequence, independent normal weights and
        tokens.
    Why: it is the definition, evaluated on the law that the configuration states; the mean of so many draws has a
        standard error of at most 1 % there.
    """

    def formula(
        c_VO: Any, d: Any, n_heads: Any, d_head: Any, kv_group: Any, n_tokens: Any, logit_variance: Any, rotary: Any,
        rope_base: Any, alibi: Any, n_seen: Any, softcap: Any, qk_norm: Any,
    ) -> Any:  # fmt: skip
        def one(
            gain: Any, width: Any, heads: Any, width_of_head: Any, group: Any, length: Any, variance: Any,
            turned: Any, base: Any, biased: Any, seen: Any, cap: Any, normed: Any,
        ) -> float:  # fmt: skip
            a = variant(
                int(width), int(heads), int(width_of_head), int(group), int(length), float(variance),
                rotary=float(turned), rope_base=float(base), alibi=float(biased), n_seen=float(seen),
                softcap=float(cap), qk_norm=float(normed),
            )  # fmt: skip
            return math.sqrt(gain) * float(simulated_norms(a, a.context, draws=VARIANT_DRAWS).mean())

        return elementwise(
            "simulated_variant", one, c_VO, d, n_heads, d_head, kv_group, n_tokens, logit_variance, rotary, rope_base,
            alibi, n_seen, softcap, qk_norm,
        )  # fmt: skip

    return simulated(
        "attention-variants-simulated", "attention_jacobian", formula,
        drawn="independent normal weights and tokens", positions="RoPE or ALiBi, not both",
        draws=VARIANT_DRAWS, largest=LARGEST_VARIANT,
        domain={"rotary": (0.0, 1.0), "alibi": (0.0, 1.0), "qk_norm": (0.0, 2.0)},
        relations={"alibi and qk_norm are whole numbers": lambda alibi, qk_norm: alibi % 1 == qk_norm % 1 == 0},
    )  # fmt: skip
