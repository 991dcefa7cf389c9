"""True norms of sub-layers at initialisation, for every sharp statement of a quantity that is sampled here.

A sharp statement on one of these quantities needs nothing more: its `covers` says which variant it speaks of and
its `domain` where it holds. A new quantity needs one function (statement) -> settings, and one line in `SAMPLERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from empirics.adversaries import normal
from empirics.bench_attention import FullAttention
from empirics.benches import small_architecture
from empirics.model import Attention, FeedForward, make_norm
from empirics.norm_settings import PRECISE, Setting, fill, to_fill
from empirics.observables import opnorm, true_each_token, true_feedforward, true_half_layer
from empirics.probes import PlainAttention
from empirics.routed_samples import experts, tied_tables
from empirics.spectral import lanczos_opnorm
from theory.statements import Statement, catalogue

WIDTHS = (64, 128, 256, 512)
HEADS = 4


def matrices(statement: Statement) -> Iterator[Setting]:
    """Normal matrices, square and not."""
    sigma = 0.7
    for rows, columns in ((16, 16), (64, 64), (64, 256), (256, 256), (512, 512)):
        values = {"sigma": sigma, "rows": rows, "columns": columns}

        def draw(seed: int, rows: int = rows, columns: int = columns) -> float:
            return opnorm(sigma * normal(seed, rows, columns)).item()

        yield Setting(label=f"{rows} x {columns}", values=values, draw=draw, seeds=64)


def feedforward(statement: Statement, d: int, d_ffn: int) -> FeedForward:
    """A sub-layer of the statement's variant, to fill."""
    variant = {name: values[0] for name, values in statement.covers.items()}
    return to_fill(FeedForward, {"d_model": d, "d_ffn": d_ffn, **variant}, torch.float64)


def feedforwards(statement: Statement) -> Iterator[Setting]:
    """|d FFN / d u| at one normalised normal token."""
    for d in WIDTHS:
        for ratio in (1, 4, 8) if d == 256 else (4,):
            sigmas = {"enter": 0.8 / math.sqrt(d), "leave": 0.7 / math.sqrt(d)}
            module = feedforward(statement, d, ratio * d)
            if module.gate is not None:
                sigmas["gate"] = 0.9 / math.sqrt(d)

            def draw(seed: int, d: int = d, module: FeedForward = module, sigmas: Any = sigmas) -> float:
                fill(module, sigmas, torch.Generator().manual_seed(seed))
                u = torch.nn.functional.rms_norm(normal(seed + 1000, 1, d), (d,))
                return true_feedforward(module, u).item()

            values = {"sigma_1": sigmas["enter"], "sigma_2": sigmas["leave"], "sigma_3": sigmas.get("gate", 0.0)}
            values |= {"d": d, "d_ffn": ratio * d}
            seeds = 16 if d == 512 else 40
            if "relu-squared" in statement.covers.get("activation", ()):  # a draw varies by 6 to 12 per cent
                seeds = {64: 200, 128: 200, 256: {1: 1000, 4: 200, 8: 256}[ratio], 512: 60}[d]
            yield Setting(label=f"d {d}, d_ffn {ratio * d}", values=values, draw=draw, seeds=seeds)


def half_layers(statement: Statement) -> Iterator[Setting]:
    """|I + J| of half-layers: of one feed-forward token, or of attention over a sequence if it speaks of heads."""
    if "n_heads" not in statement.parameters:
        return feedforward_halves(statement)
    return attention_halves(other_heads(statement)) if masked(statement) else full_halves()


def masked(statement: Statement) -> bool:
    """Whether it is of attention with a causal mask."""
    return True in statement.covers.get("causal", (True,))


