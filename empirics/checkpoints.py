"""Checkpoints of a training, and the model that is kept of it: written whole or not at all, verified before use.

A checkpoint is a folder `step-NNNNNNNN` (N steps have been taken):

    model.safetensors      every parameter by its name; a tied table once
    optimizer.safetensors  Adam's moments and step count, `PARAMETER.exp_avg`, `.exp_avg_sq`, `.step`
    series.json            what was written down so far
    architecture.json      what the weights are of, for those who only look at them
    manifest.json          the step, the run's identity, size and SHA-256 of the files above; written last

Nothing else decides the steps to come: batches and rates are functions of the step, and no step draws from a global
random generator.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from empirics.data import Tokenizer
from empirics.model import Transformer
from theory.records import architecture_from, plain, write_json

KEPT = 2  # so that damage to the newest loses the steps since the one before, not the run
MODEL, OPTIMIZER, SERIES, MANIFEST = "model.safetensors", "optimizer.safetensors", "series.json", "manifest.json"
ARCHITECTURE, RUN = "architecture.json", "run.json"


class Checkpoints:
    """The checkpoints of one run, in a folder of their own.

    Args:
        identity: the run's; a checkpoint of another run is not used.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self._good: list[str] = []  # names, oldest first, that this process wrote or verified

    def save(self, step: int, model: Transformer, optimizer: torch.optim.Optimizer, series: Mapping[str, Any]) -> None:
        """Keep the state after `step` steps, and of the earlier checkpoints the last whole one.

        Raises:
            ValueError: the folder cannot be written.
        """
        name = f"step-{step:08d}"
        with _new_folder(self.folder / name) as temporary:
            save_file(_parameters(model), temporary / MODEL)
            save_file(_moments(model, optimizer), temporary / OPTIMIZER)
            write_json(temporary / SERIES, series)
            write_json(temporary / ARCHITECTURE, plain(model.architecture))
            files = {file: _seal(temporary / file) for file in (MODEL, OPTIMIZER, SERIES)}
            write_json(temporary / MANIFEST, {"step": step, "run": self.identity, "files": files})
        self._good = [*(good for good in self._good if good != name), name][-KEPT:]
        for path in self.folder.iterdir():
            if path.name not in self._good:
                shutil.rmtree(path, ignore_errors=True)

    def load(self, model: Transformer, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]] | None:
        """Set model and optimizer to the newest whole checkpoint: its step and series, or None without one.

        A damaged one is named on standard error, and passed over.
        """
        damaged: list[str] = []
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                step = self._verify(path)
            except (OSError, ValueError) as reason:
                damaged.append(f"checkpoint {path} is damaged ({reason})")
                continue
            _say(damaged, f"the one of step {step} is used")
            self._good = [path.name]
            _set_parameters(model, load_file(path / MODEL))
            _set_moments(model, optimizer, load_file(path / OPTIMIZER))
            return step, json.loads((path / SERIES).read_text())
        _say(damaged, "the run starts again from step 0")
        return None

    def remove(self) -> None:
        """Remove them all; to be called once the run's record is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _verify(self, path: Path) -> int:
        """The step of a whole checkpoint.

        Raises:
            ValueError, OSError: what is wrong with it, in a few words.
        """
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
            step, run, files = manifest["step"], manifest["run"], manifest["files"]
            name = f"step-{int(step):08d}"
            sealed = {file: (files[file]["bytes"], files[file]["sha256"]) for file in (MODEL, OPTIMIZER, SERIES)}
        except FileNotFoundError:
            raise ValueError(f"{MANIFEST} is missing") from None
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{MANIFEST} cannot be read") from None
        if run != self.identity or path.name != name:
            raise ValueError(f"it is step {step} of {run}")
        for file, (size, digest) in sealed.items():
            if not (path / file).is_file():
                raise ValueError(f"{file} is missing")
            if (path / file).stat().st_size != size:
                raise ValueError(f"{file} has {(path / file).stat().st_size} bytes and not {size}")
            if _digest(path / file) != digest:
                raise ValueError(f"{file} has another SHA-256")
        return step


def keep_model(
    folder: Path, model: Transformer, *, tokenizer: Tokenizer | None = None, run: Mapping[str, Any] | None = None
) -> None:
    """Write the weights and the architecture, which `load_model` reads.

    Args:
        tokenizer: of the text that it was trained on, kept in the form that transformers reads.
        run: the specification of the training, kept as `run.json`.

    Raises:
        ValueError: the folder cannot be written.
    """
    with _new_folder(folder) as temporary:
        save_file(_parameters(model), temporary / MODEL)
        write_json(temporary / ARCHITECTURE, plain(model.architecture))
        if tokenizer is not None:
            tokenizer.save(temporary)
        if run is not None:
            write_json(temporary / RUN, run)
        _seal(temporary / MODEL)


def load_model(folder: Path) -> Transformer:
    """The model that `keep_model` wrote, on the CPU."""
    model = Transformer(architecture_from(json.loads((folder / ARCHITECTURE).read_text())))
    _set_parameters(model, load_file(folder / MODEL))
    return model


# --- tensors by name ----------------------------------------------------------------------------------------------


def _parameters(model: Transformer) -> dict[str, Tensor]:
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


@torch.no_grad()
def _set_parameters(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])


def _moments(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _set_moments(model: Transformer, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {n: {} for n in range(len(ordered))}
    place = {name: n for n, name in enumerate(ordered)}
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        state[place[name]][key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# --- files --------------------------------------------------------------------------------------------------------


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` in the end."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        temporary.chmod(0o755)
        yield temporary
        _flush(temporary)
        if path.exists():  # a damaged one, or the same steps taken again
            shutil.rmtree(path)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; choose a writable folder with --out") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before what comes next."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seal(path: Path) -> dict[str, Any]:
    _flush(path)
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _say(damaged: list[str], remedy: str) -> None:
    for line in damaged:
        print(f"{line}; {remedy}", file=sys.stderr)
