"""The benches: normalisation, softmax, a normal matrix, feed-forward, attention, and the normalised branches."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor, nn

from empirics import attention_slopes, observables
from empirics.benches import Bench, Choices, add_bench, small_architecture
from empirics.model import ACTIVATIONS, Attention, FeedForward, make_norm
from theory.architecture import Activation, Norm

# Relative rounding of a sum of a few dozen terms, 64 of them at 2.2e-16.
UNIT = 64 * 2.0**-52

WIDTHS = tuple(range(1, 9))
NORMS = {"norm": get_args(Norm), "eps": (0.0, 1e-12, 1e-5, 1e-3, 10.0)}
FEEDFORWARDS = {"activation": get_args(Activation), "gated": (False, True), "d_ffn": tuple(range(1, 13))}
ATTENTIONS = {
    "n_kv_heads": (1, 2),
    "kv_group": (1, 2, 3),
    "head_pairs": (1, 2),
    "positions": ("none", "rope", "alibi"),
    # What most models have comes up more often.
    "rope_fraction": (1.0, 1.0, 0.5, 0.25, 0.0),
    "rope_base": (10_000.0, 10_000.0, 2.0),
    "window": (0, 0, 0, 1, 2, 3),
    "qk_norm": ("none", "none", "head", "full"),
    "attention_softcap": (0.0, 0.0, 0.5, 5.0),
    "attention_scale": (None, None, None, None, 0.0, 3.0),
    "causal": (True, False),
}


def sequence(choices: Choices) -> tuple[int, int]:
    """Shape (T, D) of an input."""
    return choices["n_tokens"], choices["d_model"]


# --- normalisation ------------------------------------------------------------------------------------------------


def norm_module(choices: Choices) -> nn.Module:
    """The model's normalisation, of the kind and eps chosen."""
    return make_norm(small_architecture(choices))


def has_scale(norm: Any, x_TD: Tensor) -> bool:
    """Whether it divides every token by more than zero: with eps = 0 a constant token has no norm."""
    return bool(observables.observe_norm(norm, x_TD)["s"] > 0)


def norm_conditioning(norm: Any, x_TD: Tensor) -> float:
    """Relative rounding of a normalisation: the mean and the radius are subtracted from numbers of size |x|."""
    s = observables.observe_norm(norm, x_TD)["s"].item()
    return UNIT * (1 + x_TD.abs().max().item() / s) ** 2


def norm_size(norm: Any, x_TD: Tensor) -> float:
    """What bounds its Jacobian: the largest gain over the smallest normaliser."""
    values = observables.observe_norm(norm, x_TD)
    return (values["gain"] / values["s"]).item()


add_bench(
    Bench(
        quantity="norm_jacobian",
        choices={"d_model": WIDTHS, "n_tokens": (1, 2, 3), "biases": (False, True), **NORMS},
        module=norm_module,
        shape=sequence,
        truth=observables.true_tokenwise,
        symbols={("gain", "s"): observables.observe_norm},
        rounding=lambda norm, x_TD: norm_conditioning(norm, x_TD) * norm_size(norm, x_TD),
        defined=has_scale,
    )
)


def inner_gain(norm: Any, x_TD: Tensor) -> observables.Observed:
    """The third largest gain of a LayerNorm, the second of an RMSNorm, in size; and the token's normaliser."""
    place = 2 if isinstance(norm, nn.LayerNorm) else 1
    gains = norm.weight.abs().sort(descending=True).values
    return {"inner_gain": gains[place], "s": observables.observe_norm(norm, x_TD)["s"]}


def norm_inverse(norm: Any, x_TD: Tensor) -> Tensor:
    """One over the true norm of its Jacobian: a lower bound is attacked as an upper one of this."""
    return 1 / observables.true_tokenwise(norm, x_TD)


add_bench(
    Bench(
        quantity="norm_jacobian_inverse",
        choices={"d_model": WIDTHS[2:], "n_tokens": (1,), "biases": (False, True), **NORMS},
        module=norm_module,
        shape=sequence,
        truth=norm_inverse,
        symbols={("inner_gain", "s"): inner_gain},
        rounding=lambda norm, x_TD: (
            norm_conditioning(norm, x_TD) * norm_size(norm, x_TD) * norm_inverse(norm, x_TD).item() ** 2
        ),
        defined=lambda norm, x_TD: has_scale(norm, x_TD) and inner_gain(norm, x_TD)["inner_gain"].item() > 0,
    )
)


