"""Checkpoints of a training, and the model that is kept of it: written whole or not at all, verified before use.

A checkpoint is a folder `step-NNNNNNNN` (N steps have been taken):

    model.safetensors      every parameter by its name; a tied table once
    optimizer.safetensors  Adam's moments and step count, `PARAMETER.exp_avg`, `.exp_avg_sq`, `.step`
    series.json            what was written down so far
    architecture.json      what the weights are of, for those who only look at them
    documents.json         the token at which attention stops, if it stops at the ends of documents
    manifest.json          the step, the run's identity, size and SHA-256 of the files above; written last

A model that is kept has the files that it needs, and a manifest of them, which the header of its weights names.

Several ranks write their parts of the same tensors side by side, by torch.distributed.checkpoint: `shard-RANK-...`
files of safetensors in place of the first two, each part with its place in the whole. Both kinds are read by one
reader, on any number of ranks.

Nothing else decides the steps to come: batches and rates are functions of the step, and no step draws from a global
random generator.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from empirics.data import Tokenizer
from empirics.distributed import ALONE, Ranks, whole
from empirics.model import Transformer
from empirics.seals import MANIFEST, broken, flush, read_manifest, seal
from theory.records import plain, write_json

KEPT = 2  # so that damage to the newest loses the steps since the one before, not the run
MODEL, OPTIMIZER, SERIES = "model.safetensors", "optimizer.safetensors", "series.json"
ARCHITECTURE, DOCUMENTS, RUN = "architecture.json", "documents.json", "run.json"
SEALED = {"sealed_by": MANIFEST}  # in the header of a kept model's weights: without that file they are damaged


class Checkpoints:
    """The checkpoints of one run, in a folder of their own.

    Args:
        identity: the run's; a checkpoint of another run is not used.
        ranks: which write and read together, each calling `save` and `load`.
    """

    def __init__(self, folder: Path, identity: str, ranks: Ranks = ALONE) -> None:
        self.folder, self.identity, self.ranks = folder, identity, ranks
        self._good: list[str] = []  # names, oldest first, that this process wrote or verified

    def save(self, step: int, model: Transformer, optimizer: torch.optim.Optimizer, series: Mapping[str, Any]) -> None:
        """Keep the state after `step` steps, and of the earlier checkpoints the last whole one.

        Raises:
            ValueError: the folder cannot be written.
        """
        name = step_name(step)
        with _new_folder(self.folder / name, self.ranks) as temporary:
            tensors = _parameters(model), _moments(model, optimizer)
            if self.ranks.size == 1:
                for file, named in zip((MODEL, OPTIMIZER), tensors, strict=True):
                    save_file(named, temporary / file)
            else:
                _save_shards(temporary, tensors[0] | tensors[1])
            names = sorted(path.name for path in temporary.glob("*.safetensors"))
            mine = names[self.ranks.rank :: self.ranks.size]  # each rank reads through its share of the bytes
            if self.ranks.first:
                write_json(temporary / SERIES, series)
                mine += [SERIES, *_describe(temporary, model)]
            parts = self.ranks.each({file: seal(temporary / file) for file in mine})
            files = {file: sealed for part in parts for file, sealed in part.items()}
            if self.ranks.first:
                write_json(temporary / MANIFEST, {"step": step, "run": self.identity, "files": files})
        self._good = [*(good for good in self._good if good != name), name][-KEPT:]
        if self.ranks.first:
            for path in self.folder.iterdir():
                if path.name not in self._good:
                    shutil.rmtree(path, ignore_errors=True)

    def load(self, model: Transformer, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]] | None:
        """Set model and optimizer to the newest whole checkpoint: its step and series, or None without one.

        A damaged one is named on standard error, and passed over.
        """
        path, damaged = self._look()
        self._say(damaged, "the run starts again from step 0" if path is None else _used(path))
        if path is None:
            return None
        self._good = [path.name]
        _load(path, model, optimizer, alone=self.ranks.size == 1)
        return _taken(path)

    def newest(self) -> Path | None:
        """The newest whole checkpoint, for those who only read: None if there is none at all.

        A damaged one is named on standard error, and passed over.

        Raises:
            ValueError: all are damaged.
        """
        path, damaged = self._look()
        if path is None and damaged:
            raise ValueError(f"{'; '.join(damaged)}; there is no other: train again, which starts from step 0")
        if path is not None:
            self._say(damaged, _used(path))
        return path

    def series(self) -> tuple[int, dict[str, Any]] | None:
        """Step and series of the newest whole checkpoint, without its tensors; as `newest`."""
        path = self.newest()
        return None if path is None else _taken(path)

    def _look(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, and what is wrong with each that is newer."""
        damaged: list[str] = []
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            reasons = [reason for reason in self.ranks.each(self._damage(path)) if reason]
            if not reasons:
                return path, damaged
            damaged.append(f"checkpoint {path} is damaged ({reasons[0]})")
        return None, damaged

    def remove(self) -> None:
        """Remove them all; to be called once the run's record is written."""
        if self.ranks.first:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _damage(self, path: Path) -> str:
        """What is wrong with a checkpoint, in a few words, as this rank's share of the files tells it; or nothing."""
        try:
            manifest, files = read_manifest(path)
        except ValueError as error:
            return str(error)
        step, run = manifest.get("step"), manifest.get("run")
        if not isinstance(step, int) or SERIES not in files or len(files) < 2:
            return f"{MANIFEST} cannot be read"
        if run != self.identity or path.name != step_name(step):
            return f"it is step {step} of {run}"
        mine = sorted(files)[self.ranks.rank :: self.ranks.size]
        return broken(path, {file: files[file] for file in mine})

    def _say(self, damaged: list[str], remedy: str) -> None:
        for line in damaged if self.ranks.first else ():
            print(f"{line}; {remedy}", file=sys.stderr)


