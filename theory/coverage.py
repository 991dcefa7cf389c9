"""What is known of each sub-layer: its Jacobian derived, an estimate, bounds with and without activations, a value.

The names in the table are read from the catalogue by what statements say of themselves: quantity, kind, variants
covered, and whether the symbols need activations. A cell without a name states why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from theory.architecture import Activation, Norm
from theory.statements import Statement, catalogue
from theory.symbols import SYMBOLS

Column = Literal["estimate", "upper a priori", "upper a posteriori", "sharp"]
COLUMNS: tuple[Column, ...] = get_args(Column)


@dataclass(frozen=True, slots=True, kw_only=True)
class SubLayer:
    """A row of the table.

    Attributes:
        quantities: of which statements speak of it.
        variant: the choices of a statement's `covers` that make it; each as a set of values any of which will do.
        derived: derivations that have its exact Jacobian.
        foreign: choices that only other sub-layers have; a statement that names one is not of this one.
        symbols: of the theory that are of the variant: a sharp value that takes one speaks of it too.
        usual: as the variant, of what is not the row's subject: a statement that does not name it is of the row.
        reasons: why a column has no statement.
        without: columns whose reason stands although a statement's `covers` leave the row open.
    """

    label: str
    quantities: tuple[str, ...]
    derived: tuple[str, ...]
    reasons: Mapping[Column, str]
    variant: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    symbols: tuple[str, ...] = ()
    usual: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()
    without: tuple[Column, ...] = ()

    def speaks(self, statement: Statement) -> bool:
        """Whether a statement is of this sub-layer in this variant.

        What a bound or an estimate does not name it leaves open; a sharp value is of the plain case.
        """
        if statement.quantity.name not in self.quantities or not statement.covers.keys().isdisjoint(self.foreign):
            return False
        named = self.variant.keys() <= statement.covers.keys() or not set(self.symbols).isdisjoint(statement.parameters)
        if statement.kind == "sharp" and not named:
            return False
        return all(
            any(value in statement.covers.get(name, values) for value in values)
            for name, values in {**self.usual, **self.variant}.items()
        )

    def names(self, column: Column) -> tuple[str, ...]:
        """The statements of a column, in the names' order."""
        if column in self.without:
            return ()
        found = catalogue()
        return tuple(name for name in sorted(found) if column_of(found[name]) == column and self.speaks(found[name]))


def column_of(statement: Statement) -> Column:
    """A bound is a priori if configuration and weights give or bound all of its symbols."""
    if statement.kind != "upper":
        return statement.kind
    known = all(SYMBOLS[name].known != "activations" for name in statement.parameters)
    return "upper a priori" if known else "upper a posteriori"


_SIMULATED = "simulated from the configuration (`theory.attention_simulation`)"
_SMALL_LOGITS = f"attention-sharp at small logits; at large ones {_SIMULATED}"
_NO_NORM = "embedding-upper-aposteriori is the norm itself"
_EMBEDDING: dict[Column, str] = {"sharp": _NO_NORM}
_EMBEDDINGS = ("embedding", "embedding-upper-apriori", "embedding-upper-aposteriori")
_ATTENTION = ("attention_jacobian", "attention_branch", "half_layer_jacobian")


def _norms() -> Iterator[SubLayer]:
    reasons: dict[Column, str] = {
        "sharp": "norm-jacobian-upper is the norm itself at unit gain",
    }
    kinds: tuple[tuple[str, Norm, tuple[str, ...]], ...] = (
        ("LayerNorm", "layernorm", ("layernorm", "norm-gain")),
        ("RMSNorm", "rmsnorm", ("rmsnorm", "norm-gain")),
    )
    for label, norm, chains in kinds:
        yield SubLayer(
            label=label,
            quantities=("norm_jacobian", "norm_jacobian_inverse"),
            derived=chains,
            reasons=reasons,
            variant={"norm": (norm,)},
        )


