"""What `spikecheck derive` prints, and `docs/theory.md`: everything that is stated, from the objects that state it.

A statement that is registered has its page at once: the derivation that arrives at it, or else a page made of what the
statement says of itself.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterator

from theory.asymptotics import render_asymptotics
from theory.coverage import table
from theory.derivation import DERIVATIONS, Derivation, Format, Relation, derivation, known_functions, render
from theory.derivations_rendering import (
    SIGNS,
    escape,
    latex,
    markdown_words,
    math_block,
    render_markdown,
    text,
)
from theory.names import unknown
from theory.sources import REFERENCES
from theory.statements import Kind, Statement
from theory.statements import catalogue as registered
from theory.symbols import FUNCTIONS, SYMBOLS, symbol

LIMITS = "asymptotics"
COMMAND = "spikecheck derive --all --format markdown --out docs/theory.md"

# How a statement's kind reads between its two sides, and what it means.
RELATIONS: dict[Kind, Relation] = {"upper": "<=", "sharp": "~=", "estimate": "~"}
MEANINGS: dict[Kind, str] = {
    "upper": "True inequalities, given what each assumes. Tested with `<=` under attack.",
    "sharp": "The value itself at large width, from the configuration. Tested by its relative error against a target.",
    "estimate": "What the paper writes with `~`. It may be violated.",
}

# Left sides; a quantity that is not listed goes by its name.
LETTERS: dict[str, str] = {
    "norm_jacobian": r"\left\| \frac{\partial \mathrm{norm}}{\partial x} \right\|",
    "embedding_jacobian": r"\left\| J_E \right\|",
    "tied_jacobian": r"\left\| J_T \right\|",
    "softmax_jacobian": r"\left\| \frac{\partial p}{\partial \ell} \right\|",
    "matrix_opnorm": r"\left\| W \right\|",
    "attention_probability": r"\left\| P \right\|",
    "ffn_jacobian": r"\left\| \frac{\partial \mathrm{FFN}}{\partial u} \right\|",
    "ffn_branch": r"\left\| \frac{\partial \mathrm{FFN}(\mathrm{norm}(x'))}{\partial x'} \right\|",
    "attention_jacobian": r"\left\| \frac{\partial A}{\partial u} \right\|",
    "attention_branch": r"\left\| \frac{\partial A(\mathrm{norm}(x))}{\partial x} \right\|",
    "half_layer_jacobian": r"\left\| \frac{\partial y}{\partial x} \right\|",
    "gradient_growth": r"\frac{\| g_0 \|}{\| g_N \|}",
}

QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Where do eq. (15) and eq. (20) come from, line by line?", ("ffn", "attention", "gradient")),
    ("Where does the 2 of eq. (20) come from, and what would it be sharply?", ("factor-two", "attention-sharp")),
    ("Why does the variance suffice?", ("variance-suffices", "layernorm", "norm-backward-gain")),
    ("What does the identity activation cost, and whence the 9?", ("activation-cost", "ffn-upper")),
    ("What does the single-head assumption cost?", ("single-head", "attention-upper-aposteriori")),
    ("Why a shortcut std of 1 and not more?", ("shortcut-scale", "closed-form")),
    ("What do a softmax and a soft-cap make of the gradient?", ("softmax-moments", "soft-cap", "head-gradient")),
    (
        "What does a finite width add to the growth?",
        ("update-scatter", "post-norm-gain", "output-norm-gain", "norm-backward-gain", "own-gain"),
    ),
    ("Why is Pre-LN more stable than Post-LN?", ("post-ln", "deepnorm")),
    ("What do other layouts and multipliers do?", ("residual-scaling", "normalised-branch", "growth-conservation")),
)


def catalogue() -> dict[str, Statement]:
    """Every statement, by name and in the names' order, whichever file happened to be imported first."""
    return dict(sorted(registered().items()))


def arriving(statement: str) -> list[Derivation]:
    """The derivations that arrive at a statement, in the order of their files; of a family's, the one for it."""
    chains = (member for chain in map(derivation, DERIVATIONS) for member in (chain, *chain.family))
    return [chain for chain in chains if chain.statement == statement]


