"""The functions that anyone's block is made of, and the points of one sequence at which their Jacobians are taken.

A block is called again with the arguments that it was called with, so that a function is the very one that the model
computes on that sequence, positions and masks included; without dropout, and with the weights as constants. What has no
name in the block is had by hooks: a sub-layer is silenced, given what it reads, or left early.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention.flex_attention import BlockMask
from torch.utils import checkpoint

from empirics.anatomy import Block, SubLayer, Wiring
from empirics.registry import Unavailable
from empirics.running import (
    close,
    evaluating,
    factor,
    first_sequence,
    first_tensor,
    removed,
    replaced,
    require_stream,
    run_eagerly,
    stream_tensors,
    tolerance,
    with_first,
)
from empirics.spectral import Function

Hooks = Callable[[], Sequence[Any]]  # puts hooks on, and gives their handles
UNFOUND = "its sub-layers are not told apart"
PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device)
EXACT, MULTIPLE = "exact", "multiple"  # first axes that are taken for the batch's: of its size, or of a multiple


class _Reached(Exception):
    """The tensor that was waited for is there."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


class _Inside(nn.Module):
    """A module called past the hooks and wrappers around it: those of checkpointing, of sharding and of monitors."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


class _Sums(NamedTuple):
    """Of a block that normalises the stream: the norm after attention, and what ends a run before it or the last."""

    middle: nn.Module
    after_attention: Hooks
    at_the_end: Hooks


class Functions:
    """The functions of one block on one sequence; to be used `undisturbed`.

    `layer`, its halves `attention_half` and `feedforward_half`, what they add to the stream (`attention_branch`,
    `feedforward_branch`) and the sub-layers in what they read (`attention`, `feedforward`; `J_Z`, attention before its
    output matrix), as `empirics.probes.layer_functions` has them of our own network.
    """

    def __init__(self, block: Block, wired: Wiring) -> None:
        self.block, self.wired = block, wired
        self._inside = _Inside(block.module)
        weights = dict(block.module.named_parameters())
        buffers = {name: buffer.clone() for name, buffer in block.module.named_buffers()}  # one may be written to
        self._weights = {f"module.{name}": _working(x) for name, x in (weights | buffers).items()}

    @property
    def whole(self) -> bool:
        """Whether its weights are there; those of a layer in shards are let go after it has run."""
        return all(x.untyped_storage().nbytes() or not x.numel() for x in self._weights.values())

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

    def run(self, x: Tensor, *hooks: Hooks) -> Tensor:
        """The block's output on x, or what it has reached when a hook ends it."""
        args, kwargs = replaced(self.block.args, self.block.kwargs, self.block.x, x.clone())  # some add to it in place
        with ExitStack() as stack:
            for put in hooks:
                for handle in put():
                    stack.enter_context(removed(handle))
            try:
                output = functional_call(self._inside, self._weights, args, kwargs)
            except _Reached as reached:
                return reached.tensor
        return require_stream(first_tensor((output,)), self.block.module)

    def at(self, x: Tensor, *hooks: Hooks) -> Tensor:
        """`run` as a constant."""
        with torch.no_grad():
            return self.run(x, *hooks)

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
            between, whole = first(x), self.run(x)
            error = float((second(between) - whole).norm())
        rounding = 64 * torch.finfo(x.dtype).eps * float(whole.norm())
        if not error <= tolerance(x) * float((whole - x).norm()) + rounding:
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
        raise _Reached(require_stream(stream_tensors(args, kwargs)[0], module))

    def leaving(_: nn.Module, __: Any, output: Any) -> None:
        raise _Reached(require_stream(first_tensor((output,)), module))

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


