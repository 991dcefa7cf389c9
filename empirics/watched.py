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

from empirics.anatomy import NO_ATTENTION, Anatomy, Place
from empirics.attention_rows import AttentionRows
from empirics.attention_view import AttentionView
from empirics.block_functions import has_experts
from empirics.block_norms import STACK, BlockNorms
from empirics.distributed import ALONE, whole
from empirics.place_sums import ABSENT, NO_BACKWARD, PlaceSums, by_reason
from empirics.registry import Unavailable
from empirics.running import Hook, first_tensor, recomputing
from empirics.spectral import NormEstimate, no_estimate
from empirics.subject import TOLERANCE, Shared
from theory.words import counted

T = TypeVar("T")
UNSEEN = (
    "its class calls neither scaled_dot_product_attention nor nn.MultiheadAttention nor a softmax over tokens by "
    "tokens; a kernel as of flash or flex attention shows no row"
)


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
    rows = whole(torch.linalg.vector_norm(tensor.detach(), dim=tuple(range(1, tensor.ndim)))).cpu().double()
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
                self._rows[n] = NO_ATTENTION
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
        """Tokens of the step, padding included; 0 where no forward pass was seen."""
        return max(sums.n_tokens for sums in self._sums)

    @cached_property
    def place_statistics(self) -> dict[str, list[float]]:
        """Standard deviation of the stream and norms of its gradient; not a number where `gaps` says why."""
        norms = [sums.gradient for sums in self._sums]
        return {
            "residual_std": [sums.deviation for sums in self._sums],
            "place_gradient": [
                math.nan if self._partial(sums) else norm for sums, (norm, _, _) in zip(self._sums, norms, strict=True)
            ],
            "token_gradient": [mean for _, mean, _ in norms],
            "token_gradient_max": [largest for _, _, largest in norms],
        }

    @property
    def gaps(self) -> dict[str, str]:
        """Which of `place_statistics` are no number at which places, and why."""
        gradient = [sums.without_gradient for sums in self._sums]
        columns = {
            "residual_std": [sums.without_stream for sums in self._sums],
            "place_gradient": [why or self._partial(sums) for why, sums in zip(gradient, self._sums, strict=True)],
            "token_gradient": gradient,
            "token_gradient_max": gradient,
        }
        said = {name: by_reason(self.place_labels, whys) for name, whys in columns.items()}
        if not any(sums.lengths for sums in self._sums):
            said |= dict.fromkeys(("place_gradient", "token_gradient", "token_gradient_max"), NO_BACKWARD)
        return {name: why for name, why in said.items() if why}

    def _partial(self, sums: PlaceSums) -> str:
        """Why the norm of a place's gradient is not of the whole step; empty if it is."""
        most = max(each.n_reached for each in self._sums)
        if not sums.n_reached or sums.n_reached == most:
            return ""
        return f"a gradient arrived at {sums.n_reached} of {counted(most, 'token')}"

    @property
    def streams(self) -> list[Tensor]:
        """The first sequence of the stream at every place.

        Raises:
            Unavailable: a place was not passed.
        """
        absent = [ABSENT if sums.first is None else "" for sums in self._sums]
        if any(absent):
            raise Unavailable(by_reason(self.place_labels, absent))
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
            rows = self._rows.get(n, UNSEEN if self._sums[self.place_labels.index(label)].n_tokens else ABSENT)
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
        rows = [(n, name) for n in range(len(self.layer_labels)) for name in sorted(names)]
        found = [self._norms.norm(name, n) for n, name in rows]
        where = [self.layer_labels[n] if len(names) == 1 else f"{self.layer_labels[n]} {name}" for n, name in rows]
        return by_reason(where, [norm if isinstance(norm, str) else "" for norm in found])

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
