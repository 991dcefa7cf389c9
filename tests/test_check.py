"""`spikecheck check`: its form, its numbers, its verdicts and its options."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from helpers.checking import STATUS, checked, llama

from theory.__main__ import main
from theory.architecture import EMBEDDINGS, INITS, METHODS, PRESETS, Architecture, method, preset
from theory.conditions import NORMALISED_LIMIT, largest, normalised_share, outcome_of
from theory.growth import gradient_growth
from theory.initialisation import flat
from theory.records import architecture_from
from theory.verdict import Condition, Outcome, _reasons, check, unknown

ROOT = Path(__file__).parent.parent

# --- the answer's form --------------------------------------------------------------------------------------------


def assert_documented(answer: dict[str, Any]) -> None:
    assert answer.keys() == {
        "architecture",
        "seq_len",
        "verdict",
        "gradient_growth",
        "conditions",
        "bounds",
        "thresholds",
        "assumed",
        "why",
        "next",
    }
    assert answer["verdict"] in get_args(Outcome)
    assert answer["gradient_growth"].keys() == {"value", "kind", "in_domain", "reasons"}
    assert answer["gradient_growth"]["kind"] == "sharp"
    assert answer["bounds"].keys() == {"paper", "rigorous"}
    assert answer["bounds"]["paper"].keys() == {"log10", "kind"}
    assert answer["bounds"]["paper"]["kind"] == "estimate"
    assert answer["bounds"]["rigorous"].keys() == {"log10", "kind", "assumptions"}
    assert answer["bounds"]["rigorous"]["kind"] == "upper"
    for key in ("assumed", "why", "next"):
        assert all(isinstance(line, str) and line for line in answer[key])
    assert answer["why"]
    assert answer["next"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", ["tiny", "small", "wide"])
def test_documented_keys(size: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    embedding, init = METHODS[name]
    status, answer = checked(capsys, size, "--embedding", embedding, "--init", init, "--layers", "4")
    assert_documented(answer)
    assert status == STATUS[answer["verdict"]]
    assert answer["seq_len"] == preset(size).context
    assert [condition.keys() for condition in answer["conditions"]] == 2 * [{"name", "holds", "value", "limit"}]
    assert all(c["holds"] == (c["value"] <= c["limit"]) for c in answer["conditions"])
    architecture = replace(method(preset(size), name), n_layers=4)
    assert architecture_from(answer["architecture"]) == architecture
    growth = gradient_growth(architecture, answer["seq_len"])
    assert answer["gradient_growth"]["value"] == growth.value  # JSON keeps every digit of a double
    assert answer["gradient_growth"]["in_domain"] == growth.in_domain


def test_unknown_has_the_same_keys() -> None:
    assert_documented(unknown("no prediction"))
    assert unknown("no prediction")["verdict"] == "unknown"


def test_text_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("350m", "--seq-len", "64")
    _, answer = checked(capsys, *argv)
    assert main(["check", *argv]) == 1
    out, _ = capsys.readouterr()
    assert f"verdict: {answer['verdict']}\n" in out
    assert f"gradient growth: {answer['gradient_growth']['value']:.4g} (sharp)\n" in out
    for key, word in (("why", "why"), ("next", "next"), ("assumed", "assumed")):
        assert [line for line in out.splitlines() if line.startswith(f"{word}: ")] == [
            f"{word}: {line}" for line in answer[key]
        ]


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "json"])
def test_out_is_what_would_be_printed(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "answer"
    argv = ["check", "tiny", *flags]
    assert main(argv) == 1
    printed, _ = capsys.readouterr()
    assert main([*argv, "--out", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"wrote {path}\n"
    assert path.read_text() == printed
    assert [file.name for file in path.parent.iterdir()] == ["answer"]  # no temporary file stays


# --- the numbers --------------------------------------------------------------------------------------------------

# Values of an independent evaluation of the recursion (uniform attention, eps 1e-5) at 1024 tokens; the targets
# leave room for what the second-order attention model adds.
GROWTHS = [
    ("350m", "vanilla", 16.3, 0.06, 1),
    ("350m", "embed-detach", 16.3, 0.06, 1),
    ("350m", "scaled-embed", 1.183, 0.01, 0),
    ("350m", "embed-ln", 1.077, 0.01, 0),
    ("13b", "vanilla", 35.2, 0.08, 1),
]


@pytest.mark.parametrize(("size", "embedding", "value", "target", "status"), GROWTHS)
def test_growth_at_the_papers_sizes(
    size: str, embedding: str, value: float, target: float, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found, answer = checked(capsys, size, "--seq-len", "1024", "--embedding", embedding)
    assert found == status
    assert answer["gradient_growth"]["in_domain"]
    assert answer["gradient_growth"]["value"] == pytest.approx(value, rel=target)
    # The bounds rank and do not size: growth <= 10^estimate here, and the rigorous bound is weaker than the paper's.
    assert math.log10(answer["gradient_growth"]["value"]) < answer["bounds"]["paper"]["log10"]
    assert answer["bounds"]["paper"]["log10"] < answer["bounds"]["rigorous"]["log10"]


def test_bounds_rank_the_methods() -> None:
    paper = {name: check(method(preset("350m"), name), 16).paper.log10_product for name in METHODS}
    assert paper["Embed LN"] < paper["Scaled Embed"] < paper["Vanilla"] == paper["Embed Detach"]


@pytest.mark.parametrize("size", ["tiny", "wide", "350m"])
def test_detach_is_vanilla(size: str) -> None:
    """Detaching changes no activation and no activation gradient: everything but the architecture is equal."""
    vanilla, detach = (check(preset(size).with_embedding(name), 16) for name in ("vanilla", "embed-detach"))
    assert detach.architecture != vanilla.architecture
    advice = tuple(line.replace("; the gradient of the embeddings times 1", "") for line in detach.next)
    assert advice != detach.next  # to undo the detaching is a change
    assert replace(detach, architecture=vanilla.architecture, next=advice) == vanilla


# --- verdicts -----------------------------------------------------------------------------------------------------


def grown(value: float) -> Architecture:
    """Scaled Embed with the embedding scaled so that the growth is about `value`."""
    base = replace(preset("wide"), n_layers=3).with_embedding("scaled-embed")
    low, high = 1e-3, base.embedding_multiplier
    for _ in range(24):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if gradient_growth(at(base, middle), 8).value > value else (low, middle)
    return at(base, high)


def at(base: Architecture, multiplier: float) -> Architecture:
    return replace(base, embedding_multiplier=multiplier)


def test_verdict_turns_at_its_limits() -> None:
    """A thousandth on either side of the growth's limit; the conditions turn before it or with it."""
    below, above = check(grown(1.998), 8), check(grown(2.002), 8)
    assert below.growth.value < 2 < above.growth.value
    assert above.outcome == "at risk"
    expected = "stable" if all(condition.holds for condition in below.conditions) else "at risk"
    assert below.outcome == expected


