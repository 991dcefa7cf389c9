"""Many runs as one restartable batch: on this machine's cores (joblib) or on a cluster's nodes (submitit).

A finished run is skipped, a killed one resumes, each leaves one record. What runs when is joblib's or SLURM's to say.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm

from empirics.data import load_corpus
from empirics.distributed import ranks_of
from empirics.initialisation import InitialisationSpec
from empirics.run import Record, Spec, corpus_of, record_path, run, stop_signals
from empirics.run_spec import RunSpec
from empirics.train import Stopped
from theory.records import read_record, write_json
from theory.words import counted

STOPPED = "stopped"
JOBS = "jobs.json"
SUBMITTERS = ("sbatch", "srun")  # what submitit starts


def prepare_texts(specs: Sequence[Spec], out: Path) -> None:
    """Tokenise every text that runs and records read, once, before two processes would both do it."""
    runs = (spec for spec in specs if isinstance(spec, RunSpec))
    for spec in {(s.data, s.data_bytes, s.tokenizer, s.architecture.vocab_size): s for s in runs}.values():
        corpus_of(spec, out)
    records = (spec for spec in specs if isinstance(spec, InitialisationSpec) and spec.tokens == "text")
    for data, vocab_size in {(s.data, s.architecture.vocab_size) for s in records}:
        load_corpus(data, vocab_size=vocab_size, cache=out / "data")


def cost(spec: Spec) -> float:
    """Rough work of a record, in floating-point operations; only its proportions matter."""
    a = spec.architecture
    if isinstance(spec, RunSpec):
        return 6.0 * a.n_parameters * spec.steps * spec.batch_size * spec.seq_len
    passes = 6.0 * a.n_parameters * len(spec.seeds) * spec.batch_size * spec.seq_len
    # Five norms a layer, some 12 pairs of products each, every pair about one forward and backward pass.
    return passes + 6.0 * a.n_parameters * 60 * spec.jacobian_tokens


def missing(specs: Sequence[Spec], out: Path) -> list[Spec]:
    """Those without a whole record, each once, longest first, so that the last ones to finish are short."""
    named = {spec.identity: spec for spec in specs}
    return sorted((s for s in named.values() if read_record(record_path(s, out)) is None), key=lambda s: -cost(s))


def run_all(
    specs: Sequence[Spec], out: Path, *, processes: int = 2, title: str = "runs", checkpoint_every: int = 100
) -> list[Record]:
    """All records, in the order of `specs`; what is missing is computed, `processes` at a time.

    Every run is single-threaded, so that its numbers depend neither on `processes` nor on the machine's cores. Ctrl-C
    and SIGTERM stop every training after its step, with a checkpoint; a second one ends at once.

    Raises:
        ValueError: runs failed, each named with its reason, after all others; or a process was killed.
        Stopped: as asked; the same call goes on.
    """
    todo = missing(specs, out)
    failed: dict[str, str] = {}
    if todo:
        prepare_texts(todo, out)
        with tempfile.TemporaryDirectory() as folder:
            failed = _compute(todo, out, min(processes, len(todo)), title, Path(folder) / "stop", checkpoint_every)
    stopped = sum(reason == STOPPED for reason in failed.values())
    if stopped:
        raise Stopped(f"stopped and saved, with {len(todo) - len(failed)} of {len(todo)} {title} done")
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise ValueError(f"{len(failed)} of {len(todo)} {title} failed: {reasons}")
    return [run(spec, out) for spec in specs]


def _compute(
    todo: Sequence[Spec], out: Path, processes: int, title: str, stop: Path, checkpoint_every: int
) -> dict[str, str]:
    """Make the records; why those that are not there are not."""
    failed: dict[str, str] = {}
    layout = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} elapsed, {remaining} left"
    with (
        stop_signals(lambda: stop.touch()) as stopping,
        parallel_config("loky", inner_max_num_threads=1),
        tqdm(total=sum(map(cost, todo)), desc=f"{title} ({len(todo)})", bar_format=layout) as bar,
    ):
        parallel = Parallel(n_jobs=processes, return_as="generator_unordered", pre_dispatch="all")
        try:
            here = os.getpid()
            calls = (delayed(_work)(n, spec, out, stop, here, checkpoint_every) for n, spec in enumerate(todo))
            for n, reason in parallel(calls):  # type: ignore[union-attr]
                if reason:
                    failed[todo[n].identity] = reason
                bar.update(cost(todo[n]))
        except TerminatedWorkerError:
            if stopping():
                raise Stopped("stopped") from None
            raise ValueError(
                "a worker process was killed, perhaps for memory; run the same command again, it resumes "
                "(--processes 1 needs less memory)"
            ) from None
    return failed


def _work(number: int, spec: Spec, out: Path, stop: Path, parent: int, checkpoint_every: int) -> tuple[int, str]:
    """Make one record; its number, and in a few words why it is not made.

    Args:
        stop: once there is such a file, or no parent, nothing is begun and a training stops.
    """
    apart = os.getpid() != parent
    threads, interrupt = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.set_num_threads(1)  # two one-thread processes beat one of two threads, and fix the rounding
    if apart:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent to answer

    def stopping() -> bool:
        return stop.exists() or (apart and os.getppid() != parent)

    try:
        if stopping():
            return number, STOPPED
        run(spec, out, stop=stopping, checkpoint_every=checkpoint_every)
    except Stopped:
        stop.touch()
        return number, STOPPED
    except ValueError as error:
        return number, " ".join(str(error).split())
    finally:
        torch.set_num_threads(threads)
        if apart:
            signal.signal(signal.SIGINT, interrupt)
    return number, ""


def submit(
    specs: Sequence[Spec], out: Path, parameters: Mapping[str, str], *, checkpoint_every: int = 100
) -> dict[str, str]:
    """Hand what is missing to SLURM, one job a run, through submitit; the jobs' numbers by run.

    A job that its time limit or another job ends is put back into the queue, and resumes. With several tasks a job
    they are ranks that train together.

    Args:
        out: on a file system that every node sees.
        parameters: submitit's (`timeout_min`, `gpus_per_node`, `slurm_partition`, ...); `cluster` may be `local`.

    Raises:
        ValueError: submitit or SLURM is missing or refuses, a parameter is not submitit's, or runs are submitted
            already.
    """
    try:
        import submitit
        from submitit.core.utils import FailedSubmissionError, UncompletedJobError
    except ImportError:
        raise ValueError("--slurm needs the package submitit; run pip install 'spikecheck[slurm]'") from None
    todo, path = missing(specs, out), out / "slurm" / JOBS
    submitted: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    again = [spec.identity for spec in todo if spec.identity in submitted]
    if again:
        raise ValueError(
            f"{counted(len(again), 'run is', 'runs are')} submitted and not finished, {again[0]} as job "
            f"{submitted[again[0]]}; wait for them, or cancel them, delete {path} and submit again: they resume"
        )
    if not todo:
        return {}
    cluster = parameters.get("cluster", "slurm")
    absent = [name for name in SUBMITTERS if cluster == "slurm" and shutil.which(name) is None]
    if absent:
        raise ValueError(
            f"--slurm finds no {' and no '.join(absent)} here; run it where the cluster takes jobs (a login node), or "
            "leave --slurm out to train on this machine"
        )
    values = {name: int(value) if value.isdecimal() else value for name, value in parameters.items()}
    values.pop("cluster", None)
    try:
        executor = submitit.AutoExecutor(folder=out / "slurm", cluster=cluster)
        executor.update_parameters(name="spikecheck", **values)
    except (RuntimeError, ValueError, TypeError, NameError) as error:
        raise ValueError(f"--slurm: {' '.join(str(error).split())}") from None
    prepare_texts(todo, out)
    try:
        with redirect_stderr(StringIO()), executor.batch():  # what SLURM says of an error is in the error too
            jobs = [executor.submit(Job(), spec, out.resolve(), checkpoint_every) for spec in todo]
    except (UncompletedJobError, FailedSubmissionError) as error:
        raise ValueError(
            f"SLURM took no job: {' '.join(str(error).split()) or 'it says no reason'}; mend the parameters of --slurm"
        ) from None
    numbers = {spec.identity: str(job.job_id) for spec, job in zip(todo, jobs, strict=True)}
    write_json(path, submitted | numbers)
    return numbers


class Job:
    """What a node does for one run."""

    def __call__(self, spec: Spec, out: Path, checkpoint_every: int) -> None:
        import submitit

        if submitit.JobEnvironment().num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export()
        with ranks_of(spec.device) as ranks:
            run(spec, out, checkpoint_every=checkpoint_every, ranks=ranks)

    def checkpoint(self, spec: Spec, out: Path, checkpoint_every: int) -> Any:
        """What is put back into the queue when the job is cut off; submitit asks for it."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, spec, out, checkpoint_every)
