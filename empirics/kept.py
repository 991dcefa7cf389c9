"""Models of our own that trainings left in folders: found, and loaded whole.

`train --keep-checkpoint` leaves OUT/models/RUN; a run that is not finished has its state in
OUT/checkpoints/RUN/step-..., of one process whole and of several ranks in shards.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError

from empirics.checkpoints import ARCHITECTURE, MODEL, fill
from empirics.model import Transformer
from theory.architecture import Architecture
from theory.records import architecture_from

REMEDY = "train again with --keep-checkpoint"


def model_folder(folder: Path) -> Path | None:
    """The folder of our own weights that a folder stands for; None if it holds none.

    That is the folder itself; or, of a run's folder, the model that it left, else its newest checkpoint.

    Raises:
        ValueError: it holds several runs.
    """
    if (folder / ARCHITECTURE).is_file():
        return folder
    for pattern, run_of in (("models/*/", Path), ("checkpoints/*/step-*/", lambda path: path.parent)):
        found = sorted(path.parent for path in folder.glob(pattern + ARCHITECTURE))
        runs = {run_of(path) for path in found}
        if len(runs) > 1:
            raise ValueError(f"{folder} holds the models of {len(runs)} runs; name one, for example {found[-1]}")
        if found:
            return found[-1]
    return None


def architecture_of(folder: Path) -> Architecture:
    """What the weights of a folder are of.

    Raises:
        ValueError: it does not say so.
    """
    try:
        return architecture_from(json.loads((folder / ARCHITECTURE).read_text()))
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{folder / ARCHITECTURE} is damaged ({_short(error)}); {REMEDY}") from None


def load_model(folder: Path) -> Transformer:
    """The model of a folder, on the CPU: one that was kept, or that of a checkpoint of any number of ranks.

    Raises:
        ValueError: it is damaged, or has no weights.
    """
    architecture = architecture_of(folder)
    if next(folder.glob("*.safetensors"), None) is None:
        raise ValueError(f"{folder} has no {MODEL}; {REMEDY}")
    model = Transformer(architecture)
    try:
        fill({name: parameter.detach() for name, parameter in model.named_parameters()}, folder)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise ValueError(f"the model in {folder} is damaged ({_short(error)}); {REMEDY}") from None
    return model


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