# --- embeddings ---------------------------------------------------------------------------------------------------


class EmbeddingTables(nn.Module):
    """The stream's start as a function of the tables: rows of the input are tokens', then the positions'."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.tokens = [int(letter) for letter in choices["sequence"]]
        self.learned, self.multiplier = choices["position_rows"] == 1.0, choices["multiplier"]
        self.gradient = choices["embedding_gradient"]
        self.norm = make_norm(small_architecture(choices)) if choices["embedding_norm"] else None

    @property
    def rows(self) -> int:
        """Of the tables together, one below the other."""
        return VOCABULARY + (len(self.tokens) if self.learned else 0)

    def sums(self, table: Tensor) -> Tensor:
        """(T, D), before the norm."""
        x_TD = self.multiplier * table[self.tokens]
        return x_TD + table[VOCABULARY:] if self.learned else x_TD

    def forward(self, table: Tensor) -> Tensor:
        """(T, D), the stream that the first layer reads, times the factor on the gradient: so is its Jacobian."""
        x_TD = self.sums(table)
        return self.gradient * (x_TD if self.norm is None else self.norm(x_TD))


VOCABULARY = 3


def embedding_slopes(embedding: Any, table: Tensor) -> Tensor:
    """(T,) bound on the slope of the norm at each place, 1 without one."""
    if embedding.norm is None:
        return torch.ones(len(embedding.tokens), dtype=table.dtype)
    observed = [observables.observe_norm(embedding.norm, x_D[None]) for x_D in embedding.sums(table)]
    return torch.stack([values["gain"] / values["s"] for values in observed])


def observe_embedding(embedding: Any, table: Tensor) -> observables.Observed:
    """The largest sum of squared slopes over a token's places, over a position's, and the norm's largest slope."""
    squares, norm = embedding_slopes(embedding, table).square(), embedding.norm
    places = torch.tensor(embedding.tokens)
    steepest = 1.0 if norm is None else norm.weight.abs().max() / math.sqrt(norm.eps)
    return {
        "token_weight": torch.stack([squares[places == token].sum() for token in set(embedding.tokens)]).max(),
        "position_weight": squares.max() if embedding.learned else 0.0,
        "norm_slope": steepest,
        "n_tokens": len(embedding.tokens),
    }


def embedding_rounding(embedding: Any, table: Tensor) -> float:
    """That of the norm at its worst token, carried to the Jacobian's largest size."""
    if embedding.norm is None:
        return 0.0
    x_TD = embedding.sums(table)
    worst = max(norm_conditioning(embedding.norm, x_D[None]) for x_D in x_TD)
    size = math.sqrt(len(embedding.tokens) * embedding.multiplier**2 + 1) * embedding.gradient
    return worst * size * embedding_slopes(embedding, table).max().item()


add_bench(
    Bench(
        quantity="embedding_jacobian",
        choices={
            "sequence": ("0", "00", "01", "001", "0121", "00000", "01201"),
            "d_model": WIDTHS[:5],
            "multiplier": (0.0, 0.3, 1.0, 16.0),
            "position_rows": (0.0, 1.0),
            "embedding_gradient": (1.0, 0.1),
            "embedding_norm": (False, True),
            "norm": get_args(Norm),
            "eps": (1e-12, 1e-5, 1e-3, 10.0),
        },
        module=EmbeddingTables,
        shape=lambda choices: (EmbeddingTables(choices).rows, choices["d_model"]),
        truth=observables.true_opnorm,
        symbols={("token_weight", "position_weight", "norm_slope", "n_tokens"): observe_embedding},
        rounding=embedding_rounding,
        several=lambda embedding, table: len(set(embedding.tokens)) > 1,
    )
)


