"""Every symbol once: its name in code, its letter in the paper, what it means, its range and where it lives.

All symbols are positive (or non-negative) reals; the assumption is what lets sympy simplify roots. What a single
derivation calls its matrices, tokens and places is in `theory.letters`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

Known = Literal["config", "weights", "activations"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SymbolEntry:
    """A symbol of the theory.

    Attributes:
        name: Python name, and the parameter name in formulas.
        latex: the paper's letter.
        meaning: one line.
        known: from the configuration (`config`), from its weights besides (`weights`), where that is at least a bound
            on it for any input; or only with `activations`.
        range: what its values may be; from 0 where nothing is said, and for an integer from 1.
    """

    name: str
    latex: str
    meaning: str
    known: Known
    integer: bool = False
    range: str = ""

    @property
    def values(self) -> str:
        """Its range in words."""
        return self.range or ("integer >= 1" if self.integer else ">= 0")

    def admits(self, value: float) -> bool:
        """Whether a number is in its range."""
        whole, positive = value % 1 == 0, value > 0
        holds = {
            "> 0": positive, ">= 0": value >= 0, "integer >= 1": positive and whole, "0 to 1": 0 <= value <= 1,
            "0 or 1": value in (0, 1), "0, 1 or 2": value in (0, 1, 2),
        }  # fmt: skip
        return holds[self.values]


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionEntry:
    """A function or sign of the theory's expressions: in print, what it means, and its range."""

    latex: str
    meaning: str
    range: str


