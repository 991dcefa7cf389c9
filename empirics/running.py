"""Tensors and hooks by which someone else's modules are run, edited and compared."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from empirics.residual_stream import widest


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode and uncompiled, and as it was afterwards; random states too."""
    training = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    others = random.getstate(), np.random.get_state()  # noqa: NPY002 (what a block may draw from)
    with torch.random.fork_rng(devices=devices), run_eagerly(model), _kept(model):
        try:
            model.eval()
            yield
        finally:
            for module, was in training:
                module.training = was
            random.setstate(others[0])
            np.random.set_state(others[1])  # noqa: NPY002


OF_MODULES = vars(nn.Module()).keys()  # what every module has, as its weights and hooks


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Whatever modules note in a pass is undone: counts in buffers, and losses, caches or lists that are attributes.

    Of lists in lists the outer one is. Attributes of torch's own modules are left alone: those that shard a model make
    themselves ready in a first pass.
    """
    tables = [module._buffers for module in model.modules()]
    tables += [vars(module) for module in model.modules() if not type(module).__module__.startswith("torch.")]
    notes = [(table, {key: value for key, value in table.items() if key not in OF_MODULES}) for table in tables]
    values = {id(value): value for _, noted in notes for value in noted.values()}.values()
    lists = [(it, copy.copy(it)) for it in values if isinstance(it, list | dict | set)]
    tensors = [it for it in values if isinstance(it, Tensor) and not it.is_inference()]
    copies = [(it, it.detach().clone(), it._version) for it in tensors]
    try:
        yield
    finally:
        for table, noted in notes:
            for key in table.keys() - noted.keys() - OF_MODULES:
                del table[key]
            table.update(noted)
        for it, was in lists:
            if _held(it) != _held(was):  # one that its owner may be in the middle of is not touched
                it.clear()
                it.extend(was) if isinstance(it, list) else it.update(was)
        with torch.no_grad():
            for it, was, version in copies:
                if it._version != version:  # one that a backward pass waits for is not touched
                    it.copy_(was)


def _held(it: Iterable[Any]) -> list[int]:
    """Which objects are in a list, a dictionary or a set; tensors do not compare to a truth value."""
    return [id(item) for item in (*it, *(it.values() if isinstance(it, dict) else ()))]


def outside_modes() -> AbstractContextManager[Any]:
    """Past the dispatch modes of a pass: selective checkpointing would keep what is computed here for the backward."""
    return nullcontext() if _get_current_dispatch_mode() is None else _disable_current_modes()


class Hook:
    """What looks at somebody's module in a pass, outside its modes; copied with the module it does nothing."""

    def __init__(self, look: Callable[..., None]) -> None:
        self.look = look

    def __call__(self, *given: Any) -> None:
        with outside_modes():
            self.look(*given)

    def __reduce__(self) -> Any:
        return Hook, (nothing,)


def nothing(*_: Any) -> None:
    """See nothing."""


def recomputing() -> bool:
    """Whether a backward pass is running: activation checkpointing then runs the forward pass once more."""
    return torch._C._current_graph_task_id() != -1


def is_compiled(model: nn.Module) -> bool:
    """Whether it, or a module in it, is compiled."""
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())


WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")  # what torch.compile and checkpoint_wrapper have inside


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside a compiled one or one that checkpoints its activations, else itself."""
    for name in WRAPPED:
        inside = getattr(module, name, None)
        if isinstance(inside, nn.Module):
            return unwrapped(inside)
    return module


@contextmanager
def run_eagerly(model: nn.Module, *, always: bool = False) -> Iterator[None]:
    """A compiled model's forward passes run uncompiled, so that hooks are called; compiled graphs stay as they are.

    Args:
        always: also where the model does not show that it is compiled.

    Raises:
        ValueError: it is compiled, and this torch has no way to run it otherwise.
    """
    if not (always or is_compiled(model)):
        yield
        return
    if not hasattr(torch.compiler, "set_stance"):
        raise ValueError("the model is compiled, and hooks on it are not called; use torch 2.6, or leave it uncompiled")
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def removed(handle: Any) -> Iterator[None]:
    """A hook, removed in the end."""
    try:
        yield
    finally:
        handle.remove()


def n_parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def has_matrix(module: nn.Module) -> bool:
    return any(p.ndim > 1 for p in module.parameters())


def first_tensor(values: Iterable[Any]) -> Tensor | None:
    """The first floating tensor with a width; what a tuple or an output object holds counts in its place."""
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
            return value
        if isinstance(value, tuple | list):
            found = first_tensor(value)
            if found is not None:
                return found
    return None


def first_sequence(x: Tensor, batch_axis: int) -> Tensor:
    """Of (B, T, D), or of (T, B, D); a stream without an axis of sequences is one. A constant."""
    return x.detach().narrow(batch_axis, 0, 1) if x.ndim > 2 else x.detach()


def stream_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """A module's input, and another tensor of its shape that it was given beside it."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 1]
    if not tensors:
        return None, None
    others = [t for t in tensors[1:] if t.shape == tensors[0].shape and t is not tensors[0]]
    return tensors[0], others[0] if others else None


def with_first(output: Any, tensor: Tensor) -> Any:
    """An output with its (first) tensor replaced."""
    if isinstance(output, Tensor):
        return tensor
    return type(output)([tensor, *output[1:]])


def replaced(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], old: Tensor, new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with one tensor in another's place, also inside tuples and lists."""
    return (
        tuple(_exchanged(arg, old, new) for arg in args),
        {key: _exchanged(value, old, new) for key, value in kwargs.items()},
    )


def _exchanged(value: Any, old: Tensor, new: Tensor) -> Any:
    if value is old:
        return new
    if not isinstance(value, tuple | list):
        return value
    items = [_exchanged(item, old, new) for item in value]
    if all(a is b for a, b in zip(items, value, strict=True)):
        return value  # a list may be there to be added to
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def require_stream(x: Tensor | None, module: nn.Module) -> Tensor:
    if x is None:
        raise ValueError(f"{type(module).__name__} neither takes nor gives a hidden state; give a plain decoder")
    return x


def tolerance(x: Tensor) -> float:
    """Relative: what the arithmetic of one block leaves of two equal results."""
    return max(1e-3, 8 * torch.finfo(x.dtype).eps)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, in the norm."""
    return a.shape == b.shape and float((a - b).norm()) <= tolerance(a) * float(b.norm())


def adds_the_same(a: Tensor, b: Tensor, x: Tensor) -> bool:
    """Whether a and b equal each other up to rounding, and up to it in what they have beside a stream x."""
    rounding = 64 * torch.finfo(x.dtype).eps * float(b.norm())
    return a.shape == b.shape and float((a - b).norm()) <= tolerance(x) * float((b - x).norm()) + rounding


def is_multiple(a: Tensor | None, x: Tensor) -> bool:
    """Whether `a` is a positive multiple of x, whatever its shape."""
    found = None if a is None else factor(a, x)
    return found is not None and found > 0


def factor(a: Tensor, x: Tensor) -> float | None:
    """By what `a` is a multiple of x, up to rounding; None if it is none."""
    if a.numel() != x.numel() or a.shape[-1] != x.shape[-1]:
        return None
    flat, y = (t.to(widest(x.device)) for t in (a.reshape_as(x), x))
    found = float((flat * y).sum() / y.square().sum())
    return found if float((flat - found * y).norm()) <= tolerance(x) * float((found * y).norm()) else None
