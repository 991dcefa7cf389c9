"""A bench for every quantity that an upper bound speaks of: tiny sub-layers drawn to attack it, and its true value.

A bound on a known quantity needs nothing here. A bound on a new quantity needs one `Bench` (`BENCH_MODULES` have
them); a symbol that its bench does not supply needs one function, `(module, input) -> {symbol: value}`, listed in
the bench's `symbols`; a new variant of a sub-layer needs one line in the bench's `choices`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from empirics.adversaries import SPREADS, Style, draw_input, draw_parameter
from theory.architecture import Architecture

Choices = Mapping[str, Any]
Covers = Mapping[str, tuple[Any, ...]]
Observer = Callable[[Any, Tensor], Mapping[str, Any]]

INPUT = "input"  # the input's name among a case's tensors
ATTEMPTS = 100


class Undefined(ValueError):
    """The quantity has no value here, for example where a normaliser is zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """How to build, observe and measure one quantity on sub-layers of a few dozen weights.

    Attributes:
        quantity: its name in `theory.quantities`.
        choices: what a case chooses and from what: sizes, fields of `Architecture`, any other variant.
            A choice that is itself a symbol of the theory supplies it.
        module: the sub-layer that the choices describe; the attack sets all its parameters.
        shape: shape of its input.
        truth: the true norm, as a tensor that carries gradients if the input asks for them.
        symbols: for each group of symbols the function that observes them on a module and an input, as tensors
            that carry gradients; a plain number is held fixed in a climb.
        rounding: absolute error of the truth and of the bound's symbols in float64, over and above a
            relative 1e-9: what cancellations leave. It may be too large, never too small.
        defined: whether the quantity has a value.
        several: whether a case has several tokens that matter to each other, so that the published tightness can
            tell such cases from those with one; None where the quantity is of one token at a time.
        lawful: the weights follow a stated law and the bound holds with a probability, so that cases are
            drawn by that law and none is chosen.
    """

    quantity: str
    choices: Mapping[str, tuple[Any, ...]]
    module: Callable[[Choices], nn.Module]
    shape: Callable[[Choices], tuple[int, ...]]
    truth: Callable[[Any, Tensor], Tensor]
    symbols: Mapping[tuple[str, ...], Observer]
    rounding: Callable[[Any, Tensor], float] = lambda module, x: 0.0
    defined: Callable[[Any, Tensor], bool] = lambda module, x: True
    several: Callable[[Any, Tensor], bool] | None = None
    lawful: bool = False

    def options(self, covers: Covers) -> dict[str, tuple[Any, ...]]:
        """The choices that a statement covers.

        Raises:
            ValueError: it names something that does not exist, or leaves nothing.
        """
        for name in sorted(covers.keys() - self.choices.keys() - ARCHITECTURE):
            raise ValueError(
                f"covers names {name!r}, which neither Architecture nor the bench of {self.quantity} has; "
                f"use one of {', '.join(self.choices)}"
            )
        kept = {name: tuple(v for v in all_ if v in covers.get(name, all_)) for name, all_ in self.choices.items()}
        for name, values in kept.items():
            if not values:
                raise ValueError(
                    f"covers leaves no {name} that the bench of {self.quantity} builds; "
                    f"add one to its choices ({', '.join(map(str, self.choices[name]))})"
                )
        return kept

    def draw(
        self, random: Random, style: Style = "wild", covers: Covers | None = None, *, attempts: int = ATTEMPTS
    ) -> Case:
        """A case by chance.

        Raises:
            Undefined: none of the draws has a value.
        """
        options = self.options(covers or {})
        for _ in range(attempts):
            case = self._drawn(random, "plain" if self.lawful else style, options)
            if self.defined(*case.fitted()):
                return case
        raise Undefined(f"the bench of {self.quantity} drew no defined case in {attempts}; widen its choices")

    def _drawn(self, random: Random, style: Style, options: Mapping[str, tuple[Any, ...]]) -> Case:
        choices = {name: random.choice(values) for name, values in options.items()}
        module, spread = self.module(choices), random.choice(SPREADS) if style == "wild" else 0
        tensors = {INPUT: draw_input(random, style, self.shape(choices), spread)}
        for name, parameter in module.named_parameters():
            tensors[name] = draw_parameter(random, style, name, parameter.shape, spread)
        return Case(bench=self, choices=choices, tensors=tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A sub-layer by its choices and parameters, with its input: all that is needed to replay it."""

    bench: Bench
    choices: Choices
    tensors: Mapping[str, Tensor]

    def fitted(self) -> tuple[nn.Module, Tensor]:
        """The module with these very tensors as its parameters, so that gradients reach them; and the input."""
        module = self.bench.module(self.choices).double()
        for name, tensor in self.tensors.items():
            if name != INPUT:
                path, _, leaf = name.rpartition(".")
                owner = module.get_submodule(path)
                delattr(owner, leaf)  # a parameter would be a leaf of its own
                setattr(owner, leaf, tensor)
        return module, self.tensors[INPUT]

    def witness(self) -> dict[str, Any]:
        """JSON-ready, exact: Python writes a float64 with the digits that read back as the same number."""
        tensors = {name: tensor.tolist() for name, tensor in self.tensors.items()}
        return {"quantity": self.bench.quantity, "choices": dict(self.choices), "tensors": tensors}


def replay(witness: Any) -> Case:
    """The case that `Case.witness` wrote.

    Raises:
        ValueError: it is not one; the message says what is wrong with it.
    """
    if not isinstance(witness, dict) or not {"quantity", "choices", "tensors"} <= witness.keys():
        raise ValueError("not a witness; give the JSON that an attack printed")
    bench = find_bench(witness["quantity"])
    choices, given = witness["choices"], witness["tensors"]
    if not isinstance(choices, dict) or not isinstance(given, dict) or choices.keys() != bench.choices.keys():
        raise ValueError(f"a witness of {bench.quantity} needs the choices {', '.join(bench.choices)}; give them all")
    for name, value in choices.items():
        if value not in bench.choices[name]:
            raise ValueError(f"{name}={value!r} is not what the bench of {bench.quantity} builds; use its choices")
    shapes = {INPUT: bench.shape(choices)}
    shapes |= {name: tuple(parameter.shape) for name, parameter in bench.module(choices).named_parameters()}
    if given.keys() != shapes.keys():
        raise ValueError(f"a witness of {bench.quantity} with these choices needs {', '.join(shapes)}; give them all")
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        try:
            tensor = torch.tensor(given[name], dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(f"{name} of the witness is not an array of numbers; write nested lists") from None
        if tensor.shape != shape or not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} of the witness has shape {tuple(tensor.shape)}; give finite numbers, {shape}")
        tensors[name] = tensor
    case = Case(bench=bench, choices=choices, tensors=tensors)
    if not bench.defined(*case.fitted()):
        raise ValueError(f"{bench.quantity} is not defined at this witness; give another input")
    return case


# Modules that add benches; a new file is added here or calls `add_bench` itself.
BENCH_MODULES = ("bench_sublayers", "bench_attention", "bench_embedding", "bench_experts")
BENCHES: dict[str, Bench] = {}


def add_bench(bench: Bench) -> None:
    """Make a bench known by its quantity."""
    BENCHES[bench.quantity] = bench


def find_bench(quantity: Any) -> Bench:
    """The bench of a quantity.

    Raises:
        ValueError: there is none; the message says what to write.
    """
    for module in BENCH_MODULES:
        import_module(f"empirics.{module}")
    if not isinstance(quantity, str) or quantity not in BENCHES:
        raise ValueError(f"no bench draws {quantity}; write a Bench for it, as empirics/bench_sublayers.py does")
    return BENCHES[quantity]


ARCHITECTURE = {field.name for field in fields(Architecture)}
# A very small architecture: one layer, one head.
SMALL: dict[str, Any] = {
    "name": "small", "d_model": 4, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "d_head": 2, "d_ffn": 4,
    "vocab_size": 16, "context": 16, "positions": "none",
}  # fmt: skip


def small_architecture(choices: Choices) -> Architecture:
    """A very small architecture with those of the choices that are its fields."""
    return Architecture(**SMALL | {name: value for name, value in choices.items() if name in ARCHITECTURE})
