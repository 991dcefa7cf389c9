"""Hugging Face `config.json` in, `Architecture` out.

The key names, and what each class does that its config does not say, are in `hf_gpt`, `hf_llama` and `hf_experts`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from theory import hf_experts, hf_gpt
from theory.architecture import Architecture
from theory.hf_experts import EXPERT_CLASSES
from theory.hf_gpt import GPT_CLASSES
from theory.hf_keys import HARMLESS, KEYS, OLDER, TABLES
from theory.hf_llama import LLAMA_CLASSES
from theory.hf_reader import Reader, UnknownArchitecture
from theory.names import meant
from theory.words import as_typed, brief

__all__ = ["CLASSES", "Config", "UnknownArchitecture", "parse_config", "read_config", "read_json"]


class Config(NamedTuple):
    """An architecture read from a file, and what had to be assumed to read it."""

    architecture: Architecture
    assumed: tuple[str, ...]


CLASSES = GPT_CLASSES | LLAMA_CLASSES | EXPERT_CLASSES
ALIASES = hf_gpt.ALIASES | hf_experts.ALIASES
AS_CLASS = "initialised as"  # so begins what is assumed of the initialisation
KNOWN = ", ".join(sorted(CLASSES))
SLIP = 0.8  # names of classes are alike
KEY_SLIP = 0.76  # num_kv_heads is one for num_key_value_heads, attention_types none for attention_bias
NAMES = {  # what a file may call what a message is about
    "d_model": ("hidden_size", "n_embd", "n_embed"),
    "n_heads": ("num_attention_heads", "n_head", "num_heads"),
    "n_kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "d_head": ("head_dim",),
    "rope_fraction": ("partial_rotary_factor", "rotary_pct"),
    "experts_per_token": ("num_experts_per_tok",),
    "n_experts": ("num_local_experts", "num_experts"),
}


def parse_config(data: Any) -> Config:
    """Read a parsed `config.json`, or a dictionary of the same keys for a module that has no such file.

    Keys that are absent take the class's defaults, and `assumed` says so, as it does of keys that are not read.

    Raises:
        ValueError: it is not a valid configuration; the message names the remedy.
        UnknownArchitecture: it is, of a class without a prediction.

    >>> ours = parse_config({"model_type": "gpt2", "n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": 256})
    >>> ours.architecture.d_ffn, ours.architecture.tied, ours.assumed[1]
    (1536, True, "activation_function = gelu_new (the class's default)")
    >>> parse_config({"model_type": "gpt2", "n_embd": 384, "n_layers": 6, "n_head": 6})
    Traceback (most recent call last):
    ValueError: n_layers is not a key of gpt2; did you mean n_layer?
    """
    if not isinstance(data, dict):
        raise ValueError(f'the config is a JSON {_json_kind(data)}, not an object; write it as {{"model_type": ...}}')
    if "model_type" not in data:
        raise ValueError(f"the config has no 'model_type'; add one of {KNOWN}")
    kind = data["model_type"]
    if not isinstance(kind, str):
        raise ValueError(f"model_type={kind!r} is not a name; use one of {KNOWN}")
    if kind not in CLASSES:
        reason = " ".join(filter(None, (f"model_type {kind!r} has no prediction yet;", _meant(kind))))
        raise UnknownArchitecture(f"{reason} there is one for {KNOWN}")
    if data.get("per_layer_config"):
        raise UnknownArchitecture("per_layer_config is given; predictions cover layers of one kind")
    reader = Reader(data, ALIASES.get(kind))
    try:
        architecture = CLASSES[kind](reader)
    except ValueError as error:
        raise ValueError(_slip(reader, kind) or as_typed(str(error), _keys(data))) from None
    if slip := _slip(reader, kind):
        raise ValueError(slip)
    strange = [table.place + key for table, known in _tables(reader, kind) for key in _strange(table, known)]
    left_out = [f"not read: {', '.join(map(_printed, strange))}"] if strange else []
    return Config(architecture, (*reader.assumed, *left_out, f"{AS_CLASS} the {kind} class does"))


def read_config(path: Path) -> Config:
    """Read a `config.json` from disk, or from the folder that holds it.

    Raises:
        ValueError: missing, unreadable or not JSON.
    """
    return parse_config(read_json(path))


def read_json(path: Path) -> Any:
    """What a `config.json`, or the one in a folder, holds.

    Raises:
        ValueError: missing, unreadable or not JSON.
    """
    if os.path.isdir(path):  # unlike Path.is_dir, false for a name that is too long
        path = path / "config.json"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; give a preset or the path of a config.json") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"cannot read {path}: {reason}; give a readable config.json") from None
    try:
        return json.loads(text, object_pairs_hook=_table)
    except _Twice as error:
        raise ValueError(f"{path} has the key {error} twice; write it once") from None
    except (ValueError, RecursionError) as error:
        detail = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
        raise ValueError(f"{path} is not valid JSON ({detail}); fix it and try again") from None


class _Twice(Exception):
    """A key that a table of JSON has twice: which of them counts is anyone's guess."""


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Twice(brief(key))
        found[key] = value
    return found


def _meant(kind: str) -> str:
    """A class whose name this may be a slip for; another number is no slip but another generation."""
    numbers = re.findall(r"\d", kind)
    return meant(kind, [name for name in CLASSES if re.findall(r"\d", name) == numbers], close=SLIP)


def _tables(reader: Reader, kind: str) -> Iterator[tuple[Reader, frozenset[str]]]:
    """The file's own table and those in it that were read, each with the keys that it may have unread."""
    yield reader, KEYS[kind] | HARMLESS
    nested = list(reader.tables.values())
    while nested:
        table = nested.pop(0)
        yield table, TABLES
        nested += table.tables.values()


def _strange(table: Reader, known: frozenset[str]) -> list[str]:
    """The keys of a table that were not read and are not known."""
    return [key for key in map(str, table.data) if key not in table.data.names | known]


def _slip(reader: Reader, kind: str) -> str:
    """One line for a key that must be a slip for one that is read and not there; empty if there is none.

    What is read may end early, at a wrong value; an older name, to be read later, is no slip.
    """
    for table, known in _tables(reader, kind):
        names = {*table.aliases.items(), *((other, key) for key, other in table.aliases.items())}
        there = {key for key, other in names if other in table.data.table} | {*table.data}
        absent = sorted(table.data.names - there)
        for key in _strange(table, known | OLDER.union(table.aliases, table.aliases.values())):
            if question := meant(key, absent, close=KEY_SLIP):
                return f"{_printed(table.place + key)} is not a key of {kind}; {question}"
    return ""


def _printed(key: str) -> str:
    """A key as it stands on one line."""
    return key if key.isprintable() else repr(key)


def _keys(data: Mapping[str, Any]) -> dict[str, str]:
    """The keys of a file by what the code calls them, where those are not keys themselves."""
    found = {ours: [key for key in keys if key in data] for ours, keys in NAMES.items() if ours not in data}
    return {ours: keys[0] for ours, keys in found.items() if keys}


def _json_kind(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), "value")
