"""A decoder's measured growth beside the prediction for its configuration, and whether it is what its config says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from empirics.agreement import DRAWS, Outcome, Scatter, enough, outcome
from empirics.anatomy import forward
from empirics.distributed import local
from empirics.measured import Measured, describe
from empirics.model import Transformer
from empirics.running import evaluating, first_tensor
from empirics.stability import StabilityMonitor
from empirics.stability_record import StabilityRecord
from empirics.token_ids import FEWEST, context_of, some_tokens, token_table
from theory.architecture import Architecture
from theory.arguments import require_architecture
from theory.growth import Growth, gradient_growth
from theory.hf_config import UnknownArchitecture, parse_config
from theory.initialisation import Stds

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]

CHECK_SHAPE = (4, 48)  # sequences and tokens that `check` runs
STD_LIMIT = 0.15  # relative: five standard errors of the smallest matrices of a network 32 wide are 0.11
SIGN_SEED = 0x5CA77E12  # one that nobody draws weights with, whose signs would then be of the same stream
LONGEST_EXACT = 256  # repeated tokens are predicted position by position, in a time that grows like T^3
MOST_EXACT = 4  # sequences
NEARLY_DISTINCT = 0.95  # share of a sequence's tokens that are; the rest moves the growth by less than its accuracy
# What a measured role holds of `Stds`, where it is not one of its names.
ROLES: dict[str, tuple[str, ...]] = {field: (field,) for field in Stds._fields} | {
    "query_key_value": ("query", "key", "value"),
    "key_value": ("key", "value"),
    "ffn_in_gate": ("ffn_in", "ffn_gate"),
}


def predict(architecture: Architecture, tokens: Tensor) -> Growth:
    """The growth at initialisation on (B, T) tokens, with what does not hold there among its `reasons`.

    Where tokens repeat and the sequences are short enough it is that of the very tokens, the geometric mean over
    sequences (the first few, which is what a mean of them needs); else they are taken as random.
    """
    rows = tokens.cpu().numpy().astype(np.int64)
    share = min(len(set(row)) / len(row) for row in rows.tolist())
    if share == 1 or rows.shape[1] > LONGEST_EXACT:
        growth = gradient_growth(architecture, rows.shape[1], distinct=share == 1)
        if share >= NEARLY_DISTINCT:
            return growth
        repeats = f"tokens repeat, and beyond {LONGEST_EXACT} tokens the prediction takes them as random"
        return replace(growth, in_domain=False, reasons=(*growth.reasons, repeats))
    each = [gradient_growth(architecture, row.size, tokens=row) for row in rows[:MOST_EXACT]]

    def mean(values: Iterable[Sequence[float]]) -> tuple[float, ...]:
        with np.errstate(divide="ignore"):  # a branch that writes nothing has a mean of 0
            return tuple(float(x) for x in np.exp(np.log(np.array(list(values))).mean(0)))

    gradient = mean(growth.gradient for growth in each)
    reasons = tuple(dict.fromkeys(reason for growth in each for reason in growth.reasons))
    return Growth(
        value=gradient[0],
        residual_std=mean(growth.residual_std for growth in each),
        gradient=gradient,
        branch_std=mean(growth.branch_std for growth in each),
        in_domain=not reasons,
        reasons=reasons,
    )


def within_documents(growth: Growth, model: nn.Module, tokens: Tensor) -> Growth:
    """A prediction for (B, T) tokens, outside its domain where the model's attention stops at a document's end in them.

    Its averages are over all the tokens before one.
    """
    documents = model.documents(tokens) if isinstance(model, Transformer) else None
    if documents is None or not documents.any():
        return growth
    reason = "attention stops at ends of documents in these tokens, and the prediction lets a token see all before it"
    return replace(growth, in_domain=False, reasons=(*growth.reasons, reason))


@contextmanager
def redrawn(model: nn.Module, generators: Mapping[torch.device, torch.Generator]) -> Iterator[None]:
    """Inside, the sign of every entry of a model's matrices is drawn anew; afterwards they are as before, to the bit.

    Of independent numbers that are as likely positive as negative that is a further draw of the same ensemble.

    Args:
        generators: one for each device that holds matrices.
    """
    kept = {p: p.detach().clone() for p in model.parameters() if p.ndim > 1}
    try:
        for p, before in kept.items():
            signs = torch.randint(2, before.shape, generator=generators[p.device], device=p.device, dtype=torch.int8)
            p.data.copy_(before * (2 * signs - 1))
        yield
    finally:
        for p, before in kept.items():
            p.data.copy_(before)


def scatter_of_one(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: Loss | None = None,
    on_draw: Callable[[int], object] = lambda n: None,
) -> Scatter | None:
    """How the growth of networks like this one scatters: with the sign of every entry of its matrices drawn anew.

    Args:
        on_draw: called after each draw.

    Returns:
        None where a network so drawn has no finite growth, or the matrices are spread over several processes.
    """
    parameters = list(model.parameters())
    if any(local(p) is not p for p in parameters):
        return None
    devices = {p.device for p in parameters if p.ndim > 1}
    generators = {device: torch.Generator(device).manual_seed(SIGN_SEED) for device in devices}
    monitor = StabilityMonitor(model, tokens=inputs if inputs.shape[1] >= FEWEST else None, probes="none")
    logs = list[float]()
    for n in range(DRAWS):
        with redrawn(model, generators):
            logs.append(math.log(one_pass(monitor, model, inputs, targets, loss=loss).growth or math.nan))
        on_draw(n)
    return Scatter(float(np.std(logs, ddof=1)), DRAWS, 1) if all(map(math.isfinite, logs)) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Measured growth beside the prediction for the module's configuration; prints as a table.

    Attributes:
        verdict: `agrees`, `differs` (by more than `limit`), `undecided` where it agrees but one network scatters so
            much that a wrong prediction would agree as well, or `unknown` where there is none to hold it to.
        measured: of this network at its present weights, on one batch.
        predicted: a sharp prediction, for the initialisation that the configuration names; None without one.
        limit: on |log(predicted / measured)|, from `allowed`; not a number where it was not needed.
        reasons: why the verdict is `unknown` or `undecided`, or where the module is not what its config says.
        architecture: what `describe` measured.
        record: the probed pass.
    """

    verdict: Outcome
    measured: float
    predicted: float | None
    limit: float
    reasons: tuple[str, ...]
    architecture: Measured
    record: StabilityRecord

    def __str__(self) -> str:
        predicted = "none" if self.predicted is None else f"{self.predicted:.4g} (sharp)"
        error = "" if self.predicted is None else f": {self.predicted / self.measured - 1:+.2%}"
        within = "" if self.verdict == "unknown" else f" (one network is held to {math.expm1(self.limit):.0%})"
        return "\n".join(
            [
                f"{self.verdict}: gradient growth {self.measured:.4g}, predicted {predicted}{error}{within}",
                f"measured: {self.architecture}",
                *(f"why: {reason}" for reason in self.reasons),
                *str(self.record).splitlines()[1:],
            ]
        )


