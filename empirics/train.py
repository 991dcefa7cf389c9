"""The training loop: a pure function of its `RunSpec`, resumable at any step.

Adam with decoupled weight decay on the matrices inside the layers and the head; gains, biases and
embeddings do not decay. Warm-up is linear, then the rate is constant or falls to a tenth by a cosine.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from empirics.checkpoints import Checkpoints, keep_model
from empirics.data import Corpus, TokenizerKind, batch, heldout_batches
from empirics.model import Transformer, build
from empirics.probes import distributions, place_statistics
from theory.architecture import Architecture
from theory.records import fingerprint, plain, slug

HELDOUT_BATCHES = 8
COSINE_FLOOR = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """Everything that decides a training run's numbers.

    Attributes:
        label: the method's name in figures.
        experiment: which question the run belongs to.
        probe_every: steps between probes of the residual stream; probes change no number of the run.
        data_bytes: how much of the text is read; the reader's own limit if None.
        micro_batch: sequences that go through the network at once, gradients being accumulated; all if None.
        clip: gradient norms above this are scaled down to it; infinite for none.
    """

    architecture: Architecture
    label: str
    experiment: str
    seed: int
    steps: int
    batch_size: int
    seq_len: int
    learning_rate: float
    warmup: int
    schedule: Literal["cosine", "constant"]
    clip: float = 1.0
    beta_1: float = 0.9
    beta_2: float = 0.95
    weight_decay: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    compile: bool = False
    micro_batch: int | None = None
    data: str = "sympy"
    data_bytes: int | None = None
    tokenizer: TokenizerKind = "bpe"
    probe_every: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "probe_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not a positive whole number; use 1 or more")
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch_size % self.micro_batch):
            raise ValueError(
                f"micro_batch={self.micro_batch} does not divide batch_size={self.batch_size}; use a divisor of it"
            )
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} is not positive; use a number above 0")
        if self.seq_len > self.architecture.context and self.architecture.positions == "learned":
            raise ValueError(
                f"seq_len={self.seq_len} exceeds the {self.architecture.context} learned positions; use fewer tokens"
            )

    @property
    def identity(self) -> str:
        """Name of the run's record: readable parts and a fingerprint of every field."""
        return f"{self.experiment}-{slug(self.label)}-lr{self.learning_rate:g}-seed{self.seed}-{fingerprint(self)}"

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(slots=True)
class Series:
    """What is written down a step; all lists are plain numbers, so that a checkpoint can hold them as JSON."""

    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    update_norm: list[float] = field(default_factory=list)
    embedding_gradient: list[float] = field(default_factory=list)
    layer_gradient: list[list[float]] = field(default_factory=list)
    layer_update: list[list[float]] = field(default_factory=list)
    probe_step: list[int] = field(default_factory=list)
    residual_std: list[list[float]] = field(default_factory=list)
    place_gradient: list[list[float]] = field(default_factory=list)
    distributions: dict[str, Any] = field(default_factory=dict)
    diverged_at: int | None = None


def environment(device: str) -> dict[str, Any]:
    """What else the numbers depend on."""
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
    }


class Stopped(KeyboardInterrupt):
    """Training was asked to stop, and did so between two steps."""