def step_name(step: int) -> str:
    """What the folder of a checkpoint is called after so many steps."""
    return f"step-{step:08d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _used(path: Path) -> str:
    return f"the one of step {_step(path)} is used"


def _taken(path: Path) -> tuple[int, dict[str, Any]]:
    return _step(path), json.loads((path / SERIES).read_text())


def keep_model(
    folder: Path,
    model: Transformer,
    *,
    tokenizer: Tokenizer | None = None,
    run: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Write the weights and the architecture, which `kept.load_model` reads, and their manifest.

    The files are whole, and written by the first rank from its memory.

    Args:
        tokenizer: of the text that it was trained on, kept in the form that transformers reads.
        run: the specification of the training, kept as `run.json`.

    Raises:
        ValueError: the folder cannot be written.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in _parameters(model).items():
        gathered = whole(parameter)  # by all ranks, one at a time
        if ranks.first:
            weights[name] = gathered.cpu()
    with _new_folder(folder, ranks) as temporary:
        if ranks.first:
            save_file(weights, temporary / MODEL, metadata=SEALED)  # one entry: several come in any order
            _describe(temporary, model)
            if tokenizer is not None:
                tokenizer.save(temporary)
            if run is not None:
                write_json(temporary / RUN, run)
            files = {path.name: seal(path) for path in sorted(temporary.iterdir())}
            write_json(temporary / MANIFEST, {"files": files})


def _describe(folder: Path, model: Transformer) -> list[str]:
    """Write what a model is beside its weights; the names of the files."""
    described: dict[str, Any] = {ARCHITECTURE: plain(model.architecture)}
    if model.end_of_document is not None:
        described[DOCUMENTS] = {"end_of_document": model.end_of_document}
    for name, content in described.items():
        write_json(folder / name, content)
    return list(described)


# --- tensors by name ----------------------------------------------------------------------------------------------


def fill(tensors: dict[str, Tensor], folder: Path, *, alone: bool = True) -> None:
    """Read tensors by their names from the safetensors of a folder, whole or in shards, into those that are given.

    Args:
        alone: else every rank calls this, each with its parts.

    Raises:
        ValueError: one is not there, has another shape, or its file is damaged.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader  # half a second
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with warnings.catch_warnings(), _unlogged("state_dict_loader"):
            # Said of `no_dist` even where it is asked for.
            warnings.filterwarnings("ignore", message=".*single process")
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise ValueError(str(first) or type(first).__name__) from None


@contextmanager
def _unlogged(module: str) -> Iterator[None]:
    """Without what a module of torch tells the root logger: a traceback, of what it then raises as an error."""

    def others(record: logging.LogRecord) -> bool:
        return record.module != module

    root = logging.getLogger()
    root.addFilter(others)
    try:
        yield
    finally:
        root.removeFilter(others)


def _parameters(model: Transformer) -> dict[str, Tensor]:
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def _moments(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _save_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # on every rank, whichever failed
        first, _ = next(iter(error.failures.values()))
        raise first if isinstance(first, OSError) else error from None


@torch.no_grad()
def _load(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, *, alone: bool) -> None:
    """Fill the model in place, and the optimizer with moments as it has them after a step."""
    parameters = dict(model.named_parameters())
    moments: dict[str, dict[str, Tensor]] = {
        name: {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        for name, parameter in parameters.items()
    }
    tensors = _parameters(model)
    tensors |= {f"{name}.{key}": value for name, state in moments.items() for key, value in state.items()}
    fill(tensors, folder, alone=alone)
    names = {id(parameter): name for name, parameter in parameters.items()}
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state = {place: moments[name] for place, name in enumerate(ordered)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# --- files --------------------------------------------------------------------------------------------------------


@contextmanager
def _new_folder(path: Path, ranks: Ranks) -> Iterator[Path]:
    """A temporary folder, the same for every rank, that takes the place of `path` in the end."""
    temporary: Path | None = None
    try:
        if ranks.first:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
            temporary.chmod(0o755)
        shared = ranks.each(temporary)[0]
        assert shared is not None
        yield shared
        if temporary is not None:
            flush(temporary)
            if path.exists():  # a damaged one, or the same steps taken again
                shutil.rmtree(path)
            os.replace(temporary, path)
            flush(path.parent)
        ranks.wait()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; choose a writable folder with --out") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
