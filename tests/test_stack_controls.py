"""Controls of the rigorous product: the same composition with measured norms, on networks made to come near it.

The bound that `check` prints is far above any network's growth, since its norms hold for almost all weights and its
sub-layers for all inputs; a factor left out would not show. Here the norms that it is composed of are those of the
very weights, and the weights have one or two directions, chosen such that each factor in turn is attained. Then one
is left out, and the product must fall below the truth.

Not among them: factors of at most one (LayerNorm scaling, soft-caps), which only loosen what forgets them, and the
largest length of a token, which matters to unnormalised sub-layers alone, after norms that are not attained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from helpers.weights import architecture, svd_norm
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from empirics.model import Experts, FeedForward, Transformer, build
from empirics.observables import observe_softmax
from empirics.spectral import explicit_jacobian
from theory import stack
from theory.architecture import Architecture
from theory.initialisation import Stds
from theory.stack import rigorous_bound

D = 8
X, V = torch.eye(D, dtype=torch.float64)[:2]  # where tokens lie, and a direction that they have nothing of
F1, F2 = torch.eye(2, dtype=torch.float64)  # within a head or between the two feed-forward matrices
ROUNDING = 1 + 1e-9


def outer(factor: float, left: Tensor, right: Tensor) -> Tensor:
    return factor * torch.outer(left, right)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Weights by layer and name, others zero; token i is `tokens[i]` sqrt(D) long along X.

    within: how far the product may be above the truth, from what the direction cannot attain at once.
    """

    weights: Mapping[str, Tensor]
    changes: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[float, ...] = (0.5, -0.5)
    within: float = 1.2

    def model(self) -> Transformer:
        sizes: dict[str, Any] = {"d_model": D, "d_head": 2, "d_ffn": 2, "vocab_size": 4, "context": 4}
        plain: dict[str, Any] = {"norm": "rmsnorm", "eps": 1e-12, "activation": "identity", "positions": "none"}
        model = build(architecture(**sizes | plain | dict(self.changes)), seed=0, dtype=torch.float64)
        left, modules = dict(self.weights), dict(model.layers.named_parameters())
        for name, parameter in modules.items():
            if parameter.dim() == 2:
                parameter.data = left.pop(name.removesuffix(".weight"), torch.zeros_like(parameter.data))
        assert not left, f"no matrix is called {', '.join(left)}"
        model.tokens.weight.data.zero_()
        for row, length in enumerate(self.tokens):
            model.tokens.weight.data[row] = length * math.sqrt(D) * X
        return model

    @property
    def ids(self) -> Tensor:
        return torch.arange(len(self.tokens))[None]


def truth(network: Network, model: Transformer) -> float:
    """The norm of the product of the updates' explicit Jacobians."""
    places: list[Tensor] = []
    model(network.ids, places)
    rest = torch.eye(len(network.tokens) * D, dtype=torch.float64)
    updates: list[Any] = [update for layer in model.layers for update in layer.updates]  # type: ignore[union-attr]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no batching rule
        for update, x in zip(updates, places, strict=False):
            rest = explicit_jacobian(update, x.detach()) @ rest
    return svd_norm(rest)


def measured(model: Transformer) -> tuple[list[Stds], dict[tuple[float, int], float]]:
    """Norms of the matrices of each layer, as its `Stds`; and of a matrix's largest head, by its norm and width."""
    a, each, heads = model.architecture, [], {}
    for layer in model.layers:
        attention, inner = layer.attention, layer.feedforward
        experts = inner.each if isinstance(inner, Experts) else [inner]
        assert all(isinstance(one, FeedForward) for one in experts)
        norms = {"router": svd_norm(inner.router.weight) if isinstance(inner, Experts) else 0.0}
        for name in ("query", "key", "value", "output"):
            weight = getattr(attention, name).weight
            norms[name] = svd_norm(weight)
            if name != "output":
                heads[norms[name], a.d_head] = max(svd_norm(head) for head in weight.split(a.d_head))
        for name, at in (("ffn_in", "enter"), ("ffn_gate", "gate"), ("ffn_out", "leave")):
            found = [svd_norm(getattr(one, at).weight) for one in experts if getattr(one, at) is not None]
            norms[name] = max(found, default=0.0)
        each.append(Stds(embedding=0.0, position=0.0, head=0.0, **norms))
    return each, heads


Patch = Callable[[pytest.MonkeyPatch], None]


