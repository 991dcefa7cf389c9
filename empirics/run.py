"""Many runs as one restartable batch: a finished run is skipped, a killed one resumes, each has one record."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from empirics.data import Corpus, load_corpus
from empirics.train import RunSpec, train
from theory.records import read_record, write_record


def corpus_of(spec: RunSpec, out: Path) -> Corpus:
    """The run's corpus, tokenised once and kept under `out/data`."""
    return load_corpus(spec.data, vocab_size=spec.architecture.vocab_size, tokenizer=spec.tokenizer, cache=out / "data")


def record_path(spec: RunSpec, out: Path) -> Path:
    """Where the run's record lies."""
    return out / "records" / f"{spec.identity}.json"


def run(spec: RunSpec, out: Path, *, progress: bool = False, checkpoint_every: int = 100) -> dict[str, Any]:
    """One run's record: read if it is there, otherwise trained (from its last checkpoint) and written."""
    path = record_path(spec, out)
    record = read_record(path)
    if record is not None:
        return record
    with tqdm(total=spec.steps, disable=not progress, desc=spec.label, unit="step") as bar:

        def on_step(step: int, loss: float) -> None:
            bar.n = step + 1
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update(0)

        body = train(
            spec,
            corpus_of(spec, out),
            checkpoint=out / "checkpoints" / f"{spec.identity}.pt",
            checkpoint_every=checkpoint_every,
            on_step=on_step,
        )
    write_record(path, kind="training", body=body)
    written = read_record(path)
    assert written is not None
    return written


def _worker(spec: RunSpec, out: Path) -> str:
    torch.set_num_threads(1)  # two one-thread processes beat one of two threads, and fix the rounding
    run(spec, out)
    return spec.identity


def run_all(specs: Sequence[RunSpec], out: Path, *, processes: int = 2) -> list[dict[str, Any]]:
    """All records, in the order of `specs`; what is missing is trained, `processes` runs at a time.

    Every run is single-threaded, so that its numbers depend neither on `processes` nor on the machine's cores.
    """
    missing = [spec for spec in specs if read_record(record_path(spec, out)) is None]
    total = sum(spec.steps * spec.batch_size * spec.seq_len for spec in missing)
    if missing:
        for key in {(spec.data, spec.tokenizer, spec.architecture.vocab_size): spec for spec in missing}.values():
            corpus_of(key, out)  # once, before two processes would both build it
        context = multiprocessing.get_context("spawn")
        with (
            ProcessPoolExecutor(min(processes, len(missing)), mp_context=context) as pool,
            tqdm(total=total, desc=f"{len(missing)} trainings", unit="token", unit_scale=True) as bar,
        ):
            # Longest first, so that the last ones to finish are short.
            ordered = sorted(missing, key=lambda spec: -spec.steps)
            futures = {pool.submit(_worker, spec, out): spec for spec in ordered}
            try:
                for future in as_completed(futures):
                    future.result()
                    spec = futures[future]
                    bar.update(spec.steps * spec.batch_size * spec.seq_len)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [run(spec, out) for spec in specs]
