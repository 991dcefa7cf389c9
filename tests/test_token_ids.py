"""Token ids that a decoder is asked with: too few and malformed ones, and as many as there is place for."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.decoders import VOCAB, NanoGPT
from torch import Tensor, nn

from empirics.model import build
from empirics.monitor import StabilityMonitor, check, describe
from empirics.token_ids import N_TOKENS, context_of, one_sequence
from theory.architecture import preset

IDS = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
BAD: dict[str, tuple[Any, str]] = {
    "one sequence alone": (IDS[0], r"tokens has shape \(16,\); .* of one sequence give tokens\[None\]"),
    "embedded": (IDS[..., None].expand(2, 16, 4), r"tokens has shape \(2, 16, 4\); give ids of shape \(B, T\)"),
    "a list": (IDS.tolist(), r"tokens is of type list; give a tensor of ids, shape \(B, T\)"),
    "no sequence": (IDS[:0], r"tokens has shape \(0, 16\); give ids"),
    "no token": (IDS[:, :0], r"tokens has shape \(2, 0\); give at least 2 tokens a sequence"),
    "one token": (IDS[:, :1], r"tokens has shape \(2, 1\); give at least 2 tokens a sequence"),
    "numbers": (IDS.float(), r"tokens is of torch.float32; give ids, as torch.int64"),
    "too large": (IDS + 200, r"tokens has the id 24\d; the model's are 0 to 127"),  # its table of positions has 128
    "negative": (IDS - 1000, r"tokens has the id -\d+; the model's are 0 to 127"),
}
ASKED: dict[str, Callable[[nn.Module, Any], Any]] = {
    "check": check,
    "describe": describe,
    "StabilityMonitor": lambda model, tokens: StabilityMonitor(model, tokens=tokens),
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize(("tokens", "words"), BAD.values(), ids=BAD)
def test_what_are_no_token_ids_is_refused_in_one_line(
    tokens: Any, words: str, ask: Callable[[nn.Module, Any], Any]
) -> None:
    with pytest.raises(ValueError, match=rf"^{words}[^\n]*$"):
        ask(NanoGPT(), tokens)


def test_ids_of_half_the_bits_are_the_same_ids() -> None:
    torch.manual_seed(0)
    model = NanoGPT()
    found, expected = (check(model, ids, loss=its_own).record for ids in (IDS.int(), IDS))
    assert found.residual_std == expected.residual_std


@pytest.mark.parametrize("n_tokens", [2, 3, 4, 8, 10])
def test_few_tokens_tell_as_much(n_tokens: int) -> None:
    """Also where there are as many as heads."""
    torch.manual_seed(0)
    model = NanoGPT()
    seen, full = describe(model, IDS[:, :n_tokens]), describe(model)
    assert str(seen) == str(full)  # four digits of the multipliers
    assert seen.stds == full.stds
    assert (seen.block, seen.parallel) == ("pre-ln", False)
    places = StabilityMonitor(model, tokens=IDS[:, :n_tokens]).anatomy
    assert places.half_layers
    assert all(wired.attention and wired.feedforward for wired in places.wirings)
    assert check(model, IDS[:, :n_tokens], loss=its_own).record.n_tokens == 2 * (n_tokens - 1)


def its_own(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Of a model that gives logits without targets in a pass of its own."""
    return model(tokens, targets)[1]


def short(places: int) -> NanoGPT:
    torch.manual_seed(0)
    model = NanoGPT()
    model.transformer["wpe"] = nn.Embedding(places, 64)
    return model


def test_a_short_context_is_used_as_it_is() -> None:
    """Its own ids fit as they are given; without any, its config says how many fit."""
    model = short(8)
    assert check(model, IDS[:, :8], loss=its_own).record.n_tokens == 2 * 7
    with pytest.raises(
        ValueError, match=r"does not run on 11 token ids alone .*: tokens=IDS, shape \(B, T\), or --seq-len"
    ):
        StabilityMonitor(model)
    model.config = SimpleNamespace(block_size=8)  # type: ignore[assignment]
    assert StabilityMonitor(model).anatomy.half_layers
    assert check(model, loss=its_own).record.n_tokens == 4 * 8


def test_as_many_as_the_model_says_and_no_more() -> None:
    def length(tokens: Tensor | None = None, **said: Any) -> int:
        model = NanoGPT()
        model.config = SimpleNamespace(**said)  # type: ignore[assignment]
        assert context_of(model) == next((value for value in said.values() if value), None)
        return one_sequence(model, tokens).shape[1]

    assert [length(max_position_embeddings=n) for n in (1, 5, 11, 64)] == [2, 5, N_TOKENS, N_TOKENS]
    assert [length(max_seq_len=5), length(max_position_embeddings=None, block_size=5), length()] == [5, 5, N_TOKENS]
    assert [length(IDS[:, :n], block_size=5) for n in (4, 16)] == [4, N_TOKENS]
    assert context_of(build(preset("tiny"), seed=0)) == preset("tiny").context


def test_probes_that_are_no_text_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^probes=3 is no text; write for example [^\n]*$"):
        StabilityMonitor(NanoGPT(), probes=3)  # type: ignore[arg-type]
