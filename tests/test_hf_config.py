"""How a `config.json` is read: its defaults, what is refused, what has no prediction; and growth from it alone.

That what is read is what the class of transformers does is in `test_hf_classes`.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from statistics import median
from typing import Any

import pytest

from theory.architecture import Architecture
from theory.growth import gradient_growth
from theory.hf_config import KNOWN, UnknownArchitecture, parse_config
from theory.hf_shared import Period, period

transformers = pytest.importorskip("transformers")

from helpers.real_classes import REAL, TINY, build, measured_growth  # noqa: E402  (after the skip)

KINDS = pytest.mark.parametrize("kind", TINY)
REMEDY = re.compile(r"\b(use|write|add|give)\b")
SIZES = {
    "gpt2": ("n_embd", "n_layer", "n_head"),
    "gptj": ("n_embd", "n_layer", "n_head"),
    "gpt_neo": ("hidden_size", "num_layers", "num_heads"),
    "bloom": ("hidden_size", "n_layer", "n_head"),
    "mpt": ("d_model", "n_layers", "n_heads"),
}
USUAL_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")


@cache
def defaults(kind: str) -> dict[str, Any]:
    """Every key of the class's own default configuration."""
    return transformers.AutoConfig.for_model(kind).to_dict()


def sizes_only(kind: str) -> dict[str, Any]:
    return {"model_type": kind} | {key: defaults(kind)[key] for key in SIZES.get(kind, USUAL_SIZES)}


# --- defaults -------------------------------------------------------------------------------------------------------


@KINDS
def test_what_is_not_said_is_what_the_class_takes(kind: str) -> None:
    whole, sparse = parse_config(defaults(kind)), parse_config(sizes_only(kind))
    assert whole.assumed == (f"initialised as the {kind} class does",)
    assert sparse.architecture == whole.architecture
    assert sparse.assumed[-1] == whole.assumed[0]
    recorded = dict(line.removesuffix(" (the class's default)").split(" = ", 1) for line in sparse.assumed[:-1])
    assert {"vocab_size", "tie_word_embeddings"} <= recorded.keys()
    assert recorded.keys() & {"initializer_range", "init_std"}
    for key, value in recorded.items():
        if key not in ("layer_types", "attention_types"):  # written in words
            default = default_of(kind, key)
            assert value == shown(default) or (value, default) == ("false", None), key


def default_of(kind: str, key: str) -> Any:
    """A default of the class, where it keeps it."""
    rope = defaults(kind).get("rope_parameters") or {}
    places = {
        "rope_theta": rope.get("full_attention", rope).get("rope_theta"),
        "rope_local_base_freq": rope.get("sliding_attention", {}).get("rope_theta"),
        "rotary_emb_base": rope.get("rope_theta"),
        "rotary_pct": rope.get("partial_rotary_factor"),
        "partial_rotary_factor": rope.get("partial_rotary_factor"),
        "sliding_window_pattern": defaults(kind).get("_sliding_window_pattern"),
    }
    return places[key] if key in places else defaults(kind)[key]


def shown(value: Any) -> str:
    """As a recorded default is written."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("gpt2", {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_positions": "max_position_embeddings"}),
        ("gptj", {"n_embd": "hidden_size", "n_head": "num_attention_heads"}),
        ("gpt_neo", {"num_heads": "num_attention_heads"}),
        ("bloom", {"hidden_size": "n_embed", "n_head": "num_attention_heads"}),
        ("falcon", {"hidden_size": "n_embed"}),
        ("mpt", {"d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}),
    ],
)
def test_other_names_that_a_class_takes(kind: str, names: dict[str, str]) -> None:
    renamed = {names.get(key, key): value for key, value in TINY[kind].items()}
    assert parse_config(renamed).architecture == parse_config(build(renamed).config.to_dict()).architecture
    assert parse_config(renamed) == parse_config(TINY[kind])
    key, other = next(iter(names.items()))
    assert refusal(TINY[kind] | {other: TINY[kind][key] * 2}) >= {key, other}


def test_what_a_class_ignores_is_said() -> None:
    said = parse_config(TINY["mpt"] | {"expansion_ratio": 2, "attn_config": {"alibi": False}}).assumed
    assert "expansion_ratio = 2 is ignored by the class, which acts as if 4" in said
    assert "attn_config.alibi = false is ignored by the class, which acts as if true" in said
    assert any("partial_rotary_factor" in line for line in parse_config(TINY["llama"] | PARTIAL).assumed)
    assert any("attn_logit_softcapping" in line for line in parse_config(TINY["gemma3_text"] | CAPPED).assumed)
    dynamic = parse_config(TINY["llama"] | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}).assumed
    assert any("dynamic changes nothing up to max_position_embeddings" in line for line in dynamic)
    assert any("clip_qkv" in line for line in parse_config(TINY["olmo"] | {"clip_qkv": 30.0}).assumed)


PARTIAL, CAPPED = {"partial_rotary_factor": 0.5}, {"attn_logit_softcapping": 50.0}


# --- what is refused ------------------------------------------------------------------------------------------------


def refusal(config: Any) -> set[str]:
    """The words of the one line that says why a config is refused, and what to do."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is looked at here)
        parse_config(config)
    message = str(caught.value)
    assert "\n" not in message
    assert REMEDY.search(message), message
    return set(re.findall(r"[\w.]+", message))


