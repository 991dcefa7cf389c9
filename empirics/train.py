"""The training loop: a pure function of its `RunSpec`, resumable at any step.

What decays is said in `optimization`, the schedules in `run_spec`, and what several processes share in `distributed`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from empirics.checkpoints import Checkpoints, keep_model
from empirics.data import Corpus, batch, heldout_batches
from empirics.distributed import ALONE, Ranks
from empirics.model import Transformer, build, cross_entropy
from empirics.optimization import Stepper, adamw, decay_table, total_norm
from empirics.probes import distributions
from empirics.run_spec import RunSpec, require_even
from empirics.subject import Subject
from empirics.surroundings import environment, true_float32
from empirics.training_probes import LeftOut, Probed, TrainingProbes
from theory.records import plain
from theory.words import counted

HELDOUT_BATCHES = 8

Objective = Callable[..., tuple[Tensor, Tensor]]
OnStep = Callable[[int, Mapping[str, float]], None]


@dataclass(slots=True)
class Series:
    """What is written down a step; all lists are plain numbers, so that a checkpoint can hold them as JSON.

    Attributes:
        loss: cross entropy in nats a token; the z-loss is not in it.
        z_loss: what is added to the loss; empty without.
        gradient_norm, clipped_gradient_norm: of the whole gradient, before and after clipping.
        residual_std, place_gradient: at the steps `probe_step`; other probes are in `probes`, and what could not be
            taken in `left_out`, as in `training_probes`.
    """

    loss: list[float] = field(default_factory=list)
    z_loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    clipped_gradient_norm: list[float] = field(default_factory=list)
    update_norm: list[float] = field(default_factory=list)
    embedding_gradient: list[float] = field(default_factory=list)
    layer_gradient: list[list[float]] = field(default_factory=list)
    layer_update: list[list[float]] = field(default_factory=list)
    probe_step: list[int] = field(default_factory=list)
    residual_std: list[list[float]] = field(default_factory=list)
    place_gradient: list[list[float]] = field(default_factory=list)
    distributions: dict[str, Any] = field(default_factory=dict)
    probes: Probed = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=dict)
    diverged_at: int | None = None

    def latest(self) -> dict[str, float]:
        """The last step's numbers, by name; where it diverged, those that there are."""
        names = ("loss", "z_loss", "learning_rate", "gradient_norm", "clipped_gradient_norm", "update_norm")
        return {name: getattr(self, name)[-1] for name in names if len(getattr(self, name)) == len(self.loss)}


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
    on_step: OnStep = lambda step, values: None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train, and return the record's body.

    Args:
        checkpoints: where the state is kept; the last whole one is resumed. They stay: they may go once the record
            is written.
        keep: folder for the final weights, the architecture, the tokenizer and the specification.
        stop: asked after every step; if true, the state is kept and training ends with `Stopped`.
        on_step: called after every step with its number and `Series.latest`.
        ranks: the processes that train together; each calls this with the same arguments, and gets the same record.

    Raises:
        ValueError: a deterministic run needs an operation that has no deterministic form; the checkpoint is of
            another text; the batch does not go evenly over the ranks; or it is not known where documents end.
    """
    check_shares(spec, ranks)
    with _deterministic(spec.deterministic), true_float32():
        surroundings = environment(spec.device) | ({"ranks": ranks.size} if ranks.size > 1 else {})
        model = _build(spec, ranks)
        model.end_of_document = _end_of_document(corpus) if spec.mask_documents else None
        attention = _attend(spec, model)
        optimizer = adamw(model, spec)
        found = None if checkpoints is None else checkpoints.load(model, optimizer)
        if found is not None and found[1].pop("data", corpus.digest) != corpus.digest:
            raise ValueError(
                f"{spec.data} has other tokens than the checkpoints were trained on; bring the text back, or use "
                "another --out to begin anew"
            )
        step, series = (0, Series()) if found is None else (found[0], Series(**found[1]))

        def plain_objective(tokens: Tensor, targets: Tensor, places: list[Tensor] | None = None) -> Any:
            return objective(model, spec.z_loss, tokens, targets, places)

        # Several ranks compile layer by layer: what gathers a layer stays outside of the graph.
        fast = torch.compile(plain_objective) if spec.compile and ranks.size == 1 else plain_objective
        stepper = Stepper(model, optimizer, ranks)
        probes = TrainingProbes(spec.probes, spec.probe_every, spec.micro_batch, ranks, left_out=series.left_out)
        while step < spec.steps and series.diverged_at is None:
            # A probed step runs the same arithmetic uncompiled, since a compiled graph has no places to keep.
            loss_function = plain_objective if probes.due(step) else fast
            with _uncompiled(spec.compile and probes.due(step)):
                _train_step(spec, corpus, model, loss_function, stepper, series, step, probes, ranks)
            on_step(step, series.latest())
            step += 1
            stopping = ranks.any(stop())
            if checkpoints is not None and (stopping or (step < spec.steps and step % checkpoint_every == 0)):
                checkpoints.save(step, model, optimizer, plain(series) | {"data": corpus.digest})
            if stopping:
                saved = "" if checkpoints is None else " and saved"
                raise Stopped(f"stopped{saved} after {step} of {counted(spec.steps, 'step')}")
        final = math.nan
        if series.diverged_at is None:
            evaluated = _evaluated(spec, model, ranks)
            final = _heldout_loss(spec, corpus, evaluated, ranks)
            if probes.on:
                first_batch = _to_tensors(batch(corpus, seed=spec.seed, step=0, **_shape(spec)), spec.device)
                series.distributions["end"] = distributions(evaluated, first_batch[0][: spec.micro_batch], ranks)
                probes.after_all(series.probes, step, model, lambda: first_batch)
        if keep is not None:
            keep_model(keep, model, tokenizer=corpus.tokenizer, run=plain(spec), ranks=ranks)
    return {
        "id": spec.identity,
        "spec": plain(spec),
        "environment": surroundings,
        "data": {"source": corpus.description, "digest": corpus.digest, "vocab_size": corpus.vocab_size},
        "attention": attention,
        "weight_decay": decay_table(model, spec),
        "series": plain(series),
        "final": {"heldout_loss": plain(final), "diverged_at": series.diverged_at},
    }


def objective(
    model: Transformer, z_loss: float, tokens_BT: Tensor, targets_BT: Tensor, places: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """What is minimised, and the cross entropy in it, in nats a token.

    With Z the normalisation of a token's softmax, z_loss * (log Z)^2 is added, averaged over tokens: logits that drift
    together leave the cross entropy as it is.

    Source: Chowdhery et al. 2022 (PaLM), section 5.
    """
    if not z_loss:
        loss = model.loss(tokens_BT, targets_BT, places)
        return loss, loss
    logits = model(tokens_BT, places)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = cross_entropy(logits, targets_BT)
    return loss + z_loss * logits.logsumexp(-1).square().mean(), loss


def _shape(spec: RunSpec) -> dict[str, Any]:
    return {"batch_size": spec.batch_size, "seq_len": spec.seq_len, "order": spec.order}


def _train_step(
    spec: RunSpec,
    corpus: Corpus,
    model: Transformer,
    loss_function: Objective,
    stepper: Stepper,
    series: Series,
    step: int,
    probes: TrainingProbes,
    ranks: Ranks,
) -> None:
    pair = batch(corpus, seed=spec.seed, step=step, **_shape(spec))
    whole_batch = partial(_to_tensors, pair, spec.device)
    if step == 0 and probes.on:
        evaluated = _evaluated(spec, model, ranks)
        series.distributions["start"] = distributions(evaluated, whole_batch()[0][: spec.micro_batch], ranks)
    probes.before(series.probes, step, model, whole_batch)
    tokens, targets = _to_tensors(pair, spec.device, ranks)
    watched = probes.watch(step, model, tokens, targets)
    stepper.optimizer.zero_grad(set_to_none=True)
    value, entropy = _accumulate(spec, loss_function, tokens, targets, ranks, watched)
    series.loss.append(entropy)
    if spec.z_loss:
        series.z_loss.append(value - entropy)
    if not math.isfinite(value):
        series.diverged_at = step
        return
    if watched is not None:
        if probes.places_due(step):
            series.probe_step.append(step)
            series.residual_std.append(watched.place_statistics["residual_std"])
            series.place_gradient.append(watched.place_statistics["place_gradient"])
        probes.passed(series.probes, step, watched)

    norms = stepper.gradient_norms()
    total = total_norm(norms)
    series.gradient_norm.append(total)
    series.embedding_gradient.append(norms["embedding"])
    series.layer_gradient.append([norm for name, norm in norms.items() if name.startswith("layer")])
    if not math.isfinite(total):
        series.diverged_at = step
        return
    scale = spec.clip / total if total > spec.clip else 1.0
    series.clipped_gradient_norm.append(min(total, spec.clip))
    series.learning_rate.append(spec.rate(step))
    updates = stepper.step(rate=spec.rate(step), scale=scale)
    series.update_norm.append(total_norm(updates))
    series.layer_update.append([norm for name, norm in updates.items() if name.startswith("layer")])
    if watched is not None:
        probes.stepped(series.probes, step, watched)


def _accumulate(
    spec: RunSpec,
    loss_function: Objective,
    tokens: Tensor,
    targets: Tensor,
    ranks: Ranks,
    watched: Subject | None,
) -> tuple[float, float]:
    """Add the gradient of this rank's share of the batch; the whole batch's loss, and the cross entropy in it. What is
    watched is shown the residual stream."""
    here = tokens.shape[0] // (spec.micro_batch or tokens.shape[0])
    parts = here * ranks.size
    value, entropy = 0.0, 0.0
    for part_tokens, part_targets in zip(tokens.chunk(here), targets.chunk(here), strict=True):
        places: list[Tensor] = []
        with torch.autocast(spec.device.split(":")[0], torch.bfloat16, enabled=spec.precision == "bfloat16"):
            loss, part_entropy = loss_function(part_tokens, part_targets, *([] if watched is None else [places]))
        if parts > 1:
            loss, part_entropy = loss / parts, part_entropy / parts
        part = ranks.totals([float(loss.detach()), float(part_entropy.detach())])
        value += part[0]
        entropy += part[1]
        if not math.isfinite(value):
            break
        loss.backward()
        if watched is not None:
            watched.see(places)
    return value, entropy


def _to_tensors(pair: tuple[Any, Any], device: str, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
    """A batch, or this rank's share of it, on the device."""
    tokens, targets = map(ranks.share, pair)
    return torch.from_numpy(tokens).to(device), torch.from_numpy(targets).to(device)