def check(
    model: nn.Module,
    tokens: Tensor | None = None,
    *,
    loss: Loss | None = None,
    architecture: Architecture | None = None,
    probes: str = "none",
) -> Check:
    """Measure a decoder's gradient growth at its present weights, and hold it against the prediction.

    The module is left as it was: weights, gradients, modes and random states. What it is said to be is read from the
    `config` of a class of transformers, or the `architecture` of our own.

    Args:
        tokens: (B, T) ids; each token's target is the next one. Random, distinct ones unless given.
        loss: from (model, (B, T) tokens, (B, T) targets); the mean cross entropy of the model's logits unless given.
        architecture: what to hold it to, where the module has no `config` or `architecture` of its own.
        probes: what else to measure, as in `StabilityMonitor`; `half_layer_jacobian` for what the gradient grows by.

    Raises:
        ValueError: no residual stream is found, the loss has no gradient, or `tokens` or `architecture` is none; the
            message says why.
    """
    if architecture is not None:
        require_architecture(architecture)
    measured = describe(model, tokens)
    if tokens is None:
        n_tokens = min(CHECK_SHAPE[1], context_of(model) or CHECK_SHAPE[1])
        tokens_ = some_tokens(model, (CHECK_SHAPE[0], n_tokens + 1))
    else:
        tokens_ = tokens.long()  # as losses want targets
    inputs, targets = tokens_[:, :-1].contiguous(), tokens_[:, 1:].contiguous()  # nanoGPT views them as one axis
    monitor = StabilityMonitor(model, tokens=tokens, probes=probes)
    record = one_pass(monitor, model, inputs, targets, loss=loss)
    said, reasons = said_to_be(model) if architecture is None else (architecture, ())
    predicted = None
    if said is not None:
        growth = within_documents(predict(said, inputs), model, inputs)
        predicted = growth.value
        reasons = (*growth.reasons, *disagreements(measured, said))
    scatter = None
    if predicted is not None and not reasons:
        scatter = scatter_of_one(model, inputs, targets, loss=loss)
    verdict, limit, why = outcome(None if reasons else predicted, record.growth, scatter)
    if verdict == "undecided" and scatter is not None:
        n = enough(scatter.log_sd)
        why = (
            *why,
            f"one network does not decide; the geometric mean of about {n}, each of another seed, does",
        )
    return Check(
        verdict=verdict,
        measured=record.growth,
        predicted=predicted,
        limit=limit,
        reasons=(*reasons, *why),
        architecture=measured,
        record=record,
    )


