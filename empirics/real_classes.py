"""The real decoder classes of transformers (extra `hf`): from a config, or from a folder of weights.

No code of a config or a folder runs: classes come from transformers alone (`auto_map` is dropped before it is looked
at), weights from safetensors alone, and nothing is fetched from anywhere.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from empirics.reduction import reduced_settings

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Not about the network: where code or kernels come from, and in which numbers it was saved.
DROPPED = ("auto_map", "attn_implementation", "experts_implementation", "torch_dtype", "dtype", "architectures")
CONVERT = (
    "load it where you trust it and write it again with model.save_pretrained(FOLDER), which gives model.safetensors"
)


def available() -> bool:
    """Whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


@contextmanager
def _quiet() -> Iterator[Any]:
    """transformers without its warnings and progress bars, which are about other uses of a model than this one."""
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "transformers is not installed; pip install 'spikecheck[hf]', or add --implementation own"
        ) from None
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def known(data: Any) -> bool:
    """Whether transformers has a decoder for a parsed `config.json`."""
    if not isinstance(data, Mapping):
        return False
    with _quiet():
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        kind = data.get("model_type")
        return isinstance(kind, str) and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def settings(
    data: Mapping[str, Any], *, n_layers: int | None = None, width: int | None = None
) -> tuple[Any, tuple[str, ...]]:
    """The class's configuration, without dropout, at another depth and width if asked; and what was changed.

    Raises:
        ValueError: transformers refuses it, it cannot be reduced so, or it is quantised.
    """
    if data.get("quantization_config"):
        raise ValueError("the weights are quantised; give a checkpoint or config without quantization_config")
    kept = {key: value for key, value in data.items() if key not in DROPPED and not key.startswith("_")}
    kind = kept.pop("model_type")
    with _quiet() as transformers, _refusals(f"the config of {kind}"):
        whole = transformers.AutoConfig.for_model(kind, **kept)
        notes: tuple[str, ...] = ()
        if n_layers is not None or width is not None:
            full, notes = reduced_settings(whole.to_dict(), whole.attribute_map, n_layers=n_layers, width=width)
            full = {key: value for key, value in full.items() if key not in (*DROPPED, "model_type")}
            whole = transformers.AutoConfig.for_model(kind, **full)
    return whole, notes


def build(configuration: Any, seed: int) -> nn.Module:
    """The class with the weights that its own initialiser draws, float32, attention written out, in eval mode.

    The global generator is as it was.

    Raises:
        ValueError: transformers cannot build it.
    """
    with _quiet() as transformers, _refusals(f"the config of {configuration.model_type}"), torch.random.fork_rng([]):
        torch.manual_seed(seed)
        make = transformers.AutoModelForCausalLM.from_config
        model = make(configuration, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False)
        return model.eval()


def n_parameters(configuration: Any) -> int:
    """Numbers that the class trains, counted without making them.

    Raises:
        ValueError: as `build`.
    """
    with torch.device("meta"):
        return sum(p.numel() for p in build(configuration, 0).parameters())


def require_safetensors(folder: Path) -> None:
    """Refuse a folder without weights in safetensors, or with files of them that are not whole.

    Of a file its size and its list of tensors are looked at, not what is in them.

    Raises:
        ValueError: the message says what the folder has, or which file is damaged, and the remedy.
    """
    names, files = sorted(os.listdir(folder)), [WEIGHTS]
    if "adapter_config.json" in names:
        raise ValueError(f"{folder} is an adapter to another model; merge it (peft: merge_and_unload) and save that")
    if INDEX in names:
        try:
            shards = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"{folder / INDEX} cannot be read; fetch the checkpoint again") from None
        if any(not isinstance(shard, str) or Path(shard).name != shard for shard in shards):
            raise ValueError(f"{folder / INDEX} names files outside its folder; give a plain checkpoint")
        missing = sorted(shards - set(names))
        if missing:
            raise ValueError(f"{folder} lacks {missing[0]}, which {INDEX} names; fetch the checkpoint again")
        files = sorted(shards)
    elif WEIGHTS not in names:
        pickled = [name for name in names if name.endswith(PICKLED)]
        if pickled:
            raise ValueError(f"{folder} holds {pickled[0]}, whose loading may run code; {CONVERT}")
        raise ValueError(f"{folder} has no {WEIGHTS}; give a folder that save_pretrained wrote")
    for file in files:
        try:
            with safe_open(folder / file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / file} is damaged ({_short(error)}); fetch the checkpoint again") from None


def load(folder: Path, configuration: Any, *, attention: str = "eager") -> nn.Module:
    """The checkpoint of a folder, float32, in eval mode.

    Args:
        attention: transformers' name of the way to attend.

    Raises:
        ValueError: no safetensors, or they are not the weights of this configuration.
    """
    require_safetensors(folder)
    with _quiet() as transformers, _refusals(f"the checkpoint {folder}"), torch.random.fork_rng([]):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder.absolute(),
            config=configuration,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation=attention,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # what does not fit is reported, and refused below
        )
    misfits = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    lacking = sorted(report["missing_keys"]) + sorted(misfits)
    if lacking:
        raise ValueError(
            f"{folder} has no weights that fit {lacking[0]} ({len(lacking)} in all); give the config.json that belongs "
            "to these weights"
        )
    return model.eval()


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Whatever transformers raises on a file that is not as its class wants it, as one line.

    Raises:
        ValueError: that line.
    """
    try:
        yield
    except (MemoryError, KeyboardInterrupt, ValueError) as error:
        if isinstance(error, ValueError) and type(error) is not ValueError:
            raise ValueError(f"transformers refuses {what}: {_short(error)}; fix it and try again") from None
        raise
    except Exception as error:  # anyone's constructor may raise anything on a bad value
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise ValueError(f"transformers refuses {what}: {_short(error)}; fix it and try again") from None


def _short(error: Exception) -> str:
    """Its message on one line, cut."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."