def _feedforwards() -> Iterator[SubLayer]:
    for gated in (False, True):
        for activation in get_args(Activation):
            yield SubLayer(
                label=f"feed-forward, {activation}{', gated' if gated else ''}",
                quantities=("ffn_jacobian", "ffn_branch", "half_layer_jacobian"),
                derived=("ffn-gated-upper",) if gated else ("ffn-upper",),
                reasons={},
                variant={"activation": (activation,), "gated": (gated,)},
            )
    yield SubLayer(
        label="experts behind a router",
        quantities=("experts_jacobian",),
        derived=("experts-upper",),
        reasons={
            "estimate": "the paper states none",
            "upper a priori": "experts-upper with bounds on one expert, as `theory.stack.rigorous_bound` does",
        },
    )


def _attentions() -> Iterator[SubLayer]:
    kinds: tuple[tuple[str, dict[str, tuple[Any, ...]], tuple[str, ...], tuple[str, ...], str], ...] = (
        ("causal", {}, (), ("attention-upper-apriori",), _SIMULATED),
        ("grouped queries", {"kv_group": (2, 3)}, ("kv_group",), ("attention-general-upper",), _SMALL_LOGITS),
        ("RoPE", {"positions": ("rope",)}, ("rotary",), ("attention-upper-aposteriori",), _SMALL_LOGITS),
        ("ALiBi", {"positions": ("alibi",)}, ("alibi",), ("alibi",), _SIMULATED),
        ("sliding window", {"window": (1, 2, 3)}, ("n_seen",), ("sliding-window",), _SIMULATED),
        ("QK-norm", {"qk_norm": ("head", "full")}, ("qk_norm",), ("qk-norm",), _SIMULATED),
        ("soft-capped logits", {"attention_softcap": (0.5, 5.0)}, ("softcap",), ("soft-cap",), _SMALL_LOGITS),
        (
            "any logit scale", {"attention_scale": (0.0, 3.0)}, ("logit_variance",), ("attention-general-upper",),
            _SMALL_LOGITS,
        ),
        ("without a mask", {"causal": (False,)}, (), ("attention-full-upper",), _SIMULATED),
    )  # fmt: skip
    for label, variant, symbols, chains, sharp in kinds:
        yield SubLayer(
            label=f"attention, {label}",
            quantities=_ATTENTION,
            derived=chains,
            reasons={"sharp": sharp},
            variant=variant,
            symbols=symbols,
            usual={} if "causal" in variant else {"causal": (True,)},
            foreign=("activation", "gated"),
        )


def _embeddings() -> Iterator[SubLayer]:
    bare = {"embedding_norm": (False,)}
    for label in ("tokens", "learned positions", "sinusoidal positions", "scaled", "detached"):
        yield SubLayer(
            label=f"embedding, {label}", quantities=("embedding_jacobian",), derived=_EMBEDDINGS, reasons=_EMBEDDING,
            variant=bare,
        )  # fmt: skip
    yield SubLayer(
        label="embedding, normalised", quantities=("embedding_jacobian",), derived=_EMBEDDINGS, reasons=_EMBEDDING,
        variant={"embedding_norm": (True,)},
    )  # fmt: skip
    path = "the stream's start is as without a tie; tied-upper adds the head's path"
    yield SubLayer(
        label="embedding, tied",
        quantities=("tied_jacobian",),
        derived=("embedding", "tied-upper"),
        reasons={
            "estimate": path,
            "upper a priori": "tied-upper, with a head input of norm at most sqrt(T) R and no count above T",
        },
    )


def sublayers() -> tuple[SubLayer, ...]:
    """Every sub-layer and variant."""
    return (*_norms(), *_feedforwards(), *_attentions(), *_embeddings())


def table() -> Iterator[str]:
    """The table in Markdown, with links to statements and derivations."""
    yield f"| sub-layer | Jacobian derived in | {' | '.join(COLUMNS)} |"
    yield "|" + "---|" * (2 + len(COLUMNS))
    for row in sublayers():
        derived = ", ".join(f"[{name}](#derivation-{name})" for name in row.derived)
        cells = (_cell(row, column) for column in COLUMNS)
        yield f"| {row.label} | {derived} | {' | '.join(cells)} |"


def _cell(row: SubLayer, column: Column) -> str:
    names = row.names(column)
    return ", ".join(f"[{name}](#statement-{name})" for name in names) or f"- ({row.reasons[column]})"