def feedforward_halves(statement: Statement) -> Iterator[Setting]:
    """|I + J| at one token of a pre-norm feed-forward half-layer, from weak branches to strong ones, few units to many.

    Where the domain starts at 512 units, there is a row at that edge besides.
    """
    s = 0.3
    squared = "relu-squared" in statement.covers.get("activation", ())
    rows = [
        (d, 4 * d, j) for d, j in ((64, 0.1), (64, 1.0), (256, 0.02), (256, 0.1), (256, 0.5), (256, 3.0), (512, 0.5))
    ]
    rows += [(256, d_ffn, 0.5) for d_ffn in sorted({64, 256, 2048, int(statement.domain["d_ffn"][0])})]
    for d, d_ffn, strength in rows:
        enter = 0.6 / math.sqrt(d)
        few = 9 / (1 + math.sqrt(d_ffn / d)) ** 2  # keeps |W_2| |W_1| what it is with 4d units
        sigmas = {"enter": enter, "leave": strength * s / (enter * d) * few}
        module = feedforward(statement, d, d_ffn)
        if module.gate is not None:
            sigmas["gate"] = 0.9 / math.sqrt(d)
        norm = make_norm(small_architecture({"d_model": d, "eps": 1e-12})).double().requires_grad_(False)

        def draw(seed: int, d: int = d, module: Any = module, sigmas: Any = sigmas, norm: Any = norm) -> float:
            fill(module, sigmas, torch.Generator().manual_seed(seed))
            x = s * torch.nn.functional.layer_norm(normal(seed + 1000, 1, d), (d,))
            return true_half_layer(module, norm, x).item()

        values = {"sigma_1": enter, "sigma_2": sigmas["leave"], "sigma_3": sigmas.get("gate", 0.0)}
        values |= {"s": s, "d": d, "d_ffn": d_ffn}
        # Where a few units decide, a norm varies more from draw to draw.
        seeds = 48 if squared and strength > 0.1 and d < 512 else 16 if module.gate is not None else 12
        if squared and module.gate is not None and strength > 0.1:
            seeds = 128 if d < 512 else 48
        if d_ffn != 4 * d:
            seeds = 256 if squared else 48 if module.gate is not None else 12
        units = "" if d_ffn == 4 * d else f", d_ffn {d_ffn}"
        yield Setting(label=f"d {d}{units}, |J| about {3 * strength:.2g}", values=values, draw=draw, seeds=seeds)


