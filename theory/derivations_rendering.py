"""Derivations in print: text for a terminal, Markdown, and LaTeX that matplotlib's mathtext can draw as well."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from itertools import groupby
from typing import Any, Literal

import sympy as sp  # pyright: ignore[reportMissingTypeStubs]
from sympy.printing.latex import LatexPrinter  # pyright: ignore[reportMissingTypeStubs]
from sympy.printing.precedence import PRECEDENCE  # pyright: ignore[reportMissingTypeStubs]
from sympy.printing.str import StrPrinter  # pyright: ignore[reportMissingTypeStubs]

from theory.derivation import Derivation, Step
from theory.derivations_expressions import letters
from theory.letters import local_letter
from theory.symbols import SYMBOLS, latex_names

_Latex: Any = LatexPrinter
_Text: Any = StrPrinter
_sp: Any = sp

SIGNS = {"=": "=", "<=": r"\leq", "~=": r"\simeq", "~": r"\approx", "<~": r"\lesssim"}
_WIDTH = 110
_LATEX_WIDTH = 180
_WIDEST = 130  # characters of a line's text, beyond which its LaTeX does not fit on a page


def _negative_last(expr: Any) -> list[Any]:
    """Terms as they were written, but d - 2 instead of -2 + d."""
    terms = list(expr.args)
    return terms[1:] + terms[:1] if terms[0].could_extract_minus_sign() else terms


class PaperLatex(_Latex):  # pyright: ignore[reportUntypedBaseClass]
    """Sympy's LaTeX with the paper's letters, inside the commands that mathtext knows."""

    def __init__(self) -> None:
        super().__init__({"symbol_names": letters(), "order": "none"})  # pyright: ignore[reportUnknownMemberType]

    def _as_ordered_terms(self, expr: Any, order: Any = None) -> list[Any]:
        return _negative_last(expr)

    def parenthesize(self, item: Any, level: Any, is_neg: bool = False, strict: bool = False) -> str:
        if _is_power_of_product(item, level):
            return rf"\left( {self._print(item)} \right)"
        return str(super().parenthesize(item, level, is_neg, strict))

    def _print_Norm(self, expr: Any, exp: str | None = None) -> str:
        return _power(rf"\left\| {self._print(expr.args[0])} \right\|", exp)

    def _print_Transposed(self, expr: Any, exp: str | None = None) -> str:
        body = self._print(expr.args[0])
        # A prime or a power already sits where the sign of the transpose goes.
        return (
            rf"\left( {body} \right)^{{\top}}"
            if not expr.args[0].is_Symbol or "'" in body or "^" in body
            else rf"{body}^{{\top}}"
        )

    def _over(self, command: str, expr: Any, exp: str | None) -> str:
        body, index = expr.args
        inner = self._print(body)
        if body.is_Add or (exp is not None):
            inner = rf"\left( {inner} \right)"
        return _power(rf"{command}_{{{self._print(index)}}} {inner}", exp)

    def _print_SumOver(self, expr: Any, exp: str | None = None) -> str:
        return self._over(r"\sum", expr, exp)

    def _print_MaxOver(self, expr: Any, exp: str | None = None) -> str:
        return self._over(r"\max", expr, exp)

    def _print_ProductOver(self, expr: Any, exp: str | None = None) -> str:
        return self._over(r"\prod", expr, exp)

    def _tail(self, sign: str, expr: Any, exp: str | None) -> str:
        degrees, value = (self._print(argument) for argument in expr.args)
        return _power(rf"P\left( \chi^2_{{{degrees}}} {sign} {value} \right)", exp)

    def _print_ChiSquareAbove(self, expr: Any, exp: str | None = None) -> str:
        return self._tail(r"\geq", expr, exp)

    def _print_ChiSquareBelow(self, expr: Any, exp: str | None = None) -> str:
        return self._tail(r"\leq", expr, exp)

    def _print_harmonic(self, expr: Any, exp: str | None = None) -> str:
        return _power(rf"H_{{{self._print(expr.args[0])}}}", exp)

    def _print_exp(self, expr: Any, exp: str | None = None) -> str:
        return _power(rf"e^{{{self._print(expr.args[0])}}}", exp)

    def _print_Function(self, expr: Any, exp: str | None = None) -> str:
        if str(expr.func) == "cesaro_opnorm":
            return _power(rf"\|C_{{{self._print(expr.args[0])}}}\|", exp)
        name = letters().get(expr.func, str(expr.func))
        if len(name) > 1 and "\\" not in name:
            head, _, index = name.partition("_")
            name = rf"\mathrm{{{head}}}" + (rf"_{{\mathrm{{{index.replace('_', ' ')}}}}}" if index else "")
        inner = ", ".join(self._print(argument) for argument in expr.args)
        return _power(rf"{name}\left( {inner} \right)", exp)

    def _print_Symbol(self, expr: Any, style: str = "plain") -> str:
        letter = letters().get(expr)
        if letter is None:
            return str(_Latex._print_Symbol(self, expr))
        # A letter that is itself a product or a maximum must not swallow its neighbours.
        return rf"\left[ {letter} \right]" if letter.startswith(r"\max") else letter


def _power(body: str, exp: str | None) -> str:
    return body if exp is None else rf"{body}^{{{exp}}}"


class PaperText(_Text):  # pyright: ignore[reportUntypedBaseClass]
    """One line of ASCII, with |A| for norms and A^T for transposes."""

    def __init__(self) -> None:
        super().__init__({"order": "none"})  # pyright: ignore[reportUnknownMemberType]

    def _as_ordered_terms(self, expr: Any, order: Any = None) -> list[Any]:
        return _negative_last(expr)

    def parenthesize(self, item: Any, level: Any, strict: bool = False) -> str:
        if _is_power_of_product(item, level):
            return f"({self._print(item)})"
        return str(super().parenthesize(item, level, strict))

    def _print_Norm(self, expr: Any) -> str:
        return f"|{self._print(expr.args[0])}|"

    def _print_Transposed(self, expr: Any) -> str:
        body = self._print(expr.args[0])
        return f"{body}^T" if body.isidentifier() or body.isdigit() else f"({body})^T"

    def _over(self, word: str, expr: Any) -> str:
        index = self._print(expr.args[1])
        index = index if index.isidentifier() else f"{{{index}}}"
        return f"{word}_{index} {self.parenthesize(expr.args[0], PRECEDENCE['Mul'])}"

    def _print_SumOver(self, expr: Any) -> str:
        return self._over("sum", expr)

    def _print_MaxOver(self, expr: Any) -> str:
        return self._over("max", expr)

    def _print_ProductOver(self, expr: Any) -> str:
        return self._over("prod", expr)

    def _print_ChiSquareAbove(self, expr: Any) -> str:
        return f"P(chi^2_{self._print(expr.args[0])} >= {self._print(expr.args[1])})"

    def _print_ChiSquareBelow(self, expr: Any) -> str:
        return f"P(chi^2_{self._print(expr.args[0])} <= {self._print(expr.args[1])})"

    def _print_harmonic(self, expr: Any) -> str:
        return f"H_{self._print(expr.args[0])}"

    def _print_GoldenRatio(self, expr: Any) -> str:
        return "phi"

    def _print_Min(self, expr: Any) -> str:
        return f"min({', '.join(self._print(argument) for argument in expr.args)})"

    def _print_Max(self, expr: Any) -> str:
        return f"max({', '.join(self._print(argument) for argument in expr.args)})"

    def _print_Function(self, expr: Any) -> str:
        if str(expr.func) == "cesaro_opnorm":
            return f"|C_{self._print(expr.args[0])}|"
        return f"{expr.func}({', '.join(self._print(argument) for argument in expr.args)})"

    def _print_Symbol(self, expr: Any) -> str:
        if expr not in latex_names():
            return str(expr.name)
        letter = plain(latex_names()[expr])
        return f"[{letter}]" if letter.startswith("max") else letter


def is_product(atom: Any) -> bool:
    """Whether a symbol's letter is several factors, of which a power would seem to be of the last alone."""
    words = text(atom)
    return " " in re.sub(r"\|[^|]*\||\([^)]*\)|\{[^}]*\}|\[.*\]", "", words)


