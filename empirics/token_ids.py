"""Token ids to run anyone's decoder on: those that are given, held to be such, or random ones.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

N_TOKENS = 11  # enough for a change to be seen at the next token, and no usual number of heads
FEWEST = 2  # tokens among which one is changed


def token_table(model: nn.Module) -> nn.Embedding:
    """The embedding of the tokens: the one that a model of transformers names, else the first.

    Raises:
        ValueError: there is none.
    """
    named = getattr(model, "get_input_embeddings", lambda: None)()
    tables = [module for module in (named, *model.modules()) if isinstance(module, nn.Embedding)]
    if not tables:
        raise ValueError(f"{type(model).__name__} has no nn.Embedding; give a decoder that embeds token ids")
    return tables[0]


def context_of(model: nn.Module) -> int | None:
    """The most tokens of a sequence, as a model's architecture or config has it; None where neither says."""
    config = getattr(model, "config", None)
    said = [getattr(getattr(model, "architecture", None), "context", None)]
    said += [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "block_size")]
    return next((value for value in said if isinstance(value, int) and value > 0), None)


def one_sequence(model: nn.Module, tokens: Tensor | None = None) -> Tensor:
    """(1, T) ids to ask a model with: the first `N_TOKENS` of the first sequence given, or random ones, or fewer.

    Raises:
        ValueError: those given are no token ids.
    """
    if tokens is None:
        return some_tokens(model, (1, max(FEWEST, min(N_TOKENS, context_of(model) or N_TOKENS))))
    return require_tokens(model, tokens)[:1, :N_TOKENS]


def require_tokens(model: nn.Module, tokens: Any) -> Tensor:
    """(B, T) ids of a model's tokens, as int64, which losses want; what are none are refused, and too few.

    Raises:
        ValueError: in one line.
    """
    if not isinstance(tokens, Tensor):
        raise ValueError(f"tokens is of type {type(tokens).__name__}; give a tensor of ids, shape (B, T)")
    if tokens.ndim != 2 or not len(tokens):
        one = "; of one sequence give tokens[None]" if tokens.ndim == 1 else ""
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; give ids of shape (B, T){one}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens is of {tokens.dtype}; give ids, as torch.int64")
    if tokens.shape[1] < FEWEST:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; give at least {FEWEST} tokens a sequence")
    # The largest table: a table of positions may come before that of the tokens.
    rows = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=math.inf)
    low, high = (int(bound) for bound in tokens.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(f"tokens has the id {low if low < 0 else high}; the model's are 0 to {rows - 1}")
    return tokens.long()


def some_tokens(model: nn.Module, shape: tuple[int, int], *, seed: int = 0) -> Tensor:
    """(B, T) ids on the model's device, none of them its padding, distinct within a sequence if there are enough."""
    table = token_table(model)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([n for n in range(table.num_embeddings) if n != table.padding_idx])
    repeats = -(-shape[1] // len(ids))
    rows = [ids.repeat(repeats)[torch.randperm(repeats * len(ids), generator=generator)] for _ in range(shape[0])]
    return torch.stack(rows)[:, : shape[1]].to(table.weight.device)