def titles() -> dict[str, str]:
    """Every page by name, with its title: derivations, the limits, then statements that no derivation is called."""
    found = {name: derivation(name).title for name in DERIVATIONS}
    found[LIMITS] = "Limits at large width and depth"
    for name, statement in catalogue().items():
        found.setdefault(name, f"{statement.kind}: {statement.quantity.meaning}")
    return found


def page(name: str, format: Format = "text") -> str:
    """One page by the name of a derivation or of a statement.

    Raises:
        ValueError: there is neither; the message names close ones. Or the format is not known.
    """
    if name in DERIVATIONS:
        return render(derivation(name), format)
    if name == LIMITS:
        return render_asymptotics(format)
    statements = catalogue()
    if name not in statements:
        raise ValueError(unknown("derivation", name, titles(), command="spikecheck derive"))
    chains = arriving(name)
    if chains:
        return "\n".join(render(chain, format) for chain in chains)
    return render_statement(statements[name], format)


def statement_formula(statement: Statement, format: Format = "latex") -> str:
    """Quantity, relation and expression in one line."""
    expression = known_functions(statement.expression)
    relation = RELATIONS[statement.kind]
    if format == "text":
        return f"{statement.quantity.name} {relation} {text(expression)}"
    words = statement.quantity.name.replace("_", r"\ ")
    letter = LETTERS.get(statement.quantity.name, rf"\mathrm{{{words}}}")
    return f"{letter} {SIGNS[relation]} {latex(expression)}"


def _facts(statement: Statement) -> Iterator[tuple[str, str]]:
    norm = f" ({statement.quantity.norm} norm)" if statement.quantity.norm else ""
    yield "kind", statement.kind
    yield "of", statement.quantity.meaning + norm
    for assumption in statement.assumptions:
        yield "assumes", assumption
    if statement.why:
        yield "why", statement.why
    if statement.target is not None:
        yield "target", f"relative error at most {100 * statement.target:g} % where the assumptions hold"
    if statement.kind == "upper":
        yield "tight", "attained" if statement.tight else "not known to be attained"
    yield "source", str(statement.source)


def render_statement(statement: Statement, format: Format = "text") -> str:
    """A page made of the statement itself."""
    if format == "markdown":
        return "\n".join([f"## {statement.name}", "", *_statement_markdown(statement)]) + "\n"
    if format == "latex":
        facts = [rf"  \item {label}: {escape(value)}" for label, value in _facts(statement)]
        formula = rf"\[ {statement_formula(statement)} \]"
        items = [r"\begin{itemize}", *facts, r"\end{itemize}"]
        return "\n".join([rf"\paragraph{{{escape(statement.name)}}}", formula, *items]) + "\n"
    lines = [statement.name, "=" * len(statement.name), "", statement_formula(statement, "text"), ""]
    for label, value in _facts(statement):
        lines += textwrap.wrap(f"{label}: {value}", 110, subsequent_indent="    ")
    return "\n".join(lines) + "\n"


def _statement_markdown(statement: Statement) -> list[str]:
    lines = [*math_block(statement_formula(statement)), ""]
    return lines + [f"- {label}: {markdown_words(value)}" for label, value in _facts(statement)]


def document(format: Format = "markdown") -> str:
    """Every page: `docs/theory.md`, a LaTeX document that compiles by itself, or text."""
    if format == "markdown":
        return "\n".join(_markdown()).rstrip() + "\n"
    chains = [render(derivation(name), format) for name in DERIVATIONS]
    # Of a family one chain is written out, and the other members' statements.
    concluded = {derivation(name).statement for name in DERIVATIONS}
    alone = [render_statement(one, format) for name, one in catalogue().items() if name not in concluded]
    parts = [*chains, *alone, render_asymptotics(format)]
    if format == "latex":
        parts = [LATEX_HEAD, *parts, r"\end{document}"]
    return "\n".join(parts).rstrip() + "\n"


LATEX_HEAD = r"""\documentclass{article}
\usepackage{amsmath, amssymb, graphicx}
\usepackage[margin=2cm]{geometry}
\allowdisplaybreaks
\sloppy
\begin{document}"""


