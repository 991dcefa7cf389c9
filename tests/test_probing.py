"""Probes while training, which change no bit of it; and the command that measures a network or a kept model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.real_classes import TINY
from helpers.training import record_bytes, specification, train_until
from helpers.weights import architecture

from empirics.__main__ import main
from empirics.bounds import BOUNDED
from empirics.checkpoints import keep_model
from empirics.data import batch, random_tokens
from empirics.kept import load_model
from empirics.model import build
from empirics.registry import Reading, find, probes, reading
from empirics.run import corpus_of, run
from empirics.stability_record import StabilityRecord
from empirics.subject import Subject
from empirics.training_probes import add
from theory.architecture import preset
from theory.hf_config import parse_config
from theory.records import plain

# --- while training -----------------------------------------------------------------------------------------------

EVERYTHING = (
    "default,stack_jacobian@4,bound_ratio@5,half_layer_jacobian,weight_opnorm@3,residual_kurtosis@1,head_entropy@2"
)
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "micro-batches": {"batch_size": 4, "micro_batch": 2},
    "experts": {"architecture": {"n_experts": 3, "experts_per_token": 2}},
    "z-loss": {"z_loss": 1e-2},
    "decay, tied": {"weight_decay": 0.1, "decay_embeddings": True, "architecture": {"tied": True}},
    "bfloat16": {"precision": "bfloat16"},
    "parallel": {"architecture": {"parallel": True, "positions": "learned"}},
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_probes_change_no_bit_of_a_training(text: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """All of them at every step against none: losses, norms, the final weights; no random number is drawn."""
    found, weights, states = [], [], []
    for wanted in (EVERYTHING, "none"):
        spec = specification(text, probes=wanted, probe_every=1, **changes)
        torch.manual_seed(7)
        np.random.seed(7)  # noqa: NPY002
        found.append(run(spec, tmp_path, keep_model=True))
        states.append((torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist()))  # noqa: NPY002
        weights.append((tmp_path / "models" / spec.identity / "model.safetensors").read_bytes())
    probed, bare = (record["series"] for record in found)
    for name in bare.keys() - {"probes", "probe_step", "residual_std", "place_gradient", "distributions"}:
        assert probed[name] == bare[name], name
    assert found[0]["final"] == found[1]["final"]
    assert weights[0] == weights[1]
    assert states[0] == states[1]
    assert bare["probes"] == bare["distributions"] == {}
    assert bare["probe_step"] == bare["residual_std"] == bare["place_gradient"] == []
    steps = {name: series["steps"] for name, series in probed["probes"].items()}
    assert steps["update_ratio"] == steps["attention_entropy"] == probed["probe_step"] == list(range(9))
    assert steps["stack_jacobian"] == [0, 4, 8, 9]
    assert steps["half_layer_jacobian"] == [0, 9]
    assert steps["bound_ratio"] == [0, 5, 9]
    assert all(0 < value <= 1 for row in probed["probes"]["bound_ratio"]["values"] for value in row)
    assert steps["weight_opnorm"] == [0, 3, 6, 9]
    assert steps["residual_kurtosis"] == list(range(10))
    for series in probed["probes"].values():
        assert len(series["values"]) == len(series["steps"])
        assert all(len(row) == len(series["labels"]) for row in series["values"])
        assert all(value is not None for row in series["values"] for value in row)
    for name, kept in (
        ("stack_jacobian", ("residuals", "likely_upper")),
        ("residual_kurtosis", ("standard_errors", "entries")),
    ):
        for what in kept:
            assert [len(row) for row in probed["probes"][name][what]] == [
                len(row) for row in probed["probes"][name]["values"]
            ]
    assert probed["left_out"] == {}
    assert "residuals" not in probed["probes"]["update_ratio"]
    said = {name for name, series in probed["probes"].items() if series.get("lower_estimate")}
    assert said == {"stack_jacobian", "half_layer_jacobian", "bound_ratio"}


def test_a_probe_at_a_step_is_of_the_weights_of_that_step(text: Path, tmp_path: Path) -> None:
    """Of the same batch and of the weights before the update: the training's own passes against one of the probe's."""
    wanted = ("logit_variance", "attention_entropy", "token_gradient", "gradient_growth")
    spec = specification(text, probe_every=1, learning_rate=0.1, warmup=0, schedule="constant")
    series = run(spec, tmp_path)["series"]
    short = specification(text, probe_every=1, learning_rate=0.1, warmup=0, schedule="constant", steps=2)
    run(short, tmp_path, keep_model=True)
    later = load_model(tmp_path / "models" / short.identity)
    for step, model in ((0, build(spec.architecture, seed=0)), (2, later)):
        arrays = batch(corpus_of(spec, tmp_path), seed=0, step=step, batch_size=2, seq_len=16)
        seen = Subject(model, *map(torch.from_numpy, arrays))
        for name in wanted:
            values = series["probes"][name]["values"][step]
            assert values == pytest.approx(find(name).measure(seen).values, rel=1e-5), (step, name)  # float32


def test_updates_of_a_matrix(text: Path, tmp_path: Path) -> None:
    """Their squares add to the whole update's; a ratio is the norm over that of the matrix before the step."""
    spec = specification(text, probe_every=1)
    series = run(spec, tmp_path)["series"]
    norms, ratios = (np.array(series["probes"][name]["values"]) for name in ("update_norm", "update_ratio"))
    labels = series["probes"]["update_norm"]["labels"]
    model = build(spec.architecture, seed=0)
    matrices = {name: p.detach().numpy() for name, p in model.named_parameters() if p.ndim == 2}
    assert labels == list(matrices)
    sizes = np.array([np.linalg.norm(matrix) for matrix in matrices.values()])
    assert ratios[0] * sizes == pytest.approx(norms[0], rel=1e-5)  # float32
    gains = 2 * 2 + 1  # their updates are the rest
    rest = np.square(series["update_norm"]) - np.square(norms).sum(1)
    rate = np.array(series["learning_rate"])
    assert (rest > 0).all()
    assert (rest < 4 * gains * 16 * rate**2).all()  # an entry moves by at most some two rates in these steps