def _is_power_of_product(item: Any, level: Any) -> bool:
    return item.is_Symbol and level >= PRECEDENCE["Pow"] and is_product(item)


def plain(latex: str) -> str:
    r"""A LaTeX letter in ASCII; an accent is spelled out behind its letter.

    >>> plain(r"\sigma_{x'}"), plain(r"d_{\mathrm{ffn}}"), plain(r"\|W_1\|")
    ("sigma_x'", 'd_ffn', '|W_1|')
    >>> plain(r"\tilde W_V"), plain(r"\bar P"), plain(r"\|B_j\|^{1/2}"), plain(r"\sum_{v_t = v} \kappa_t^2")
    ('Wtilde_V', 'Pbar', '|B_j|^(1/2)', 'sum_{v_t = v} kappa_t^2')
    """
    bare = latex.replace(r"\|", "|").replace(r"\infty", "inf")
    bare = re.sub(r"\\(tilde|bar|hat) (\w)", r"\2\1", bare)
    bare = re.sub(r"\\(?:mathrm|mathcal)|\\", "", bare)
    bare = re.sub(r"\{([\w']+)\}", r"\1", bare)  # an index of one word needs no braces
    bare = re.sub(r"\{([\w']+)\}", r"\1", bare)
    return re.sub(r"\^\{([^{}]*)\}", r"^(\1)", bare)


