"""Perplexities by hand, by transformers' own loss, and by the published counts of the formats."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.training import specification, train_until, write_text
from helpers.weights import architecture
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from empirics.__main__ import main
from empirics.checkpoints import keep_model
from empirics.model import build
from empirics.perplexity import (
    LanguageModel,
    detokenise,
    last_word,
    load_language_model,
    perplexity,
    score,
    text_loss,
    windows,
)
from empirics.run import model_path, run
from empirics.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
WIKI = (
    ' \n = Robert <unk> = \n \n The 19 @-@ year @-@ old ( Smith \'s son ) paid 1 @,@ 000 , " twice " . \n'
    " It rained 3 @.@ 5 inches ; then it stopped : why ? \n \n = = Second heading = = \n"
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Random weights in float64; 12 tokens of context."""
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "d_head": 8, "d_ffn": 32}
    network = build(architecture(**sizes, vocab_size=258, context=12, positions="learned"), seed=0).double().eval()
    return LanguageModel(logits=network, tokenizer=BYTES, start_id=257, vocab_size=258, context=12)


def by_hand(model: LanguageModel, ids: list[int], context: int, stride: int) -> list[float]:
    """Every token's loss from its own forward pass: the definition, with numpy's arithmetic."""
    losses = []
    for place in range(1, len(ids)):
        # The window that scores this place: the first is filled, later ones end a stride further.
        steps = max(0, math.ceil((place - context) / stride))
        end = min(context + steps * stride, len(ids) - 1)
        given_ids = ids[max(0, end - context) : place]
        logits = model.logits(torch.tensor([given_ids]))[0, -1].detach().numpy()
        assert logits.dtype == np.float64
        shifted = logits - logits.max()
        losses.append(float(np.log(np.exp(shifted).sum()) - shifted[ids[place]]))
    return losses


# --- windows and losses ---------------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_windows_score_every_token_once(tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    seen: list[int] = []
    for window in windows(tokens, context, stride):
        assert 0 <= window.begin < window.end <= tokens
        assert window.end - window.begin == min(context, window.end)  # as much context as there is
        seen += range(window.end - window.scored, window.end)
    assert seen == list(range(tokens))


@pytest.mark.parametrize(("context", "stride"), [(12, 12), (12, 5), (12, 1), (7, 3)])
def test_loss_of_a_text_is_that_by_hand(model: LanguageModel, context: int, stride: int) -> None:
    text = "the quick brown fox jumps"
    ids = [257, *BYTES.encode([text])[0].tolist()]
    nats, tokens = text_loss(model, [text, text[:5]], context=context, stride=stride, batch=3)
    expected = by_hand(model, ids, context, stride) + by_hand(model, ids[:6], context, stride)
    assert tokens == len(text) + 5
    assert nats == pytest.approx(math.fsum(expected), rel=1e-12)


def test_batches_do_not_show(model: LanguageModel) -> None:
    """Sequences of any length filled up beside each other score what they do alone."""
    generator = np.random.default_rng(0)
    sequences = [(generator.integers(0, 258, size=n), int(generator.integers(1, n))) for n in (2, 9, 13, 5, 13, 3)]
    alone = [score(model, [sequence], batch=1)[0] for sequence in sequences]
    for batch in (2, 6, 100):
        together = score(model, sequences, batch=batch)
        np.testing.assert_allclose([loss for loss, _ in together], [loss for loss, _ in alone], rtol=1e-12)
        assert [right for _, right in together] == [right for _, right in alone]


def test_text_format_counts_tokens_and_bytes(model: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["caf\u00e9 au lait", "no"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    told = perplexity(model, str(path), format="text", stride=4)
    nats = math.fsum(loss for text in texts for loss in by_hand(model, [257, *BYTES.encode([text])[0].tolist()], 12, 4))
    assert told["nats"] == pytest.approx(nats, rel=1e-12)
    assert (told["tokens"], told["bytes"]) == (15, 15)
    assert told["token_perplexity"] == pytest.approx(math.exp(nats / 15), rel=1e-12)
    assert told["bits_per_byte"] == pytest.approx(nats / math.log(2) / 15, rel=1e-12)


def test_uniform_model_has_the_vocabulary_as_perplexity(tmp_path: Path) -> None:
    uniform = LanguageModel(
        logits=lambda ids: torch.zeros(*ids.shape, 258, dtype=torch.float64),
        tokenizer=BYTES, start_id=257, vocab_size=258, context=64,
    )  # fmt: skip
    path = tmp_path / "a.txt"
    path.write_text("any text at all")
    assert perplexity(uniform, str(path), format="text")["token_perplexity"] == pytest.approx(258, rel=1e-12)


# --- WikiText -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (" = = = Deeper = = = ", "=== Deeper ==="),
        (" 20 @-@ 30 @,@ 000 @.@ 5 ", "20-30,000.5"),
        (' " A " , ( b ) ; [ c ] : d ! ', '"A", (b); [c]: d!'),
        (" the dogs ' owner isn 't Smith 's ", "the dogs' owner isn't Smith's"),
        (" a . b ", "a. b"),
        (" ", ""),
    ],
)
def test_wikitext_is_put_together(line: str, expected: str) -> None:
    assert detokenise(line) == expected