def test_micro_batches_pool_their_tokens(text: Path, tmp_path: Path) -> None:
    """The first step, at equal weights: equal but for rounding in float32 sums."""
    whole, parts = (
        run(specification(text, batch_size=4, steps=1, warmup=0, **changes), tmp_path)["series"]["probes"]
        for changes in ({}, {"micro_batch": 1})
    )
    assert set(whole) == set(parts)
    for name, series in whole.items():
        tolerance = 2e-3 if name.startswith("update") else 1e-5  # Adam's first step amplifies a small gradient's sign
        np.testing.assert_allclose(parts[name]["values"], series["values"], rtol=tolerance, err_msg=name)


def test_what_cannot_be_taken_is_left_out_with_the_reason(text: Path, tmp_path: Path) -> None:
    """Of the whole training, in a record that is resumed too."""
    wanted = "default,ffn_jacobian@2,weight_norm"
    spec = specification(
        text, probes=wanted, architecture={"n_experts": 3, "experts_per_token": 2}, seq_len=1, steps=5
    )  # fmt: skip
    train_until(spec, tmp_path, 2, every=1)
    series = run(spec, tmp_path)["series"]
    attention = ("logit_variance", "attention_entropy", "attention_entropy_relative", "attention_entropy_lowest")
    assert set(series["left_out"]) == {"ffn_jacobian", *attention}
    why = "the feed-forward sub-layers are experts; see experts_jacobian"
    assert series["left_out"]["ffn_jacobian"] == {why: [0, 2, 4, 5]}
    for name in attention:
        ((reason, steps),) = series["left_out"][name].items()
        assert "use more tokens" in reason
        assert steps == [0, 3]
    assert "weight_norm" in series["probes"]
    assert not set(series["probes"]) & set(series["left_out"])


def test_rows_of_older_checkpoints_have_no_errors() -> None:
    """A run that began before they were kept goes on; the rows stay beside their steps."""
    seen = Subject(
        build(preset("tiny"), seed=0), *map(torch.from_numpy, random_tokens(512, seed=0, batch_size=1, seq_len=4))
    )
    found = find("weight_kurtosis").measure(seen)
    series = {"weight_kurtosis": {"labels": list(found.labels), "steps": [0], "values": [list(found.values)]}}
    add(series, "weight_kurtosis", 4, found)
    assert series["weight_kurtosis"]["standard_errors"] == [None, list(found.standard_errors or ())]


def test_what_only_some_steps_have_stays_beside_its_label() -> None:
    """A matrix of equal entries has no kurtosis, until it has moved; one that is equal again has none any more."""
    series: dict[str, Any] = {}
    for step, (labels, values) in enumerate(((["b"], [1.0]), (["a", "b"], [2.0, 3.0]), (["a"], [4.0]))):
        add(series, "k", step, reading("k", labels, values, standard_errors=[value / 10 for value in values]))
    found = plain(series)["k"]
    assert found["labels"] == ["b", "a"]
    assert found["steps"] == [0, 1, 2]
    assert found["values"] == [[1.0, None], [3.0, 2.0], [None, 4.0]]
    assert found["standard_errors"] == [[0.1, None], [0.3, 0.2], [None, 0.4]]


