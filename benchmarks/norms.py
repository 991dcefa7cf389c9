"""What a Jacobian's spectral norm costs: ours beside its peers, all in one run and to the same 1 %.

The Jacobian is that of an attention half-layer, x + attention(norm(x)), of the project's own network over a whole
sequence, in float32. Every task runs in a fresh process on one core and one thread; times are the best of some
repetitions and begin with the function, so that its forward pass counts. The peers are told when to stop: power
iteration by the true norm, which it would not know, and svds by its own tolerance. The dense Jacobian is too large
at full scale: it is measured at shorter sequences and extrapolated.

    python benchmarks/norms.py [--scale full] [--out results/benchmarks/norms.json]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a module of this folder is called theory too

import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy.sparse.linalg import LinearOperator, svds  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.func import jacrev, jvp, vjp  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from benchmarks.timing import best_of, measure, one_core, report  # noqa: E402
from empirics.data import random_tokens  # noqa: E402
from empirics.model import Layer, Transformer, build  # noqa: E402
from empirics.spectral import NormEstimate, jacobian_products, lanczos_opnorm, lanczos_opnorms  # noqa: E402
from empirics.stacked import batches, stacked  # noqa: E402
from theory.architecture import preset  # noqa: E402

ACCURACY = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes of the tasks.

    Attributes:
        d_model, n_tokens: of the half-layer.
        layers: which ones of the network.
        dense_tokens: two shorter sequences, over which the dense Jacobian is bearable.
        together: (width, tokens) of networks whose layers' norms are taken one by one and together.
        repeats: of which the best counts; the dense Jacobian is taken once.
    """

    d_model: int
    n_tokens: int
    layers: tuple[int, ...]
    dense_tokens: tuple[int, int]
    together: tuple[tuple[int, int], ...]
    repeats: int