_ALL = (
    SymbolEntry(name="d", latex="d", meaning="width d_model", known="config", integer=True),
    SymbolEntry(name="d_ffn", latex=r"d_{\mathrm{ffn}}", meaning="feed-forward width", known="config", integer=True),
    SymbolEntry(name="d_head", latex=r"d_h", meaning="width of a head", known="config", integer=True),
    SymbolEntry(name="n_heads", latex=r"n_h", meaning="number of heads", known="config", integer=True),
    SymbolEntry(name="n_layers", latex="N", meaning="number of layers", known="config", integer=True),
    SymbolEntry(name="n_tokens", latex="T", meaning="sequence length", known="config", integer=True),
    SymbolEntry(name="n_experts", latex="E", meaning="experts of a layer", known="config", integer=True),
    SymbolEntry(name="n_chosen", latex="k", meaning="experts that a token goes to", known="config", integer=True),
    SymbolEntry(
        name="gates_renormalised",
        latex=r"\iota_G",
        meaning="1 if gates are a softmax over the chosen experts, 0 if over all",
        known="config",
        range="0 or 1",
    ),
    SymbolEntry(name="vocab_size", latex="V", meaning="words of the vocabulary", known="config", integer=True),
    SymbolEntry(name="kv_group", latex="g", meaning="query heads that share a key head", known="config", integer=True),
    SymbolEntry(name="sigma_e", latex=r"\sigma_e", meaning="std of the embedding output", known="config", range="> 0"),
    SymbolEntry(
        name="sigma_x", latex=r"\sigma_x", meaning="std of x, entering the attention half", known="config", range="> 0"
    ),
    SymbolEntry(
        name="rms_x", latex=r"r_x", meaning="root mean square of x, entering an RMSNorm", known="config", range="> 0"
    ),
    SymbolEntry(
        name="sigma_xp",
        latex=r"\sigma_{x'}",
        meaning="std of x', entering the feed-forward half",
        known="config",
        range="> 0",
    ),
    SymbolEntry(name="sigma_1", latex=r"\sigma_1", meaning="std of W_1", known="config"),
    SymbolEntry(name="sigma_2", latex=r"\sigma_2", meaning="std of W_2", known="config"),
    SymbolEntry(name="sigma_3", latex=r"\sigma_3", meaning="std of the gate's W_3", known="config"),
    SymbolEntry(name="sigma_router", latex=r"\sigma_r", meaning="std of the router", known="config"),
    SymbolEntry(name="sigma_O", latex=r"\sigma_O", meaning="std of W_O", known="config"),
    SymbolEntry(
        name="logit_variance", latex="a", meaning="variance of a logit between normalised tokens", known="config"
    ),
    SymbolEntry(name="c_VO", latex=r"c_V c_O", meaning="variance gain of W_V and W_O together", known="config"),
    SymbolEntry(name="J_Z", latex=r"\|J^Z\|", meaning="norm of the concatenated heads' Jacobian", known="activations"),
    SymbolEntry(name="sigma", latex=r"\sigma", meaning="std of a matrix's entries", known="config"),
    SymbolEntry(name="rows", latex="m", meaning="rows of a matrix", known="config", integer=True),
    SymbolEntry(name="columns", latex="n", meaning="columns of a matrix", known="config", integer=True),
    SymbolEntry(name="t", latex="t", meaning="deviation, failing with probability exp(-t^2/2)", known="config"),
    SymbolEntry(
        name="s", latex="s", meaning="smallest normaliser sqrt(var + eps) over tokens", known="activations", range="> 0"
    ),
    SymbolEntry(name="gain", latex=r"\|\gamma\|_\infty", meaning="largest gain of the norm", known="weights"),
    SymbolEntry(
        name="inner_gain",
        latex=r"\gamma_{(k)}",
        meaning="k-th largest gain of the norm in size, k = 3 for LayerNorm and 2 for RMSNorm",
        known="weights",
        range="> 0",
    ),
    SymbolEntry(
        name="embedding_gradient",
        latex="c",
        meaning="factor on the gradient reaching the tables",
        known="config",
        range="0 to 1",
    ),
    SymbolEntry(name="multiplier", latex=r"\mu", meaning="factor on the token embeddings", known="config"),
    SymbolEntry(
        name="norm_slope",
        latex=r"\kappa_E",
        meaning="steepest that the embedding's norm can be",
        known="config",
        range="> 0",
    ),
    SymbolEntry(
        name="position_rows",
        latex=r"\ell",
        meaning="1 if positions have a table, else 0",
        known="config",
        range="0 or 1",
    ),
    SymbolEntry(
        name="token_weight",
        latex=r"\max_v \sum_{v_t = v} \kappa_t^2",
        meaning="largest sum of squared slopes of the embedding's norm over a token's places",
        known="activations",
    ),
    SymbolEntry(
        name="position_weight",
        latex=r"\ell \max_t \kappa_t^2",
        meaning="largest squared slope of the embedding's norm, if positions have a table",
        known="activations",
    ),
    SymbolEntry(
        name="head_input", latex=r"\|Y\|", meaning="norm of the head's input over the sequence", known="activations"
    ),
    SymbolEntry(
        name="head_slope",
        latex="J_Y",
        meaning="bound on the norm of the Jacobian of the head's input in the stream's start",
        known="activations",
    ),
    SymbolEntry(name="opnorm_E", latex=r"\|E\|", meaning="spectral norm of the token table", known="weights"),
    SymbolEntry(
        name="lipschitz",
        latex="L",
        meaning="largest slope of the activation over the arguments that can occur",
        known="config",
        range="> 0",
    ),
    SymbolEntry(
        name="slope_square",
        latex=r"\overline{F'^2}",
        meaning="mean square slope of the activation at normals of variance sigma_1^2 d",
        known="config",
    ),
    SymbolEntry(
        name="value_square",
        latex=r"\overline{F^2}",
        meaning="mean square of the activation at normals of variance sigma_1^2 d",
        known="config",
    ),
    SymbolEntry(name="opnorm_1", latex=r"\|W_1\|", meaning="spectral norm of W_1", known="weights"),
    SymbolEntry(name="opnorm_2", latex=r"\|W_2\|", meaning="spectral norm of W_2", known="weights"),
    SymbolEntry(
        name="opnorm_13", latex=r"\|[W_1; W_3]\|", meaning="spectral norm of W_1 stacked on W_3", known="weights"
    ),
    SymbolEntry(
        name="gate_slope",
        latex=r"D_{13}",
        meaning="largest sqrt((F'(z_1) z_3)^2 + F(z_1)^2) over units and tokens",
        known="activations",
    ),
    SymbolEntry(
        name="open_1",
        latex=r"\max_t \||D_t|^{1/2} W_1\|",
        meaning="largest norm over tokens of W_1, its rows times the roots of their units' slopes",
        known="activations",
    ),
    SymbolEntry(
        name="open_2",
        latex=r"\max_t \|W_2 |D_t|^{1/2}\|",
        meaning="largest norm over tokens of W_2, its columns times the roots of their units' slopes",
        known="activations",
    ),
    SymbolEntry(
        name="expert_jacobian",
        latex=r"\max_e \|J_e\|",
        meaning="largest Jacobian norm of an expert at a token",
        known="activations",
    ),
    SymbolEntry(
        name="expert_output",
        latex=r"\max_e \|f_e\|",
        meaning="longest output of an expert",
        known="activations",
    ),
    SymbolEntry(
        name="router_spread",
        latex=r"\max_{e,e'} \|w_e - w_{e'}\|",
        meaning="largest distance between two experts' router rows",
        known="weights",
    ),
    SymbolEntry(name="opnorm_Q", latex=r"\|W_Q\|", meaning="spectral norm of W_Q, all heads", known="weights"),
    SymbolEntry(name="opnorm_K", latex=r"\|W_K\|", meaning="spectral norm of W_K, all heads", known="weights"),
    SymbolEntry(name="opnorm_V", latex=r"\|W_V\|", meaning="spectral norm of W_V, all heads", known="weights"),
    SymbolEntry(name="opnorm_O", latex=r"\|W_O\|", meaning="spectral norm of W_O", known="weights"),
    SymbolEntry(
        name="head_VQ",
        latex=r"\max_h \|W_V^h\| (\|W_Q^h\| + \|b_Q^h\| / R)",
        meaning="largest product of a head's value norm and its query norm, query bias included",
        known="weights",
    ),
    SymbolEntry(
        name="head_VK",
        latex=r"\max_h \|W_V^h\| (\|W_K^h\| + \|b_K^h\| / R)",
        meaning="largest product of a head's value norm and its key norm, with RoPE key bias included",
        known="weights",
    ),
    SymbolEntry(name="R", latex="R", meaning="largest norm of a normalised token", known="weights", range="> 0"),
    SymbolEntry(name="logit_spread", latex="D", meaning="largest max - min of a row of logits", known="weights"),
    SymbolEntry(name="opnorm_P", latex=r"\max_h \|P_h\|", meaning="largest softmax matrix norm", known="activations"),
    SymbolEntry(
        name="key_term", latex=r"\max_j \|B_j\|^{1/2}", meaning="norm through the keys, from P", known="activations"
    ),
    SymbolEntry(
        name="query_term",
        latex=r"\max_t \|\mathrm{Cov}_t(v, k)\|",
        meaning="largest covariance of values and keys under a softmax row, over heads",
        known="activations",
    ),
    SymbolEntry(
        name="opnorm_VH",
        latex=r"\|\tilde W_V\|",
        meaning="spectral norm of W_V, each group's rows repeated for its heads",
        known="weights",
    ),
    SymbolEntry(
        name="opnorm_OV",
        latex=r"\|W_O \tilde W_V\|",
        meaning="spectral norm of W_O times W_V, each group's rows repeated for its heads",
        known="weights",
    ),
    SymbolEntry(
        name="heads_OV",
        latex=r"\|[W_O^h W_V^h]_h\|",
        meaning="spectral norm of the heads' W_O^h W_V^h side by side, or a bound on it",
        known="weights",
    ),
    SymbolEntry(
        name="opnorm_P_mean", latex=r"\|\bar P\|", meaning="norm of the heads' mean softmax matrix", known="activations"
    ),
    SymbolEntry(
        name="P_deviation",
        latex=r"\max_h \|P_h - \bar P\|",
        meaning="largest norm of a head's softmax matrix less the heads' mean",
        known="activations",
    ),
    SymbolEntry(
        name="key_blocks",
        latex=r"\|(\|K_{tj}\|)_{tj}\|",
        meaning="norm of the T x T matrix of block norms through the keys",
        known="activations",
    ),
    SymbolEntry(
        name="query_blocks", latex=r"\max_t \|Q_t\|", meaning="largest block through the query", known="activations"
    ),
    SymbolEntry(
        name="key_slope",
        latex=r"\kappa_K",
        meaning="bound on the root sum of squares over heads of dl_tj/du_j . x, for unit x",
        known="weights",
    ),
    SymbolEntry(
        name="query_slope",
        latex=r"\kappa_Q",
        meaning="bound on the root sum over heads of a softmax row's variance of dl_tj/du_t . x, for unit x",
        known="weights",
    ),
    SymbolEntry(name="n_seen", latex="w", meaning="tokens that a token sees at most", known="config", integer=True),
    SymbolEntry(
        name="rotary", latex=r"\rho", meaning="fraction of a head's width that RoPE turns, 0 without", known="config"
    ),
    SymbolEntry(name="rope_base", latex=r"\theta", meaning="base of RoPE's angles", known="config"),
    SymbolEntry(name="alibi", latex=r"\iota_A", meaning="1 with ALiBi, else 0", known="config", range="0 or 1"),
    SymbolEntry(name="softcap", latex=r"\bar l", meaning="cap of the logits, 0 without", known="config"),
    SymbolEntry(
        name="qk_norm",
        latex=r"\iota_N",
        meaning="QK-norm: 0 without, 1 of a head, 2 in full",
        known="config",
        integer=True,
        range="0, 1 or 2",
    ),
    SymbolEntry(name="eps", latex=r"\epsilon", meaning="eps of the normalisation", known="config"),
    SymbolEntry(
        name="column_sum",
        latex=r"\chi",
        meaning="largest column sum of a softmax matrix, over heads",
        known="activations",
    ),
    SymbolEntry(name="value_range", latex=r"\omega", meaning="max - min of a vector's entries", known="activations"),
    SymbolEntry(
        name="branch_variance",
        latex="b",
        meaning="residual variance that one layer adds at initialisation",
        known="config",
    ),
    SymbolEntry(
        name="residual_scale",
        latex=r"\alpha",
        meaning="factor on the stream at each half-layer",
        known="config",
        range="> 0",
    ),
    SymbolEntry(name="residual_multiplier", latex="r", meaning="factor on each branch", known="config"),
    SymbolEntry(name="b_ffn", latex=r"b_F", meaning="the feed-forward sub-layer's share of b", known="config"),
    SymbolEntry(name="b_attn", latex=r"b_A", meaning="the attention sub-layer's share of b", known="config"),
)

