"""What a prediction, and an attack on a bound, cost: time and peak memory, each beside a peer measured in the same run.

Every task runs in a fresh process on one core and one thread. Its times, on the wall and on the processor, are the
best of some repetitions inside the process, without the start of Python; a whole command's include it. Its memory is
the process's peak, imports and all. Ratios are of processor time, which other work on the machine disturbs less.

    python benchmarks/theory.py [--scale full] [--out results/benchmarks/theory.json]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # this file is called theory too: its own folder must not be searched

import numpy as np  # noqa: E402

from benchmarks.timing import Cost, best_of, measure, one_core, report  # noqa: E402
from theory.architecture import preset  # noqa: E402
from theory.evaluate import closed_form  # noqa: E402
from theory.growth import gradient_growth  # noqa: E402
from theory.kernels import activation_function, activation_kernel, activation_slope  # noqa: E402


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes of the tasks.

    Attributes:
        preset, n_tokens: the architecture and length that are predicted.
        peer_tokens: the length at which the dense recursion is still bearable.
        configurations, looped: how many the vectorised closed form takes, and how many of them the loop.
        blocks, integrated: side of the kernel matrix, and how many of its entries the peer integrates.
        evaluations: of an attack.
        repeats: of which the best counts.
    """

    preset: str
    n_tokens: int
    peer_tokens: int
    configurations: int
    looped: int
    blocks: int
    integrated: int
    evaluations: int
    repeats: int


SCALES = {
    "full": Scale(
        preset="13b", n_tokens=2048, peer_tokens=512, configurations=10**6, looped=10**4, blocks=135, integrated=200,
        evaluations=200, repeats=3,
    ),
    "tiny": Scale(
        preset="tiny", n_tokens=192, peer_tokens=176, configurations=10**4, looped=100, blocks=9, integrated=3,
        evaluations=10, repeats=1,
    ),
}  # fmt: skip


def growth(scale: Scale, *, n_tokens: int | None = None, exact: bool = False) -> Callable[[], object]:
    return lambda: gradient_growth(preset(scale.preset), n_tokens or scale.n_tokens, exact=exact)


