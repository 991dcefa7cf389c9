"""The real decoder classes of transformers: tiny configs of each, and their gradient growth measured by name.

`REAL` are small models of odd sizes whose growth a prediction can be held to (`empirics.class_configs`); `TINY` are for
structure, with weights so large that every setting shows in the output. Both are as a `config.json` would be.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from empirics.class_configs import REAL, VOCABULARY, gpt_sizes, llama_sizes

__all__ = ["FIRST_TOKEN", "REAL", "TINY", "VOCABULARY", "blocks", "build", "measured_growth", "residual_ends"]

transformers.logging.set_verbosity_error()  # it warns of token ids outside these small vocabularies

FIRST_TOKEN = 2  # the tokens before it are padding in one class or another

_TINY_LLAMA = llama_sizes(32, 4, 4, 52) | {"initializer_range": 0.25}
_TINY_GROUPED = _TINY_LLAMA | {"num_key_value_heads": 2}
_TINY_GPT = gpt_sizes(32, 4, 4) | {"initializer_range": 0.25}
_TINY: dict[str, dict[str, Any]] = {
    "gpt2": _TINY_GPT | {"n_inner": 40},
    "gptj": _TINY_GPT | {"rotary_dim": 4},
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 4, "num_heads": 4, "window_size": 5, "initializer_range": 0.25,
        "attention_types": [[["global", "local"], 2]], "max_position_embeddings": 64,
    },
    "gpt_neox": _TINY_LLAMA | {"num_attention_heads": 2},
    "opt": {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 40,
        "max_position_embeddings": 64, "init_std": 0.25,
    },
    "bloom": {"hidden_size": 36, "n_layer": 4, "n_head": 6, "initializer_range": 0.25},
    "falcon": {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_hidden_size": 40,
        "initializer_range": 0.25,
    },
    "mpt": {"d_model": 36, "n_layers": 4, "n_heads": 6, "max_seq_len": 64, "initializer_range": 0.25},
    "llama": _TINY_GROUPED,
    "mistral": _TINY_GROUPED | {"sliding_window": 5},
    "qwen2": _TINY_GROUPED,
    "qwen3": _TINY_GROUPED | {"head_dim": 10},
    "gemma": _TINY_GROUPED | {"head_dim": 10},
    "gemma2": _TINY_GROUPED | {"head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 9},
    "gemma3_text": _TINY_GROUPED | {
        "head_dim": 10, "sliding_window": 5, "num_hidden_layers": 6, "query_pre_attn_scalar": 9,
    },
    "olmo": _TINY_GROUPED,
    "olmo2": _TINY_GROUPED,
    "granite": _TINY_GROUPED | {
        "embedding_multiplier": 2, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 4,
    },
    "phi": _TINY_GROUPED,
    "phi3": _TINY_GROUPED | {"pad_token_id": None},
    "cohere": _TINY_GROUPED,
    "starcoder2": _TINY_GROUPED,
    "stablelm": _TINY_GROUPED | {"num_attention_heads": 2, "num_key_value_heads": 1},
    "smollm3": _TINY_GROUPED | {"pad_token_id": None},
    "mixtral": _TINY_GROUPED | {"num_local_experts": 5},
    "olmoe": _TINY_GROUPED | {"num_experts": 6, "num_experts_per_tok": 3},
    "qwen3_moe": _TINY_GROUPED | {
        "head_dim": 10, "moe_intermediate_size": 20, "num_experts": 7, "num_experts_per_tok": 3,
    },
}  # fmt: skip
TINY = {kind: {"model_type": kind, "vocab_size": 50} | config for kind, config in _TINY.items()}


def build(config: dict[str, Any], seed: int = 0) -> Any:
    """The class with random weights, without dropout, with the attention that is written out."""
    torch.manual_seed(seed)
    rest = {key: value for key, value in config.items() if key != "model_type"}
    settings = transformers.AutoConfig.for_model(config["model_type"], **rest)
    return transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()


def blocks(model: Any) -> nn.ModuleList:
    """The layers: the outermost list of modules."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def residual_ends(model: Any) -> list[Tensor]:
    """Filled by the next forward pass: the input of the first block, the output of the last; both keep gradients."""
    places: list[Tensor] = []

    def keep(x: Tensor) -> None:
        x.retain_grad()
        places.append(x)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, __: Any, out: Any) -> None:
        keep(out[0] if isinstance(out, tuple) else out)

    layers = blocks(model)
    layers[0].register_forward_pre_hook(before, with_kwargs=True)
    layers[-1].register_forward_hook(after)
    return places


def measured_growth(config: dict[str, Any], seeds: int, length: int, batch: int = 4) -> tuple[float, float]:
    """Gradient norm at the first block's input over that at the last's output, and the standard error of its log.

    The geometric mean over `seeds` networks, each with `batch` sequences of distinct, uniformly random tokens and
    targets.
    """
    logs: list[float] = []
    for seed in range(seeds):
        model = build(config, seed)
        tokens, targets = (_distinct(config["vocab_size"], batch, length, seed, salt) for salt in range(2))
        places = residual_ends(model)
        logits = model(input_ids=tokens, use_cache=False).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        first, last = (place.grad for place in places)
        assert first is not None
        assert last is not None
        logs.append(math.log(float(first.norm() / last.norm())))
    return math.exp(np.mean(logs)), float(np.std(logs, ddof=1) / math.sqrt(seeds))


def _distinct(vocab_size: int, batch: int, length: int, seed: int, salt: int) -> Tensor:
    """(batch, length) tokens, distinct within a sequence, none of them padding."""
    generator = torch.Generator().manual_seed(2 * seed + salt)
    rows = [torch.randperm(vocab_size - FIRST_TOKEN, generator=generator)[:length] for _ in range(batch)]
    return torch.stack(rows) + FIRST_TOKEN
