"""The probes on anyone's decoder: what its residual stream and its gradient do while its owner trains it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from empirics.anatomy import Place, anatomy, forward, some_tokens
from empirics.measured import Measured, describe
from empirics.running import evaluating, first_tensor
from theory.architecture import Architecture
from theory.growth import gradient_growth
from theory.hf_config import UnknownArchitecture, parse_config
from theory.initialisation import Stds
from theory.records import Measurement

__all__ = ["Check", "Measured", "StabilityMonitor", "StabilityRecord", "check", "describe"]

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]

CHECK_SHAPE = (4, 48)  # sequences and tokens that `check` runs
CHECK_LIMIT = 0.25  # relative: one network's growth scatters, by some 8 % at d 256 and more below
STD_LIMIT = 0.15  # relative: five standard errors of the smallest matrices of a network 32 wide are 0.11
LONGEST_EXACT = 256  # repeated tokens are predicted position by position, in a time that grows like T^3
# What a measured role holds of `Stds`, where it is not one of its names.
ROLES: dict[str, tuple[str, ...]] = {field: (field,) for field in Stds._fields} | {
    "query_key_value": ("query", "key", "value"),
    "key_value": ("key", "value"),
    "ffn_in_gate": ("ffn_in", "ffn_gate"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StabilityRecord:
    """One probed step. Every tuple runs over the places of the residual stream.

    Attributes:
        step: the step's number.
        places: `embedding`, then `layer N attention` (serial blocks) and `layer N`.
        residual_std: over the entries of a token, its square averaged over tokens.
        gradient: norm of the loss gradient over all tokens of the step; not a number where none arrives.
        token_gradient: mean over tokens of the norm of the loss gradient at that token.
        n_tokens: tokens of the step, padding included.
    """

    step: int
    places: tuple[str, ...]
    residual_std: tuple[float, ...]
    gradient: tuple[float, ...]
    token_gradient: tuple[float, ...]
    n_tokens: int

    @property
    def growth(self) -> float:
        """Gradient norm at the first place over that at the last."""
        return self.gradient[0] / self.gradient[-1] if self.gradient[-1] else math.nan

    def measurements(self) -> tuple[Measurement, Measurement, Measurement]:
        """Gradient growth, gradient profile and residual profile, as `empirics.probes.measure_growth` gives them."""
        last = self.gradient[-1] or math.nan
        values = {
            "gradient_growth": (self.growth,),
            "gradient_profile": tuple(value / last for value in self.gradient),
            "residual_std": self.residual_std,
        }
        growth, gradient, residual = (
            Measurement(quantity=name, values=it, seeds=(), log_sd=None, lower_estimate=False)
            for name, it in values.items()
        )
        return growth, gradient, residual


class _Sums:
    """What one place has seen in a step, over its micro-batches; kept on the device until the step ends."""

    def __init__(self) -> None:
        self.variance: list[Tensor] = []
        self.square: list[Tensor] = []
        self.token_norms: list[Tensor] = []
        self.n_tokens: list[int] = []
        self.unhooked = 0  # forward passes whose tensor needs no gradient yet

    def see(self, x: Tensor) -> None:
        recomputed = torch._C._current_graph_task_id() != -1  # activation checkpointing runs it again
        if not recomputed:
            self.variance.append(x.detach().double().var(-1, unbiased=False).sum())
            self.n_tokens.append(x.numel() // x.shape[-1])
            self.unhooked += not x.requires_grad
        if x.requires_grad and (not recomputed or self.unhooked):
            self.unhooked -= recomputed
            x.register_hook(self.receive)

    def receive(self, gradient: Tensor) -> None:
        squares = gradient.detach().double().square().sum(-1)
        self.square.append(squares.sum())
        self.token_norms.append(squares.sqrt().sum())

    def statistics(self) -> tuple[float, float, float]:
        """Standard deviation, gradient norm and mean gradient norm of a token."""
        tokens = sum(self.n_tokens)
        deviation = math.sqrt(float(sum(map(float, self.variance))) / tokens)
        if not self.square:
            return deviation, math.nan, math.nan
        return deviation, math.sqrt(sum(map(float, self.square))), sum(map(float, self.token_norms)) / tokens


def require_steps(every: int) -> None:
    """Refuse an interval that is none.

    Raises:
        ValueError: it is below 1.
    """
    if every < 1:
        raise ValueError(f"every={every} is not a positive number of steps; use 1 to probe each step")


class StabilityMonitor:
    """Measures a decoder's residual stream and gradient in the steps that it is asked to, and changes nothing.

    In a step that is not probed the model carries no hook. A probed step may have several micro-batches; they count
    as one batch. A compiled model cannot be hooked: probe the module that was compiled.

    Args:
        model: any decoder with a list of equal blocks that add to a residual stream.
        every: `step()` probes each `every`-th step, from the first on.
        tokens: (B, T) ids to find the stream with; random ones unless given.

    Raises:
        ValueError: no residual stream is found; the message says why.
    """

    def __init__(self, model: nn.Module, *, every: int = 1, tokens: Tensor | None = None) -> None:
        require_steps(every)
        if hasattr(model, "_orig_mod"):
            raise ValueError("the model is compiled, and hooks on it are not called; give model._orig_mod")
        self.anatomy, _ = anatomy(model, tokens)
        self.every = every
        self.records: list[StabilityRecord] = []
        self._steps = 0
        self._sums: list[_Sums] = []
        self._hooks: list[Any] = []

    @property
    def active(self) -> bool:
        """Whether a step is being probed: only then does the model carry hooks."""
        return bool(self._hooks)

    def start(self) -> None:
        """Begin a probed step."""
        self.detach()
        self._sums = [_Sums() for _ in self.anatomy.places]
        self._hooks = [hook(place, sums) for place, sums in zip(self.anatomy.places, self._sums, strict=True)]

    def finish(self, step: int | None = None) -> StabilityRecord | None:
        """End a probed step: its record, also kept in `records`; None if no forward pass was seen."""
        self.detach()
        sums, self._sums = self._sums, []
        if not sums or not all(it.n_tokens for it in sums):
            return None
        deviation, gradient, token_gradient = zip(*(it.statistics() for it in sums))
        record = StabilityRecord(
            step=len(self.records) if step is None else step,
            places=tuple(place.name for place in self.anatomy.places),
            residual_std=deviation,
            gradient=gradient,
            token_gradient=token_gradient,
            n_tokens=sum(sums[0].n_tokens),
        )
        self.records.append(record)
        return record

    def detach(self) -> None:
        """Remove every hook; the records stay."""
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    @contextmanager
    def probe(self, step: int | None = None) -> Iterator[None]:
        """Probe the forward and backward passes inside."""
        self.start()
        try:
            yield
            self.finish(step)
        finally:
            self.detach()

    @contextmanager
    def step(self) -> Iterator[None]:
        """One training step, probed if its turn has come."""
        step, self._steps = self._steps, self._steps + 1
        if step % self.every:
            yield
            return
        with self.probe(step):
            yield

    def __enter__(self) -> StabilityMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def hook(place: Place, sums: _Sums) -> Any:
    """A hook that shows a place's tensor to `sums`."""
    if place.side == "input":

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _see(sums, (*args, *kwargs.values()))

        return place.module.register_forward_pre_hook(before, with_kwargs=True)
    return place.module.register_forward_hook(lambda _, __, output: _see(sums, (output,)))


