"""Ids are the published ones, ends of documents cannot be forged, and a missing file names the remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from empirics import tokenizer
from empirics.data import load_corpus
from empirics.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

TEXTS = [
    "It's the year 1984, isn't it?  We'll see;\n\n  they've 3.14 caf\u00e9s\t\u4e2d\u6587 \U0001f600 !!",
    " leading and trailing  ",
    "\r\n\x1c\x85\u3000x",
    "<|endoftext|> and <pad> are spelled out",
    "",
]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vocab.json and merges.txt as GPT-2's are: the bytes, 60 merges, the end of text last."""
    folder = tmp_path_factory.mktemp("gpt2")
    trained = json.loads(train_bpe(TEXTS * 3 + ["the cat and the hat sat on that mat"] * 9, 320).file)
    merges = [" ".join(pair) for pair in trained["model"]["merges"]]
    tokens = [token for token in trained["model"]["vocab"] if token not in ("<pad>", "<|endoftext|>")]
    tokens.append("<|endoftext|>")
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    assert len(merges) > 20
    return folder


def test_gpt2_files_give_the_ids_of_transformers(gpt2: Path) -> None:
    from transformers import GPT2TokenizerFast

    ours = load_tokenizer(str(gpt2))
    theirs = GPT2TokenizerFast(vocab=str(gpt2 / "vocab.json"), merges=str(gpt2 / "merges.txt"))
    for text, ids in zip(TEXTS, ours.encode(TEXTS), strict=True):
        assert ids.tolist() == theirs(text, split_special_tokens=True)["input_ids"]
        assert ours.decode(ids) == text
    assert ours.end_id == theirs.eos_token_id == ours.vocab_size - 1
    assert 0 in ours.encode(["!"])[0]  # the first byte of the alphabet: id 0 is a token like any other