class Heads(NamedTuple):
    """Query heads, the width of each, and how many share a key and a value."""

    number: int = HEADS
    width: int = 0  # 0: together as wide as the stream
    group: int = 1

    def at(self, d: int) -> Heads:
        return self._replace(width=self.width or d // self.number)

    @property
    def label(self) -> str:
        """Nothing where they fill the stream by themselves."""
        if self.group == 1 and not self.width:
            return ""
        shared = "" if self.group == 1 else f", {self.group} to a key"
        return f", {self.number} heads of {self.width}{shared}"


FILLING = Heads()
# Together half, two and four times as wide as the stream; wide ones; in groups.
OTHER_HEADS = (Heads(4, 32), Heads(8, 64), Heads(16, 64), Heads(2, 256), Heads(4, 256, 4), Heads(8, 32, 4))
SEQUENCES = 48  # seeds of those


def other_heads(statement: Statement) -> tuple[Heads, ...]:
    """Those, for a statement that takes groups of heads."""
    return OTHER_HEADS if "kv_group" in statement.parameters else ()


def attention_symbols(d: int, length: int, heads: Heads, logit_variance: float, c_VO: float) -> dict[str, Any]:
    """What statements of attention take."""
    values = {"c_VO": c_VO, "n_tokens": length, "d": d, "n_heads": heads.number, "d_head": heads.width}
    return values | {"kv_group": heads.group, "logit_variance": logit_variance, "numbers": d * length}


def half_layer(
    d: int,
    length: int,
    a: float,
    strength: float,
    heads: Heads,
    seeds: int,
    *,
    causal: bool = True,
    device: str = "cpu",
) -> Setting:
    """|I + J| of a pre-norm attention half-layer over a sequence of normal tokens of one std."""
    s, c_V = 0.3, 0.9
    c_VO = (strength * s) ** 2
    module, sigmas = attention(d, a, c_V, c_VO / c_V, heads, causal=causal)
    norm = make_norm(small_architecture({"d_model": d, "eps": 1e-12})).requires_grad_(False).to(device)

    def draw(seed: int) -> float:
        fill(module.to(device), sigmas, torch.Generator(device).manual_seed(seed))
        x = (s * torch.nn.functional.layer_norm(normal(seed + 1000, 1, length, d), (d,))).float().to(device)
        branch = PlainAttention(module)
        return lanczos_opnorm(lambda x: x + branch(norm(x)), x, tolerance=PRECISE, limit=100).value

    values = attention_symbols(d, length, heads.at(d), a, c_VO) | {"s": s}
    size = 2.6 * (1.4 if causal else 1) * strength
    label = f"attention: d {d}, T {length}, logit variance {a:g}, |J| about {size:.2g}{heads.label}"
    return Setting(label=label, values=values, draw=draw, seeds=seeds)


def attention_halves(others: tuple[Heads, ...]) -> Iterator[Setting]:
    """|I + J| with a causal mask, from weak branches to strong ones and over heads."""
    for d, length, a, strength in ((64, 16, 0.05, 0.5), (256, 16, 0.05, 0.1), (256, 16, 0.05, 0.5),
                                   (256, 16, 0.05, 3.0), (256, 32, 0.16, 0.5), (256, 64, 0.1, 0.5),
                                   (512, 16, 0.05, 0.5), (256, 16, 1.0, 0.5), (256, 16, 1.0, 3.0),
                                   (64, 16, 16.0, 0.5), (256, 2, 0.1, 0.5), (256, 2, 0.2, 3.0)):  # fmt: skip
        yield half_layer(d, length, a, strength, FILLING, 64 if a > 0.5 or length < 16 else 8)
    for heads in others:
        yield half_layer(256, 16, 0.05, 0.5, heads, SEQUENCES)


def full_halves() -> Iterator[Setting]:
    """|I + J| without a mask."""
    for d, length, a, strength, heads in ((64, 16, 0.05, 0.5, FILLING), (256, 16, 0.05, 0.1, FILLING),
                                          (256, 16, 0.05, 0.5, FILLING), (256, 16, 0.2, 3.0, FILLING),
                                          (256, 64, 0.2, 0.5, FILLING), (256, 16, 0.05, 0.5, Heads(4, 32)),
                                          (256, 16, 0.05, 0.5, Heads(8, 64, 4)),
                                          (256, 16, 4.0, 0.5, FILLING), (256, 4, 1.0, 0.5, FILLING)):  # fmt: skip
        yield half_layer(d, length, a, strength, heads, SEQUENCES, causal=False)


def attention(
    d: int, logit_variance: float, c_V: float, c_O: float, heads: Heads = FILLING, *, causal: bool = True
) -> tuple[Attention, dict[str, float]]:
    """An attention sub-layer to fill, and its weights' stds."""
    count, width, group = heads.at(d)
    stds = {"query": logit_variance**0.25, "key": logit_variance**0.25, "value": c_V**0.5}
    sizes = {"d_model": d, "n_heads": count, "n_kv_heads": count // group, "d_head": width}
    module = to_fill(Attention if causal else FullAttention, sizes)
    found = {name: std / math.sqrt(d) for name, std in stds.items()}
    return module, found | {"output": c_O**0.5 / math.sqrt(count * width)}


def attentions(statement: Statement) -> Iterator[Setting]:
    """|J_u| over a normal input's whole sequence: without a mask, of every kind if it speaks of kinds, or plain."""
    if not masked(statement):
        return full_attentions()
    return attention_kinds() if "rotary" in statement.parameters else plain_attentions(other_heads(statement))


# Fields of `Architecture` with the symbols that stand for them.
KINDS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "RoPE": ({"positions": "rope"}, {"rotary": 1.0}),
    "half of RoPE, pairs of heads": (
        {"positions": "rope", "rope_fraction": 0.5, "n_kv_heads": 2}, {"rotary": 0.5, "kv_group": 2},
    ),
    "ALiBi": ({"positions": "alibi"}, {"alibi": 1}),
    "window 4": ({"window": 4}, {"n_seen": 4}),
    "soft-cap 1": ({"attention_softcap": 1.0}, {"softcap": 1.0}),
    "QK-norm of a head": ({"qk_norm": "head"}, {"qk_norm": 1}),
    "QK-norm in full": ({"qk_norm": "full"}, {"qk_norm": 2}),
    "RoPE, pairs of heads, window 8, soft-cap 2, QK-norm of a head": (
        {"positions": "rope", "n_kv_heads": 2, "window": 8, "attention_softcap": 2.0, "qk_norm": "head"},
        {"rotary": 1.0, "kv_group": 2, "n_seen": 8, "softcap": 2.0, "qk_norm": 1},
    ),
}  # fmt: skip


def attention_kinds() -> Iterator[Setting]:
    """|J_u| with every kind of position, mask, head and logit, at logit variance 1; one of larger logits."""
    d, length, d_head, c_V, c_O = 64, 16, 16, 0.9, 0.8
    for kind, a in (*((kind, 1.0) for kind in KINDS), ("RoPE", 16.0)):
        fields, symbols = KINDS[kind]
        sizes = {"d_model": d, "n_heads": HEADS, "n_kv_heads": HEADS, "d_head": d_head, **fields}
        if "qk_norm" in fields:  # the scale then makes the logits' variance
            sizes["attention_scale"] = math.sqrt(a / d_head)
        module = Attention(small_architecture(sizes)).requires_grad_(False)
        stds = {"query": a**0.25, "key": a**0.25, "value": c_V**0.5, "output": c_O**0.5}
        sigmas = {name: std / math.sqrt(d) for name, std in stds.items()}

        def draw(seed: int, module: Any = module, sigmas: Any = sigmas) -> float:
            fill(module, sigmas, torch.Generator().manual_seed(seed))
            u = torch.nn.functional.layer_norm(normal(seed + 1000, 1, length, d), (d,)).float()
            return lanczos_opnorm(PlainAttention(module), u, tolerance=PRECISE, limit=100).value

        values = {"c_VO": c_V * c_O, "n_tokens": length, "d": d, "n_heads": HEADS, "d_head": d_head, "kv_group": 1}
        values |= {"rotary": 0.0, "rope_base": 10_000.0, "alibi": 0, "n_seen": length, "softcap": 0.0, "qk_norm": 0}
        values |= {"logit_variance": a, "numbers": d * length, **symbols}
        yield Setting(label=f"{kind}, logit variance {a:g}", values=values, draw=draw, seeds=256)


def sub_layer(
    d: int, length: int, a: float, heads: Heads, seeds: int, *, causal: bool = True, device: str = "cpu"
) -> Setting:
    """|J_u| of attention without positions."""
    c_V, c_O = 0.9, 0.8
    module, sigmas = attention(d, a, c_V, c_O, heads, causal=causal)

    def draw(seed: int) -> float:
        fill(module.to(device), sigmas, torch.Generator(device).manual_seed(seed))
        u = torch.nn.functional.layer_norm(normal(seed + 1000, 1, length, d), (d,)).float().to(device)
        return lanczos_opnorm(PlainAttention(module), u, tolerance=PRECISE, limit=100).value

    values = attention_symbols(d, length, heads.at(d), a, c_V * c_O)
    return Setting(label=f"d {d}, T {length}, logit variance {a:g}{heads.label}", values=values, draw=draw, seeds=seeds)


def plain_attentions(others: tuple[Heads, ...]) -> Iterator[Setting]:
    """|J_u| with a causal mask, from near-uniform softmax rows to uneven ones, and over heads."""
    for d, length, a in ((64, 16, 0.05), (256, 16, 0.05), (256, 32, 0.05), (256, 16, 0.16), (512, 16, 0.16),
                         (64, 16, 1.0), (256, 16, 1.0), (256, 64, 1.0), (256, 32, 4.0), (64, 16, 16.0),
                         (256, 2, 0.1), (256, 2, 0.2)):  # fmt: skip
        # Beyond near-uniform rows, and of few tokens, a norm varies by some ten per cent from draw to draw.
        yield sub_layer(d, length, a, FILLING, 64 if a > 0.5 or length < 16 else 6)
    for heads in others:
        yield sub_layer(256, 16, 0.05, heads, SEQUENCES)
    if not others:  # a simulated mean takes any
        yield sub_layer(256, 16, 0.05, Heads(16, 64), 6)
        return
    for heads in (Heads(8, 64, 2), Heads(4, 128, 4)):
        yield sub_layer(256, 16, 1.0, heads, 64)


def full_attentions() -> Iterator[Setting]:
    """|J_u| without a mask."""
    for d, length, a, heads in ((64, 16, 0.05, FILLING), (256, 16, 0.05, FILLING), (256, 16, 0.2, FILLING),
                                (256, 64, 0.2, FILLING), (256, 16, 0.2, Heads(4, 32)), (256, 16, 0.2, Heads(8, 64, 4)),
                                (256, 16, 0.2, Heads(2, 256)), (256, 16, 1.0, FILLING), (256, 16, 4.0, FILLING),
                                (256, 4, 1.0, FILLING)):  # fmt: skip
        yield sub_layer(d, length, a, heads, SEQUENCES, causal=False)


def embeddings(statement: Statement) -> Iterator[Setting]:
    """Normalised tables, with and without positions, small and large beside eps; one sequence repeats its tokens."""
    for d, length, std, positions, repeats in ((64, 16, 0.02, 0.0, 1), (64, 128, 1.0, 1.0, 1), (256, 64, 0.02, 1.0, 1),
                                               (128, 64, 0.002, 0.0, 1), (64, 16, 0.02, 0.0, 4)):  # fmt: skip
        module = make_norm(small_architecture({"d_model": d})).double().requires_grad_(False)

        def draw(
            seed: int, d: int = d, length: int = length, std: float = std, positions: float = positions,
            repeats: int = repeats, norm: Any = module,
        ) -> float:  # fmt: skip
            tables = std * normal(seed, length // repeats, d).repeat(repeats, 1)
            if positions:
                tables = tables + std * normal(seed + 1000, length, d)
            # Places of different tokens have rows of their own: each group is a block by itself.
            slopes = true_each_token(norm, tables).square().view(repeats, -1)
            return math.sqrt(float(slopes.sum(0).max() + positions * slopes.max()))

        values = {"embedding_gradient": 1.0, "multiplier": 1.0, "position_rows": positions, "d": d, "n_tokens": length}
        values |= {"sigma_e": std * math.sqrt(1 + positions), "eps": 1e-5, "largest_count": float(repeats)}
        label = (
            f"d {d}, T {length}, std {std:g}"
            + (", positions" if positions else "")
            + (", every token four times" if repeats > 1 else "")
        )
        yield Setting(label=label, values=values, draw=draw, seeds=32)


SAMPLERS: dict[str, Callable[[Statement], Iterator[Setting]]] = {
    "matrix_opnorm": matrices,
    "ffn_jacobian": feedforwards,
    "half_layer_jacobian": half_layers,
    "attention_jacobian": attentions,
    "embedding_jacobian": embeddings,
    "experts_jacobian": experts,
    "tied_jacobian": tied_tables,
}


def settings(statement: Statement) -> list[Setting]:
    """The rows of a sharp statement.

    Raises:
        ValueError: nothing samples its quantity; the message says what to write.
    """
    name = statement.quantity.name
    if name not in SAMPLERS:
        raise ValueError(
            f"nothing samples {name}; write a function in empirics/norm_samples.py and list it in SAMPLERS"
        )
    return list(SAMPLERS[name](statement))


def sharp_statements() -> dict[str, Statement]:
    """Every sharp statement of the catalogue by name."""
    return {name: statement for name, statement in catalogue().items() if statement.kind == "sharp"}


def claim(statement: Statement, setting: Setting) -> dict[str, Any]:
    """What a statement says of a setting: its value, its target, and whether it claims it there."""
    return {
        "predicted": setting.predicted(statement),
        "target": statement.target,
        "in_domain": setting.inside(statement),
    }


def measure(statement: Statement, setting: Setting) -> dict[str, Any]:
    """One row: predicted, mean and standard error of the drawn norms; JSON-ready."""
    norms = torch.tensor([setting.draw(seed) for seed in range(setting.seeds)], dtype=torch.float64)
    mean = norms.mean().item()
    return {
        "statement": statement.name,
        "label": setting.label,
        "seeds": setting.seeds,
        "measured": mean,
        "standard_error": (norms.std() / math.sqrt(setting.seeds)).item() / mean,
        **claim(statement, setting),
    }
