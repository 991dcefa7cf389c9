"""Tokens to batches: the same numbers for every method, process and machine.

Every batch is a pure function of a seed and a step, so that a resumed run needs no replay, and a process of several
can take its own rows of the global batch without reading the others'.

Windows cross the ends of documents, as in GPT-2's training: the token that ends a document is in them, and the first
token of the next document is predicted like any other. Whether attention looks past an end is the model's to say
(`Transformer.documents`), which finds it in the tokens. Nothing here needs torch.

Shapes: B sequences in a batch, T tokens in a sequence.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from empirics.corpus import Corpus, Tokens
from empirics.shards import ShardedTokens
from theory.words import counted

Batch = tuple[NDArray[np.int64], NDArray[np.int64]]
Order = Literal["random", "epoch"]
ORDERS: tuple[Order, ...] = get_args(Order)
STREAMS = ("batch", "random", "epoch")  # independent random streams; only ever append, for the numbers hang on it
ROUNDS = 8  # Luby and Rackoff need 4 of a random function; the round function here is only a good mixer


def batch(
    corpus: Corpus,
    *,
    seed: int,
    step: int,
    batch_size: int,
    seq_len: int,
    order: Order = "random",
    rows: slice = slice(None),
) -> Batch:
    """Training tokens and next tokens of one step, (B, T) each: a pure function of `seed` and `step`.

    Any step's batch is had without replaying the earlier ones, and every method sees the same data.

    Args:
        order: `random` sequences start anywhere, with replacement. `epoch` cuts the split into windows that do not
            overlap and takes each once an epoch, every epoch in another order; a batch may end one epoch and begin
            the next, and the last tokens, fewer than T, are never seen.
        rows: of the batch, those that are wanted; nothing else is read.

    Raises:
        ValueError: the training split is shorter than seq_len + 1; seed or step is negative or beyond 64 bits;
            unknown order.
    """
    places = _places(corpus.train, seq_len, "training")
    if order == "random":
        starts = (_raw(seed, step, "batch", batch_size) % np.uint64(places)).astype(np.int64)[rows]
    elif order == "epoch":
        windows = (len(corpus.train) - 1) // seq_len
        taken = np.array([step * batch_size + row for row in range(batch_size)[rows]], dtype=object)
        starts = np.empty(len(taken), np.int64)
        for epoch in sorted(set(taken // windows)):
            now = taken // windows == epoch
            starts[now] = seq_len * permuted((taken[now] % windows).astype(np.int64), windows, seed=seed, epoch=epoch)
    else:
        raise ValueError(f"unknown order {order!r}; use one of {', '.join(ORDERS)}")
    return _windows(corpus.train, starts, seq_len)


def require_length(corpus: Corpus, seq_len: int) -> None:
    """Refuse a text too short to train on and to be tested on, before either is begun.

    Raises:
        ValueError: a split is shorter than seq_len + 1.
    """
    _places(corpus.train, seq_len, "training")
    _places(corpus.heldout, seq_len, "held-out")


def permuted(places: NDArray[np.int64], size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where a permutation of 0 .. size - 1 takes `places`, in memory that does not depend on `size`.

    A Feistel network permutes the numbers of an even count of bits, at most 4 times as many as `size`; what falls
    outside is permuted again until it does not, which keeps it a permutation. The keys are random numbers of `seed` and
    `epoch`.

    Source: Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains (cycle walking); the mixing is the
    finaliser of SplitMix64, Steele et al. 2014.

    >>> sorted(permuted(np.arange(5), 5, seed=0, epoch=0).tolist())
    [0, 1, 2, 3, 4]
    """
    if size < 1 or (places.size and not 0 <= places.min() <= places.max() < size):
        raise ValueError(f"places outside 0 .. {size - 1} are not permuted; use smaller ones")
    keys = _raw(seed, epoch, "epoch", ROUNDS)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = places.astype(np.uint64)
    walking = np.ones(result.shape, bool)
    while walking.any():
        left, right = result[walking] >> half, result[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        result[walking] = left << half | right
        walking = result >= np.uint64(size)
    return result.astype(np.int64)


def heldout_batches(corpus: Corpus, *, batch_size: int, seq_len: int, count: int) -> list[Batch]:
    """`count` batches of held-out tokens and next tokens, (B, T) each; the same in every call.

    Windows lie at even distances; they overlap only if the split is too short. Each batch spans the whole split.

    Raises:
        ValueError: the held-out split is shorter than seq_len + 1.
    """
    places = _places(corpus.heldout, seq_len, "held-out")
    windows = batch_size * count
    starts = np.arange(windows, dtype=np.int64) * places // max(windows, 1)
    return [_windows(corpus.heldout, starts[first::count], seq_len) for first in range(count)]


def random_tokens(vocab_size: int, *, seed: int, batch_size: int, seq_len: int) -> Batch:
    """Tokens and, independent of them, next tokens, (B, T) each, uniform on 1 .. vocab_size - 1.

    Id 0 is left out, because some model classes zero or ignore that row of the token table, the padding row.

    >>> tokens, targets = random_tokens(512, seed=0, batch_size=2, seq_len=3)
    >>> tokens.shape, bool((tokens > 0).all() and (targets < 512).all())
    ((2, 3), True)
    """
    if vocab_size < 2:
        raise ValueError(f"vocab_size={vocab_size} leaves no token beside the unused id 0; use at least 2")
    drawn = 1 + (_raw(seed, 0, "random", 2 * batch_size * seq_len) % np.uint64(vocab_size - 1)).astype(np.int64)
    tokens, targets = drawn.reshape(2, batch_size, seq_len)
    return tokens, targets


def _raw(seed: int, step: int, stream: Literal["batch", "random", "epoch"], count: int) -> NDArray[np.uint64]:
    """64 random bits per entry. Philox's raw output is fixed for ever; numpy may change its distributions."""
    for name, value in (("seed", seed), ("step", step)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name}={value} is out of range; use 0 to 2**64 - 1")
    key = np.array([seed, STREAMS.index(stream)], dtype=np.uint64)
    # Philox counts in the first word: with the step in the second, no two steps can share a block.
    counter = np.array([0, step, 0, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return bits ^ bits >> np.uint64(31)


def _places(ids: Tokens, seq_len: int, split: str) -> int:
    """Number of places where a window of `seq_len` tokens and its next tokens fit."""
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} is no sequence; use at least 1")
    if len(ids) <= seq_len:
        raise ValueError(
            f"the {split} split has {counted(len(ids), 'token')}, fewer than the {seq_len + 1} of seq_len={seq_len}; "
            "use a longer text or a shorter sequence"
        )
    return len(ids) - seq_len


def _windows(ids: Tokens, starts: NDArray[np.int64], seq_len: int) -> Batch:
    if isinstance(ids, ShardedTokens):
        block = ids.windows(starts, seq_len + 1)
    else:
        block = ids[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)
    return block[:, :-1].copy(), block[:, 1:].copy()