def product(
    patch: pytest.MonkeyPatch, network: Network, model: Transformer, *, n_tokens: int = 0, forget: Patch | None = None,
    changes: Mapping[str, Any] | None = None, norms: Mapping[str, float] | None = None,
) -> float:  # fmt: skip
    """`rigorous_bound` of the architecture with what was measured; something may be forgotten or set otherwise."""
    each, heads = measured(model)
    each = [stds._replace(**norms or {}) for stds in each]
    lengths = model.embed(network.ids).detach().norm(dim=-1)
    reach = stack._Reach(float(lengths.min()), float(lengths.max()))

    def opnorm(a: Architecture, failure: float, sigma: float, rows: int, columns: int) -> float:
        return heads.get((sigma, rows), sigma) if rows == a.d_head else sigma

    with patch.context() as within:
        within.setattr(Architecture, "layer_stds", lambda self, layer: each[layer])
        within.setattr(stack, "_opnorm", opnorm)
        within.setattr(stack, "_embedding_reach", lambda *_: reach)
        if forget is not None:
            forget(within)
        _forget_what_is_kept()
        bound = rigorous_bound(replace(model.architecture, **changes or {}), n_tokens or len(network.tokens))
    _forget_what_is_kept()
    return 10**bound.log10_product


def _forget_what_is_kept() -> None:
    stack._attention_bound.cache_clear()
    stack._feedforward_bound.cache_clear()


# --- networks -----------------------------------------------------------------------------------------------------

VALUES = {"0.attention.value": outer(3, F1, V), "0.attention.output": outer(2, V, F1)}
TWICE = torch.cat([F1, F1]) / math.sqrt(2)
# Queries and keys whose logits are zero and whose slopes are not, both along V; and values that differ by the token.
SLOPES = {
    "0.attention.query": outer(3, F1, X) + outer(3, F2, V),
    "0.attention.key": outer(4, F1, V) + outer(4, F2, X),
    "0.attention.value": outer(2, F1, X),
    "0.attention.output": outer(5, V, F1),
}
FEEDFORWARD = {"0.feedforward.enter": outer(3, F1, V), "0.feedforward.leave": outer(2, V, F1)}
SMALL_BRANCH = {"0.feedforward.enter": outer(0.2, F1, V), "0.feedforward.leave": outer(0.5, V, F1)}
READS_V = {"1.feedforward.enter": outer(10, F1, V), "1.feedforward.leave": outer(2, V, F1)}
GATED: dict[str, Any] = {"activation": "identity", "gated": True}