def _see(sums: _Sums, values: tuple[Any, ...]) -> None:
    x = first_tensor(values)
    if x is not None:
        sums.see(x)


# --- measured beside predicted --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Measured growth beside the prediction for the architecture in the module's config; prints as a table.

    Attributes:
        verdict: `agrees`, `differs` (by more than `limit`), or `unknown` where there is no prediction to hold it to.
        measured: of this network at its present weights, on one batch.
        predicted: a sharp prediction, for the initialisation of the config's class; None without one.
        reasons: why the verdict is `unknown`, or where the module is not what its config says.
        architecture: what `describe` measured.
        record: the probed pass.
    """

    verdict: Literal["agrees", "differs", "unknown"]
    measured: float
    predicted: float | None
    limit: float
    reasons: tuple[str, ...]
    architecture: Measured
    record: StabilityRecord

    def __str__(self) -> str:
        a, r = self.architecture, self.record
        layout = f"{a.block or 'of unknown layout'}, {'parallel' if a.parallel else 'serial'}"
        predicted = "none" if self.predicted is None else f"{self.predicted:.4g} (sharp)"
        error = "" if self.predicted is None else f": {self.predicted / self.measured - 1:+.2%}"
        return "\n".join(
            [
                f"{self.verdict}: gradient growth {self.measured:.4g}, predicted {predicted}{error}",
                f"measured: d_model {a.d_model}, {a.n_layers} layers, {layout}, embedding multiplier "
                f"{_number(a.embedding_multiplier)}, residual multiplier {_number(a.residual_multiplier)}",
                *(f"why: {reason}" for reason in self.reasons),
                f"{'place':<20}{'residual std':>14}{'gradient':>12}",
                *(
                    f"{name:<20}{deviation:>14.4g}{gradient:>12.4g}"
                    for name, deviation, gradient in zip(r.places, r.residual_std, r.gradient)
                ),
            ]
        )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def check(model: nn.Module, tokens: Tensor | None = None, *, loss: Loss | None = None) -> Check:
    """Measure a decoder's gradient growth at its present weights, and hold it against the prediction.

    The module is left as it was: weights, gradients, modes and random states.

    Args:
        tokens: (B, T) ids; each token's target is the next one. Random, distinct ones unless given.
        loss: from (model, (B, T) tokens, (B, T) targets); the mean cross entropy of the model's logits unless given.

    Raises:
        ValueError: no residual stream is found, or the loss has no gradient; the message says why.
    """
    architecture = describe(model, tokens)
    if tokens is None:
        context = getattr(getattr(model, "config", None), "max_position_embeddings", None) or CHECK_SHAPE[1]
        drawn = some_tokens(model, (CHECK_SHAPE[0], min(CHECK_SHAPE[1], int(context)) + 1))
    else:
        drawn = tokens
    inputs, targets = drawn[:, :-1], drawn[:, 1:]
    monitor = StabilityMonitor(model, tokens=tokens)
    with evaluating(model), torch.enable_grad(), monitor.probe():
        value = (loss or cross_entropy)(model, inputs, targets)
        trained = [p for p in model.parameters() if p.requires_grad]
        if not value.requires_grad or not trained:
            raise ValueError(f"the loss of {type(model).__name__} has no gradient; let its parameters require one")
        torch.autograd.grad(value, trained, allow_unused=True)
    record = monitor.records[-1]
    predicted, reasons = _predict(model, architecture, inputs)
    if not math.isfinite(record.growth) or not record.growth:
        predicted, reasons = None, (*reasons, "the measured growth is zero or not finite")
    verdict = "unknown"
    if predicted is not None and not reasons:
        verdict = "agrees" if abs(math.log(predicted / record.growth)) <= math.log1p(CHECK_LIMIT) else "differs"
    return Check(
        verdict=verdict,
        measured=record.growth,
        predicted=predicted,
        limit=CHECK_LIMIT,
        reasons=reasons,
        architecture=architecture,
        record=record,
    )


def cross_entropy(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of a decoder's logits in nats; or the loss that it returns beside them, given targets.

    Raises:
        ValueError: it answers neither; the message names the remedy.
    """
    answer = forward(model, tokens)
    logits = first_tensor((getattr(answer, "logits", answer),))
    if logits is not None and logits.shape[:2] == tokens.shape:
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    try:  # nanoGPT's gives the last token's logits unless it has targets
        loss = model(tokens, targets)[1]
    except (TypeError, IndexError, RuntimeError, ValueError):
        loss = None
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{type(model).__name__} gives no logits of every token; give loss=(model, tokens, targets) -> mean"
        )
    return loss


