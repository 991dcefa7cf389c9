"""Feed-forwards behind a router: what a token's Jacobian is made of while its routing stays."""

from __future__ import annotations

from theory.quantities import quantity
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
