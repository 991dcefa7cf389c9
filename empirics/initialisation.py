"""One network at initialisation: what theory says of it beside what is measured, as one record."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from empirics.data import TOKENS_FORMAT, Batch, Corpus, batch, load_corpus, random_tokens
from empirics.model import build, make_norm
from empirics.probes import layer_norms, measure_growth
from empirics.spectral import explicit_jacobian
from empirics.surroundings import true_float32
from theory.activations import lipschitz
from theory.architecture import Architecture
from theory.attention import attention_estimate
from theory.feedforward import ffn_branch_upper
from theory.growth import Growth, gradient_growth, growth_closed_form
from theory.records import Prediction, fingerprint, plain, slug
from theory.stack import paper_bound, rigorous_bound


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialisationSpec:
    """What decides the record's numbers.

    Attributes:
        seeds: networks that are built and measured; none for a record of predictions alone.
        tokens: `random` ids are uniform and independent; `text` predicts with the tokens' own equalities.
        jacobian_tokens: length of the sequence whose Jacobian norms are measured (first seed); 0 for none.
    """

    architecture: Architecture
    label: str
    preset: str
    seeds: tuple[int, ...]
    seq_len: int
    batch_size: int
    tokens: Literal["random", "text"]
    jacobian_tokens: int
    data: str = "sympy"
    device: str = "cpu"

    @property
    def identity(self) -> str:
        """Name of the record."""
        parts = plain(self) | ({"tokens_format": TOKENS_FORMAT} if self.tokens == "text" else {})
        return f"initialisation-{self.preset}-{slug(self.label)}-{self.tokens}-{fingerprint(parts)}"


@true_float32()
def initialisation(spec: InitialisationSpec, cache: Path | None) -> dict[str, Any]:
    """The record's body. Predictions use the configuration (and, on text, which tokens are equal), nothing measured,
    except eq. (20)'s |J^Z| and the a posteriori bounds, which say so."""
    a, corpus = spec.architecture, text_of(spec, cache)

    def batches(seed: int) -> Batch:
        return _batch(spec, corpus, seed)

    measured = measure_growth(a, seeds=spec.seeds, batches=batches, device=spec.device) if spec.seeds else ()
    growth = predicted_growth(spec, corpus)
    predictions = _predictions(a, spec, growth)
    jacobians: dict[str, Any] | None = None
    if spec.jacobian_tokens:
        tokens, _ = batches(spec.seeds[0])
        model = build(a, seed=spec.seeds[0], device=spec.device)
        sequence = torch.from_numpy(tokens[:1, : spec.jacobian_tokens]).to(spec.device)
        layers = layer_norms(model, sequence, tolerance=1e-2)
        jacobians = {"seq_len": spec.jacobian_tokens, "seed": spec.seeds[0], "lower_estimate": True, "layers": layers}
        predictions += _layer_bounds(a, layers)
    return {
        "id": spec.identity,
        "label": spec.label,
        "preset": spec.preset,
        "architecture": plain(a),
        "seq_len": spec.seq_len,
        "batch_size": spec.batch_size,
        "tokens": spec.tokens,
        "seeds": list(spec.seeds),
        "data": None if corpus is None else {"source": corpus.description, "digest": corpus.digest},
        "predictions": plain(predictions),
        "measurements": plain(list(measured)),
        "jacobians": plain(jacobians),
        "norm_jacobian": plain(_norm_jacobian(a, spec.seeds[0])) if spec.jacobian_tokens else None,
    }


def text_of(spec: InitialisationSpec, cache: Path | None) -> Corpus | None:
    """What the networks read, or None for random tokens."""
    return (
        load_corpus(spec.data, vocab_size=spec.architecture.vocab_size, cache=cache) if spec.tokens == "text" else None
    )


def predicted_growth(spec: InitialisationSpec, corpus: Corpus | None) -> Growth:
    """From the configuration, and on a text from which of its tokens are equal."""
    return gradient_growth(spec.architecture, spec.seq_len) if corpus is None else _growth_on(spec, corpus)


def _norm_jacobian(architecture: Architecture, seed: int) -> dict[str, float]:
    """The first normalisation's Jacobian at a normal token, in float64, held against the paper's form of it.

    `opnorm_sigma` is its spectral norm times the token's standard deviation; `paper_gap` is the relative
    Frobenius distance to (I - z z'/d)/sigma, `exact_gap` that to (I - 11'/d - z z'/d)/sigma.
    """
    d = architecture.d_model
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(d, generator=generator, dtype=torch.float64)
    jacobian = explicit_jacobian(make_norm(replace(architecture, eps=0.0)).double(), x).detach()
    sigma = x.std(unbiased=False)
    z = (x - x.mean()) / sigma
    paper = (torch.eye(d, dtype=torch.float64) - torch.outer(z, z) / d) / sigma
    exact = paper - torch.ones(d, d, dtype=torch.float64) / (d * sigma)
    return {
        "opnorm_sigma": float(torch.linalg.matrix_norm(jacobian, ord=2) * sigma),
        "paper_gap": float((jacobian - paper).norm() / jacobian.norm()),
        "exact_gap": float((jacobian - exact).norm() / jacobian.norm()),
    }


