"""`measure` on folders of weights: checkpoints are what was saved, none of their code runs, bad ones are refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from helpers.measuring import LLAMA, QUICK, forbid_network, measure, write  # noqa: E402  (after the skip)
from helpers.real_classes import TINY  # noqa: E402
from helpers.training import cut, specification, write_text  # noqa: E402

from empirics import real_classes  # noqa: E402
from empirics.__main__ import main  # noqa: E402
from empirics.checkpoints import keep_model  # noqa: E402
from empirics.decoder_growth import distinct_tokens, measure_decoder  # noqa: E402
from empirics.model import build  # noqa: E402
from empirics.networks import network  # noqa: E402
from theory.architecture import preset  # noqa: E402

REMEDY = re.compile(r"\b(use|write|leave out|give|add|fix|see|load|train again|merge|fetch|choose)\b")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_network(monkeypatch)


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
    """The model that a run left, and a run's folder, are the same network."""
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


def test_an_unfinished_run_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder of a run that was stopped, and its checkpoint itself."""
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


def cut_weights(f: Path) -> None:
    cut(f / "model.safetensors")


def cut_shard(f: Path) -> None:
    (f / "model.safetensors").unlink()
    llama().save_pretrained(f, max_shard_size="100KB")
    cut(sorted(f.glob("model-*.safetensors"))[1])


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
    "nothing in it": (lambda f: [p.unlink() for p in f.iterdir()], "neither a model of `train` nor a config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config of nothing": (lambda f: (f / "config.json").write_text(""), "not valid JSON"),
    "config of a list": (lambda f: (f / "config.json").write_text("[]"), "not an object"),
    "no model_type": (lambda f: write(f / "config.json", {"hidden_size": 64}), "model_type"),
    "cut weights": (cut_weights, "model.safetensors is damaged"),
    "garbage weights": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 99), "model.safetensors is damaged"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
    "too deep a config": (edit(num_hidden_layers=5), "no weights that fit model.layers.3"),
    "too wide a config": (edit(hidden_size=128, head_dim=32), "no weights that fit"),
    "another class": (edit(model_type="olmo2"), "no weights that fit"),
    "quantised": (edit(quantization_config={"quant_method": "bitsandbytes"}), "quantised"),
    "a class of no decoder": (edit(model_type="t5"), "no decoder 't5'"),
    "a million layers": (edit(num_hidden_layers=10**6), "out of range"),
    "too large": (edit(num_hidden_layers=4000, hidden_size=8192, intermediate_size=10**5), "needs"),
    "an adapter": (lambda f: write(f / "adapter_config.json", {}), "merge it"),
    "a cut shard": (cut_shard, "checkpoint/model-00002-of-"),
    "no shard": (index({"a": "model-1.safetensors"}), "lacks model-1.safetensors"),
    "a shard elsewhere": (index({"a": "../w.safetensors"}), "outside its folder"),
    "index of nothing": (index(None), "cannot be read"),
    "shards of numbers": (index({"a": 3}), "outside its folder"),
    "ours, cut": (own(cut_weights), "damaged"),
    "ours, no weights": (own(lambda f: (f / "model.safetensors").unlink()), "no model.safetensors"),
    "ours, no such architecture": (own(lambda f: write(f / "architecture.json", {"init": {}})), "(architecture.json"),
    "ours, not JSON": (own(lambda f: (f / "architecture.json").write_text("{")), "(architecture.json"),
    "ours, other weights": (other_weights, "is damaged (model.safetensors has "),
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