# By the name of the sympy function; `edge_*` stands for every one that begins so, such as `edge_relu`.
FUNCTIONS: dict[str, FunctionEntry] = {
    "Norm": FunctionEntry(latex=r"\left\| A \right\|", meaning="spectral norm; length of a column", range=">= 0"),
    "Transposed": FunctionEntry(latex=r"A^{\top}", meaning="transpose", range="as A"),
    "SumOver": FunctionEntry(latex=r"\sum_{i}", meaning="sum over an index", range="as its terms"),
    "MaxOver": FunctionEntry(latex=r"\max_{i}", meaning="largest over an index", range="as its terms"),
    "ProductOver": FunctionEntry(latex=r"\prod_{i}", meaning="product over an index", range="as its factors"),
    "ChiSquareAbove": FunctionEntry(
        latex=r"P\left( \chi^2_{n} \geq a \right)", meaning="upper tail of a chi-square of n degrees", range="0 to 1"
    ),
    "ChiSquareBelow": FunctionEntry(
        latex=r"P\left( \chi^2_{n} \leq a \right)", meaning="lower tail of a chi-square of n degrees", range="0 to 1"
    ),
    "harmonic": FunctionEntry(latex=r"H_{n}", meaning="harmonic number 1 + 1/2 + ... + 1/n", range=">= 1"),
    "cesaro_opnorm": FunctionEntry(
        latex=r"\|C_{T}\|",
        meaning="norm of the causal running mean (Cesaro matrix): row t is 1/t on columns 1 to t, 0 beyond",
        range="1 to 2",
    ),
    "F": FunctionEntry(latex=r"F\left( z \right)", meaning="activation, entry by entry", range="any real"),
    "LN": FunctionEntry(latex=r"\mathrm{LN}\left( x \right)", meaning="LayerNorm of a token", range="any real"),
    "Z": FunctionEntry(latex=r"Z\left( u \right)", meaning="concatenated heads' output at a token", range="any real"),
    "Var": FunctionEntry(latex=r"\mathrm{Var}\left( v \right)", meaning="variance under a softmax row", range=">= 0"),
    "edge_*": FunctionEntry(
        latex=r"\mathrm{edge}",
        meaning="norm of W_2 D W_1 over sigma_1 sigma_2 d, corrected for a finite width",
        range="> 0",
    ),
    "heads_edge": FunctionEntry(
        latex=r"\mathrm{heads\ edge}",
        meaning="norm of W_O W_V over sqrt(c_V c_O) at an inner width over d and at d, corrected for a finite width",
        range="> 0",
    ),
    "gated_edge_*": FunctionEntry(
        latex=r"\mathrm{gated\ edge}", meaning="the same of a gated layer, over sigma_2 sqrt(d)", range="> 0"
    ),
    "residual_edge_*": FunctionEntry(
        latex=r"\mathrm{residual\ edge}", meaning="norm of I + J of a half-layer", range="> 0"
    ),
    "gated_residual_edge_*": FunctionEntry(
        latex=r"\mathrm{gated\ residual\ edge}", meaning="the same of a gated half-layer", range="> 0"
    ),
    "simulated_*": FunctionEntry(
        latex=r"\mathrm{simulated}", meaning="mean norm over simulated draws of attention or a tied table", range="> 0"
    ),
    "experts_*": FunctionEntry(
        latex=r"\mathrm{experts}",
        meaning="mean largest norm over tokens of experts behind a router, sigma_3 = 0 where they have no gate",
        range=">= 0",
    ),
    "attention_outlier": FunctionEntry(
        latex=r"\mathrm{attention\ outlier}", meaning="norm of what the strongest softmax row adds", range="> 0"
    ),
    "steepest_norm": FunctionEntry(
        latex=r"\mathrm{steepest\ norm}", meaning="mean of the largest 1/s of T normal tokens", range="> 0"
    ),
}

SYMBOLS: dict[str, SymbolEntry] = {entry.name: entry for entry in _ALL}


@cache
def symbol(name: str) -> Any:
    """The sympy symbol of that name, with its assumptions."""
    import sympy as sp

    if name not in SYMBOLS:
        raise ValueError(f"unknown symbol {name!r}; add it to theory.symbols")
    entry = SYMBOLS[name]
    return sp.Symbol(entry.name, positive=True, integer=True if entry.integer else None)


def function_entry(name: str) -> FunctionEntry:
    """The entry of a function by its name; one of a family, such as `edge_relu`, by the family's.

    Raises:
        ValueError: there is none.
    """
    families = [key.removesuffix("*") for key in FUNCTIONS if key.endswith("*")]
    family = next((prefix for prefix in families if name.startswith(prefix)), "")
    key = f"{family}*" if family else name
    if key not in FUNCTIONS:
        raise ValueError(f"unknown function {name!r}; add it to theory.symbols")
    return FUNCTIONS[key]


def latex_names() -> dict[Any, str]:
    """Map from sympy symbols to the paper's letters, for printing."""
    return {symbol(name): entry.latex for name, entry in SYMBOLS.items()}
