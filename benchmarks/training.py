"""What training costs: tokens a second beside a nanoGPT-equivalent, and beside the machine's own matrix products.

Both train the same architecture (GPT-2: learned positions, GELU, tied head) on the same text with the same batches'
size, optimizer and number of threads. Ours is `train` as a user gets it, with everything that is written down a step
(norms of gradients and updates, probes at their default interval); the peer writes down the loss. They take turns step
by step, so that whatever else the machine does meets both; a ratio is of as many steps as lie between two probes.
Checkpoints and evaluations, which both have, are left out of both.

    python benchmarks/training.py [--scale full] [--threads 1] [--out results/benchmarks/training.json]
    python benchmarks/training.py --scale gpu --device cuda [--compile]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a module of this folder is called theory too

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.gpt_peer import Config, Loop  # noqa: E402
from benchmarks.timing import report  # noqa: E402
from empirics.device_check import matmul_peak  # noqa: E402
from empirics.model import Attention, Kernel, faster_attention  # noqa: E402
from empirics.plan import flops_per_token  # noqa: E402
from empirics.run import corpus_of  # noqa: E402
from empirics.run_spec import RunSpec  # noqa: E402
from empirics.train import train  # noqa: E402
from theory.architecture import Architecture, preset  # noqa: E402

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEERS = {"cpu": {"peer": False, "peer, fused AdamW": True}, "cuda": {"peer": True}}  # nanoGPT's is fused on CUDA
WARM = 5  # steps before the first turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model and its batch; `batch` sequences of `tokens`."""

    name: str
    d_model: int
    n_layers: int
    n_heads: int
    vocab_size: int
    tokens: int
    batch: int

    def architecture(self) -> Architecture:
        """GPT-2 at this size."""
        return replace(
            preset("small"), name=self.name, d_model=self.d_model, n_layers=self.n_layers, n_heads=self.n_heads,
            n_kv_heads=self.n_heads, d_head=self.d_model // self.n_heads, d_ffn=4 * self.d_model,
            vocab_size=self.vocab_size, context=self.tokens, activation="gelu", positions="learned", tied=True,
        ).with_init("gpt2")  # fmt: skip

    def config(self) -> Config:
        return Config(
            d_model=self.d_model, n_layers=self.n_layers, n_heads=self.n_heads, vocab_size=self.vocab_size,
            seq_len=self.tokens, batch_size=self.batch,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What is measured.

    Attributes:
        block: steps that a ratio is of.
        rounds: ratios.
        attention: (batch, heads, tokens, head width) of the attention that is timed by itself.
        data_bytes: of text.
        tokenizer: as a `RunSpec` has it.
        side: of the square matrices whose product is the machine's peak; None for what the device wants.
    """

    sizes: tuple[Size, ...]
    block: int
    rounds: int
    attention: tuple[tuple[int, int, int, int], ...]
    data_bytes: int | None
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    tokenizer: str = "bpe"
    side: int | None = None


SCALES = {
    "full": Scale(
        sizes=(
            Size(name="tiny", d_model=64, n_layers=12, n_heads=2, vocab_size=512, tokens=64, batch=8),
            Size(name="small", d_model=128, n_layers=12, n_heads=4, vocab_size=2048, tokens=128, batch=16),
            Size(name="wide", d_model=256, n_layers=8, n_heads=4, vocab_size=2048, tokens=128, batch=8),
        ),
        block=RunSpec.__dataclass_fields__["probe_every"].default, rounds=5, data_bytes=None,
        attention=((8, 2, 64, 32), (16, 4, 128, 32), (8, 4, 128, 64), (4, 4, 256, 64), (2, 4, 512, 64),
                   (1, 4, 1024, 64), (1, 4, 2048, 64)),
    ),
    "tiny": Scale(
        sizes=(Size(name="tiny", d_model=16, n_layers=2, n_heads=2, vocab_size=300, tokens=8, batch=2),),
        block=2, rounds=2, attention=((1, 2, 8, 8),), side=32, data_bytes=50_000,
    ),
    "gpu": Scale(  # GPT-2's own sizes; which tokens are read does not matter here
        sizes=(
            Size(name="124m", d_model=768, n_layers=12, n_heads=12, vocab_size=50304, tokens=1024, batch=16),
            Size(name="350m", d_model=1024, n_layers=24, n_heads=16, vocab_size=50304, tokens=1024, batch=8),
        ),
        block=20, rounds=3, data_bytes=2_000_000, precisions=("bfloat16",), tokenizer="bytes",
        attention=((64, 12, 256, 64), (16, 12, 1024, 64), (8, 16, 2048, 64), (4, 40, 2048, 128)),
    ),
}  # fmt: skip


def clock(threads: int, device: str = "cpu") -> Callable[[], float]:
    """Seconds of the processor for one thread, which other processes do not lengthen; of the wall for more.

    Of a GPU on the wall, when all that was asked of it is done.
    """
    if device != "cpu":

        def settled() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return settled
    return time.process_time if threads == 1 else time.perf_counter


def seconds(run: Callable[[], object], threads: int, repeats: int, device: str = "cpu") -> float:
    """The best of some repetitions, after one that loads what the first call loads."""
    now, best = clock(threads, device), math.inf
    for repeat in range(repeats + 1):
        start = now()
        run()
        best = min(best, now() - start) if repeat else best
    return best


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Ours at one size and precision.

    Attributes:
        tokens_per_second: of ours, the median over rounds; `peers` likewise.
        flops_per_second: of ours, by the FLOPs that a causal model needs; `of_peak` over those of a matrix product.
        ratios: ours over each peer, in every round.
        attention: the way ours attends.
    """

    size: str
    precision: str
    tokens_per_second: float
    flops_per_second: float
    of_peak: float = 0.0
    peers: dict[str, float]
    ratios: dict[str, list[float]]
    attention: str


def compare(
    scale: Scale, size: Size, precision: str, threads: int, folder: Path, device: str = "cpu", compiled: bool = False
) -> Row:
    """Train both, step by step: after every step of ours each peer takes one, so that whatever else the machine does
    meets all of them."""
    steps, now = WARM + scale.block * scale.rounds, clock(threads, device)
    spec = RunSpec(
        architecture=size.architecture(), label="ours", experiment="benchmark", seed=0, steps=steps,
        batch_size=size.batch, seq_len=size.tokens, learning_rate=1e-3, warmup=WARM, schedule="cosine",
        weight_decay=0.1, decay_embeddings=True, precision="bfloat16" if precision == "bfloat16" else "float32",
        data_bytes=scale.data_bytes, device=device, compile=compiled, tokenizer=scale.tokenizer,
    )  # fmt: skip
    corpus = corpus_of(spec, folder)
    loops = {
        name: Loop(
            size.config(), corpus.train, precision=precision, steps=steps, fused=fused, compiled=compiled, device=device
        )
        for name, fused in PEERS[device].items()
    }
    for loop in loops.values():
        loop.run(WARM)
    turns: dict[str, list[float]] = {name: [0.0] * scale.rounds for name in ("ours", *loops)}
    began = 0.0

    def on_step(step: int, values: Mapping[str, float]) -> None:
        nonlocal began
        turn = (step - WARM) // scale.block
        if turn >= 0:
            turns["ours"][turn] += now() - began
            for name, loop in loops.items():
                start = now()
                loop.run(1)
                turns[name][turn] += now() - start
        began = now()

    record = train(spec, corpus, on_step=on_step)
    tokens = size.batch * size.tokens * scale.block
    speed = tokens / statistics.median(turns["ours"])
    # The plan counts the table of positions among the matrices; it is looked up.
    flops = flops_per_token(spec.architecture, size.tokens) - 6 * size.tokens * size.d_model
    return Row(
        size=size.name, precision=precision, tokens_per_second=speed, flops_per_second=speed * flops,
        peers={name: tokens / statistics.median(turns[name]) for name in loops},
        ratios={name: [a / b for a, b in zip(turns[name], turns["ours"], strict=True)] for name in loops},
        attention=record["attention"],
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRow:
    """Seconds of attention, forward and backward pass without its matrices, each way; and which one the table says."""

    batch: int
    heads: int
    tokens: int
    head_width: int
    precision: str
    fused: float
    plain: float
    table: Kernel


def attention_rows(scale: Scale, threads: int, device: str = "cpu") -> list[AttentionRow]:
    found: list[AttentionRow] = []
    for batch, heads, tokens, width in scale.attention:
        size = Size(
            name="", d_model=heads * width, n_layers=1, n_heads=heads, vocab_size=2, tokens=tokens, batch=batch
        )  # fmt: skip
        attention = Attention(size.architecture()).to(device)
        for precision, dtype in PRECISIONS.items():
            times = {}
            for kernel in ("fused", "plain"):
                attention.kernel = kernel
                times[kernel] = seconds(_forward_and_backward(attention, size, dtype, device), threads, 5, device)
            row = AttentionRow(
                batch=batch, heads=heads, tokens=tokens, head_width=width, precision=precision,
                table=faster_attention(device, dtype, tokens), **times,
            )  # fmt: skip
            found.append(row)
    return found


def _forward_and_backward(attention: Attention, size: Size, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """`attention.mix` of random queries, keys and values that lie as its matrices leave them."""
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        shape = size.batch, size.tokens, size.d_model
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    leaves, cotangent = [drawn() for _ in range(3)], drawn().detach()

    def run() -> object:
        parts = (x.unflatten(-1, (size.n_heads, -1)).transpose(1, 2) for x in leaves)
        return torch.autograd.grad(attention.mix(*parts), leaves, cotangent)

    return run


def tables(rows: list[Row], attentions: list[AttentionRow], peaks: dict[str, float]) -> str:
    def spread(ratios: list[float]) -> str:
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    beside = list(rows[0].peers)
    lines = [
        "| size | precision | tokens a second | of the peak | "
        + " | ".join(f"{name} | ours / {'it' if k else 'peer'}" for k, name in enumerate(beside))
        + " |",
        "|---" * (4 + 2 * len(beside)) + "|",
        *(
            f"| {r.size} | {r.precision} | {r.tokens_per_second:.0f} | {r.of_peak:.0%} | "
            + " | ".join(f"{r.peers[name]:.0f} | {spread(r.ratios[name])}" for name in beside)
            + " |"
            for r in rows
        ),
        "",
        "Peak, a square matrix product: "
        + ", ".join(f"{precision} {peak / 1e9:.3g} GFLOPs a second" for precision, peak in peaks.items())
        + ".",
        "",
        "| batch x heads x T x width | precision | fused, ms | plain, ms | plain / fused | the table says |",
        "|---|---|---|---|---|---|",
        *(
            f"| {a.batch} x {a.heads} x {a.tokens} x {a.head_width} | {a.precision} | {a.fused * 1e3:.3g} | "
            f"{a.plain * 1e3:.3g} | {a.plain / a.fused:.2f} | {a.table} |"
            for a in attentions
        ),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 measured, 2 bad input."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scale", choices=tuple(SCALES), default="full", help="full takes some ten minutes")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--sizes", help="names of sizes, by commas (default all)")
    parser.add_argument("--rounds", type=int, help="ratios, of as many steps as lie between two probes (default 5)")
    parser.add_argument("--device", choices=tuple(PEERS), default="cpu", help="default cpu; cuda for --scale gpu")
    parser.add_argument("--compile", action="store_true", help="both by torch.compile")
    parser.add_argument("--out", type=Path, help="file to write the numbers to, as JSON")
    options = parser.parse_args(arguments)

    def measured() -> tuple[str, dict[str, Any]]:
        for option in ("threads", "rounds"):
            if getattr(options, option) is not None and getattr(options, option) < 1:
                raise ValueError(f"--{option} {getattr(options, option)} is not positive; use 1 or more")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda finds no CUDA device; use --device cpu")
        device, scale = options.device, SCALES[options.scale]
        scale = replace(scale, rounds=options.rounds or scale.rounds)
        known = {size.name: size for size in scale.sizes}
        names = list(known) if options.sizes is None else options.sizes.split(",")
        if set(names) - set(known):
            raise ValueError(f"--sizes {options.sizes} is not known; use some of {', '.join(known)}")
        torch.set_num_threads(options.threads)
        attentions = attention_rows(scale, options.threads, device)
        peaks, rows = dict.fromkeys(scale.precisions, 0.0), list[Row]()
        with tempfile.TemporaryDirectory() as folder, tqdm(total=len(names) * len(peaks), unit="row") as bar:
            for size in (known[name] for name in names):
                for precision in scale.precisions:
                    peak = matmul_peak(device, precision, side=scale.side, now=clock(options.threads, device))
                    peaks[precision] = max(peaks[precision], peak)
                    rows.append(compare(scale, size, precision, options.threads, Path(folder), device, options.compile))
                    bar.update()
        rows = [replace(row, of_peak=row.flops_per_second / peaks[row.precision]) for row in rows]
        return tables(rows, attentions, peaks), {
            "threads": options.threads, "torch": torch.__version__, "peaks": peaks, "compiled": options.compile,
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "rows": [asdict(row) for row in rows], "attention": [asdict(row) for row in attentions],
        }  # fmt: skip

    return report(options.scale, options.out, measured)


if __name__ == "__main__":
    sys.exit(main())
