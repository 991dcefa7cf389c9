"""Bad input to every command line: one line that names the remedy, status 2, nothing on standard output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import empirics.__main__
import empirics.command_line
import paper_repro
import theory.__main__
from theory.verdict import unknown

ROOT = Path(__file__).parent.parent
REMEDY = re.compile(r"\b(use|write|add|give|name|run|fix|choose|see)\b")
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 160,
}

Main = Callable[[Sequence[str]], int]
Result = tuple[int, str, str]


def call(main: Main, argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> Result:
    """Status, standard output and standard error of a command run in this process."""
    try:
        status = main(argv)
    except SystemExit as leave:
        status = int(leave.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def start(*command: str) -> Result:
    """The same of a fresh process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], check=False, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


def assert_refused(result: Result, *words: str) -> None:
    """Status 2, silence on standard output, and one line on standard error that says what to do."""
    status, out, err = result
    assert status == 2, (status, out, err)
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert "Traceback" not in err
    assert REMEDY.search(err), err
    for word in words:
        assert word in err, err


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
    "all but zero": (GPT2 | {"initializer_range": 1e-200, "layer_norm_epsilon": 1e-300}, "eps=1e-5"),
    "a million layers": (GPT2 | {"n_layer": 10**6}, "at most 4096"),
}


