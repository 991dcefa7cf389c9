"""The keys of a config that no class reads: slips are refused, others are named, harmless ones pass in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from theory import parse_config, read_config
from theory.__main__ import main
from theory.hf_config import ALIASES, CLASSES
from theory.hf_keys import EVERY, HARMLESS, KEYS, OLDER

GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 32, "vocab_size": 100}
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3,
    "num_attention_heads": 8, "max_position_embeddings": 32, "vocab_size": 100,
}  # fmt: skip


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


def unread(config: dict[str, Any]) -> list[str]:
    return [line for line in parse_config(config).assumed if line.startswith("not read")]


# --- slips ----------------------------------------------------------------------------------------------------------

SLIPS: list[tuple[dict[str, Any], str, Any, str]] = [
    (LLAMA, "initializer_rnage", 0.006, "initializer_range"),
    (LLAMA, "initialiser_range", 0.006, "initializer_range"),
    (LLAMA, "tie_word_embedding", True, "tie_word_embeddings"),
    (LLAMA, "Tie_Word_Embeddings", True, "tie_word_embeddings"),
    (LLAMA, "hiden_act", "relu", "hidden_act"),
    (LLAMA, "num_kv_heads", 4, "num_key_value_heads"),
    (LLAMA, "rope_thta", 5e5, "rope_theta"),
    (without(LLAMA, "num_hidden_layers"), "num_hiden_layers", 3, "num_hidden_layers"),
    (LLAMA | {"model_type": "qwen2"}, "num_kv_heads", 4, "num_key_value_heads"),  # 32 by default do not divide 8
    (
        LLAMA | {"model_type": "qwen2", "num_key_value_heads": 8, "sliding_window": 5},
        "use_sliding_windw",
        True,
        "use_sliding_window",
    ),
    (LLAMA | {"model_type": "cohere"}, "layer_norm_epsilon", 0.1, "layer_norm_eps"),
    (without(GPT2, "n_layer"), "n_layers", 3, "n_layer"),
    (GPT2, "initializer_rnage", 0.006, "initializer_range"),
]


@pytest.mark.parametrize(("config", "key", "value", "right"), SLIPS, ids=[slip[1] for slip in SLIPS])
def test_a_slip_for_an_absent_key_is_refused(config: dict[str, Any], key: str, value: Any, right: str) -> None:
    kind = config["model_type"]
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the whole message is looked at here)
        parse_config(config | {key: value})
    assert str(caught.value) == f"{key} is not a key of {kind}; did you mean {right}?"
    assert right in KEYS[kind] | OLDER
    # Control: with the right key there, the same one is not taken for it.
    good = {"num_key_value_heads": 4} if kind == "qwen2" else {}
    assert unread(config | good | {right: value, key: value}) == [f"not read: {key}"]


def test_a_slip_in_a_table_is_refused_by_its_place() -> None:
    with pytest.raises(ValueError, match=r"^rope_parameters\.rope_thta is not a key of llama; did you mean rope_theta"):
        parse_config(LLAMA | {"rope_parameters": {"rope_type": "default", "rope_thta": 5e5}})
    with pytest.raises(ValueError, match=r"^attn_config\.clip_qvk is not a key of mpt; did you mean clip_qkv\?$"):
        parse_config({"model_type": "mpt", "d_model": 64, "n_layers": 2, "n_heads": 4, "attn_config": {"clip_qvk": 6}})


def test_a_slip_leaves_with_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | {"initializer_rnage": 0.006}))
    with pytest.raises(SystemExit) as left:
        raise SystemExit(main(["check", str(path)]))
    assert left.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "spikecheck: initializer_rnage is not a key of llama; did you mean initializer_range?"
    ]


# --- other keys -----------------------------------------------------------------------------------------------------


def test_a_key_that_is_not_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strange = {"my_special_scaling": 3, "two\nlines": 1, "rope_parameters": {"rope_theta": 1e4, "twist": 2}}
    line = "not read: my_special_scaling, 'two\\nlines', rope_parameters.twist"
    assert unread(LLAMA | strange) == [line]
    assert parse_config(LLAMA | strange).architecture == parse_config(LLAMA).architecture
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | strange))
    assert read_config(path) == parse_config(LLAMA | strange)
    assert main(["check", str(path)]) == 1  # at risk
    assert f"assumed: {line}" in [" ".join(text.split()) for text in capsys.readouterr().out.splitlines()]
    assert main(["check", str(path), "--json"]) == 1
    assert line in json.loads(capsys.readouterr().out)["assumed"]


def test_a_key_of_another_class_is_named() -> None:
    assert unread(LLAMA | {"n_positions": 64, "sliding_window": 5}) == ["not read: n_positions, sliding_window"]


def test_harmless_keys_pass_in_silence() -> None:
    written = {"torch_dtype": "float32", "auto_map": {}, "quantization_config": {"bits": 4}, "sep_token_id": 3}
    assert written.keys() <= HARMLESS
    for config in (LLAMA, GPT2):
        assert not unread(config | dict.fromkeys(HARMLESS | EVERY - config.keys() - {"tie_word_embeddings"}))
        assert not unread(config | written)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_keys_of_the_class_are_known(kind: str) -> None:
    """The whole default configuration, as the class writes it, and what it reads under older names."""
    transformers = pytest.importorskip("transformers")
    config = json.loads(json.dumps(transformers.AutoConfig.for_model(kind).to_dict()))
    assert config.keys() == KEYS[kind]
    assert not unread(config)
    read = json.loads(json.dumps(parse_config(config).architecture.n_layers))
    assert read == config[next(k for k in ("num_hidden_layers", "num_layers", "n_layer", "n_layers") if k in config)]
    # Control: the same file with one key spelt otherwise is refused.
    width = next(key for key in ("hidden_size", "n_embd", "d_model") if key in config)
    with pytest.raises(ValueError, match=f"^{width}x is not a key of {kind}; did you mean {width}"):
        parse_config(without(config, width) | {f"{width}x": config[width]})


def test_other_names_of_keys_are_known() -> None:
    for kind, names in ALIASES.items():
        assert all(key in KEYS[kind] or other in KEYS[kind] for key, other in names.items())
    renamed = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 32}
    assert parse_config({"model_type": "gpt2", "vocab_size": 100} | renamed) == parse_config(GPT2)


# --- ranges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.02, 0, 1e-300, 1e10, float("nan")])
def test_the_range_of_a_spread_is_the_one_that_is_said(value: float) -> None:
    with pytest.raises(ValueError, match=r"^initializer_range=\S+ is out of range; use 1e-09 to 1000000000$"):
        parse_config(GPT2 | {"initializer_range": value})


@pytest.mark.parametrize("value", [1e-9, 1_000_000_000])
def test_both_ends_of_the_range_are_taken(value: float) -> None:
    assert parse_config(GPT2 | {"initializer_range": value}).architecture.stds.query == value
