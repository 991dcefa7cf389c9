"""Attention inside documents: each is read as if it were alone, by the network, its gradients and its probes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.weights import architecture, disturbed, generator
from torch import Tensor

from empirics.bounds import BOUNDED, a_posteriori_bounds
from empirics.model import Attention, Transformer, build
from empirics.monitor import StabilityMonitor, check
from empirics.probes import gradient_profile, layer_norms
from empirics.registry import find
from empirics.subject import Subject
from theory.architecture import Architecture, preset
from theory.growth import gradient_growth

END = 1
SIZES: dict[str, Any] = {
    "d_model": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "d_head": 6, "d_ffn": 40, "vocab_size": 30,
    "context": 64,
}  # fmt: skip
NETWORKS: dict[str, dict[str, Any]] = {
    "rope": {"positions": "rope"},
    "alibi": {"positions": "alibi"},
    "none": {"positions": "none"},
    "windows": {"positions": "rope", "window": 3, "global_every": 2},
    "alibi, windows": {"positions": "alibi", "window": 3, "global_every": 2},
    "grouped": {"positions": "rope", "n_kv_heads": 2},
    "softcap": {"positions": "rope", "attention_softcap": 2.0},
    "softcap, alibi": {"positions": "alibi", "attention_softcap": 2.0},
    "parallel": {"positions": "rope", "parallel": True},
    "post-ln": {"positions": "rope", "block": "post-ln"},
    "experts": {"positions": "rope", "n_experts": 3, "experts_per_token": 2},
}
# No fused attention has a soft cap.
CASES = [(name, kernel) for name in NETWORKS for kernel in ("fused", "plain") if kernel == "plain" or "cap" not in name]


def masked(a: Architecture, end: int | None = END) -> Transformer:
    model = disturbed(a)
    model.end_of_document = end
    return model


def some(*lengths: int, seed: int = 0) -> list[Tensor]:
    """A sequence of documents: random tokens, each but the last followed by its end; (1, T) each."""
    drawn = [torch.randint(2, 30, (1, length), generator=generator(seed + n)) for n, length in enumerate(lengths)]
    end = torch.tensor([[END]])
    return [*(torch.cat([document, end], 1) for document in drawn[:-1]), drawn[-1]]


def exact() -> float:
    """Of numbers of order one, by sums of some thousand terms."""
    return 1e3 * torch.finfo(torch.float64).eps


def far(x: Tensor, y: Tensor) -> float:
    return float((x - y).detach().abs().max())


def test_documents_are_numbered() -> None:
    model = build(architecture(**SIZES), seed=0)
    tokens = torch.tensor([[5, END, END, 6, 7, END], [END, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 7]])
    assert model.documents(tokens) is None
    model.end_of_document = END
    numbers = model.documents(tokens)
    assert numbers is not None
    assert numbers.tolist() == [[0, 0, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1], [0] * 6]
    layer = model.layers[0].attention
    assert isinstance(layer, Attention)
    assert layer.seen(6, tokens.device, documents_BT=numbers)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1],
    ]  # fmt: skip


# --- the network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_a_document_is_read_as_if_it_were_alone(name: str, kernel: Any) -> None:
    """Logits and gradients of sequences of several documents, and those of the documents; without the mask, others."""
    model = masked(architecture(**SIZES | NETWORKS[name]))
    model.attend(kernel, device="cpu", dtype=torch.float64, n_tokens=14)
    rows = [some(4, 3, 5), some(9, 0, 3, seed=10), some(14, seed=20)]
    tokens = torch.cat([torch.cat(row, 1) for row in rows])
    assert tokens.shape == (3, 14)
    cotangent = torch.randn(3, 14, 30, generator=generator(5), dtype=torch.float64)
    parameters = list(model.parameters())

    def pulled(logits: Tensor) -> list[Tensor]:
        found = torch.autograd.grad((logits * cotangent).sum(), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    together = model(tokens)
    model.end_of_document = None
    alone = torch.cat([torch.cat([model(document) for document in row], 1) for row in rows])
    whole = model(tokens)
    torch.testing.assert_close(together, alone, rtol=exact(), atol=exact())
    assert far(whole, alone) > 1e-2
    gradients = list(zip(pulled(together), pulled(alone), pulled(whole), strict=True))
    for found, expected, _ in gradients:
        torch.testing.assert_close(found, expected, rtol=exact(), atol=exact() * float(expected.abs().max()))
    assert max(far(other, expected) for _, expected, other in gradients) > 1e-2
    torch.testing.assert_close(whole[2], alone[2], rtol=exact(), atol=exact())  # one document


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("changes", [NETWORKS[name] for name in ("rope", "alibi", "windows", "grouped", "softcap")])
@pytest.mark.parametrize("kernel", ["auto", "plain"])
def test_without_an_end_no_bit_is_another(changes: dict[str, Any], dtype: torch.dtype, kernel: Any) -> None:
    """On a CPU, where the fused kernel does the same arithmetic with a mask and without."""
    a = architecture(**SIZES | changes)
    found: list[list[Tensor]] = []
    for end in (None, END):
        model = build(a, seed=3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        model.end_of_document = end
        model.attend(kernel, device="cpu", dtype=dtype, n_tokens=40)
        tokens = torch.randint(2, 30, (2, 40), generator=generator(1))
        tokens[1, -1] = END  # none of the sequence comes after it
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            loss = model.loss(tokens, tokens)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_bfloat16_is_near_float32() -> None:
    """As near with the mask as without; a few parts in a hundred of logits of order one."""
    a = architecture(**SIZES | NETWORKS["rope"])
    tokens = torch.cat(some(9, 4, 7), 1)
    errors: list[float] = []
    for end in (None, END):
        model = masked(a, end).float().requires_grad_(False)
        exact_logits = model(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(tokens)
        errors.append(float((rounded.float() - exact_logits).norm() / exact_logits.norm()))
    assert max(errors) < 16 * torch.finfo(torch.bfloat16).eps
    assert errors[1] < 2 * errors[0]


def test_compiled_in_one_graph() -> None:
    """Documents are counted in the graph, which serves batches with other ends, or without one."""
    model = masked(architecture(**SIZES, positions="rope")).requires_grad_(False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    batches = [torch.cat(some(*lengths), 1) for lengths in ((6, 5), (3, 2, 5), (12,))]
    torch._dynamo.utils.counters.clear()
    for tokens in batches:
        torch.testing.assert_close(compiled(tokens), model(tokens), rtol=exact(), atol=exact())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_learned_positions_go_on_counting() -> None:
    """The second document is read at the places that it has in the window, and not at the first ones."""
    model = masked(architecture(**SIZES, positions="learned"))
    first, second = some(6, 5)
    together = model(torch.cat([first, second], 1))[:, 7:]
    assert far(together, model(second)) > 1e-2
    assert model.positions is not None
    with torch.no_grad():
        model.positions.weight.copy_(model.positions.weight.roll(-7, 0))
    torch.testing.assert_close(together, model(second), rtol=exact(), atol=exact())


def test_documents_of_another_batch_are_refused() -> None:
    """Also where they would fit by broadcasting."""
    model = masked(architecture(**SIZES, positions="rope"))
    x = torch.randn(2, 9, 24, dtype=torch.float64, generator=generator(0))
    for shape in ((1, 9), (3, 9), (2, 8), (2, 1)):
        for kernel in ("fused", "plain"):
            model.attend(kernel, device="cpu", dtype=torch.float64, n_tokens=9)
            with pytest.raises(AssertionError, match="another batch"):
                model.layers[0](x, None, torch.zeros(shape, dtype=torch.int32))


def test_the_layer_is_the_composition_of_its_updates_within_documents() -> None:
    for changes in ({}, {"parallel": True}):
        model = masked(architecture(**SIZES, positions="rope", **changes))
        tokens = torch.cat(some(4, 6), 1)
        documents, x = model.documents(tokens), model.embed(tokens)
        layer: Any = model.layers[0]
        y = x
        for update in layer.updates_within(documents):
            y = update(y)
        assert torch.equal(y, layer(x, None, documents))
        assert not torch.allclose(y, layer(x))


# --- the probes -----------------------------------------------------------------------------------------------------

NORMS = ("attention", "J_Z", "attention_branch", "feedforward_branch", "layer")


@pytest.mark.parametrize("changes", [{"positions": "rope"}, {"positions": "alibi", "parallel": True}], ids=str)
def test_probes_see_the_masked_network(changes: dict[str, Any]) -> None:
    """A Jacobian of documents that do not see each other is theirs side by side: its norm is the largest of theirs."""
    model = masked(architecture(**SIZES | changes))
    documents = some(6, 5, 4)
    tokens = torch.cat(documents, 1)
    seen = Subject(model, tokens, tokens, tolerance=1e-9)
    each = [Subject(model, document, document, tolerance=1e-9) for document in documents]
    for name in NORMS:
        theirs = torch.tensor([[norm.value for norm in subject.norms(name)] for subject in each]).amax(0)
        torch.testing.assert_close(torch.tensor([norm.value for norm in seen.norms(name)]), theirs, rtol=1e-6, atol=0)
    stack = max(subject.stack_norm().value for subject in each)
    assert seen.stack_norm().value == pytest.approx(stack, rel=1e-6)
    # Rows of two keys or more count: of a document, its length less one.
    rows = [len(document[0]) - 1 for document in documents]
    for found, *theirs in zip(seen.attention_rows(), *(subject.attention_rows() for subject in each), strict=True):
        for k in range(3):
            mean = sum(n * row[k] for n, row in zip(rows, theirs, strict=True)) / sum(rows)
            torch.testing.assert_close(found[k], mean, rtol=exact(), atol=exact())
    model.end_of_document = None
    unmasked = Subject(model, tokens, tokens, tolerance=1e-9)
    assert not torch.allclose(unmasked.attention_rows()[0].entropy, seen.attention_rows()[0].entropy, rtol=1e-2)
    assert unmasked.norms("J_Z")[0].value != pytest.approx(seen.norms("J_Z")[0].value, rel=1e-4)


def test_bounds_are_of_the_masked_network() -> None:
    model = masked(architecture(**SIZES, positions="rope"))
    tokens = torch.cat(some(6, 5, 4), 1)
    subject = Subject(model, tokens, tokens, tolerance=1e-6)
    bounds = a_posteriori_bounds(subject)
    model.end_of_document = None
    assert a_posteriori_bounds(Subject(model, tokens, tokens))["attention_jacobian"] != bounds["attention_jacobian"]
    model.end_of_document = END
    for name in set(BOUNDED) & set(bounds):
        values = find(name).measure(subject).values
        assert all(value <= bound * (1 + 1e-9) for value, bound in zip(values, bounds[name], strict=True)), name


def test_norms_of_layers_are_those_of_the_subject() -> None:
    model = masked(architecture(**SIZES, positions="rope"))
    tokens = torch.cat(some(6, 5), 1)
    subject = Subject(model, tokens, tokens, tolerance=1e-9)
    rows = layer_norms(model, tokens, tolerance=1e-9)
    for name in ("J_Z", "attention_branch", "attention_half"):
        expected = [norm.value for norm in subject.norms(name)]
        assert [row[name] for row in rows] == pytest.approx(expected, rel=1e-6)


def test_a_monitor_sees_the_masked_network() -> None:
    """It calls a layer again with what the layer was given, documents among it, on the first sequence."""
    model = masked(architecture(**SIZES, positions="rope")).float()
    tokens = torch.cat([torch.cat(some(6, 5, 2), 1), torch.cat(some(2, 9, 2, seed=10), 1)])
    monitor = StabilityMonitor(model, probes="default,half_layer_jacobian,attention_jacobian")
    with monitor.step():
        model.loss(tokens, tokens).backward()
    model.zero_grad()
    probes = monitor.records[-1].probes
    subject = Subject(model, tokens, tokens)
    for name in ("attention_entropy", "logit_variance", "half_layer_jacobian", "attention_jacobian"):
        assert probes[name].values == pytest.approx(find(name).measure(subject).values, rel=2e-2), name
    assert probes["attention_entropy"].values == pytest.approx(
        find("attention_entropy").measure(subject).values, rel=1e-5
    )
    model.end_of_document = None
    other = find("attention_entropy").measure(Subject(model, tokens, tokens)).values
    assert probes["attention_entropy"].values != pytest.approx(other, rel=5e-2)


def test_predictions_are_outside_where_attention_stops() -> None:
    """And hold where no end is among the tokens, for it is the same network."""
    model = build(replace(architecture(**SIZES | {"d_model": 64, "d_head": 16}), positions="rope"), seed=0)
    model.end_of_document = END
    with_ends = torch.cat([torch.cat(some(12, 12, seed=seed), 1) for seed in (0, 10, 20, 30)])
    without = torch.where(with_ends == END, 2, with_ends)
    reason = "attention stops at ends of documents"
    found = check(model, with_ends)
    assert found.verdict == "unknown"
    assert any(reason in why for why in found.reasons)
    assert not any(reason in why for why in check(model, without).reasons)
    model.end_of_document = None
    assert not any(reason in why for why in check(model, with_ends).reasons)


def test_documents_grow_as_sequences_of_their_length() -> None:
    """Four of 16 tokens in a window of 64: predicted at 16 tokens within three standard errors, and not at 64."""
    a, length, logs = preset("wide"), 16, list[float]()
    for seed in range(4):
        model = build(a, seed=seed)
        model.end_of_document = END
        tokens, targets = torch.randint(2, a.vocab_size, (2, 4, 64), generator=generator(seed))
        tokens[:, length - 1 :: length] = END
        _, gradient = gradient_profile(model, tokens, targets)
        logs.append(math.log(gradient[0] / gradient[-1]))
    error = 3 * float(np.std(logs, ddof=1)) / math.sqrt(len(logs))
    away = {n: abs(math.log(gradient_growth(a, n).value) - float(np.mean(logs))) for n in (length, 64)}
    assert away[length] < error < away[64]
