"""Trainings with attention inside documents: what they reach, how they resume, and the model that they leave."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import assert_refused, call
from helpers.ranks import Launcher
from helpers.training import record_bytes, specification, train_until
from safetensors.torch import load_file, save_file

import empirics.__main__
from empirics.checkpoints import keep_model
from empirics.data import Corpus, batch, heldout_batches, load_corpus
from empirics.kept import load_model
from empirics.model import Transformer, build
from empirics.perplexity import load_language_model, perplexity, text_loss
from empirics.registry import find
from empirics.run import corpus_of, model_path, run
from empirics.run_spec import RunSpec
from empirics.subject import Subject
from empirics.tokenizer import read_tokenizer
from empirics.train import HELDOUT_BATCHES, train

END = 257  # of bytes
Kept = tuple[RunSpec, Path, dict[str, Any]]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of a line: some 15 tokens, so that most windows of 16 cross an end."""
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    lines = (f"{n} plus {n % 7} is {n + n % 7}\n" for n in range(1500))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def masked(sums: Path, **changes: Any) -> RunSpec:
    return specification(sums, **({"mask_documents": True} | changes))


@pytest.fixture(scope="module")
def kept(sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """A finished run whose model was kept."""
    spec, out = masked(sums), tmp_path_factory.mktemp("kept")
    return spec, out, run(spec, out, keep_model=True)


# --- training -------------------------------------------------------------------------------------------------------


def test_the_mask_is_trained_with(sums: Path, kept: Kept, tmp_path: Path) -> None:
    """From the same weights and batches, another loss from the first step on; a run without it is as it was."""
    spec, _, record = kept
    other = run(replace(spec, mask_documents=False), tmp_path)
    ours, theirs = (np.array(r["series"]["loss"]) for r in (record, other))
    assert np.abs(ours - theirs).min() > 1e-5
    assert record["spec"]["mask_documents"] is True
    assert other["id"] == specification(sums).identity != record["id"]
    # Of the embedding nothing has been attended to yet: the first place is the same in both.
    first = [r["series"]["residual_std"][0] for r in (record, other)]
    assert first[0][0] == first[1][0]
    assert first[0][1] != first[1][1]


def test_attention_of_a_masked_run_is_the_model_s(kept: Kept) -> None:
    """What a training writes down of attention at its first step is what its network has on its first batch."""
    spec, out, record = kept
    series = record["series"]["probes"]["attention_entropy"]
    model = build(spec.architecture, seed=spec.seed)
    pair = batch(corpus_of(spec, out), seed=spec.seed, step=0, batch_size=2, seq_len=16)
    tokens, targets = map(torch.from_numpy, pair)
    assert (tokens[0] == END).any()
    found: list[tuple[float, ...]] = []
    for end in (END, None):
        model.end_of_document = end
        found.append(find("attention_entropy").measure(Subject(model, tokens, targets)).values)
    assert series["steps"][0] == 0
    assert series["values"][0] == pytest.approx(found[0], rel=1e-5)
    assert series["values"][0] != pytest.approx(found[1], rel=1e-2)


@torch.no_grad()
def heldout_losses(model: Transformer, corpus: Corpus, batch_size: int) -> tuple[float, float]:
    """With attention inside documents, and without."""
    found: list[float] = []
    for end in (END, None):
        model.end_of_document = end
        batches = heldout_batches(corpus, count=HELDOUT_BATCHES, batch_size=batch_size, seq_len=16)
        found.append(float(np.mean([float(model.loss(*map(torch.from_numpy, pair))) for pair in batches])))
    return found[0], found[1]


def test_the_held_out_loss_is_masked(kept: Kept) -> None:
    spec, out, record = kept
    masked, whole = heldout_losses(load_model(model_path(spec, out)), corpus_of(spec, out), 2)
    assert record["final"]["heldout_loss"] == pytest.approx(masked, rel=1e-6)
    assert abs(whole / masked - 1) > 1e-5


@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bfloat16"}, {"order": "epoch", "micro_batch": 1}, {"attention": "plain"}],
    ids=["float32", "bfloat16", "epoch", "plain"],
)
def test_a_killed_run_ends_in_the_same_bytes(sums: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = masked(sums, **changes)
    run(spec, tmp_path / "whole")
    train_until(spec, tmp_path / "killed", 5)
    run(spec, tmp_path / "killed")
    assert record_bytes(spec, tmp_path / "killed") == record_bytes(spec, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch warns of TorchScript in its own compiler
def test_compiled_run(sums: Path, tmp_path: Path) -> None:
    """The same numbers to float32 rounding; needs a C++ compiler."""
    plain, compiled = (run(masked(sums, compile=flag), tmp_path)["series"] for flag in (False, True))
    np.testing.assert_allclose(compiled["loss"], plain["loss"], rtol=1e-5)


def test_it_must_be_known_where_documents_end(sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = masked(sums)
    with pytest.raises(ValueError, match="does not say which token ends a document; leave out mask_documents, or"):
        train(spec, replace(corpus_of(spec, tmp_path), tokenizer=None))
    tokenizer = json.loads(corpus_of(spec, tmp_path).tokenizer.file)  # type: ignore[union-attr]
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] != END]
    del tokenizer["model"]["vocab"]["<|endoftext|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    argv = ["train", "tiny", "--mask-documents", "--data", str(sums), "--tokenizer", str(tmp_path / "tokenizer.json")]
    result = call(empirics.__main__.main, [*argv, "--out", str(tmp_path / "run")], capsys)
    assert_refused(result, "to end a document with; name one as eos_token in tokenizer_config.json")


# --- the model that is left -----------------------------------------------------------------------------------------


def test_a_model_knows_that_it_was_masked(sums: Path, kept: Kept, tmp_path: Path) -> None:
    """One that was kept, and one of a checkpoint; one that was not masked has nothing that says so."""
    spec, out, _ = kept
    folder = model_path(spec, out)
    assert load_model(folder).end_of_document == END
    checkpoints = train_until(spec, tmp_path, 3)
    (newest,) = sorted(checkpoints.glob("step-*"))[-1:]
    assert load_model(newest).end_of_document == END
    assert json.loads((newest / "manifest.json").read_text())["files"].keys() >= {"documents.json"}
    bare = train_until(specification(sums), tmp_path / "bare", 1)
    (step,) = bare.glob("step-*")
    assert load_model(step).end_of_document is None
    assert not (step / "documents.json").exists()


@pytest.mark.parametrize("content", ["{}", "[]", '{"end_of_document": "x"}', "{"])
def test_a_damaged_file_is_one_line(kept: Kept, tmp_path: Path, content: str) -> None:
    spec, out, _ = kept
    for path in model_path(spec, out).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "documents.json").write_text(content)
    with pytest.raises(ValueError, match=r"is damaged \(documents\.json .*\); .*train again with --keep-checkpoint"):
        load_model(tmp_path)
    (tmp_path / "manifest.json").unlink()  # as of an older version: its content shows it too
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")  # which no manifest seals
    with pytest.raises(ValueError, match=r"documents\.json is damaged .*; .*train again with --keep-checkpoint"):
        load_model(tmp_path)


def test_perplexity_does_not_see_the_start_token(kept: Kept) -> None:
    """It ends the document before: a text after it is read as in training, where it follows another one's end."""
    spec, out, _ = kept
    model = load_language_model(model_path(spec, out))
    text = "12 plus 5 is 17\n"
    nats, tokens = text_loss(model, [text], context=32, stride=32, batch=1)
    (out / "one.txt").write_text(text)
    assert perplexity(model, str(out / "one.txt"), format="text")["end_of_document"] == END
    argv = ["perplexity", str(out), "--data", str(out / "one.txt"), "--out", str(out / "told.txt")]
    assert empirics.__main__.main(argv) == 0
    assert f"and its attention stops at token {END}, the end of a document" in (out / "told.txt").read_text()
    ids = model.tokenizer.encode([text])[0].tolist()
    assert tokens == len(ids)
    network = load_model(model_path(spec, out)).requires_grad_(False)
    network.end_of_document = None
    first = network(torch.tensor([[END]]))[0, -1:]
    logits = torch.cat([first, network(torch.tensor([ids]))[0, :-1]])  # without anything before them
    expected = float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum"))
    assert nats == pytest.approx(expected, rel=1e-5)
    unmasked = network(torch.tensor([[END, *ids[:-1]]]))[0]
    assert nats != pytest.approx(
        float(torch.nn.functional.cross_entropy(unmasked, torch.tensor(ids), reduction="sum")), rel=1e-5
    )


def test_commands_on_a_kept_model(kept: Kept, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`probes` measures the masked network, and `measure` says that the prediction does not speak of it."""
    spec, out, _ = kept
    folder, where = model_path(spec, out), ["--data", str(sums), "--seq-len", "32", "--batch", "2", "--json"]
    status, said, _ = call(empirics.__main__.main, ["measure", str(folder), "--seeds", "1", *where], capsys)
    assert status == 0
    answer = json.loads(said)
    assert answer["verdict"] == "unknown"
    assert any("attention stops at ends of documents" in why for why in answer["why"])
    assert answer["predicted"]["in_domain"] is False
    unmasked = load_model(folder)
    unmasked.end_of_document = None
    keep_model(tmp_path / "unmasked", unmasked, tokenizer=read_tokenizer(folder))
    found: list[list[float]] = []
    for one in (folder, tmp_path / "unmasked"):
        status, said, _ = call(
            empirics.__main__.main, ["probes", str(one), "--only", "attention_entropy", *where], capsys
        )
        assert status == 0
        found.append(json.loads(said)["probes"]["attention_entropy"]["values"])
    assert all(math.isfinite(x) and x < 0.8 * y for x, y in zip(*found, strict=True))


# --- ranks ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launch() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


def command(sums: Path, out: Path, *more: str) -> list[str]:
    config = sums.parent / "llama.json"
    config.write_text(
        json.dumps({
            "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": 288, "intermediate_size": 64, "max_position_embeddings": 32, "tie_word_embeddings": False,
        })
    )  # fmt: skip
    sizes = ["--seq-len", "16", "--batch", "4", "--steps", "8", "--checkpoint-every", "4", "--probe-every", "5"]
    options = ["--mask-documents", "--data", str(sums), "--tokenizer", "bytes", "--warmup", "3", "--keep-checkpoint"]
    return ["train", str(config), *sizes, *options, "--out", str(out), *more]


def losses(out: Path) -> np.ndarray:
    return np.array([json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()])


def test_two_ranks_are_one_process_with_two_micro_batches(launch: Launcher, sums: Path, tmp_path: Path) -> None:
    """Equal losses, bit for bit, with a dear probe that gathers the model; and one process takes over from two."""
    probes = ["--probes", "default,attention_jacobian@4"]
    assert empirics.__main__.main(command(sums, tmp_path / "one", "--micro-batch", "2", *probes)) == 0
    ended = launch(2, command(sums, tmp_path / "two", *probes))
    assert ended.statuses == [0, 0], ended.said
    assert (tmp_path / "two" / "losses.jsonl").read_bytes() == (tmp_path / "one" / "losses.jsonl").read_bytes()
    (one,), (two,) = (list((tmp_path / name / "records").glob("*.json")) for name in ("one", "two"))
    series = [json.loads(path.read_text())["series"]["probes"] for path in (one, two)]
    for name in ("attention_entropy", "attention_jacobian"):
        np.testing.assert_allclose(series[1][name]["values"], series[0][name]["values"], rtol=1e-4)
    ended = launch(2, command(sums, tmp_path / "stopped", *probes), stop_after=4)
    assert ended.statuses == [130, 130], ended.said
    (step,) = (tmp_path / "stopped").glob("checkpoints/*/step-*")
    assert load_model(step).end_of_document == END
    assert empirics.__main__.main(command(sums, tmp_path / "stopped", *probes)) == 0
    np.testing.assert_allclose(losses(tmp_path / "stopped"), losses(tmp_path / "one"), atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch warns of TorchScript in its own compiler
@pytest.mark.parametrize("more", [["--compile"], ["--precision", "bfloat16"]], ids=["compile", "bfloat16"])
def test_the_twin_of_two_ranks_is_masked(launch: Launcher, sums: Path, tmp_path: Path, more: list[str]) -> None:
    """By which they are evaluated, in float32 and uncompiled. Compiling needs a C++ compiler."""
    ended = launch(2, command(sums, tmp_path, *more))
    assert ended.statuses == [0, 0], ended.said
    (path,) = tmp_path.glob("records/*.json")
    record, (folder,) = json.loads(path.read_text()), tmp_path.glob("models/*")
    corpus = load_corpus(str(sums), vocab_size=288, tokenizer="bytes")
    masked, whole = heldout_losses(load_model(folder), corpus, 4)
    assert record["final"]["heldout_loss"] == pytest.approx(masked, rel=1e-6)
    assert abs(whole / masked - 1) > 1e-5