@torch.no_grad()
def _heldout_loss(spec: RunSpec, corpus: Corpus, model: Transformer, ranks: Ranks) -> float:
    size = spec.micro_batch or spec.batch_size
    batches = heldout_batches(corpus, count=HELDOUT_BATCHES, batch_size=size, seq_len=spec.seq_len)
    losses: list[float] = []
    for pair in batches:
        tokens, targets = _to_tensors(pair, spec.device, ranks)
        losses.append(float(model.loss(tokens, targets)) / ranks.size)
    return float(np.mean(ranks.totals(losses)))


def _build(spec: RunSpec, ranks: Ranks) -> Transformer:
    """The model at step 0: whole on one rank, in shards on several."""
    dtype = torch.float64 if spec.precision == "float64" else torch.float32
    if ranks.size == 1:
        return build(spec.architecture, seed=spec.seed, device=spec.device, dtype=dtype)
    from empirics.sharding import build_sharded  # half a second, for several ranks

    return build_sharded(
        spec.architecture, ranks, seed=spec.seed, device=spec.device, dtype=dtype,
        halved=spec.precision == "bfloat16", compiled=spec.compile,
    )  # fmt: skip


def _evaluated(spec: RunSpec, model: Transformer, ranks: Ranks) -> Transformer:
    """The model as it is evaluated: nothing rounded, nothing compiled."""
    if ranks.size == 1 or (spec.precision != "bfloat16" and not spec.compile):
        return model
    from empirics.sharding import twin

    evaluated = twin(model, ranks, device=spec.device)
    _attend(spec, evaluated)
    return evaluated


def _attend(spec: RunSpec, model: Transformer) -> str:
    """Have the model attend as the run says, and say how that is."""
    kind, products = torch.device(spec.device).type, getattr(torch, spec.precision)
    return model.attend(spec.attention, device=kind, dtype=products, n_tokens=spec.seq_len)


def _end_of_document(corpus: Corpus) -> int:
    if corpus.tokenizer is None:
        raise ValueError(
            f"{corpus.description} does not say which token ends a document; leave out mask_documents, or bring its "
            "tokenizer"
        )
    return corpus.tokenizer.end_id


def check_shares(spec: RunSpec, ranks: Ranks) -> None:
    """Refuse a batch that does not go evenly over the ranks.

    Raises:
        ValueError: it does not.
    """
    require_even(spec.batch_size, ranks.size, spec.micro_batch, "rank")


def _uncompiled(wanted: bool) -> AbstractContextManager[Any]:
    """If wanted, compiled layers run as they are written."""
    return torch.compiler.set_stance("force_eager") if wanted else nullcontext()


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """If wanted, torch's deterministic algorithms alone; afterwards as before."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise ValueError(f"{str(error).split('.')[0]}; run without --deterministic") from None
    finally:
        torch.set_deterministic_debug_mode(before)
