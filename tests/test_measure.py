"""`measure` on presets and real classes: what it says they are, what it expects of them, and its verdicts."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from helpers.measuring import LLAMA, QUICK, forbid_network, measure, write  # noqa: E402  (after the skip)
from helpers.real_classes import REAL, TINY, measured_growth  # noqa: E402

from empirics import measure_command, real_classes  # noqa: E402
from empirics.__main__ import main  # noqa: E402
from empirics.agreement import (  # noqa: E402
    ACCURACY,
    CHANCE,
    DRAWS,
    Scatter,
    allowed,
    by_chance,
    decides,
    enough,
    outcome,
    pooled,
)
from empirics.block_norms import Norms, block_norms  # noqa: E402
from empirics.comparison import one_pass, predict, redrawn, scatter_of_one  # noqa: E402
from empirics.decoder_growth import distinct_tokens, measure_decoder  # noqa: E402
from empirics.model import build  # noqa: E402
from empirics.networks import network  # noqa: E402
from empirics.reduction import narrower, reduced_architecture  # noqa: E402
from empirics.stability import StabilityMonitor  # noqa: E402
from theory.architecture import preset  # noqa: E402
from theory.growth import gradient_growth  # noqa: E402
from theory.hf_config import parse_config  # noqa: E402


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_network(monkeypatch)


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


def test_how_far_the_passes_have_come_is_told_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two seeds of two layers, forward and back; the bar of the command says what makes it shorter."""
    settings, _ = real_classes.settings(LLAMA | {"num_hidden_layers": 2})
    told: list[int] = []
    grown = [
        measure_decoder(
            lambda seed: real_classes.build(settings, seed),
            seeds=(0, 1),
            batches=lambda model, seed: distinct_tokens(model, seed, batch_size=2, seq_len=12),
            on_layer=on_layer,
        )
        for on_layer in (None, told.append)
    ]
    assert told == [8] * 8
    assert grown[0].gradient == grown[1].gradient
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in grown[1].model.modules())
    config = write(tmp_path / "config.json", LLAMA | {"num_hidden_layers": 2})
    for patience, shown in ((0.0, True), (1000.0, False)):
        monkeypatch.setattr(measure_command, "PATIENCE", patience)
        assert main(["measure", config, *QUICK]) == 0
        said = capsys.readouterr().err
        assert ("llama, 1 seed, both ways" in said) == shown
        assert ("4/4" in said and "shorter with fewer --layers or a smaller --seq-len" in said) == shown


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
    assert [role for role, stds in answer["stds"].items() if stds["drawn_with"] is None] == []  # experts' as well


def test_a_reduced_class_is_predicted_as_reduced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "config.json", LLAMA | {"hidden_size": 512, "num_attention_heads": 16, "vocab_size": 400})
    status, answer = measure(path, "--width", "128", "--layers", "2", "--seeds", "7", "--seq-len", "32", capsys=capsys)
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
        gradient_growth(network(path, width=128, n_layers=2).architecture, 32, distinct=True).value  # type: ignore[arg-type]
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
    assert matrices == a.n_weights + (2 * a.d_model if kind == "opt" else 0)  # OPT has two positions more
    assert real_classes.n_parameters(settings) >= matrices


def test_a_class_without_heads_has_another_depth() -> None:
    mamba = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 50}
    settings, reduced = real_classes.settings(mamba, n_layers=2)
    assert (settings.num_hidden_layers, reduced) == (2, ("num_hidden_layers 3 -> 2",))
    with pytest.raises(ValueError, match="does not say num_attention_heads; leave out --width"):
        real_classes.settings(mamba, n_layers=2, width=16)


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
    options = ["--seeds", "10", "--seq-len", "32"]
    _, real = measure(path, *options, capsys=capsys)
    _, own = measure(path, *options, "--implementation", "own", capsys=capsys)
    assert (real["class"], own["class"]) == ("LlamaForCausalLM", "Transformer")
    assert real.keys() == own.keys()
    for answer in (real, own):
        assert answer["verdict"] == "agrees"
    errors = [answer["gradient_growth"]["log_sd"] / 10**0.5 for answer in (real, own)]
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


