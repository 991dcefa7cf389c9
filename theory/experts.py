"""Feed-forwards behind a router: what a token's Jacobian is made of while its routing stays."""

from __future__ import annotations

import math
from typing import Any

from theory.architecture import Activation
from theory.experts_outlier import DRAWN, MOST_ROUTERS, TOKENS, RoutedLayer, routed_opnorm
from theory.quantities import quantity
from theory.random_matrix import elementwise
from theory.sources import Source
from theory.statements import Statement, register


@register
def experts_upper() -> Statement:
    r"""Bound the Jacobian of routed experts in their normalised input, where the routing does not change.

    .. math:: \|J_u\| \le \max_e \|J_e\| + \tfrac12 \max_e \|f_e\| \max_{e,e'} \|w_e - w_{e'}\|

    Holds: any experts f_e with Jacobians J_e, any router rows w_e, top-k gates by a softmax over the chosen or over
        all. At a change of routing the output jumps and has no Jacobian.
    Why: J_u = sum_e g_e J_e + sum_e f_e g_e (w_e - sum_i p_i w_i)', where p is the softmax that the gates are of and
        g <= p. The second part's image of v is at most max |f_e| times the standard deviation of w_e.v over p, which
        is at most half its range.
    """
    return Statement(
        name="experts-upper",
        kind="upper",
        quantity=quantity("experts_jacobian"),
        formula=lambda expert_jacobian, expert_output, router_spread: (
            expert_jacobian + expert_output * router_spread / 2
        ),
        source=Source(key="spikecheck", label="product rule and the largest standard deviation in a range"),
        assumptions=("top-k routing", "experts' Jacobians and outputs known", "no token between two routings"),
        why="J_u = sum_e g_e J_e + sum_e f_e g_e (w_e - sum_i p_i w_i)'; a deviation is at most half the range",
        tight=True,
    )


# Measured there; larger widths are nearer to the limit that the outlier is of.
ROUTED = {
    "d": (64.0, math.inf), "d_ffn": (64.0, math.inf), "n_experts": (1.0, 64.0), "n_chosen": (1.0, 8.0),
    "n_tokens": (1.0, 64.0),
}  # fmt: skip
ROUTINGS = {
    "n_chosen is at most n_experts": lambda n_chosen, n_experts: n_chosen <= n_experts,
    "the logits' variance sigma_router^2 d is at most 4": lambda sigma_router, d: (
        sigma_router**2 * d <= 4 + 1e-9
    ),  # but for rounding
}


def _sharp(activation: Activation, *, gated: bool) -> Statement:
    name = f"{'gated_' if gated else ''}{activation}".replace("-", "_")

    def one(*numbers: Any) -> float:
        enter, leave, gate, router, width, hidden, experts, chosen, renormalised, tokens = numbers
        layer = RoutedLayer(
            activation=activation, gated=gated, d=int(width), d_ffn=int(hidden), experts=int(experts),
            chosen=int(chosen), renormalised=bool(renormalised), sigma_1=float(enter), sigma_2=1.0,
            sigma_3=float(gate), sigma_router=float(router),
        )  # fmt: skip
        return float(leave) * routed_opnorm(layer, int(tokens))

    def plain(
        sigma_1: Any, sigma_2: Any, sigma_router: Any, d: Any, d_ffn: Any, n_experts: Any, n_chosen: Any,
        gates_renormalised: Any, n_tokens: Any,
    ) -> Any:  # fmt: skip
        routing = (sigma_router, d, d_ffn, n_experts, n_chosen, gates_renormalised, n_tokens)
        return elementwise(f"experts_{name}", one, sigma_1, sigma_2, 0, *routing)

    def with_gate(
        sigma_1: Any, sigma_2: Any, sigma_3: Any, sigma_router: Any, d: Any, d_ffn: Any, n_experts: Any, n_chosen: Any,
        gates_renormalised: Any, n_tokens: Any,
    ) -> Any:  # fmt: skip
        routing = (sigma_router, d, d_ffn, n_experts, n_chosen, gates_renormalised, n_tokens)
        return elementwise(f"experts_{name}", one, sigma_1, sigma_2, sigma_3, *routing)

    return Statement(
        name=f"experts-sharp-{'gated-' if gated else ''}{activation}",
        kind="sharp",
        quantity=quantity("experts_jacobian"),
        formula=with_gate if gated else plain,
        source=Source(
            key="benaych2012singular",
            label=f"outliers of a low-rank part, for a product derived here; {TOKENS * MOST_ROUTERS} to {DRAWN} tokens "
            f"drawn, of routers by seeds from 0",
        ),
        assumptions=(
            "independent normal weights and normalised tokens", "no capacity: no token is dropped", "d >= 64",
            "d_ffn >= 64", "at most 64 tokens, 64 experts and 8 of them to a token", *ROUTINGS,
        ),
        why="the chosen experts are one layer with slopes times gates; the router's part is an outlier beside its edge",
        target=0.04 if gated else 0.03,  # as of feed-forwards with a gate, whose largest units decide
        covers={"activation": (activation,), "gated": (gated,)},
        domain=ROUTED,
        relations=ROUTINGS,
    )  # fmt: skip


@register
def experts_sharp_relu() -> Statement:
    r"""Predict the Jacobian norm of ReLU experts behind a router at initialisation, largest over the tokens.

    .. math:: J_u = \sum_e g_e J_e + \sum_e f_e g_e (w_e - \bar w_p)^\top

    Holds: d and d_ffn from 64, up to 64 experts, 8 of them to a token and 64 tokens, router logits of variance up to
        4, gates over the chosen experts or over all.
    Why: given its units' inputs the first sum is one feed-forward layer of all chosen experts' units; beside it the
        second has rank k and, as outputs are sqrt(d) long, is the larger. See `theory.experts_outlier`.
    """
    return _sharp("relu", gated=False)


@register
def experts_sharp_gated_silu() -> Statement:
    """Predict the same of SwiGLU experts; `experts-sharp-relu` says where it holds."""
    return _sharp("silu", gated=True)
