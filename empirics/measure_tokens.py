"""Tokens to measure a network on: random ids, or text by the tokenizer that belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from empirics.anatomy import token_table
from empirics.data import batch, load_corpus, load_text, random_tokens
from empirics.decoder_growth import Tokens, distinct_tokens
from empirics.networks import Network

TOKENIZER = "tokenizer.json"
TEXT_BYTES = 2_000_000  # of a text that is tokenised for a few batches


class Batches(NamedTuple):
    """Tokens and next tokens, (B, T) each, of a network and a seed; and what they are."""

    of: Callable[[nn.Module, int], Tokens]
    description: str


def batches_of(
    network: Network, *, batch_size: int, seq_len: int, data: str | None, cache: Path | None, device: str
) -> Batches:
    """Random ids, or the text that `data` names.

    Our own networks have ids from 1 on, uniformly; a class of transformers has distinct ones that are not padding. Text
    is read by the `tokenizer.json` of the network's folder; without one, by a tokenizer that is trained on it.

    Raises:
        ValueError: there is no such text or tokenizer, or it does not fit the network.
    """
    shape = {"batch_size": batch_size, "seq_len": seq_len}
    own = network.implementation == "own"

    def moved(pair: tuple[np.ndarray, np.ndarray]) -> Tokens:
        tokens, targets = (torch.from_numpy(part.astype(np.int64)).to(device) for part in pair)
        return tokens, targets

    if data is None and own:
        assert network.architecture is not None
        vocabulary = network.architecture.vocab_size
        return Batches(lambda _, seed: moved(random_tokens(vocabulary, seed=seed, **shape)), "uniformly random")
    if data is None:
        return Batches(lambda model, seed: distinct_tokens(model, seed, **shape), "random, distinct in a sequence")
    tokenizer = None if network.folder is None else network.folder / TOKENIZER
    if tokenizer is not None and tokenizer.is_file():
        ids, name = tokenised(data, tokenizer)
        return Batches(
            lambda model, seed: _windows(model, ids, seed, device=device, **shape), f"{name}, by {tokenizer}"
        )
    vocabulary = network.architecture.vocab_size if network.architecture else network.settings.vocab_size
    corpus = load_corpus(data, vocab_size=vocabulary, cache=cache)
    trained = f"{corpus.description}, by a tokenizer trained on it"
    return Batches(lambda _, seed: moved(batch(corpus, seed=seed, step=0, **shape)), trained)


def tokenised(data: str, tokenizer: Path) -> tuple[np.ndarray, str]:
    """A text as one row of ids, and what it is.

    Raises:
        ValueError: there is no such text, or the file is no tokenizer.
    """
    from tokenizers import Tokenizer

    source = load_text(data, limit=TEXT_BYTES)
    try:
        read = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises Exception itself
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{tokenizer} is no tokenizer ({reason}); fetch it again, or leave out --data") from None
    encoded = read.encode_batch(list(source.documents), add_special_tokens=False)
    return np.concatenate([np.array(row.ids, np.int64) for row in encoded]), source.description


def _windows(
    model: nn.Module, ids: np.ndarray, seed: int, *, batch_size: int, seq_len: int, device: str
) -> tuple[Tensor, Tensor]:
    """Rows that begin anywhere, with replacement."""
    vocabulary = token_table(model).num_embeddings
    if ids.size and ids.max() >= vocabulary:
        raise ValueError(
            f"the folder's tokenizer gives the id {ids.max()} and the network has {vocabulary}; leave out --data"
        )
    if ids.size < seq_len + 1:
        raise ValueError(
            f"the text has {ids.size} tokens, fewer than {seq_len} and a next one; use a smaller --seq-len"
        )
    starts = np.random.default_rng(seed).integers(ids.size - seq_len, size=batch_size)
    rows = torch.from_numpy(np.stack([ids[start : start + seq_len + 1] for start in starts])).to(device)
    return rows[:, :-1], rows[:, 1:]