def test_what_cannot_be_measured_says_what_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mamba = write(tmp_path / "mamba.json", {"model_type": "mamba", "hidden_size": 32, "vocab_size": 50})
    t5 = write(tmp_path / "t5.json", {"model_type": "t5"})
    for argv, remedy in (
        ([t5], "transformers has no decoder of that name to measure; give the config of one"),
        ([mamba, "--implementation", "own"], "to measure the class of transformers, leave out --implementation, "),
    ):
        status, answer = measure(*argv, capsys=capsys)
        assert (status, answer["verdict"]) == (3, "unknown")
        assert "has no prediction yet; " in answer["why"][0]
        assert remedy in answer["why"][0]


def test_fewer_positions_than_the_tokens_that_a_network_is_asked_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "config.json", TINY["gpt2"] | {"n_positions": 8})
    status, answer = measure(path, "--seeds", "1", "--norms", capsys=capsys)
    assert (status, answer["seq_len"], answer["measured_architecture"]["block"]) == (0, 8, "pre-ln")
    assert not any("is measured" in reason for reason in answer["why"])


def test_norms_are_lower_estimates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "config.json", TINY["gpt_neox"])
    _, answer = measure(path, *QUICK, "--norms", capsys=capsys)
    names = {"layer", "attention", "J_Z", "feedforward", "attention_branch", "feedforward_branch"}
    assert [set(row) for row in answer["norms"]] == 4 * [names]
    assert set(answer["norms_left_out"]) == {"attention_half", "feedforward_half"}  # parallel: no halves
    assert answer["stack_norm"]["kind"] == "lower estimate"
    assert answer["norms"][0]["layer"]["kind"] == "lower estimate"


def test_norms_of_stiff_layers_and_experts_are_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, kind in (("stiff", TINY["llama"] | {"initializer_range": 0.3}), ("experts", TINY["mixtral"])):
        path = write(tmp_path / f"{name}.json", kind)
        main(["measure", path, *QUICK, "--norms"])
        said = capsys.readouterr().out.split("Jacobian norms, lower estimates:\n")[1]
        assert "left out" not in said
        rows = [line for line in said.splitlines() if line.startswith("layer ")]
        assert all(len(row) < 120 and "-" not in row.replace("e-", "") for row in rows)
        assert [row.split()[1] for row in rows] == [str(n) for n in range(4)]
        assert float(said.splitlines()[-1].removeprefix("all layers, stack_jacobian: ")) > 1
        heads = "".join(said.split("layer 0")[0].split())
        assert heads.count("jacobian") == 6, heads
        assert ("experts_" in heads, heads.count("ffn_")) == (name == "experts", 1 + (name == "stiff")), heads


def test_layers_without_a_norm_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def but_one(*arguments: Any, **options: Any) -> Norms:
        layers, _ = block_norms(*arguments, **options)
        layers[1]["layer"] = "no such thing"
        return Norms(layers, "broken")

    monkeypatch.setattr("empirics.measure_command.block_norms", but_one)
    path = write(tmp_path / "config.json", TINY["gpt_neox"])
    main(["measure", path, *QUICK, "--norms"])
    said = capsys.readouterr().out.split("Jacobian norms, lower estimates:\n")[1]
    assert "\nlayer 1, layer_jacobian: left out; no such thing\n" in said
    assert "\nevery layer, half_layer_jacobian attention: left out; its sub-layers are parallel" in said
    assert said.rstrip().endswith("all layers, stack_jacobian: left out; broken")
    first, second = (next(line for line in said.splitlines() if line.startswith(f"layer {n} ")) for n in (0, 1))
    assert (first.split()[2] == "-", second.split()[2]) == (False, "-")


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
    coarse = Scatter(0.1, 8, 1)  # one network of a kind that scatters
    verdict, limit, why = outcome(2.0, 2.4, coarse)
    assert (verdict, limit) == ("undecided", allowed(coarse))
    assert why == (f"chance alone moves such a measurement by up to {math.expm1(by_chance(coarse)):.1%}, more than the "
                   "8% that is to be tested",)  # fmt: skip
    assert outcome(2.0, 2.0, coarse)[0] == "undecided"  # however near: it says no more than the limit does
    assert outcome(2.0, 4.0, coarse)[0] == "differs"
    for predicted, measured, known in ((None, 2.4, scatter), (math.nan, 2.4, scatter), (2.0, 0.0, scatter)):
        assert outcome(predicted, measured, known)[0] == "unknown"
    assert outcome(2.0, 2.1, None)[0] == "unknown"


