"""One run and its record: a finished run is not made again, a killed one resumes."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from empirics.checkpoints import Checkpoints
from empirics.data import Corpus, load_corpus, require_length
from empirics.distributed import ALONE, Ranks
from empirics.initialisation import InitialisationSpec, initialisation
from empirics.kept import damage
from empirics.lock import sole_trainer
from empirics.run_spec import RunSpec
from empirics.train import OnStep, check_shares, train
from theory.records import read_record, remove_unfinished, write_record

LOCK = ".lock"  # how its name ends

Spec = RunSpec | InitialisationSpec
Record = dict[str, Any]


def corpus_of(spec: RunSpec, out: Path) -> Corpus:
    """The run's corpus: mapped from its shards, or tokenised once and kept under `out/data`."""
    vocab_size, cache = spec.architecture.vocab_size, out / "data"
    return load_corpus(spec.data, vocab_size=vocab_size, tokenizer=spec.tokenizer, limit=spec.data_bytes, cache=cache)


def record_path(spec: Spec, out: Path) -> Path:
    """Where the record lies."""
    return out / "records" / f"{spec.identity}.json"


def checkpoints_of(spec: RunSpec, out: Path, ranks: Ranks = ALONE) -> Checkpoints:
    """The run's checkpoints, as long as it has no record."""
    return Checkpoints(out / "checkpoints" / spec.identity, spec.identity, ranks)


def lock_path(spec: RunSpec, out: Path) -> Path:
    """What the process that trains the run holds a lock on, as long as it has no record."""
    return out / f".{spec.identity}{LOCK}"


def model_path(spec: RunSpec, out: Path) -> Path:
    """Folder of the model that the run leaves, if it is told to."""
    return out / "models" / spec.identity


def run(
    spec: Spec,
    out: Path,
    *,
    progress: bool = False,
    checkpoint_every: int = 100,
    keep_model: bool = False,
    sink: OnStep | None = None,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """One record: read if it is there, otherwise computed (a training from its last checkpoint) and written.

    A record that is not whole is named on standard error, and made again.

    Args:
        sink: is given the numbers of every step that is taken, beside the record.
        stop: as Ctrl-C and SIGTERM: a training that is told to stops after its step, with a checkpoint.
        ranks: which train together; each calls this, and gets the record.

    Raises:
        ValueError: bad input; another process trains the run; or it is finished and its model, which is to be kept, is
            not there or damaged.
    """
    path = record_path(spec, out)
    record = read_record(path)
    ranks.wait()  # all have looked before one writes
    if record is None:
        if path.exists() and ranks.first:
            print(f"record {path} is damaged; it is made again", file=sys.stderr)
        if isinstance(spec, InitialisationSpec):
            body = initialisation(spec, out / "data")
            if ranks.first:
                write_record(path, kind="initialisation" if spec.seeds else "prediction", body=body)
        else:
            with stop_signals() as signalled:
                _train(
                    spec, out, progress and ranks.first, checkpoint_every, keep_model, sink,
                    lambda: signalled() or stop(), ranks,
                )  # fmt: skip
        ranks.wait()
        record = read_record(path)
        assert record is not None
    elif keep_model and isinstance(spec, RunSpec):
        _require_kept(model_path(spec, out), path)
    if ranks.first:
        for made in (path, model_path(spec, out)) if isinstance(spec, RunSpec) else (path,):
            remove_unfinished(made)
    if isinstance(spec, RunSpec):  # not before the record is there: a kill between would lose the run
        checkpoints_of(spec, out, ranks).remove()
        if ranks.first:
            with suppress(OSError):
                lock_path(spec, out).unlink()
    return record


def _require_kept(model: Path, record: Path) -> None:
    """A finished run is not made again for the sake of its model: what would do so is named."""
    found = damage(model) if model.exists() else ""
    if found or not model.exists():
        what = f"in {model} is damaged ({found})" if found else f"is not in {model}"
        raise ValueError(
            f"the run is finished and its model {what}; bring it back, or delete {record} and run again to train anew"
        )


def _train(
    spec: RunSpec,
    out: Path,
    progress: bool,
    checkpoint_every: int,
    keep_model: bool,
    sink: OnStep | None,
    stop: Callable[[], bool],
    ranks: Ranks,
) -> None:
    """Train and write the record, unless another process does or has done so by now."""
    check_shares(spec, ranks)
    if not ranks.first:
        ranks.wait()  # the first one tokenises, the others read what it leaves
    corpus = corpus_of(spec, out)  # before the bar: an unreadable text is one line
    if ranks.first:
        ranks.wait()
    require_length(corpus, spec.seq_len)
    with sole_trainer(lock_path(spec, out), spec.identity) if ranks.first else nullcontext():
        if ranks.any(read_record(record_path(spec, out)) is not None):
            return
        with tqdm(total=spec.steps, disable=not progress, desc=spec.label, unit="step") as bar:

            def on_step(step: int, values: Mapping[str, float]) -> None:
                if bar.n == 0:
                    bar.initial = bar.n = step  # the estimate is of this process's steps
                bar.set_postfix_str(f"loss {values['loss']:.3f}", refresh=False)
                bar.update()
                if sink is not None and ranks.first:
                    sink(step, values)

            body = train(
                spec,
                corpus,
                checkpoints=checkpoints_of(spec, out, ranks),
                checkpoint_every=checkpoint_every,
                keep=model_path(spec, out) if keep_model else None,
                stop=stop,
                on_step=on_step,
                ranks=ranks,
            )
        if ranks.first:
            write_record(record_path(spec, out), kind="training", body=body)


@contextmanager
def stop_signals(heard: Callable[[], object] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM has come; a second one interrupts at once.

    Signals reach the main thread alone: in another one the answer stays no.

    Args:
        heard: called when the first one comes.
    """
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        heard()

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    # What a shell has told a background job to ignore stays ignored.
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