def _batch(spec: InitialisationSpec, corpus: Corpus | None, seed: int) -> Batch:
    if corpus is None:
        return random_tokens(spec.architecture.vocab_size, seed=seed, batch_size=spec.batch_size, seq_len=spec.seq_len)
    return batch(corpus, seed=seed, step=0, batch_size=spec.batch_size, seq_len=spec.seq_len)


def _growth_on(spec: InitialisationSpec, corpus: Corpus) -> Growth:
    """The recursion on the measured batches' own token equalities; squared gradient norms add over sequences."""
    parts: list[Growth] = []
    for seed in spec.seeds:
        tokens, targets = _batch(spec, corpus, seed)
        for row, row_targets in zip(tokens, targets, strict=True):
            parts.append(gradient_growth(spec.architecture, spec.seq_len, tokens=row, targets=row_targets))
    gradient = np.sqrt(np.mean([np.square(part.gradient) for part in parts], axis=0))
    residual = np.sqrt(np.mean([np.square(part.residual_std) for part in parts], axis=0))
    return Growth(
        value=float(gradient[0]),
        residual_std=tuple(residual.tolist()),
        gradient=tuple(gradient.tolist()),
        branch_std=parts[0].branch_std,
        in_domain=all(part.in_domain for part in parts),
        reasons=tuple(dict.fromkeys(reason for part in parts for reason in part.reasons)),
    )


def _prediction(quantity: str, kind: str, statement: str, source: str, values: Any, **domain: Any) -> Prediction:
    return Prediction(
        quantity=quantity,
        kind=kind,
        statement=statement,
        source=source,
        values=tuple(float(value) for value in np.atleast_1d(values)),
        in_domain=domain.get("in_domain", True),
        reasons=tuple(domain.get("reasons", ())),
    )


def _predictions(architecture: Architecture, spec: InitialisationSpec, growth: Growth) -> list[Prediction]:
    domain = {"in_domain": growth.in_domain, "reasons": growth.reasons}
    recursion = ("kernel recursion", "spikecheck")
    paper = paper_bound(architecture, spec.seq_len, growth)
    rigorous = rigorous_bound(architecture, spec.seq_len)
    closed = growth_closed_form(architecture, spec.seq_len)
    return [
        _prediction("gradient_growth", "sharp", *recursion, growth.value, **domain),
        _prediction("gradient_profile", "sharp", *recursion, growth.gradient, **domain),
        _prediction("residual_std", "sharp", *recursion, growth.residual_std, **domain),
        _prediction("gradient_growth", "estimate", "closed form", "spikecheck", closed),
        _prediction("ffn_branch", "estimate", "ffn-estimate", "takase2025spike, eq. (15)", paper.feedforward),
        _prediction("log10_gradient_bound", "estimate", "product", "takase2025spike", paper.log10_profile),
        _prediction("log10_gradient_bound", "upper", "product", "spikecheck", rigorous.log10_profile),
    ]


def _layer_bounds(architecture: Architecture, layers: list[dict[str, float]]) -> list[Prediction]:
    """Eq. (20) with the measured |J^Z|, and the rigorous feed-forward bound with measured weight norms.

    Both speak of a sub-layer that reads a normalised stream and adds what it gives; other layouts have neither.
    """
    if architecture.block != "pre-ln":
        return []
    # Gains start at 1; the residual multiplier is a factor on what is added.
    gains = [architecture.norm_factor_at(n) for n in range(len(layers))]
    added = architecture.residual_multiplier
    rows = [
        added
        * gain
        * attention_estimate().evaluate(
            {
                "sigma_O": architecture.layer_stds(n).output,
                "sigma_x": row["sigma_x"],
                "d": architecture.d_model,
                "J_Z": row["J_Z"],
            }
        )
        for n, (row, gain) in enumerate(zip(layers, gains, strict=True))
    ]
    found = [_prediction("attention_branch", "estimate", "attention-estimate", "takase2025spike, eq. (20)", rows)]
    if not architecture.gated:
        # Biases start at 0, so that no pre-activation is beyond |W_1| times the length of the normalised token.
        reach = [
            row["opnorm_1"] * gain * math.sqrt(architecture.d_model) for row, gain in zip(layers, gains, strict=True)
        ]
        upper = [
            added
            * ffn_branch_upper().evaluate(
                {
                    "lipschitz": lipschitz(architecture.activation, radius),
                    "opnorm_1": row["opnorm_1"],
                    "opnorm_2": row["opnorm_2"],
                    "gain": gain,
                    "s": row["s_feedforward"],
                }
            )
            for row, gain, radius in zip(layers, gains, reach, strict=True)
        ]
        found.append(_prediction("ffn_branch", "upper", "ffn-branch-upper", "spikecheck", upper))
    return found
