"""What `spikecheck check` advises: it cures, it is no more than is needed, and it says so in numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.checking import checked, llama

from theory.architecture import EMBEDDINGS, INITS, Architecture, EmbeddingTreatment, preset
from theory.differences import differences
from theory.records import architecture_from
from theory.remedies import SOFTER
from theory.verdict import Verdict, check

# --- remedies -----------------------------------------------------------------------------------------------------


def remedies(verdict: Verdict) -> list[list[str]]:
    """Command-line options that the answer's `next` names."""
    return [line.split(":")[0].split() for line in verdict.next if line.startswith("--")]


NUMBERS = "that is: "

SICK: list[tuple[str, EmbeddingTreatment, str]] = [
    ("tiny", "vanilla", "paper"),
    ("wide", "embed-detach", "paper"),
    ("wide", "scaled-embed", "xavier"),
    ("small", "vanilla", "xavier"),
    ("350m", "vanilla", "paper"),
]


@pytest.mark.parametrize(("size", "embedding", "init"), SICK)
def test_remedies_cure(size: str, embedding: EmbeddingTreatment, init: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option that `next` names gives `stable` on the command line, with the growth that it promises."""
    verdict = check(preset(size).with_embedding(embedding).with_init(init), 32)
    assert verdict.outcome == "at risk"
    options = remedies(verdict)
    assert options
    promises = [line for line in verdict.next if not line.startswith(NUMBERS)]
    for option, line in zip(options, promises, strict=True):
        argv = [size, "--seq-len", "32", "--embedding", embedding, "--init", init, *option]  # the last one counts
        status, answer = checked(capsys, *argv)
        assert (status, answer["verdict"]) == (0, "stable")
        assert f"growth {answer['gradient_growth']['value']:.4g} instead of {verdict.growth.value:.4g}" in line


def test_remedies_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_embd": 256, "n_head": 4, "n_layer": 6}))
    status, answer = checked(capsys, str(path), "--seq-len", "64")
    assert status == 1
    options = [line.split(":")[0].split() for line in answer["next"] if line.startswith("--")]
    assert options
    for option in options:
        assert checked(capsys, str(path), "--seq-len", "64", *option)[0] == 0


def smaller(verdict: Verdict) -> Architecture:
    """What advice in words says: a treatment, the paper's initialisation or none, and branches times a factor."""
    found = re.search(
        r"smaller(?: besides)?(?: --embedding ([\w-]+))?( --init paper)?: branches times ([0-9.e-]+) ", verdict.next[0]
    )
    assert found is not None, verdict.next
    a = verdict.architecture.with_init("paper") if found[2] else verdict.architecture
    a = a.with_embedding(found[1]) if found[1] else a  # type: ignore[arg-type]
    advised = differences(verdict.architecture, a)
    assert [line for line in verdict.next if line.startswith(NUMBERS)] == [NUMBERS + advised] * bool(advised)
    return replace(a, residual_multiplier=a.residual_multiplier * float(found[3]))


def test_without_a_remedy_it_says_what_to_change() -> None:
    """Sub-layers made large by their width, which no embedding and neither initialisation cures: advice that does."""
    hard = replace(preset("tiny"), d_ffn=10**6)
    for embedding in EMBEDDINGS:
        for init in ("paper", "xavier"):
            verdict = check(hard.with_embedding(embedding).with_init(init), 8)
            assert verdict.outcome == "at risk"
            assert remedies(verdict) == []
            words = "neither --embedding scaled-embed or embed-ln nor --init paper suffices; "
            assert verdict.next[0].startswith(words)
            assert "make the sub-layers smaller" in verdict.next[0]
            # What is set already is not advised again.
            treated = embedding in ("scaled-embed", "embed-ln")
            assert ("besides --embedding scaled-embed" in verdict.next[0]) == (not treated)
            assert ("--init paper:" in verdict.next[0]) == (init != "paper")
            assert len(verdict.next) == (1 if init == "paper" and treated else 2)
            assert "their output matrices, or" in verdict.next[0]
            cured = check(smaller(verdict), 8)
            assert cured.outcome == "stable"
            assert verdict.next[0].endswith(f"have growth {cured.growth.value:.4g}")


@pytest.mark.parametrize("block", ["peri-ln", "branch-ln", "post-ln"])
def test_advice_on_other_layouts_does_what_it_says(block: Any) -> None:
    verdict = check(replace(preset("wide"), block=block, n_layers=24, init=INITS["xavier"]), 16)
    if remedies(verdict):
        return
    assert ("a residual multiplier: their norms undo" in verdict.next[0]) == (block != "post-ln")
    cured = check(smaller(verdict), 16)
    assert all(condition.holds for condition in cured.conditions)
    assert cured.outcome == ("stable" if "have growth" in verdict.next[0] else "unknown")


def test_at_risk_outside_the_domain_is_told_what_mends_the_conditions() -> None:
    """More layers than are predicted: a treatment makes the conditions hold, and no growth is promised."""
    deep = check(replace(preset("wide"), n_layers=97), 16)
    assert (deep.outcome, deep.growth.in_domain) == ("at risk", False)
    words = "both of the paper's conditions hold then, outside the domain of the predicted growth"
    assert deep.next == (
        f"--embedding scaled-embed: {words}",
        "that is: embeddings times 16 (sqrt d_model)",
        "--layers 96: the largest depth whose growth is predicted",
    )
    mended = check(deep.architecture.with_embedding("scaled-embed"), 16)
    assert all(condition.holds for condition in mended.conditions)
    assert mended.outcome == "unknown"
    wider = check(replace(deep.architecture, d_ffn=10**6), 16)
    assert "fulfil both of the paper's conditions" in wider.next[0]
    assert all(condition.holds for condition in check(smaller(wider), 16).conditions)


def test_outside_the_domain_the_obstacle_is_what_to_change() -> None:
    sound = replace(preset("wide"), context=4096).with_embedding("scaled-embed")
    many = check(replace(sound, vocab_size=256), 512)
    assert many.outcome == "unknown"
    assert many.next == ("--seq-len 256: no more tokens than the vocabulary has; the verdict is then stable",)
    assert check(many.architecture, 256).outcome == "stable"
    sharp = check(replace(sound, attention_scale=4.0), 64)
    assert (sharp.outcome, all(condition.holds for condition in sharp.conditions)) == ("unknown", True)
    assert len(sharp.next) == 1
    assert "smaller standard deviation of the query and key matrices" in sharp.next[0]
    deep = check(replace(sound, n_layers=97), 8)
    assert deep.outcome == "unknown"
    assert deep.next == ("--layers 96: the largest depth whose growth is predicted",)
    narrow = replace(preset("tiny"), d_model=16, n_heads=1, n_kv_heads=1, d_head=16, d_ffn=64)
    assert "no change can be judged" in check(narrow.with_embedding("scaled-embed"), 8).next[0]


def test_an_initialisation_that_is_chosen_is_not_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2}))
    words = "initialised as the gpt2 class does"
    assert words in checked(capsys, str(path), "--seq-len", "8")[1]["assumed"]
    assert words not in checked(capsys, str(path), "--seq-len", "8", "--init", "xavier")[1]["assumed"]


