"""Anyone's block called again, on one sequence of the batch that it was called with, past whatever is around it.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention.flex_attention import BlockMask
from torch.utils import checkpoint

from empirics.anatomy import Block
from empirics.registry import Unavailable
from empirics.running import (
    adds_the_same,
    evaluating,
    first_sequence,
    first_tensor,
    removed,
    replaced,
    require_stream,
    run_eagerly,
)

Hooks = Callable[[], Sequence[Any]]  # puts hooks on, and gives their handles
PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device)
# First axes that are taken for the batch's: of its size, of a multiple, or of its size but where it may be of heads.
EXACT, MULTIPLE, HEADS = "exact", "multiple", "heads"


class Reached(Exception):
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


class Again:
    """A block called again, with the arguments it has and constant weights; to be used `undisturbed`."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self._inside = _Inside(block.module)
        weights = dict(block.module.named_parameters())
        buffers = {name: buffer.clone() for name, buffer in block.module.named_buffers()}  # one may be written to
        self._weights = {f"module.{name}": _working(x) for name, x in (weights | buffers).items()}

    @property
    def whole(self) -> bool:
        """Whether its weights are there; those of a layer in shards are let go after it has run."""
        return all(x.untyped_storage().nbytes() or not x.numel() for x in self._weights.values())

    def run(self, x: Tensor, *hooks: Hooks) -> Tensor:
        """The block's output on x, or what it has reached when a hook ends it."""
        args, kwargs = replaced(self.block.args, self.block.kwargs, self.block.x, x.clone())  # some add to it in place
        with ExitStack() as stack:
            for put in hooks:
                for handle in put():
                    stack.enter_context(removed(handle))
            try:
                output = functional_call(self._inside, self._weights, args, kwargs)
            except Reached as reached:
                return reached.tensor
        return require_stream(first_tensor((output,)), self.block.module)

    def at(self, x: Tensor, *hooks: Hooks) -> Tensor:
        """`run` as a constant."""
        with torch.no_grad():
            return self.run(x, *hooks)


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
        # Activation checkpointing counts what is saved inside it; only the innermost of such hooks are called. Kept
        # itself, an output would keep the graph that it is in, and be kept by it for good.
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda x: x))
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


def of_one_sequence(block: Block, number: int, batch_axis: int) -> Block:
    """A block with the arguments of the first sequence alone, as constants; to be used `undisturbed`.

    Which axes are the batch's is told by their size, and held to what the block adds to the stream in the whole batch.

    Args:
        number: the block's, under which a cache has its keys.
        batch_axis: of the stream.

    Raises:
        Unavailable: its weights are in shards, it cannot be called on one sequence, or a cache has earlier tokens.
    """
    if torch.is_inference_mode_enabled():
        raise Unavailable("the pass is in inference mode; use torch.no_grad")
    if any(hasattr(p, "to_local") for p in block.module.parameters()) or not Again(block).whole:
        raise Unavailable("its weights are in shards while it runs")
    if any(hasattr(module, "_fsdp_wrapped_module") for module in block.module.modules()):
        raise Unavailable("it is in FullyShardedDataParallel, which must not run twice; use fully_shard")
    whole = _detached(block, number, batch_axis, "")
    if block.x.ndim < 3 or block.x.shape[batch_axis] == 1:
        return whole
    ones = [_detached(block, number, batch_axis, rule) for rule in (EXACT, MULTIPLE, HEADS)]
    expected, failed = first_sequence(Again(whole).at(whole.x), batch_axis), ""
    if not expected.isfinite().all():
        raise Unavailable("its output is not finite")
    for one in ones:
        try:
            if adds_the_same(Again(one).at(one.x), expected, one.x):
                return one
        except (RuntimeError, IndexError, TypeError) as error:  # shapes that do not go together
            failed = failed or f" ({_line(error)})"
    raise Unavailable(f"it cannot be called on one sequence of the batch alone{failed}; probe a batch of one sequence")


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
        alike = tensor.ndim > 2 and tensor.shape[:2] == x.shape[:2]
        if rule == HEADS and tensor.ndim == 3 and not alike:  # a bias of (heads, ., T)
            return tensor
        if batch_axis and alike:
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
