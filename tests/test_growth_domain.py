"""Where the growth recursion ends: outside it says so, just inside it is measured."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.growth_networks import FED, LOUD, UNIT, measured, narrow, one_head, reason, wide, with_logits
from helpers.weights import architecture

from empirics.data import random_tokens
from empirics.probes import measure_growth
from theory import growth, growth_domain
from theory.architecture import Architecture, preset
from theory.growth import gradient_growth
from theory.initialisation import INITS, Init
from theory.logits import norm_gain

# --- inside: networks that are built and measured ----------------------------------------------------------------

MULTI_QUERY: dict[str, Any] = {"n_kv_heads": 1}
HEADS = {"n_heads": 16, "n_kv_heads": 16, "d_head": 8, "qk_norm": "head"}
INSIDE: dict[str, tuple[Architecture, int, float]] = {
    # the network, tokens, and the largest error in per cent: that of the width and depth alone, or the stated accuracy
    "a soft-cap ten times below its logits": (with_logits(wide(attention_softcap=0.5), 25), 32, 4),
    "a soft-cap as large as its logits": (with_logits(wide(attention_softcap=2.0), 4), 32, 4),
    "QK-norm of heads of 8": (wide(**HEADS, attention_scale=8**-0.5), 32, 4),
    "QK-norm of heads of 32, logits of 3.5": (wide(qk_norm="head", attention_scale=(3.5 / 32) ** 0.5), 32, 4),
    "QK-norm of heads of 8, eps a tenth": (wide(**HEADS, attention_scale=8**-0.5, eps=0.1), 16, 8),
    "heads of 4, logits of 3.9": (with_logits(wide(n_heads=32, n_kv_heads=32, d_head=4), 3.9), 16, 4),
    "one head, logits of 1": (one_head(1.0), 32, 8),
    "output logits of variance 6.25": (wide(logit_multiplier=2.5), 32, 4),
    "output logits of variance 6.25, 24 layers": (wide(logit_multiplier=2.5, n_layers=24), 16, 4),
    "no final norm": (wide(final_norm=False), 32, 4),
    "Post-LN, 24 layers of width 32": (narrow(block="post-ln", residual_multiplier=0.3), 16, 8),
    "Post-LN, a large shortcut": (narrow(block="post-ln", shortcut_multiplier=3.0, n_layers=12), 16, 8),
    "a query for one key and value of 24, a loud layer": (wide(**LOUD, **MULTI_QUERY, d_head=24), 32, 8),
    "34 hidden units, a loud layer": (wide(**(LOUD | {"init": FED}), d_model=256, d_ffn=34), 16, 8),
    "no shortcut": (wide(shortcut_multiplier=0.0, n_layers=5), 32, 8),
    "24 layers of width 32": (narrow(init=INITS["paper"]), 16, 8),
    "16 hidden units": (narrow(d_ffn=16, n_layers=8), 16, 8),
}
SLOW = ("24 layers", "no shortcut", "Post-LN")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * any(s in n for s in SLOW)) for n in INSIDE]
)
def test_just_inside_the_domain(name: str) -> None:
    a, n_tokens, allowed = INSIDE[name]
    assert reason(a, n_tokens) == ""
    found, error = measured(a, n_tokens, 40 if any(s in name for s in SLOW) else 12)
    gap = math.log(gradient_growth(a, n_tokens, distinct=True).value) - found
    print(f"{name}: {gap:+.1%} +- {error:.1%}")
    assert abs(gap) <= allowed / 100 + 3 * error


def test_a_short_window_over_a_long_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: in blocks of any size the growth is too large."""
    a = wide(d_model=64, d_head=16, d_ffn=256, positions="none", window=2, context=192)
    found, error = measured(a, 192, 8, sequences=1)
    assert reason(a, 192) == ""
    gap = math.log(gradient_growth(a, 192).value) - found
    monkeypatch.setattr(growth_domain, "largest_block", lambda *_: 0)
    control = math.log(gradient_growth(a, 192).value) - found
    print(f"window 2: {gap:+.1%} +- {error:.1%}, in blocks of any size {control:+.1%}")
    assert abs(gap) <= 0.04 + 3 * error
    assert control > 0.08 + 3 * error


def test_a_vocabulary_of_one_word() -> None:
    assert "a vocabulary of 1 leaves the loss nothing to send back" in gradient_growth(wide(vocab_size=1), 16).reasons


# --- outside ------------------------------------------------------------------------------------------------------

