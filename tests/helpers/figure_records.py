"""Records of the documented shape with numbers made up, for figures to be drawn from."""

from __future__ import annotations

from typing import Any

import numpy as np

from theory.architecture import METHODS, method, preset
from theory.records import plain

METHOD_NAMES = tuple(METHODS)
LAYERS = preset("tiny").n_layers


def distribution(rng: np.random.Generator) -> dict[str, Any]:
    return {"mean": 0.0, "std": 1.0, "normal_distance": float(rng.uniform(0.004, 0.1)), "entries": 4096}


def distributions(rng: np.random.Generator) -> dict[str, Any]:
    names = ("tokens.weight", "layers.0.attention.query.weight", "layers.11.feedforward.leave.weight", "head.weight")
    return {
        "places": [distribution(rng) for _ in range(2 * LAYERS + 1)],
        "weights": {name: distribution(rng) for name in names},
    }


def while_training(rng: np.random.Generator, steps: int) -> dict[str, Any]:
    """What the default probes leave at every twentieth step; nothing if there was none."""
    probed = list(range(0, steps, 20))
    inside = [f"layers.{n}.attention.query.weight" for n in range(LAYERS)]
    labels = {
        "attention_entropy_relative": [f"layer {n}" for n in range(LAYERS)],
        "gradient_growth": ["network"],
        "update_ratio": ["tokens.weight", *inside, "head.weight"],
    }
    return {
        name: {"labels": found, "steps": probed, "values": rng.uniform(0.1, 1, (len(probed), len(found))).tolist()}
        for name, found in labels.items()
        if probed
    }


def training(
    label: str, *, seed: int = 0, rate: float = 0.01, experiment: str = "sweep", lost: int | None = None, **spec: Any
) -> dict[str, Any]:
    """A training record; `lost` is the step at which its loss stopped being finite."""
    settings: dict[str, Any] = {"steps": 60, "batch_size": 16, "seq_len": 64, "schedule": "cosine", **spec}
    architecture = method(preset("tiny"), label) if label in METHODS else preset("tiny")
    rng = np.random.default_rng([seed, len(label), int(1e4 * rate)])
    steps = settings["steps"] if lost is None else lost
    norms = np.exp(rng.normal(size=(steps, LAYERS)))
    series = {
        "loss": [
            *(6 * np.exp(-np.arange(steps) / 80) + rng.uniform(size=steps) / 5),
            *([] if lost is None else [None]),
        ],
        "learning_rate": [rate] * steps,
        "gradient_norm": np.sqrt((norms**2).sum(1)).tolist(),
        "layer_gradient": norms.tolist(),
        "distributions": {"start": distributions(rng), **({"end": distributions(rng)} if lost is None else {})},
        "probes": while_training(rng, steps),
        "diverged_at": lost,
    }
    body = {
        "schema": 1,
        "kind": "training",
        "id": f"{experiment}-{label}-{rate:g}-{seed}",
        "spec": {
            "label": label,
            "experiment": experiment,
            "seed": seed,
            "learning_rate": rate,
            "architecture": architecture,
            **settings,
        },
        "environment": {"torch": "2"},
        "data": {"source": "synthetic text, 3 documents", "digest": "c0ffee1234567890", "vocab_size": 512},
        "series": series,
        "final": {"heldout_loss": 4 + rng.uniform() if lost is None else None, "diverged_at": lost},
    }
    return plain(body)


def prediction(quantity: str, kind: str, values: Any, in_domain: bool = True) -> dict[str, Any]:
    reasons = [] if in_domain else ["too narrow"]
    found = {"quantity": quantity, "kind": kind, "statement": "s", "source": "s", "values": list(values)}
    return {**found, "in_domain": in_domain, "reasons": reasons}


def initialisation(label: str, *, name: str = "tiny", tokens: str = "text", seeds: tuple[int, ...] = (0, 1, 2)) -> Any:
    """An initialisation record with every prediction the figures know."""
    architecture = method(preset(name), label)
    places = np.arange(2 * architecture.n_layers + 1)
    profile = 1 + (places[-1] - places) * (0.1 if label in ("Vanilla", "Embed Detach") else 0.01)
    branch = np.linspace(3, 1, architecture.n_layers)
    spread = [0.02] * places.size if len(seeds) > 1 else [None] * places.size
    predictions = [
        prediction("gradient_profile", "sharp", profile * 1.01),
        prediction("gradient_growth", "sharp", [profile[0] * 1.02], in_domain=name != "wide"),
        prediction("gradient_growth", "estimate", [profile[0] * 0.7]),
        prediction("residual_std", "sharp", profile),
        prediction("ffn_branch", "estimate", branch),
        prediction("ffn_branch", "upper", branch * 2),
        prediction("attention_branch", "estimate", branch * 1.5),
        prediction("log10_gradient_bound", "estimate", (places[-1] - places) * 0.4),
        prediction("log10_gradient_bound", "upper", (places[-1] - places) * 0.6),
    ]
    measured = {"seeds": list(seeds), "lower_estimate": False}
    measurements = [
        {"quantity": "gradient_growth", "values": [profile[0]], "log_sd": spread[:1], **measured},
        {"quantity": "gradient_profile", "values": profile, "log_sd": spread, **measured},
        {"quantity": "residual_std", "values": profile, "log_sd": None, **measured},
    ]
    layer = {"attention_branch": 0.9, "attention_half": 1.7, "J_Z": 1.0, "feedforward_branch": 0.8}
    layers = [{**layer, "feedforward_half": 1.5, "sigma_x": 1.0} for _ in range(architecture.n_layers)]
    body = {
        "schema": 1,
        "kind": "initialisation",
        "id": f"init-{name}-{tokens}-{label}",
        "label": label,
        "preset": name,
        "architecture": architecture,
        "seq_len": 64,
        "tokens": tokens,
        "seeds": seeds,
        "predictions": predictions,
        "measurements": measurements,
        "jacobians": {"seq_len": 64, "seed": 0, "layers": layers},
    }
    return plain({**body, "measurements": [{**m, "values": list(m["values"])} for m in measurements]})


def full() -> list[dict[str, Any]]:
    runs = [training(label, seed=s, rate=r) for label in METHOD_NAMES for s in (0, 1) for r in (0.01, 0.03)]
    runs += [training("Vanilla", seed=seed, rate=0.1, lost=20) for seed in (0, 1)]
    runs += [training("an arm of our own", seed=0, rate=0.01)]
    return runs + [initialisation(label, name=n) for label in METHOD_NAMES for n in ("tiny", "wide")]


MINIMAL = {
    "one run": [training("Vanilla"), initialisation("Vanilla", seeds=(0,))],
    "diverged at once": [training("Embed LN", lost=1), initialisation("Embed LN")],
    "diverged before a step": [training("Embed LN", lost=0), initialisation("Embed LN")],
    "nothing predicted": [training("Vanilla"), initialisation("Vanilla") | {"predictions": [], "jacobians": None}],
    "several experiments": [
        training("Vanilla"),
        training("Vanilla", experiment="long", steps=200, schedule="constant"),
        training("Scaled Embed", experiment="short-sequences", seq_len=16, batch_size=64),
        training("Scaled Embed", experiment="short-sequences", seq_len=32, batch_size=32),
        initialisation("Scaled Embed"),
    ],
}
