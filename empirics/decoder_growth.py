"""Gradient growth of any decoder over several seeds: ours, a class of transformers, or a checkpoint's one network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from empirics.comparison import one_pass
from empirics.measured import Measured, describe
from empirics.probes import growth_over_seeds
from empirics.running import first_tensor, removed
from empirics.stability import StabilityMonitor
from empirics.token_ids import some_tokens
from theory.records import Measurement

Tokens = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderGrowth:
    """What was measured over seeds, at the places of the residual stream.

    Attributes:
        growth, gradient, residual_std: geometric means over seeds; the gradient over that at the last place.
        places: names, as in `StabilityRecord`.
        architecture: what the first network was measured to be.
        model: the network of the first seed.
        tokens, targets: (B, T), of the first seed.
    """

    growth: Measurement
    gradient: Measurement
    residual_std: Measurement
    places: tuple[str, ...]
    architecture: Measured
    model: nn.Module
    tokens: Tensor
    targets: Tensor

    @property
    def log_sd(self) -> float | None:
        """Standard deviation of the log of the growth over seeds; None for one seed."""
        assert self.growth.log_sd is not None
        return self.growth.log_sd[0] if len(self.growth.seeds) > 1 else None


def distinct_tokens(model: nn.Module, seed: int, *, batch_size: int, seq_len: int) -> Tokens:
    """Random tokens and, independent of them, next tokens, (B, T) each; none is padding, none twice in a sequence."""
    shape = (batch_size, seq_len)
    return some_tokens(model, shape, seed=2 * seed), some_tokens(model, shape, seed=2 * seed + 1)


def measure_decoder(
    make: Callable[[int], nn.Module],
    *,
    seeds: tuple[int, ...],
    batches: Callable[[nn.Module, int], Tokens],
    device: str = "cpu",
    on_layer: Callable[[int], object] | None = None,
) -> DecoderGrowth:
    """Growth, gradient and residual profile over seeds, and which architecture it is.

    The residual stream is searched for once; the weights of later seeds are loaded into the first network.

    Args:
        make: the network of a seed; where it is the same one each time, the seeds are of the tokens alone.
        batches: tokens and next tokens of a network and a seed, on its device.
        on_layer: called after each layer's forward pass and before its backward pass, with how many times in all.

    Raises:
        ValueError: there is no residual stream, or the gradient or the stream is zero somewhere.
    """
    model = make(seeds[0]).to(device)
    architecture, monitor = describe(model), StabilityMonitor(model)
    first = batches(model, seeds[0])
    logs: list[list[float]] = []
    deviations: list[list[float]] = []
    for seed in seeds:
        if seed != seeds[0]:
            other = make(seed)
            if other is not model:
                model.load_state_dict(other.state_dict())
                del other
        with _telling(monitor.anatomy.blocks, on_layer, 2 * len(seeds) * len(monitor.anatomy.blocks)):
            record = one_pass(monitor, model, *(first if seed == seeds[0] else batches(model, seed)))
        if any(not math.isfinite(x) or x == 0 for x in (*record.place_gradient, *record.residual_std)):
            raise ValueError(
                f"{type(model).__name__}: the residual stream or its gradient is zero or not finite somewhere; "
                "use a width above 1 and weights whose embedding and head are not zero"
            )
        logs.append([math.log(value / record.place_gradient[-1]) for value in record.place_gradient])
        deviations.append([math.log(value) for value in record.residual_std])
    if len(seeds) > 1 and (first_again := make(seeds[0])) is not model:
        model.load_state_dict(first_again.state_dict())
        del first_again
    growth, gradient, residual_std = growth_over_seeds(np.array(logs), np.array(deviations), seeds)
    return DecoderGrowth(
        growth=growth,
        gradient=gradient,
        residual_std=residual_std,
        places=monitor.records[-1].places,
        architecture=architecture,
        model=model,
        tokens=first[0],
        targets=first[1],
    )


@contextmanager
def _telling(blocks: Iterable[nn.Module], on_layer: Callable[[int], object] | None, total: int) -> Iterator[None]:
    """How far the passes inside have come: one backward pass of a slow class takes minutes."""
    if on_layer is None:
        yield
        return

    def tell(_: Tensor) -> None:  # a hook's answer would take the gradient's place
        on_layer(total)

    def after(_: nn.Module, __: object, output: object) -> None:
        x = first_tensor((output,))
        if x is not None:
            tell(x)
            if x.requires_grad:
                x.register_hook(tell)

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(removed(block.register_forward_hook(after)))
        yield