def test_every_form_of_the_files_is_read(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_tokenizer(str(gpt2))
    first.save(tmp_path)
    for spec in (gpt2 / "vocab.json", tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(str(spec))
        assert (again.file, again.end_id) == (first.file, first.end_id)

    def cached(repository: str, file: str) -> str | None:
        return str(tmp_path / file) if repository == "openai-community/gpt2" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert load_tokenizer("gpt2").file == first.file
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(tmp_path / file))
    assert load_tokenizer("gpt2").file == first.file


def test_transformers_reads_what_is_kept(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for n, ours in enumerate((byte_tokenizer(), train_bpe(TEXTS * 5, 300))):
        ours.save(tmp_path / str(n))
        theirs = AutoTokenizer.from_pretrained(tmp_path / str(n))
        assert theirs.eos_token_id == ours.end_id
        for text, ids in zip(TEXTS, ours.encode(TEXTS), strict=True):
            assert ids.tolist() == theirs(text, split_special_tokens=True)["input_ids"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=4))
def test_bytes_and_bpe_lose_nothing_and_leave_zero_free(texts: list[str]) -> None:
    for made in (BYTES, BPE):
        for text, ids in zip(texts, made.encode(texts), strict=True):
            assert made.decode(ids) == text
            assert not set(ids.tolist()) & {0, made.end_id}
    for text, ids in zip(texts, BYTES.encode(texts), strict=True):
        assert ids.tolist() == [byte + 1 for byte in text.encode()]


BYTES, BPE = byte_tokenizer(), train_bpe(TEXTS * 5, 300)
# What GPT-2's pattern treats differently, and what separates it: all three kinds of white space are among them.
ODD = st.text(st.sampled_from("ab1!' \n\r\t\x1c\x85\u3000\u00e9<|>"), min_size=40, max_size=200)


@given(ODD)
def test_pieces_do_not_show(text: str) -> None:
    whole = BPE._tokenizer.encode(text).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE", 5)
        assert BPE.encode([text])[0].tolist() == whole
    assert len(list(tokenizer._pieces("a " * tokenizer.PIECE))) > 1


def test_foreign_patterns_see_whole_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern that looks across a space, here all between two line ends, is not cut there."""
    parts = json.loads(BPE.file)
    lines = {"type": "Split", "pattern": {"String": "\n"}, "behavior": "Isolated", "invert": False}
    byte_level = parts["pre_tokenizer"] | {"use_regex": False}
    parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [lines, byte_level]}
    parts["model"]["vocab"] |= {"t\u0120": 400}
    parts["model"]["merges"].insert(0, ["t", "\u0120"])
    foreign = Tokenizer(json.dumps(parts))
    monkeypatch.setattr(tokenizer, "PIECE", 2)
    (ids,) = foreign.encode(["at it at it"])
    assert 400 in ids
    assert foreign.decode(ids) == "at it at it"


@pytest.mark.parametrize("name", ["gpt2 files", "tokenizer.json"])
def test_corpus_of_a_given_tokenizer(gpt2: Path, tmp_path: Path, name: str) -> None:
    """Documents end with its token, and the cache knows tokenizers by their content."""
    folder = gpt2
    if name == "tokenizer.json":
        folder = tmp_path / "tokenizer"
        load_tokenizer(str(gpt2)).save(folder)
    text = tmp_path / "a.jsonl"
    text.write_text("".join(json.dumps({"text": f"the cat {n} sat on that mat"}) + "\n" for n in range(60)))
    made = load_tokenizer(str(gpt2))
    corpus = load_corpus(str(text), vocab_size=400, tokenizer=str(folder), cache=tmp_path / "data")
    ids = np.concatenate([corpus.train, corpus.heldout])
    assert (ids == made.end_id).sum() == 60
    assert ids[-1] == made.end_id
    first = ids[: np.flatnonzero(ids == made.end_id)[0]]
    assert made.decode(first) == "the cat 0 sat on that mat"
    again = load_corpus(str(text), vocab_size=400, tokenizer=str(folder), cache=tmp_path / "data")
    assert again.digest == corpus.digest
    assert len(list((tmp_path / "data").iterdir())) == 1
    with pytest.raises(ValueError, match=rf"has {made.vocab_size} ids and the vocabulary 300; use a config.json"):
        load_corpus(str(text), vocab_size=300, tokenizer=str(folder))


def test_end_of_a_document_is_known_by_name(gpt2: Path, tmp_path: Path) -> None:
    parts = json.loads(load_tokenizer(str(gpt2)).file)
    file = json.dumps(parts).replace("<|endoftext|>", "</s>")
    (tmp_path / "tokenizer.json").write_text(file)
    assert load_tokenizer(str(tmp_path)).end_of_document == "</s>"
    config = tmp_path / "tokenizer_config.json"
    for eos in ("!", {"content": "!"}):
        config.write_text(json.dumps({"eos_token": eos}))
        assert load_tokenizer(str(tmp_path)).end_id == 0
    config.write_text(json.dumps({"eos_token": "<none>"}))
    with pytest.raises(ValueError, match="has no '<none>' to end a document with; name one as eos_token"):
        load_tokenizer(str(tmp_path))
    config.unlink()
    (tmp_path / "tokenizer.json").write_text(file.replace("</s>", "<fin>"))
    with pytest.raises(ValueError, match="to end a document with; name one as eos_token"):
        load_tokenizer(str(tmp_path))


def test_missing_and_broken_tokenizers_name_the_remedy(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(spec: str) -> str:
        with pytest.raises(ValueError, match=r"; (put|use) ") as caught:
            load_tokenizer(spec)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def offline(*_: object) -> str:
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert "put its tokenizer.json, or vocab.json and merges.txt, into a folder" in message("gpt2")
    assert "there is no tokenizer" in message(str(tmp_path / "none"))
    assert "there is no tokenizer" in message(str(tmp_path))
    shutil.copy(gpt2 / "vocab.json", tmp_path)
    assert "merges.txt is missing" in message(str(tmp_path))
    (tmp_path / "merges.txt").write_text("not merges at all")
    assert "cannot read the tokenizer" in message(str(tmp_path))
    shutil.copy(gpt2 / "merges.txt", tmp_path)
    vocabulary = json.loads((gpt2 / "vocab.json").read_text())
    del vocabulary["<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    assert "no '<|endoftext|>'" in message(str(tmp_path))
    for content in ("{", "[]", '{"model": {}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        assert "cannot read the tokenizer" in message(str(tmp_path))


def test_tokenizers_that_cut_or_fill_are_told_not_to() -> None:
    parts = json.loads(BYTES.file)
    parts["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    parts["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<pad>",
    }  # fmt: skip
    assert len(Tokenizer(json.dumps(parts)).encode(["three"])[0]) == 5
