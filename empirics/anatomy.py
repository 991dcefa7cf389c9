"""Where the residual stream runs through someone else's decoder, found by running it.

The blocks are the container of equal-typed modules with the most parameters. Inside a block nothing is known by
name: attention is the child with weights that carries a change of one token to a later one, the feed-forward is the
other children with weights, and a tensor is the residual stream if it still holds the block's input when the
attention adds nothing. What a network does is asked of it on a few tokens, in eval mode, and leaves no trace.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from empirics.running import (
    close,
    evaluating,
    first_tensor,
    has_matrix,
    is_multiple,
    n_parameters,
    removed,
    replaced,
    require_stream,
    stream_tensors,
    unwrapped,
    with_first,
)
from empirics.token_ids import one_sequence

FAR = 1e4  # a factor at which the eps of a normalisation no longer counts
NO_ATTENTION = (
    "no attention was found in it: not one of its children alone carries a token to another; to have it seen, give "
    "attention a module of its own"
)

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a module holds the residual stream.

    Attributes:
        name: `embedding`, then `layer N attention` between the sub-layers and `layer N` after them.
        module, side: whose input or output the stream is.
    """

    name: str
    module: nn.Module
    side: Literal["input", "output"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubLayer:
    """The modules by which a sub-layer is entered and left; the same one, or the first and last of several.

    Attributes:
        adds: it is handed the stream beside its input, and returns the sum.
    """

    enter: nn.Module
    leave: nn.Module
    adds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """How one block is wired.

    Attributes:
        attention, feedforward: None where no such child is found.
        parallel: the feed-forward does not see what the attention adds; None if there are not two.
        post: the block's output is normalised, shortcut included.
        middle: where the stream is seen between the sub-layers; None if it is not seen there.
        closing: the norm that gives such a block's output; None if no module does.
    """

    attention: SubLayer | None
    feedforward: SubLayer | None
    parallel: bool | None
    post: bool
    middle: Place | None
    closing: nn.Module | None


class Called(NamedTuple):
    """One call of a module: its first floating tensor, a second one of the same shape, and its output."""

    module: nn.Module
    child: nn.Module
    input: Tensor | None
    extra: Tensor | None
    output: Tensor | None


class Run(NamedTuple):
    """A block's calls in the order in which they ended, and its output."""

    calls: list[Called]
    output: Tensor

    def of(self, module: nn.Module) -> Called:
        """A module's first call."""
        return next(call for call in self.calls if call.module is module)

    def entering(self, sublayer: SubLayer) -> Tensor:
        """The input of a sub-layer."""
        entered = self.of(sublayer.enter).input
        assert entered is not None
        return entered


class Block:
    """A block with the arguments it was called with, to be called again."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs
        self.x = require_stream(first_tensor((*args, *kwargs.values())), module)

    @property
    def batch_axis(self) -> int:
        """Where a stream of one sequence of several tokens has its sequences: 0 for (B, T, D), 1 for (T, B, D)."""
        return int(self.x.ndim > 2 and self.x.shape[1] == 1)

    @property
    def n_tokens(self) -> int:
        """Of the one sequence, in either order of the axes."""
        return self.x.numel() // self.x.shape[-1]

    @torch.no_grad()
    def run(self, x: Tensor | None = None, edits: Mapping[nn.Module, Edit] | None = None) -> Run:
        """The block on x, with what some modules add to the stream edited."""
        calls: list[Called] = []
        stack: list[nn.Module] = []
        edits = edits or {}

        def before(module: nn.Module, _: Any) -> None:
            stack.append(module)

        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            child = stack[0]
            stack.pop()
            given, extra = stream_tensors(args, kwargs)
            if module in edits:
                sum_ = require_stream(first_tensor((output,)), module)
                stream = torch.zeros_like(sum_) if extra is None else extra
                output = with_first(output, stream + edits[module](sum_ - stream))
            # Copies: a sub-layer's output may later be added to in place.
            kept = (None if t is None else t.clone() for t in (given, extra, first_tensor((output,))))
            calls.append(Called(module, child, *kept))
            return output

        with ExitStack() as hooks:
            for module in list(self.module.modules())[1:]:
                hooks.enter_context(removed(module.register_forward_pre_hook(before)))
                hooks.enter_context(removed(module.register_forward_hook(after, with_kwargs=True)))
            x = self.x if x is None else x
            args, kwargs = replaced(self.args, self.kwargs, self.x, x)
            output = self.module(*args, **kwargs)
        return Run(calls, require_stream(first_tensor((output,)), self.module))


def wiring(block: Block, name: str) -> Wiring:
    """Ask a block how it is wired.

    Raises:
        ValueError: it has no residual stream, or gives values that are not finite.
    """
    x, base = block.x, block.run()
    if not base.output.isfinite().all():
        raise ValueError(
            f"{name} ({type(block.module).__name__}) gives values that are not finite; give weights of which they are"
        )
    weighted = [child for child in dict.fromkeys(call.child for call in base.calls) if has_matrix(child)]
    weighted = [child for child in weighted if any(call.module is child for call in base.calls)]
    other = x.flip(-1)
    other.select(1 - block.batch_axis, -1).copy_(x.select(1 - block.batch_axis, -1))
    mixers = [child for child in weighted if _mixes(base, block.run(other), child, block.n_tokens)]
    rest = [child for child in weighted if child not in mixers]
    attention = _sublayer(base, mixers) if len(mixers) == 1 else None
    feedforward = _sublayer(base, rest) if attention and rest else None

    silent = dict.fromkeys(weighted, torch.zeros_like)
    far = [block.run(scale * y, silent).output for scale, y in ((FAR, x), (2 * FAR, x), (FAR, x.flip(-1)))]
    post = close(far[0], far[1]) and not close(far[0], far[2])
    quiet = [block.run(scale * x, silent).output for scale in (1, 2)]
    if not weighted or not (post or is_multiple(quiet[1] - quiet[0], x)):
        raise ValueError(
            f"{name} ({type(block.module).__name__}) has no residual stream: its input does not reach its output when "
            "its sub-layers add nothing; give a decoder whose blocks add to a stream"
        )
    closing = _closing(base) if post else None
    if attention is None or feedforward is None:
        return Wiring(
            attention=attention, feedforward=feedforward, parallel=None, post=post, middle=None, closing=closing
        )
    pushed = block.run(edits={attention.leave: lambda branch: branch + x.flip(-1).reshape_as(branch)})
    parallel = close(base.entering(feedforward), pushed.entering(feedforward))
    middle = None if parallel else _middle(block, base, attention, post, f"{name} attention")
    return Wiring(
        attention=attention, feedforward=feedforward, parallel=parallel, post=post, middle=middle, closing=closing
    )


def _mixes(base: Run, other: Run, child: nn.Module, n_tokens: int) -> bool:
    """Whether something inside a child differs at the last token while the child's input there does not."""
    pairs = [(a, b) for a, b in zip(base.calls, other.calls) if a.child is child]
    own = next(pair for pair in pairs if pair[0].module is child)
    return _change(own[0].input, own[1].input, n_tokens) == 0 and any(
        _change(a.input, b.input, n_tokens) > 4 or _change(a.output, b.output, n_tokens) > 4 for a, b in pairs
    )


def _change(a: Tensor | None, b: Tensor | None, n_tokens: int) -> float:
    """Of what is at the last token, relative, in units of rounding; 0 where there is nothing by token."""
    if a is None or b is None or a.shape != b.shape or not _by_token(a, n_tokens):
        return 0.0
    last, changed = a.reshape(n_tokens, -1)[-1], b.reshape(n_tokens, -1)[-1]
    if torch.equal(last, changed):
        return 0.0
    return float((last - changed).norm() / last.norm().clamp_min(1e-30)) / torch.finfo(a.dtype).eps


def _by_token(x: Tensor, n_tokens: int) -> bool:
    one = (x.ndim == 3 and set(x.shape[:2]) == {1, n_tokens}) or x.ndim == 2
    return one and n_tokens in x.shape[:-1]


def _sublayer(run: Run, children: list[nn.Module]) -> SubLayer:
    ordered = [call.module for call in run.calls if call.module in children]
    return SubLayer(enter=ordered[0], leave=ordered[-1], adds=run.of(ordered[-1]).extra is not None)


def _middle(block: Block, base: Run, attention: SubLayer, post: bool, name: str) -> Place | None:
    """The first tensor, of those that modules show, which is a multiple of the block's input without attention."""
    silent: dict[nn.Module, Edit] = {attention.leave: torch.zeros_like}
    once, twice = (block.run(scale * block.x, silent) for scale in (1, 2))
    modules = [call.module for call in base.calls]
    started = modules.index(attention.leave)
    if attention.adds and is_multiple(_difference(once, twice, attention.leave, "output"), block.x):
        return Place(name=name, module=attention.leave, side="output")
    for call in base.calls[started + 1 :]:
        if call.module is not call.child or modules.count(call.module) > 1:
            continue
        if is_multiple(_difference(once, twice, call.module, "input"), block.x):
            return Place(name=name, module=call.module, side="output" if post else "input")
    return None


def _closing(base: Run) -> nn.Module | None:
    """The last child that is called, if its output is the block's."""
    last = base.calls[-1]
    same = last.output is not None and last.module is last.child and torch.equal(last.output, base.output)
    return last.module if same else None


def _difference(once: Run, twice: Run, module: nn.Module, side: str) -> Tensor | None:
    a, b = getattr(once.of(module), side), getattr(twice.of(module), side)
    return None if a is None or b is None else b - a


# --- a whole model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """A decoder's blocks and the places of its residual stream.

    Attributes:
        blocks: the blocks, in order; `wirings` says how each is wired.
        places: the block stack's input, then after each sub-layer where it can be seen, else after each block.
        half_layers: whether every serial block shows the stream between its sub-layers.
        width: D.
        batch_axis: 0 where the stream is (B, T, D), 1 where it is (T, B, D).
    """

    blocks: tuple[nn.Module, ...]
    wirings: tuple[Wiring, ...]
    places: tuple[Place, ...]
    half_layers: bool
    width: int
    batch_axis: int

    @property
    def parallel(self) -> bool:
        """Whether a block updates the stream once."""
        return all(wired.parallel for wired in self.wirings)


def find_blocks(model: nn.Module) -> tuple[nn.Module, ...]:
    """The children of the container of equal-typed modules that has the most parameters.

    Raises:
        ValueError: there is none.
    """
    if not hasattr(model, "modules"):
        raise ValueError(f"{model!r} is not a model; give a torch.nn.Module")
    best: tuple[nn.Module, ...] = ()
    for container in model.modules():
        if not isinstance(container, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            continue
        children = tuple(map(unwrapped, container.children()))
        if len({type(child) for child in children}) == 1 and n_parameters(*children) > n_parameters(*best):
            best = children
    if not best:
        raise ValueError(
            f"{type(model).__name__} has no list of equal blocks with parameters; give a decoder that keeps its "
            "blocks in a ModuleList, ModuleDict or Sequential"
        )
    return best


def anatomy(model: nn.Module, tokens: Tensor | None = None) -> tuple[Anatomy, tuple[Block, ...]]:
    """Find the residual stream by running the model on one sequence.

    Args:
        tokens: (B, T) ids for `one_sequence`.

    Raises:
        ValueError: they are none, the model cannot be run on tokens, or has no residual stream, or two.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder, with two residual streams; give a decoder")
    modules = find_blocks(model)
    with evaluating(model), torch.no_grad():
        blocks = capture(model, modules, one_sequence(model, tokens))
        wirings = tuple(wiring(block, f"layer {n}") for n, block in enumerate(blocks))
    half_layers = all(w.parallel or w.middle is not None for w in wirings)
    places = [Place(name="embedding", module=modules[0], side="input")]
    for n, (module, wired) in enumerate(zip(modules, wirings)):
        if half_layers and wired.middle is not None:
            places.append(wired.middle)
        places.append(Place(name=f"layer {n}", module=module, side="output"))
    found = Anatomy(
        blocks=modules,
        wirings=wirings,
        places=tuple(places),
        half_layers=half_layers,
        width=blocks[0].x.shape[-1],
        batch_axis=blocks[0].batch_axis,
    )
    return found, blocks


def capture(model: nn.Module, modules: tuple[nn.Module, ...], tokens: Tensor) -> tuple[Block, ...]:
    """Each block with the arguments of one forward pass.

    Raises:
        ValueError: the pass fails, or does not call the blocks once each, in order; the message says which.
    """
    seen: list[Block] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(Block(module, args, kwargs))

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(removed(module.register_forward_pre_hook(before, with_kwargs=True)))
        forward(model, tokens)
    _require_once_each(model, modules, [block.module for block in seen])
    return tuple(seen)


def _require_once_each(model: nn.Module, modules: tuple[nn.Module, ...], called: list[nn.Module]) -> None:
    """A place of the stream is a block's, and a block's place is where it is called: once a pass, in order.

    Raises:
        ValueError: blocks are called otherwise.
    """
    if called == list(modules):
        return
    what = type(model).__name__
    never = [f"layer {n}" for n, module in enumerate(modules) if module not in called]
    if len(never) == len(modules):
        raise ValueError(
            f"{what} never calls its {len(modules)} blocks ({type(modules[0]).__name__}), at most what is in them; "
            "make each a module whose forward adds to the stream, and call that"
        )
    if never:
        raise ValueError(
            f"{what} does not call {', '.join(never)} in a forward pass in eval mode; give a decoder that calls each"
        )
    often = [f"layer {n} {called.count(module)} times" for n, module in enumerate(modules) if called.count(module) > 1]
    if often:
        raise ValueError(
            f"{what} calls a block more than once in a forward pass ({', '.join(often)}), so that layers share it and "
            "cannot be told apart; give each layer a block of its own (copy.deepcopy)"
        )
    raise ValueError(f"{what} calls its blocks in another order than its list has; put them in the order of the calls")


def forward(model: nn.Module, tokens: Tensor) -> Any:
    """What the model answers on (B, T) token ids; without a cache, where it knows of one.

    Raises:
        ValueError: it cannot be called with tokens alone.
    """
    keeps_cache = hasattr(getattr(model, "config", None), "use_cache")
    try:
        return model(tokens, use_cache=False) if keeps_cache else model(tokens)
    except (TypeError, RuntimeError, IndexError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{type(model).__name__} does not run on {tokens.shape[1]} token ids alone ({reason}); give a decoder, and "
            "fewer tokens where it has no place for so many: tokens=IDS, shape (B, T), or --seq-len of a command"
        ) from None
