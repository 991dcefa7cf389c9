"""The loss that is taken a few tokens at a time: torch's own, its gradients, and how little of it is there at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.weights import architecture, generator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from empirics import head_loss
from empirics.head_loss import HeadLoss
from empirics.model import build, cross_entropy

N, D, V = 13, 5, 11


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that an operation gives, views included."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(x.numel() for x in (found,) if isinstance(x, Tensor))])
        return found


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    g = generator(0)
    x, weight = (torch.randn(n, D, generator=g, dtype=torch.float64).requires_grad_() for n in (N, V))
    return x, weight, torch.randint(V, (N,), generator=g)


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss, *torch.autograd.grad(loss * 0.7, leaves)]


@pytest.mark.parametrize("at_once", [1, 4 * V, 13 * V, 100 * V])
def test_loss_and_gradients_are_torch_s(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of 1, 4, 13 and more tokens: with one left over, and all in one part."""
    monkeypatch.setattr(head_loss, "AT_ONCE", at_once)
    monkeypatch.setattr(head_loss, "LEAST_TOKENS", 1)
    x, weight, targets = drawn()
    expected = gradients(F.cross_entropy(x @ weight.mT, targets), x, weight)
    found = gradients(HeadLoss.apply(x, weight, targets), x, weight)
    for one, other in zip(found, expected, strict=True):  # sums of a dozen terms of order one
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)
    moved = gradients(HeadLoss.apply(x, weight, targets.roll(1)), x, weight)  # control
    assert not any(torch.allclose(one, other) for one, other in zip(moved, expected, strict=True))


@pytest.mark.parametrize("vocabulary", [V, 211])
def test_a_token_that_is_ignored_does_not_count(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where -100 is an index from the end of the vocabulary, and where a part has no other token."""
    monkeypatch.setattr(head_loss, "AT_ONCE", 1)
    monkeypatch.setattr(head_loss, "LEAST_TOKENS", 4)
    x, _, targets = drawn()
    weight = torch.randn(vocabulary, D, generator=generator(1), dtype=torch.float64).requires_grad_()
    targets[[0, 4, 5, 6, 7]] = -100
    expected = gradients(F.cross_entropy(x @ weight.mT, targets), x, weight)
    for one, other in zip(gradients(HeadLoss.apply(x, weight, targets), x, weight), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)
    with torch.no_grad():
        assert HeadLoss.apply(x, weight, torch.full_like(targets, -100)).isnan()  # as torch has it


def test_a_target_of_no_probability_has_a_finite_loss() -> None:
    x, weight, targets = torch.tensor([[300.0]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([1])
    assert float(HeadLoss.apply(x, weight, targets)) == 600.0


def test_a_vocabulary_of_equal_logits_far_from_zero_has_its_logarithm_as_loss() -> None:
    """The largest probability is 1/V there, as small as it can be."""
    x, weight, targets = torch.full((3, 1), 1e4), torch.ones(50_000, 1), torch.tensor([0, 7, 49_999])
    loss = float(HeadLoss.apply(x, weight, targets))
    assert loss == pytest.approx(math.log(50_000), rel=4 * torch.finfo(torch.float32).eps)


def test_a_second_derivative_is_refused() -> None:
    x, weight, targets = drawn()
    with pytest.raises(RuntimeError, match="has one derivative"):
        torch.autograd.grad(HeadLoss.apply(x, weight, targets), x, create_graph=True)


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"logit_multiplier": 0.3}, {"final_norm": False}])
def test_a_model_s_loss_is_the_cross_entropy_of_its_logits(changes: dict[str, Any]) -> None:
    model = build(architecture(vocab_size=V, context=8, **changes), seed=0, dtype=torch.float64)
    tokens, targets = torch.arange(16).reshape(2, 8) % V, torch.arange(3, 19).reshape(2, 8) % V
    leaves = list(model.parameters())
    expected = gradients(F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()), *leaves)
    for one, other in zip(gradients(model.loss(tokens, targets), *leaves), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(model.loss(tokens, targets), expected[0], rtol=1e-13, atol=0.0)


def test_the_logits_of_all_tokens_are_never_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest array is the head's gradient; control: with a soft cap it is the logits."""
    monkeypatch.setattr(head_loss, "AT_ONCE", 1)
    monkeypatch.setattr(head_loss, "LEAST_TOKENS", 4)
    tokens = torch.arange(64).reshape(2, 32)
    for cap in (0.0, 5.0):
        model = build(architecture(vocab_size=1000, context=32, logit_softcap=cap), seed=0)
        with Largest() as largest:
            model.loss(tokens, tokens).backward()
        assert model.architecture.d_model < tokens.numel()
        assert largest.size == 1000 * (tokens.numel() if cap else model.architecture.d_model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    """70000 nats are beyond float16, and beside 500 of them bfloat16 does not see one."""
    model = build(architecture(vocab_size=V, context=8), seed=0, dtype=dtype)
    tokens = torch.zeros(4000, 8, dtype=torch.long)
    with torch.no_grad():
        expected = model.loss(tokens, tokens)
    assert float(expected) * tokens.numel() > torch.finfo(torch.float16).max
    assert torch.equal(model.loss(tokens, tokens).detach(), expected)


def test_hooks_on_the_head_are_called() -> None:
    """Those of either pass; the loss is the same without them."""
    model = build(architecture(vocab_size=V, context=8), seed=0)
    tokens, called = torch.arange(16).reshape(2, 8) % V, list[str]()
    expected = model.loss(tokens, tokens)
    puts = {
        "forward": model.head.register_forward_hook,
        "before": model.head.register_forward_pre_hook,
        "backward": model.head.register_full_backward_hook,
        "before backward": model.head.register_full_backward_pre_hook,
    }
    for name, put in puts.items():
        handle = put(lambda *_, name=name: called.append(name))  # type: ignore[arg-type]
        loss = model.loss(tokens, tokens)
        loss.backward()
        handle.remove()
        torch.testing.assert_close(loss, expected)
    assert called == list(puts)


def test_a_head_with_a_bias_is_called() -> None:
    model = build(architecture(vocab_size=V, context=8), seed=0)
    tokens = torch.arange(16).reshape(2, 8) % V
    model.head = torch.nn.Linear(model.architecture.d_model, V)
    torch.testing.assert_close(model.loss(tokens, tokens), cross_entropy(model(tokens), tokens))