def train(
    spec: RunSpec,
    corpus: Corpus,
    *,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 100,
    keep: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train, and return the record's body.

    Args:
        checkpoints: where the state is kept; the last whole one is resumed. They stay: they may go once the record
            is written.
        keep: folder for the final weights and the architecture.
        stop: asked after every step; if true, the state is kept and training ends with `Stopped`.
        on_step: called with the step and its loss after every step.
    """
    model = build(spec.architecture, seed=spec.seed, device=spec.device)
    optimizer = _optimizer(model, spec)
    found = None if checkpoints is None else checkpoints.load(model, optimizer)
    step, series = (0, Series()) if found is None else (found[0], Series(**found[1]))
    loss_function = torch.compile(model.loss) if spec.compile else model.loss
    groups = _parameter_groups(model)
    while step < spec.steps and series.diverged_at is None:
        _train_step(spec, corpus, model, loss_function, optimizer, groups, series, step)
        if on_step is not None:
            on_step(step, series.loss[-1])
        step += 1
        stopping = stop()
        if checkpoints is not None and (stopping or (step < spec.steps and step % checkpoint_every == 0)):
            checkpoints.save(step, model, optimizer, plain(series))
        if stopping:
            saved = "" if checkpoints is None else " and saved"
            raise Stopped(f"stopped{saved} after {step} of {spec.steps} steps")
    final = _heldout_loss(spec, corpus, model) if series.diverged_at is None else math.nan
    if series.diverged_at is None:
        tokens, _ = _to_tensors(batch(corpus, seed=spec.seed, step=0, **_shape(spec)), spec.device)
        series.distributions["end"] = distributions(model, tokens[: spec.micro_batch])
    if keep is not None:
        keep_model(keep, model)
    return {
        "id": spec.identity,
        "spec": plain(spec),
        "environment": environment(spec.device),
        "data": {"source": corpus.description, "digest": corpus.digest, "vocab_size": corpus.vocab_size},
        "series": plain(series),
        "final": {"heldout_loss": plain(final), "diverged_at": series.diverged_at},
    }


def _shape(spec: RunSpec) -> dict[str, int]:
    return {"batch_size": spec.batch_size, "seq_len": spec.seq_len}


def _train_step(
    spec: RunSpec,
    corpus: Corpus,
    model: Transformer,
    loss_function: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    groups: dict[str, list[nn.Parameter]],
    series: Series,
    step: int,
) -> None:
    tokens, targets = _to_tensors(batch(corpus, seed=spec.seed, step=step, **_shape(spec)), spec.device)
    probing = step % spec.probe_every == 0
    if step == 0:
        series.distributions["start"] = distributions(model, tokens[: spec.micro_batch])
    optimizer.zero_grad(set_to_none=True)
    value, residual_std, gradient = _accumulate(spec, model, None if probing else loss_function, tokens, targets)
    series.loss.append(value)
    if not math.isfinite(value):
        series.diverged_at = step
        return
    if probing:
        series.probe_step.append(step)
        series.residual_std.append(residual_std)
        series.place_gradient.append(gradient)

    parameters = [parameter for group in groups.values() for parameter in group]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert len(gradients) == len(parameters)  # every parameter takes part in the loss
    norms = _group_norms(gradients, groups)
    total = math.sqrt(sum(norm * norm for norm in norms.values()))
    series.gradient_norm.append(total)
    series.embedding_gradient.append(norms["embedding"])
    series.layer_gradient.append([norm for name, norm in norms.items() if name.startswith("layer")])
    if not math.isfinite(total):
        series.diverged_at = step
        return
    if total > spec.clip:
        for one in gradients:
            one.mul_(spec.clip / total)
    for group in optimizer.param_groups:
        group["lr"] = spec.rate(step)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    changes = [parameter.detach() - old for parameter, old in zip(parameters, before, strict=True)]
    updates = _group_norms(changes, groups)
    series.learning_rate.append(spec.rate(step))
    series.update_norm.append(math.sqrt(sum(norm * norm for norm in updates.values())))
    series.layer_update.append([norm for name, norm in updates.items() if name.startswith("layer")])


def _accumulate(
    spec: RunSpec, model: Transformer, loss_function: Callable[..., Tensor] | None, tokens: Tensor, targets: Tensor
) -> tuple[float, list[float], list[float]]:
    """Add the batch's gradient; its loss, and with `loss_function` None the residual stream's statistics.

    A probed step runs the same arithmetic uncompiled, since a compiled graph has no places to keep.
    """
    parts = tokens.shape[0] // (spec.micro_batch or tokens.shape[0])
    value, deviations, gradients = 0.0, [], []
    for part_tokens, part_targets in zip(tokens.chunk(parts), targets.chunk(parts), strict=True):
        places: list[Tensor] | None = [] if loss_function is None else None
        with torch.autocast(spec.device.split(":")[0], torch.bfloat16, enabled=spec.precision == "bfloat16"):
            if loss_function is None:
                loss = model.loss(part_tokens, part_targets, places)
            else:
                loss = loss_function(part_tokens, part_targets)
        loss = loss / parts if parts > 1 else loss
        value += float(loss.detach())
        if not math.isfinite(value):
            break
        loss.backward()
        if places is not None:
            deviation, gradient = place_statistics(places)
            deviations.append(deviation)
            gradients.append(gradient)
    if not deviations:
        return value, [], []
    # Sequences are independent before the loss: squared norms add over micro-batches, variances average.
    std = np.sqrt(np.mean(np.square(deviations), axis=0)) if parts > 1 else np.array(deviations[0])
    norm = np.sqrt(np.sum(np.square(gradients), axis=0)) if parts > 1 else np.array(gradients[0])
    return value, std.tolist(), norm.tolist()


def _optimizer(model: Transformer, spec: RunSpec) -> torch.optim.Optimizer:
    decays = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith(("layers", "head"))]
    rest = [p for name, p in model.named_parameters() if not (p.ndim == 2 and name.startswith(("layers", "head")))]
    groups = [{"params": decays, "weight_decay": spec.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(spec.beta_1, spec.beta_2), fused=True)


def _parameter_groups(model: Transformer) -> dict[str, list[nn.Parameter]]:
    """Parameters by where they sit: embedding, layer 0..N-1, head."""
    layers = {f"layer {n}": list(layer.parameters()) for n, layer in enumerate(model.layers)}
    owned = {id(parameter) for group in layers.values() for parameter in group}
    embedding = [p for name, p in model.named_parameters() if name.startswith(("tokens", "positions", "embedding"))]
    owned |= {id(parameter) for parameter in embedding}
    head = [parameter for parameter in model.parameters() if id(parameter) not in owned]
    return {"embedding": embedding, **layers, "head": head}


def _group_norms(tensors: list[Tensor], groups: dict[str, list[nn.Parameter]]) -> dict[str, float]:
    squares = torch.stack([tensor.norm() for tensor in tensors]).double().square().tolist()
    values: Iterator[float] = iter(squares)
    return {name: math.sqrt(sum(next(values) for _ in group)) for name, group in groups.items()}


def _to_tensors(pair: tuple[Any, Any], device: str) -> tuple[Tensor, Tensor]:
    tokens, targets = pair
    return torch.from_numpy(tokens).to(device), torch.from_numpy(targets).to(device)


@torch.no_grad()
def _heldout_loss(spec: RunSpec, corpus: Corpus, model: Transformer) -> float:
    size = spec.micro_batch or spec.batch_size
    batches = heldout_batches(corpus, count=HELDOUT_BATCHES, batch_size=size, seq_len=spec.seq_len)
    losses = [float(model.loss(*_to_tensors(pair, spec.device))) for pair in batches]
    return float(np.mean(losses))
