"""Letters: every symbol has a meaning and a range, values stay in the range, and no two are printed alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import sympy as sp

from theory import statements
from theory.derivation import DERIVATIONS, Step, derivation, equal, known_functions, render
from theory.derivations_expressions import Values, array, entry
from theory.derivations_rendering import is_product, latex, legend, plain, text
from theory.letters import ANY, AT_LEAST_0, COLUMN, INDEX, MATRIX, UNIT, local_keys, local_letter
from theory.statements import catalogue
from theory.symbols import FUNCTIONS, SYMBOLS, function_entry, symbol

NAMES = tuple(DERIVATIONS)
SHARED = {symbol(name): entry for name, entry in SYMBOLS.items()}
PRINTERS: dict[str, Callable[[Any], str]] = {"text": text, "markdown and latex": latex}
STANDARD = (sp.exp, sp.log, sp.tanh, sp.erf, sp.gamma, sp.Min, sp.Max)
ROUNDING = 1e-12

RANGES: dict[str, Callable[[Any], bool]] = {
    ANY: lambda value: np.ndim(value) == 0,
    AT_LEAST_0: lambda value: np.ndim(value) == 0 and value >= 0,
    "> 0": lambda value: value > 0,
    UNIT: lambda value: np.ndim(value) == 0 and -ROUNDING <= value <= 1 + ROUNDING,
    "0 or 1": lambda value: value in (0, 1),
    "0, 1 or 2": lambda value: value in (0, 1, 2),
    "integer >= 1": lambda value: value >= 1 and value == round(value),
    MATRIX: lambda value: np.ndim(value) == 2,
    COLUMN: lambda value: np.ndim(value) == 2 and np.shape(value)[1] == 1,
    INDEX: lambda value: True,
}


def sides(name: str) -> Iterator[tuple[Step, Any]]:
    for step in derivation(name).steps:
        yield step, step.left
        yield step, step.right


def range_of(atom: Any, name: str) -> str:
    return SHARED[atom].values if atom in SHARED else local_letter(atom, name).range


def parts(expression: Any) -> Iterator[Any]:
    """Every subexpression but the products and sums that a line's layout alone makes."""
    yield from sp.preorder_traversal(known_functions(expression))


