"""A model and a batch as the probes see them: what several of them need is made once, and only when asked for.

Nothing here writes to the model, to its gradients or to a random state.

Shapes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from empirics.attention_rows import AttentionRows, attention_rows
from empirics.distributed import ALONE, Ranks, local, release, whole
from empirics.model import Layer, Transformer, cross_entropy
from empirics.probes import constant, layer_functions, layer_opnorms
from empirics.registry import Unavailable
from empirics.residual_stream import length_sums, n_tokens, variance_sum
from empirics.spectral import NormEstimate, lanczos_opnorm

if TYPE_CHECKING:
    from empirics.watched import Watched

T = TypeVar("T")
TOLERANCE = 1e-2  # relative, of norms that are lower estimates


# What the probes of the stream, of attention and of the matrices look at: one network or the other, by the same names.
Seen: TypeAlias = "Subject | Watched"


class Shared:
    """Keeps what several probes read off."""

    def __init__(self) -> None:
        self._shared: dict[Any, Any] = {}

    def shared(self, make: Callable[..., T], *arguments: Any) -> T:
        """make(self, *arguments), made once."""
        key = (make, *arguments)
        if key not in self._shared:
            self._shared[key] = make(self, *arguments)
        return self._shared[key]


class Subject(Shared):
    """A model and a batch.

    A training that has run its own passes hands over what they left, with `see`; otherwise the first probe that wants
    the residual stream or its gradient runs the whole batch once.

    Args:
        tokens_BT, targets_BT: the batch; Jacobians and attention are those of its first sequence.
        stack: first and last layer of the stack whose Jacobian is taken; all layers if None.
        tolerance: relative, of norms that are lower estimates.
        ranks: over which a training spreads the batch, of which this is one's share, and the model. They measure
            together; what is of one sequence is of the first rank's.
    """

    def __init__(
        self,
        model: Transformer,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        *,
        stack: tuple[int, int] | None = None,
        tolerance: float = TOLERANCE,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.model, self.tokens, self.targets, self.tolerance = model, tokens_BT, targets_BT, tolerance
        self.ranks = ranks
        self.layers = [layer for layer in model.layers if isinstance(layer, Layer)]
        self.stack = stack or (0, len(self.layers) - 1)
        self._streams: list[Tensor] = []
        self._sums: Tensor | None = None  # (places, 3) of the variance, the gradient's square and its length a token
        self._largest: Tensor | None = None
        self._n_tokens = 0
        self._before: dict[str, Tensor] = {}
        self._changes: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    # --- the residual stream ------------------------------------------------------------------------------------

    def see(self, places: Sequence[Tensor], gradients: Sequence[Tensor | None] | None = None) -> None:
        """Take in the places of one pass; of several micro-batches the tokens are pooled.

        Args:
            places: (B, T, D) each, as the model keeps them.
            gradients: theirs; what `backward` left on them if not given.
        """
        given = [x.grad for x in places] if gradients is None else gradients
        rows: list[Tensor] = []
        for x, gradient in zip(places, given, strict=True):
            variance = variance_sum(x)
            lengths = variance.new_full((3,), torch.nan) if gradient is None else length_sums(gradient)
            rows.append(torch.cat([variance[None], lengths]))
        found = torch.stack(rows)
        if self._sums is None or self._largest is None:
            self._streams = [x.detach() if gradients is not None else x.detach()[:1].clone() for x in places]
            self._sums, self._largest = found[:, :3], found[:, 3]
        else:
            self._sums, self._largest = self._sums + found[:, :3], torch.maximum(self._largest, found[:, 3])
        self._n_tokens += n_tokens(places[0])

    @property
    def streams(self) -> list[Tensor]:
        """The residual stream at every place, (B, T, D); in a training's own passes the first sequence's alone."""
        self._look()
        return self._streams

    @cached_property
    def place_statistics(self) -> dict[str, list[float]]:
        """Standard deviation of the stream and norms of its gradient, place by place, under their quantities' names."""
        self._look()
        assert self._sums is not None
        assert self._largest is not None
        sums, n_tokens = self.ranks.total(self._sums.cpu()), self._n_tokens * self.ranks.size
        largest = [max(values) for values in zip(*self.ranks.each(self._largest.tolist()), strict=True)]
        return {
            "residual_std": (sums[:, 0] / n_tokens).sqrt().tolist(),
            "place_gradient": sums[:, 1].sqrt().tolist(),
            "token_gradient": (sums[:, 2] / n_tokens).tolist(),
            "token_gradient_max": largest,
        }

    @cached_property
    def place_labels(self) -> list[str]:
        """`embedding`, then `layer N attention` and `layer N` for every layer, the former in serial layers only."""
        middle = [] if self.layers[0].parallel else [" attention"]
        return ["embedding", *(f"layer {n}{part}" for n in range(len(self.layers)) for part in [*middle, ""])]

    @cached_property
    def layer_labels(self) -> list[str]:
        """`layer N` for every layer."""
        return [f"layer {n}" for n in range(len(self.layers))]

    @cached_property
    def entering(self) -> list[list[Tensor]]:
        """The first sequence, (1, T, D), where it enters each update of each layer."""
        each = len(self.layers[0].updates)
        return [[x[:1] for x in self.streams[n * each : (n + 1) * each]] for n in range(len(self.layers))]

    @cached_property
    def documents(self) -> Tensor | None:
        """The documents of the first sequence, (1, T), where attention stays inside them."""
        return self.model.documents(self.tokens[:1])

    def whole_layers(self) -> Iterator[Layer]:
        """The layers in turn, with whole weights; those of a model in shards are gathered one at a time."""
        if self.ranks.size == 1:
            yield from self.layers
            return
        with torch.device("meta"):
            plain = Transformer(self.model.architecture)
        for layer, sharded in zip(plain.layers, self.layers, strict=True):
            weights = {name: whole(p.detach()) for name, p in sharded.named_parameters()}
            layer.load_state_dict(weights, assign=True)
            assert isinstance(layer, Layer)
            yield layer
            layer.to("meta")

    def attention_rows(self) -> list[AttentionRows]:
        """Statistics of attention on the first sequence, layer by layer."""
        with torch.no_grad():
            return [
                attention_rows(layer.attention, layer.attention_input(x[0]), self.documents)
                for layer, x in zip(self.whole_layers(), self.entering, strict=True)
            ]

    # --- norms --------------------------------------------------------------------------------------------------

    @property
    def parallel(self) -> bool:
        """Whether a layer updates the stream once."""
        return self.layers[0].parallel

    @property
    def experts(self) -> bool:
        """Whether the feed-forward sub-layers are experts."""
        return bool(self.model.architecture.n_experts)

    def norms(self, name: str) -> list[NormEstimate]:
        """Of one Jacobian in every layer, by its name in `layer_functions`."""
        call, at = layer_functions(self.layers, self.entering, self.documents)[name]
        with constant(self.model):
            return layer_opnorms(self.layers, call, at, tolerance=self.tolerance)

    def stack_norm(self) -> NormEstimate:
        """Of the stack's Jacobian."""
        first, last = self.stack
        x_BTD = self.entering[first][0]

        def through(x: Tensor) -> Tensor:
            for layer in self.layers[first : last + 1]:
                for update in layer.updates_within(self.documents):
                    x = update(x)
            return x

        with constant(self.model):
            return lanczos_opnorm(through, x_BTD, tolerance=self.tolerance)

    def _look(self) -> None:
        if self._sums is not None:
            return
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise Unavailable("no parameter of the model asks for a gradient")
        places: list[Tensor] = []
        with torch.enable_grad():
            loss = cross_entropy(self.model(self.tokens, places), self.targets)
            self.see(places, torch.autograd.grad(loss, places))

    # --- matrices -----------------------------------------------------------------------------------------------

    @cached_property
    def matrices(self) -> dict[str, Tensor]:
        """Every weight matrix, a tied one once; of a model in shards this rank's parts."""
        if self.ranks.size > 1:
            release(self.model)
        return {name: local(p.detach()) for name, p in self.model.named_parameters() if p.ndim == 2}

    def remember(self) -> None:
        """Keep the matrices as they are before a step."""
        self._before = {name: matrix.clone() for name, matrix in self.matrices.items()}

    def compare(self) -> None:
        """Take the norms of what the step has changed since and of the gradients, and let the copies go."""
        before, parameters = list(self._before.values()), dict(self.model.named_parameters())
        sizes = torch._foreach_norm(before)  # type: ignore[attr-defined]
        torch._foreach_sub_(before, [self.matrices[name] for name in self._before])  # type: ignore[attr-defined]
        changes = torch._foreach_norm(before)  # type: ignore[attr-defined]
        self._changes = {name: torch.stack(pair) for name, *pair in zip(self._before, changes, sizes, strict=True)}
        gradients = {name: parameters[name].grad for name in self._before}
        here = {name: local(gradient) for name, gradient in gradients.items() if gradient is not None}
        norms = torch._foreach_norm(list(here.values())) if here else ()  # type: ignore[attr-defined]
        self._gradients = dict(zip(here, norms, strict=True))
        self._before = {}

    @cached_property
    def changes(self) -> dict[str, tuple[float, float]]:
        """Frobenius norms of each matrix's change in the step and of the matrix before it.

        Raises:
            Unavailable: there was no step.
        """
        return {name: (change, size) for name, (change, size) in self._norms(self._changes).items()}

    @cached_property
    def gradients(self) -> dict[str, float]:
        """Frobenius norms of each matrix's gradient, as the optimizer got it: after clipping.

        Raises:
            Unavailable: there was no step.
        """
        return self._norms(self._gradients)

    def _norms(self, here: dict[str, Tensor]) -> dict[str, Any]:
        """Norms of whole matrices, as numbers, from those of this rank's parts."""
        if not here:
            raise Unavailable("there was no step; a training measures it (train --probes)")
        norms = torch.stack(list(here.values())).double()
        if self.ranks.size > 1:
            norms = self.ranks.total(norms.square()).sqrt()
        return dict(zip(here, norms.tolist(), strict=True))


def require_own(subject: Seen) -> None:
    """Refuse to measure what is only known of our own networks.

    Raises:
        Unavailable: it is someone else's decoder.
    """
    if not isinstance(subject, Subject):
        raise Unavailable("it is measured on our own networks alone; see python -m empirics probes")


def whole_model(model: Transformer) -> Transformer:
    """A copy of a model in shards with whole weights, gathered by every rank at once."""
    first = next(model.parameters())
    with torch.device("meta"):
        plain = Transformer(model.architecture).to(first.dtype)
    plain.to_empty(device=first.device)
    plain.end_of_document = model.end_of_document
    with torch.no_grad():
        for parameter, sharded in zip(plain.parameters(), model.parameters(), strict=True):
            parameter.copy_(whole(sharded.detach()))
    return plain
