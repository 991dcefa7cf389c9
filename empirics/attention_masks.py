"""Which keys a mask of numbers hides: one that is added to logits, or is in them already.

A mask of truth values says so itself. One of numbers has -infinity at hidden keys, some dtype's lowest number, -1e9,
-1e4 or -100, and logits that explode are as low as the last ones: no limit on a number tells the two apart. In a
decoder later keys do. They show how low a hidden key is; if no row gives them any weight, all keys that low are hidden.
Where another key or a logit is nearly as low, or later keys have weight and others none, the mask is not recognised.

Shapes: T tokens, H heads; t rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from empirics.registry import Unavailable
from empirics.residual_stream import widest

NOT_RECOGNISED = (
    "its mask is not recognised: it hides keys by finite numbers, and it does not hide all later ones alone or its "
    "logits are as low; mask with is_causal, truth values or -infinity"
)
NOT_FINITE = "its logits are not finite"
ROUNDING = torch.finfo(torch.float32).eps
NO_BIAS = -1e8  # a mask's number, and no bias
NO_WEIGHT = math.log(torch.finfo(torch.float32).tiny)


def earlier_keys(rows: slice, n_keys: int, device: torch.device) -> Tensor:
    """(t, keys), whether a key is not after its row."""
    position = torch.arange(max(rows.stop, n_keys), device=device)
    return position[:n_keys] <= position[rows, None]


@torch.no_grad()
def hidden_level(values: Callable[[slice], Tensor], blocks: Sequence[slice], *, lowest: float) -> float:
    """A key whose value is this or lower is hidden.

    Args:
        values: what the mask adds to the logits of some rows, or those with it, (H, t, T).
        blocks: all rows of the sequence, some at a time.
        lowest: what is no higher is hidden, and no bias or logit.

    Raises:
        Unavailable: the mask is not recognised, or a value is not finite.
    """
    level = float(torch.stack([_later(values, rows, -math.inf).amax() for rows in blocks]).amax())
    if math.isnan(level) or level == math.inf:
        raise Unavailable(NOT_FINITE)
    if level <= lowest:
        if any(_graded(values, rows, lowest) for rows in blocks):
            raise Unavailable(NOT_RECOGNISED)
        return lowest
    low = float(torch.stack([_above(_later(values, rows, math.inf), lowest).amin() for rows in blocks]).amin())
    # Other hidden keys may be as far outside as later ones are apart; what is seen is twice as far again, or half-way.
    apart = level - low
    cut, near = min(level + apart, level / 2), min(level + 3 * apart, level / 2)
    # Later keys that spread as far as they are low may be logits that spread: nothing may lie between.
    above, near = (0.9 * level, level / 4) if level + apart > level / 2 else (cut, near)
    found: list[Tensor] = []
    for rows in blocks:
        x = values(rows)
        top = x.amax(-1, keepdim=True)
        seeing = top > cut  # other rows are of padding, and see nothing
        heavy = seeing & (x.shape[-1] * (level - top.to(widest(x.device))).exp() > ROUNDING)
        doubtful = ((x > above) & (x <= near)) | ((x > lowest) & (x < low - apart))
        weightless = (x > lowest) & (x - top < NO_WEIGHT)
        found.append(torch.stack([part.any() for part in (seeing, heavy, doubtful, weightless)]))
    seeing, heavy, doubtful, weightless = torch.stack(found).any(0).tolist()
    hides = seeing and not heavy
    if hides and not doubtful and level < 0:
        return cut
    if hides or weightless:
        raise Unavailable(NOT_RECOGNISED)
    return lowest  # later keys are seen


def _later(values: Callable[[slice], Tensor], rows: slice, other: float) -> Tensor:
    """The values at keys after the row; another one elsewhere."""
    x = values(rows)
    return x.masked_fill(earlier_keys(rows, x.shape[-1], x.device), other)


def _graded(values: Callable[[slice], Tensor], rows: slice, lowest: float) -> bool:
    """Whether keys that are not after a row have several numbers that low, as a steep ALiBi gives them."""
    x = values(rows)
    earlier = earlier_keys(rows, x.shape[-1], x.device) & (x > NO_BIAS) & (x <= lowest)
    return bool(earlier.any()) and bool(x[earlier].amin() < x[earlier].amax())


def _above(x: Tensor, lowest: float) -> Tensor:
    """The values above a lowest one; infinity elsewhere."""
    return x.masked_fill(x <= lowest, math.inf)
