"""Bounds on the feed-forward sub-layer that trade activations for weights: one from each side."""

from __future__ import annotations

from theory.quantities import quantity
from theory.sources import Source
from theory.statements import Statement, register


@register
def ffn_upper_aposteriori() -> Statement:
    r"""Bound the plain feed-forward sub-layer's Jacobian with the real slopes of its units.

    .. math:: \|J_u\| \le \max_t \|W_2 |D_t|^{1/2}\| \max_t \||D_t|^{1/2} W_1\|, \qquad D_t = diag(F'(z_t))

    Holds: any weights, biases and inputs. Attained by the identity with aligned singular vectors.
    Why: J_u = (W_2 |D|^{1/2} sign D) (|D|^{1/2} W_1) at every token; closed units are left out on both sides.
    """
    return Statement(
        name="ffn-upper-aposteriori",
        kind="upper",
        quantity=quantity("ffn_jacobian"),
        formula=lambda open_1, open_2: open_1 * open_2,
        source=Source(key="spikecheck", label="slopes shared between the two matrices"),
        assumptions=("feed-forward without a gate", "activations known"),
        why="J_u = (W_2 |D|^(1/2) sign D) (|D|^(1/2) W_1): closed units are left out on both sides",
        tight=True,
        covers={"gated": (False,)},
    )


@register
def ffn_gated_upper_apriori() -> Statement:
    r"""Bound the gated feed-forward sub-layer's Jacobian from its weights' norms alone.

    .. math:: \|J_u\| \le L R \|W_2\| \|[W_1; W_3]\|^2, \qquad L = \sup_{|z| \le \|W_1\| R} |F'(z)|

    Holds: no biases, F(0) = 0, any input of tokens at most R long. Attained by one unit without an activation.
    L is the largest slope over the arguments that can occur, |z| <= |W_1| R: at most the activation's largest, and
    finite for squared ReLU too, whose slope has no largest value on the line; there L = 2 |W_1| R.
    Why: |F(z)| <= L |z|, so that unit i has (F'(z_1) z_3)^2 + F(z_1)^2 <= L^2 (z_1^2 + z_3^2), and (z_1, z_3) is at
        most |[W_1; W_3]| R long.
    """
    return Statement(
        name="ffn-gated-upper-apriori",
        kind="upper",
        quantity=quantity("ffn_jacobian"),
        formula=lambda lipschitz, R, opnorm_2, opnorm_13: lipschitz * R * opnorm_2 * opnorm_13**2,
        source=Source(key="spikecheck", label="ffn-gated-upper and the activation's largest slope"),
        assumptions=(
            "gated feed-forward without biases",
            "an activation that is 0 at 0",
            "L the largest slope over |z| <= |W_1| R",
        ),
        why="(F'(z_1) z_3)^2 + F(z_1)^2 <= L^2 (z_1^2 + z_3^2) <= (L |[W_1; W_3]| R)^2 for every unit",
        tight=True,
        covers={"gated": (True,), "biases": (False,)},
    )