@pytest.mark.parametrize("form", PRINTERS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_printed_alike_is_the_same(name: str, form: str) -> None:
    """Symbols, and everything that is made of them: two of a chain that read alike are equal."""
    printed: dict[str, list[Any]] = defaultdict(list)
    for _, side in sides(name):
        for part in parts(side):
            found = printed[PRINTERS[form](part).replace(r"\left[", "").replace(r"\right]", "").strip("[] ")]
            if part not in found:
                found.append(part)
    for words, (first, *others) in printed.items():
        for other in others:
            assert not (first.is_Symbol and other.is_Symbol), f"{first!r} and {other!r} are both printed as {words}"
            assert first.is_commutative == other.is_commutative, words
            assert equal(first, other), words


def test_the_test_tells_letters_apart() -> None:
    """What had been printed alike: an accent was dropped in text, a head's index was the number of heads."""
    for one, other in (("opnorm_V", "opnorm_VH"), ("opnorm_P", "opnorm_P_mean"), ("d", "d_head")):
        assert text(symbol(one)) != text(symbol(other))
    assert text(symbol("n_heads")) != text(entry("h"))
    assert latex(symbol("n_heads")) != latex(entry("h"))
    for printer in PRINTERS.values():
        printed = [printer(symbol(name)) for name in SYMBOLS]
        assert len(set(printed)) == len(printed)
    assert text(symbol("opnorm_OV")) == "|W_O Wtilde_V|"
    assert text(symbol("P_deviation")) == "[max_h |P_h - Pbar|]"
    assert plain(r"\max_{e,e'} \|w_e - w_{e'}\|") == "max_{e,e'} |w_e - w_e'|"


@pytest.mark.parametrize("name", NAMES)
def test_a_letter_that_is_a_product_stands_by_itself(name: str) -> None:
    """Neither a power nor a denominator may be read as of its last factor alone."""
    for _, side in sides(name):
        for power in side.atoms(sp.Pow):
            if power.base.is_Symbol and is_product(power.base) and power.exp != sp.Rational(1, 2):
                assert power.exp > 0
                assert text(power).startswith("(")
                assert latex(power).startswith(r"\left(")


def test_powers_of_products_are_bracketed() -> None:
    assert {atom for atom in SHARED if is_product(atom)} == {symbol("c_VO"), symbol("position_weight")}
    assert text(symbol("c_VO") ** 2) == "(c_V c_O)^2"
    assert latex(symbol("c_VO") ** 2) == r"\left( c_V c_O \right)^{2}"
    assert text(sp.sqrt(symbol("c_VO"))) == "sqrt(c_V c_O)"
    assert text(symbol("sigma_xp") ** 2 * symbol("c_VO")) in ("c_V c_O sigma_x'^2", "sigma_x'^2 c_V c_O")


@pytest.mark.parametrize("name", NAMES)
def test_every_letter_of_a_derivation_has_a_meaning(name: str) -> None:
    meanings = dict(legend(derivation(name)))
    for _, side in sides(name):
        assert side.free_symbols <= meanings.keys()
        for part in sp.preorder_traversal(known_functions(side)):
            if part.is_Function and not isinstance(part, STANDARD):
                assert function_entry(str(part.func)).meaning
    assert all(meaning.isascii() and meaning for meaning in meanings.values())
    for style in ("text", "markdown", "latex"):
        assert render(derivation(name), style).lower().count("letters:") == 1


@pytest.mark.parametrize("name", catalogue())
def test_every_letter_of_a_statement_has_a_meaning(name: str) -> None:
    expression = catalogue()[name].expression
    assert {str(atom) for atom in expression.free_symbols} <= SYMBOLS.keys()
    own = statements._REGISTRY[name].__module__.removeprefix("theory.") in statements.STATEMENT_MODULES
    for part in sp.preorder_traversal(known_functions(expression)):
        # A file of one's own, theory/bounds_NAME.py, may name a function that it alone explains.
        if own and part.is_Function and not isinstance(part, STANDARD):
            assert function_entry(str(part.func)).meaning


def drawn(values: Values) -> Iterator[tuple[Any, Any]]:
    """Symbols with their values, at every position of an index too."""
    for atom, value in values.items():
        if getattr(atom, "is_Symbol", False):
            yield atom, value
        for more in value if isinstance(value, list) else ():
            yield from drawn(more)


@pytest.mark.parametrize("name", NAMES)
def test_values_are_in_their_range(name: str) -> None:
    for step in derivation(name).steps:
        for sample in (step.sample, step.tight):
            for atom, value in drawn(sample(np.random.default_rng(3)) if sample else {}):
                used = atom in step.left.free_symbols | step.right.free_symbols
                range = range_of(atom, name) if used else INDEX
                assert RANGES[range](value), f"{atom} = {value} is not {range}"


def test_no_letter_is_left_over() -> None:
    used: set[str] = set()
    for name in NAMES:
        for _, side in sides(name):
            for atom in side.free_symbols - SHARED.keys():
                dot = "" if atom.is_commutative else "."
                keys = {f"{dot}{name}:{atom}", f"{dot}{atom}"}
                used |= keys & local_keys() if f"{dot}{name}:{atom}" not in local_keys() else {f"{dot}{name}:{atom}"}
    assert local_keys() == used
    assert {entry.values for entry in SYMBOLS.values()} <= RANGES.keys()


def test_an_unknown_letter_is_refused() -> None:
    for made, file in ((array("unheard_of"), "letters_arrays"), (entry("unheard_of"), "letters")):
        with pytest.raises(ValueError, match=rf"add it to theory/{file}\.py"):
            local_letter(made, "ffn")
    with pytest.raises(ValueError, match=r"add it to theory\.symbols"):
        function_entry("unheard_of")
    assert function_entry("gated_edge_gelu_tanh") is FUNCTIONS["gated_edge_*"]
    assert function_entry("edge_relu") is FUNCTIONS["edge_*"]