def _markdown() -> Iterator[str]:
    statements = catalogue()
    chapters = _chapters()
    yield from (
        "# Theory",
        "",
        f"Generated by `{COMMAND}` from the objects that the tests check; edit those, not this file.",
        "",
        "Every statement is of one kind. Every line of a derivation names what allows it and where it is from, and is "
        "compared with random numbers by the tests; an estimate says how closely.",
        "",
        "| sign | kind of line | meaning |",
        "|---|---|---|",
        "| $`=`$ | exact | to rounding, or exact and sampled with a stated standard error |",
        "| $`\\leq`$ | upper | a true inequality |",
        "| $`\\simeq`$ | sharp | the value itself at large width |",
        "| $`\\approx`$ | estimate | what holds under the chain's assumptions, or is assumed |",
        "| $`\\lesssim`$ | estimate | a bound that an estimate went into |",
        "",
        "## Coverage",
        "",
        "A bound is *a priori* if the configuration and the weights give it, or bound it for any input; *a posteriori* "
        "if it needs activations. A half-layer, with its shortcut, has `residual` of the branch's statement (1 + it) "
        "where no sharp one of its own is named.",
        "",
        *table(),
        "",
        "## Contents",
        "",
        "- [Coverage](#coverage)",
        "- [Questions](#questions)",
        "- [Statements](#statements)",
    )
    for kind in RELATIONS:
        names = [name for name, one in statements.items() if one.kind == kind]
        yield f"  - {kind}: " + ", ".join(f"[{name}](#statement-{name})" for name in names)
    yield "- [Derivations](#derivations)"
    for title, chains in chapters:
        yield f"  - {markdown_words(title)} " + ", ".join(_link(chain.name) for chain in chains)
    yield from ("- [Limits](#limits)", "- [Symbols](#symbols)", "- [References](#references)", "")
    yield from ("## Questions", "", "| question | derivations |", "|---|---|")
    yield from (f"| {question} | {', '.join(map(_link, names))} |" for question, names in QUESTIONS)
    yield from ("", "## Statements", "")
    for kind, meaning in MEANINGS.items():
        yield from (f"### Kind: {kind}", "", meaning, "")
        for name, statement in statements.items():
            if statement.kind != kind:
                continue
            yield from (f"#### Statement {name}", "", *_statement_markdown(statement))
            chains = arriving(name)
            if chains:
                yield f"- derived in {', '.join(_link(chain.name) for chain in chains)}"
            yield ""
    yield from ("## Derivations", "")
    for title, chains in chapters:
        yield from (f"### {markdown_words(title)}", "")
        for chain in chains:
            heading = f"#### Derivation {chain.name}\n\n**{markdown_words(chain.title)}**"
            yield render_markdown(chain, heading)
    yield from ("## Limits", "", render_asymptotics("markdown"))
    yield from _symbols()
    yield from ("", "## References", "")
    yield from (f"- `{key}`: {reference}" for key, reference in REFERENCES.items())


def _symbols() -> Iterator[str]:
    yield from ("## Symbols", "", "Letters of one derivation alone, its matrices and places, stand under it.", "")
    yield from ("| letter | name | meaning | range | known from |", "|---|---|---|---|---|")
    for name, entry in SYMBOLS.items():
        cells = _cells(latex(symbol(name)), name, entry.meaning, entry.values)
        yield f"{cells} {_known(entry.known)} |"
    yield from ("", "| function | name | meaning | range |", "|---|---|---|---|")
    for name, function in FUNCTIONS.items():
        yield _cells(function.latex, name, function.meaning, function.range)


def _cells(letter: str, name: str, meaning: str, range: str) -> str:
    """Cells of a table; a bar would end one."""
    letter = letter.replace(r"\|", r"\Vert ").replace("|", r"\vert ")
    words = (markdown_words(word).replace("|", r"\|") for word in (meaning, range))
    return f"| $`{letter}`$ | `{name}` | {' | '.join(words)} |"


def _known(known: str) -> str:
    return {"config": "the configuration"}.get(known, known)


def _link(name: str) -> str:
    return f"[{name}](#derivation-{name})"


def _chapters() -> list[tuple[str, list[Derivation]]]:
    """Derivations by the file they are in, under the first line of its docstring."""
    found: dict[str, list[Derivation]] = {}
    for name, build in DERIVATIONS.items():
        words = inspect.getdoc(sys.modules[build.__module__]) or build.__module__
        found.setdefault(words.partition("\n")[0], []).append(derivation(name))
    return list(found.items())
