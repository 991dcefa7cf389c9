"""Typed access to the keys of a Hugging Face `config.json`; every bad value is refused in one line with its remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from theory.architecture import LARGEST_SIZE, Activation
from theory.words import brief

T = TypeVar("T")
LARGEST_LIST = 100_000  # layers that a list of layers may name
LEAST_SPREAD = 1e-9  # as far below 1 as the largest standard deviation is above it


class UnknownArchitecture(Exception):
    """The file is a fine configuration of something that this project has no prediction for."""


ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "relu2": "relu-squared",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu_python_tanh": "gelu-tanh",
    "gelu_accurate": "gelu-tanh",
    "gelu_fast": "gelu-tanh",
    "silu": "silu",
    "swish": "silu",
    "linear": "identity",
}


class Asked(Mapping[str, Any]):
    """A table that remembers which of its keys were asked for, be they there or not."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self.table = table
        self.names: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.names.add(key)
        return self.table[key]

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return key in self.table

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)


class Reader:
    """A configuration's keys; one that is absent takes its class's default, which `assumed` remembers.

    Args:
        data: the parsed file.
        aliases: other names that a class takes for a key.
        place: where a nested table stands, for messages.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        aliases: Mapping[str, str] | None = None,
        *,
        place: str = "",
        assumed: list[str] | None = None,
    ) -> None:
        self.data = Asked(data)
        self.tables: dict[str, Reader] = {}  # the nested ones that were read
        self.aliases: Mapping[str, str] = aliases or {}
        self.place = place
        self.assumed: list[str] = [] if assumed is None else assumed

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.data.get(key) is not None

    def integer(
        self, key: str, default: int | None = None, *, null: int | None = None, quiet: bool = False, lowest: int = 1
    ) -> int:
        """A whole number; `null` is what the class makes of a null (the default, unless given)."""
        name, present, value = self._find(key)
        if value is None:
            if null is not None and present:
                return null
            if default is None:
                raise ValueError(f"the config has no {name!r}; add it as a positive integer")
            return default if quiet else self._assume(name, default)
        return _integer(name, value, lowest=lowest)

    def number(self, key: str, default: float, *, positive: bool = False) -> float:
        name, _, value = self._find(key)
        return self._assume(name, default) if value is None else _number(name, value, positive=positive)

    def optional_number(self, key: str, default: float | None, *, quiet: bool = False) -> float | None:
        """A positive number, or null for none."""
        name, present, value = self._find(key)
        if value is None:
            return None if present else default if quiet else self._assume(name, default)
        return _number(name, value, positive=True, remedy="null for none")

    def optional_integer(self, key: str, default: int | None) -> int | None:
        """A whole number from 1, or null for none."""
        name, present, value = self._find(key)
        if value is None:
            return None if present else self._assume(name, default)
        return _integer(name, value, remedy="null for none")

    def spread(self, key: str = "initializer_range", default: float = 0.02) -> float:
        """The standard deviation that a class's weights are drawn with."""
        name, _, value = self._find(key)
        return self._assume(name, default) if value is None else _number(name, value, lowest=LEAST_SPREAD)

    def flag(self, key: str, default: bool, *, quiet: bool = False) -> bool:
        """True or false; null is false, as it is to the classes."""
        name, present, value = self._find(key)
        if value is None:
            return False if present else default if quiet else self._assume(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name}={brief(value)} is not true or false; write true or false without quotes")
        return value

    def activation(self, key: str, default: str, *, also: Mapping[str, Activation] | None = None) -> Activation:
        """An activation by its name in transformers; `also` is what this class reads differently."""
        known: dict[str, Activation] = {**ACTIVATIONS, **(also or {})}
        value: Any = self.data[key] if key in self.data else self._assume(key, default)
        if not isinstance(value, str):
            raise ValueError(f"{key}={brief(value)} is not a name; use one of {', '.join(known)}")
        if value not in known:
            raise UnknownArchitecture(f"{key} is {brief(value)}; predictions exist for {', '.join(known)}")
        return known[value]

    def padding_row(self, default: int | None, vocab_size: int) -> bool:
        """Whether the class zeroes the padding token's row: it does where there is such a token."""
        key = "pad_token_id"
        value = self.data[key] if key in self.data else self._assume(key, default)
        if value is None:
            return False
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{key}={brief(value)} is not a token; write a whole number, or null for none")
        if not -vocab_size <= value < vocab_size:
            raise ValueError(
                f"{key}={brief(value)} is not a token of a vocabulary of {vocab_size}; "
                f"use 0 to {vocab_size - 1}, or null"
            )
        return True

    def table(self, *keys: str) -> Reader:
        """The first of these nested tables that is there and not empty; an empty one otherwise."""
        for key in keys:
            value = self.data.get(key)
            if value is None:
                continue
            if not isinstance(value, dict):
                raise ValueError(f"{self.place}{key}={brief(value)} is not a table; write it as {{...}}, or null")
            if value:
                nested = Reader(value, place=f"{self.place}{key}.", assumed=self.assumed)  # pyright: ignore[reportUnknownArgumentType]
                return self.tables.setdefault(key, nested)
        return Reader({}, place=self.place + keys[-1] + ".", assumed=self.assumed)

    def per_layer(self, key: str, n_layers: int, *, longer: bool = False) -> list[Any] | None:
        """A list with an entry a layer; None where there is none."""
        value: Any = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise ValueError(f"{key}={brief(value)} is not a list; write one entry a layer, or null")
        entries: list[Any] = value  # pyright: ignore[reportUnknownVariableType]
        if len(entries) != n_layers and not (longer and len(entries) > n_layers):
            raise ValueError(f"{key} has {len(entries)} entries for {n_layers} layers; write one entry a layer")
        if n_layers > LARGEST_LIST:
            raise ValueError(f"{key} names {n_layers} layers; use at most {LARGEST_LIST}")
        return entries[:n_layers]

    def expect(self, key: str, usual: bool, why: str) -> None:
        """Predictions exist only for this value of a flag."""
        if self.flag(key, usual) is not usual:
            raise UnknownArchitecture(f"{key} is {str(not usual).lower()}; predictions cover {why}")

    def ignored(self, key: str, acts_as: Any) -> None:
        """Note a value that the class has a key for and never looks at."""
        if key in self.data and self.data[key] != acts_as:
            value = self.data[key]
            self.note(f"{self.place}{key} = {_show(value)} is ignored by the class, which acts as if {_show(acts_as)}")

    def note(self, text: str) -> None:
        self.assumed.append(text)

    def _find(self, key: str) -> tuple[str, bool, Any]:
        """The name that the file uses for a key, in full, whether it is there, and its value."""
        other = self.aliases.get(key)
        if other is None or other not in self.data:
            return self.place + key, key in self.data, self.data.get(key)
        if key in self.data and self.data[key] != self.data[other]:
            raise ValueError(
                f"{key}={brief(self.data[key])} and {other}={brief(self.data[other])} disagree; give one of them"
            )
        return other, True, self.data[other]

    def _assume(self, name: str, default: T) -> T:
        self.note(f"{name} = {_show(default)} (the class's default)")
        return default


def _integer(name: str, value: Any, *, lowest: int = 1, remedy: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(
            f"{name}={brief(value)} is not an integer; write it as a whole number without quotes or a point"
        )
    if not lowest <= value <= LARGEST_SIZE:
        range_ = f"at least {lowest}" if value < lowest else f"at most {LARGEST_SIZE}"  # an upper end may be less
        raise ValueError(f"{name}={brief(value)} is out of range; use {range_}{', or ' * bool(remedy)}{remedy}")
    return value


def _number(name: str, value: Any, *, positive: bool = False, lowest: float = 0, remedy: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}={brief(value)} is not a number; write it as a number without quotes")
    if not lowest <= value <= LARGEST_SIZE or (positive and value == 0):  # also false for NaN
        least = "a number above 0, up" if positive else f"{lowest:g}"
        raise ValueError(
            f"{name}={brief(value)} is out of range; use {least} to {LARGEST_SIZE}{', or ' * bool(remedy)}{remedy}"
        )
    return float(value)


def _show(value: Any) -> str:
    """As JSON writes it, and short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
