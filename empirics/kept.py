"""Models of our own that trainings left in folders: found, and loaded whole.

`train --keep-checkpoint` leaves OUT/models/RUN; a run that is not finished has its state in
OUT/checkpoints/RUN/step-..., of one process whole and of several ranks in shards. Both are held to their manifests.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from empirics.checkpoints import ARCHITECTURE, DOCUMENTS, MODEL, OPTIMIZER, RUN, SEALED, SERIES, Checkpoints, fill
from empirics.model import Transformer
from empirics.seals import MANIFEST, broken, read_manifest
from theory.architecture import Architecture
from theory.records import architecture_from

REMEDY = "train again with --keep-checkpoint"


def model_folder(folder: Path) -> Path | None:
    """The folder of our own weights that a folder stands for; None if it holds none.

    That is the folder itself; or, of a run's folder, the model that it left, else its newest whole checkpoint. A
    damaged one of those is named on standard error, and passed over.

    Raises:
        ValueError: it holds several runs, or checkpoints of which none is whole.
    """
    if (folder / ARCHITECTURE).is_file():
        return folder
    if models := sorted(path.parent for path in folder.glob(f"models/*/{ARCHITECTURE}")):
        _require_one_run(folder, models, models)
        return models[0]
    checkpoints = sorted(path.parent for path in folder.glob(f"checkpoints/*/step-*/{ARCHITECTURE}"))
    if not checkpoints:
        return None
    run = checkpoints[-1].parent
    _require_one_run(folder, [path.parent for path in checkpoints], checkpoints)
    return Checkpoints(run, run.name).newest()


def _require_one_run(folder: Path, runs: Sequence[Path], found: Sequence[Path]) -> None:
    if len(several := set(runs)) > 1:
        raise ValueError(f"{folder} holds the models of {len(several)} runs; name one, for example {found[-1]}")


def architecture_of(folder: Path) -> Architecture:
    """What the weights of a folder are of.

    Raises:
        ValueError: it does not say so, or is not the file that was sealed.
    """
    if (folder / MANIFEST).exists() and (reason := _differs(folder, only=ARCHITECTURE)):
        raise ValueError(f"the model in {folder} is damaged ({reason}); {_remedy(folder)}")
    fields = _read(folder, ARCHITECTURE)
    try:
        return architecture_from(fields)
    except (ValueError, TypeError, LookupError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else _short(error)
        raise ValueError(f"{folder / ARCHITECTURE} is damaged ({reason}); {_remedy(folder)}") from None


def run_of(folder: Path) -> Mapping[str, Any]:
    """The specification of the training that a kept model is of; empty if it was kept without, or is a checkpoint's.

    Raises:
        ValueError: it is damaged.
    """
    return _read(folder, RUN) if (folder / RUN).is_file() else {}


def load_model(folder: Path) -> Transformer:
    """The model of a folder, on the CPU: one that was kept, or that of a checkpoint of any number of ranks.

    Its attention stops at the ends of documents if it did so in training. One that was kept without a manifest, as it
    once was, is named on standard error: nothing tells whether it is whole. Weights that were kept with one say so
    themselves, and without it are damaged.

    Raises:
        ValueError: it is damaged, or has no weights.
    """
    architecture = architecture_of(folder)
    if next(folder.glob("*.safetensors"), None) is None:
        raise ValueError(f"{folder} has no {MODEL}; {_remedy(folder)}")
    if found := damage(folder):
        raise ValueError(f"the model in {folder} is damaged ({found}); {_remedy(folder)}")
    if not _is_sealed(folder):
        said = f"{folder} has no {MANIFEST}, being of an older version, so that damage to its numbers would not be seen"
        print(f"note: {said}", file=sys.stderr)
    model = Transformer(architecture)
    model.end_of_document = _end_of_document(folder)
    try:
        fill({name: parameter.detach() for name, parameter in model.named_parameters()}, folder)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise ValueError(f"the model in {folder} is damaged ({_short(error)}); {_remedy(folder)}") from None
    return model


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder with a model is the state of a run that was not finished."""
    return (folder / SERIES).is_file()


def damage(folder: Path) -> str:
    """What of a model is not as it was written, in a few words; an optimizer's moments beside it are not looked at.

    Of one that was kept without a manifest, only what is missing is seen.
    """
    if _is_sealed(folder):
        return _differs(folder)
    return next((f"{file} is missing" for file in (ARCHITECTURE, MODEL) if not (folder / file).is_file()), "")


def _is_sealed(folder: Path) -> bool:
    """Whether a model was written with a manifest, be it lost by now."""
    if (folder / MANIFEST).exists() or is_checkpoint(folder):
        return True
    try:
        with safe_open(folder / MODEL, framework="pt") as weights:
            return SEALED.items() <= (weights.metadata() or {}).items()
    except (OSError, SafetensorError):  # which reading the weights will say
        return False


def _differs(folder: Path, only: str | None = None) -> str:
    """What of a model, or of one of its files, is not as the manifest says."""
    try:
        _, files = read_manifest(folder)
    except ValueError as error:
        return str(error)
    if only is not None:
        return broken(folder, {only: files[only]}) if only in files else f"{only} is not in {MANIFEST}"
    beside = [path for path in (folder / DOCUMENTS,) if path.exists()]
    for path in (folder / ARCHITECTURE, *beside, *sorted(folder.glob("*.safetensors"))):
        if path.name not in files:
            return f"{path.name} is not in {MANIFEST}"
    return broken(folder, {file: files[file] for file in files if file != OPTIMIZER})


def _remedy(folder: Path) -> str:
    if is_checkpoint(folder):
        return "name the folder of its run, of which the newest whole checkpoint is used, or train again"
    record = folder.parent.parent / "records" / f"{folder.name}.json"
    anew = f"delete {record} and " if record.is_file() else ""  # of a finished run, which is not made again beside it
    return f"bring it back, or {anew}{REMEDY}"


def _end_of_document(folder: Path) -> int | None:
    path = folder / DOCUMENTS
    if not path.is_file():
        if run_of(folder).get("mask_documents"):
            raise ValueError(f"the model in {folder} is damaged ({DOCUMENTS} is missing); {_remedy(folder)}")
        return None
    end = _read(folder, DOCUMENTS).get("end_of_document")
    if not isinstance(end, int):
        raise ValueError(f"{path} is damaged (its end_of_document is no id); {_remedy(folder)}")
    return end


def _read(folder: Path, file: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / file).read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / file} is damaged ({_short(error)}); {_remedy(folder)}") from None


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
