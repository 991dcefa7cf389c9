"""A model of the same class in a smaller size: the same heads, fewer of them; the same layers, fewer of them.

What a width divides stays in proportion (feed-forwards, numbers of heads), what belongs to a head stays (its width, the
scale of its logits, its rotary share), and so do vocabulary, context, experts and every multiplier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from theory.architecture import Architecture

# Keys of transformers' configurations that count features of the residual stream's kind, whichever class has them.
PROPORTIONAL = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "n_inner",
    "ffn_dim",
    "ffn_hidden_size",
    "word_embed_proj_dim",
)
GROUPS = ("num_key_value_heads", "num_kv_heads")
PER_LAYER = ("layer_types", "no_rope_layers", "attention_layers", "mlp_only_layers")


def narrower(d_model: int, n_heads: int, d_head: int, n_kv_heads: int, width: int) -> tuple[int, int]:
    """Heads and groups of keys and values at another width, each head as wide as it was.

    Raises:
        ValueError: the width holds no whole number of heads; the message names one that does.
    """
    heads = width * n_heads / d_model
    if heads < 1 or heads != int(heads):
        unit = d_model // n_heads if d_model % n_heads == 0 else d_model
        fits = sorted({max(unit, width // unit * unit), (width // unit + 1) * unit})
        raise ValueError(
            f"--width {width} leaves {n_heads} heads of {d_head} no whole number in proportion to {d_model}; "
            f"use --width {' or '.join(map(str, fits))}"
        )
    groups = max(1, n_kv_heads * int(heads) // n_heads)
    while int(heads) % groups:
        groups -= 1
    return int(heads), groups


def reduced_architecture(architecture: Architecture, width: int | None) -> tuple[Architecture, tuple[str, ...]]:
    """One of our own at another width, and what was changed.

    Raises:
        ValueError: as `narrower`.
    """
    a = architecture
    if width is None or width == a.d_model:
        return a, ()
    heads, groups = narrower(a.d_model, a.n_heads, a.d_head, a.n_kv_heads, width)
    d_ffn = max(1, round(a.d_ffn * width / a.d_model))
    sizes = {"d_model": width, "n_heads": heads, "n_kv_heads": groups, "d_ffn": d_ffn}
    notes = (f"{name} {getattr(a, name)} -> {size}" for name, size in sizes.items() if getattr(a, name) != size)
    return replace(a, **sizes), tuple(notes)


def reduced_settings(
    full: Mapping[str, Any], names: Mapping[str, str], *, n_layers: int | None, width: int | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A configuration at another depth and width, and what was changed.

    Args:
        full: a configuration of transformers with every key of its class.
        names: the class's own name of a usual key, where it has another (its `attribute_map`).

    Raises:
        ValueError: as `narrower`; or the configuration does not say its sizes.
    """
    new = dict(full)
    d_key, n_key, h_key = (names.get(key, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    needed = {"--layers": (n_key,) * (n_layers is not None), "--width": (d_key, h_key) * (width is not None)}
    for option, keys in needed.items():
        if lacking := [key for key in keys if not isinstance(new.get(key), int)]:
            raise ValueError(f"this class does not say {' and '.join(lacking)}; leave out {option}")
    if width is not None and width != new[d_key]:
        d, h = new[d_key], new[h_key]
        kv = next((key for key in GROUPS if isinstance(new.get(key), int)), None)
        heads, groups = narrower(d, h, new.get("head_dim") or d // h, new[kv] if kv else h, width)
        new |= {d_key: width, h_key: heads} | ({kv: groups} if kv else {})
        new |= {key: max(1, round(new[key] * width / d)) for key in PROPORTIONAL if isinstance(new.get(key), int)}
    if n_layers is not None and n_layers != new[n_key]:
        new |= {n_key: n_layers} | _fewer_layers(new, n_layers, new[n_key])
    changed = (key for key in new if new[key] != full.get(key) and not isinstance(new[key], list))
    return new, tuple(f"{key} {full[key]} -> {new[key]}" for key in changed)


def _fewer_layers(full: Mapping[str, Any], n_layers: int, before: int) -> dict[str, Any]:
    """Lists with an entry a layer, cut; or repeated from their start where there are more layers."""
    lists: dict[str, Any] = {}
    for key in PER_LAYER:
        entries = full.get(key)
        if isinstance(entries, list) and len(entries) >= before:
            lists[key] = [entries[n % before] for n in range(n_layers)]
    kinds = full.get("attention_types")
    if isinstance(kinds, list):  # GPT-Neo: [[kinds, repeats], ...]
        every = [kind for names, repeats in kinds for kind in list(names) * int(repeats)]
        lists["attention_types"] = [[[every[n % len(every)] for n in range(n_layers)], 1]]
        lists["attention_layers"] = lists["attention_types"][0][0]
    return lists