def grid(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Widths and depths of `count` configurations."""
    side = math.isqrt(count)
    widths, depths = np.meshgrid(np.linspace(64, 20_000, side), np.linspace(1, 200, side))
    return widths.ravel(), depths.ravel()


def loop(scale: Scale) -> Callable[[], object]:
    widths, depths = (x.tolist() for x in grid(scale.looped))
    return lambda: [closed_form(d, n, "vanilla", 2048) for d, n in zip(widths, depths, strict=True)]


def covariances(blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Variances near 1 and the covariances of random directions."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((blocks, 8))
    gram = x @ x.T / 8
    return np.diagonal(gram).copy(), gram


def closed_kernel(scale: Scale) -> Callable[[], object]:
    q, gram = covariances(scale.blocks)
    return lambda: activation_kernel("gelu", q[:, None], q[None, :], gram)


def integrated_kernel(scale: Scale) -> Callable[[], object]:
    """E[F F'] and E[F' F'] of GELU on a two-dimensional Gauss-Hermite grid of 80 x 80 nodes, entry by entry."""
    q, gram = covariances(scale.blocks)
    x, weight = np.polynomial.hermite_e.hermegauss(80)
    both = np.outer(weight, weight) / (2 * math.pi)

    def run() -> list[tuple[float, float]]:
        found: list[tuple[float, float]] = []
        for i, j in list(np.ndindex(gram.shape))[: scale.integrated]:
            rho = gram[i, j] / math.sqrt(q[i] * q[j])
            z = math.sqrt(q[i]) * x
            other = math.sqrt(q[j]) * (rho * x[:, None] + math.sqrt(max(0.0, 1 - rho * rho)) * x[None, :])
            found.append(
                (
                    float(np.sum(both * activation_function("gelu", z)[:, None] * activation_function("gelu", other))),
                    float(np.sum(both * activation_slope("gelu", z)[:, None] * activation_slope("gelu", other))),
                )
            )
        return found

    return run


def kernel_of(name: str, variance: float) -> Callable[[Scale], Callable[[], object]]:
    def build(scale: Scale) -> Callable[[], object]:
        q, gram = covariances(scale.blocks)
        return lambda: activation_kernel(name, variance * q[:, None], variance * q[None, :], variance * gram)  # type: ignore[arg-type]

    return build


ATTACKED = "experts-upper"  # the slowest to evaluate


def attacked(scale: Scale) -> Callable[[], object]:
    """An attack, without the import of torch and its first call."""
    from empirics.attack import attack
    from theory.statements import find

    attack(find(ATTACKED), budget=1)
    return lambda: attack(find(ATTACKED), budget=scale.evaluations)


def jacobians(scale: Scale) -> Callable[[], object]:
    """As many explicit Jacobians with their singular values, of cases that the attack would draw, and nothing else."""
    from random import Random

    import torch

    from empirics.adversaries import STYLES
    from empirics.benches import find_bench
    from theory.statements import find

    statement, random = find(ATTACKED), Random(0)
    bench = find_bench(statement.quantity.name)
    styles = [STYLES[place % len(STYLES)] for place in range(scale.evaluations)]
    drawn = [bench.draw(random, style, statement.covers).fitted() for style in styles]

    def run() -> None:
        with torch.no_grad():
            for module, x in drawn:
                bench.truth(module, x)

    run()
    return run


# Tasks that run inside a process of their own, by name.
TASKS: dict[str, Callable[[Scale], Callable[[], object]]] = {
    "growth": growth,
    "growth at the peer's length": lambda scale: growth(scale, n_tokens=scale.peer_tokens),
    "dense recursion": lambda scale: growth(scale, n_tokens=scale.peer_tokens, exact=True),
    "closed form": lambda scale: lambda: closed_form(*grid(scale.configurations), "vanilla", 2048),
    "loop": loop,
    "GELU kernel": closed_kernel,
    "SiLU kernel": kernel_of("silu", 1.0),
    "SiLU kernel, variance 9": kernel_of("silu", 9.0),
    "integrated kernel": integrated_kernel,
    "attack": attacked,
    "Jacobians alone": jacobians,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        peer, peer_cost, peer_factor: what it is held against, and by what the peer's time is multiplied to do as much.
        target: what is asked for at full scale, if anything.
    """

    name: str
    cost: Cost
    peer: str
    peer_cost: Cost
    peer_factor: float
    target: str

    @property
    def ratio(self) -> float:
        """How many times longer the peer takes."""
        return self.peer_cost.cpu_seconds * self.peer_factor / self.cost.cpu_seconds


def cost_of(task: str, scale: str) -> Cost:
    outer, output = measure([sys.executable, str(Path(__file__).resolve()), "--scale", scale, "--task", task])
    seconds, cpu_seconds = json.loads(output)
    return replace(outer, seconds=seconds, cpu_seconds=cpu_seconds)


def rows(name: str) -> list[Row]:
    """Measure everything at a scale."""
    scale = SCALES[name]
    check = [sys.executable, "-m", "theory", "check", scale.preset, "--seq-len", str(scale.n_tokens)]
    dense, loop_cost, integrated = (cost_of(task, name) for task in ("dense recursion", "loop", "integrated kernel"))
    target = "10 s, 2000 MB"
    entries = scale.blocks**2 / scale.integrated

    def against(task: str, words: str, peer: str, peer_cost: Cost, factor: float, goal: str = "") -> Row:
        return Row(
            name=words, cost=cost_of(task, name), peer=peer, peer_cost=peer_cost, peer_factor=factor, target=goal
        )

    at_peer = f"dense recursion, {scale.preset}, T = {scale.peer_tokens}"
    looped = f"Python loop over {scale.looped}, scaled"
    quadrature = f"80 x 80 nodes on {scale.integrated} entries, scaled"
    side = f"{scale.blocks} x {scale.blocks}"
    return [
        Row(
            name=f"spikecheck check {scale.preset} --seq-len {scale.n_tokens}", cost=measure(check)[0],
            peer="import torch", peer_cost=measure([sys.executable, "-c", "import torch"])[0], peer_factor=1.0,
            target=target,
        ),
        against("growth", f"growth, {scale.preset}, T = {scale.n_tokens}", at_peer, dense, 1.0, target),
        against(
            "growth at the peer's length", f"growth, {scale.preset}, T = {scale.peer_tokens}", at_peer, dense, 1.0
        ),
        against(
            "closed form", f"closed form, {scale.configurations} configurations", looped, loop_cost,
            scale.configurations / scale.looped, "2 s",
        ),
        against("GELU kernel", f"GELU kernel, {side}", quadrature, integrated, entries),
        against("SiLU kernel", f"SiLU kernel, {side}", quadrature, integrated, entries),
        against("SiLU kernel, variance 9", f"SiLU kernel, {side}, variance 9", quadrature, integrated, entries),
        against(
            "attack", f"attack {ATTACKED} --budget {scale.evaluations}", "as many explicit Jacobians with SVD alone",
            cost_of("Jacobians alone", name), 1.0, "30 s",
        ),
    ]  # fmt: skip


def table(found: list[Row]) -> str:
    lines = [
        "| task | seconds | of the processor | peak MB | target | peer | of the processor | peer / task |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| {row.name} | {row.cost.seconds:.3g} | {row.cost.cpu_seconds:.3g} | {row.cost.megabytes:.0f} | "
            f"{row.target} | {row.peer} | {row.peer_cost.cpu_seconds * row.peer_factor:.3g} | {row.ratio:.3g} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 measured, 2 bad input."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scale", choices=tuple(SCALES), default="full", help="full takes about a minute")
    parser.add_argument("--out", type=Path, help="file to write the numbers to, as JSON")
    parser.add_argument("--task", choices=tuple(TASKS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.task:
        scale = SCALES[options.scale]
        print(best_of(TASKS[options.task](scale), scale.repeats))
        return 0
    one_core()

    def measured() -> tuple[str, dict[str, Any]]:
        found = rows(options.scale)
        return table(found), {
            "numpy": np.__version__, "rows": [asdict(row) | {"ratio": row.ratio} for row in found],
        }  # fmt: skip

    return report(options.scale, options.out, measured)


if __name__ == "__main__":
    sys.exit(main())
