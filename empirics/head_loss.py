"""The head and the cross entropy as one function, a few tokens at a time, with the gradient in the same pass.

All logits at once, their logarithms of a softmax and two gradients of that size are the largest arrays of a step. They
do not fit a processor's cache, and memory that is asked for and given back at every step is taken from the system page
by page, which took as long as the arithmetic on it. Here only the logits of a few hundred tokens are there.

Shapes: N tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the target of a token that does not count, as in torch's cross entropy
AT_ONCE, LEAST_TOKENS = 2**20, 128  # logits at once, of no fewer tokens; 2^18 and 2^19 were no faster


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy of the logits W x, in nats a token, over the tokens whose target is not `IGNORED`.

    With p the softmax of W x, e the target's unit vector and N such tokens, the gradient in the logits of one is
    (p - e) / N. Sums are in the precision of x, so that half precision will not do.

    Raises:
        RuntimeError: a second derivative is asked for.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        n_tokens = max(LEAST_TOKENS, AT_ONCE // len(weight_VD))
        x_gradient = torch.empty_like(x_ND)
        weight_gradient = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        loss = x_ND.new_zeros(())
        for x, targets, gradient in zip(*(t.split(n_tokens) for t in (x_ND, targets_N, x_gradient)), strict=True):
            logits = x @ weight_VD.mT
            ignored, places = targets == IGNORED, (torch.arange(len(targets), device=x.device), targets.clamp(min=0))
            excess = logits.softmax(-1)
            # The logarithm of the sum of exponentials by the largest of them: one exponential a logit is enough.
            losses = logits.amax(-1) - logits[places] - excess.amax(-1).log()
            loss += losses.masked_fill_(ignored, 0.0).sum()
            excess[places] -= 1
            excess.index_fill_(0, ignored.nonzero()[:, 0], 0.0)  # a mask would pass over all of them
            torch.mm(excess, weight_VD, out=gradient)
            if weight_gradient is not None:
                torch.addmm(weight_gradient, excess.mT, x, out=weight_gradient)
        ctx.save_for_backward(x_gradient, weight_gradient)
        ctx.n_tokens = int((targets_N != IGNORED).sum())
        return loss / ctx.n_tokens

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if torch.is_grad_enabled():  # what was kept does not know what it depends on
            raise RuntimeError(
                "this loss has one derivative; for more, differentiate cross_entropy(model(tokens), ...)"
            )
        x_gradient, weight_gradient = ctx.saved_tensors
        share = gradients[0] / ctx.n_tokens
        return x_gradient * share, None if weight_gradient is None else weight_gradient * share, None
