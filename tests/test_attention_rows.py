"""Rows of attention as anyone computes it, against the same rows taken one by one: long ones, and under every mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.weights import architecture, generator
from scipy import stats
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import linear, scaled_dot_product_attention, softmax

from empirics import attention_rows
from empirics.attention_rows import AttentionRows
from empirics.attention_view import AttentionView
from empirics.data import random_tokens
from empirics.model import build
from empirics.registry import find
from empirics.subject import Subject

HEADS, WIDTH = 2, 4
LOWEST = torch.finfo(torch.float32).min
FILLS = [-math.inf, LOWEST, torch.finfo(torch.float16).min, -1e9, -1e4, -100.0]


def by_hand(logits: Tensor, seen: Tensor) -> list[list[float]]:
    """Variance, entropy and relative entropy of (H, T, T) logits, head by head, over rows of two keys or more."""
    heads: list[list[float]] = []
    for head, keys in zip(logits.double().numpy(), seen.expand(logits.shape).numpy(), strict=True):
        rows = [row[key] for row, key in zip(head, keys, strict=True) if key.sum() > 1]
        entropies = [stats.entropy(np.exp(row - row.max())) for row in rows]
        relative = [entropy / math.log(len(row)) for entropy, row in zip(entropies, rows, strict=True)]
        heads.append([float(np.mean(x)) for x in ([row.var() for row in rows], entropies, relative)])
    return [list(column) for column in zip(*heads, strict=True)]


def shown(attend: Callable[[], object], batch_size: int = 3) -> list[AttentionRows | str]:
    """What is seen of an attention."""
    found: list[AttentionRows | str] = []
    with AttentionView(batch_size, found.append):
        attend()
    return found


def agree(attend: Callable[[], object], logits: Tensor, seen: Tensor, rel: float = 1e-5) -> None:
    (rows,) = shown(attend)
    assert isinstance(rows, AttentionRows), rows
    for found, expected in zip(rows, by_hand(logits, seen), strict=True):
        assert found.tolist() == pytest.approx(expected, rel=rel)


def queries_and_keys(length: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(B, H, T, E) each."""
    g = generator(0)
    query, key = (torch.randn(3, HEADS, length, WIDTH, generator=g) for _ in range(2))
    return scale * query, key


def products(query: Tensor, key: Tensor) -> Tensor:
    """The logits of the first sequence, (H, T, T)."""
    return query[0].double() @ key[0].double().mT / math.sqrt(WIDTH)


def causal(length: int) -> Tensor:
    return torch.ones(length, length).tril().bool()