def test_stable_asks_for_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = checked(capsys, "small", "--embedding", "scaled-embed", "--seq-len", "16")
    assert status == 0
    assert answer["next"] == ["train; at the next change of width, depth or initialisation, check again"]


# --- what advice is in numbers ------------------------------------------------------------------------------------


def test_advice_says_what_it_is_in_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers are those of the architecture that the advised options give."""
    path = llama(tmp_path / "a", 0.02, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    _, answer = checked(capsys, path, "--seq-len", "16")
    advice, numbers = answer["next"][:2]
    assert advice.startswith("--embedding scaled-embed --init paper: ")
    _, after = checked(capsys, path, "--seq-len", "16", *advice.split(":")[0].split())
    stds = architecture_from(after["architecture"]).stds
    assert numbers == (
        f"{NUMBERS}embeddings times 64 (sqrt d_model); matrices of std {stds.query:.3g}; "
        f"those that write to the stream (attention output, feed-forward down) {stds.output:.3g}"
    )
    assert (f"{stds.query:.3g}", f"{stds.output:.3g}") == ("0.00988", "0.00124")
    assert answer["next"][3].startswith(f"{NUMBERS}an RMSNorm after the embeddings; matrices of std 0.00988; ")


def test_numbers_name_only_what_differs() -> None:
    wide = preset("wide")
    assert differences(wide, wide) == differences(wide, replace(wide, name="other", n_layers=8)) == ""
    assert differences(wide, wide.with_embedding("embed-ln")) == "a LayerNorm after the embeddings"
    assert differences(wide.with_embedding("embed-ln"), wide) == "no norm after the embeddings"
    assert differences(wide, wide.with_embedding("embed-detach")) == "the gradient of the embeddings times 0.1"
    xavier = replace(wide, d_ffn=512).with_init("xavier")  # its tables and head are the paper's
    assert differences(xavier, xavier.with_init("paper")) == (
        "matrices inside the layers of std 0.0395; "
        "those that write to the stream (attention output, feed-forward down) 0.00988"
    )
    assert differences(wide.with_init("small"), wide) == (
        "matrices that write to the stream (attention output, feed-forward down) of std 0.00988"
    )
    assert differences(wide, wide.with_init("mitchell")).endswith("; weights drawn truncated")
    assert " to " in differences(wide, wide.with_init("mitchell"))  # the writers' own from layer to layer


@pytest.mark.parametrize("embedding", ["scaled-embed", "embed-ln"])
def test_what_is_set_already_is_not_advised(embedding: EmbeddingTreatment) -> None:
    set_already = check(preset("wide").with_embedding(embedding).with_init("xavier"), 16)
    assert set_already.next[0].startswith("--init paper: ")
    assert (
        NUMBERS + differences(set_already.architecture, set_already.architecture.with_init("paper"))
        == (set_already.next[1])
    )
    gemma = replace(set_already.architecture, init=replace(INITS["paper"], name="file"), d_ffn=10**6)
    assert "--init paper:" not in check(gemma, 16).next[0]  # the same numbers by another name


def test_advice_that_cures_sharp_logits_stands_alone() -> None:
    """Outside the domain by depth and by sharp logits, of which the paper's initialisation takes the second away."""
    deep = replace(preset("wide"), n_layers=97)
    sharp = check(deep.with_init(replace(INITS["paper"], query_key=0.5, hidden=0.3)), 16)
    assert any(reason.startswith("attention logits have variance") for reason in sharp.growth.reasons)
    assert "--init paper" in sharp.next[0]
    assert not any(line.startswith(SOFTER) for line in sharp.next)
    left = check(replace(deep, attention_scale=4.0), 16)  # the control: no initialisation is advised
    assert "--init paper:" not in left.next[0]
    assert any(line.startswith(SOFTER) for line in left.next)