# --- the arguments of a call ----------------------------------------------------------------------------------------


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Modules as in evaluation, in the precision of their weights, whatever the pass inside which they are run again.

    Nothing of what runs inside is left to the pass: no random number, no saved tensor and no mode.
    """
    device = next((p.device.type for module in modules for p in module.parameters()), "cpu")
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(evaluating(module))
        # Compiled functions have no second derivative; without this module, which loads slowly, nothing is compiled.
        stack.enter_context(run_eagerly(modules[0], always="torch._dynamo" in sys.modules))
        stack.enter_context(_without_checkpoints())
        stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.enable_grad())
        # Activation checkpointing counts what is saved inside it; only the innermost of such hooks are called.
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_itself, _itself))
        torch.backends.mha.set_fastpath_enabled(False)  # it calls no module
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    """Checkpointed functions are called and kept: they have no second derivative, or silently no first one."""

    class Kept:
        @staticmethod
        def apply(function: Callable[..., Any], _: bool, *args: Any) -> Any:
            return function(*args)

    def kept(*_: Any, **__: Any) -> Iterator[None]:
        yield

    own = {"CheckpointFunction": Kept, "_checkpoint_without_reentrant_generator": kept}
    theirs = {name: getattr(checkpoint, name) for name in own if hasattr(checkpoint, name)}
    try:
        for name in theirs:
            setattr(checkpoint, name, own[name])
        yield
    finally:
        for name, value in theirs.items():
            setattr(checkpoint, name, value)


def _itself(x: Tensor) -> Tensor:
    return x


def of_one_sequence(block: Block, number: int, batch_axis: int) -> Block:
    """A block with the arguments of the first sequence alone, as constants; to be used `undisturbed`.

    Which axes are the batch's is told by their size, and held to the block's output on the whole batch.

    Args:
        number: the block's, under which a cache has its keys.
        batch_axis: of the stream.

    Raises:
        Unavailable: its weights are in shards, it cannot be called on one sequence, or a cache has earlier tokens.
    """
    if any(hasattr(p, "to_local") for p in block.module.parameters()) or not Functions(block, _NOTHING).whole:
        raise Unavailable("its weights are in shards while it runs")
    if any(hasattr(module, "_fsdp_wrapped_module") for module in block.module.modules()):
        raise Unavailable("it is in FullyShardedDataParallel, which must not run twice; use fully_shard")
    whole = _detached(block, number, batch_axis, "")
    if block.x.ndim < 3 or block.x.shape[batch_axis] == 1:
        return whole
    ones = [_detached(block, number, batch_axis, rule) for rule in (EXACT, MULTIPLE)]
    expected, failed = first_sequence(Functions(whole, _NOTHING).at(whole.x), batch_axis), ""
    for one in ones:
        try:
            if close(Functions(one, _NOTHING).at(one.x), expected):
                return one
        except (RuntimeError, IndexError, TypeError) as error:  # shapes that do not go together
            failed = failed or f" ({_line(error)})"
    raise Unavailable(f"it cannot be called on one sequence of the batch alone{failed}; probe a batch of one sequence")


_NOTHING = Wiring(attention=None, feedforward=None, parallel=None, post=False, middle=None, closing=None)


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _detached(block: Block, number: int, batch_axis: int, rule: str) -> Block:
    x, made = block.x, dict[int, Tensor]()
    batch, length = (x.shape[batch_axis], x.shape[1 - batch_axis]) if x.ndim > 2 else (1, len(x))

    def first(tensor: Tensor) -> Tensor:
        """What of it is the first sequence's."""
        size = len(tensor) if tensor.ndim else 1
        if not rule or (tensor.ndim < 2 and size in (1, length)):
            return tensor
        if tensor.ndim == 1 and size != batch:  # where packed sequences end, as a kernel may take them on trust
            raise Unavailable("it is given a list that is neither of tokens nor of sequences; probe one sequence")
        if batch_axis and tensor.ndim > 2 and tensor.shape[:2] == x.shape[:2]:
            return tensor[:, :1]
        if size == batch or (rule == MULTIPLE and tensor.ndim > 2 and size % batch == 0):
            return tensor[: size // batch]
        return tensor

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in made:
                made[id(value)] = _working(first(value))
            return made[id(value)]
        if isinstance(value, dict):
            return {key: part(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            items = [part(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if hasattr(value, "get_seq_length") and hasattr(value, "update"):  # keys and values that it would add to
            if value.get_seq_length(number):
                raise Unavailable("its cache has earlier tokens; give whole sequences")
            return None
        if isinstance(value, BlockMask):
            raise Unavailable("its flex attention has no second derivative; use scaled_dot_product_attention")
        if rule and not (value is None or isinstance(value, PLAIN)):  # of the batch, for all that is known
            raise Unavailable(f"it is given a {type(value).__name__} for the whole batch; probe one sequence")
        return value

    return Block(block.module, part(block.args), part(block.kwargs))


def _working(tensor: Tensor) -> Tensor:
    """As a constant, in float32 at least."""
    tensor = tensor.detach()
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor
