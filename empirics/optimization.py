"""What a step does with the gradient: parameter groups, clipping, AdamW, and the norms that are written down.

Weight decay is decoupled (AdamW) and acts on the matrices inside the layers and on the head. Gains and biases never
decay. Token and position tables decay with `decay_embeddings` only; a tied head is the token table and follows it.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from empirics.distributed import ALONE, Ranks, local
from empirics.model import Transformer
from empirics.run_spec import RunSpec

EMBEDDINGS = ("tokens", "positions")


def decays(name: str, parameter: Tensor, spec: RunSpec) -> bool:
    """Whether weight decay acts on a parameter."""
    places = ("layers", "head", *EMBEDDINGS) if spec.decay_embeddings else ("layers", "head")
    return parameter.ndim == 2 and name.startswith(places)


def decay_table(model: Transformer, spec: RunSpec) -> dict[str, list[str]]:
    """Names of the parameters that decay and that do not, layers by a star; for the record."""
    table: dict[str, set[str]] = {"decaying": set(), "not_decaying": set()}
    for name, parameter in model.named_parameters():
        decaying = spec.weight_decay > 0 and decays(name, parameter, spec)
        table["decaying" if decaying else "not_decaying"].add(re.sub(r"\.\d+\.", ".*.", name))
    return {kind: sorted(names) for kind, names in table.items()}


def adamw(model: Transformer, spec: RunSpec) -> torch.optim.Optimizer:
    """AdamW with two groups: what decays, and the rest."""
    named = list(model.named_parameters())
    decaying = [p for name, p in named if decays(name, p, spec)]
    rest = [p for name, p in named if not decays(name, p, spec)]
    groups = [{"params": decaying, "weight_decay": spec.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(spec.beta_1, spec.beta_2), fused=True)


class Stepper:
    """One optimizer's steps, with the norms of what it is given and of what it does.

    What is done to every parameter is one call of torch's `_foreach` functions, with which its own optimizers and
    clipping are written: in a small model, loops in Python took a twentieth of the step.

    Norms are by where parameters sit: embedding, layer 0..N-1, head; gains belong to where they are. Each rank works on
    its parts of the parameters, and norms are those of the whole.
    """

    def __init__(self, model: Transformer, optimizer: torch.optim.Optimizer, ranks: Ranks = ALONE) -> None:
        self.optimizer, self.ranks = optimizer, ranks
        self.groups = parameter_groups(model)
        self.parameters = [parameter for group in self.groups.values() for parameter in group]
        self._here = [local(parameter.detach()) for parameter in self.parameters]
        # The copy before a step lies by width of a row, so that the norms of all rows of a width are one call; a vector
        # is rows of one number.
        by_width: dict[int, list[int]] = {}
        for k, x in enumerate(self._here):
            by_width.setdefault(x.shape[1] if x.ndim > 1 else 1, []).append(k)
        before, self._stacks = dict[int, Tensor](), list[Tensor]()
        for width, members in by_width.items():
            sizes = [self._here[k].numel() for k in members]
            stack = self._here[0].new_empty(sum(sizes))
            self._stacks.append(stack.view(-1, width) if width > 1 else stack)
            for k, part in zip(members, stack.split(sizes), strict=True):
                before[k] = part.view_as(self._here[k])
        self._before = [before[k] for k in sorted(before)]
        self._rows = [sum(local(p.detach()).shape[0] for p in group) for group in self.groups.values()]
        owner_R = torch.cat([torch.full((len(self._here[k]),), k) for k in before])
        self._in_order = owner_R.argsort(stable=True).to(self._here[0].device)

    def gradient_norms(self) -> dict[str, float]:
        """Norm of the gradient, group by group."""
        return self._group_norms(_row_norms(self._gradients()))

    def step(self, *, rate: float, scale: float) -> dict[str, float]:
        """Scale the gradient, step, and return the norm of the parameters' change, group by group."""
        if scale != 1.0:
            torch._foreach_mul_(self._gradients(), scale)  # type: ignore[attr-defined]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch._foreach_copy_(self._before, self._here)  # type: ignore[attr-defined]
        self.optimizer.step()
        torch._foreach_sub_(self._before, self._here)  # type: ignore[attr-defined]
        return self._group_norms(_row_norms(self._stacks)[self._in_order])

    def _gradients(self) -> list[Tensor]:
        gradients = [local(parameter.grad) for parameter in self.parameters if parameter.grad is not None]
        assert len(gradients) == len(self.parameters)  # every parameter takes part in the loss
        return gradients

    def _group_norms(self, norms_R: Tensor) -> dict[str, float]:
        """From the norms of rows, in the order of the parameters."""
        # Ranks have whole rows, whose norms are the same bits wherever they are; float64 from there on, so that what
        # clipping multiplies by does not depend on how many ranks a matrix is spread over.
        squares = norms_R.double().square().split(self._rows)
        totals = self.ranks.total(torch.stack([group.sum() for group in squares]))
        return dict(zip(self.groups, totals.sqrt().tolist(), strict=True))


def _row_norms(tensors: list[Tensor]) -> Tensor:
    """Norms of the rows of matrices, and entries of vectors, (R,)."""
    return torch.cat([torch.linalg.vector_norm(x, dim=1) if x.ndim > 1 else x for x in tensors])


def total_norm(norms: dict[str, float]) -> float:
    """Norm over all groups."""
    return math.sqrt(sum(norm * norm for norm in norms.values()))


def parameter_groups(model: Transformer) -> dict[str, list[nn.Parameter]]:
    """Parameters by where they sit: embedding, layer 0..N-1, head."""
    layers = {f"layer {n}": list(layer.parameters()) for n, layer in enumerate(model.layers)}
    owned = {id(parameter) for group in layers.values() for parameter in group}
    embedding = [p for name, p in model.named_parameters() if name.startswith((*EMBEDDINGS, "embedding"))]
    owned |= {id(parameter) for parameter in embedding}
    head = [parameter for parameter in model.parameters() if id(parameter) not in owned]
    return {"embedding": embedding, **layers, "head": head}
