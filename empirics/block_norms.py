"""Spectral norms of the Jacobians of anyone's blocks, matrix-free: lower estimates, by name or why there is none.

The names are those of `empirics.block_functions.Functions`, and `stack` for all blocks, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from contextvars import Context
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from empirics.anatomy import Anatomy, Block, forward
from empirics.block_calls import of_one_sequence, undisturbed
from empirics.block_functions import Functions
from empirics.registry import Unavailable, reason
from empirics.running import Hook, evaluating, first_sequence, first_tensor, recomputing, removed
from empirics.spectral import Function, NormEstimate, lanczos_opnorm

LAYER = (
    "layer", "attention_half", "feedforward_half", "attention_branch", "feedforward_branch", "attention", "J_Z",
    "feedforward",
)  # fmt: skip
STACK = "stack"
QUOTIENT = 0.05  # relative, of a derivative by differences: a gross error is what it is held to
STEPS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)  # relative to the point
Norm = NormEstimate | str  # an estimate, or why there is none


class BlockNorms:
    """The norms of a model's blocks in a pass, each block's taken where it is first called.

    Attributes:
        running: whether a block is being run again; hooks inside it are then called once more.

    Args:
        names: which.
        tolerance: relative.
        on_layer: called when a block's norms are there.
    """

    def __init__(
        self,
        found: Anatomy,
        names: Collection[str],
        *,
        tolerance: float,
        on_layer: Callable[[int], object] = lambda n: None,
    ) -> None:
        self.running = False
        self._on_layer = on_layer
        self._anatomy, self._names, self._tolerance = found, names, tolerance
        self._rows: dict[int, dict[str, Norm]] = {}
        self._stack: list[Functions] = []
        self._broken: str | None = None  # why the blocks are no stack
        self._left: Tensor | None = None  # what the last block has put out
        self._whole: Norm | None = None

    def norm(self, name: str, number: int = 0) -> Norm:
        """A block's norm by its name, or that of the stack."""
        unseen = "no forward pass was seen"
        if name == STACK:
            return self._whole or self._broken or ("not all of its layers were called" if self._rows else unseen)
        return self._rows.get(number, {}).get(name, unseen)

    def hooks(self) -> list[Any]:
        """Put hooks on the blocks."""
        return [hook for n in range(len(self._anatomy.blocks) if self._names else 0) for hook in self._hooked(n)]

    def _hooked(self, number: int) -> list[Any]:
        block = self._anatomy.blocks[number]

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if number in self._rows or recomputing():
                return
            self.running = True
            try:
                # In a context of its own: what a class collects in a variable of the pass's must not have these calls.
                Context().run(self._enter, number, args, kwargs)
            finally:
                self.running = False
            self._on_layer(number)

        def after(_: nn.Module, __: Any, output: Any) -> None:
            x = first_tensor((output,))
            if self._stack and x is not None and not recomputing():
                self._left = first_sequence(x, self._anatomy.batch_axis).clone()

        # What leaves the block itself, before another's hook changes it.
        left = block.register_forward_hook(Hook(after), prepend=True)
        return [block.register_forward_pre_hook(Hook(before), with_kwargs=True), left]

    def _enter(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the norms of a block that is about to be called."""
        module = self._anatomy.blocks[number]
        try:
            with undisturbed(module):
                block = of_one_sequence(Block(module, args, kwargs), number, self._anatomy.batch_axis)
                functions = Functions(block, self._anatomy.wirings[number])
                self._rows[number] = {name: self._of(functions, name) for name in self._names if name != STACK}
        except Exception as error:  # whoever is watched must not fail of it
            self._rows[number] = dict.fromkeys(self._names, reason(error))
            self._break(f"layer {number}: {reason(error)}")
            return
        if STACK in self._names and self._broken is None:
            self._extend(number, functions, Block(module, args, kwargs))

    def _of(self, functions: Functions, name: str) -> Norm:
        try:
            return self._opnorm(*functions.named(name))
        except Exception as error:
            return reason(error)

    def _opnorm(self, function: Function, x: Tensor) -> NormEstimate:
        found = lanczos_opnorm(function, x, tolerance=self._tolerance)
        require_derivative(function, x, found)
        return replace(found, direction=found.direction.new_empty(0))  # of every layer they are as large as its stream

    def _extend(self, number: int, functions: Functions, given: Block) -> None:
        """Put a block on the stack, and take its norm when it is complete."""
        x = functions.block.x
        if number != len(self._stack):
            self._break("its layers are not called in their order")
        elif number and (self._left is None or not torch.equal(self._left.to(x), x)):
            self._break(f"what enters layer {number} is not what leaves the one before it")
        elif number and any(t.requires_grad and t is not given.x for t in _tensors((given.args, given.kwargs))):
            self._break(f"layer {number} is given more than the stream that depends on weights or on other layers")
        else:
            self._stack.append(functions)
            if len(self._stack) == len(self._anatomy.blocks):
                self._complete()

    def _break(self, why: str) -> None:
        """No stack; let go of what it was."""
        self._broken, self._stack, self._left = self._broken or why, [], None

    def _complete(self) -> None:
        """Take the norm of the stack, and let go of it."""

        def through(x: Tensor) -> Tensor:
            for each in self._stack:
                x = each.run(x)
            return x

        if not all(each.whole for each in self._stack):
            self._break("its weights are in shards, of which one layer's are there at a time")
            return
        try:
            with undisturbed(*self._anatomy.blocks):
                self._whole = self._opnorm(through, self._stack[0].block.x)
        except Exception as error:
            self._whole = reason(error)
        self._stack, self._left = [], None


def require_derivative(function: Function, x: Tensor, found: NormEstimate) -> None:
    """Hold an estimate to what the function's values do along its direction.

    Anyone's code may hold kernels whose derivative has no derivative, or that give another one on purpose. One step
    that agrees will do: a longer one bends, or changes a token's expert, and a shorter one is lost in rounding.

    Raises:
        Unavailable: no central difference is as long as the estimate.
    """
    v, slopes = found.direction, list[str]()
    for step in STEPS:
        h = step * float(x.norm())
        with torch.no_grad():
            ahead, behind = function(x + h * v), function(x - h * v)
            slope = float((ahead - behind).norm()) / (2 * h)
        rounding = torch.finfo(x.dtype).eps * float(x.norm() + ahead.norm()) / h
        if slopes and 4 * rounding > found.value:  # it could make the length that is looked for
            break
        if abs(slope - found.value) <= QUOTIENT * found.value + (0 if slopes else 32 * rounding):
            return
        slopes.append(f"{slope:.3g}")
    raise Unavailable(
        "its derivative is not that of its values, or has none itself, as that of a fused kernel: "
        f"a norm of {found.value:.3g} against differences of {', '.join(slopes)}"
    )


def _tensors(value: Any) -> list[Tensor]:
    """Those in the arguments of a call."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in _tensors(item)]


class Norms(NamedTuple):
    """The norms of a model: those of each block by name, and that of all blocks."""

    layers: list[dict[str, Norm]]
    stack: Norm


def block_norms(
    model: nn.Module,
    found: Anatomy,
    tokens: Tensor,
    *,
    tolerance: float = 1e-3,
    on_layer: Callable[[int], object] = lambda n: None,
) -> Norms:
    """Of every block on (1, T) tokens the norms by name, and that of the stack, or why there is none."""
    norms = BlockNorms(found, (*LAYER, STACK), tolerance=tolerance, on_layer=on_layer)
    with evaluating(model), torch.no_grad(), ExitStack() as hooks:
        for hook in norms.hooks():
            hooks.enter_context(removed(hook))
        forward(model, tokens[:1])
    numbers = range(len(found.blocks))
    return Norms([{name: norms.norm(name, n) for name in LAYER} for n in numbers], norms.norm(STACK))