# --- all rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [2**20, 9_000])
@pytest.mark.parametrize("kind", ["is_causal", "truth values", "bias", "CausalBias", "softmax", "3-d softmax"])
def test_every_row_of_a_long_sequence_counts(kind: str, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later rows see more keys; all at once, or seven at a time."""
    length = 600
    monkeypatch.setattr(attention_rows, "ENTRIES", entries)
    (query, key), seen = queries_and_keys(length, 2.0), causal(length)
    logits = products(query, key)
    added = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    given: dict[str, Any] = {"is_causal": {"is_causal": True}, "truth values": {"attn_mask": seen}}
    given |= {"bias": {"attn_mask": added}, "CausalBias": {"attn_mask": causal_lower_right(length, length)}}
    written = query @ key.mT / math.sqrt(WIDTH) + added
    if kind in given:
        agree(lambda: scaled_dot_product_attention(query, key, key, **given[kind]), logits, seen)
    else:
        agree(lambda: softmax(written if kind == "softmax" else written.flatten(0, 1), -1), logits, seen)


def test_every_row_of_torchs_attention_counts() -> None:
    torch.manual_seed(0)
    attention, length = nn.MultiheadAttention(HEADS * WIDTH, HEADS, batch_first=True), 600
    x, seen = torch.randn(3, length, HEADS * WIDTH), causal(length)
    with torch.no_grad():
        attention.in_proj_weight.mul_(3)
        query, key = (
            part.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
            for part in linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)[:2]
        )
    agree(lambda: attention(x, x, x, attn_mask=~seen), products(query, key), seen)


@pytest.mark.parametrize("changes", [{}, {"positions": "alibi"}, {"window": 40}, {"attention_softcap": 0.7}], ids=str)
@pytest.mark.parametrize("entries", [2**20, 9_000])
def test_every_row_of_our_own_counts(changes: dict[str, Any], entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    length = 600
    a = architecture(d_model=8, n_layers=1, n_heads=HEADS, d_ffn=8, vocab_size=50, context=length, **changes)
    model = build(a, seed=0, dtype=torch.float64)
    with torch.no_grad():
        for p in model.layers.parameters():
            p.mul_(3)
    inputs, targets = (torch.from_numpy(part) for part in random_tokens(50, seed=1, batch_size=2, seq_len=length))
    seen = causal(length).triu(1 - changes.get("window", length))
    with torch.no_grad():
        logits, _ = model.layers[0].attention.probabilities(model.layers[0].attention_input(model.embed(inputs)))
    variance, entropy, relative = by_hand(logits[0], seen)
    monkeypatch.setattr(attention_rows, "ENTRIES", entries)
    subject = Subject(model, inputs, targets)
    assert find("logit_variance").measure(subject).values == pytest.approx([np.mean(variance)], rel=1e-10)
    assert find("attention_entropy").measure(subject).values == pytest.approx([np.mean(entropy)], rel=1e-10)
    assert find("head_entropy").measure(subject).values == pytest.approx(relative, rel=1e-10)


# --- masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e2, 1e4])
@pytest.mark.parametrize("kind", ["is_causal", "truth values", "bias", "softmax"])
def test_logits_that_explode_are_no_mask(kind: str, scale: float) -> None:
    """However low, where what hides is known."""
    (query, key), seen = queries_and_keys(20, scale), causal(20)
    logits = products(query, key)
    assert logits[:, seen].min() < -2 * scale
    added = torch.zeros(seen.shape).masked_fill(~seen, -math.inf if kind == "softmax" else LOWEST)
    given: dict[str, Any] = {"is_causal": {"is_causal": True}, "truth values": {"attn_mask": seen}}
    given["bias"] = {"attn_mask": added}
    written = query @ key.mT / math.sqrt(WIDTH) + added
    if kind in given:
        agree(lambda: scaled_dot_product_attention(query, key, key, **given[kind]), logits, seen)
    else:
        agree(lambda: softmax(written, -1), logits, seen)


@pytest.mark.parametrize(("slope", "known"), [(400.0, True), (700.0, False)])
def test_a_bias_as_low_as_a_mask_is_named(slope: float, known: bool) -> None:
    """Of ALiBi, whose farthest keys have the slope times 19: below -1e4 nothing tells them from hidden ones."""
    (query, key), seen, distance = queries_and_keys(20), causal(20), torch.arange(20) - torch.arange(20)[:, None]
    added = (slope * distance).masked_fill(~seen, -math.inf)

    def attend() -> object:
        return scaled_dot_product_attention(query, key, key, attn_mask=added)

    if known:
        agree(attend, products(query, key) + slope * distance, seen)
    else:
        (reason,) = shown(attend)
        assert str(reason).startswith("its mask is not recognised")


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [20, 5])
def test_whatever_a_mask_fills_in_is_hidden(fill: float, padded: bool, window: int) -> None:
    """Filled in or added, of later keys, of those outside a window, and of padding; rows of padding see nothing."""
    query, key = queries_and_keys(20)
    seen = causal(20).triu(1 - window)
    if padded:
        seen[:, :3] = False
    logits, written = products(query, key), query @ key.mT / math.sqrt(WIDTH)
    added = torch.zeros(seen.shape).masked_fill(~seen, fill)
    agree(lambda: softmax(written.masked_fill(~seen, fill), -1), logits, seen)
    agree(lambda: softmax(written + added, -1), logits, seen)
    agree(lambda: scaled_dot_product_attention(query, key, key, attn_mask=added), logits, seen)


def test_masks_that_add_up_are_one() -> None:
    (query, key), later = queries_and_keys(20), ~causal(20)
    padding = torch.arange(20) < 3
    added = sum(torch.zeros(20, 20).masked_fill(hidden, -1e4) for hidden in (later, padding))
    agree(lambda: softmax(query @ key.mT / 2 + added, -1), products(query, key), ~(later | padding))


def test_padding_may_be_higher_than_later_keys() -> None:
    """Where logits show through what is added to them."""
    (query, key), hidden = queries_and_keys(20), ~causal(20)
    key[:, :, :3] *= 3
    hidden[:, :3] = True
    written = query @ key.mT / math.sqrt(WIDTH) + torch.zeros(20, 20).masked_fill(hidden, -1e3)
    assert written[0][:, hidden & causal(20)].max() > written[0][:, ~causal(20)].max()
    agree(lambda: softmax(written, -1), products(query, key), ~hidden)


@pytest.mark.parametrize("fill", [-math.inf, LOWEST])
def test_what_is_added_to_keys_that_are_seen_is_of_the_logits(fill: float) -> None:
    """As ALiBi's, of distances that hide nothing."""
    (query, key), seen = queries_and_keys(300), causal(300)
    distance = torch.arange(300)[:, None] - torch.arange(300)
    bias = -torch.tensor([0.5, 0.01])[:, None, None] * distance
    logits = products(query, key) + bias
    assert (bias[:, seen] < -100).any()
    mask = bias.masked_fill(~seen, fill)
    agree(lambda: scaled_dot_product_attention(query, key, key, attn_mask=mask), logits, seen)
    agree(lambda: scaled_dot_product_attention(query, key, key, attn_mask=mask[None]), logits, seen)
    agree(lambda: softmax(query @ key.mT / math.sqrt(WIDTH) + mask, -1), logits, seen)


def test_what_looks_ahead_sees_all_that_it_does_not_hide() -> None:
    """Without a mask, and with a prefix whose tokens see each other."""
    (query, key), everything = queries_and_keys(20), torch.ones(20, 20).bool()
    prefix = causal(20)
    prefix[:5, :5] = True
    logits, written = products(query, key), query @ key.mT / math.sqrt(WIDTH)
    agree(lambda: softmax(written, -1), logits, everything)
    agree(lambda: scaled_dot_product_attention(query, key, key), logits, everything)
    agree(lambda: scaled_dot_product_attention(query, key, key, attn_mask=prefix), logits, prefix)
    for fill in (-math.inf, -1e9):
        agree(lambda fill=fill: softmax(written.masked_fill(~prefix, fill), -1), logits, prefix)


def test_a_mask_that_could_be_logits_is_not_recognised() -> None:
    """A soft one, and logits as low or later keys that it does not hide."""
    seen, prefix = causal(20), causal(20)
    prefix[:5, :5] = True
    query, key = queries_and_keys(20)
    wild, mild = (scale * query @ key.mT / math.sqrt(WIDTH) for scale in (30.0, 1.0))
    added = torch.zeros(20, 20).masked_fill(~prefix, -1e3)
    for attend in (
        lambda: softmax(wild.masked_fill(~seen, -100.0), -1),
        lambda: softmax(wild + torch.zeros(20, 20).masked_fill(~seen, -100.0), -1),
        lambda: softmax(mild.masked_fill(~prefix, -1e4), -1),
        lambda: softmax((mild + 500).masked_fill(~seen, 50.0), -1),
        lambda: scaled_dot_product_attention(query, key, key, attn_mask=added),
    ):
        (reason,) = shown(attend)
        assert isinstance(reason, str), reason
        assert reason.startswith("its mask is not recognised"), reason
        assert "is_causal, truth values or -infinity" in reason


@pytest.mark.parametrize(("scale", "fill"), [(10.0, -100.0), (15.0, -100.0), (100.0, -1e3), (1e3, -1e4)])
@pytest.mark.parametrize("seed", range(4))
def test_logits_that_spread_as_far_as_their_mask_are_not_recognised(scale: float, fill: float, seed: int) -> None:
    """A later key is then anywhere between the mask and the logits, and so may one be that is seen."""
    seen = causal(32)
    logits = scale * torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    (reason,) = shown(lambda: softmax(logits + torch.zeros(32, 32).masked_fill(~seen, fill), -1), batch_size=1)
    assert isinstance(reason, str), reason
    assert reason.startswith("its mask is not recognised"), reason


def test_a_softmax_is_along_its_keys() -> None:
    (query, key), seen = queries_and_keys(20), causal(20)
    written = (query @ key.mT / math.sqrt(WIDTH)).masked_fill(~seen, -math.inf)
    agree(lambda: softmax(written.mT, -2), products(query, key), seen)
    agree(lambda: softmax(input=written.mT, dim=2), products(query, key), seen)
    agree(lambda: written.softmax(dim=3), products(query, key), seen)
    assert shown(lambda: (softmax(written, 1), softmax(written, dim=0), softmax(written[..., :5], -1))) == []


def test_logits_are_not_rounded_under_autocast() -> None:
    """A fused kernel keeps them in float32 whatever the precision of queries and keys."""
    (query, key), seen = queries_and_keys(20), causal(20)
    query, key = query.bfloat16(), key.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        agree(lambda: scaled_dot_product_attention(query, key, key, is_causal=True), products(query, key), seen)


def test_logits_that_are_not_finite_are_named() -> None:
    (query, key), seen = queries_and_keys(20), causal(20)
    query[0, 1, 3] = math.nan
    written = (query @ key.mT).masked_fill(~seen, -math.inf)
    for attend in (
        lambda: scaled_dot_product_attention(query, key, key, is_causal=True),
        lambda: softmax(written, -1),
        lambda: softmax(query @ key.mT, -1),
    ):
        assert shown(attend) == ["its logits are not finite"]