def one_pass(
    monitor: StabilityMonitor, model: nn.Module, inputs: Tensor, targets: Tensor, *, loss: Loss | None = None
) -> StabilityRecord:
    """One probed forward and backward pass in eval mode; no parameter's gradient is kept.

    Raises:
        ValueError: the loss has no gradient.
    """
    with evaluating(model), torch.enable_grad(), monitor.probe():
        value = (loss or cross_entropy)(model, inputs, targets)
        # The way to the table passes every place; the other parameters' gradients are only needed without it.
        table = token_table(model).weight
        wanted = [table] if table.requires_grad else [p for p in model.parameters() if p.requires_grad]
        if not value.requires_grad or not wanted:
            raise ValueError(f"the loss of {type(model).__name__} has no gradient; let its parameters require one")
        torch.autograd.grad(value, wanted, allow_unused=True)
    return monitor.records[-1]


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
        failed = ""
    except (AttributeError, TypeError, IndexError, ValueError):  # it takes no targets
        loss, failed = None, ""
    except RuntimeError as error:
        loss, failed = None, f" (given targets it says: {error})"
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{type(model).__name__} gives no logits of every token{failed}; use the class with a language-model head, "
            "or give loss=(model, tokens, targets) -> mean"
        )
    return loss


def said_to_be(model: nn.Module) -> tuple[Architecture | None, tuple[str, ...]]:
    """The architecture that a module names itself; or None, and why there is no prediction for it."""
    own = getattr(model, "architecture", None)
    if isinstance(own, Architecture):
        return own, ()
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None, ("the module has no config to predict from; give check(module, architecture=...)",)
    try:
        return parse_config(config.to_dict()).architecture, ()  # type: ignore[union-attr]
    except (UnknownArchitecture, ValueError) as reason:
        return None, (str(reason),)


def disagreements(measured: Measured, architecture: Architecture, *, weights: bool = True) -> tuple[str, ...]:
    """Where what was measured is not what an architecture says; empty if it is, as far as it could be told.

    Args:
        weights: hold the matrices to their initialisation too.
    """
    a, found = architecture, list[str]()
    numbers = ("shortcut_multiplier", "residual_multiplier", "embedding_multiplier")
    for name in ("n_layers", "d_model", "block", "parallel", "embedding_norm", "tied", *numbers):
        seen, said = getattr(measured, name), getattr(a, name)
        same = math.isclose(seen, said, rel_tol=0.01) if isinstance(seen, float) else seen == said
        if seen is not None and not same:
            found.append(f"{name} is measured {_plain(seen)}, the config says {_plain(said)}")
    if weights and measured.bias_rms:
        found.append(f"a bias has root mean square {measured.bias_rms:.4g}, it starts with 0: not as initialised")
    for role, stds in initial_stds(measured, a).items() if weights else ():
        for layer, (std, said) in enumerate(zip(measured.stds[role], stds)):
            limit = STD_LIMIT
            if role == "router":  # a row an expert: with few of them five standard errors are more
                limit = max(limit, 5 / math.sqrt(2 * a.n_experts * a.d_model))
            if not said / (1 + limit) <= std <= said * (1 + limit):
                at = "" if len(stds) == 1 else f" of layer {layer}"
                found.append(f"{role}{at} has std {std:.4g}, it starts with {said:.4g}: not as initialised")
                break
    return tuple(found)


def initial_stds(measured: Measured, architecture: Architecture) -> Mapping[str, tuple[float, ...]]:
    """What each measured matrix is drawn with, by role and layer, for the roles that an architecture knows."""
    a, stds = architecture, dict[str, tuple[float, ...]]()
    for role, fields in ROLES.items():
        if role in measured.stds:
            layers = (a.layer_stds(min(layer, a.n_layers - 1)) for layer in range(len(measured.stds[role])))
            stds[role] = tuple(
                math.sqrt(sum(getattr(layer, field) ** 2 for field in fields) / len(fields)) for layer in layers
            )
    return stds


def _plain(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
