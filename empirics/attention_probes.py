"""Probes of the attention logits and probabilities, layer by layer, on the first sequence of the batch.

Of a long sequence the first 512 tokens are taken, which no later one changes; all rows of it would be T x T numbers a
head, where training keeps none.
A row is a query's; it sees the keys that the mask leaves it. The first row sees one key alone, so that its logits have
no variance and its entropy is 0 whatever the weights: rows of two keys or more count.

Shapes: B batch, T tokens, D d_model, H heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from empirics.model import Attention
from empirics.registry import Reading, Unavailable, probe, reading
from empirics.subject import Subject

LONGEST = 512  # tokens


class AttentionRows(NamedTuple):
    """Means over rows and sequences, head by head, (H,) each or (layers, H)."""

    variance: Tensor
    entropy: Tensor
    relative: Tensor


@torch.no_grad()
def attention_rows(attention: Attention, u_BTD: Tensor) -> AttentionRows:
    """Logit variance, entropy in nats, and entropy over the log of the number of keys seen.

    Raises:
        Unavailable: no row sees two keys.
    """
    seen = attention.seen(u_BTD.shape[1], u_BTD.device)
    count = seen.sum(-1)
    rows = count > 1
    if not bool(rows.any()):
        raise Unavailable("no row of attention sees two keys; use more tokens")
    logits, probabilities = attention.probabilities(u_BTD)
    seen, count, logits, probabilities = seen[rows], count[rows], logits[..., rows, :], probabilities[..., rows, :]
    mean = logits.masked_fill(~seen, 0.0).sum(-1) / count
    variance = (logits - mean[..., None]).masked_fill(~seen, 0.0).square().sum(-1) / count
    entropy = torch.special.entr(probabilities).sum(-1)
    return AttentionRows(*(x.double().mean((0, -1)) for x in (variance, entropy, entropy / count.to(entropy).log())))


def _rows(subject: Subject) -> AttentionRows:
    """Of every layer, (layers, H)."""
    with torch.no_grad():
        found = [
            attention_rows(layer.attention, layer.attention_input(x[0][:, :LONGEST]))
            for layer, x in zip(subject.whole_layers(), subject.entering, strict=True)
        ]
    rows = AttentionRows(*(torch.stack(parts).cpu() for parts in zip(*found, strict=True)))
    return subject.ranks.each(rows)[0]


@probe("logit_variance", cost="cheap")
def logit_variance(subject: Subject) -> Reading:
    """Of the logits that the softmax gets, soft-capped and with ALiBi's bias; at most 512 tokens."""
    return reading("logit_variance", subject.layer_labels, subject.shared(_rows).variance.mean(-1).tolist())


@probe("attention_entropy", cost="cheap")
def attention_entropy(subject: Subject) -> Reading:
    """0 where every row looks at one key; at most 512 tokens."""
    return reading("attention_entropy", subject.layer_labels, subject.shared(_rows).entropy.mean(-1).tolist())


@probe("attention_entropy_relative", cost="cheap")
def attention_entropy_relative(subject: Subject) -> Reading:
    """1 for uniform attention."""
    return reading("attention_entropy_relative", subject.layer_labels, subject.shared(_rows).relative.mean(-1).tolist())


@probe("attention_entropy_lowest", cost="cheap")
def attention_entropy_lowest(subject: Subject) -> Reading:
    """Towards 0 where a head collapses."""
    return reading("attention_entropy_lowest", subject.layer_labels, subject.shared(_rows).relative.amin(-1).tolist())


@probe("head_entropy", cost="dear")
def head_entropy(subject: Subject) -> Reading:
    """Every head of every layer."""
    relative = subject.shared(_rows).relative
    labels = [f"{layer} head {h}" for layer in subject.layer_labels for h in range(relative.shape[1])]
    return reading("head_entropy", labels, relative.flatten().tolist())
