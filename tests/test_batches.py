"""Epochs are permutations, any step is had at once, and rows of a batch are its rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from empirics.batches import permuted
from empirics.data import Batch, Corpus, batch

SEEDS = st.integers(0, 2**64 - 1)


def corpus_of_length(tokens: int) -> Corpus:
    ids = np.arange(tokens, dtype=np.int32)
    return Corpus(train=ids, heldout=ids, vocab_size=tokens, digest="", description="")


def test_every_small_size_is_permuted() -> None:
    for size in range(1, 130):
        for seed in range(2):
            assert sorted(permuted(np.arange(size), size, seed=seed, epoch=seed).tolist()) == list(range(size))


@given(st.integers(1, 20_000), SEEDS, SEEDS)
def test_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    assert len(np.unique(permuted(np.arange(size), size, seed=seed, epoch=epoch))) == size


@given(st.integers(1, 2**62), st.data())
def test_huge_sizes_need_no_memory(size: int, data: st.DataObject) -> None:
    places = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=20))), np.int64)
    taken = permuted(places, size, seed=1, epoch=2)
    assert len(set(taken.tolist())) == len(places)
    assert 0 <= taken.min() <= taken.max() < size
    np.testing.assert_array_equal(permuted(places[::-1], size, seed=1, epoch=2), taken[::-1])


@pytest.mark.parametrize("size", [7, 16, 1000])
def test_permutations_are_spread(size: int) -> None:
    """Where a place goes, over 2000 keys: in each quarter within five standard deviations; neighbours part."""
    n = 2000
    taken = np.array([permuted(np.arange(3), size, seed=seed, epoch=9) for seed in range(n)])
    for place in range(3):
        for quarter in range(4):
            low, high = -(-size * quarter // 4), -(-size * (quarter + 1) // 4)
            share = (high - low) / size
            count = int(((taken[:, place] >= low) & (taken[:, place] < high)).sum())
            assert abs(count - n * share) < 5 * np.sqrt(n * share * (1 - share))
    followed = int((taken[:, 1] == (taken[:, 0] + 1) % size).sum())
    share = 1 / (size - 1)
    assert abs(followed - n * share) < 5 * np.sqrt(n * share)


def test_permutations_never_change() -> None:
    """Fixed numbers: another permutation would silently give every old record another data order."""
    assert permuted(np.arange(10), 10, seed=1, epoch=2).tolist() == [0, 9, 6, 8, 5, 7, 2, 4, 1, 3]


@given(st.integers(30, 150), st.integers(1, 7), st.integers(1, 12), st.integers(0, 1000))
def test_every_token_is_seen_once_an_epoch(tokens: int, batch_size: int, seq_len: int, seed: int) -> None:
    corpus = corpus_of_length(tokens)
    windows = (tokens - 1) // seq_len
    steps = -(-3 * windows // batch_size)
    rows = [
        row
        for step in range(steps)
        for row in _epoch(corpus, seed=seed, step=step, batch_size=batch_size, seq_len=seq_len)[0]
    ]
    orders = [np.concatenate(rows[windows * n : windows * (n + 1)]) for n in range(3)]
    for seen in orders:
        assert sorted(seen.tolist()) == list(range(windows * seq_len))
    if windows > 12:
        assert len({order.tobytes() for order in orders}) == 3


def _epoch(corpus: Corpus, **sizes: int) -> Batch:
    return batch(corpus, order="epoch", **sizes)


def test_steps_in_any_order_are_the_same() -> None:
    def tokens(step: int) -> bytes:
        return _epoch(corpus_of_length(500), seed=3, step=step, batch_size=4, seq_len=9)[0].tobytes()

    forward = [tokens(step) for step in range(40)]
    assert [tokens(step) for step in reversed(range(40))] == forward[::-1]
    assert len(set(forward)) == 40


def test_targets_are_the_next_tokens() -> None:
    tokens, targets = _epoch(corpus_of_length(100), seed=0, step=3, batch_size=8, seq_len=9)
    np.testing.assert_array_equal(targets, tokens + 1)
    assert (tokens[:, 0] % 9 == 0).all()


@pytest.mark.parametrize("order", ["random", "epoch"])
@given(step=st.integers(0, 10**9), first=st.integers(0, 6), last=st.integers(0, 6))
def test_rows_are_those_of_the_batch(order: str, step: int, first: int, last: int) -> None:
    """What two processes take of a batch is the batch; and no step needs the ones before it."""
    sizes = {"seed": 5, "step": step, "batch_size": 6, "seq_len": 7}
    whole = batch(corpus_of_length(200), order=order, **sizes)  # type: ignore[arg-type]
    part = batch(corpus_of_length(200), order=order, rows=slice(first, last), **sizes)  # type: ignore[arg-type]
    np.testing.assert_array_equal(part, np.array(whole)[:, first:last])
    interleaved = batch(corpus_of_length(200), order=order, rows=slice(1, None, 2), **sizes)  # type: ignore[arg-type]
    np.testing.assert_array_equal(interleaved, np.array(whole)[:, 1::2])


def test_bad_requests_name_the_remedy() -> None:
    corpus = corpus_of_length(10)
    with pytest.raises(ValueError, match="unknown order 'sorted'; use one of random, epoch"):
        batch(corpus, seed=0, step=0, batch_size=1, seq_len=2, order="sorted")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has 10 tokens, fewer than"):
        _epoch(corpus, seed=0, step=0, batch_size=1, seq_len=10)
    with pytest.raises(ValueError, match="seed=-1"):
        _epoch(corpus, seed=-1, step=0, batch_size=1, seq_len=2)
    with pytest.raises(ValueError, match="step=-1"):
        _epoch(corpus, seed=0, step=-1, batch_size=1, seq_len=2)
    with pytest.raises(ValueError, match=r"places outside 0 \.\. 4"):
        permuted(np.array([5]), 5, seed=0, epoch=0)