def test_outside_the_domain_is_unknown() -> None:
    """Width 16 is too narrow to predict; only where a condition fails is the answer not `unknown`."""
    narrow = replace(preset("tiny"), d_model=16, n_heads=1, n_kv_heads=1, d_head=16, d_ffn=64)
    good = check(narrow.with_embedding("scaled-embed"), 16)
    assert not good.growth.in_domain
    assert good.outcome == "unknown"
    assert any("d_model=16" in reason for reason in good.why)
    xavier = check(narrow.with_embedding("scaled-embed").with_init("xavier"), 16)
    assert xavier.outcome == "at risk"


def test_conditions_name_what_fails() -> None:
    by_name = {name: check(method(preset("wide"), name), 64) for name in METHODS}
    failing = {name: [c.name for c in verdict.conditions if not c.holds] for name, verdict in by_name.items()}
    assert failing == {
        "Vanilla": ["large shortcut"],
        "Embed Detach": ["large shortcut"],
        "Scaled Embed": [],
        "Embed LN": [],
        "Xavier + Scaled Embed": ["small sub-layers", "large shortcut"],
    }


# --- norms that normalise nothing -----------------------------------------------------------------------------------


def test_a_network_whose_norms_normalise_nothing_is_not_stable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stream far below sqrt(eps); with a smaller eps, the control, the same weights are judged by their growth."""
    status, dead = checked(capsys, llama(tmp_path / "a", 1e-6), "--seq-len", "32")
    assert (status, dead["verdict"]) == (STATUS["unknown"], "unknown")
    assert all(condition["holds"] for condition in dead["conditions"])
    assert any("norms hardly normalise" in line and "share 1e-06" in line for line in dead["why"])
    assert dead["next"][0].startswith("--embedding scaled-embed --init paper: stable, with growth ")
    _, cured = checked(capsys, str(tmp_path / "a"), "--seq-len", "32", *dead["next"][0].split(":")[0].split())
    assert cured["verdict"] == "stable"
    for path, std, eps in ((tmp_path / "b", 1e-6, 1e-20), (tmp_path / "c", 0.02, 1e-6)):
        _, alive = checked(capsys, llama(path, std, rms_norm_eps=eps), "--seq-len", "32")
        assert not any("norms hardly normalise" in line for line in alive["why"])


def test_the_share_turns_the_verdict_at_half() -> None:
    """Sub-layers of zeros, so that the stream is the embedding all the way: at its std eps is half of the divisor."""
    base = preset("tiny").with_init("zero-output")
    square = base.stds.embedding**2
    for eps, outcome in ((0.999 * square, "stable"), (1.001 * square, "unknown")):
        found = check(replace(base, eps=eps), 8)
        assert found.outcome == outcome
        assert normalised_share(found.architecture, found.growth) == pytest.approx(square / (square + eps))


@pytest.mark.parametrize("block", ["pre-ln", "post-ln", "peri-ln", "branch-ln"])
def test_the_share_is_of_every_norm(block: Any) -> None:
    """Each layout has norms whose input is small at one place alone."""
    sound = replace(preset("tiny").with_embedding("scaled-embed"), block=block)

    def share(a: Architecture) -> float:
        return normalised_share(a, gradient_growth(a, 8))

    assert share(sound) > 0.9
    assert share(replace(sound, eps=1e3)) < NORMALISED_LIMIT
    # An output norm has branches of zeros below it, whatever the stream.
    assert (share(sound.with_init("zero-output")) == 0) == (block in ("peri-ln", "branch-ln"))
    # An embedding norm that leaves std 0.3, large enough for the norms behind it.
    weak = replace(sound, embedding_multiplier=math.sqrt(0.1 * sound.eps) / sound.stds.embedding, embedding_norm=True)
    assert share(weak) == pytest.approx(1 / 11)
    assert share(replace(weak, embedding_multiplier=1.0)) > NORMALISED_LIMIT


# --- options and imports ------------------------------------------------------------------------------------------


def test_limits_are_said_to_be_a_convention(capsys: pytest.CaptureFixture[str]) -> None:
    _, answer = checked(capsys, "tiny", "--seq-len", "8")
    assert [line for line in answer["assumed"] if line.startswith("the limits (2 on the growth, ")]
    assert answer["thresholds"]["source"].startswith("convention")
    assert main(["check", "tiny", "--seq-len", "8"]) == 1
    assert "\nassumed: the limits (2 on the growth, " in capsys.readouterr().out


def test_parameters_are_written_short(capsys: pytest.CaptureFixture[str]) -> None:
    for size, words in (("350m", "405M"), ("13b", "13.1B"), ("tiny", "657k")):
        n = preset(size).n_parameters
        assert float(words[:-1]) == pytest.approx(n / {"k": 1e3, "M": 1e6, "B": 1e9}[words[-1]], rel=5e-3)
        main(["check", size, "--seq-len", "4", "--layers", str(preset(size).n_layers)])
        assert f", {words} parameters," in capsys.readouterr().out


def test_options_change_the_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    for embedding in EMBEDDINGS:
        for init in INITS:
            _, answer = checked(
                capsys, "tiny", "--embedding", embedding, "--init", init, "--layers", "3", "--seq-len", "7"
            )
            expected = replace(preset("tiny").with_embedding(embedding).with_init(init), n_layers=3)
            assert architecture_from(answer["architecture"]) == expected
            assert answer["seq_len"] == 7


@pytest.mark.parametrize("size", PRESETS)
def test_every_preset_answers(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = checked(capsys, size, "--seq-len", "16")
    assert status in (0, 1)
    assert answer["architecture"]["name"] == size


def test_check_loads_nothing_heavy() -> None:
    """In a fresh process, since this one has loaded everything; the control is that numpy is seen."""
    code = (
        "import sys; from theory.__main__ import main; main(['check', 'tiny', '--json']); "
        "heavy = {'torch', 'sympy', 'scipy', 'matplotlib', 'transformers'} & set(sys.modules); "
        "assert 'numpy' in sys.modules; sys.exit(' '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("std", [0.5, 2.0, 20.0, 1e3])
def test_a_prediction_without_a_finite_number_is_unknown(
    std: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Far from any domain, where the recursion overflows or a square comes out negative."""
    path = llama(tmp_path / "config.json", std, num_hidden_layers=6, intermediate_size=1024)
    status, answer = checked(capsys, path, "--seq-len", "512")
    assert status == STATUS["at risk"]  # the first layers' own numbers exceed the limits
    assert all(condition["value"] > condition["limit"] for condition in answer["conditions"])
    assert not answer["gradient_growth"]["in_domain"]
    known = answer["gradient_growth"]["value"] is not None
    assert known == (std < 20)
    assert main(["check", path, "--seq-len", "512"]) == status
    text = capsys.readouterr().out
    assert "nan" not in text
    assert ("gradient growth: unknown: " in text) != known


