"""Every derivation in print: text, Markdown and LaTeX are complete, brackets close, and mathtext draws each line."""

from __future__ import annotations

import re

import matplotlib as mpl
import pytest

from theory.derivation import DERIVATIONS, derivation, render
from theory.derivations_rendering import formula, latex, text


@pytest.mark.parametrize("name", DERIVATIONS)
def test_rendering(name: str) -> None:
    chain = derivation(name)
    written = {style: render(chain, style) for style in ("text", "markdown", "latex")}
    for rendered in written.values():
        assert chain.title in rendered
        assert chain.kind in rendered
        assert not chain.statement or chain.statement in rendered
        assert "Norm(" not in rendered
        assert "Transposed(" not in rendered
    assert written["text"].isascii()
    assert all(f"({number})" in written["text"] for number in range(1, len(chain.steps) + 1))
    assert written["markdown"].count("```math\n") == len(chain.steps) == written["markdown"].count("\n```\n")
    latex = written["latex"]
    displays = sum(latex.count(rf"\begin{{{kind}}}") for kind in ("align", "equation"))
    assert 1 <= displays == sum(latex.count(rf"\end{{{kind}}}") for kind in ("align", "equation"))
    assert latex.count(r"\item") == len(chain.steps)
    assert latex.count("{") == latex.count("}")
    assert len(re.findall(r"\\left\b", latex)) == len(re.findall(r"\\right\b", latex))
    with pytest.raises(ValueError, match="unknown format 'html'; use one of text, markdown, latex"):
        render(chain, "html")  # type: ignore[arg-type]


CLOSING = {"(": ")", "[": "]", "{": "}"}


def balanced(printed: str) -> bool:
    """Whether every bracket is closed by its own kind, in the order they were opened."""
    expected: list[str] = []
    for letter in printed:
        if letter in CLOSING:
            expected.append(CLOSING[letter])
        elif letter in CLOSING.values() and (not expected or expected.pop() != letter):
            return False
    return not expected


def loose_words(printed: str) -> list[str]:
    """Words that LaTeX would set as a product of letters: neither a command, nor upright, nor a subscript."""
    bare = re.sub(r"\\(mathrm|operatorname|text)\{[^{}]*\}", "", printed)
    return re.findall(r"[A-Za-z]{3,}", re.sub(r"_\{[^{}]*\}", "", re.sub(r"\\[A-Za-z]+", "", bare)))


@pytest.mark.parametrize("name", DERIVATIONS)
def test_brackets_of_every_line_are_closed_by_their_kind(name: str) -> None:
    for step in derivation(name).steps:
        for printed in (formula(step), *(form(side) for form in (text, latex) for side in (step.left, step.right))):
            assert balanced(printed), printed
        assert not loose_words(formula(step)), formula(step)


@pytest.mark.parametrize("garbled", ["elasticity(sigma_{k)}", "(", "a]", "{(})", "[0, 1)"])
def test_mixed_brackets_are_noticed(garbled: str) -> None:
    assert not balanced(garbled)
    assert balanced(r"\left( \sigma_{k} [a + (b)] \right)^{2}")


def test_loose_words_are_noticed() -> None:
    assert loose_words(r"elasticity \left( \sigma_k \right)") == ["elasticity"]
    assert not loose_words(r"\mathrm{elasticity}(\sigma_{knee})")


@pytest.mark.parametrize("name", DERIVATIONS)
def test_mathtext_draws_every_formula(name: str) -> None:
    mpl.use("agg")
    from matplotlib.mathtext import MathTextParser

    for step in derivation(name).steps:
        drawn = MathTextParser("agg").parse(f"${formula(step)}$")
        assert drawn.width > 0


def test_rendered_equation() -> None:
    text = render(derivation("ffn"))
    assert "|dy/dx'| <~ 1 + sigma_1 sigma_2 (sqrt(d) + sqrt(d_ffn))^2/sigma_x'" in text
    assert "substitution of 5, 6, 7, 8, 9, 10, 11" in text