TIED_WIDE: dict[str, Any] = {
    "d_model": 256, "tied": True, "vocab_size": 64, "embedding_multiplier": 16.0,
    "init": replace(UNIT, embedding=1 / 16),
}  # fmt: skip
OUTSIDE: dict[str, tuple[Architecture, str]] = {
    "steep": (with_logits(wide(attention_softcap=2.0), 400), "attention logits have variance 21.2, above 4.0"),
    "heads": (wide(**(HEADS | {"n_heads": 32, "n_kv_heads": 32, "d_head": 4}), attention_scale=0.5), "heads of 4 are"),
    "keys": (wide(**{"qk_norm": "full", "n_kv_heads": 1, "d_head": 4}), "keys of 4 are too narrow for QK-norm"),
    "head": (wide(logit_multiplier=2.6), "output logits have variance 6.76, above 6.32"),
    "stream": (wide(final_norm=False, n_layers=24), "output logits have variance"),
    "tied": (
        wide(d_model=512, tied=True, residual_multiplier=0.05, init=replace(UNIT, embedding=0.05)),
        "the tied head knows its own token",
    ),
    "tied, few units": (
        wide(**(TIED_WIDE | {"n_layers": 1, "residual_multiplier": 0.9, "d_ffn": 16})),
        "the tied head knows its own token",
    ),
    "tied, post-ln": (
        wide(**(TIED_WIDE | {"block": "post-ln", "residual_multiplier": 0.7, "embedding_multiplier": 1.0})),
        "the tied head knows its own token",
    ),
    "zeros": (wide(init=replace(UNIT, embedding=0.0), positions="none"), "an embedding of zeros"),
    "eps": (wide(**(HEADS | {"attention_scale": 2 / 8**0.5, "eps": 1.0})), "eps=1 is as large as the mean square"),
    "one head": (one_head(2.5), "outputs of 1 head scatter with the softmax rows"),
    "small heads": (
        with_logits(wide(n_heads=64, n_kv_heads=64, d_head=2), 3.5),
        "heads of 2 are narrower than the variance",
    ),
    "stream of few values": (
        wide(**LOUD, **MULTI_QUERY, d_head=8, window=1),
        "tokens of d_model=128, n_kv_heads*d_head=8, d_ffn=512 scatter",
    ),
    "output norm": (
        wide(block="peri-ln", d_ffn=12, residual_multiplier=0.3, n_layers=8, activation="relu-squared"),
        "output norms over branches of d_model=128, n_kv_heads*d_head=128, d_ffn=12",
    ),
    "depth": (narrow(), "networks of d_model=32, n_kv_heads*d_head=32, d_ffn=128 and branches this strong"),
    "units": (
        wide(d_ffn=1, activation="relu-squared", gated=True),
        "networks of d_model=128, n_kv_heads*d_head=128, d_ffn=1 and",
    ),
    "shortcut": (narrow(shortcut_multiplier=0.0, n_layers=12), "networks of d_model=32"),
    "post-ln": (narrow(block="post-ln", init=INITS["xavier"]), "networks of d_model=32"),
    "vocabulary": (wide(vocab_size=15, logit_multiplier=0.5), "16 tokens of a vocabulary of 15 repeat"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_just_outside_the_domain(name: str) -> None:
    a, words = OUTSIDE[name]
    assert words in reason(a)
    assert math.isfinite(gradient_growth(a, 16).value)


def test_outside_its_domain_it_says_so() -> None:
    narrow = architecture(d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, d_head=8)
    answer = gradient_growth(narrow, 8)
    assert not answer.in_domain
    assert "d_model=16" in answer.reasons[0]
    sharp = replace(preset("small"), init=replace(preset("small").init, hidden=0.2))
    assert any("logits have variance" in reason for reason in gradient_growth(sharp, 8).reasons)


def test_more_layers_than_were_measured_are_outside() -> None:
    a = replace(preset("tiny"), n_layers=growth_domain.MAX_LAYERS)
    assert gradient_growth(a, 4).in_domain
    deeper = gradient_growth(replace(a, n_layers=growth_domain.MAX_LAYERS + 1), 4)
    assert deeper.reasons == (
        "97 layers are more than 96: how the recursion's error adds up over so many was never measured",
    )
    assert math.isfinite(deeper.value)


def test_random_tokens_that_repeat_are_outside() -> None:
    """Up to as many as the vocabulary has are inside; those that are handed in are counted instead."""
    a = replace(preset("tiny"), vocab_size=32)
    assert reason(a, 32) == reason(a, 32, distinct=True) == ""
    assert reason(a, 33) == (
        "33 tokens of a vocabulary of 32 repeat more often than was measured: at most once on average"
    )
    assert reason(a, 33, tokens=np.arange(33) % 32) == ""


def test_random_tokens_are_equal_once_in_the_vocabulary() -> None:
    """Attention of as many tokens as the vocabulary has; control: taken as distinct, its growth is too small."""
    init = Init(name="attention", hidden=1e-3, embedding=0.02, position=1.0, head="fan-in", value="fan-in")
    a = wide(vocab_size=128, positions="none", n_layers=1, init=replace(init, writers="fan-in"))
    seeds = tuple(range(12))
    found, _, _ = measure_growth(
        a, seeds=seeds, batches=lambda seed: random_tokens(128, seed=seed, batch_size=4, seq_len=128)
    )
    assert found.log_sd is not None
    error = found.log_sd[0] / math.sqrt(len(seeds))
    gap, control = (
        math.log(gradient_growth(a, 128, distinct=distinct).value / found.values[0]) for distinct in (False, True)
    )
    print(f"random tokens: {gap:+.1%} +- {error:.1%}, as if distinct {control:+.1%}")
    assert reason(a, 128) == ""
    assert abs(gap) <= 0.02 + 3 * error
    assert control < -0.08 - 3 * error


def test_a_token_that_fills_the_rows_is_outside() -> None:
    """Half of all places, with strong logits; the same number of tokens, spread evenly, is inside."""
    a, uneven, even = wide(positions="none"), np.where(np.arange(64) % 2, 0, np.arange(64)), np.arange(64) % 33
    assert reason(with_logits(a, 1), 64, tokens=uneven) == reason(with_logits(a, 3.9), 64, tokens=even) == ""
    found = reason(with_logits(a, 3.9), 64, tokens=uneven)
    assert found == "a few tokens fill the rows of attention: their weights shift by 0.93 of themselves, above 0.28"


@pytest.mark.parametrize(("logits", "inside"), [(1.1, True), (3.9, False)])
def test_uneven_rows_are_measured(logits: float, inside: bool) -> None:
    """A token in half of all places: within the stated accuracy while it is inside, and not where it is not."""
    a, pattern = with_logits(wide(positions="none"), logits), np.where(np.arange(64) % 2, 0, np.arange(64))
    seeds = tuple(range(12))

    def batches(seed: int) -> Any:
        generator = np.random.default_rng(seed)
        rows = [generator.permutation(a.vocab_size)[:64] for _ in range(4)]
        return np.array([row[pattern] for row in rows]), np.array([generator.permutation(row) for row in rows])

    found, _, _ = measure_growth(a, seeds=seeds, batches=batches)
    assert found.log_sd is not None
    error = found.log_sd[0] / math.sqrt(len(seeds))
    predicted = gradient_growth(a, 64, tokens=pattern, distinct=True)
    gap = math.log(predicted.value / found.values[0])
    print(f"logit variance {logits}: {gap:+.1%} +- {error:.1%}, {predicted.reasons}")
    assert predicted.in_domain == inside
    assert (abs(gap) <= 0.08 + 3 * error) == inside


def test_neighbours_too_alike_for_blocks_are_outside() -> None:
    """Short windows over more tokens than blocks can tell apart, and ALiBi with strong logits in blocks at all."""
    a = wide(positions="none", window=8)
    assert reason(a, 512) == ""
    assert reason(a, 1024) == "1024 tokens are too many for a window of 8, whose neighbours are too alike"
    assert reason(replace(a, window=64), 1024) == ""
    alibi = with_logits(wide(positions="alibi"), 2)
    assert reason(alibi, 128) == ""
    assert "ALiBi's neighbours are too alike over 200 tokens" in reason(alibi, 200)
    assert reason(with_logits(alibi, 0.2), 200) == ""


@pytest.mark.parametrize("size", [0.0, 1e-300, 1e-160, 1e-90, 1e-40])
def test_weights_of_any_size_have_an_answer(size: float) -> None:
    """Squares of their logits' covariance underflow, or the stream itself is zero."""
    tiny = Init(name="tiny", hidden=0.02, embedding=size, position=size, head=0.02)
    for a in (wide(init=tiny), wide(init=replace(tiny, embedding=1.0, hidden=size))):
        answer = gradient_growth(a, 16)
        assert math.isfinite(answer.value)
        assert answer.value > 0


@pytest.mark.parametrize("name", ["few units", "few values"])
def test_a_stream_that_scatters_is_off(name: str) -> None:
    """Half of its relative variance: what is outside is so for a reason, and was not for a quarter."""
    few = wide(**(LOUD | {"init": FED}), d_model=256, d_ffn=17)
    if name == "few values":
        few = wide(
            d_ffn=64,
            n_kv_heads=1,
            d_head=8,
            window=1,
            init=replace(UNIT, embedding=0.02, hidden=1e-4, value=128**-0.5, writers=32**-0.5, query_key=1e-4),
        )
    assert "scatter" in reason(few)
    found, error = measured(few, 16, 40)
    assert abs(math.log(gradient_growth(few, 16).value) - found) > 0.08 + 2 * error


NARROW: dict[str, Architecture] = {
    "8 values": wide(block="peri-ln", n_heads=1, n_kv_heads=1, d_head=8, n_layers=6),
    "32 gated units": wide(block="peri-ln", d_ffn=32, activation="identity", gated=True),
}


@pytest.mark.parametrize("name", NARROW)
def test_an_output_norm_over_a_narrow_branch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the gain of d independent numbers."""
    a = NARROW[name]
    assert reason(a) == ""
    found, error = measured(a, 16, 40)
    assert abs(math.log(gradient_growth(a, 16).value) - found) <= 0.02 + 2 * error
    monkeypatch.setattr(growth, "output_norm_gain", lambda a, _: norm_gain(a.norm, a.d_model))
    assert abs(math.log(gradient_growth(a, 16).value) - found) > 0.02 + 2 * error
