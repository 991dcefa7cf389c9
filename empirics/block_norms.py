"""Spectral norms of the Jacobians of anyone's blocks, matrix-free: lower estimates, by name or why there is none.

The names are those of `empirics.block_functions.Functions`, and `stack` for all blocks, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from empirics.anatomy import Anatomy, Block, capture
from empirics.block_functions import Functions, of_one_sequence, undisturbed
from empirics.registry import Unavailable
from empirics.running import evaluating, first_tensor
from empirics.spectral import Function, NormEstimate, lanczos_opnorm

LAYER = (
    "layer", "attention_half", "feedforward_half", "attention_branch", "feedforward_branch", "attention", "feedforward",
)  # fmt: skip
STACK = "stack"
Norm = NormEstimate | str  # an estimate, or why there is none


class BlockNorms:
    """The norms of a model's blocks in a pass, each block's taken where it is called.

    Args:
        names: which.
        tolerance: relative.
    """

    def __init__(self, found: Anatomy, names: Collection[str], *, tolerance: float) -> None:
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
            return self._whole or self._broken or unseen
        return self._rows.get(number, {}).get(name, unseen)

    def enter(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the norms of a block that is about to be called; of the first call of each alone."""
        if number in self._rows:
            return
        self._rows[number] = dict.fromkeys(self._names, "")
        module = self._anatomy.blocks[number]
        try:
            with undisturbed(module):
                block = of_one_sequence(Block(module, args, kwargs), number)
                functions = Functions(block, self._anatomy.wirings[number])
                self._rows[number] = {name: self._of(functions, name) for name in self._names if name != STACK}
        except Exception as error:  # whoever is watched must not fail of it
            self._rows[number] = dict.fromkeys(self._names, reason(error))
            self._broken = f"layer {number}: {reason(error)}"
            return
        if STACK in self._names and self._broken is None:
            self._extend(functions, given=(args, kwargs))

    def leave(self, output: Any) -> None:
        """Take note of what a block has put out."""
        x = first_tensor((output,))
        if STACK in self._names and x is not None:
            self._left = x.detach()[:1].clone()

    def _of(self, functions: Functions, name: str) -> Norm:
        try:
            return self._opnorm(*functions.named(name))
        except Exception as error:
            return reason(error)

    def _opnorm(self, function: Function, x: Tensor) -> NormEstimate:
        return lanczos_opnorm(function, x, tolerance=self._tolerance)

    def _extend(self, functions: Functions, given: Any) -> None:
        """Put a block on the stack, and take its norm when it is complete."""
        block, number = functions.block, len(self._stack)
        if number and (self._left is None or not torch.equal(self._left.to(block.x), block.x)):
            self._broken = f"what enters layer {number} is not what leaves the one before it"
        elif number and any(t.requires_grad and t is not first_tensor((given,)) for t in _tensors(given)):
            self._broken = f"layer {number} is given more than the stream that depends on weights or on other layers"
        if self._broken:
            return
        self._stack.append(functions)
        if number + 1 < len(self._anatomy.blocks):
            return

        def through(x: Tensor) -> Tensor:
            for each in self._stack:
                x = each.run(x)
            return x

        try:
            with undisturbed(*self._anatomy.blocks):
                self._whole = self._opnorm(through, self._stack[0].block.x)
        except Exception as error:
            self._whole = reason(error)
        self._stack = []


def reason(error: Exception) -> str:
    """An error in a line; by its kind unless it is one of our own."""
    text = str(error).splitlines()[0] if str(error) else ""
    return text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"


def _tensors(value: Any) -> list[Tensor]:
    """Those in the arguments of a call."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def block_norms(
    model: nn.Module,
    found: Anatomy,
    tokens: Tensor,
    *,
    names: Collection[str] = LAYER,
    tolerance: float = 1e-3,
    on_layer: Callable[[int], object] | None = None,
) -> list[dict[str, Norm]]:
    """Of every block on (1, T) tokens the norms of those names, or why there is none."""
    rows: list[dict[str, Norm]] = []
    with evaluating(model):
        with torch.no_grad():
            blocks = capture(model, found.blocks, tokens[:1])
        norms = BlockNorms(found, names, tolerance=tolerance)
        for n, block in enumerate(blocks):
            norms.enter(n, block.args, block.kwargs)
            rows.append({name: norms.norm(name, n) for name in names})
            if on_layer is not None:
                on_layer(n)
    return rows
