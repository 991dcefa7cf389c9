"""Letters of derivations: what the matrices, tokens, places and means of one computation are called.

Symbols that a statement's formula takes, and the configuration's, are in `theory.symbols`. Where a letter is
something else in one derivation, its key starts with that derivation's name and a colon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What a value may be, by the words of the range; an index runs over what its meaning says.
ANY, AT_LEAST_0, UNIT, INDEX, MATRIX, COLUMN = "any real", ">= 0", "0 to 1", "index", "matrix", "column"


@dataclass(frozen=True, slots=True)
class Letter:
    """Meaning of a letter, with the shape of an array, and the range of its values."""

    meaning: str
    range: str


_INDICES = {
    "e": "experts",
    "h": "heads",
    "h,t": "heads h and tokens t, both",
    "i": "tokens that token t sees",
    "ffn-gated-upper:i": "hidden units",
    "ffn-gated-upper-apriori:i": "hidden units",
    "j": "tokens that are seen",
    "l": "half-layers, from the first",
    "l=0..N-1": "half-layers 0 to N - 1",
    "l=1..N": "half-layers 1 to N",
    "shortcut-scale:l": "layers, from the first",
    "shortcut-scale:l=1..N": "layers 1 to N",
    "gradient:n": "layers",
    "t": "tokens, from 1",
}

_PROBABILITIES = {
    "delta": "probability that a bound fails",
    "delta_tj": "1 if t = j, else 0",
    "P(any token outside)": "probability that the variance of any of T tokens leaves its interval",
    "b_tj": "ALiBi's own probabilities: softmax of the bias alone",
    "g_e": "gate of expert e",
    "g'_e": "gate of expert e at another token",
    "max_t sum_j p_tj": "largest row sum of the softmax matrix",
    "p_e": "router's probability of expert e",
    "p'_e": "router's probability of expert e at another token",
    "p_ti": "probability with which token t attends to token i",
    "p_tj": "probability with which token t attends to token j",
    "rho": "branches' share of the last stream's variance",
    "w_1": "where the edge of one matrix has its minimum",
    "w_2": "where the edge of two matrices has its minimum",
    "w_F": "where the feed-forward edge has its minimum",
    "alpha_E": "share of the embedding's gradient that a detached embedding keeps",
    "l'_tj": "slope of the cap at the logit of t and j",
    "l'_ti": "slope of the cap at the logit of t and i",
    "A": "E sum_e g_e(t) g_e(t'): overlap of two tokens' gates",
    "A_tt": "the same of a token with itself",
    "g.g'": "sum_e of two tokens' gates",
    "p.p'": "sum_e of two tokens' probabilities",
}

_SIGNED = {
    "<f,f'>/d": "mean product of two tokens' expert layer outputs",
    "B": "E tr DD': what of two tokens' gradients passes through the router",
    "tr DD'": "trace of the product of two tokens' gate Jacobians D = diag(g) - g p'",
    "kappa": "mean product of one expert's outputs at two tokens",
    "l_tj": "logit of token t at token j",
    "F'(z_1i) z_3i": "slope at unit i times its other factor",
    "(F'(z_1i) z_3i)": "slope at unit i times its other factor",
    "F(z_1i)": "activation of unit i",
    "z_1i": "pre-activation of unit i",
    "z_3i": "other factor of gated unit i",
    "dlog(|g_0|/|g_N|)/dlog(sigma_e)": "elasticity of growth in the shortcut's std",
    "elasticity(sigma_k)": "that elasticity at the knee",
}

_SCALARS = {
    "1/|J|": "one over the norm of the norm's Jacobian",
    "E |J'g|^2/|g|^2": "LayerNorm's mean square backward gain, over tokens and directions g",
    "E |J_R'g|^2/|g|^2": "RMSNorm's, likewise",
    "E_g |J'g|^2/|g|^2": "LayerNorm's mean square backward gain over directions g, at one token",
    "E[(qhat.khat)^2]/d_h": "variance of a logit over directions",
    "E[1/chi^2_{d-1}]": "mean inverse of a chi-square of d - 1 degrees",
    "E[1/s^2]": "mean over tokens of 1/s^2",
    "E[F'(z) F'(z')]": "mean product of the slopes at two correlated normals",
    "E[F'(z)^2]": "mean square slope",
    "E[F(z)^2]": "mean square output of the activation",
    "E|W_O|": "mean norm of W_O over draws",
    "E|W|": "mean norm of W over draws",
    "L_gelu": "largest slope of GELU",
    "L_silu": "largest slope of SiLU",
    "M": "layers, of two half-layers each",
    "N b": "variance that all layers add",
    "Q(|W|)": "quantile of |W| at 1 - exp(-t^2/2)",
    "a": "deviation of a chi-square from its mean",
    "b'": "mean square slope of a half-layer's branch: what it adds to the gradient",
    "b_0": "b at beta = 1",
    "b_0'": "b' at beta = 1",
    "c": "factor on the stream",
    "soft-cap:c": "cap of the logits",
    "dkappa/dc": "derivative of kappa(c) = E[F(z) F'(z')] in the covariance c of z and z'",
    "eta": "size of an update of every entry of the table",
    "gamma_(2)": "second largest gain in size",
    "gamma_(3)": "third largest gain in size",
    "growth(1)": "growth at sigma_e = 1",
    "growth(sigma_k)": "growth at the knee",
    "lambda": "rate in the exponential Markov inequality, below 1/2",
    "m_h": "slope of head h's bias",
    "max_j sum_t b_tj": "largest column sum of ALiBi's own probabilities",
    "max_t |dLN/dx_t|": "largest norm of a LayerNorm Jacobian over T tokens",
    "max_v n_v": "how often the most frequent token of the sequence occurs",
    "mean(l_own)": "mean logit of a token at itself, under a tied head",
    "mu": "multiplier of the embeddings",
    "n": "degrees of freedom, d - 1",
    "n_max": "how often the most frequent token of the sequence occurs",
    "n_v": "how often token v occurs",
    "psi(lambda)": "ln E exp(lambda (chi^2_n - n))",
    "psi(-lambda)": "the same at -lambda",
    "q": "open units a width: tr D / d",
    "growth-conservation:q": "variance of a pre-activation",
    "r": "squared length of a router row",
    "r_j": "root mean square of key j",
    "s_+": "std of the stream after the addition, before the norm",
    "s_0": "std of the stream at its start",
    "s_N": "std of the stream at its end",
    "s_l": "std of the stream at place l",
    "s_{l+1}": "std of the stream at place l + 1",
    "s_t": "std of the stream at token t, at its end",
    "sigma_E": "std of the token table",
    "sigma_k": "the knee: shortcut std at which the elasticity is -1/2",
    "std(l_other)": "std of a token's logits at other tokens, under a tied head",
    "tr D": "sum of the slopes: for ReLU the number of open units",
    "w": "window: tokens that a token sees at most",
    "half-layer-sharp-relu:w": "square of q in the branch's scale",
    "ffn-sharp-relu-squared:w": "where t(w) is taken, below one over the largest slope's square",
    "half-layer-sharp-relu:q": "mean of 1/(z - singular value) over both signs",
    "z_I": "height z at which the identity has that mean",
    "z_J": "height z at which the branch has it",
    "z_(I+J)": "height z at which their sum has it",
    "mean r_i^2": "mean square of an entry of row i",
    "E|J_u|": "mean norm of J_u over draws",
    "t(w)": "mean of w D^2/(1 - w D^2) over the units but the steepest, times d_ffn/d",
    "t'(w)": "its derivative",
    "t_z(w)": "mean of w D^2 z^2/(1 - w D^2) over all units, times d_ffn/d",
    "z_out": "singular value beyond the others' edge",
    "std z_out": "its standard deviation over draws",
    "attention-half-layer-sharp:z_0": "height at which the resolvents are taken",
    "y": "exponent of a tail's bound exp(-y)",
    "z_0": "where SiLU is steepest",
    "|C_T,w|": "norm of the running mean over the last w tokens",
    "|W - W'|_F": "Frobenius norm of the difference of two matrices",
    "|W_Q^h|": "norm of head h's queries",
    "|W_V^h|": "norm of head h's values",
    "|W|": "norm of W",
    "|J|": "norm of a half-layer's branch at a token of std 1",
    "|J_l|": "norm of the branch of half-layer l",
    "s_{+,l}": "std after the addition of half-layer l, before its norm",
    "|b_Q^h|": "length of head h's query bias",
    "|dW_2^N|_pre/|dW_2^N|_post": "last layer's weight gradient in Pre-LN over that in Post-LN",
    "[|dW_2^1|/|dW_2^N|]_post": "first layer's weight gradient over the last one's, in Post-LN",
    "[|dW_2^1|/|dW_2^N|]_pre": "the same in Pre-LN",
    "|dX|/|X|": "relative change of the stream's start",
    "|du|^2": "squared length of a token's gradient behind the layer",
    "|g_0|/|g_N|": "growth of the gradient from the end of the stream to its start",
    "|g_l|": "gradient norm at place l of the stream",
    "|g_{l+1}|": "gradient norm at place l + 1",
    "|mu^2 SS' + ell I|": "norm of the selection's Gram over places, (T, T)",
    "|v|^2": "squared length of the gradient before the layer",
    "||W| - |W'||": "difference of two matrices' norms",
}

_COLUMNS = {
    "S_l": "variance of the stream at each token, place l, (T, 1)",
    "S_{l+1}": "the same at place l + 1, (T, 1)",
    "G_l": "mean square gradient at each token, place l, (T, 1)",
    "G_{l+1}": "the same at place l + 1, (T, 1)",
    "a_tj": "derivative of a logit in its key's token, (d, 1)",
    "beta": "bias of the norm, (d, 1)",
    "dL/dE_v": "row v of it, as a column, (d, 1)",
    "dL/dx_1": "gradient entering the first layer, (T d, 1)",
    "dL/dx_n": "gradient entering layer n, (T d, 1)",
    "dL/dy_N": "gradient leaving the last layer, (T d, 1)",
    "dL/dy_n": "gradient leaving layer n, (T d, 1)",
    "dg_e/du": "gradient of expert e's gate, (d, 1)",
    "f_e": "output of expert e, (d, 1)",
    "g": "gradient behind the norm, (d, 1)",
    "k_i": "key of token i, (d_h, 1)",
    "k_j": "key of token j, (d_h, 1)",
    "khat_i": "normalised key of token i, (d_h, 1)",
    "khat_j": "normalised key of token j, (d_h, 1)",
    "o_t": "mean of the values that token t sees, (d_h, 1)",
    "ones": "column of ones, (d, 1)",
    "growth-conservation:ones": "column of ones, (T, 1)",
    "p": "probabilities of a softmax row, (n, 1)",
    "q_t": "query of token t, (d_h, 1)",
    "qhat_t": "normalised query of token t, (d_h, 1)",
    "u": "normalised token, (d, 1)",
    "v": "unit eigenvector of the largest eigenvalue, (n, 1)",
    "v_i": "value of token i, (d_h, 1)",
    "v_j": "value of token j, (d_h, 1)",
    "w_e": "router's row of expert e, (d, 1)",
    "w_p": "router's rows, mean under the probabilities, (d, 1)",
    "x": "token of the residual stream, (d, 1)",
    "x'": "token of the residual stream after attention, (d, 1)",
    "y": "token of the residual stream after the layer, (d, 1)",
    "z": "token before the gain: centred for LayerNorm, over s, (d, 1)",
    "ffn-sharp-relu-squared:z": "pre-activations, (d_ffn, 1)",
}

_MATRICES = {
    "(I_T x W_O)": "W_O at every token, (T d, T n_h d_h)",
    "A": "the norm's Jacobian without gain and 1/s, (d, d)",
    "B_j": "what token j's key can do to all outputs, (d, d)",
    "C_T (x) W_O W_V": "running mean times W_O W_V, (T d, T d)",
    "Cov_t(v)": "covariance of the values that token t sees, (d_h, d_h)",
    "Cov_t(v,b)": "covariance of values and logit slopes in the query's token, (d_h, d)",
    "Cov_t(v,k)": "covariance of the values and keys that token t sees, (d_h, d_h)",
    "D": "slopes F'(z) on the diagonal, (d_ffn, d_ffn)",
    "E": "token table, (V, d)",
    "G": "gradient at the stream's start, (T, d)",
    "G_tied": "gradient at the stream's start under a tied head, (T, d)",
    "G_v": "gradients at the places of token v, (n_v, d)",
    "H": "centring I - 11'/d, (d, d)",
    "I": "identity",
    "J": "Jacobian of a softmax row, (n, n)",
    "J(cx)": "Jacobian of a normalised branch at c x, (d, d)",
    "J(x)": "Jacobian of a normalised branch at x, (d, d)",
    "J^K": "the part of J_u through the keys, (T d, T d)",
    "J^Q": "the part of J_u through the query, (T d, T d)",
    "J^V": "the part of J_u through the values, (T d, T d)",
    "J^VO": "Jacobian through the values alone, (T d, T d)",
    "J^Z": "Jacobian of the concatenated heads at one token, (n_h d_h, d)",
    "J_E": "Jacobian of the stream's start in the tables, (T d, (V + ell T) d)",
    "J_e": "Jacobian of expert e, (d, d)",
    "J_lin": "W_2 W_1, (d, d)",
    "J_relu": "W_2 D W_1 with ReLU's slopes, (d, d)",
    "J_u": "Jacobian of the sub-layer in its normalised input, (T d, T d)",
    "experts-upper:J_u": "Jacobian of the experts' layer at one token, (d, d)",
    "ffn-sharp-relu-squared:J_u": "Jacobian of the feed-forward in its normalised input, (d, d)",
    "attention-half-layer-sharp:A": "sqrt(c_V c_O)/s C_T, (T, T)",
    "attention-half-layer-sharp:G": "mean resolvent over coordinates on the side of W_O, (T, T)",
    "attention-half-layer-sharp:P": "A U A', (T, T)",
    "attention-half-layer-sharp:Y": "A' G A, (T, T)",
    "attention-half-layer-sharp:dx'/dx": "Jacobian of the attention half-layer over the sequence, (T d, T d)",
    "(G)^-1": "inverse of G, (T, T)",
    "(H)^-1": "inverse of H, the mean resolvent on the side of W_V, (T, T)",
    "(z_0 I - P)^-1": "resolvent of P at z_0, (T, T)",
    "(z_0 I - R)^-1": "resolvent of R at z_0, (T, T)",
    "I + C_T (x) W_O W_V / s": "half-layer at uniform attention, (T d, T d)",
    "R": "inverse of Y^-1 - H, (T, T)",
    "U": "inverse of H^-1 - Y, (T, T)",
    "S_t": "Jacobian of softmax row t, (T, T)",
    "(dA_t/dl) (dl_t/du)": "the part of row t through its logits, (d, T d)",
    "dA_t/dl": "output of token t in its logits, (d, T)",
    "W_O [v_1, ..., v_T]": "what the values write, side by side, (d, T)",
    "dy/dx": "Jacobian of the half-layer at one token, (d, d)",
    "M": "slopes and activations of the gate side by side, (d_ffn, 2 d_ffn)",
    "N": "Jacobian of the embedding's norm, a block a token, (T d, T d)",
    "N_k": "Jacobian of the norm at key j, (d_h, d_h)",
    "N_q": "Jacobian of the norm at query t, (d_h, d_h)",
    "P (x) W_O W_V": "one softmax matrix times W_O W_V, (T d, T d)",
    "P^o2": "squares of the softmax matrix's entries, (T, T)",
    "P_h": "softmax matrix of head h, (T, T)",
    "P_h (x) W_O^h W_V^h": "head h's softmax matrix times its W_O^h W_V^h, (T d, T d)",
    "Pi": "projection onto the d - 2 directions that LayerNorm keeps, (d, d)",
    "Q": "d - 1 orthonormal rows orthogonal to 1, (d - 1, d)",
    "S": "one-hot rows of the sequence, (T, V)",
    "W_1": "input matrix of the feed-forward, (d_ffn, d)",
    "W_2": "output matrix of the feed-forward, (d, d_ffn)",
    "W_3": "gate's second input matrix, (d_ffn, d)",
    "W_K^h": "keys of head h, (d_h, d)",
    "W_O": "output matrix of attention, (d, n_h d_h)",
    "W_O^h": "columns of W_O that read head h, (d, d_h)",
    "W_Q^h": "queries of head h, (d_h, d)",
    "W_V": "value matrix of all heads, (n_h d_h, d)",
    "W_V^h": "values of head h, (d_h, d)",
    "X": "the stream's start, (T, d)",
    "Y": "the final norm's output, (T, d)",
    "[P_h (x) W_V^h]_h": "heads' P_h (x) W_V^h below each other, (n_h T d_h, T d)",
    "[W_1; W_3]": "W_1 on W_3, (2 d_ffn, d)",
    "[mu S, ell I] x I": "what the places read of the tables, (T d, (V + ell T) d)",
    "dA_t/du_j": "block of J_u: output of token t in normalised token j, (d, d)",
    "dFFN(LN(X))/dX": "Jacobian of the branch over all tokens, (T d, T d)",
    "dFFN(LN(x_t))/dx_t": "Jacobian of the branch at token t, (d, d)",
    "dFFN/du": "Jacobian of the feed-forward in its normalised input, (d, d)",
    "dFFN/du_t": "the same at token t, (d, d)",
    "dL/dE": "gradient of the token table, (V, d)",
    "dL/dlogits": "gradient at the logits, (T, V)",
    "dLN(mu e)/de": "LayerNorm's Jacobian in a row of the table, (d, d)",
    "dLN/dx": "LayerNorm's Jacobian, (d, d)",
    "dLN/dx'": "LayerNorm's Jacobian at x', (d, d)",
    "dLN/dx_t": "LayerNorm's Jacobian at token t, (d, d)",
    "dL_det/dE": "gradient of a detached token table, (V, d)",
    "dL_tied/dE": "gradient of a table that is the head as well, (V, d)",
    "dX/dE": "Jacobian of the stream's start in the token table, (T d, V d)",
    "sgn D": "signs of the slopes on the diagonal, (d_ffn, d_ffn)",
    "|D|^(1/2)": "roots of the slopes' sizes on the diagonal, (d_ffn, d_ffn)",
    "diag(F'(z_1) z_3)": "the gate's slopes on the diagonal, (d_ffn, d_ffn)",
    "diag(F(z_1))": "the gate's activations on the diagonal, (d_ffn, d_ffn)",
    "diag(S_l)": "S_l on the diagonal, (T, T)",
    "diag(gamma)": "gains on the diagonal, (d, d)",
    "diag(p)": "probabilities on the diagonal, (n, n)",
    "dnorm/dx": "Jacobian of the norm, (d, d)",
    "dx'/dx": "Jacobian of the attention half-layer at one token, (d, d)",
    "dx'_n/dx_n": "Jacobian of layer n's attention half, (T d, T d)",
    "dy/dx'": "Jacobian of the feed-forward half-layer, (d, d)",
    "dy_n/dx'_n": "Jacobian of layer n's feed-forward half, (T d, T d)",
}


def _letters(table: dict[str, str], range: str) -> dict[str, Letter]:
    return {name: Letter(meaning, range) for name, meaning in table.items()}


_ARRAYS = _letters(_COLUMNS, COLUMN) | _letters(_MATRICES, MATRIX)
_NUMBERS = (
    _letters(_INDICES, INDEX) | _letters(_PROBABILITIES, UNIT) | _letters(_SIGNED, ANY) | _letters(_SCALARS, AT_LEAST_0)
)


def local_letter(atom: Any, derivation: str = "") -> Letter:
    """What a symbol made by `array` or `entry` stands for in a derivation.

    Raises:
        ValueError: it is not in the table.
    """
    table, name = (_NUMBERS if atom.is_commutative else _ARRAYS), str(atom)
    found = table.get(f"{derivation}:{name}") or table.get(name)
    if found is None:
        raise ValueError(f"{name} of the derivation {derivation!r} has no meaning; add it to theory/letters.py")
    return found


def local_keys() -> frozenset[str]:
    """Every key of the tables, arrays marked by a dot, for the test that none is left over."""
    return frozenset(_NUMBERS) | {f".{name}" for name in _ARRAYS}
