"""Probes of the attention logits and probabilities, layer by layer: of all rows of the batch's first sequence.

Shapes: H heads.
"""

from __future__ import annotations

import torch

from empirics.attention_rows import AttentionRows
from empirics.registry import Reading, probe, reading
from empirics.subject import Seen


def _rows(subject: Seen) -> AttentionRows:
    """Of every layer, (layers, H)."""
    found = subject.attention_rows()
    rows = AttentionRows(*(torch.stack(parts).cpu() for parts in zip(*found, strict=True)))
    return subject.ranks.each(rows)[0]


@probe("logit_variance", of="first sequence", cost="cheap")
def logit_variance(subject: Seen) -> Reading:
    """Of the logits that the softmax gets, soft-capped and with whatever bias a mask adds to keys that are seen."""
    return reading("logit_variance", subject.layer_labels, subject.shared(_rows).variance.mean(-1).tolist())


@probe("attention_entropy", of="first sequence", cost="cheap")
def attention_entropy(subject: Seen) -> Reading:
    """0 where every row looks at one key."""
    return reading("attention_entropy", subject.layer_labels, subject.shared(_rows).entropy.mean(-1).tolist())


@probe("attention_entropy_relative", of="first sequence", cost="cheap")
def attention_entropy_relative(subject: Seen) -> Reading:
    """1 for uniform attention."""
    return reading("attention_entropy_relative", subject.layer_labels, subject.shared(_rows).relative.mean(-1).tolist())


@probe("attention_entropy_lowest", of="first sequence", cost="cheap")
def attention_entropy_lowest(subject: Seen) -> Reading:
    """Towards 0 where a head collapses."""
    return reading("attention_entropy_lowest", subject.layer_labels, subject.shared(_rows).relative.amin(-1).tolist())


@probe("head_entropy", of="first sequence", cost="dear")
def head_entropy(subject: Seen) -> Reading:
    """Every head of every layer."""
    relative = subject.shared(_rows).relative
    labels = [f"{layer} head {h}" for layer in subject.layer_labels for h in range(relative.shape[1])]
    return reading("head_entropy", labels, relative.flatten().tolist())