def test_an_agreement_decides_if_chance_explains_no_more_than_the_accuracy() -> None:
    unit = by_chance(Scatter(1.0, 8, 1))
    for share, verdict in ((0.999, "agrees"), (1.001, "undecided")):
        scatter = Scatter(share * math.log(1.08) / unit, 8, 1)
        assert outcome(2.0, 2.1, scatter)[0] == verdict
        assert math.expm1(allowed(scatter)) == pytest.approx(
            1.08**2 - 1, abs=1e-3
        )  # so much, and not several times 8 %
    for log_sd in (0.03, 0.06, 0.1, 0.5):
        n = enough(log_sd)
        assert decides(Scatter(log_sd, DRAWS - 1 + n, n))
        assert not decides(Scatter(log_sd, DRAWS - 2 + n, n - 1))
    assert enough(1e-9) == 1


def test_what_seeds_and_redraws_say_of_a_scatter_is_pooled() -> None:
    """By the definition, and against many samples: a mean of 3, in units of the error that both kinds give."""
    assert pooled(Scatter(0.3, 8, 1), 0.3, 5) == (pytest.approx(0.3), 12, 5)
    assert pooled(Scatter(0.0, 8, 1), 1.0, 8).log_sd == pytest.approx(math.sqrt(0.5))
    seeds, redraws = (np.random.default_rng(0).normal(size=(100_000, n)) for n in (3, DRAWS))
    each = zip(redraws.std(1, ddof=1).tolist(), seeds.std(1, ddof=1).tolist(), strict=True)
    sds = np.array([pooled(Scatter(one, DRAWS, 1), other, 3).log_sd for one, other in each])
    beyond = np.abs(seeds.mean(1)) > sds * by_chance(Scatter(1.0, DRAWS + 2, 3))
    assert beyond.mean() == pytest.approx(CHANCE, abs=5 * math.sqrt(CHANCE / 100_000))
    # Of one scatter, each seed more decides more: there is no number at which another kind of draw takes over.
    limits = [
        by_chance(Scatter(1.0, DRAWS, 1)),
        *(by_chance(pooled(Scatter(1.0, DRAWS, 1), 1.0, n)) for n in range(2, 40)),
    ]
    assert limits == sorted(limits, reverse=True)


def test_what_is_redrawn_is_the_first_network_whatever_the_seeds() -> None:
    a = replace(preset("tiny"), n_layers=1)
    grown = measure_decoder(
        lambda seed: build(a, seed=seed),
        seeds=(0, 1, 2),
        batches=lambda model, seed: distinct_tokens(model, seed, batch_size=1, seq_len=8),
    )
    for p, first in zip(grown.model.parameters(), build(a, seed=0).parameters(), strict=True):
        assert torch.equal(p, first)


