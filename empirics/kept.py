"""Models of our own that trainings left in folders: found, and loaded whole.

`train --keep-checkpoint` leaves OUT/models/RUN; a run that is not finished has its state in
OUT/checkpoints/RUN/step-..., of one process whole and of several ranks in shards. Both are held to their manifests.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from empirics.checkpoints import ARCHITECTURE, DOCUMENTS, MODEL, OPTIMIZER, SERIES, Checkpoints, fill
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
        ValueError: it does not say so.
    """
    try:
        return architecture_from(json.loads((folder / ARCHITECTURE).read_text()))
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{folder / ARCHITECTURE} is damaged ({_short(error)}); {_remedy(folder)}") from None


def load_model(folder: Path) -> Transformer:
    """The model of a folder, on the CPU: one that was kept, or that of a checkpoint of any number of ranks.

    Its attention stops at the ends of documents if it did so in training. One that was kept without a manifest, as it
    once was, is named on standard error: nothing tells whether it is whole.

    Raises:
        ValueError: it is damaged, or has no weights.
    """
    architecture = architecture_of(folder)
    if next(folder.glob("*.safetensors"), None) is None:
        raise ValueError(f"{folder} has no {MODEL}; {_remedy(folder)}")
    if damage := _damage(folder):
        raise ValueError(f"the model in {folder} is damaged ({damage}); {_remedy(folder)}")
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


def _damage(folder: Path) -> str:
    """What of a model is not as it was written, in a few words; an optimizer's moments beside it are not looked at."""
    if not (folder / MANIFEST).exists() and not is_checkpoint(folder):
        said = f"{folder} has no {MANIFEST}, being of an older version, so that damage to its numbers would not be seen"
        print(f"note: {said}", file=sys.stderr)
        return ""
    try:
        _, files = read_manifest(folder)
    except ValueError as error:
        return str(error)
    beside = [path for path in (folder / DOCUMENTS,) if path.exists()]
    for path in (folder / ARCHITECTURE, *beside, *sorted(folder.glob("*.safetensors"))):
        if path.name not in files:
            return f"{path.name} is not in {MANIFEST}"
    return broken(folder, {file: files[file] for file in files if file != OPTIMIZER})


def _remedy(folder: Path) -> str:
    if is_checkpoint(folder):
        return "name the folder of its run, of which the newest whole checkpoint is used, or train again"
    return f"bring it back, or delete it and {REMEDY}"


def _end_of_document(folder: Path) -> int | None:
    path = folder / DOCUMENTS
    if not path.is_file():
        return None
    try:
        end = json.loads(path.read_text())["end_of_document"]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} is damaged ({_short(error)}); {_remedy(folder)}") from None
    if not isinstance(end, int):
        raise ValueError(f"{path} is damaged (its end_of_document is no id); {_remedy(folder)}")
    return end


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