SCALES = {
    "full": Scale(
        d_model=256, n_tokens=128, layers=(0, 4), dense_tokens=(16, 32),
        together=((32, 16), (64, 16), (64, 64), (128, 32), (128, 128), (256, 128)), repeats=10,
    ),
    "tiny": Scale(d_model=16, n_tokens=12, layers=(1,), dense_tokens=(3, 6), together=((8, 4),), repeats=1),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a task measured.

    Attributes:
        products: with J and J' each; 0 for the dense Jacobian.
        value: the norm it found.
        parts: seconds on the processor of its parts, if it has any.
    """

    seconds: float
    cpu_seconds: float
    products: int = 0
    value: float = 0.0
    parts: tuple[float, ...] = ()
    megabytes: float = 0.0


def network(d_model: int, n_tokens: int, n_layers: int) -> tuple[Transformer, list[Tensor]]:
    """A network with the paper's initialisation, and what enters each layer's attention on random tokens."""
    a = replace(preset("wide"), d_model=d_model, d_head=d_model // 4, d_ffn=4 * d_model, n_layers=n_layers)
    model = build(a, seed=0).requires_grad_(False)
    places: list[Tensor] = []
    model(torch.from_numpy(random_tokens(a.vocab_size, seed=0, batch_size=1, seq_len=n_tokens)[0]), places)
    return model, places[:-1:2]


def half_layer(scale: Scale, layer: int, n_tokens: int | None = None) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    model, xs = network(scale.d_model, n_tokens or scale.n_tokens, layer + 1)
    update = model.layers[layer]
    assert isinstance(update, Layer)
    return update.attention_update, xs[layer]


def true_norm(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    return lanczos_opnorm(function, x, tolerance=1e-6, limit=1000).value


def outcome(run: Callable[[], tuple[int, float]], repeats: int) -> Outcome:
    run()  # the first call of anything loads it
    seconds, cpu_seconds = best_of(run, repeats)
    products, value = run()
    return Outcome(seconds=seconds, cpu_seconds=cpu_seconds, products=products, value=value)


def ours(scale: Scale, layer: int) -> Outcome:
    function, x = half_layer(scale, layer)

    def run() -> tuple[int, float]:
        estimate = lanczos_opnorm(function, x, tolerance=ACCURACY)
        return estimate.iterations, estimate.value

    return outcome(run, scale.repeats)


def hindsight(scale: Scale, layer: int) -> Outcome:
    """The fewest iterations after which the value is within 1 %, known only from the true norm."""
    function, x = half_layer(scale, layer)
    truth = true_norm(function, x)
    needed = next(
        k for k in range(1, 1000) if lanczos_opnorm(function, x, tolerance=0, limit=k).value >= (1 - ACCURACY) * truth
    )
    return Outcome(seconds=0.0, cpu_seconds=0.0, products=needed, value=truth)


def power(scale: Scale, layer: int) -> Outcome:
    """Power iteration on J'J by the same products as ours, until |J v| is within 1 % of the true norm."""
    function, x = half_layer(scale, layer)
    enough = (1 - ACCURACY) * true_norm(function, x)

    def run() -> tuple[int, float]:
        product, adjoint = jacobian_products(function, x)
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        v, value, products = v / v.norm(), 0.0, 0
        while value < enough:
            u = product(v)
            v, value, products = adjoint(u), float(u.norm()), products + 1
            v = v / v.norm()
        return products, value

    return outcome(run, scale.repeats)


def scipy_svds(scale: Scale, layer: int) -> Outcome:
    """ARPACK's implicitly restarted Lanczos on J'J by the same products as ours, at its own tolerance of 1 %."""
    function, x = half_layer(scale, layer)

    def run() -> tuple[int, float]:
        product, adjoint = jacobian_products(function, x)
        count = 0

        def matvec(v: np.ndarray) -> np.ndarray:
            nonlocal count
            count += 1
            return product(torch.from_numpy(v).view_as(x)).numpy().ravel()

        def rmatvec(w: np.ndarray) -> np.ndarray:
            return adjoint(torch.from_numpy(w).view_as(x)).numpy().ravel()

        size = x.numel()
        operator = LinearOperator((size, size), matvec=matvec, rmatvec=rmatvec, dtype=np.float32)  # type: ignore[call-arg]
        v0 = np.random.default_rng(0).standard_normal(size).astype(np.float32)
        found = svds(operator, k=1, tol=ACCURACY, v0=v0, return_singular_vectors=False)
        return count, float(found[0])

    return outcome(run, scale.repeats)


def pair(own: bool) -> Callable[[Scale, int], Outcome]:
    """One product with J and one with J': by `torch.func`, or as ours; the forward pass before them not counted."""

    def task(scale: Scale, layer: int) -> Outcome:
        function, x = half_layer(scale, layer)
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on its first forward-mode product
            if own:
                product, adjoint = jacobian_products(function, x)
            else:
                pullback = vjp(function, x)[1]
                product, adjoint = lambda v: jvp(function, (x,), (v,))[1], lambda w: pullback(w)[0]

            def run() -> tuple[int, float]:
                product(v)
                adjoint(v)
                return 1, 0.0

            return outcome(run, scale.repeats)

    return task


def dense(scale: Scale, which: int) -> Outcome:
    """The Jacobian by `torch.func.jacrev` and its singular values; the two parts."""
    function, x = half_layer(scale, scale.layers[0], scale.dense_tokens[which])
    found: list[Tensor] = []

    def jacobian() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            found.append(jacrev(function, chunk_size=256)(x).reshape(x.numel(), x.numel()))

    with sdpa_kernel(SDPBackend.MATH):  # the first call of anything loads it
        torch.linalg.svdvals(jacrev(function, chunk_size=1)(x[:, :1]).flatten(3).flatten(0, 2))

    def values() -> None:
        found.append(torch.linalg.svdvals(found[0]))

    first, second = best_of(jacobian, 1), best_of(values, 1)
    return Outcome(
        seconds=first[0] + second[0], cpu_seconds=first[1] + second[1], value=float(found[1][0]),
        parts=(first[1], second[1]),
    )  # fmt: skip


def layers_norms(together: bool) -> Callable[[Scale, int], Outcome]:
    """Norms of the attention half-layers of twelve layers, in as few batches as pay or one by one."""

    def task(scale: Scale, which: int) -> Outcome:
        model, xs = network(*scale.together[which], 12)
        layers = list(model.layers)
        groups = batches(layers, xs[0].numel()) if together else [[n] for n in range(12)]

        def run() -> tuple[int, float]:
            estimates: list[NormEstimate] = []
            for group in groups:
                function = stacked([layers[n] for n in group], Layer.attention_update)
                estimates += lanczos_opnorms(function, torch.stack([xs[n] for n in group]), tolerance=ACCURACY)
            return sum(estimate.iterations for estimate in estimates), float(len(groups))

        return outcome(run, scale.repeats)

    return task


# Tasks that run inside a process of their own, by name; the number is the layer, or which of the sizes.
TASKS: dict[str, Callable[[Scale, int], Outcome]] = {
    "ours": ours,
    "hindsight": hindsight,
    "power iteration": power,
    "svds": scipy_svds,
    "torch.func pair": pair(own=False),
    "own pair": pair(own=True),
    "dense": dense,
    "together": layers_norms(together=True),
    "one by one": layers_norms(together=False),
}


def measured(task: str, scale: str, number: int) -> Outcome:
    command = [sys.executable, str(Path(__file__).resolve()), "--scale", scale, "--task", task, str(number)]
    cost, output = measure(command)
    return replace(Outcome(**json.loads(output)), megabytes=cost.megabytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the first table.

    Attributes:
        error: relative to the true norm; None where no norm is found.
        ratio: its processor time over ours for the same layer.
    """

    layer: int
    name: str
    products: int | None
    error: float | None
    cpu_seconds: float
    megabytes: float | None
    ratio: float


def layer_rows(scale: str, layer: int, extrapolated: float) -> list[Row]:
    """All methods on a layer, ours first."""
    mine, needed, torchs, own = (
        measured(t, scale, layer) for t in ("ours", "hindsight", "torch.func pair", "own pair")
    )

    def row(name: str, cpu_seconds: float, products: int | None = None, found: Outcome | None = None) -> Row:
        return Row(
            layer=layer, name=name, products=products, cpu_seconds=cpu_seconds, ratio=cpu_seconds / mine.cpu_seconds,
            error=None if found is None else found.value / needed.value - 1,
            megabytes=None if found is None else found.megabytes,
        )  # fmt: skip

    peers = {
        "power iteration, told the norm": measured("power iteration", scale, layer),
        "scipy svds, LinearOperator": measured("svds", scale, layer),
    }
    floors = {
        "floor: torch.func jvp + vjp": (torchs, mine.products),
        "floor: our products": (own, mine.products),
        "floor in hindsight: torch.func jvp + vjp": (torchs, needed.products),
        "floor in hindsight: our products": (own, needed.products),
    }
    return [
        row("lanczos_opnorm", mine.cpu_seconds, mine.products, mine),
        *(row(name, found.cpu_seconds, found.products, found) for name, found in peers.items()),
        *(row(name, found.cpu_seconds * count, count) for name, (found, count) in floors.items()),
        row("dense Jacobian and SVD, extrapolated", extrapolated),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """The dense Jacobian with its singular values.

    Attributes:
        tokens: of the sequence; `extrapolated` beyond those measured.
        jacobian, values: seconds on the processor of the two parts.
        error: of the largest singular value against a tight Lanczos run, or None.
    """

    tokens: int
    entries: int
    jacobian: float
    values: float
    error: float | None
    extrapolated: bool


def dense_rows(name: str) -> tuple[list[Dense], float]:
    """Two measured sizes and the full one from the larger; and the measured exponent of the singular values' time.

    The Jacobian's time is scaled by its entries, the singular values' by the cube of the side, or by the measured
    exponent where that is smaller: what makes the peer faster.
    """
    scale = SCALES[name]
    found: list[Dense] = []
    for which, tokens in enumerate(scale.dense_tokens):
        function, x = half_layer(scale, scale.layers[0], tokens)
        one = measured("dense", name, which)
        error = one.value / true_norm(function, x) - 1
        found.append(
            Dense(
                tokens=tokens, entries=x.numel() ** 2, jacobian=one.parts[0], values=one.parts[1], error=error,
                extrapolated=False,
            )
        )  # fmt: skip
    longer = scale.dense_tokens[1] / scale.dense_tokens[0]
    exponent = math.log(found[1].values / found[0].values) / math.log(longer)
    factor = scale.n_tokens / scale.dense_tokens[1]
    found.append(
        Dense(
            tokens=scale.n_tokens, entries=(scale.n_tokens * scale.d_model) ** 2, error=None, extrapolated=True,
            jacobian=found[1].jacobian * factor**2, values=found[1].values * factor ** min(3.0, exponent),
        )
    )  # fmt: skip
    return found, exponent


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """Twelve layers' norms, together and one by one; seconds on the processor."""

    d_model: int
    tokens: int
    groups: int
    one_by_one: float
    together: float


def together_rows(name: str) -> list[Together]:
    found: list[Together] = []
    for which, (d_model, tokens) in enumerate(SCALES[name].together):
        alone, joined = (measured(task, name, which) for task in ("one by one", "together"))
        found.append(
            Together(
                d_model=d_model, tokens=tokens, groups=int(joined.value), one_by_one=alone.cpu_seconds,
                together=joined.cpu_seconds,
            )
        )  # fmt: skip
    return found


def table(header: str, rows: list[str]) -> str:
    return "\n".join([header, "|" + "---|" * (header.count("|") - 1), *rows])


def tables(rows: list[Row], sizes: list[Dense], exponent: float, layers: list[Together]) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    main = table(
        "| layer | method | products with J and with J' | relative error | seconds | peak MB | times ours |",
        [
            f"| {r.layer} | {r.name} | {number(r.products, 'd')} | {number(r.error, '.1g')} | {r.cpu_seconds:.3g} | "
            f"{number(r.megabytes, '.0f')} | {r.ratio:.3g} |"
            for r in rows
        ],
    )
    large = table(
        "| T | entries | Jacobian, seconds | singular values, seconds | relative error | |",
        [
            f"| {r.tokens} | {r.entries:.2g} | {r.jacobian:.3g} | {r.values:.3g} | {number(r.error, '.1g')} | "
            f"{'extrapolated' if r.extrapolated else 'measured'} |"
            for r in sizes
        ],
    )
    many = table(
        "| d | T | batches | one by one, seconds | together, seconds | ratio |",
        [
            f"| {r.d_model} | {r.tokens} | {r.groups} | {r.one_by_one:.3g} | {r.together:.3g} | "
            f"{r.one_by_one / r.together:.3g} |"
            for r in layers
        ],
    )
    power = f"Measured exponent of the singular values' time in T: {exponent:.2f}."
    return f"{main}\n\n{large}\n\n{power}\n\n{many}"


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 measured, 2 bad input."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scale", choices=tuple(SCALES), default="full", help="full takes some minutes")
    parser.add_argument("--out", type=Path, help="file to write the numbers to, as JSON")
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.task:
        print(json.dumps(asdict(TASKS[options.task[0]](SCALES[options.scale], int(options.task[1])))))
        return 0
    one_core()

    def measured_all() -> tuple[str, dict[str, Any]]:
        sizes, exponent = dense_rows(options.scale)
        rows: list[Row] = []
        for layer in SCALES[options.scale].layers:
            rows += layer_rows(options.scale, layer, sizes[-1].jacobian + sizes[-1].values)
        layers = together_rows(options.scale)
        return tables(rows, sizes, exponent, layers), {
            "torch": torch.__version__, "rows": [asdict(row) for row in rows],
            "dense": [asdict(row) for row in sizes], "exponent": exponent,
            "together": [asdict(row) for row in layers],
        }  # fmt: skip

    return report(options.scale, options.out, measured_all)


if __name__ == "__main__":
    sys.exit(main())