def test_too_few_seeds_leave_it_undecided(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is printed with it, and what would decide is what decides."""
    redraws = Scatter(0.08, DRAWS, 1)
    monkeypatch.setattr(measure_command, "scatter_of_one", lambda *_, **__: redraws)
    options = ["tiny", "--layers", "2", "--seq-len", "12", "--seeds"]
    status, answer = measure(*options, "2", capsys=capsys)
    scatter = pooled(redraws, answer["gradient_growth"]["log_sd"], 2)
    n = enough(scatter.log_sd)
    assert (status, answer["verdict"], answer["limit"]) == (0, "undecided", pytest.approx(allowed(scatter)))
    assert answer["why"][1:] == [f"about --seeds {n} would decide"]
    error = answer["predicted"]["gradient_growth"] / answer["gradient_growth"]["value"] - 1
    assert abs(math.log1p(error)) < answer["limit"]
    assert main(["measure", *options, "2"]) == 0
    printed = capsys.readouterr().out
    assert f"(sharp): {error:+.2%}\nscatter: " in printed
    assert f"\nverdict: undecided (within {math.expm1(allowed(scatter)):.1%}: " in printed
    assert f"\nscatter: log sd {scatter.log_sd:.3f} (8 redraws of one network's signs and 2 seeds, pooled); " in printed
    assert outcome(2.0, 2.0, Scatter(scatter.log_sd, DRAWS - 1 + n, n))[0] == "agrees"
    _, answer = measure(*options, "1", capsys=capsys)
    assert answer["scatter"] == {
        "log_sd": 0.08, "of": "8 redraws of one network's signs", "degrees_of_freedom": 7, "averaged": 1,
        "by_chance": pytest.approx(by_chance(redraws)),
    }  # fmt: skip

    settings, _ = real_classes.settings(LLAMA)
    real_classes.build(settings, 0).save_pretrained(tmp_path / "kept")
    capsys.readouterr()
    options = ["measure", str(tmp_path / "kept"), *QUICK]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert (
        "why: one network does not decide, whatever its tokens; measure its configuration at initialisation, "
        in printed
    )
    assert re.search(r"\(sharp, at initialisation\): [+-]\d+\.\d\d%\nscatter: .*\nverdict: undecided ", printed)


def test_weights_of_other_signs_scatter_as_seeds_do_and_are_put_back() -> None:
    a = replace(preset("wide"), n_layers=2)
    tokens, targets = distinct_tokens(build(a, seed=0), 0, batch_size=2, seq_len=16)
    model = build(a, seed=0)
    monitor, before = StabilityMonitor(model), [p.detach().clone() for p in model.parameters()]
    found = scatter_of_one(model, tokens, targets)
    assert found is not None
    assert all(torch.equal(x, p) for x, p in zip(before, model.parameters(), strict=True))
    logs = []
    for seed in range(8):
        model.load_state_dict(build(a, seed=seed).state_dict())
        logs.append(math.log(one_pass(monitor, model, tokens, targets).growth))
    ratio = found.log_sd / float(np.std(logs, ddof=1))
    assert 1 / 3 < ratio < 3  # two standard deviations of 8 numbers each: F(7, 7) is within 9 but for one in 100


def test_redrawn_weights_are_put_back_also_from_an_error() -> None:
    model = build(replace(preset("tiny"), n_layers=1), seed=0)
    before = [p.detach().clone() for p in model.parameters()]
    generators = {torch.device("cpu"): torch.Generator().manual_seed(0)}
    drawn = []
    for _ in range(2):
        with suppress(KeyboardInterrupt), redrawn(model, generators):
            drawn.append([p.detach().clone() for p in model.parameters()])
            raise KeyboardInterrupt
        assert all(torch.equal(x, p) for x, p in zip(before, model.parameters(), strict=True))
    for x, one, two in zip(before, *drawn, strict=True):
        assert torch.equal(one.abs(), x.abs())
        if x.ndim > 1:  # half of the signs turn, and others each time
            shares = [float((a != b).double().mean()) for a, b in ((one, x), (two, x), (one, two))]
            assert shares == pytest.approx([0.5] * 3, abs=5 * 0.5 / math.sqrt(x.numel()))
        else:
            assert torch.equal(one, x)


def test_a_wrong_initialisation_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_wrong_growth_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every matrix has the standard deviation that the config says, but two of each layer are not independent."""
    settings, _ = real_classes.settings(TINY["gpt2"] | {"n_inner": 128, "initializer_range": 0.1})
    model = real_classes.build(settings, 0)
    with torch.no_grad():
        for block in model.transformer.h:
            enter, leave = block.mlp.c_fc.weight, block.mlp.c_proj.weight
            leave.copy_(enter.T * (leave.std() / enter.std()))
    model.save_pretrained(tmp_path / "dependent")
    capsys.readouterr()
    options = [str(tmp_path / "dependent"), "--seeds", "2", "--seq-len", "32"]
    status, answer = measure(*options, capsys=capsys)
    assert (status, answer["verdict"], answer["why"]) == (0, "differs", [])
    assert main(["measure", *options]) == 0
    assert re.search(r"\): [+-]\d+\.\d\d%\nscatter: .*\nverdict: differs \(by more than ", capsys.readouterr().out)


def test_repeated_tokens_are_predicted_as_they_are() -> None:
    a = replace(preset("tiny"), n_layers=2)
    row = torch.arange(1, 25)
    tokens = torch.stack([row, row.repeat_interleave(2)[:24]])
    exact = [gradient_growth(a, 24, tokens=part.numpy()).value for part in tokens]
    assert predict(a, tokens).value == pytest.approx((exact[0] * exact[1]) ** 0.5)
    assert predict(a, tokens[:1]) == gradient_growth(a, 24, distinct=True)
    long = torch.ones(1, 300, dtype=torch.long)
    assert "repeat" in predict(a, long).reasons[-1]
