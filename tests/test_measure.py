"""`measure` on presets, real classes and folders of weights: what it says they are, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from helpers.real_classes import REAL, TINY, measured_growth  # noqa: E402  (after the skip)

from empirics import real_classes  # noqa: E402
from empirics.__main__ import main  # noqa: E402
from empirics.checkpoints import keep_model  # noqa: E402
from empirics.comparison import (  # noqa: E402
    ACCURACY,
    CHANCE,
    Scatter,
    allowed,
    one_pass,
    outcome,
    predict,
    scatter_of_one,
)
from empirics.decoder_growth import distinct_tokens, measure_decoder  # noqa: E402
from empirics.model import build  # noqa: E402
from empirics.networks import network  # noqa: E402
from empirics.reduction import narrower, reduced_architecture  # noqa: E402
from empirics.stability import StabilityMonitor  # noqa: E402
from theory.architecture import preset  # noqa: E402
from theory.growth import gradient_growth  # noqa: E402
from theory.hf_config import parse_config  # noqa: E402

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 300, "max_position_embeddings": 64,
}  # fmt: skip
QUICK = ["--seeds", "1", "--batch", "2", "--seq-len", "12"]
REMEDY = re.compile(r"\b(use|write|leave out|give|add|fix|see|load|train again|merge|fetch|choose)\b")


def measure(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Status and answer of the command."""
    status = main(["measure", *argv, "--json"])
    return status, json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def write(path: Path, config: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    return str(path)


@cache
def llama() -> Any:
    return real_classes.build(real_classes.settings(LLAMA)[0], 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("saved") / "llama"
    llama().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


# --- the real classes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "olmo2", "falcon"])
def test_growth_over_seeds_is_that_of_hooks_set_by_name(kind: str) -> None:
    """Against the reference of the class tests: the same networks and tokens, places found by name, all gradients."""
    from helpers.real_classes import _distinct

    settings, _ = real_classes.settings(REAL[kind])
    vocabulary = REAL[kind]["vocab_size"]
    grown = measure_decoder(
        lambda seed: real_classes.build(settings, seed),
        seeds=(0, 1),
        batches=lambda _, seed: (_distinct(vocabulary, 4, 12, seed, 0), _distinct(vocabulary, 4, 12, seed, 1)),
    )
    value, error = measured_growth(REAL[kind], seeds=2, length=12)
    assert grown.growth.values[0] == pytest.approx(value, rel=1e-6)
    assert grown.log_sd is not None
    assert grown.log_sd / 2**0.5 == pytest.approx(error, rel=1e-4)
    assert grown.gradient.values[0] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("kind", TINY)
def test_every_class_is_measured_to_be_what_its_config_says(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "config.json", TINY[kind])
    status, answer = measure(path, *QUICK, capsys=capsys)
    assert (status, answer["implementation"], answer["trained"]) == (0, "transformers", False)
    assert answer["class"] == type(real_classes.build(real_classes.settings(TINY[kind])[0], 0)).__name__
    said = parse_config(TINY[kind]).architecture
    seen = answer["measured_architecture"]
    for name in ("n_layers", "d_model", "block", "parallel", "embedding_norm", "tied"):
        assert seen[name] == getattr(said, name), name
    assert not any("is measured" in reason for reason in answer["why"])
    assert answer["predicted"]["kind"] == "sharp"
    assert answer["gradient_growth"]["kind"] == "measured"
    assert len(answer["places"]) == len(answer["gradient_profile"]["values"]) == len(answer["residual_std"]["values"])
    assert None not in answer["predicted"]["gradient_profile"]


def test_a_reduced_class_is_predicted_as_reduced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "config.json", LLAMA | {"hidden_size": 512, "num_attention_heads": 16, "vocab_size": 400})
    status, answer = measure(path, "--width", "128", "--layers", "2", "--seeds", "4", "--seq-len", "32", capsys=capsys)
    assert (status, answer["verdict"], answer["why"]) == (0, "agrees", [])
    a = answer["architecture"]
    assert (a["d_model"], a["n_layers"], a["n_heads"], a["n_kv_heads"], a["d_head"], a["d_ffn"]) == (
        128,
        2,
        4,
        1,
        32,
        24,
    )
    assert "hidden_size 512 -> 128" in answer["reduced"]
    assert "num_hidden_layers 3 -> 2" in answer["reduced"]
    assert answer["measured_architecture"]["d_model"] == 128
    assert answer["predicted"]["gradient_growth"] == pytest.approx(
        gradient_growth(network(path, width=128, n_layers=2).architecture, 32).value  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("kind", TINY)
def test_every_class_can_be_made_smaller(kind: str) -> None:
    """Two layers of half the width, or another depth alone where that splits a head: built, and read as that."""
    said = parse_config(TINY[kind]).architecture
    width = said.d_model // 2 if said.n_heads % 2 == 0 else None
    settings, notes = real_classes.settings(TINY[kind], n_layers=2, width=width)
    a = parse_config(settings.to_dict()).architecture
    assert (a.n_layers, a.d_model) == (2, width or said.d_model)
    assert a.d_head == said.d_head
    assert any(note.endswith("-> 2") for note in notes)
    assert [a.window_at(n) for n in range(2)] == [said.window_at(n) for n in range(2)]
    assert [a.rope_base_at(n) for n in range(2)] == [said.rope_base_at(n) for n in range(2)]
    matrices = sum(p.numel() for p in real_classes.build(settings, 0).parameters() if p.ndim > 1)
    assert matrices == a.n_parameters + (2 * a.d_model if kind == "opt" else 0)  # OPT has two positions more
    assert real_classes.n_parameters(settings) >= matrices


def test_a_deeper_one_repeats_its_layers() -> None:
    settings, _ = real_classes.settings(TINY["gemma3_text"], n_layers=12)
    a = parse_config(settings.to_dict()).architecture
    assert [bool(a.window_at(n)) for n in range(12)] == 2 * [True, True, True, True, True, False]


def test_sizes_in_proportion() -> None:
    assert narrower(4096, 32, 128, 8, 512) == (4, 1)
    assert narrower(2048, 8, 256, 1, 256) == (1, 1)  # heads wider than d_model / n_heads keep their width
    with pytest.raises(ValueError, match="use --width 64 or 128"):
        narrower(256, 4, 64, 4, 100)
    small, notes = reduced_architecture(preset("350m"), 256)
    assert (small.d_model, small.n_heads, small.d_head, small.d_ffn) == (256, 4, 64, 1024)
    assert notes == ("d_model 1024 -> 256", "n_heads 16 -> 4", "n_kv_heads 16 -> 4", "d_ffn 4096 -> 1024")
    assert reduced_architecture(small, None) == reduced_architecture(small, 256) == (small, ())


def test_ours_and_theirs_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "config.json", LLAMA)
    options = ["--seeds", "6", "--seq-len", "32"]
    _, real = measure(path, *options, capsys=capsys)
    _, own = measure(path, *options, "--implementation", "own", capsys=capsys)
    assert (real["class"], own["class"]) == ("LlamaForCausalLM", "Transformer")
    assert real.keys() == own.keys()
    for answer in (real, own):
        assert answer["verdict"] == "agrees"
    errors = [answer["gradient_growth"]["log_sd"] / 6**0.5 for answer in (real, own)]
    ratio = real["gradient_growth"]["value"] / own["gradient_growth"]["value"]
    assert abs(ratio - 1) < 4 * sum(errors)


def test_tables_say_what_their_columns_are(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--layers", "2", "--seq-len", "8", "--seeds", "1", "--batch", "1"]
    _, answer = measure("tiny", *options, capsys=capsys)
    assert main(["measure", "tiny", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    n = next(n for n, line in enumerate(lines) if line.startswith("matrix"))
    assert lines[n - 1].split() == ["std", "measured", "std", "drawn", "with"]
    assert lines[n].split() == ["matrix", "first", "layer", "last", "layer", "first", "layer", "last", "layer"]
    ends = [lines[n].index(name) + len(name) for name in ("first layer", "last layer")]
    rows = {line.split()[0]: line for line in lines[n + 1 :]}
    assert rows.keys() == answer["stds"].keys()
    for role, stds in answer["stds"].items():
        values, drawn = stds["values"], stds["drawn_with"]
        cells = [values[0], *values[1:][-1:], drawn[0], *drawn[1:][-1:]]
        assert rows[role].split()[1:] == [f"{cell:.4g}" for cell in cells], role
        assert rows[role][: ends[0]].endswith(f" {values[0]:.4g}")  # in its column, also where there is no last layer
    assert max(map(len, lines[n - 1 :])) <= 100


def test_a_preset_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = measure("tiny", "--layers", "2", "--width", "32", *QUICK, capsys=capsys)
    assert (status, answer["class"], answer["reduced"][-1]) == (0, "Transformer", "n_layers 12 -> 2")
    assert answer["measured_architecture"]["d_model"] == 32
    assert set(answer["stds"]) == {"embedding", "query", "key", "value", "output", "ffn_in", "ffn_out", "head"}
    assert main(["measure", "tiny", "--layers", "2", *QUICK]) == 0
    printed = capsys.readouterr().out
    for words in ("(our Transformer)", "(sharp", "verdict: ", "measured to be: d_model 64, 2 layers, pre-ln, serial"):
        assert words in printed


def test_a_class_without_a_prediction_is_measured_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "config.json", TINY["gpt2"] | {"activation_function": "tanh"})
    status, answer = measure(path, *QUICK, capsys=capsys)
    assert (status, answer["verdict"], answer["predicted"]) == (3, "unknown", None)
    assert "activation_function is 'tanh'" in answer["why"][0]
    assert answer["gradient_growth"]["value"] > 1
    assert answer["measured_architecture"]["block"] == "pre-ln"
    assert main(["measure", path, *QUICK]) == 3
    assert "predicted: none" in capsys.readouterr().out


def test_norms_are_lower_estimates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "config.json", TINY["gpt_neox"])
    _, answer = measure(path, *QUICK, "--norms", capsys=capsys)
    assert [set(row) for row in answer["norms"]] == 4 * [{"layer"}]  # parallel: no halves
    assert answer["norms"][0]["layer"]["kind"] == "lower estimate"


# --- verdicts -----------------------------------------------------------------------------------------------------


def test_limits_shrink_with_seeds_and_never_below_the_accuracy() -> None:
    limits = [allowed(Scatter(0.05, n, n)) for n in (2, 3, 8, 32, 10_000)]
    assert limits == sorted(limits, reverse=True)
    assert limits[-1] == pytest.approx(math.log1p(ACCURACY), abs=0.002)
    # Against the quantile of a thousand samples: a mean of 4 normal numbers, in units of its own error.
    rows = np.random.default_rng(0).normal(size=(200_000, 4))
    beyond = np.abs(rows.mean(1)) > (rows.std(1, ddof=1) * (allowed(Scatter(1.0, 4, 4)) - math.log1p(ACCURACY)))
    assert beyond.mean() == pytest.approx(CHANCE, abs=5 * math.sqrt(CHANCE / 200_000))


def test_outcomes() -> None:
    scatter = Scatter(0.01, 8, 8)
    assert outcome(2.0, 2.1, scatter)[0] == "agrees"
    assert outcome(2.0, 2.4, scatter)[0] == "differs"
    assert outcome(2.0, 2.4, Scatter(0.1, 8, 1))[0] == "agrees"  # one network of a kind that scatters
    for predicted, measured, known in ((None, 2.4, scatter), (math.nan, 2.4, scatter), (2.0, 0.0, scatter)):
        assert outcome(predicted, measured, known)[0] == "unknown"
    assert outcome(2.0, 2.1, None)[0] == "unknown"


def test_weights_of_other_signs_scatter_as_seeds_do_and_are_put_back() -> None:
    a = replace(preset("wide"), n_layers=2)
    tokens, targets = distinct_tokens(build(a, seed=0), 0, batch_size=2, seq_len=16)
    model = build(a, seed=0)
    monitor, before = StabilityMonitor(model), [p.detach().clone() for p in model.parameters()]
    found = scatter_of_one(monitor, model, tokens, targets)
    assert found is not None
    assert all(torch.equal(x, p) for x, p in zip(before, model.parameters(), strict=True))
    assert monitor.records == []
    logs = []
    for seed in range(8):
        model.load_state_dict(build(a, seed=seed).state_dict())
        logs.append(math.log(one_pass(monitor, model, tokens, targets).growth))
    ratio = found.log_sd / float(np.std(logs, ddof=1))
    assert 1 / 3 < ratio < 3  # two standard deviations of 8 numbers each: F(7, 7) is within 9 but for one in 100


def test_a_wrong_initialisation_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control: a network drawn otherwise than the config says is told, by its matrices and by its growth."""
    settings, _ = real_classes.settings(LLAMA | {"hidden_size": 256})
    model = real_classes.build(settings, 0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(3)
    model.save_pretrained(tmp_path / "loud")
    capsys.readouterr()
    status, answer = measure(str(tmp_path / "loud"), "--seeds", "2", "--seq-len", "32", capsys=capsys)
    assert (status, answer["verdict"]) == (0, "unknown")
    assert "1 of 10 kinds of weights are not as initialised" in answer["why"][0]
    ratio = answer["gradient_growth"]["value"] / answer["predicted"]["gradient_growth"]
    assert abs(math.log(ratio)) > math.log(1.5)
    drawn = answer["stds"]["value"]["drawn_with"][0]
    assert answer["stds"]["value"]["values"][0] == pytest.approx(3 * drawn, rel=0.05)


def test_repeated_tokens_are_predicted_as_they_are() -> None:
    a = replace(preset("tiny"), n_layers=2)
    row = torch.arange(1, 25)
    tokens = torch.stack([row, row.repeat_interleave(2)[:24]])
    exact = [gradient_growth(a, 24, tokens=part.numpy()).value for part in tokens]
    assert predict(a, tokens).value == pytest.approx((exact[0] * exact[1]) ** 0.5)
    assert predict(a, tokens[:1]) == gradient_growth(a, 24)
    long = torch.ones(1, 300, dtype=torch.long)
    assert "repeat" in predict(a, long).reasons[-1]


# --- checkpoints --------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_the_network_that_was_saved(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = measure(str(saved), "--seeds", "2", "--seq-len", "12", capsys=capsys)
    assert (status, answer["trained"], answer["seeds_of"]) == (0, True, "tokens")
    grown = measure_decoder(
        lambda _: llama(), seeds=(0, 1), batches=lambda m, seed: distinct_tokens(m, seed, batch_size=4, seq_len=12)
    )
    assert answer["gradient_growth"]["value"] == grown.growth.values[0]
    assert answer["predicted"]["of"] == "the initialisation"
    assert main(["measure", str(saved), *QUICK]) == 0
    assert "sharp, at initialisation" in capsys.readouterr().out


def test_shards_and_half_precision(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, whole = measure(str(saved), *QUICK, capsys=capsys)
    llama().save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert (tmp_path / "sharded" / real_classes.INDEX).exists()
    _, sharded = measure(str(tmp_path / "sharded"), *QUICK, capsys=capsys)
    assert sharded["gradient_growth"] == whole["gradient_growth"]
    half = real_classes.build(real_classes.settings(LLAMA)[0], 0).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    _, rounded = measure(str(tmp_path / "half"), *QUICK, capsys=capsys)
    ratio = rounded["gradient_growth"]["value"] / whole["gradient_growth"]["value"]
    assert ratio != 1
    assert ratio == pytest.approx(1, abs=0.02)  # two to three digits of the weights are left


def test_our_own_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model that a run left, and a run's folder, are the same network; an unfinished run's last state too."""
    a = replace(preset("tiny"), n_layers=2)
    left = tmp_path / "run" / "models" / "one"
    keep_model(left, build(a, seed=3))
    grown = measure_decoder(
        lambda _: build(a, seed=3), seeds=(0,), batches=lambda m, s: distinct_tokens(m, s, batch_size=2, seq_len=12)
    )
    for given in (left, tmp_path / "run"):
        status, answer = measure(str(given), *QUICK, capsys=capsys)
        assert (status, answer["class"], answer["trained"]) == (0, "Transformer", True)
        assert answer["stds"]["query"]["values"] == list(grown.architecture.stds["query"])
    state = tmp_path / "unfinished" / "checkpoints" / "id" / "step-00000004"
    keep_model(state, build(a, seed=4))
    _, answer = measure(str(tmp_path / "unfinished"), *QUICK, capsys=capsys)
    assert answer["name"] == f"tiny of {state}"


def test_an_unfinished_run_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder of a run that was stopped, and its checkpoint itself."""
    from helpers.training import specification, write_text

    from empirics.checkpoints import Checkpoints
    from empirics.run import corpus_of
    from empirics.train import Stopped, train

    spec = specification(write_text(tmp_path), architecture={"d_model": 32, "d_head": 16})
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints" / spec.identity, spec.identity)
    with pytest.raises(Stopped):
        train(spec, corpus_of(spec, tmp_path), checkpoints=checkpoints, stop=lambda: True)
    for given in (tmp_path / "run", checkpoints.folder / "step-00000001"):
        status, answer = measure(str(given), *QUICK, capsys=capsys)
        assert (status, answer["trained"], answer["measured_architecture"]["d_model"]) == (0, True, 32)
        assert answer["name"].endswith("step-00000001")


def test_text_by_the_folders_own_tokenizer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{n}": n for n in range(50)} | {"<|endoftext|>": 50}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{n % 40}" for n in range(500)))
    _, answer = measure(str(folder), "--data", str(text), *QUICK, capsys=capsys)
    assert answer["tokens"].endswith(f"by {folder / 'tokenizer.json'}")
    from empirics.measure_tokens import batches_of

    of = batches_of(network(str(folder)), batch_size=2, seq_len=12, data=str(text), cache=None, device="cpu").of
    tokens, targets = of(llama(), 0)
    assert ((tokens + 1) % 40).equal(targets)  # the text counts up
    assert tokens.shape == (2, 12)


# --- nothing of a folder runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [False, True])
def test_code_of_a_folder_does_not_run(
    folder: Path, weights: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither for a class that transformers has, which is then its own, nor for one that it has not."""
    ran = folder / "ran"
    code = f"import pathlib; pathlib.Path({str(ran)!r}).touch()\nclass Config: pass\nclass Model: pass\n"
    (folder / "evil.py").write_text(code)
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoModel": "evil.Model"}
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": names}
    if not weights:
        os.remove(folder / "model.safetensors")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks whether code may run
    write(folder / "config.json", config)
    assert main(["measure", str(folder), *QUICK]) == 0
    write(folder / "config.json", config | {"model_type": "evil"})
    assert main(["measure", str(folder), *QUICK]) == (2 if weights else 3)
    capsys.readouterr()
    assert not ran.exists()
    exec(code, {})  # control: it would have left its mark
    assert ran.exists()


def test_pickles_are_not_opened(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (open, (str(folder / "ran"), "w"))

    torch.save(Evil(), folder / "pytorch_model.bin")
    assert main(["measure", str(folder), *QUICK]) == 0  # the safetensors beside it are taken
    os.remove(folder / "model.safetensors")
    capsys.readouterr()
    assert main(["measure", str(folder), *QUICK]) == 2
    assert "may run code; load it where you trust it" in capsys.readouterr().err
    assert not (folder / "ran").exists()


# --- bad input ----------------------------------------------------------------------------------------------------

Spoil = Callable[[Path], object]


def edit(**changes: Any) -> Spoil:
    return lambda f: write(f / "config.json", json.loads((f / "config.json").read_text()) | changes)


def cut(f: Path) -> None:
    whole = (f / "model.safetensors").read_bytes()
    (f / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def index(weight_map: Any) -> Spoil:
    return lambda f: write(f / real_classes.INDEX, {"weight_map": weight_map})


def own(spoil: Spoil) -> Spoil:
    def folder(f: Path) -> None:
        shutil.rmtree(f)
        keep_model(f, build(replace(preset("tiny"), n_layers=1), seed=0))
        spoil(f)

    return folder


def other_weights(f: Path) -> None:
    shutil.copy(f / "model.safetensors", f.parent / "w")
    keep_model(f, build(replace(preset("tiny"), n_layers=1), seed=0))
    shutil.move(str(f.parent / "w"), str(f / "model.safetensors"))


FOLDERS: dict[str, tuple[Spoil, str]] = {
    "nothing in it": (lambda f: [p.unlink() for p in f.iterdir()], "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config of nothing": (lambda f: (f / "config.json").write_text(""), "not valid JSON"),
    "config of a list": (lambda f: (f / "config.json").write_text("[]"), "not an object"),
    "no model_type": (lambda f: write(f / "config.json", {"hidden_size": 64}), "model_type"),
    "cut weights": (cut, "transformers refuses"),
    "garbage weights": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 99), "transformers refuses"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "transformers refuses"),
    "too deep a config": (edit(num_hidden_layers=5), "no weights that fit model.layers.3"),
    "too wide a config": (edit(hidden_size=128, head_dim=32), "no weights that fit"),
    "another class": (edit(model_type="olmo2"), "no weights that fit"),
    "quantised": (edit(quantization_config={"quant_method": "bitsandbytes"}), "quantised"),
    "a class of no decoder": (edit(model_type="t5"), "no decoder 't5'"),
    "a million layers": (edit(num_hidden_layers=10**6), "out of range"),
    "too large": (edit(num_hidden_layers=4000, hidden_size=8192, intermediate_size=10**5), "needs"),
    "an adapter": (lambda f: write(f / "adapter_config.json", {}), "merge it"),
    "no shard": (index({"a": "model-1.safetensors"}), "lacks model-1.safetensors"),
    "a shard elsewhere": (index({"a": "../w.safetensors"}), "outside its folder"),
    "index of nothing": (index(None), "cannot be read"),
    "shards of numbers": (index({"a": 3}), "outside its folder"),
    "ours, cut": (own(cut), "damaged"),
    "ours, no weights": (own(lambda f: (f / "model.safetensors").unlink()), "no model.safetensors"),
    "ours, no such architecture": (own(lambda f: write(f / "architecture.json", {"init": {}})), "json is damaged"),
    "ours, not JSON": (own(lambda f: (f / "architecture.json").write_text("{")), "json is damaged"),
    "ours, other weights": (other_weights, "damaged (Missing key in checkpoint state_dict: head.weight.)"),
}


@pytest.mark.parametrize(("spoil", "words"), FOLDERS.values(), ids=FOLDERS)
def test_a_bad_folder_is_refused(spoil: Spoil, words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(folder)
    capsys.readouterr()
    refused(main(["measure", str(folder), "--seeds", "2", "--seq-len", "8"]), words, capsys)


OPTIONS: dict[str, tuple[list[str], str]] = {
    "depth of a checkpoint": (["FOLDER", "--layers", "2"], "leave out --layers"),
    "width of a checkpoint": (["FOLDER", "--width", "32"], "leave out --width"),
    "embedding of a checkpoint": (["FOLDER", "--embedding", "embed-ln"], "leave out --embedding"),
    "their weights as ours": (["FOLDER", "--implementation", "own"], "leave out --implementation"),
    "a preset as theirs": (["tiny", "--implementation", "transformers"], "leave out --implementation"),
    "weights for a config": (["FOLDER/model.safetensors"], "give the folder"),
    "width of no heads": (["CONFIG", "--width", "50"], "use --width 48 or 64"),
    "their class with our init": (["CONFIG", "--init", "gpt2", "--implementation", "transformers"], "own Transformer"),
    "no such text": (["CONFIG", "--data", "none.txt"], "no text"),
    "a text and no tokenizer": (["FOLDER", "--data", "sympy"], "no tokenizer.json"),
    "vocabulary too small for text": (["NARROW", "--data", "sympy"], "vocab_size=50"),
    "more than learned positions": (["GPT2", "--seq-len", "65"], "exceeds the 64 positions"),
    "an absurd sequence": (["CONFIG", "--seq-len", "1000000"], "out of range"),
    "an absurd depth": (["CONFIG", "--layers", "5000"], "out of range"),
    "no layers": (["CONFIG", "--layers", "0"], "use 1 to"),
}


@pytest.mark.parametrize(("argv", "words"), OPTIONS.values(), ids=OPTIONS)
def test_bad_options_are_refused(
    argv: list[str], words: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = {"CONFIG": LLAMA, "NARROW": LLAMA | {"vocab_size": 50}, "GPT2": TINY["gpt2"]}
    given, *options = argv
    if given in configs:
        given = write(tmp_path / "config.json", configs[given])
    try:
        status = main(["measure", given.replace("FOLDER", str(saved)), *options])
    except SystemExit as leave:  # argparse
        status = int(leave.code or 0)
    refused(status, words, capsys)


def refused(status: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.count("\n") == 1, err
    assert words in err
    assert REMEDY.search(err), err


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reaches for a network fails."""
    import socket

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a network was reached for")

    monkeypatch.setattr(socket.socket, "connect", never)