NETWORKS: dict[str, Network] = {
    "values": Network(weights=VALUES),
    "values, multipliers": Network(
        weights=VALUES | {"0.attention.output": outer(1 / 6, V, F1)},
        changes={"residual_multiplier": 3.0, "shortcut_multiplier": 2.0},
    ),
    "values of a group": Network(
        weights=VALUES | {"0.attention.output": outer(2, V, TWICE)}, changes={"n_heads": 2, "n_kv_heads": 1}
    ),
    "slopes": Network(weights=SLOPES, changes={"attention_scale": 2.0}),
    "slopes of a group": Network(
        weights=SLOPES
        | {
            "0.attention.query": SLOPES["0.attention.query"].repeat(2, 1),
            "0.attention.output": outer(5, V, TWICE),
        },
        changes={"n_heads": 2, "n_kv_heads": 1},
    ),
    "normalised queries and keys": Network(
        weights=SLOPES | {"0.attention.query": outer(0.01, F1, X), "0.attention.key": outer(1, F1, V)},
        changes={"qk_norm": "head", "eps": 1e-8},
    ),
    "feed-forward": Network(weights=FEEDFORWARD),
    "both at once": Network(weights=VALUES | FEEDFORWARD, changes={"parallel": True}),
    "one after the other": Network(
        weights=VALUES
        | FEEDFORWARD
        | {"0.attention.output": outer(0.05, V, F1), "0.feedforward.leave": outer(0.05, V, F1)},
        tokens=(0.5,),
    ),
    "two layers": Network(
        weights=FEEDFORWARD | {f"1{name[1:]}": 0.01 * weight for name, weight in FEEDFORWARD.items()},
        changes={"n_layers": 2},
        tokens=(50.0,),
    ),
    "steepest GELU": Network(
        weights={
            "0.feedforward.enter": outer(1, F1, X) * math.sqrt(2 / D) + outer(30, F1, V),
            "0.feedforward.leave": outer(2, V, F1),
        },
        changes={"activation": "gelu"},
        tokens=(0.5, 0.5),
        within=1.01,
    ),
    "gate": Network(
        weights={
            "0.feedforward.enter": outer(2, F1, X),
            "0.feedforward.gate": outer(3, F1, V),
            "0.feedforward.leave": outer(2, V, F1),
        },
        changes=GATED,
        within=2.2,
    ),
    "gated": Network(
        weights={
            "0.feedforward.enter": outer(3, F1, V),
            "0.feedforward.gate": outer(2, F1, X),
            "0.feedforward.leave": outer(2, V, F1),
        },
        changes=GATED,
        within=2.2,
    ),
    "experts": Network(
        weights={
            "0.feedforward.router": 3 * torch.stack([V, -V]),
            **{f"0.feedforward.experts.{e}.enter": outer(2, F1, X) for e in (0, 1)},
            **{f"0.feedforward.experts.{e}.leave": outer(3 - 6 * e, V, F1) for e in (0, 1)},
        },
        changes={"n_experts": 2, "experts_per_token": 2},
        tokens=(0.5, 0.5),
    ),
    "post-ln": Network(weights=SMALL_BRANCH, changes={"block": "post-ln"}),
    "peri-ln": Network(weights=FEEDFORWARD, changes={"block": "peri-ln", "eps": 0.01}, tokens=(1.0, -1.0)),
    "branch-ln": Network(weights=FEEDFORWARD, changes={"block": "branch-ln", "eps": 0.01}, tokens=(1.0, -1.0)),
    # The first layer takes most of the stream away; its own branch is not seen along V.
    "feed-forward shrinks the stream": Network(
        weights={"0.feedforward.enter": outer(1, F1, X), "0.feedforward.leave": outer(-0.8, X, F1), **READS_V},
        changes={"n_layers": 2}, tokens=(1.0,), within=1.81,
    ),
    "heads shrink the stream": Network(
        weights={
            "0.attention.value": torch.cat([outer(1, F1, X), outer(1, F1, X)]),
            "0.attention.output": outer(-0.8 / math.sqrt(2), X, TWICE), **READS_V,
        },
        changes={"n_layers": 2, "n_heads": 2, "n_kv_heads": 2}, tokens=(1.0,), within=1.81,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=NETWORKS)
def made(request: pytest.FixtureRequest) -> tuple[Network, Transformer, float]:
    network = NETWORKS[request.param]
    model = network.model()
    return network, model, truth(network, model)


def test_the_product_of_measured_norms_is_a_bound_and_near(
    made: tuple[Network, Transformer, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, model, true = made
    bound = product(monkeypatch, network, model)
    assert true <= bound * ROUNDING
    assert bound <= network.within * true


# --- what is left out ---------------------------------------------------------------------------------------------


def symbol(statement: str, **values: float) -> Patch:
    """A statement of the composition told these values."""

    def forget(patch: pytest.MonkeyPatch) -> None:
        real = getattr(stack, statement)()

        class Told:
            def evaluate(self, given: Mapping[str, Any]) -> Any:
                assert values.keys() <= given.keys()
                return real.evaluate({**given, **values})

        patch.setattr(stack, statement, Told)

    return forget


def no_slope(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stack, "_norm_slope", lambda a, low: 1.0)


def no_slope_of_the_smallest(patch: pytest.MonkeyPatch) -> None:
    real = stack._norm_slope
    patch.setattr(stack, "_norm_slope", lambda a, low: real(a, low) if low else 1.0)


def nothing_removed(patch: pytest.MonkeyPatch) -> None:
    def after(a: Architecture, layer: int, reach: Any, written: float, found: list[float]) -> Any:
        found.append(1.0)
        return reach

    patch.setattr(stack, "_after", after)


def slope_of_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stack, "lipschitz", lambda *_: 1.0)


ATTENTION, GATE = "attention_general_upper", "ffn_gated_upper_apriori"
CONTROLS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "values": [
        ("attention", {"norms": {"output": 0.0}}),
        ("|W_V|", {"norms": {"value": 1.0}}),
        ("|W_O|", {"norms": {"output": 1.0}}),
        ("the softmax matrix", {"n_tokens": 1}),
        ("the norm before it", {"forget": no_slope}),
    ],
    "values, multipliers": [
        ("the residual multiplier", {"changes": {"residual_multiplier": 1.0}}),
        ("the shortcut multiplier", {"changes": {"shortcut_multiplier": 1.0}}),
    ],
    "values of a group": [("the group", {"changes": {"n_kv_heads": 2}})],
    "slopes": [
        ("|W_Q|", {"norms": {"query": 1.0}}),
        ("|W_K|", {"norms": {"key": 1.0}}),
        ("the largest head of W_O W_V", {"forget": symbol(ATTENTION, heads_OV=1.0)}),
        ("the logits' scale", {"changes": {"attention_scale": None}}),
        ("the radius", {"forget": symbol(ATTENTION, R=1.0)}),
        ("keys", {"forget": symbol(ATTENTION, key_slope=0.0)}),
        ("queries", {"forget": symbol(ATTENTION, query_slope=0.0)}),
    ],
    "slopes of a group": [("the group", {"changes": {"n_kv_heads": 2}})],
    "normalised queries and keys": [
        ("the norm of keys", {"forget": no_slope_of_the_smallest}),
        ("QK-norm", {"changes": {"qk_norm": "none"}}),
    ],
    "feed-forward": [
        ("the feed-forward", {"norms": {"ffn_out": 0.0}}),
        ("|W_1|", {"norms": {"ffn_in": 1.0}}),
        ("|W_2|", {"norms": {"ffn_out": 1.0}}),
        ("the norm before it", {"forget": no_slope}),
    ],
    "both at once": [
        ("attention", {"norms": {"output": 0.0}}),
        ("the feed-forward", {"norms": {"ffn_out": 0.0}}),
    ],
    "one after the other": [
        ("attention", {"norms": {"output": 0.0}}),
        ("the feed-forward", {"norms": {"ffn_out": 0.0}}),
        ("the product", {"changes": {"parallel": True}}),
    ],
    "two layers": [("the second layer", {"changes": {"n_layers": 1}})],
    "steepest GELU": [("the activation's slope", {"forget": slope_of_one})],
    "gate": [
        ("|W_3|", {"norms": {"ffn_gate": 0.0}}),
        ("|W_2|", {"norms": {"ffn_out": 0.5}}),
        ("the radius", {"forget": symbol(GATE, R=1.0)}),
    ],
    "gated": [("|W_1|", {"norms": {"ffn_in": 0.0}})],
    "experts": [("the router", {"norms": {"router": 0.0}})],
    "post-ln": [("the norm of the sum", {"forget": no_slope})],
    "peri-ln": [("the norm after it", {"changes": {"block": "pre-ln"}})],
    "branch-ln": [("the norm after it", {"forget": no_slope})],
    "feed-forward shrinks the stream": [("what is taken away", {"forget": nothing_removed})],
    "heads shrink the stream": [
        ("what is taken away", {"forget": nothing_removed}),
        ("the second head", {"changes": {"n_heads": 1, "n_kv_heads": 1}}),
    ],
}


def test_every_network_is_a_control() -> None:
    assert CONTROLS.keys() == NETWORKS.keys()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id=f"{name}: without {what}")
        for name, rows in CONTROLS.items()
        for what, options in rows
    ],
)
def test_the_product_without_one_of_its_factors_fails(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = NETWORKS[name]
    model = network.model()
    assert truth(network, model) > product(monkeypatch, network, model, **options) * ROUNDING


# --- the spread of the logits, whose factor is lost beside the slopes ------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"attention_scale": 3.0}, {"positions": "alibi"}, {"attention_softcap": 0.5}], ids=str
)
def test_the_spread_of_logits_is_attained(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the bound on attention is told, where the queries and keys of two opposite tokens are aligned."""
    aligned = {"0.attention.query": outer(2, F1, X), "0.attention.key": outer(3, F1, X)}
    heard = {
        "0.attention.value": outer(1, F1, X),
        "0.attention.output": outer(1, V, F1),
    }  # a silent branch is not asked
    network = Network(weights=aligned | heard, changes=changes)
    model = network.model()
    told: list[float] = []

    def listen(patch: pytest.MonkeyPatch) -> None:
        real = stack.attention_general_upper()

        class Heard:
            def evaluate(self, given: Mapping[str, Any]) -> Any:
                told.append(given["logit_spread"])
                return real.evaluate(given)

        patch.setattr(stack, "attention_general_upper", Heard)

    product(monkeypatch, network, model, forget=listen)
    layer = model.layers[0]
    u_TD = layer.attention_input(model.embed(network.ids))[0]  # type: ignore[operator]
    with torch.no_grad():
        spread = float(observe_softmax(layer.attention, u_TD)["logit_spread"])  # type: ignore[arg-type]
    assert spread > 0.5
    assert told == [pytest.approx(spread, rel=1e-6)]
