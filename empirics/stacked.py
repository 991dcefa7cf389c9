"""Modules of one form in one pass, where a pass each would spend its time between the operations and not in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

NUMBERS = 2**17  # in a batch's inputs: where a further row costs as much as a pass of its own


def batches(modules: Sequence[nn.Module], numbers: int) -> Iterator[list[int]]:
    """Which modules, of `numbers` inputs each, go together: of one form, and no more than pays."""
    alike: list[tuple[Any, list[int]]] = []
    for n, module in enumerate(modules):
        form = _form(module)
        for other, members in alike:
            if other == form and (len(members) + 1) * numbers <= NUMBERS:
                members.append(n)
                break
        else:
            alike.append((form, [n]))
    yield from (members for _, members in alike)


def stacked(modules: Sequence[nn.Module], call: Callable[[Any, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """x (N, ...) -> (N, ...), row n being call(modules[n], x[n]), for N modules of one form."""
    called = [_Called(module, call) for module in modules]
    if len(called) == 1:
        return lambda x: called[0](x[0])[None]
    weights = stack_module_state(called)  # type: ignore[arg-type]
    return lambda x: vmap(lambda weight, row: functional_call(called[0], weight, (row,)))(weights, x)


def _form(module: nn.Module) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """All that a module is but the values of its tensors."""
    return [
        (
            name,
            {key: value for key, value in vars(part).items() if not key.startswith("_")},
            {key: (x.shape, x.dtype, x.device) for key, x in [*part.named_parameters(recurse=False),
                                                              *part.named_buffers(recurse=False)]},
        )
        for name, part in module.named_modules()
    ]  # fmt: skip


class _Called(nn.Module):
    """A function of a module as a module."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.module, x)
