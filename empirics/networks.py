"""What `measure` can be given, as a network to make: a preset, a `config.json`, or a folder with weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from empirics import real_classes
from empirics.kept import REMEDY, architecture_of, load_model, model_folder
from empirics.model import build
from empirics.reduction import reduced_architecture
from theory.__main__ import LARGEST_DEPTH, load
from theory.architecture import Architecture, EmbeddingTreatment
from theory.hf_config import Config, UnknownArchitecture, parse_config, read_json

Implementation = Literal["own", "transformers"]
LARGEST_CONTEXT = 2048  # where a class has no largest length


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network to measure, not yet made.

    Attributes:
        make: the network of a seed; a checkpoint's is the same one for every seed.
        implementation: whose code it is.
        trained: its weights are a checkpoint's.
        architecture: what it is said to be; None where there is no prediction for it, and `unknown` says why.
        assumed: what had to be assumed to read it; `reduced` what was made smaller.
        settings: the configuration of a class of transformers.
        folder: where a checkpoint, and perhaps its tokenizer, is.
    """

    name: str
    make: Callable[[int], nn.Module]
    implementation: Implementation
    trained: bool = False
    architecture: Architecture | None
    unknown: str | None = None
    assumed: tuple[str, ...] = ()
    reduced: tuple[str, ...] = ()
    settings: Any = None
    folder: Path | None = None

    @property
    def context(self) -> int:
        """The longest sequence that it is made for."""
        if self.architecture is not None:
            return self.architecture.context
        return int(getattr(self.settings, "max_position_embeddings", None) or LARGEST_CONTEXT)

    @property
    def positions(self) -> int | None:
        """The most tokens that it takes, where positions are learned or nobody says that they are not; None for any."""
        return self.context if self.architecture is None or self.architecture.positions == "learned" else None


def network(
    given: str,
    *,
    implementation: Implementation | None = None,
    n_layers: int | None = None,
    width: int | None = None,
    embedding: EmbeddingTreatment | None = None,
    init: str | None = None,
) -> Network:
    """The network that a preset's name, the path of a `config.json`, or a folder stands for.

    Args:
        implementation: for a config: our Transformer, or the class of transformers. By default the latter where
            transformers is installed, has the class, and neither `embedding` nor `init` is given.

    Raises:
        ValueError: there is no such thing, it is damaged, or the options do not go together.
        UnknownArchitecture: a class without a prediction, which is not measured either.
    """
    folder = Path(given) if os.path.isdir(given) else None
    changes = {"--layers": n_layers, "--width": width, "--embedding": embedding, "--init": init}
    asked = [option for option, value in changes.items() if value is not None]
    if folder is not None:
        ours = model_folder(folder)
        theirs = ours is None and _has_weights(folder)
        if (ours or theirs) and asked:
            raise ValueError(f"{given} has weights of its own, which {asked[0]} would not fit; leave out {asked[0]}")
        if ours is not None:
            if implementation == "transformers":
                raise ValueError(f"{ours} is of our own Transformer; leave out --implementation transformers")
            return _own_checkpoint(ours)
        if theirs:
            if implementation == "own":
                raise ValueError(f"{given} holds weights of a class of transformers; leave out --implementation own")
            return checkpoint(folder)
        if not (folder / real_classes.CONFIG).exists():
            raise ValueError(
                f"{given} holds neither a model of `train` nor a {real_classes.CONFIG}; name the folder of a run, or "
                f"{REMEDY}"
            )
    elif os.path.isfile(given) and Path(given).suffix in (".safetensors", *real_classes.PICKLED):
        raise ValueError(f"{given} is a file of weights; give the folder that has its config.json beside it")
    if not os.path.exists(given):
        if implementation == "transformers":
            load(given)  # a preset has its name refused here
            raise ValueError(f"{given} is a preset of our own Transformer; leave out --implementation transformers")
        return _own(load(given), n_layers=n_layers, width=width, embedding=embedding, init=init)
    data = read_json(Path(given))
    try:
        read, unknown = parse_config(data), None
    except UnknownArchitecture as reason:
        read, unknown = None, str(reason)
    if implementation is None:
        real = embedding is None and init is None and real_classes.available() and real_classes.known(data)
    else:
        real = implementation == "transformers"
        if real and (embedding or init):
            raise ValueError("--embedding and --init change our own Transformer only; add --implementation own")
        if real and not real_classes.known(data):
            raise ValueError(f"transformers has no decoder {data['model_type']!r}; use --implementation own")
    if not real and read is None:
        raise UnknownArchitecture(f"{unknown}; {_to_measure(data)}")
    if not real and read is not None:
        return _own(read, n_layers=n_layers, width=width, embedding=embedding, init=init)
    _require_sane(data)
    settings, reduced = real_classes.settings(data, n_layers=n_layers, width=width)
    _require_depth(int(settings.num_hidden_layers))
    return Network(
        name=settings.model_type,
        make=lambda seed: real_classes.build(settings, seed),
        implementation="transformers",
        architecture=None if read is None else parse_config(settings.to_dict()).architecture,
        unknown=unknown,
        assumed=() if read is None else read.assumed,
        reduced=reduced,
        settings=settings,
        folder=folder,
    )


