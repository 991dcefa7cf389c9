"""What is kept of attention: of every head's rows the logits' variance and the probabilities' entropy.

A row is a query's; it sees the keys that the mask leaves it. The first row sees one key alone, so that its logits have
no variance and its entropy is 0 whatever the weights: rows of two keys or more count. All rows of a sequence do,
however long it is: they are taken a block at a time.

Shapes: B batch, T tokens, D d_model, H heads, E head width; t rows of a block, K keys of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from empirics.model import Attention
from empirics.registry import Unavailable
from empirics.residual_stream import widest

ENTRIES = 2**20  # logits of a block, over heads and keys: 4 MB in float32, and a few times that while it is judged


class AttentionRows(NamedTuple):
    """Means over rows and sequences, head by head, (H,) each or (layers, H)."""

    variance: Tensor
    entropy: Tensor
    relative: Tensor


def row_blocks(n_heads: int, length: int) -> Iterator[slice]:
    """The rows of a sequence in turn, as many at a time as a block holds."""
    step = max(1, ENTRIES // (n_heads * length))
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


@torch.no_grad()
def row_statistics(blocks: Iterable[tuple[Tensor, Tensor]]) -> AttentionRows:
    """Logit variance, entropy in nats, and entropy over the log of the number of keys seen.

    Args:
        blocks: of rows: their logits (B, H, t, K), of hidden keys any, and whether they see a key; broadcast to them.

    Raises:
        Unavailable: no row sees two keys.
    """
    sums, n_rows = torch.zeros(()), torch.zeros(())
    for logits, seen in blocks:
        found, rows = _sums(logits, seen)
        sums, n_rows = sums.to(found) + found, n_rows.to(rows) + rows
    if not bool(n_rows.any()):
        raise Unavailable("no row of attention sees two keys; use more tokens")
    return AttentionRows(*(sums / n_rows))


def _sums(logits: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the rows of two keys or more, (3, H), and how many there are, (H,)."""
    logits, count = precise(logits), seen.sum(-1)
    rows = count > 1
    # A row of hidden keys alone, of padding, has no probabilities; it does not count.
    probabilities = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    entropy = torch.special.entr(probabilities).sum(-1)
    relative = entropy / count.clamp(min=2).to(entropy).log()
    centred = logits.masked_fill(~seen, 0.0)
    centred -= (centred.sum(-1) / count.clamp(min=1))[..., None]
    variance = centred.masked_fill_(~seen, 0.0).square_().sum(-1) / count.clamp(min=1)
    found = torch.stack([variance, entropy, relative]).to(widest(logits.device)).masked_fill(~rows, 0.0)
    return found.sum((1, -1)), rows.expand_as(entropy).sum((0, -1))


def precise(x: Tensor) -> Tensor:
    """A constant, in float32 at least."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def attention_rows(attention: Attention, u_BTD: Tensor, documents_BT: Tensor | None = None) -> AttentionRows:
    """The statistics of our own attention's rows on what it reads.

    Args:
        documents_BT: of its tokens, as `Transformer.documents` has them.

    Raises:
        Unavailable: no row sees two keys.
    """
    with torch.no_grad():
        query, key = (precise(x) for x in attention.queries_keys_values(u_BTD)[:2])

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in row_blocks(len(u_BTD) * attention.n_heads, u_BTD.shape[1]):
            before = key[:, :, : rows.stop]  # no row sees a later one
            within = None if documents_BT is None else documents_BT[:, : rows.stop]
            yield attention.logits(query[:, :, rows], before, rows), attention.seen(rows.stop, key.device, rows, within)

    return row_statistics(blocks())