def test_conditions_without_a_number_are_unknown() -> None:
    """One that is none hides the largest, unless another exceeds the limit already."""
    assert math.isnan(largest(np.array([1.0, math.nan]), 2.0))
    assert largest(np.array([3.0, math.nan]), 2.0) == 3.0
    assert largest(np.array([1.0, 0.5]), 2.0) == 1.0
    growth = gradient_growth(preset("tiny"), 8)
    conditions = tuple(
        Condition(name=name, holds=False, value=math.nan, limit=2.0) for name in ("small sub-layers", "large shortcut")
    )
    assert outcome_of(growth, conditions, 1.0) == "unknown"
    words = _reasons(preset("tiny"), growth, (conditions[0], conditions[1]))
    assert "unknown: whether the condition holds: small sub-layers" in words
    assert not any("nan" in line for line in words)


def test_where_there_is_no_rigorous_bound_the_reason_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"rms_norm_eps": 0.0}))
    main(["check", str(path)])
    assert "none that is rigorous: eps = 0: the residual stream may vanish" in capsys.readouterr().out


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e-90])
def test_weights_whose_squares_underflow_are_answered(size: float) -> None:
    """No file may have them, but an `Architecture` may."""
    verdict = check(replace(preset("tiny"), n_layers=2, init=flat(size)), 16)
    assert verdict.outcome == "unknown"
    assert any(why.startswith("norms hardly normalise: ") for why in verdict.why)
    assert verdict.next[0].startswith("--embedding embed-ln --init paper: stable")