class TiedTable(nn.Module):
    """Logits as a function of a table that is read at both ends; between, a running mean and a norm, or nothing."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.tokens = [int(letter) for letter in choices["sequence"]]
        self.multiplier, self.gradient = choices["multiplier"], choices["embedding_gradient"]
        self.norm = make_norm(small_architecture(choices)) if choices["final_norm"] else None
        length = len(self.tokens)
        counts = torch.arange(1, length + 1, dtype=torch.float64)[:, None]
        mean_TT = torch.ones(length, length, dtype=torch.float64).tril() / counts
        self.mixing_TT = torch.eye(length, dtype=torch.float64) + (mean_TT if choices["averages"] else 0 * mean_TT)

    def mixed(self, table: Tensor) -> Tensor:
        """(T, D), what the norm reads."""
        return self.mixing_TT.to(table.dtype) @ (self.multiplier * table[self.tokens])

    def read(self, table: Tensor) -> Tensor:
        """(T, D), the head's input."""
        x_TD = self.mixed(table)
        return x_TD if self.norm is None else self.norm(x_TD)

    def forward(self, table: Tensor) -> Tensor:
        """(T, V) logits."""
        return self.read(table) @ table.mT


def true_tied(tied: Any, table: Tensor) -> Tensor:
    """|J_T|, the way through the stream times the factor on its gradient, and the head's."""
    # A copy each, so that what is held is not differentiated in.
    stream = observables.jacobian(lambda read: tied.read(read) @ table.mT, table.clone())
    head = observables.jacobian(lambda head: tied.read(table) @ head.mT, table.clone())
    return observables.opnorm(tied.gradient * stream + head)


def tied_slopes(tied: Any, table: Tensor) -> Tensor:
    """(T,) bound on the slope of the norm at each place, 1 without one."""
    if tied.norm is None:
        return torch.ones(len(tied.tokens), dtype=table.dtype)
    observed = [observables.observe_norm(tied.norm, x_D[None]) for x_D in tied.mixed(table)]
    return torch.stack([values["gain"] / values["s"] for values in observed])


def observe_tied(tied: Any, table: Tensor) -> observables.Observed:
    """Norms of the table and the head's input, the largest count, and a bound on the network between."""
    mixing = torch.linalg.matrix_norm(tied.mixing_TT.to(table.dtype), 2)
    return {
        "token_weight": float(max(map(tied.tokens.count, tied.tokens))),
        "head_input": torch.linalg.matrix_norm(tied.read(table), 2),
        "head_slope": mixing * tied_slopes(tied, table).max(),
        "opnorm_E": torch.linalg.matrix_norm(table, 2),
    }


def tied_rounding(tied: Any, table: Tensor) -> float:
    """That of the norm at its worst token, carried to the Jacobian's largest size."""
    if tied.norm is None:
        return 0.0
    worst = max(norm_conditioning(tied.norm, x_D[None]) for x_D in tied.mixed(table))
    found = observe_tied(tied, table)
    size = found["head_input"] + tied.multiplier * len(tied.tokens) * found["head_slope"] * found["opnorm_E"]
    return worst * float(size)


add_bench(
    Bench(
        quantity="tied_jacobian",
        choices={
            "sequence": ("0", "00", "01", "001", "0121", "01201"),
            "d_model": WIDTHS[:5],
            "multiplier": (0.3, 1.0, 16.0),
            "embedding_gradient": (1.0, 0.1),
            "averages": (False, True),
            "final_norm": (False, True),
            "norm": get_args(Norm),
            "eps": (1e-12, 1e-5, 1e-3, 10.0),
        },
        module=TiedTable,
        shape=lambda choices: (VOCABULARY, choices["d_model"]),
        truth=true_tied,
        symbols={("token_weight", "head_input", "head_slope", "opnorm_E"): observe_tied},
        rounding=tied_rounding,
        several=lambda tied, table: len(set(tied.tokens)) > 1,
    )
)


# --- softmax, random matrices -------------------------------------------------------------------------------------


add_bench(
    Bench(
        quantity="softmax_jacobian",
        choices={"n_logits": WIDTHS},
        module=lambda choices: nn.Softmax(-1),
        shape=lambda choices: (choices["n_logits"],),
        truth=observables.true_opnorm,
        symbols={},
    )
)


