"""Anyone's decoder in one step of its own training, as the probes see it: what hooks are shown, and nothing else.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from empirics.anatomy import Anatomy, Place
from empirics.attention_rows import AttentionRows
from empirics.attention_view import AttentionView
from empirics.block_functions import has_experts
from empirics.block_norms import STACK, BlockNorms
from empirics.distributed import ALONE, whole
from empirics.registry import Unavailable
from empirics.residual_stream import length_sums, n_tokens, variance_sum
from empirics.running import Hook, first_sequence, first_tensor, recomputing
from empirics.spectral import NormEstimate, no_estimate
from empirics.subject import TOLERANCE, Shared

T = TypeVar("T")
UNSEEN = (
    "its class calls neither scaled_dot_product_attention nor nn.MultiheadAttention nor a softmax over tokens by "
    "tokens; a kernel as of flash or flex attention shows no row"
)
FROZEN = (
    "no gradient arrives, since nothing before it is trained; to have it, let the output of the embeddings require one "
    "(transformers: model.enable_input_require_grads())"
)


class PlaceSums:
    """What one place has seen in a step, over its micro-batches; kept on the device until the step ends.

    Args:
        keep: also keep the first sequence.
        batch_axis: the axis of sequences.
    """

    def __init__(self, keep: bool, batch_axis: int = 0) -> None:
        self.keep, self.batch_axis = keep, batch_axis
        self.first: Tensor | None = None
        self.variance: list[Tensor] = []
        self.lengths: list[Tensor] = []
        self.n_tokens: list[int] = []
        self.unhooked = 0  # forward passes whose tensor needs no gradient yet

    def see(self, x: Tensor) -> None:
        again = recomputing()
        if not again:
            if self.keep and self.first is None:
                self.first = first_sequence(x, self.batch_axis).clone()
            self.variance.append(variance_sum(x))
            self.n_tokens.append(n_tokens(x))
            self.unhooked += not x.requires_grad
        if x.requires_grad and (not again or self.unhooked):
            self.unhooked -= again
            x.register_hook(self.receive)

    def receive(self, gradient: Tensor) -> None:
        self.lengths.append(length_sums(gradient))

    def statistics(self) -> tuple[float, float, float, float]:
        """Standard deviation, gradient norm, mean and largest gradient norm of a token."""
        tokens = sum(self.n_tokens)
        deviation = math.sqrt(float(torch.stack(self.variance).sum()) / tokens)
        if not self.lengths:
            return deviation, math.nan, math.nan, math.nan
        lengths = torch.stack(self.lengths)
        square, length, _ = lengths.sum(0).tolist()
        return deviation, math.sqrt(square), length / tokens, float(lengths[:, 2].max())


class Matrices(Mapping[str, Tensor]):
    """A model's matrices, of experts in one tensor each; those of a model in shards are gathered when asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[str, tuple[nn.Parameter, int | None]] = {}
        for name, parameter in model.named_parameters():
            for label, place in labels(name, parameter):
                self._places[label] = parameter, place

    def __getitem__(self, label: str) -> Tensor:
        parameter, place = self._places[label]
        matrix = whole(parameter.detach())
        return matrix if place is None else matrix[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def labels(name: str, parameter: Tensor) -> list[tuple[str, int | None]]:
    """Names of the matrices in a parameter, and where they are in it."""
    if parameter.ndim == 3:
        return [(f"{name}[{k}]", k) for k in range(parameter.shape[0])]
    return [(name, None)] if parameter.ndim == 2 else []


def matrix_norms(tensor: Tensor) -> list[float]:
    """Frobenius norms of the matrices in a tensor (rows, columns) or (experts, rows, columns), in shards or not."""
    rows = whole(torch.linalg.vector_norm(tensor.detach(), dim=tuple(range(1, tensor.ndim)))).double()
    return rows.tolist() if tensor.ndim == 3 else [float(rows.norm())]


class Steps:
    """What torch's optimizers do to a model's matrices in one step of a training.

    Copies of the matrices are held while an optimizer steps, and only then.

    Args:
        model: whose matrices are watched.
        then: called after an optimizer's step, once they have been waited for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.changes: dict[str, tuple[float, float]] = {}
        self.gradients: dict[str, float] = {}
        self.then: Callable[[], object] | None = None
        self._model = model
        self._before: dict[str, tuple[nn.Parameter, Tensor]] = {}
        me = weakref.ref(self)  # torch holds what is registered for every optimizer; it must not hold the model

        def before(optimizer: Optimizer, *_: Any) -> None:
            steps = me()
            if steps is not None:
                steps._start(optimizer)

        def after(optimizer: Optimizer, *_: Any) -> None:
            steps = me()
            if steps is not None:
                steps._end(optimizer)

        self._handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
        weakref.finalize(self, _remove, self._handles)

    def detach(self) -> None:
        """Look at no further step."""
        _remove(self._handles)
        self._before = {}

    @torch.no_grad()
    def _start(self, optimizer: Optimizer) -> None:
        given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        named = {name: p for name, p in self._model.named_parameters() if id(p) in given and labels(name, p)}
        if any(label in self.changes for name, p in named.items() for label, _ in labels(name, p)):
            self.detach()  # the next step of the training
            return
        for name, parameter in named.items():
            self._before[name] = parameter, parameter.detach().clone()
            if parameter.grad is not None:
                self.gradients |= _each(name, parameter, matrix_norms(parameter.grad))

    @torch.no_grad()
    def _end(self, optimizer: Optimizer) -> None:
        if not self._before:
            return
        for name, (parameter, before) in self._before.items():
            sizes = matrix_norms(before)
            norms = zip(matrix_norms(before.sub_(parameter.detach())), sizes, strict=True)
            self.changes |= _each(name, parameter, norms)
        self._before = {}
        if self.then is not None:
            self.then()


def _each(name: str, parameter: Tensor, values: Iterable[T]) -> dict[str, T]:
    """One value a matrix of a parameter, by the matrices' names."""
    return {label: value for (label, _), value in zip(labels(name, parameter), values, strict=True)}


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


class Watched(Shared):
    """One step of someone else's training: hooked on at once, and read off when its passes are over.

    Args:
        anatomy: where the model's residual stream and its attention are.
        streams: also keep the first sequence of the stream.
        attention: also look at attention.
        steps: also look at the optimizer's step.
        norms: also take these norms of the blocks' Jacobians, by their names in `block_norms`.
    """

    ranks = ALONE

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        *,
        streams: bool,
        attention: bool,
        steps: bool,
        norms: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.place_labels = [place.name for place in anatomy.places]
        self.layer_labels = [f"layer {n}" for n in range(len(anatomy.blocks))]
        self.steps = Steps(model) if steps else None
        self._model, self._anatomy = model, anatomy
        self._sums = [PlaceSums(streams, anatomy.batch_axis) for _ in anatomy.places]
        self._rows: dict[int, AttentionRows | str] = {}
        self._views: dict[int, AttentionView] = {}
        self._norms = BlockNorms(anatomy, norms, tolerance=TOLERANCE)
        self._hooks = [self._at(place, sums) for place, sums in zip(anatomy.places, self._sums, strict=True)]
        self._hooks += self._norms.hooks()
        for n, wired in enumerate(anatomy.wirings if attention else ()):
            if wired.attention is None:
                self._rows[n] = "no attention was found in it"
            else:
                self._hooks += self._around(n, wired.attention.enter)

    def unhook(self) -> None:
        """Take every hook off the model."""
        _remove(self._hooks)

    def let_go(self) -> None:
        """Forget the passes; what the optimizer does is still seen."""
        self._sums, self._shared = [], {}

    @property
    def n_tokens(self) -> int:
        """Tokens of the step, padding included; 0 where a place has seen none."""
        return min(sum(sums.n_tokens) for sums in self._sums)

    @cached_property
    def place_statistics(self) -> dict[str, list[float]]:
        """Standard deviation of the stream and norms of its gradient; not a number where no gradient arrived."""
        names = ("residual_std", "place_gradient", "token_gradient", "token_gradient_max")
        columns = zip(*(sums.statistics() for sums in self._sums), strict=True)
        return {name: list(values) for name, values in zip(names, columns, strict=True)}

    @property
    def had_backward(self) -> bool:
        """Whether a gradient has arrived at any place."""
        return any(sums.lengths for sums in self._sums)

    @property
    def unreached(self) -> str:
        """Which places no gradient has arrived at, and why; empty if there are none."""
        whys: dict[str, list[str]] = {}
        for name, sums in zip(self.place_labels, self._sums, strict=True):
            if not sums.lengths:
                whys.setdefault(FROZEN if sums.unhooked else "no gradient arrived", []).append(name)
        return "; ".join(f"{', '.join(places)}: {why}" for why, places in whys.items())

    @property
    def streams(self) -> list[Tensor]:
        """The first sequence of the stream at every place."""
        return [sums.first for sums in self._sums if sums.first is not None]

    @property
    def matrices(self) -> Mapping[str, Tensor]:
        """Every weight matrix as it is now."""
        return Matrices(self._model)

    @property
    def changes(self) -> dict[str, tuple[float, float]]:
        """Frobenius norms of each matrix's change in the step and of the matrix before it.

        Raises:
            Unavailable: no optimizer has stepped.
        """
        return self._stepped().changes

    @property
    def gradients(self) -> dict[str, float]:
        """Frobenius norms of each matrix's gradient, as the optimizer got it.

        Raises:
            Unavailable: no optimizer has stepped.
        """
        return self._stepped().gradients

    def _stepped(self) -> Steps:
        if self.steps is None or not self.steps.changes:
            raise Unavailable("no optimizer of torch that has the model's matrices has stepped")
        return self.steps

    def attention_rows(self) -> list[AttentionRows]:
        """Statistics of attention on the first sequence, layer by layer.

        Raises:
            Unavailable: a layer's attention is not seen.
        """
        found: list[AttentionRows] = []
        for n, label in enumerate(self.layer_labels):
            rows = self._rows.get(n, UNSEEN)
            if isinstance(rows, str):
                raise Unavailable(f"{label}: {rows}")
            found.append(rows)
        if len({len(rows.entropy) for rows in found}) > 1:
            raise Unavailable("layers have different numbers of heads")
        return found

    def _around(self, n: int, module: nn.Module) -> list[Any]:
        """Hooks that look at what runs inside layer n's attention the first time."""
        axis = self._anatomy.batch_axis

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_tensor((*args, *kwargs.values()))
            if n not in self._rows and not (self._norms.running or recomputing()):
                self._views[n] = AttentionView(1 if x is None else x.shape[axis], lambda rows: self._show(n, rows))
                self._views[n].__enter__()

        def after(*_: Any) -> None:
            if n in self._views and not self._norms.running:
                self._views.pop(n).__exit__(None, None, None)

        return [
            module.register_forward_pre_hook(Hook(before), with_kwargs=True),
            module.register_forward_hook(Hook(after), always_call=True),
        ]

    def _show(self, n: int, rows: AttentionRows | str) -> None:
        self._rows.setdefault(n, rows)

    def _at(self, place: Place, sums: PlaceSums) -> Any:
        """A hook that shows a place's tensor to `sums`."""

        def see(values: tuple[Any, ...]) -> None:
            x = first_tensor(values)
            if x is not None and not self._norms.running:
                sums.see(x)

        if place.side == "input":

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                see((*args, *kwargs.values()))

            return place.module.register_forward_pre_hook(Hook(before), with_kwargs=True)
        return place.module.register_forward_hook(Hook(lambda _, __, output: see((output,))))

    # --- norms ----------------------------------------------------------------------------------------------------

    def norms(self, name: str) -> list[NormEstimate]:
        """Norms of one Jacobian of every layer, on the first sequence; no number of a layer that does not show it.

        Raises:
            Unavailable: none does.
        """
        found = [self._norms.norm(name, n) for n in range(len(self.layer_labels))]
        if all(isinstance(norm, str) for norm in found):
            raise Unavailable(f"{self.layer_labels[0]}: {found[0]}")
        return [no_estimate() if isinstance(norm, str) else norm for norm in found]

    def without(self, names: Collection[str]) -> str:
        """Which layers have no norm of some of those names, and why; empty if all have."""
        whys: dict[str, list[str]] = {}
        for n, label in enumerate(self.layer_labels):
            for name in sorted(names):
                norm = self._norms.norm(name, n)
                if isinstance(norm, str):
                    whys.setdefault(norm, []).append(label if len(names) == 1 else f"{label} {name}")
        return "; ".join(f"{', '.join(where)}: {why}" for why, where in whys.items())

    def stack_norm(self) -> NormEstimate:
        """Norm of the Jacobian of all layers, on the first sequence.

        Raises:
            Unavailable: they are no stack of functions of one stream.
        """
        norm = self._norms.norm(STACK)
        if isinstance(norm, str):
            raise Unavailable(norm)
        return norm

    @property
    def stack(self) -> tuple[int, int]:
        """First and last layer of the stack."""
        return 0, len(self.layer_labels) - 1

    @property
    def parallel(self) -> bool:
        """Whether a layer updates the stream once."""
        return self._anatomy.parallel

    @property
    def experts(self) -> bool:
        """Whether the feed-forward sub-layers are experts, or some are."""
        return any(has_experts(wired.feedforward) for wired in self._anatomy.wirings)
