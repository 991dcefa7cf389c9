"""What is kept of the residual stream at one place and of its gradient: sums over tokens, in the widest floats.

Every measurement of the stream is made of these: of our own networks at initialisation and in training, and of anyone's
decoder.

Shapes: B batch, T tokens, D d_model; leading axes may be any.
"""

from __future__ import annotations

import torch
from torch import Tensor


def n_tokens(x_BTD: Tensor) -> int:
    """Of how many tokens it is."""
    return x_BTD.shape[:-1].numel()


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none, as MPS."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def variance_sum(x_BTD: Tensor) -> Tensor:
    """Sum over tokens of the variance of a token's D entries, mean removed: one number, on the stream's device."""
    centred_BTD = x_BTD.detach().to(widest(x_BTD.device), copy=True)
    centred_BTD -= centred_BTD.mean(-1, keepdim=True)  # in its memory: `var` takes eight times as long on a CPU
    return torch.linalg.vector_norm(centred_BTD).square() / x_BTD.shape[-1]


def length_sums(gradient_BTD: Tensor) -> Tensor:
    """Sums over tokens of the squared norm and of the norm of a token's gradient, and the largest norm: (3,)."""
    lengths = torch.linalg.vector_norm(gradient_BTD.detach(), dim=-1, dtype=widest(gradient_BTD.device))
    return torch.stack([lengths.square().sum(), lengths.sum(), lengths.max()])