def latex(expression: Any) -> str:
    """An expression in LaTeX, with the paper's letters."""
    return str(PaperLatex().doprint(expression))


def text(expression: Any) -> str:
    """An expression on one line."""
    return str(PaperText().doprint(expression)).replace("**", "^").replace("*", " ")


def formula(step: Step, style: Literal["text", "latex"] = "latex") -> str:
    """A step's line: left, relation, right."""
    if style == "text":
        return f"{text(step.left)} {step.relation} {text(step.right)}"
    return f"{latex(step.left)} {SIGNS[step.relation]} {latex(step.right)}"


def _numbers(chain: Derivation, step: Step) -> str:
    """Which lines a composed step puts together, by number."""
    places = [number for number, other in enumerate(chain.steps, start=1) if any(other is used for used in step.uses)]
    return f" of {', '.join(map(str, places))}" if places else ""


def _reason(chain: Derivation, step: Step) -> str:
    accuracy = f" ({step.accuracy})" if step.accuracy else ""
    return f"{step.rule}{_numbers(chain, step)} [{step.kind}; {step.source}]. {step.explanation}{accuracy}"


def legend(chain: Derivation) -> list[tuple[Any, str]]:
    """Every symbol of a derivation with its meaning, in the order of their text."""
    atoms: set[Any] = set().union(*(step.left.free_symbols | step.right.free_symbols for step in chain.steps))
    shared = set(latex_names())
    meanings = {
        atom: SYMBOLS[str(atom)].meaning if atom in shared else local_letter(atom, chain.name).meaning for atom in atoms
    }
    return sorted(meanings.items(), key=lambda found: (text(found[0]).lower(), text(found[0])))


def _target(chain: Derivation) -> str:
    if not chain.statement:
        return ""
    return f"residual({chain.statement})" if chain.shortcut else chain.statement