def test_a_monitors_row_keeps_how_sure_a_value_is() -> None:
    readings = [
        Reading(
            quantity="stack_jacobian", labels=("a",), values=(2.0,), seeds=(), log_sd=None, lower_estimate=True,
            residuals=(1e-3,), likely_upper=(2.1,),
        ),
        reading("weight_kurtosis", ["a"], [0.1], standard_errors=[0.5], entries=[96]),
        reading("residual_std", ["a"], [1.0]),
    ]  # fmt: skip
    record = StabilityRecord(
        step=0, places=("a",), residual_std=(1.0,), place_gradient=(1.0,), token_gradient=(1.0,), n_tokens=1,
        probes={one.quantity: one for one in readings},
    )  # fmt: skip
    row = json.loads(json.dumps(record.row(), allow_nan=False))
    assert row["probes"] == {
        "stack_jacobian": {
            "labels": ["a"], "values": [2.0], "lower_estimate": True, "residuals": [1e-3], "likely_upper": [2.1],
        },
        "weight_kurtosis": {"labels": ["a"], "values": [0.1], "standard_errors": [0.5], "entries": [96]},
        "residual_std": {"labels": ["a"], "values": [1.0]},
    }  # fmt: skip


def test_a_resumed_run_has_the_same_probes(text: Path, tmp_path: Path) -> None:
    spec = specification(text, probes=EVERYTHING, probe_every=2)
    run(spec, tmp_path / "whole")
    train_until(spec, tmp_path / "broken", 5, every=1)
    run(spec, tmp_path / "broken")
    assert record_bytes(spec, tmp_path / "broken") == record_bytes(spec, tmp_path / "whole")


def test_probes_are_left_out_of_what_identifies_older_records(text: Path) -> None:
    base = specification(text)
    assert specification(text, probes="default").identity == base.identity
    assert specification(text, probes="none").identity != base.identity
    with pytest.raises(ValueError, match="unknown probe"):
        specification(text, probes="nothing")


def test_a_diverged_run_keeps_what_was_measured(text: Path, tmp_path: Path) -> None:
    """Dear probes are taken before the step shows that its weights are no numbers any more."""
    spec = specification(
        text, learning_rate=1e30, warmup=1, schedule="constant", steps=30, probe_every=1,
        probes="default,layer_jacobian@1,weight_opnorm@1",
    )  # fmt: skip
    series = run(spec, tmp_path)["series"]
    assert series["diverged_at"] is not None
    assert series["probes"]["update_norm"]["steps"] == list(range(series["diverged_at"]))
    for dear in ("layer_jacobian", "weight_opnorm"):
        assert series["probes"][dear]["steps"] == list(range(len(series["probes"][dear]["steps"])))


