"""What another architecture changes, in the numbers that a model's own code sets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from theory.architecture import Architecture

WRITERS = ("output", "ffn_out")
INSIDE = ("query", "key", "value", "output", "ffn_in", "ffn_gate", "ffn_out", "router")
NAMES = {
    "embedding": "token table",
    "position": "position table",
    "query": "query",
    "key": "key",
    "value": "value",
    "output": "attention output",
    "ffn_in": "feed-forward up",
    "ffn_gate": "feed-forward gate",
    "ffn_out": "feed-forward down",
    "router": "router",
    "head": "head",
}
NORMS = {"layernorm": "a LayerNorm", "rmsnorm": "an RMSNorm"}


def differences(before: Architecture, after: Architecture) -> str:
    """What treatment and initialisation of `after` set other than `before`; empty where no printed digit differs.

    Both have the same sizes. Standard deviations are the true ones, after any cut.

    >>> from theory.architecture import preset
    >>> differences(preset("wide"), preset("wide").with_embedding("scaled-embed"))
    'embeddings times 16 (sqrt d_model)'
    """
    return "; ".join((*_embedding(before, after), *_matrices(before, after)))


def _embedding(before: Architecture, after: Architecture) -> list[str]:
    found: list[str] = []
    if (times := f"{after.embedding_multiplier:.4g}") != f"{before.embedding_multiplier:.4g}":
        tokens = "token embeddings" if after.positions in ("learned", "sinusoidal") else "embeddings"
        root = " (sqrt d_model)" if math.isclose(after.embedding_multiplier, math.sqrt(after.d_model)) else ""
        found.append(f"{tokens} times {times}{root}")
    if after.embedding_norm != before.embedding_norm:
        found.append(f"{NORMS[after.norm] if after.embedding_norm else 'no norm'} after the embeddings")
    if (times := f"{after.embedding_gradient:.4g}") != f"{before.embedding_gradient:.4g}":
        found.append(f"the gradient of the embeddings times {times}")
    return found


def _matrices(before: Architecture, after: Architecture) -> list[str]:
    old, new = _stds(before), _stds(after)
    groups: dict[str, list[str]] = {}
    for name, std in new.items():
        if std != old[name]:
            groups.setdefault(std, []).append(name)
    # The many first: `those that write to the stream` refers to them.
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    writers = any(name in WRITERS for names in groups.values() for name in names)
    found = [
        f"{_called(names, tuple(new), first=n == 0, writers=writers)}{' of std' if n == 0 else ''} {std}"
        for n, (std, names) in enumerate(ordered)
    ]
    if after.init.distribution != before.init.distribution:
        found.append(f"weights drawn {after.init.distribution}")
    return found


def _stds(a: Architecture) -> dict[str, str]:
    """Of the matrices that there are, to three digits: in all layers, or in the first and the last."""
    present = dict.fromkeys(NAMES)
    for name, there in (
        ("position", a.positions == "learned"),
        ("ffn_gate", a.gated),
        ("router", a.n_experts > 0),
        ("head", not a.tied),
    ):
        if not there:
            del present[name]
    ends: list[dict[str, float]] = [a.layer_stds(layer)._asdict() for layer in (0, a.n_layers - 1)]
    spans = {name: [f"{end[name]:.3g}" for end in ends] for name in present}
    return {name: first if first == last else f"{first} to {last}" for name, (first, last) in spans.items()}


def _called(names: Sequence[str], present: Sequence[str], *, first: bool, writers: bool) -> str:
    """What a group of matrices is called; `first` where none is named before it, `writers` where those change too."""
    but = "" if writers else ", but for those that write to the stream,"
    others = [name for name in present if name not in WRITERS]
    inside = [name for name in present if name in INSIDE]
    listed = ", ".join(NAMES[name] for name in names)
    if len(names) == len(present):
        return "all matrices"
    if list(names) == inside:
        return "all matrices inside the layers"
    if list(names) == others:
        return f"matrices{but}"
    if list(names) == [name for name in inside if name not in WRITERS]:
        return f"matrices inside the layers{but}"
    if tuple(names) == WRITERS:
        return f"{'matrices' if first else 'those'} that write to the stream ({listed})"
    return f"{listed} matrices" if first else listed