def render_text(chain: Derivation) -> str:
    """Numbered lines, the reason under each."""
    lines = [chain.title, "=" * len(chain.title), f"kind: {chain.kind}"]
    if _target(chain):
        lines.append(f"arrives at: {_target(chain)}")
    lines += [f"assumes: {assumption}" for assumption in chain.assumptions]
    for number, step in enumerate(chain.steps, start=1):
        lines += ["", f"({number})  {formula(step, 'text')}"]
        lines += textwrap.wrap(_reason(chain, step), _WIDTH, initial_indent="     ", subsequent_indent="     ")
    lines += ["", "letters:"]
    for atom, meaning in legend(chain):
        lines += textwrap.wrap(f"{text(atom)}: {meaning}", _WIDTH, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(lines) + "\n"


def math_block(latex: str) -> list[str]:
    """A formula for GitHub's Markdown; inside a fence nothing else is read as markup."""
    return ["```math", latex, "```"]


def markdown_words(words: str) -> str:
    r"""Plain words for Markdown.

    >>> markdown_words("2 * 3 < 7, W_1 <b>")
    '2 \\* 3 < 7, W_1 \\<b>'
    """
    return re.sub(r"([*`]|<(?=[A-Za-z/!])|(?<![\w)'])_)", r"\\\1", words)


def render_markdown(chain: Derivation, heading: str = "") -> str:
    """A heading, then a formula and its reason for each line."""
    about = f"Kind: **{chain.kind}**."
    if _target(chain):
        about += f" Arrives at `{_target(chain)}`."
    lines = [heading or f"## {chain.title}", "", about]
    if chain.assumptions:
        lines += ["", "Assumes:", "", *(f"- {markdown_words(assumption)}" for assumption in chain.assumptions)]
    for number, step in enumerate(chain.steps, start=1):
        lines += ["", f"**({number})** {markdown_words(_reason(chain, step))}", "", *math_block(formula(step))]
    meant = (f"$`{latex(atom)}`$ {markdown_words(meaning)}" for atom, meaning in legend(chain))
    lines += ["", f"Letters: {'; '.join(meant)}."]
    return "\n".join(lines) + "\n"


def _displays(chain: Derivation) -> list[str]:
    """The numbered lines: aligned, but for one that is wider than a page, which is shrunk to it."""
    lines: list[str] = []
    for wide, group in groupby(chain.steps, lambda step: len(formula(step, "text")) > _WIDEST):
        steps = list(group)
        if wide:
            shrunk = (rf"  \resizebox{{0.92\linewidth}}{{!}}{{$\displaystyle {formula(step)}$}}" for step in steps)
            lines += [line for row in shrunk for line in (r"\begin{equation}", row, r"\end{equation}")]
            continue
        rows = [f"  {latex(step.left)} &{SIGNS[step.relation]} {latex(step.right)}" for step in steps]
        if max(map(len, rows)) <= _LATEX_WIDTH:  # a line that fills the page leaves the rules to the list below
            rows = [rf"{row} && \text{{{escape(step.rule)}}}" for row, step in zip(rows, steps, strict=True)]
        rows[:-1] = [rf"{row} \\" for row in rows[:-1]]
        lines += [r"\begin{align}", *rows, r"\end{align}"]
    return lines


def render_latex(chain: Derivation) -> str:
    """Numbered lines, one for each step, then the reasons and the letters."""
    lines = [rf"\paragraph{{{escape(chain.title)}}} Kind: {chain.kind}."]
    if _target(chain):
        lines.append(rf"Arrives at \texttt{{{escape(_target(chain))}}}.")
    if chain.assumptions:
        lines.append("Assumes: " + "; ".join(escape(assumption) for assumption in chain.assumptions) + ".")
    lines += [*_displays(chain), r"\begin{enumerate}"]
    lines += [rf"  \item {escape(_reason(chain, step))}" for step in chain.steps]
    meant = (f"${latex(atom)}$ {escape(meaning)}" for atom, meaning in legend(chain))
    return "\n".join([*lines, r"\end{enumerate}", f"Letters: {'; '.join(meant)}."]) + "\n"


_ESCAPES: dict[str, str] = {
    **{character: rf"\{character}" for character in "_%&#"},
    **{character: f"${character}$" for character in "|<>"},
    **{"^": r"\^{}", "~": r"$\sim$"},
}


def escape(words: str) -> str:
    r"""Plain words for LaTeX.

    >>> escape("W_1 within 10 %")
    'W\\_1 within 10 \\%'
    """
    return "".join(_ESCAPES.get(character, character) for character in words)


RENDERERS: dict[str, Callable[[Derivation], str]] = {
    "text": render_text,
    "markdown": render_markdown,
    "latex": render_latex,
}
