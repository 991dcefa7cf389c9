"""Modules of one form in one pass, where a pass each would spend its time between the operations and not in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

# A batch's inputs and weights: with more, a further row costs as much as a pass of its own, and a copy of its weights.
INPUTS, WEIGHTS = 2**17, 2**24


def batches(modules: Sequence[nn.Module], inputs: int) -> list[list[int]]:
    """Which modules go together, each with so many numbers as its input: of one form, and no more than pays."""
    found: list[tuple[Any, list[int]]] = []
    for n, module in enumerate(modules):
        form, weights = _form(module), sum(x.numel() for x in module.parameters())
        most = max(1, min(INPUTS // max(inputs, 1), WEIGHTS // max(weights, 1)))
        room = [batch for other, batch in found if other == form and len(batch) < most]
        if room:
            room[0].append(n)
        else:
            found.append((form, [n]))
    return [batch for _, batch in found]


def stacked(modules: Sequence[nn.Module], call: Callable[[Any, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """x (N, ...) -> (N, ...), row n being call(modules[n], x[n]), for N modules of one form; weights are copied."""
    called = [_Called(module, call) for module in modules]
    if len(called) == 1:
        return lambda x: called[0](x[0])[None]
    weights = stack_module_state(called)  # type: ignore[arg-type]
    return lambda x: vmap(lambda weight, row: functional_call(called[0], weight, (row,)))(weights, x)


def _form(module: nn.Module) -> list[tuple[str, type, dict[str, Any], dict[str, Any]]]:
    """All that a module is but the values of its tensors."""
    return [
        (
            name,
            type(part),
            {key: value for key, value in vars(part).items() if not key.startswith("_")},
            {key: (x.shape, x.dtype, x.device) for key, x in _tensors(part)},
        )
        for name, part in module.named_modules()
    ]


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


class _Called(nn.Module):
    """A function of a module as a module."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.module, x)
