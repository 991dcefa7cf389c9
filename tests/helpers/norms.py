"""Norms of Jacobians that a monitor takes, and the explicit Jacobians that they are held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from empirics.monitor import StabilityMonitor, StabilityRecord
from empirics.subject import TOLERANCE
from helpers.decoders import Encoder, NanoGPT, Titan
from helpers.known_decoders import loss_of, some_batch
from helpers.real_classes import TINY, build

NORMS = "layer_jacobian,half_layer_jacobian,attention_branch,ffn_branch,attention_jacobian,ffn_jacobian"
HEADS = "attention_heads_jacobian"
ALL = f"{NORMS},stack_jacobian,half_layer_product"
LENGTH = 3


class Doubled(torch.autograd.Function):
    """The identity with a derivative of 2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


def probed(model: nn.Module, names: str = ALL, tokens: Tensor | None = None) -> StabilityRecord:
    """A step with a backward pass, as the model is: in training mode or not."""
    monitor = StabilityMonitor(model, probes=names)
    with monitor.probe():
        loss_of(model, some_batch() if tokens is None else tokens).backward()
    return monitor.records[-1]


def values(record: StabilityRecord) -> dict[str, tuple[float, ...]]:
    return {name: found.values for name, found in record.probes.items()}


def decoder(kind: str) -> Any:
    """In float64, with weights at which all parts matter."""
    torch.manual_seed(0)
    own: dict[str, Callable[[], nn.Module]] = {
        "nano": lambda: NanoGPT(n_layers=2),
        "titan": lambda: Titan(n_layers=2),
        "encoder": lambda: Encoder(n_layers=2),
        "encoder post": lambda: Encoder(n_layers=2, norm_first=False),
    }
    if kind in own:
        model = own[kind]()
        with torch.no_grad():  # off the size at which a norm is the identity
            next(m for m in model.modules() if isinstance(m, nn.Embedding)).weight.mul_(3)
        return model.double()
    config = TINY[kind.split()[0]]
    layers = {name: 2 for name in ("n_layer", "num_hidden_layers") if name in config}
    model = build(config | layers | ({"do_layer_norm_before": False} if kind == "opt post" else {}))
    model.set_attn_implementation("eager")
    return model.double()


def exact(function: Callable[..., Tensor], x: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(function, x.detach())
    return float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), ord=2))  # type: ignore[union-attr]


def is_estimate(value: float, truth: float) -> bool:
    """Whether it is a lower estimate of the truth, of the accuracy that is asked for; some norms are in float32."""
    return truth * (1 - TOLERANCE) <= value <= truth * (1 + 1e-6)