# --- the command --------------------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert main(["probes", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_command_lists_every_probe(capsys: pytest.CaptureFixture[str]) -> None:
    rows = said(capsys, "--list")
    assert [row["name"] for row in rows] == list(probes())
    assert main(["probes", "--list"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert len(lines) == len(rows) + 1
    for line, row in zip(lines[1:], rows, strict=True):
        assert line.startswith(row["name"])
        assert f" {row['kind']} " in line
        assert f" {row['of']} " in line


def test_command_at_initialisation(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("tiny", "--layers", "2", "--seq-len", "8", "--batch", "2")
    answer = said(capsys, *options, "--bounds", "--stack", "1:1")
    found = answer["probes"]
    assert set(found) | set(answer["left_out"]) == set(probes())
    assert set(answer["left_out"]) == {"experts_jacobian", "matrix_gradient", "update_norm", "update_ratio"}
    assert found["stack_jacobian"]["labels"] == ["layers 1 to 1"]
    for name in set(BOUNDED) - {"experts_jacobian"}:
        assert found[name]["kind"] == "lower estimate"
        assert max(found[name]["over_bound"]) <= 1
        assert max(found[name]["residuals"]) <= 1e-2
    assert found["attention_entropy"]["unit"] == "nats"
    assert "Attention Entropy Collapse" in found["attention_entropy"]["source"]
    # One matrix of 64 x 64 scatters by a few per cent around a normal one's norm.
    assert list(answer["weight_opnorm_over_random"].values()) == pytest.approx([1] * 14, abs=0.1)
    out = tmp_path / "probes.txt"
    assert main(["probes", *options, "--out", str(out)]) == 0
    text = out.read_text()
    assert "(lower estimate, of first sequence, residual at most" in text
    assert "(exact, of 4,096 to 32,768 entries, standard error at most" in text  # 64 x 64, 64 x 512
    assert "update_norm: left out" in text
    assert not capsys.readouterr().out


@pytest.mark.parametrize("kind", ["gpt_neox", "gptj", "phi", "stablelm"])
def test_bounds_of_classes_that_turn_a_part_of_each_head(
    kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY[kind]))
    architecture = parse_config(TINY[kind]).architecture
    assert 0 < architecture.rope_width < architecture.d_head
    names = ("attention_jacobian", "attention_branch")
    only = [word for name in names for word in ("--only", name)]
    answer = said(capsys, str(config), "--seq-len", "6", "--batch", "1", "--bounds", *only)
    for name in names:
        ratios = answer["probes"][name]["over_bound"]
        assert len(ratios) == architecture.n_layers
        assert 0.1 < max(ratios) <= 1


def test_command_on_a_kept_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A run's folder or the model's own; the values are those of the model."""
    model = build(architecture(d_model=12, n_layers=2, vocab_size=50, positions="rope", d_head=4), seed=5)
    keep_model(tmp_path / "models" / "one", model)
    for folder in (tmp_path, tmp_path / "models" / "one"):
        answer = said(capsys, str(folder), "--only", "weight_opnorm", "--only", "residual_std", "--seq-len", "6")
        assert set(answer["probes"]) == {"weight_opnorm", "residual_std"}
        inputs, targets = map(torch.from_numpy, random_tokens(50, seed=0, batch_size=4, seq_len=6))
        for name, found in answer["probes"].items():
            assert found["values"] == list(find(name).measure(Subject(model, inputs, targets)).values)


def test_text_is_read_by_the_models_own_tokenizer(
    text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A kept model's; one that was kept without has no use for any text."""
    spec = specification(text, steps=2)
    run(spec, tmp_path, keep_model=True)
    answer = said(capsys, str(tmp_path), "--data", str(text), "--only", "residual_std", "--seq-len", "6")
    pair = batch(corpus_of(spec, tmp_path), seed=0, step=0, batch_size=4, seq_len=6)
    inputs, targets = map(torch.from_numpy, pair)
    model = load_model(tmp_path / "models" / spec.identity)
    expected = find("residual_std").measure(Subject(model, inputs, targets)).values
    assert answer["probes"]["residual_std"]["values"] == list(expected)
    keep_model(tmp_path / "bare", model)
    assert main(["probes", str(tmp_path / "bare"), "--data", str(text), "--only", "residual_std"]) == 2
    assert "other ids mean nothing to it" in capsys.readouterr().err


def test_a_folder_of_several_runs_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """By every command that takes one; which of them is meant, nobody can know."""
    for name in ("one", "two"):
        keep_model(tmp_path / "models" / name, build(architecture(d_model=12, vocab_size=50), seed=0))
    for argv in (["probes"], ["measure"], ["perplexity", "--data", "sympy"]):
        assert main([argv[0], str(tmp_path), *argv[1:]]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert f"holds the models of 2 runs; name one, for example {tmp_path / 'models' / 'two'}" in err


@pytest.mark.parametrize("damage", ["truncated", "missing", "no JSON", "another architecture", "a list"])
def test_a_damaged_model_is_one_line(damage: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    keep_model(tmp_path, build(architecture(d_model=12, vocab_size=50), seed=0))
    weights, about = tmp_path / "model.safetensors", tmp_path / "architecture.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "missing":
        weights.unlink()
    elif damage == "another architecture":
        about.write_text(about.read_text().replace('"d_model":12', '"d_model":13'))
    else:
        about.write_text("{" if damage == "no JSON" else "[1, 2]")
    assert main(["probes", str(tmp_path), "--only", "weight_norm"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert ("has no model.safetensors" if damage == "missing" else "is damaged") in err
    assert "train again with --keep-checkpoint" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "nothing to measure; name a preset"),
        (["tiny", "--only", "residual_sd"], "unknown probe 'residual_sd'; did you mean residual_std or "),
        (["tiny", "--only", "update_norm", "--layers", "1"], "train --probes"),
        (["tiny", "--layers", "2", "--stack", "1:2"], "use layers 0 to 1"),
        (["tiny", "--stack", "2"], "write for example 0:3"),
        (["tests"], "holds no model of `train`; name"),
        (["tests", "--layers", "2"], "drop --embedding"),
        (["tiny", "--tolerance", "0"], "not a positive finite number"),
        (["tiny", "--device", "cuda:99"], "use --device cpu"),
        (["tiny", "--device", "abacus"], "'abacus' is no device; use cpu"),
    ],
)
def test_command_refuses(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["probes", *argv])
    except SystemExit as leave:
        status = int(leave.code or 0)
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err