def _to_measure(data: Any) -> str:
    """What to do about a config that is neither predicted nor built as a class of transformers."""
    if not real_classes.available():
        return "to measure it all the same, pip install 'spikecheck[hf]'"
    if not real_classes.known(data):
        return "transformers has no decoder of that name to measure; give the config of one"
    return "to measure the class of transformers, leave out --implementation, --embedding and --init"


def _own(
    config: Config,
    *,
    n_layers: int | None,
    width: int | None,
    embedding: EmbeddingTreatment | None,
    init: str | None,
) -> Network:
    architecture, assumed = config
    reduced: tuple[str, ...] = ()
    if n_layers is not None and n_layers != architecture.n_layers:
        reduced = (f"n_layers {architecture.n_layers} -> {n_layers}",)
        architecture = replace(architecture, n_layers=n_layers)
    architecture, narrower = reduced_architecture(architecture, width)
    if embedding is not None:
        architecture = architecture.with_embedding(embedding)
    if init is not None:
        architecture = architecture.with_init(init)
    _require_depth(architecture.n_layers)
    return Network(
        name=architecture.name,
        make=lambda seed: build(architecture, seed=seed),
        implementation="own",
        architecture=architecture,
        assumed=assumed,
        reduced=(*narrower, *reduced),
    )


def _require_sane(data: Mapping[str, Any]) -> None:
    """Before transformers reads a config: it makes lists with an entry a layer."""
    for key, value in data.items():
        if "layer" in key and isinstance(value, int):
            _require_depth(value)


def _require_depth(n_layers: int) -> None:
    if n_layers > LARGEST_DEPTH:
        raise ValueError(f"{n_layers} layers are out of range; use at most {LARGEST_DEPTH}")


# --- folders --------------------------------------------------------------------------------------------------------


def _has_weights(folder: Path) -> bool:
    endings = (".safetensors", real_classes.INDEX, *real_classes.PICKLED)
    try:
        return any(name.endswith(endings) for name in os.listdir(folder))
    except OSError as error:
        raise ValueError(f"cannot read {folder}: {error.strerror}; give a readable folder") from None


def _own_checkpoint(folder: Path) -> Network:
    architecture = architecture_of(folder)
    return Network(
        name=f"{architecture.name} of {folder}",
        make=_once(lambda: load_model(folder)),
        implementation="own",
        trained=True,
        architecture=architecture,
        folder=folder,
    )


def checkpoint(folder: Path, *, attention: str = "eager") -> Network:
    """The network of a folder that transformers wrote, with config.json and safetensors.

    Args:
        attention: transformers' name of the way to attend; the default writes it out, for derivatives of any order.

    Raises:
        ValueError: it is no such folder; or, once the network is made, it is damaged.
    """
    real_classes.require_safetensors(folder)
    data = read_json(folder)
    try:
        read, unknown = parse_config(data), None
    except UnknownArchitecture as reason:
        read, unknown = None, str(reason)
    if not real_classes.known(data):
        raise ValueError(
            f"transformers has no decoder {data.get('model_type')!r}; give a checkpoint of one that it has"
        )
    _require_sane(data)
    settings, _ = real_classes.settings(data)
    return Network(
        name=f"{settings.model_type} of {folder}",
        make=_once(lambda: real_classes.load(folder, settings, attention=attention)),
        implementation="transformers",
        trained=True,
        architecture=None if read is None else read.architecture,
        unknown=unknown,
        assumed=() if read is None else read.assumed,
        settings=settings,
        folder=folder,
    )


def _once(loaded: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """The same network for every seed, not loaded before it is wanted: its memory is checked until then."""
    kept: list[nn.Module] = []

    def make(_: int) -> nn.Module:
        if not kept:
            kept.append(loaded())
        return kept[0]

    return make
