"""A config.json that describes no network: one line that names the remedy, or `unknown`, and never a traceback."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import assert_refused, call
from hypothesis import example, given
from hypothesis import strategies as st

import empirics.__main__
import theory.__main__
from theory.verdict import unknown

GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 160,
}


# --- configurations that are not ----------------------------------------------------------------------------------

NOT_A_CONFIG = {
    "empty": b"",
    "white space": b"  \n\t\n",
    "broken": b'{"model_type": "gpt2", n_embd: 64}',
    "truncated": json.dumps(GPT2).encode()[:-7],
    "trailing text": json.dumps(GPT2).encode() + b" and more",
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"model_type":' * 100_000,
    "binary": bytes(range(256)),
    "nulls": b"\0" * 64,
    "utf-16": json.dumps(GPT2).encode("utf-16"),
    "a number of 5000 digits": b'{"model_type": "gpt2", "n_embd": ' + b"9" * 5000 + b"}",
    "list": b"[]",
    "number": b"7",
    "not a number": b"NaN",
    "string": b'"gpt2"',
    "boolean": b"true",
    "null": b"null",
    "no model_type": b"{}",
    "model_type a list": b'{"model_type": ["gpt2"]}',
    "model_type null": b'{"model_type": null}',
}


@pytest.mark.parametrize("content", NOT_A_CONFIG.values(), ids=NOT_A_CONFIG)
@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "json"])
def test_not_a_config(
    content: bytes, flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert_refused(call(theory.__main__.main, ["check", str(path), *flags], capsys))


NOT_SIZES = (True, False, 64.0, 0.5, "64", "", [64], {}, -64, 0, 10**9 + 1, 10**400, float("nan"), float("inf"))
NOT_NUMBERS = (True, "1e-5", [0.02], {}, -1e-5, -(10**400), 10**400, 1e300, float("nan"), float("inf"), -float("inf"))
SIZES = {
    "gpt2": ("n_embd", "n_head", "n_layer", "n_inner", "vocab_size", "n_positions"),
    "llama": (
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    ),
}
NUMBERS = {"gpt2": ("layer_norm_epsilon", "initializer_range"), "llama": ("rms_norm_eps", "initializer_range")}
FLAGS = {
    "gpt2": ("tie_word_embeddings", "scale_attn_weights"),
    "llama": ("tie_word_embeddings", "attention_bias", "mlp_bias"),
}
NAMES = {"gpt2": "activation_function", "llama": "hidden_act"}


def values_of_the_wrong_kind() -> list[Any]:
    cases: list[tuple[dict[str, Any], str, Any]] = []
    for base in (GPT2, LLAMA):
        kind = base["model_type"]
        cases += [(base, key, value) for key in SIZES[kind] for value in NOT_SIZES]
        cases += [(base, key, value) for key in NUMBERS[kind] for value in NOT_NUMBERS]
        cases += [(base, key, value) for key in FLAGS[kind] for value in (1, 0, "true", [True], float("nan"))]
        cases += [(base, NAMES[kind], value) for value in (7, True, [], None)]
    return [pytest.param(*case, id=f"{case[0]['model_type']} {case[1]}={str(case[2])[:12]}") for case in cases]


@pytest.mark.parametrize(("base", "key", "value"), values_of_the_wrong_kind())
def test_value_of_the_wrong_kind(
    base: dict[str, Any], key: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one line also names the key."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(base | {key: value}))
    assert_refused(call(theory.__main__.main, ["check", str(path), "--json"], capsys), key)


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no width": ({key: value for key, value in GPT2.items() if key != "n_embd"}, "n_embd"),
    "no depth": ({key: value for key, value in GPT2.items() if key != "n_layer"}, "n_layer"),
    "no heads": ({key: value for key, value in GPT2.items() if key != "n_head"}, "n_head"),
    "no LLaMA width": ({key: value for key, value in LLAMA.items() if key != "hidden_size"}, "hidden_size"),
    "null width": (GPT2 | {"n_embd": None}, "n_embd"),
    "heads do not divide": (GPT2 | {"n_head": 5}, "n_embd=64 is not divisible by n_head=5; use n_embd=60 or 65"),
    "more heads than width": (GPT2 | {"n_head": 65}, "n_embd=65"),
    "LLaMA heads do not divide": (LLAMA | {"num_attention_heads": 6}, "hidden_size=60 or 66"),
    "kv heads do not divide": (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads="),
    "more kv heads than heads": (LLAMA | {"num_key_value_heads": 8}, "num_key_value_heads=4"),
    "odd rope head": (LLAMA | {"head_dim": 7}, "head_dim=7 is odd and rotary positions need pairs; use an even"),
    "odd rope head from the width": (LLAMA | {"hidden_size": 36, "num_attention_heads": 4}, "even head width"),
    "all zero": (GPT2 | {"initializer_range": 0}, "initializer_range=0"),
    "all but zero": (GPT2 | {"initializer_range": 1e-200}, "use 1e-09 to 1000000000"),
    "an input of all but zero": (
        LLAMA | {"model_type": "granite", "embedding_multiplier": 1e-200, "rms_norm_eps": 1e-300},
        "eps=1e-5",
    ),
    "a million layers": (GPT2 | {"n_layer": 10**6}, "at most 4096"),
}


@pytest.mark.parametrize(("config", "word"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictory_config(
    config: dict[str, Any], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert_refused(call(theory.__main__.main, ["check", str(path)], capsys), word)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "nested"])
def test_a_key_that_is_there_twice_is_named(inside: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    twice = '{"n_layer": 2, "n_layer": 3}'
    path.write_text(f'{{"model_type": "gpt2", "task": {twice}}}' if inside else twice)
    assert_refused(
        call(theory.__main__.main, ["check", str(path)], capsys), "has the key 'n_layer' twice; write it once"
    )


def test_a_long_value_is_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    for value, words in ((10**400, "n_layer=1000"), ("9" * 400, "n_layer='999"), (0, "use at least 1")):
        path.write_text(json.dumps(GPT2 | {"n_layer": value}))
        result = call(theory.__main__.main, ["check", str(path)], capsys)
        assert_refused(result, words)
        assert len(result[2]) < 200


def test_unreadable_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GPT2))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads every file")
    assert_refused(call(theory.__main__.main, ["check", str(path)], capsys), "readable")


def test_learned_positions_limit_the_sequence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GPT2 | {"n_positions": 32}))
    assert_refused(call(theory.__main__.main, ["check", str(path), "--seq-len", "33"], capsys), "32 learned positions")
    status, _, _ = call(theory.__main__.main, ["check", str(path), "--seq-len", "32"], capsys)
    assert status != 2


# --- random configurations ----------------------------------------------------------------------------------------

junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.sampled_from([10**9, 10**400, "relu", "gelu", "gelu_new", "silu", "tanh"]),
)
# Depths stay small: the recursion's time grows with them, and only that.
sizes = st.one_of(st.sampled_from([1, 2, 3, 4, 6, 8, 16, 64, 10**9]), junk)
depths = st.one_of(st.integers(-1, 4), junk.filter(lambda value: not isinstance(value, int) or value > 4096))


@st.composite
def configs(draw: st.DrawFn) -> Any:
    kind = draw(st.sampled_from(["gpt2", "llama"]))
    config: dict[str, Any] = dict(GPT2 if kind == "gpt2" else LLAMA)
    known = [*SIZES[kind], *NUMBERS[kind], *FLAGS[kind], NAMES[kind], "pad_token_id", "model_type", "n_layer"]
    for key in draw(st.lists(st.sampled_from(known), max_size=4, unique=True)):
        if key in ("n_layer", "num_hidden_layers"):
            config[key] = draw(depths)
        elif key in SIZES[kind]:
            config[key] = draw(sizes)
        elif key in NUMBERS[kind]:
            config[key] = draw(st.one_of(st.floats(0, 1), st.floats(0, 1e9), junk))
        else:
            config[key] = draw(junk)
    return draw(st.sampled_from([config, config, config, [config], {"config": config}]))


@given(config=configs(), flags=st.sampled_from([(), ("--embedding", "embed-ln"), ("--init", "xavier")]))
@example(config=GPT2 | {"n_embd": 16, "initializer_range": 1}, flags=())  # the expansion in the logits breaks down
@example(config=GPT2 | {"n_embd": 1, "n_head": 1}, flags=())  # LayerNorm of one number is 0
@example(config=LLAMA | {"hidden_size": 10**9, "initializer_range": 1e9, "hidden_act": "silu"}, flags=())
@example(config={"model_type": "\ud800"}, flags=())
@example(config={"model_type": "a\nb"}, flags=())
def test_random_config_never_raises(
    tmp_path_factory: pytest.TempPathFactory, config: Any, flags: tuple[str, ...]
) -> None:
    """A clean status; what is not refused is strict JSON with the documented keys. A warning would be an error."""
    folder = tmp_path_factory.mktemp("random")
    path, out = folder / "config.json", folder / "out.json"
    path.write_text(json.dumps(config))
    status = theory.__main__.main(["check", str(path), "--json", "--seq-len", "3", "--out", str(out), *flags])
    assert status in (0, 1, 2, 3)
    assert out.exists() == (status != 2)
    if status != 2:
        answer = json.loads(out.read_text(), parse_constant=pytest.fail)
        assert answer.keys() == unknown("").keys()
        assert (answer["verdict"] == "stable") == (status == 0)
        assert (answer["verdict"] == "unknown") == (status == 3)


@given(text=st.one_of(st.text(max_size=40), st.binary(max_size=40)))
def test_random_file_never_raises(tmp_path_factory: pytest.TempPathFactory, text: str | bytes) -> None:
    path = tmp_path_factory.mktemp("random") / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    assert theory.__main__.main(["check", str(path)]) == 2


# --- unknown classes ----------------------------------------------------------------------------------------------

UNKNOWN = (
    {"model_type": "mamba", "hidden_size": 64},
    {"model_type": ""},
    GPT2 | {"activation_function": "tanh"},
    GPT2 | {"scale_attn_by_inverse_layer_idx": True},
    LLAMA | {"hidden_act": "mish"},
)


@pytest.mark.parametrize("config", UNKNOWN, ids=str)
def test_unknown_class(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    status, out, err = call(theory.__main__.main, ["check", str(path), "--json"], capsys)
    assert (status, err) == (3, "")
    answer = json.loads(out, parse_constant=pytest.fail)
    assert answer["verdict"] == "unknown"
    assert answer["why"]
    assert answer["next"]
    status, out, err = call(theory.__main__.main, ["check", str(path)], capsys)
    assert (status, err) == (3, "")
    assert out.startswith("unknown: ")
    assert out.count("\n") == 1
    status, out, err = call(empirics.__main__.main, ["measure", str(path), "--json"], capsys)
    assert (status, json.loads(out)["verdict"]) == (3, "unknown")
    status, out, err = call(empirics.__main__.main, ["train", str(path), "--out", str(tmp_path / "run")], capsys)
    assert (status, out, err.count("\n")) == (3, "", 1)


@pytest.mark.parametrize(
    ("kind", "question"),
    [
        ("lama", "did you mean llama?"),
        ("mistrel", "did you mean mistral?"),
        *((other, "") for other in ("mamba", "jamba", "falcon_mamba", "olmo3", "llama4", "qwen2_moe", "t5")),
    ],
)
def test_a_class_that_is_close_is_suggested(
    kind: str, question: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A slip is; another class, which may be called much the same, is not."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | {"model_type": kind}))
    status, out, _ = call(theory.__main__.main, ["check", str(path)], capsys)
    assert status == theory.__main__.EXIT_UNKNOWN
    assert re.findall(r"did you mean .*?\?", out) == [question] * bool(question)
    assert "there is one for bloom, cohere, " in out


@pytest.mark.parametrize("path", [None, ".", "config.json"], ids=["preset", "folder", "file"])
def test_good_input_is_silent_on_standard_error(
    path: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control: what is refused above is not refused for any other reason."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    config = "tiny" if path is None else str(tmp_path / path)
    status, out, err = call(theory.__main__.main, ["check", config, "--seq-len", "16"], capsys)
    assert (status, err) == (1, "")
    assert "verdict: at risk" in out