QWEN = ("qwen2", "qwen3")


class Watched(dict[str, Any]):
    """A dictionary that remembers which of its keys were asked for."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__(data)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)


@KINDS
def test_a_value_of_the_wrong_kind_is_refused_by_its_key(kind: str) -> None:
    """Every key that is looked at, also those that only matter in another setting."""
    config = Watched(TINY[kind] | ({"use_sliding_window": True, "sliding_window": 5} if kind in QWEN else {}))
    parse_config(config)
    keys = config.asked - {"model_type", "per_layer_config"}
    assert len(keys) > 8
    for key in sorted(keys):
        for bad in ([64], {"a": 1}, "64", -3, 2.5, float("nan"), True, 10**400):
            if not taken(kind, config | {key: bad}, key):
                assert key in " ".join(refusal(config | {key: bad})), (key, bad)


def taken(kind: str, config: dict[str, Any], key: str) -> bool:
    """Whether a strange value is one that this key may have, one that is ignored, or one without a prediction."""
    try:
        read = parse_config(config)
    except UnknownArchitecture:
        return True
    except ValueError:
        return False
    if not any("is ignored by the class" in line and key in line for line in read.assumed):
        assert valid(kind, key, config[key]), (key, config[key])
    return True


def valid(kind: str, key: str, value: Any) -> bool:
    """Whether this key does take one of the values above."""
    if key == "pad_token_id":
        return value == -3  # the third row from the end
    if key in ("rope_scaling", "rope_parameters", "attn_config"):
        return value == {"a": 1}
    if isinstance(value, bool):
        return key == "use_bidirectional_attention" or isinstance(default_of(kind, key), bool)
    return value == 2.5 and (key in NUMBERS or isinstance(default_of(kind, key), float))


# Numbers whose default is none, or a whole number.
NUMBERS = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "clip_qkv",
    "initializer_range",
)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no width": ({key: value for key, value in TINY["bloom"].items() if key != "hidden_size"}, "hidden_size"),
    "no heads": ({key: value for key, value in TINY["mpt"].items() if key != "n_heads"}, "n_heads"),
    "null depth": (TINY["qwen2"] | {"num_hidden_layers": None}, "num_hidden_layers"),
    "heads do not divide": (TINY["falcon"] | {"num_attention_heads": 5}, "num_attention_heads"),
    "class's groups do not divide": (TINY["stablelm"] | {"num_key_value_heads": 32}, "num_key_value_heads"),
    "rotary width above the head's": (TINY["gptj"] | {"rotary_dim": 64}, "rotary_dim"),
    "odd rotary width": (TINY["phi"] | {"partial_rotary_factor": 0.4}, "partial_rotary_factor"),
    "rotary share above 1": (TINY["phi"] | {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    "rotary base 0": (TINY["llama"] | {"rope_theta": 0}, "rope_theta"),
    "nested rotary base": (TINY["llama"] | {"rope_parameters": {"rope_theta": "1"}}, "rope_parameters.rope_theta"),
    "rotary type": (TINY["llama"] | {"rope_scaling": {"rope_type": 7}}, "rope_scaling.rope_type"),
    "no spread": (TINY["opt"] | {"init_std": 0}, "init_std"),
    "padding outside": (TINY["phi3"] | {"pad_token_id": 32000}, "pad_token_id"),
    "padding by default outside": ({k: v for k, v in TINY["phi3"].items() if k != "pad_token_id"}, "pad_token_id"),
    "window 0": (TINY["mistral"] | {"sliding_window": 0}, "sliding_window"),
    "soft-cap 0": (TINY["gemma2"] | {"final_logit_softcapping": 0.0}, "final_logit_softcapping"),
    "logit scale from 0": (TINY["gemma2"] | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
    "logits over 0": (TINY["granite"] | {"logits_scaling": 0}, "logits_scaling"),
    "too few layers named": (TINY["gemma2"] | {"layer_types": ["full_attention"]}, "layer_types"),
    "a window and none": (TINY["qwen2"] | {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    "linear without a factor": (TINY["llama"] | {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
    "llama3 without turns": (
        TINY["llama"] | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "rope_scaling.low_freq_factor",
    ),
    "llama3 with nothing between": (
        TINY["llama"]
        | {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            }
        },
        "rope_scaling.high_freq_factor",
    ),
    "too few layers turn": (TINY["smollm3"] | {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    "a layer turns by 2": (TINY["smollm3"] | {"no_rope_layers": [1, 2, 1, 1]}, "no_rope_layers"),
    "GPT-Neo's default depth": ({k: v for k, v in TINY["gpt_neo"].items() if k != "attention_types"}, "num_layers"),
    "GPT-Neo's types": (TINY["gpt_neo"] | {"attention_types": [["global", 4]]}, "attention_types"),
    "GPT-Neo's many types": (TINY["gpt_neo"] | {"attention_types": [[["global"], 10**9]]}, "attention_types"),
    "GPT-Neo's names": (TINY["gpt_neo"] | {"attention_types": [[["globe"], 4]]}, "attention_types"),
    "new and serial": (TINY["falcon"] | {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn"),
    "two norms and one": (TINY["falcon"] | {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
}


@pytest.mark.parametrize(("config", "word"), REFUSED.values(), ids=REFUSED)
def test_a_contradiction_is_refused_by_its_key(config: dict[str, Any], word: str) -> None:
    assert word in refusal(config)


# --- what has no prediction -----------------------------------------------------------------------------------------

FULL, SLIDING = "full_attention", "sliding_attention"
UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "class": ({"model_type": "mamba"}, "model_type 'mamba'"),
    "experts in some layers": (TINY["qwen3_moe"] | {"mlp_only_layers": [0]}, "some layers have a single feed-forward"),
    "noisy router": (TINY["mixtral"] | {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
    "activation": (TINY["llama"] | {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
    "logit scale a layer": (
        TINY["gpt2"] | {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx",
    ),
    "narrow embeddings": (TINY["opt"] | {"word_embed_proj_dim": 16}, "word_embed_proj_dim is 16"),
    "normalised shortcut": (
        TINY["bloom"] | {"apply_residual_connection_post_layernorm": True},
        "apply_residual_connection_post_layernorm is true",
    ),
    "scaled slopes": (TINY["falcon"] | {"alibi": True}, "alibi is true"),
    "clipped": (TINY["olmo"] | {"clip_qkv": 3.0}, "clip_qkv is 3"),
    "clipped in a table": (TINY["mpt"] | {"attn_config": {"clip_qkv": 3.0}}, "clip_qkv is 3"),
    "scaled frequencies": (TINY["llama"] | {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "is 'yarn'"),
    "old key": (TINY["phi3"] | {"rope_scaling": {"type": "su"}}, "rope_scaling.rope_type is 'su'"),
    "one kind of layer": (
        TINY["gemma3_text"] | {"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 8.0}}},
        "rope_parameters.sliding_attention.rope_type slows",
    ),
    "last layers only": (
        TINY["qwen2"] | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
        "max_window_layers is 3",
    ),
    "no period": (TINY["gemma2"] | {"layer_types": [FULL, FULL, SLIDING, FULL]}, "layer_types follows no period"),
    "kind of attention": (TINY["gemma2"] | {"layer_types": ["chunked_attention"] * 4}, "'chunked_attention'"),
    "both ways": (TINY["gemma"] | {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
    "first layers do not turn": (TINY["smollm3"] | {"no_rope_layers": [0, 1, 0, 1]}, "no_rope_layers"),
    "windows where nothing turns": (
        TINY["smollm3"] | {"use_sliding_window": True, "sliding_window": 5},
        "use_sliding_window is true",
    ),
    "layers of several kinds": (TINY["llama"] | {"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config"),
}


@pytest.mark.parametrize(("config", "words"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_has_no_prediction_says_so(config: dict[str, Any], words: str) -> None:
    """With the key and its value, in one line."""
    with pytest.raises(UnknownArchitecture) as caught:
        parse_config(config)
    assert words in str(caught.value)
    assert "predictions cover" in str(caught.value) or KNOWN in str(caught.value) or "exist for" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_periods() -> None:
    """Against their definition, for every list of up to 9 layers."""
    for n in range(1, 10):
        lists = {
            tuple((k if first else k + 1) % every == 0 for k in range(n)): Period(every, first)
            for every in range(n, 1, -1)
            for first in (False, True)
        } | {(False,) * n: Period(0, False)}
        for number in range(2**n):
            special = tuple(bool(number >> k & 1) for k in range(n))
            found = period(special)
            if n > 1 or not special[0]:
                assert (found is None) == (special not in lists), special
            if found is not None and found.every:
                assert special == tuple((k if found.first else k + 1) % found.every == 0 for k in range(n))


def test_layers_one_by_one() -> None:
    """What windows and rotary bases mean, layer by layer."""
    neo = parse_config(TINY["gpt_neo"]).architecture
    assert [neo.window_at(n) for n in range(4)] == [0, 5, 0, 5]
    gemma = parse_config(TINY["gemma3_text"]).architecture
    assert [gemma.window_at(n) for n in range(6)] == [5, 5, 5, 5, 5, 0]
    assert [gemma.rope_base_at(n) for n in range(6)] == [1e4] * 5 + [1e6]
    smol = parse_config(TINY["smollm3"]).architecture
    assert [smol.rope_base_at(n) for n in range(4)] == [2e6, 2e6, 2e6, None]
    assert neo.rope_base_at(0) is None


# --- growth from the config alone -----------------------------------------------------------------------------------

LENGTH = 48
GPT2 = {"model_type": "gpt2", "n_embd": 128, "n_layer": 6, "n_head": 4, "n_positions": 64, "vocab_size": 500}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 688,
    "vocab_size": 500,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_growth_of_the_real_class_is_predicted_from_its_config(kind: str) -> None:
    predicted = gradient_growth(parse_config(REAL[kind]).architecture, LENGTH, distinct=True)
    measured, error = measured_growth(REAL[kind], seeds=6, length=LENGTH)
    assert predicted.in_domain
    # The target is 5 %; the measurement's own standard error is allowed three times over.
    assert predicted.value == pytest.approx(measured, rel=0.05 + 3 * error)


def test_a_wrong_initialisation_would_show() -> None:
    """Control: the flat initialisation read as the depth-scaled one misses the real class by more than the target."""
    flat: Architecture = parse_config(LLAMA).architecture
    measured, error = measured_growth(LLAMA, seeds=3, length=LENGTH)
    wrong = gradient_growth(replace(flat, init=replace(flat.init, depth_scaled=True)), LENGTH, distinct=True).value
    assert abs(wrong / measured - 1) > 0.05 + 3 * error


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [GPT2, GPT2 | {"n_embd": 256}, LLAMA, LLAMA | {"num_key_value_heads": 8}],
    ids=["gpt2 128", "gpt2 256", "llama grouped", "llama"],
)
def test_growth_of_the_real_class_is_within_five_percent(config: dict[str, Any]) -> None:
    predicted = gradient_growth(parse_config(config).architecture, LENGTH, distinct=True).value
    measured, error = measured_growth(config, seeds=32, length=LENGTH)
    assert error < 0.02
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.slow
def test_growth_of_every_class_meets_the_targets() -> None:
    """Median |error| at most 2 %, worst at most 8 %, `unknown` for at most two; the errors are known to 2 %."""
    errors: dict[str, float] = {}
    for kind, config in REAL.items():
        predicted = gradient_growth(parse_config(config).architecture, LENGTH, distinct=True)
        measured, error = measured_growth(config, seeds=32, length=LENGTH)
        off = predicted.value / measured - 1
        print(f"{kind:12} measured {measured:9.4f} (+- {error:.2%})  predicted {predicted.value:9.4f}  {off:+.1%}")
        assert error < 0.02
        if predicted.in_domain:
            errors[kind] = abs(off)
    assert len(errors) >= len(REAL) - 2
    assert median(errors.values()) <= 0.02
    assert max(errors.values()) <= 0.08
