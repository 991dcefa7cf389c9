"""The bench of experts behind a router."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from empirics import observables
from empirics.bench_sublayers import FEEDFORWARDS, UNIT, WIDTHS, feedforward_rounding, sequence
from empirics.benches import Bench, add_bench, small_architecture
from empirics.model import Experts


def experts_rounding(experts: Any, u_TD: Tensor) -> float:
    values = observables.observe_experts(experts, u_TD)
    single = sum(feedforward_rounding(expert, u_TD) for expert in experts.experts)
    logits = experts.router(u_TD).abs().max().item()
    # A gate is off by its logits' rounding; rows that are equal have no spread and cancel but for rounding.
    longest = experts.router.weight.norm(dim=1).max()
    size = values["expert_jacobian"] + values["expert_output"] * longest
    return single + UNIT * (1 + logits) * float(size)


add_bench(
    Bench(
        quantity="experts_jacobian",
        choices={
            "d_model": WIDTHS[:6],
            "n_tokens": (1, 2, 3),
            "biases": (False, True),
            **FEEDFORWARDS,
            "n_experts": (3, 4, 5),
            "experts_per_token": (1, 2, 3),
            "gates_renormalised": (True, False),
        },
        module=lambda choices: Experts(small_architecture(choices)),
        shape=sequence,
        truth=observables.true_experts,
        symbols={("expert_jacobian", "expert_output", "router_spread"): observables.observe_experts},
        rounding=experts_rounding,
    )
)
