"""Which architecture a decoder is, measured on a forward pass: nothing is read from a config.

Each answer is what a block, or the way into the first one, does when its input or what a sub-layer adds is changed.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from empirics.anatomy import FAR, Anatomy, Block, Run, SubLayer, Wiring, anatomy, capture
from empirics.block_functions import has_experts
from empirics.running import close, evaluating, factor, removed
from empirics.token_ids import one_sequence, some_tokens, token_table
from theory.words import counted

CHUNK = 1024  # unit vectors sent through a linear module at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured; None where it does not apply, could not be told, or differs between blocks.

    Attributes:
        n_layers, d_model: sizes.
        block: where a block normalises (`pre-ln`, `post-ln`, `peri-ln`, `branch-ln` as in `Architecture`), or `none`.
        parallel: the feed-forward does not see what the attention adds.
        shortcut_multiplier, residual_multiplier: factors on the stream and on what a sub-layer adds to it, gains
            included where that is normalised.
        embedding_multiplier: the first block's input over the embedding's rows, what is added for positions aside.
        embedding_norm: the first block's input is normalised.
        tied: the head is the token table.
        stds: root mean square of each matrix's entries by role, over the layers that have it. A matrix counts as what
            its module does to unit vectors; `query_key_value` and the like are held in one. Those of all experts are
            one role.
        bias_rms: the largest root mean square of a module's bias, 0 without any.
    """

    n_layers: int
    d_model: int
    block: str | None
    parallel: bool | None
    shortcut_multiplier: float | None
    residual_multiplier: float | None
    embedding_multiplier: float | None
    embedding_norm: bool
    tied: bool
    stds: dict[str, tuple[float, ...]]
    bias_rms: float

    def __str__(self) -> str:
        order = {True: "parallel", False: "serial", None: "of unknown order"}[self.parallel]
        embedding = "normalised" if self.embedding_norm else f"times {_number(self.embedding_multiplier)}"
        return (
            f"d_model {self.d_model}, {counted(self.n_layers, 'layer')}, {self.block or 'of unknown layout'}, {order}, "
            f"embedding {embedding}, residual multiplier {_number(self.residual_multiplier)}, "
            f"shortcut multiplier {_number(self.shortcut_multiplier)}, {'tied' if self.tied else 'untied'} head"
        )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def describe(model: nn.Module, tokens: Tensor | None = None) -> Measured:
    """Measure which architecture a decoder is; it is left as it was.

    Args:
        tokens: (B, T) ids to run it on; random unless given.

    Raises:
        ValueError: they are none, or no residual stream is found; the message says why.
    """
    found, blocks = anatomy(model, tokens)
    with evaluating(model), torch.no_grad():
        kinds = [_kind(block, wired) for block, wired in zip(blocks, found.wirings)]
        multiplier, normalised = _embedding(model, found, one_sequence(model, tokens).shape[1])
        head = _head(model, found)
        table = token_table(model).weight
        tied = head is None or head.data_ptr() == table.data_ptr()
        stds: dict[str, list[float]] = defaultdict(list)
        stds["embedding"].append(_rms(table[table.abs().amax(1) > 0]))
        for block, wired in zip(blocks, found.wirings):
            for role, std in _matrices(block, wired):
                stds[role].append(std)
        if head is not None and not tied:
            stds["head"].append(_rms(head))
    parallel = {wired.parallel for wired in found.wirings}
    names = {kind[0] for kind in kinds}
    return Measured(
        n_layers=len(blocks),
        d_model=found.width,
        block=names.pop() if len(names) == 1 else None,
        parallel=parallel.pop() if len(parallel) == 1 else None,
        shortcut_multiplier=_common([kind[1] for kind in kinds]),
        residual_multiplier=_common([kind[2] for kind in kinds]),
        embedding_multiplier=multiplier,
        embedding_norm=normalised,
        tied=tied,
        stds={role: tuple(values) for role, values in stds.items()},
        bias_rms=max((_rms(p) for name, p in model.named_parameters() if name.endswith("bias")), default=0.0),
    )


