"""Spectral norms of the Jacobians of anyone's blocks, matrix-free: lower estimates.

A block is called again with the arguments that it was called with, so that the norm is of the very function that the
model computes on a sequence, positions and masks included.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from empirics.anatomy import Anatomy, Block, Place, Wiring, capture
from empirics.running import evaluating, first_tensor, removed, replaced, require_stream, stream_tensors, with_first
from empirics.spectral import Function, NormEstimate, lanczos_opnorm


def block_norms(
    model: nn.Module,
    found: Anatomy,
    tokens: Tensor,
    *,
    tolerance: float = 1e-3,
    on_layer: Callable[[int], object] | None = None,
) -> list[dict[str, NormEstimate]]:
    """Of every block on (1, T) tokens: the norm of `layer`, and of its halves where the stream is seen between them.

    `attention_half` is from the block's input to the stream after attention, `feedforward_half` from there to the
    block's output. The latter is had by running the block with an attention that adds nothing, which needs a shortcut
    of factor 1 and no norm on the stream, as `Architecture`'s pre-ln, peri-ln and branch-ln have.
    """
    rows: list[dict[str, NormEstimate]] = []
    wanted = {p: p.requires_grad for p in model.parameters()}
    with evaluating(model):
        with torch.no_grad():
            blocks = capture(model, found.blocks, tokens[:1])
        model.requires_grad_(False)  # weights are constants here; the products differentiate in x alone
        try:
            for n, (block, wired) in enumerate(zip(blocks, found.wirings)):
                functions = _halves(block, wired)
                functions |= {"layer": (lambda x, b=block: _run(b, x), block.x)}
                rows.append(
                    {
                        name: lanczos_opnorm(lambda x, f=f: f(x[None])[0], x[0].detach(), tolerance=tolerance)
                        for name, (f, x) in functions.items()
                    }
                )
                if on_layer is not None:
                    on_layer(n)
        finally:
            for parameter, requires in wanted.items():
                parameter.requires_grad_(requires)
    return rows


def _halves(block: Block, wired: Wiring) -> dict[str, tuple[Function, Tensor]]:
    middle, attention = wired.middle, wired.attention
    if middle is None or attention is None:
        return {}
    halves: dict[str, tuple[Function, Tensor]] = {"attention_half": (lambda x: _run(block, x, at=middle), block.x)}
    with torch.no_grad():
        between = _run(block, block.x, at=middle)
        silenced = _run(block, between, at=middle, silent=attention.leave)
    if torch.equal(silenced, between):
        halves["feedforward_half"] = (lambda x: _run(block, x, silent=attention.leave), between)
    return halves


class _Reached(Exception):
    """The tensor that was waited for is there."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream


def _run(block: Block, x: Tensor, *, at: Place | None = None, silent: nn.Module | None = None) -> Tensor:
    """The block's output on x, or the stream at a place inside it; with a module that adds nothing to the stream."""

    def quiet(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        added = require_stream(first_tensor((output,)), block.module)
        stream = stream_tensors(args, kwargs)[1]
        return with_first(output, torch.zeros_like(added) if stream is None else stream)

    def entering(_: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Reached(require_stream(stream_tensors(args, kwargs)[0], block.module))

    def leaving(_: nn.Module, __: Any, output: Any) -> None:
        raise _Reached(require_stream(first_tensor((output,)), block.module))

    args, kwargs = replaced(block.args, block.kwargs, block.x, x)
    with ExitStack() as hooks:
        if silent is not None:
            hooks.enter_context(removed(silent.register_forward_hook(quiet, with_kwargs=True)))
        if at is not None and at.side == "input":
            hooks.enter_context(removed(at.module.register_forward_pre_hook(entering, with_kwargs=True)))
        elif at is not None:
            hooks.enter_context(removed(at.module.register_forward_hook(leaving)))
        try:
            output = block.module(*args, **kwargs)
        except _Reached as reached:
            return reached.stream.reshape_as(x)
    return require_stream(first_tensor((output,)), block.module)