@pytest.mark.parametrize(("config", "word"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictory_config(
    config: dict[str, Any], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert_refused(call(theory.__main__.main, ["check", str(path)], capsys), word)


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


# --- paths and options --------------------------------------------------------------------------------------------


TOO_LONG = "a" * 5000
COMMANDS: dict[str, list[str]] = {
    "no command": [],
    "unknown command": ["chek", "tiny"],
    "no configuration": ["check"],
    "unknown preset": ["check", "70b"],
    "empty name": ["check", ""],
    "name too long": ["check", TOO_LONG],
    "path too long": ["check", f"./{TOO_LONG}/config.json"],
    "unknown flag": ["check", "tiny", "--sequence", "7"],
    "second configuration": ["check", "tiny", "small"],
    "unknown embedding": ["check", "tiny", "--embedding", "large"],
    "unknown initialisation": ["check", "tiny", "--init", "he"],
    "missing file": ["check", "none/config.json"],
    "folder without a config": ["check", "tests"],
    "file as a folder": ["check", "README.md/config.json"],
    "device as a file": ["check", "/dev/null"],
    **{f"sequence {n}": ["check", "tiny", "--seq-len", n] for n in ("0", "-1", "1.5", "x", "", "1000001", "9" * 5000)},
    **{f"layers {n}": ["check", "tiny", "--layers", n] for n in ("0", "-3", "nan", "4097", "1000000000", "9" * 30)},
    "output in a file": ["check", "tiny", "--seq-len", "4", "--out", "README.md/x.json"],
    "output is a folder": ["check", "tiny", "--seq-len", "4", "--out", "tests"],
    "output nowhere": ["check", "tiny", "--seq-len", "4", "--out", "/proc/none/x.json"],
    "output name too long": ["check", "tiny", "--seq-len", "4", "--out", TOO_LONG],
    "unknown derivation": ["derive", "nonsense"],
    "unknown format": ["derive", "ffn", "--format", "html"],
    "sweep of nothing": ["sweep", "--widths", ","],
    "sweep of zero": ["sweep", "--depths", "0"],
    "sweep of words": ["sweep", "--widths", "wide"],
    "sweep of too many tokens": ["sweep", "--seq-len", "1000000000"],
    "statements of nothing": ["statements", "ffn"],
    "statements of no kind": ["statements", "--kind", "lower"],
    "statements of no quantity": ["statements", "--quantity", "ffn"],
    "statements that nobody made": ["statements", "--kind", "estimate", "--quantity", "ffn_jacobian"],
    "plot of no records": ["statements", "--plot", "all.png", "--records", "none"],
    "plot of empty records": ["statements", "--plot", "all.png", "--records", "tests/helpers"],
    "plot of another format": ["statements", "--plot", "all.gif"],
    "plot as JSON": ["statements", "--plot", "all.png", "--json"],
    "every derivation and one": ["derive", "ffn", "--all"],
    "derivation without a name": ["derive", ""],
    "derivations nowhere": ["derive", "--out", "/proc/none/x"],
}


@pytest.mark.parametrize("argv", COMMANDS.values(), ids=[name[:30] for name in COMMANDS])
def test_bad_command(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert_refused(call(theory.__main__.main, argv, capsys))


@pytest.mark.parametrize(
    ("main", "argv", "command"),
    [
        (theory.__main__.main, ["check", "tiny", "--foo"], "spikecheck check"),
        (empirics.__main__.main, ["attack", "ffn-upper", "--foo"], "python -m empirics attack"),
        (paper_repro.main, ["--foo"], "paper_repro.py"),
    ],
)
def test_an_unknown_option_points_to_its_commands_help(
    main: Main, argv: list[str], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(call(main, argv, capsys), f"{command}: unrecognized arguments: --foo; see {command} --help")


MEANT: dict[str, tuple[list[str], str]] = {
    "preset": (["check", "tinny"], "did you mean tiny?"),
    "preset in capitals": (["check", "350M"], "did you mean 350m?"),
    "derivation": (["derive", "fnn"], "did you mean ffn?"),
    "statement": (["derive", "attention-uper-apriori"], "did you mean attention-upper-apriori"),
    "command": (["chek", "tiny"], "did you mean check?"),
    "initialisation": (["check", "tiny", "--init", "xavierr"], "did you mean xavier?"),
    "quantity": (["statements", "--quantity", "ffn_jacobean"], "did you mean ffn_jacobian"),
}


@pytest.mark.parametrize(("argv", "question"), MEANT.values(), ids=MEANT)
def test_a_close_name_is_suggested(argv: list[str], question: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(call(theory.__main__.main, argv, capsys), question)


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


def test_statements_are_a_table_of_a_hundred_columns(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(theory.__main__.main, ["statements"], capsys)
    head, *lines = out.splitlines()
    assert (status, head.split()) == (0, ["name", "kind", "quantity", "source"])
    assert max(map(len, lines)) <= 100
    places = [head.index(name) for name in head.split()]
    named = [line for line in lines if not line.startswith(" ")]
    assert len(named) == len(json.loads(call(theory.__main__.main, ["statements", "--json"], capsys)[1]))
    for line in named:  # every cell begins where its column does
        assert all(line[place - 2 : place] == "  " and line[place] != " " for place in places[1:]), line
    assert all(len(line) - len(line.lstrip()) == places[3] for line in lines if line not in named)


def test_one_is_no_plural(capsys: pytest.CaptureFixture[str]) -> None:
    out = call(theory.__main__.main, ["check", "tiny", "--layers", "1", "--seq-len", "1"], capsys)[1]
    assert "1 layer, 2 heads" in out
    assert out.splitlines()[0].endswith(" 1 token")
    options = ["--layers", "1", "--seq-len", "1", "--seeds", "1", "--batch", "1"]
    out = call(empirics.__main__.main, ["measure", "tiny", *options], capsys)[1]
    assert "1 token: gradient growth" in out
    assert "(1 seed of weights and tokens)" in out
    assert "1 layer, pre-ln" in out
    assert not re.search(r"\b1 [a-z]+s\b", out)


@pytest.mark.parametrize("kind", ["upper", "sharp", "estimate"])
def test_statements_of_a_kind_or_a_quantity(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    def rows(*argv: str) -> list[dict[str, Any]]:
        status, out, _ = call(theory.__main__.main, ["statements", "--json", *argv], capsys)
        assert status == 0
        return json.loads(out)

    every, of_kind = rows(), rows("--kind", kind)
    assert of_kind == [row for row in every if row["kind"] == kind]
    assert 0 < len(of_kind) < len(every)
    quantity = of_kind[0]["quantity"]
    assert rows("--quantity", quantity) == [row for row in every if row["quantity"] == quantity]
    assert rows("--kind", kind, "--quantity", quantity) == [row for row in of_kind if row["quantity"] == quantity]


@pytest.mark.parametrize(("main", "package"), [(theory.__main__.main, "sympy"), (empirics.__main__.main, "torch")])
def test_versions(main: Main, package: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(main, ["--version"], capsys)
    assert (status, err) == (0, "")
    assert out.startswith("spikecheck ")
    assert re.search(rf"\b{package} \d+\.\d+", out)
    assert out.count("\n") == 1


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


PROCESSES: dict[str, list[str]] = {
    "unknown preset": ["-m", "theory", "check", "70b"],
    "no arguments": ["-m", "theory"],
    "name too long": ["-m", "theory", "check", TOO_LONG],
    "nested": ["-m", "theory", "check", "nested.json"],
    "unknown step": ["paper_repro.py", "--only", "nonsense"],
}


@pytest.mark.parametrize("command", PROCESSES.values(), ids=PROCESSES)
def test_bad_command_in_a_process(command: list[str], tmp_path: Path) -> None:
    nested = tmp_path / "nested.json"
    nested.write_bytes(b"[" * 100_000)
    assert_refused(start(*[str(nested) if part == nested.name else part for part in command]))


# --- measuring and training ---------------------------------------------------------------------------------------

MEASURE: dict[str, list[str]] = {
    "unknown preset": ["70b"],
    "missing data": ["tiny", "--data", "none.txt"],
    "data is a folder": ["tiny", "--data", "tests"],
    "unknown device": ["tiny", "--device", "abacus"],
    "device without numbers": ["tiny", "--device", "meta"],
    "device number that is not": ["tiny", "--device", "cuda:x"],
    "no seeds": ["tiny", "--seeds", "0"],
    "half a sequence": ["tiny", "--batch", "0.5"],
    "too large a network": ["13b", "--layers", "4000"],
}


@pytest.mark.parametrize("argv", MEASURE.values(), ids=MEASURE)
def test_bad_measurement(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert_refused(call(empirics.__main__.main, ["measure", *argv], capsys))


def test_measurement_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--layers", "1", "--seq-len", "4", "--batch", "1", "--seeds", "1", "--out", "/proc/none/x"]
    assert_refused(call(empirics.__main__.main, ["measure", "tiny", *options], capsys), "cannot write")


TYPED: dict[str, tuple[list[str], str]] = {
    "micro-batch": (["--micro-batch", "3"], "--micro-batch 3 does not divide --batch 8; use"),
    "beta": (["--beta2", "1"], "--beta2 1.0 is out of range; use"),
    "decay": (["--schedule", "wsd", "--decay-fraction", "0.97"], "the 291 steps of --decay-fraction 0.97 do not fit"),
    "decay without wsd": (["--decay-fraction", "0.2"], "--decay-fraction 0.2 is of no use to the schedule cosine"),
    "embeddings": (["--decay-embeddings"], "do not decay at --weight-decay 0; give"),
    "text too short": (["--data", "SHORT", "--tokenizer", "bytes"], "fewer than the 65 of --seq-len 64; use"),
}


@pytest.mark.parametrize(("argv", "words"), TYPED.values(), ids=TYPED)
def test_a_refusal_names_what_was_typed(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not what the code calls it."""
    (tmp_path / "short.txt").write_text("too short\n" * 5)
    argv = [str(tmp_path / "short.txt") if part == "SHORT" else part for part in argv]
    result = call(empirics.__main__.main, ["train", "tiny", *argv, "--out", str(tmp_path / "run")], capsys)
    assert_refused(result, words)
    assert not re.search(r"[a-z]_[a-z]+=", result[2]), result[2]


TRAIN: dict[str, list[str]] = {
    "missing data": ["--data", "none.txt"],
    "unknown tokenizer": ["--tokenizer", "words"],
    "unknown device": ["--device", "abacus"],
    "unknown precision": ["--precision", "float16"],
    **{f"rate {rate}": ["--lr", rate] for rate in ("nan", "inf", "-1", "0", "fast")},
    **{f"weight decay {decay}": ["--weight-decay", decay] for decay in ("nan", "inf", "-1", "some")},
    "unknown schedule": ["--schedule", "cubic"],
    **{f"clip {clip}": ["--clip", clip] for clip in ("0", "-1", "nan", "inf", "on")},
    **{f"beta {beta}": ["--beta2", beta] for beta in ("1", "1.5", "-0.1", "nan", "high")},
    "first beta": ["--beta1", "1"],
    **{f"z-loss {weight}": ["--z-loss", weight] for weight in ("nan", "inf", "-1", "some")},
    **{f"decay fraction {share}": ["--schedule", "wsd", "--decay-fraction", share] for share in ("0", "1.1", "nan")},
    "decay fraction without wsd": ["--decay-fraction", "0.2"],
    "warm-up and decay too long": ["--schedule", "wsd", "--decay-fraction", "0.9", "--warmup", "40"],
    "warm-up longer than the training": ["--steps", "2", "--warmup", "50"],
    "embedding decay without decay": ["--decay-embeddings"],
    "micro-batch that does not divide": ["--micro-batch", "3"],
    "no step between checkpoints": ["--checkpoint-every", "0"],
    "tensorboard nowhere": ["--tensorboard", "/proc/none"],
    "JSON without a plan": ["--json"],
    "file without a plan": ["--plan-out", "plan.txt"],
    "no steps": ["--steps", "0"],
    "negative seed": ["--seed", "-1"],
    "absurd sequence": ["--seq-len", "1000001"],
}


@pytest.mark.parametrize("argv", TRAIN.values(), ids=TRAIN)
def test_bad_training(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(call(empirics.__main__.main, ["train", "tiny", "--out", str(tmp_path), *argv], capsys))


@pytest.mark.parametrize("out", ["/proc/none", "/dev/null/run"])
def test_training_that_cannot_be_written(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    argv = ["train", "tiny", "--layers", "1", "--steps", "1", "--data", str(text), "--tokenizer", "bytes", "--out", out]
    assert_refused(call(empirics.__main__.main, argv, capsys), "cannot write")


def test_training_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(call(empirics.__main__.main, ["train", "tiny"], capsys), "--out")


SHORT = ["--layers", "1", "--seq-len", "8", "--batch", "1", "--steps", "2", "--tokenizer", "bytes"]


def test_a_folder_holds_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second one would write over the first one's losses.jsonl."""
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    argv = ["train", "tiny", *SHORT, "--data", str(text), "--out", str(out)]
    assert call(empirics.__main__.main, argv, capsys)[0] == 0
    before = (out / "losses.jsonl").read_bytes()
    assert_refused(call(empirics.__main__.main, [*argv, "--lr", "1e-2"], capsys), "holds another run", "another --out")
    assert (out / "losses.jsonl").read_bytes() == before
    assert call(empirics.__main__.main, argv, capsys)[0] == 0


def test_tensorboard_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    argv = ["train", "tiny", *SHORT, "--out", str(tmp_path / "run"), "--tensorboard", str(tmp_path / "board")]
    assert_refused(call(empirics.__main__.main, argv, capsys), "tensorboard", "pip install 'spikecheck[tensorboard]'")
    assert not any(tmp_path.iterdir())


def test_training_that_diverges_is_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate of 1e30: infinities after the first step are written down and said, not raised."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    options = ["--layers", "1", "--seq-len", "8", "--batch", "1", "--data", str(text), "--tokenizer", "bytes"]
    for steps in ("1", "3"):
        out = str(tmp_path / steps)
        argv = ["train", "tiny", *options, "--lr", "1e30", "--warmup", "0", "--steps", steps, "--out", out]
        status, words, _ = call(empirics.__main__.main, argv, capsys)
        assert status == 0
        assert words.startswith("diverged: ")


# --- the reproduction's own command line --------------------------------------------------------------------------

REPRODUCE: dict[str, list[str]] = {
    "unknown step": ["--only", "nonsense"],
    "unknown scale": ["--scale", "70b"],
    "no GPU": ["--scale", "350m", "--device", "abacus"],
    "unknown device": ["--scale", "smoke", "--device", "abacus"],
    "unknown device, listed": ["--scale", "gpu-smoke", "--device", "foo", "--list"],
    "no processes": ["--processes", "0"],
    "seeds that are not": ["--seeds", "0,x"],
    "negative seed": ["--seeds", "-1"],
    "a seed twice": ["--seeds", "0,0"],
    "unknown flag": ["--fast"],
    "output nowhere": ["--scale", "smoke", "--out", "/proc/none"],
}


@pytest.mark.parametrize("argv", REPRODUCE.values(), ids=REPRODUCE)
def test_bad_reproduction(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = [] if "--out" in argv else ["--out", str(tmp_path)]
    assert_refused(call(paper_repro.main, [*argv, *place], capsys))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("size", paper_repro.PAPER_SIZES)
def test_paper_sizes_need_a_gpu(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(device: str) -> str:
        raise ValueError("absent")

    monkeypatch.setattr(empirics.command_line, "check_device", absent)
    assert_refused(call(paper_repro.main, ["--scale", size, "--out", str(tmp_path)], capsys), "cuda", "--scale cpu")


def test_drawing_needs_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--draw-only", "--out", str(tmp_path / "none")]
    assert_refused(call(paper_repro.main, argv, capsys), "run without --draw-only")