def test_wikitext_counts_words_of_the_file_and_tokens_of_the_text(model: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "wiki.test.tokens"
    path.write_text(WIKI)
    told = perplexity(model, str(path), format="wikitext")
    text = (
        '\n= Robert <unk> =\n\nThe 19-year-old (Smith\'s son) paid 1,000, "twice".\n'
        "It rained 3.5 inches; then it stopped: why?\n\n== Second heading ==\n"
    )
    nats = math.fsum(by_hand(model, [257, *BYTES.encode([text])[0].tolist()], 12, 12))
    words = len(WIKI.replace("\n", " <eos> ").split())  # Merity et al.: every line has an <eos>
    assert told["words"] == words == WIKI.count("\n") + len(WIKI.split())
    assert told["tokens"] == len(text)
    assert told["unknown_words"] == 1
    assert told["nats"] == pytest.approx(nats, rel=1e-12)
    assert told["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-12)
    assert told["token_perplexity"] == pytest.approx(math.exp(nats / len(text)), rel=1e-12)


def test_rows_of_a_data_set_are_the_lines_of_the_file(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data set leaves the space of a blank line out, and its rows keep their line ends."""
    import sys
    import types

    asked: list[tuple[Any, Any]] = []
    rows = [{"text": line + "\n" if line.strip() else ""} for line in WIKI.removesuffix("\n").split("\n")]
    module = types.ModuleType("datasets")
    setattr(module, "load_dataset", lambda *names, **how: asked.append((names, how["split"])) or rows)  # noqa: B010
    monkeypatch.setitem(sys.modules, "datasets", module)
    path = tmp_path / "wiki.test.raw"
    path.write_text(WIKI)
    here = perplexity(model, str(path), format="wikitext", context=8)
    there = perplexity(model, "hf:Salesforce/wikitext:wikitext-103-raw-v1", format="wikitext", context=8)
    assert (here.pop("read_as"), there.pop("read_as")) == (("whole files",), ("rows of a data set",))
    assert {**here, "data": ""} == {**there, "data": ""}
    perplexity(model, "hf:a", format="text")
    perplexity(model, "hf:a:b:train", format="text")
    names = [("Salesforce/wikitext", "wikitext-103-raw-v1"), ("a", None), ("a", "b")]
    assert asked == list(zip(names, ("test", "test", "train"), strict=True))


# --- LAMBADA --------------------------------------------------------------------------------------------------------


def test_lambada_is_that_by_hand(tmp_path: Path) -> None:
    """A model that copies the byte 3 places back: it is right about a last word that the text ends with twice."""

    def copying(ids: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, 258, dtype=torch.float64)
        source = torch.nn.functional.pad(ids, (2, 0))[:, : ids.shape[1]]
        return logits.scatter_(-1, source[..., None], 5.0)

    model = LanguageModel(logits=copying, tokenizer=BYTES, start_id=257, vocab_size=258, context=64)
    path = tmp_path / "lambada_test.jsonl"
    texts = ["so they sat ab ab", "so they sat ab ac", "one"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    told = perplexity(model, str(path), format="lambada")
    right, wrong = (math.log(math.exp(5) + 257) - logit for logit in (5.0, 0.0))
    # " ab": all three right; " ac": two right; "one" after the start token: none.
    nats = 3 * right + (2 * right + wrong) + 3 * wrong
    assert (told["examples"], told["tokens"]) == (3, 9)
    assert told["accuracy"] == pytest.approx(1 / 3)
    assert told["nats"] == pytest.approx(nats, rel=1e-12)
    assert told["word_perplexity"] == pytest.approx(math.exp(nats / 3), rel=1e-12)
    assert told["token_perplexity"] == pytest.approx(math.exp(nats / 9), rel=1e-12)


def test_lambada_keeps_the_end_of_a_long_context(model: LanguageModel, tmp_path: Path) -> None:
    text = "a context that is far too long for twelve tokens and its word"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n")
    told = perplexity(model, str(path), format="lambada")
    ids = BYTES.encode([text])[0].tolist()[-13:]
    expected = [by_hand(model, ids[: n + 1], 12, 12)[-1] for n in range(8, 13)]
    assert told["tokens"] == len(" word")
    assert told["nats"] == pytest.approx(math.fsum(expected), rel=1e-12)


def test_last_word_takes_its_space() -> None:
    assert last_word("  she said : yes \n") == ("she said : ".strip(), " yes")
    assert last_word("yes") == ("", "yes")


# --- models ---------------------------------------------------------------------------------------------------------


def test_model_of_transformers_has_its_own_loss(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    small = {"vocab_size": 258, "bos_token_id": 257, "eos_token_id": 257}
    torch.manual_seed(0)
    models = [
        GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=40, **small)),
        LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                max_position_embeddings=40, **(small | {"bos_token_id": 5}),
            )
        ),
    ]  # fmt: skip
    text = "a text of less than forty tokens"
    (tmp_path / "a.txt").write_text(text)
    for n, theirs in enumerate(models):
        folder = tmp_path / str(n)
        theirs.eval().save_pretrained(folder)
        BYTES.save(folder)
        ours = load_language_model(folder)
        assert ours.context == 40
        start = theirs.config.bos_token_id
        ids = torch.tensor([[start, *BYTES.encode([text])[0].tolist()]])
        loss = float(theirs(input_ids=ids, labels=ids).loss.detach())
        told = perplexity(ours, str(tmp_path / "a.txt"), format="text")
        assert math.log(told["token_perplexity"]) == pytest.approx(loss, rel=1e-6)  # float32: 6e-8 a sum of 32


def test_no_code_of_a_model_runs(tmp_path: Path) -> None:
    """Neither a module that the configuration names, nor a pickle in place of safetensors."""
    mark = tmp_path / "it ran"
    for name, config in (
        ("module", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}),
        ("pickle", {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 1, "vocab_size": 258}),
    ):
        folder = tmp_path / name
        BYTES.save(folder)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()")
        (folder / "pytorch_model.bin").write_bytes(f"cbuiltins\nopen\n(V{mark}\nVw\ntR.".encode())
        with pytest.raises(ValueError, match="whose loading may run code; load it where you trust it"):
            load_language_model(folder)
    assert not mark.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes()).close()  # it would have
    assert mark.exists()


def test_kept_model_scores_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From `train --keep-checkpoint` on: the folder knows its tokenizer, its start and its length."""
    text = write_text(tmp_path)
    spec = specification(text, steps=40, learning_rate=1e-2)
    run(spec, tmp_path, keep_model=True)
    folder = model_path(spec, tmp_path)
    model = load_language_model(folder)
    assert (model.context, model.start_id, model.vocab_size) == (spec.seq_len, 257, 258)
    assert main(["perplexity", str(folder), "--data", str(text), "--json", "--stride", "8"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"] == len(text.read_text())
    assert told["token_perplexity"] < 40  # of 258: it has learned something
    wiki, words, out = tmp_path / "wiki.raw", tmp_path / "lambada.jsonl", tmp_path / "told.txt"
    wiki.write_text(WIKI)
    words.write_text('{"text": "3 plus 3 is 6"}\n')
    assert main(["perplexity", str(folder), "--data", str(wiki), "--format", "wikitext", "--out", str(out)]) == 0
    assert "50 words" in out.read_text()

    assert "note: 1 word is <unk>" in out.read_text()
    words.write_text('{"text": "3 plus 3 is 6"}\n' * 3 + '{"text": "3 plus 3 is seven"}\n')
    assert main(["perplexity", str(tmp_path), "--data", str(words), "--format", "lambada"]) == 0  # the run's folder
    told = perplexity(model, str(words), format="lambada")
    right = f"{told['accuracy']:.2%} ({round(4 * told['accuracy'])} of 4"
    assert capsys.readouterr().out.splitlines() == [
        f"{words} as lambada, lines of JSON: 4 examples, 12 tokens; context 16",
        f"last words right: {right}; right if every token is the most likely)",
        f"perplexity a last word: {told['word_perplexity']:.4g}",
        f"perplexity a token of the last words: {told['token_perplexity']:.4g}",
    ]
    words.write_text('{"text": "3 plus 3 is 6"}\n')
    assert main(["perplexity", str(folder), "--data", str(words), "--format", "lambada"]) == 0
    assert "1 example, 2 tokens" in capsys.readouterr().out


def test_a_longer_context_than_trained_is_noted_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rotary positions go on, learned ones end."""
    path = tmp_path / "a.txt"
    path.write_text("a text of some thirty characters" * 4)
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "d_head": 8, "d_ffn": 32, "context": 12}
    for positions in ("rope", "learned"):
        folder = tmp_path / positions
        keep_model(folder, build(architecture(**sizes, vocab_size=258, positions=positions), seed=0), tokenizer=BYTES)
        for context, told in (("12", False), ("40", True)):
            argv = ["perplexity", str(folder), "--data", str(path), "--context", context]
            status = main(argv)
            out, err = capsys.readouterr()
            if told and positions == "learned":
                assert (status, out) == (2, "")
                assert "--context 40 exceeds the model's 12 positions; use at most as many" in err
            else:
                assert status == 0
                assert ("note: the model was trained at 12 tokens and is asked for 40" in out) == told


def test_a_model_without_a_tokenizer_takes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text")
    keep_model(tmp_path / "bare", build(architecture(vocab_size=258, context=12), seed=0))
    keep_model(tmp_path / "with", build(architecture(vocab_size=258, context=12), seed=0), tokenizer=BYTES)

    def said(folder: str, *more: str) -> tuple[int, str, str]:
        status = main(["perplexity", str(tmp_path / folder), "--data", str(path), *more])
        return status, *capsys.readouterr()

    status, out, err = said("bare")
    assert (status, out) == (2, "")
    assert "bare has no tokenizer; name the one that the model was trained with: --tokenizer bytes, gpt2, or" in err
    answer = said("with")[1]
    assert answer.startswith(str(path))
    assert said("bare", "--tokenizer", "bytes")[:2] == (0, answer)
    assert said("bare", "--tokenizer", str(tmp_path / "with" / "tokenizer.json"))[:2] == (0, answer)
    assert "there is no tokenizer 'bpe'; use bytes, gpt2," in said("bare", "--tokenizer", "bpe")[2]


def test_an_unfinished_run_is_to_be_finished_with_its_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path)
    train_until(specification(text), tmp_path / "run", 2)
    assert main(["perplexity", str(tmp_path / "run"), "--data", str(text)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the run is not finished: finish it with --keep-checkpoint, or name the one" in line


def test_bad_requests_name_the_remedy(model: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: str) -> str:
        assert main(["perplexity", *argv, "--data", str(tmp_path / "a.txt")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    (tmp_path / "a.txt").write_text("text")
    assert "holds no model; name the folder" in refused(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "has no tokenizer; name the one" in refused(str(tmp_path))
    BYTES.save(tmp_path)
    assert "has no model.safetensors; give a folder that save_pretrained wrote" in refused(str(tmp_path))
    (tmp_path / "architecture.json").write_text("{}")
    assert "train again" in refused(str(tmp_path))
    (tmp_path / "empty.txt").write_text(" \n \n")
    (tmp_path / "empty.jsonl").write_text(" \n \n")
    for name, ending in (("wikitext", "txt"), ("lambada", "jsonl"), ("text", "txt")):
        with pytest.raises(ValueError, match="holds no text; use"):
            perplexity(model, str(tmp_path / f"empty.{ending}"), format=name)  # type: ignore[arg-type]
    for plain in (str(tmp_path / "a.txt"), "sympy"):
        with pytest.raises(ValueError, match=r'does not say where examples end; write one {"text": ') as refusal:
            perplexity(model, plain, format="lambada")
        assert ".jsonl" in str(refusal.value)
    with pytest.raises(ValueError, match="stride=13 is out of range; use 1 to the context, 12"):
        perplexity(model, str(tmp_path / "a.txt"), format="text", stride=13)
    with pytest.raises(ValueError, match="unknown format 'ptb'; use one of wikitext, lambada, text"):
        perplexity(model, str(tmp_path / "a.txt"), format="ptb")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the model has 100 ids and the tokenizer gives"):
        score(LanguageModel(logits=model.logits, tokenizer=BYTES, start_id=257, vocab_size=100, context=12),
              [(np.array([257, 1]), 1)], batch=1)  # fmt: skip
    (tmp_path / "long.jsonl").write_text('{"text": "one incomprehensibility"}\n')
    with pytest.raises(ValueError, match=r"the last word of .* has 20 tokens; use"):
        perplexity(model, str(tmp_path / "long.jsonl"), format="lambada")
