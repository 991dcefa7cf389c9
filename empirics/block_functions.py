"""The functions that anyone's block is made of, and the points of one sequence at which their Jacobians are taken.

A block is called again with the arguments that it was called with (`empirics.block_calls`), so that a function is the
very one that the model computes on that sequence, positions and masks included. What has no name in the block is had by
hooks: a sub-layer is silenced, given what it reads, or left early.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from empirics.anatomy import Block, SubLayer, Wiring
from empirics.block_calls import Again, Hooks, Reached
from empirics.registry import Unavailable
from empirics.running import adds_the_same, factor, first_tensor, replaced, require_stream, stream_tensors, with_first
from empirics.spectral import Function

UNFOUND = "its sub-layers are not told apart"


class _Sums(NamedTuple):
    """Of a block that normalises the stream: the norm after attention, and what ends a run before it or the last."""

    middle: nn.Module
    after_attention: Hooks
    at_the_end: Hooks


class Functions(Again):
    """The functions of one block on one sequence; to be used `undisturbed`.

    `layer`, its halves `attention_half` and `feedforward_half`, what they add to the stream (`attention_branch`,
    `feedforward_branch`) and the sub-layers in what they read (`attention`, `feedforward`; `J_Z`, attention before its
    output matrix), as `empirics.probes.layer_functions` has them of our own network.
    """

    def __init__(self, block: Block, wired: Wiring) -> None:
        super().__init__(block)
        self.wired = wired

    def named(self, name: str) -> tuple[Function, Tensor]:
        """A function by its name, and the point at which its Jacobian is taken.

        Raises:
            Unavailable: the block does not show it; the message says why.
        """
        makers: Mapping[str, Callable[[], tuple[Function, Tensor]]] = {
            "layer": lambda: (self.run, self.block.x),
            "attention": lambda: self._sublayer(self.wired.attention),
            "feedforward": lambda: self._sublayer(self.wired.feedforward),
            "J_Z": self._heads,
            "attention_half": lambda: self._halves[0],
            "feedforward_half": lambda: self._halves[1],
            "attention_branch": lambda: self._branches[0],
            "feedforward_branch": lambda: self._branches[1],
        }
        return makers[name]()

    # --- sub-layers -----------------------------------------------------------------------------------------------

    def _sublayer(self, sublayer: SubLayer | None, end: Hooks | None = None) -> tuple[Function, Tensor]:
        """A sub-layer in what it reads, or as far as where a run of it ends."""
        if sublayer is None:
            raise Unavailable(UNFOUND)
        x, left = self.block.x, end or _until(sublayer.leave, "output")
        read = self.at(x, _until(sublayer.enter, "input"))
        modules = list(self.block.module.modules())[1:]
        return (lambda u: self.run(x, _reading(sublayer.enter, modules, u), left)), read

    def _heads(self) -> tuple[Function, Tensor]:
        """The output matrix is the last one that attention calls, and does not read what attention reads."""
        attention, called = self.wired.attention, list[tuple[nn.Module, Tensor]]()
        if attention is None:
            raise Unavailable(UNFOUND)
        leaves = [m for m in attention.enter.modules() if any(p.ndim == 2 for p in m.parameters(recurse=False))]

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            called.append((module, require_stream(stream_tensors(args, kwargs)[0], module)))

        self.at(self.block.x, lambda: [m.register_forward_pre_hook(before, with_kwargs=True) for m in leaves])
        read = self.at(self.block.x, _until(attention.enter, "input"))
        if not called or (called[-1][1].shape == read.shape and torch.equal(called[-1][1], read)):
            raise Unavailable("its attention calls no output matrix as a module")
        return self._sublayer(attention, _until(called[-1][0], "input"))

    @property
    def _both(self) -> tuple[SubLayer, SubLayer]:
        attention, feedforward = self.wired.attention, self.wired.feedforward
        if attention is None or feedforward is None:
            raise Unavailable(UNFOUND)
        return attention, feedforward

    # --- halves ---------------------------------------------------------------------------------------------------

    @cached_property
    def _shortcuts(self) -> tuple[float, float]:
        """Factors on the stream on its way past attention, and past the feed-forward; of a parallel block the first."""
        attention, feedforward = self._both
        x, middle, quiet = self.block.x, self.wired.middle, (_silent(attention), _silent(feedforward))
        if self.wired.post:
            between, sums = self._halves[1][1], self._sums
            return (
                _multiple(lambda x: self.at(x, quiet[0], sums.after_attention), x),
                _multiple(lambda y: self.at(x, _given(sums.middle, y), quiet[1], sums.at_the_end), between),
            )
        both = _multiple(lambda x: self.at(x, *quiet), x)
        if self.wired.parallel:
            return both, 1.0
        if middle is None:
            return both**0.5, both**0.5
        first = _multiple(lambda x: self.at(x, quiet[0], _until(middle.module, middle.side)), x)
        return first, both / first

    @property
    def _sums(self) -> _Sums:
        middle, closing = self.wired.middle, self.wired.closing
        if middle is None or closing is None:
            raise Unavailable("it normalises its output where no module shows it")
        return _Sums(middle.module, _until(middle.module, "input"), _until(closing, "input"))

    @cached_property
    def _halves(self) -> tuple[tuple[Function, Tensor], tuple[Function, Tensor]]:
        attention, feedforward = self._both
        x, middle = self.block.x, self.wired.middle
        if self.wired.parallel:
            raise Unavailable("its sub-layers are parallel: the layer is one update")
        if middle is None and self.wired.post:
            raise Unavailable("the stream between its sub-layers is in no module's hands")

        def first(x: Tensor) -> Tensor:
            if middle is not None:
                return self.run(x, _until(middle.module, middle.side)).reshape_as(x)
            return self.run(x, _silent(feedforward)) / self._shortcuts[1]

        def second(between: Tensor) -> Tensor:
            if middle is not None and middle.side == "output":
                return self.run(x, _given(middle.module, between))
            return self.run(between / self._shortcuts[0], _silent(attention))

        with torch.no_grad():
            between = first(x)
            same = adds_the_same(second(between), self.run(x), x)
        if not same:
            raise Unavailable("its halves, one after the other, are not the block")
        return (first, x), (second, between)

    # --- branches -------------------------------------------------------------------------------------------------

    @cached_property
    def _branches(self) -> tuple[tuple[Function, Tensor], tuple[Function, Tensor]]:
        attention, feedforward = self._both
        x = self.block.x
        if self.wired.parallel:
            if self.wired.post:
                raise Unavailable("its parallel sub-layers are normalised with the stream")
            shortcut = self._shortcuts[0]
            return (
                (lambda x: self.run(x, _silent(feedforward)) - shortcut * x, x),
                (lambda x: self.run(x, _silent(attention)) - shortcut * x, x),
            )
        (first, _), (second, between) = self._halves
        past, along = self._shortcuts
        if self.wired.post:
            sums = self._sums
            return (
                (lambda x: self.run(x, sums.after_attention).reshape_as(x) - past * x, x),
                (lambda y: self.run(x, _given(sums.middle, y), sums.at_the_end).reshape_as(y) - along * y, between),
            )
        return (lambda x: first(x) - past * x, x), (lambda y: second(y) - along * y, between)


def _multiple(function: Function, x: Tensor) -> float:
    """By what a function multiplies x, up to a constant."""
    once, twice = (function(scale * x).reshape_as(x) for scale in (1, 2))
    found = factor(twice - once, x)
    if found is None or not found > 0:
        raise Unavailable("its shortcut is no multiple of the stream")
    return found


def has_experts(sublayer: SubLayer | None) -> bool:
    """Whether a sub-layer holds several networks of one form, in one tensor or in a list."""
    if sublayer is None:
        return False
    lists = [m for m in sublayer.enter.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    return any(p.ndim == 3 for p in sublayer.enter.parameters()) or any(
        len({type(child) for child in each}) == 1 and any(p.ndim > 1 for p in each.parameters()) for each in lists
    )


# --- hooks ----------------------------------------------------------------------------------------------------------


def _silent(sublayer: SubLayer) -> Hooks:
    """A sub-layer that adds nothing to the stream."""

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        added = require_stream(first_tensor((output,)), module)
        stream = stream_tensors(args, kwargs)[1]
        return with_first(output, torch.zeros_like(added) if stream is None else stream)

    return lambda: [sublayer.leave.register_forward_hook(after, with_kwargs=True)]


def _given(module: nn.Module, y: Tensor) -> Hooks:
    """y in place of a module's output."""

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        own = require_stream(first_tensor((output,)), module)
        return with_first(output, y.reshape_as(own))

    return lambda: [module.register_forward_hook(after)]


def _until(module: nn.Module, side: str) -> Hooks:
    """The run ends at a module's input or output."""

    def entering(_: nn.Module, args: Any, kwargs: Any) -> None:
        raise Reached(require_stream(stream_tensors(args, kwargs)[0], module))

    def leaving(_: nn.Module, __: Any, output: Any) -> None:
        raise Reached(require_stream(first_tensor((output,)), module))

    if side == "input":
        return lambda: [module.register_forward_pre_hook(entering, with_kwargs=True)]
    return lambda: [module.register_forward_hook(leaving)]


def _reading(enter: nn.Module, modules: Sequence[nn.Module], u: Tensor) -> Hooks:
    """u in place of what `enter` reads, also where modules called after it read the same tensor."""
    read: list[Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if module is enter and not read:
            read.append(require_stream(stream_tensors(args, kwargs)[0], module))
        return replaced(args, kwargs, read[0], u) if read else None

    return lambda: [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