class NormalMatrix(nn.Module):
    """A matrix with independent N(0, sigma^2) entries; `weight` is what a plain draw makes of its shape."""

    def __init__(self, rows: int, columns: int, sigma: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.factor = sigma * math.sqrt(columns)  # a plain draw divides by the root of the columns

    def matrix(self) -> Tensor:
        """(rows, columns), of the standard deviation asked for."""
        return self.factor * self.weight


add_bench(
    Bench(
        quantity="matrix_opnorm",
        # At a deviation of 8 the bound fails once in e^32 draws.
        choices={
            "rows": tuple(range(1, 41)),
            "columns": tuple(range(1, 41)),
            "sigma": (1e-6, 0.02, 1.0, 1e6),
            "t": (8.0,),
        },
        module=lambda choices: NormalMatrix(choices["rows"], choices["columns"], choices["sigma"]),
        shape=lambda choices: (1,),
        truth=lambda module, x: observables.opnorm(module.matrix()),
        symbols={},
        lawful=True,
    )
)


# --- feed-forward -------------------------------------------------------------------------------------------------


def feedforward_module(choices: Choices) -> FeedForward:
    """The model's feed-forward sub-layer."""
    return FeedForward(small_architecture(choices))


def reach(feedforward: FeedForward, u_TD: Tensor) -> float:
    """The largest that a pre-activation could be."""
    radius = u_TD.norm(dim=-1).max()
    sizes = [
        observables.opnorm(linear.weight) * radius + (0.0 if linear.bias is None else linear.bias.norm())
        for linear in (feedforward.enter, feedforward.gate)
        if linear is not None
    ]
    return float(sum(size.item() for size in sizes))


def feedforward_rounding(feedforward: FeedForward, u_TD: Tensor) -> float:
    values = observables.observe_feedforward(feedforward, u_TD)
    entering = values.get("opnorm_13", values["opnorm_1"])
    # A pre-activation of size z is off by UNIT z, and so (|F''| is of order one) is the slope it is put into.
    return UNIT * (values["opnorm_2"] * entering).item() * (1 + reach(feedforward, u_TD)) ** 2


def slope_in_reach(feedforward: FeedForward, u_TD: Tensor) -> observables.Observed:
    """ReLU squared has no largest slope, but one for the pre-activations in reach; the others keep their constant."""
    unbounded = feedforward.activation is ACTIVATIONS["relu-squared"]
    return {"lipschitz": 2 * reach(feedforward, u_TD)} if unbounded else {}


FEEDFORWARD_SYMBOLS = ("opnorm_1", "opnorm_2", "opnorm_13", "gate_slope")

add_bench(
    Bench(
        quantity="ffn_jacobian",
        choices={"d_model": WIDTHS, "n_tokens": (1, 2, 3), "biases": (False, True), **FEEDFORWARDS},
        module=feedforward_module,
        shape=sequence,
        truth=observables.true_feedforward,
        symbols={
            FEEDFORWARD_SYMBOLS: observables.observe_feedforward,
            ("open_1", "open_2"): observables.observe_open_units,
            ("R",): observables.observe_reach,
            ("lipschitz",): slope_in_reach,
        },
        rounding=feedforward_rounding,
    )
)


class Branch(nn.Module):
    """A sub-layer of the normalised input."""

    def __init__(self, norm: nn.Module, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = norm, inner

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D), before it is added to the shortcut."""
        return self.inner(self.norm(x_TD))


def branch_rounding(branch: Any, x_TD: Tensor) -> float:
    """That of the norm, as the feed-forward's slopes carry it on."""
    u_TD = branch.norm(x_TD)
    values = observables.observe_feedforward(branch.inner, u_TD)
    entering = values.get("opnorm_13", values["opnorm_1"])
    size = (values["opnorm_2"] * entering).item() * norm_size(branch.norm, x_TD)
    return norm_conditioning(branch.norm, x_TD) * size * (1 + reach(branch.inner, u_TD)) ** 2


add_bench(
    Bench(
        quantity="ffn_branch",
        choices={"d_model": WIDTHS, "n_tokens": (1, 2, 3), "biases": (False, True), **NORMS, **FEEDFORWARDS},
        module=lambda choices: Branch(norm_module(choices), feedforward_module(choices)),
        shape=sequence,
        truth=observables.true_tokenwise,
        symbols={
            ("gain", "s"): lambda branch, x_TD: observables.observe_norm(branch.norm, x_TD),
            FEEDFORWARD_SYMBOLS: lambda branch, x_TD: observables.observe_feedforward(branch.inner, branch.norm(x_TD)),
            ("lipschitz",): lambda branch, x_TD: slope_in_reach(branch.inner, branch.norm(x_TD)),
        },
        rounding=branch_rounding,
        defined=lambda branch, x_TD: has_scale(branch.norm, x_TD),
    )
)


# --- attention ----------------------------------------------------------------------------------------------------


class FullAttention(Attention):
    """Every token sees every other."""

    def seen(self, length: int, device: torch.device) -> Tensor:
        """(T, T), true everywhere."""
        return torch.ones(length, length, dtype=torch.bool, device=device)


def attention_module(choices: Choices) -> Attention:
    """The model's attention, causal or not; `head_pairs` pairs turn where some turn, and else that many coordinates."""
    width, turning = choices["head_pairs"], choices["rope_fraction"]
    if choices["positions"] == "rope":
        width *= round(2 / turning) if turning else 2
    heads = choices["n_kv_heads"] * choices["kv_group"]
    kind = Attention if choices["causal"] else FullAttention
    return kind(small_architecture({**choices, "n_heads": heads, "d_head": width}))


def attention_rounding(attention: Attention, u_TD: Tensor) -> float:
    """v_j - o_t is a difference of numbers of size |W_V| R + |b_V|; a saturated softmax leaves only its rounding."""
    norms = observables.observe_attention_weights(attention, u_TD)
    size_of: dict[str, float] = {}
    slope_of: dict[str, float] = {}
    for name in ("query", "key", "value"):
        linear, norm = getattr(attention, name), getattr(attention, f"{name}_norm", None)
        slope_of[name] = observables.opnorm(linear.weight).item()
        bias = 0.0 if linear.bias is None else linear.bias.norm().item()
        size_of[name] = slope_of[name] * norms["R"].item() + bias
        if norm is not None:  # relative to what it divides by, as for any norm
            rows = linear(u_TD) if attention.qk_norm == "full" else linear(u_TD).unflatten(-1, (-1, attention.d_head))
            observed = observables.observe_norm(norm, rows.flatten(0, -2))
            gain, least = observed["gain"].item(), observed["s"].item()
            slope_of[name] *= gain / least * (1 + size_of[name] / least) ** 2
            shift = getattr(norm, "bias", None)
            size_of[name] = gain * math.sqrt(norm.weight.numel()) + (0.0 if shift is None else shift.norm().item())
    value = size_of["value"]
    slopes = attention.scale * (size_of["query"] * slope_of["key"] + size_of["key"] * slope_of["query"])
    size = math.sqrt(norms["kv_group"] * u_TD.shape[0]) * (norms["opnorm_V"].item() + value * slopes)
    return UNIT * norms["opnorm_O"].item() * size


def attends_apart(attention: Attention, u_TD: Tensor) -> bool:
    """Two tokens a hundredth of the longest one apart, and a row of logits with at least 1 between two of them.

    Without the second, a softmax that is uniform whatever the tokens would count: a fixed average.
    """
    with torch.no_grad():
        apart = torch.cdist(u_TD, u_TD).max() > 0.01 * u_TD.norm(dim=-1).max()
        return bool(apart) and float(observables.observe_softmax(attention, u_TD)["logit_spread"]) >= 1


ATTENTION_SYMBOLS = {
    (
        *("opnorm_Q", "opnorm_K", "opnorm_V", "opnorm_VH", "opnorm_O", "head_VQ", "head_VK"),
        *("R", "d_head", "kv_group", "n_tokens"),
    ): observables.observe_attention_weights,
    ("logit_spread", "opnorm_P"): observables.observe_softmax,
    ("key_term", "query_term"): observables.observe_covariances,
    ("opnorm_OV", "opnorm_P_mean", "P_deviation", "key_blocks", "query_blocks"): attention_slopes.observe_blocks,
    ("heads_OV", "key_slope", "query_slope", "n_seen"): attention_slopes.observe_slopes,
}
ATTENTION_CHOICES = {
    "d_model": tuple(range(1, 7)), "n_tokens": tuple(range(1, 7)), "biases": (False, True), "norm": get_args(Norm),
    "eps": (1e-12, 1e-5, 1e-3, 10.0), **ATTENTIONS,
}  # fmt: skip

add_bench(
    Bench(
        quantity="attention_probability",
        choices=ATTENTION_CHOICES,
        module=attention_module,
        shape=sequence,
        truth=observables.true_probability,
        symbols=ATTENTION_SYMBOLS,
        several=attends_apart,
    )
)
add_bench(
    Bench(
        quantity="attention_jacobian",
        choices=ATTENTION_CHOICES,
        module=attention_module,
        shape=sequence,
        truth=observables.true_attention,
        symbols=ATTENTION_SYMBOLS,
        rounding=attention_rounding,
        several=attends_apart,
    )
)
