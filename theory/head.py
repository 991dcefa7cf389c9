"""What the loss sends back into the residual stream, from the softmax over the vocabulary at initialisation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from theory.architecture import Architecture
from theory.grams import Gram
from theory.softmax_moments import softmax_moments


def head_gradient(architecture: Architecture, final: Gram, targets: NDArray[np.int64] | None) -> Gram:
    """Gram of the loss gradient at the head's input, up to a factor: (y - p_t).(y' - p_t') over the vocabulary.

    y is a target, p_t the predicted distribution: a softmax of independent logits, whose covariance between tokens is
    `final`, the Gram matrix of the head's input. Logits l = m W x tilt p_t towards the rows along the token, so that
    E[W'p] = m sigma^2 x, which a final norm, orthogonal to its token, takes out.
    """
    a, n = architecture, final.diag.size
    vocabulary, size = np.array(float(a.vocab_size)), head_variance(a)
    itself = softmax_moments(vocabulary, size * final.diag).gain
    covariance = size * final.off  # negative ones by exp(-c) - 1 = -exp(-c) (exp(c) - 1)
    together = softmax_moments(vocabulary, np.abs(covariance)).gain
    together = np.where(covariance < 0, -np.exp(np.minimum(covariance, 0.0)) * together, together)
    rest = 1 - 1 / a.vocab_size
    same = np.zeros((n, n)) if targets is None else (targets[:, None] == targets[None, :]).astype(np.float64)
    found = Gram(1 + (rest * itself - 1) / a.vocab_size, same + (rest * together - 1) / a.vocab_size)
    return found if a.final_norm else found + final * (size / a.d_model)


def head_variance(architecture: Architecture) -> float:
    """Variance of an output logit of a token of mean square 1."""
    return (architecture.logit_multiplier * architecture.stds.head) ** 2 * architecture.d_model