def _predict(model: nn.Module, measured: Measured, tokens: Tensor) -> tuple[float | None, tuple[str, ...]]:
    """The prediction for the module's config, and why it does not hold for this module."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None, ("the module has no config to predict from",)
    try:
        architecture = parse_config(config.to_dict()).architecture  # type: ignore[union-attr]
    except (UnknownArchitecture, ValueError) as reason:
        return None, (str(reason),)
    distinct = all(len(set(row)) == len(row) for row in tokens.tolist())
    ids = None if distinct or tokens.shape[1] > LONGEST_EXACT else tokens[0].cpu().numpy()
    growth = gradient_growth(architecture, tokens.shape[1], tokens=ids)
    return growth.value, (*growth.reasons, *disagreements(measured, architecture))


def disagreements(measured: Measured, architecture: Architecture) -> tuple[str, ...]:
    """Where what was measured is not what an architecture says; empty if it is, as far as it could be told."""
    a, found = architecture, list[str]()
    numbers = ("shortcut_multiplier", "residual_multiplier", "embedding_multiplier")
    for name in ("n_layers", "d_model", "block", "parallel", "embedding_norm", "tied", *numbers):
        seen, said = getattr(measured, name), getattr(a, name)
        same = math.isclose(seen, said, rel_tol=0.01) if isinstance(seen, float) else seen == said
        if seen is not None and not same:
            found.append(f"{name} is measured {_plain(seen)}, the config says {_plain(said)}")
    for role, fields in ROLES.items():
        for layer, std in enumerate(measured.stds.get(role, ())):
            stds = a.layer_stds(min(layer, a.n_layers - 1))
            said = math.sqrt(sum(getattr(stds, field) ** 2 for field in fields) / len(fields))
            if not said / (1 + STD_LIMIT) <= std <= said * (1 + STD_LIMIT):
                at = "" if len(measured.stds[role]) == 1 else f" of layer {layer}"
                found.append(f"{role}{at} has std {std:.4g}, it starts with {said:.4g}: not as initialised")
                break
    return tuple(found)


def _plain(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