def _common(values: list[float | None]) -> float | None:
    """The mean of values that agree to a per cent."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or max(known) - min(known) > 0.01 * max(map(abs, known)):
        return None
    return sum(known) / len(known)


# --- a block --------------------------------------------------------------------------------------------------------


def _kind(block: Block, wired: Wiring) -> tuple[str | None, float | None, float | None]:
    """Where it normalises, its shortcut and residual multipliers."""
    attention, feedforward = wired.attention, wired.feedforward
    if attention is None or feedforward is None:
        return ("post-ln" if wired.post else None), None, None
    x = block.x
    silent = {attention.leave: torch.zeros_like, feedforward.leave: torch.zeros_like}

    def total(scale: float, pushed: float) -> Tensor:
        """The stream where the sub-layers are added to `scale` x, if attention says `pushed` times x backwards."""
        push = {attention.leave: lambda branch: pushed * x.flip(-1).reshape_as(branch)}
        run = block.run(scale * x, silent | push)
        if not wired.post or wired.middle is None:
            return run.output
        entering = run.of(wired.middle.module).input
        assert entering is not None
        return entering.reshape_as(x)

    quiet = total(1, 0)
    crossed = 1 if wired.parallel or wired.post else 2  # how often the shortcut multiplies on the way
    shortcut = factor(total(2, 0) - quiet, x)
    alpha = None if shortcut is None or (wired.post and wired.middle is None) else shortcut ** (1 / crossed)
    near, far, farther = (total(1, scale) - quiet for scale in (1, FAR, 2 * FAR))
    after = not wired.post and close(far, farther)
    if alpha is None:
        added = None
    elif after:
        added = _rms(far) / alpha
    else:
        added = factor(near, x.flip(-1))
        added = None if added is None else added / alpha ** (crossed - 1)
    entered = [block.run(scale * x).entering(attention) for scale in (FAR, 2 * FAR)]
    before = close(entered[0], entered[1])
    if wired.post:
        name = "post-ln" if not before else None
    else:
        name = {(True, False): "pre-ln", (True, True): "peri-ln", (False, True): "branch-ln"}.get(
            (before, after), "none"
        )
    return name, alpha, added


# --- embedding and head ---------------------------------------------------------------------------------------------


def _embedding(model: nn.Module, found: Anatomy, n_tokens: int) -> tuple[float | None, bool]:
    """The embedding's multiplier, and whether it is normalised."""
    table = token_table(model)
    one, other = (some_tokens(model, (1, n_tokens), seed=seed) for seed in (1, 2))

    def entering(tokens: Tensor, scale: float = 1.0) -> Tensor:
        with ExitStack() as hooks:
            if scale != 1.0:
                hooks.enter_context(removed(table.register_forward_hook(lambda *seen: scale * seen[2])))
            return capture(model, found.blocks, tokens)[0].x

    if close(entering(one, FAR), entering(one, 2 * FAR)):
        return None, True
    rows = table.weight[one] - table.weight[other]
    return factor(entering(one) - entering(other), rows), False


def _head(model: nn.Module, found: Anatomy) -> Tensor | None:
    """The weight of the last linear module after the blocks with a row a token; None if there is none of its own."""
    inside = {module for block in found.blocks for module in block.modules()}
    table = token_table(model)
    heads = [
        weight
        for module in model.modules()
        if module not in inside and not isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
        if weight.ndim == 2 and weight.shape[0] >= 0.9 * table.num_embeddings and weight.shape[1] == found.width
    ]
    return heads[-1].detach() if heads else None


# --- matrices -------------------------------------------------------------------------------------------------------


def _matrices(block: Block, wired: Wiring) -> Iterator[tuple[str, float]]:
    """Role and root mean square of every matrix of a block."""
    run = block.run()
    roles: dict[nn.Module, str] = {}
    if wired.attention is not None and wired.feedforward is not None:  # what mixes tokens alone may be no attention
        roles |= _attention_roles(block, run, wired.attention)
        roles |= _feedforward_roles(block, run, wired.feedforward)
    others: dict[str, list[Tensor]] = defaultdict(list)
    for name, module in block.module.named_modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if p.ndim > 1}
        if module in roles:
            yield roles[module], _rms(_response(module, run))
        else:
            for key, p in own.items():
                others[re.sub(r"\.\d+\.", ".*.", f"{name}.{key}")].append(p)
    if has_experts(wired.feedforward):
        others = _routed_roles(others, block.x.shape[-1])
    for name, alike in others.items():
        yield name, math.sqrt(sum(_rms(p) ** 2 * p.numel() for p in alike) / sum(p.numel() for p in alike))


def _leaves(run: Run, sublayer: SubLayer) -> tuple[list[nn.Module], list[nn.Module]]:
    """Linear modules that read a sub-layer's input, in order of their calls, and the others."""
    entering, started = run.entering(sublayer), run.of(sublayer.enter).child
    ended = run.of(sublayer.leave).child
    children = list(dict.fromkeys(call.child for call in run.calls))
    within = children[children.index(started) : children.index(ended) + 1]
    readers: list[nn.Module] = []
    others: list[nn.Module] = []
    for call in run.calls:
        module = call.module
        weights = [p for p in module.parameters() if p.ndim > 1]
        if call.child not in within or any(True for _ in module.children()) or len(weights) != 1 or weights[0].ndim > 2:
            continue
        # Sequences and tokens may be on one axis.
        same = call.input is not None and torch.equal(_tokens(call.input), _tokens(entering))
        (readers if same else others).append(module)
    return readers, others


