"""Tokens to measure a network on: random ids, or text by the tokenizer that belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from empirics.data import batch, is_shards, load_corpus, random_tokens
from empirics.decoder_growth import Tokens, distinct_tokens
from empirics.networks import Network

TOKENIZER = "tokenizer.json"
TEXT_BYTES = 2_000_000  # of a text that is read for a few batches


class Batches(NamedTuple):
    """Tokens and next tokens, (B, T) each, of a network and a seed; and what they are."""

    of: Callable[[nn.Module, int], Tokens]
    description: str


def batches_of(
    network: Network, *, batch_size: int, seq_len: int, data: str | None, cache: Path | None, device: str
) -> Batches:
    """Random ids, or the text that `data` names.

    Our own networks have ids from 1 on, uniformly; a class of transformers has distinct ones that are not padding. Text
    is read by the `tokenizer.json` of the network's folder; at initialisation, by a tokenizer that is trained on it.

    Raises:
        ValueError: there is no such text, the tokenizer cannot be read, or they do not fit the network.
    """
    shape = {"batch_size": batch_size, "seq_len": seq_len}
    a = network.architecture

    def moved(pair: tuple[np.ndarray, np.ndarray]) -> Tokens:
        tokens, targets = (torch.from_numpy(part.astype(np.int64)).to(device) for part in pair)
        return tokens, targets

    if data is None and network.implementation == "own":
        assert a is not None
        return Batches(lambda _, seed: moved(random_tokens(a.vocab_size, seed=seed, **shape)), "uniformly random")
    if data is None:
        return Batches(lambda model, seed: distinct_tokens(model, seed, **shape), "random, distinct in a sequence")
    vocab_size = a.vocab_size if a is not None else int(network.settings.vocab_size)
    tokenizer, how = tokenizer_of(data, network.folder, trained=network.trained)
    corpus = load_corpus(data, vocab_size=vocab_size, tokenizer=tokenizer, limit=TEXT_BYTES, cache=cache)

    def text(_: nn.Module, seed: int) -> Tokens:
        return moved(batch(corpus, seed=seed, step=0, batch_size=batch_size, seq_len=seq_len))

    return Batches(text, f"{corpus.description}, {how}")


def tokenizer_of(data: str, folder: Path | None, *, trained: bool) -> tuple[str, str]:
    """The tokenizer by which a text is read for a network, and how that is in words; shards bring their own.

    Raises:
        ValueError: the network is trained, and its folder has none.
    """
    if is_shards(data):
        return "bpe", "by its own tokenizer"
    own = None if folder is None else folder / TOKENIZER
    if own is not None and own.is_file():
        return str(own), f"by {own}"
    if trained:
        raise ValueError(f"{folder} has no {TOKENIZER}, and other ids mean nothing to it; drop --data, or add one")
    return "bpe", "by a tokenizer trained on it"