def _attention_roles(block: Block, run: Run, attention: SubLayer) -> dict[nn.Module, str]:
    """The first token sees itself alone: of what attention reads, the value alone moves its output there."""
    readers, others = _leaves(run, attention)
    roles = {others[-1]: "output"} if others else {}
    if len(readers) == 1:
        return roles | {readers[0]: "query_key_value"}
    if len(readers) not in (2, 3) or not others:
        return roles

    def first(at: Run) -> Tensor:
        mixed = at.of(others[-1]).input
        assert mixed is not None
        return mixed.reshape(block.x.shape[1 - block.batch_axis], -1)[0]

    values = [m for m in readers if not close(first(block.run(edits={m: lambda y: 2 * y})), first(run))]
    if len(values) != 1:
        return roles
    rest = [module for module in readers if module not in values]
    names = ("query", "key") if len(rest) == 2 else ("query",)
    return roles | {values[0]: "value" if len(rest) == 2 else "key_value"} | dict(zip(rest, names))


def _feedforward_roles(block: Block, run: Run, feedforward: SubLayer) -> dict[nn.Module, str]:
    """Of two readers, what leaves is linear in the gate's partner: its sign turns with it."""
    readers, others = _leaves(run, feedforward)
    if len(others) != 1 or len(readers) not in (1, 2):
        return {}
    leave = others[0]
    hidden = run.of(leave).input
    assert hidden is not None
    if len(readers) == 1:
        produced = run.of(readers[0]).output
        fused = produced is not None and produced.shape[-1] == 2 * hidden.shape[-1]
        return {readers[0]: "ffn_in_gate" if fused else "ffn_in", leave: "ffn_out"}
    roles = {leave: "ffn_out"}
    for module in readers:
        turned = block.run(edits={module: torch.neg}).of(leave).input
        linear = turned is not None and close(-turned, hidden)
        roles[module] = "ffn_gate" if linear else "ffn_in"
    return roles


def _routed_roles(others: Mapping[str, list[Tensor]], width: int) -> dict[str, list[Tensor]]:
    """By role what is a router's, (experts, D), or the experts', by sizes alone: they are called on some tokens each.

    Of two sets of experts' matrices the one with twice the numbers is entrance and gate in one, and of three the one of
    another shape leaves. Of two as large, those of `nn.Linear` are (outputs, inputs) each; what else is not told apart.
    """
    experts = {name: parts for name, parts in others.items() if len(parts) > 1 or parts[0].ndim == 3}
    shapes = {name: parts[0].shape[-2:] for name, parts in experts.items()}
    count = {sum(p.numel() for p in parts) // shapes[name].numel() for name, parts in experts.items()}
    roles = {
        name: "router"
        for name, parts in others.items()
        if name not in experts and len(count) == 1 and tuple(parts[0].shape) == (*count, width)
    }
    names = sorted(experts, key=lambda name: shapes[name].numel())
    if len(names) == 2 and shapes[names[1]].numel() == 2 * shapes[names[0]].numel():
        roles |= {names[0]: "ffn_out", names[1]: "ffn_in_gate"}
    elif len(names) == len(set(shapes.values())) == 2 and all(experts[name][0].ndim == 2 for name in names):
        roles |= {name: "ffn_in" if shapes[name][1] == width else "ffn_out" for name in names}
    elif len(names) == 3:
        alone = [name for name in names if sum(shapes[name] == shapes[other] for other in names) == 1]
        roles |= {name: "ffn_out" if name in alone else "ffn_in_gate" for name in names} if len(alone) == 1 else {}
    found: dict[str, list[Tensor]] = defaultdict(list)
    for name, parts in others.items():
        found[roles.get(name, name)] += parts
    return found


def _response(module: nn.Module, run: Run) -> Tensor:
    """(inputs, outputs) matrix of a linear module: what it makes of unit vectors, its bias subtracted."""
    given = run.of(module).input
    assert given is not None
    unit = torch.eye(given.shape[-1], dtype=given.dtype, device=given.device)
    bias = module(torch.zeros_like(unit[:1]))
    return torch.cat([module(rows) - bias for rows in unit.split(CHUNK)])


def _tokens(x_BTD: Tensor) -> Tensor:
    """(N, D), token by token."""
    return x_BTD.reshape(-1, x_BTD.shape[-1])


def _rms(x: Tensor) -> float:
    return math.sqrt(float(x.detach().double().square().mean()))
