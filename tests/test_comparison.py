"""A decoder's growth held against the prediction: what agrees, and what is said to be unknown."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
from helpers.decoders import NanoGPT
from helpers.known_decoders import real, some_batch
from helpers.real_classes import REAL, TINY, build
from transformers import T5Config, T5ForConditionalGeneration

from empirics.agreement import ACCURACY
from empirics.comparison import disagreements, initial_stds
from empirics.model import build as build_own
from empirics.monitor import check, describe
from theory.architecture import Architecture, preset
from theory.hf_config import parse_config
from theory.initialisation import flat

NOT_ONE = "one network does not decide; the geometric mean of about 3, each of another seed, does"


def test_a_nanogpt_held_to_an_architecture() -> None:
    """A module without a config of its own; its biases are torch's, until they are what the architecture says."""
    torch.manual_seed(0)
    model = NanoGPT()
    said = Architecture(
        name="nano", d_model=64, n_layers=3, n_heads=4, n_kv_heads=4, d_head=16, d_ffn=256, vocab_size=50, context=128,
        activation="gelu", positions="learned", biases=True, tied=True, init=flat(0.1),
    )  # fmt: skip
    as_gpt2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 50, "initializer_range": 0.1}
    read = parse_config({"model_type": "gpt2", "activation_function": "gelu"} | as_gpt2).architecture
    # Its writers are not shrunk with depth, as nanoGPT's and GPT-2's are.
    assert replace(read, name="nano", init=said.init) == said
    assert check(model, architecture=said).reasons[0].startswith("a bias has root mean square")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    answer = check(model, architecture=said)
    assert answer.verdict == "undecided"  # so few layers, 64 wide
    assert [reason.split(" alone ")[0] for reason in answer.reasons] == ["chance", NOT_ONE]
    wrong = check(model, architecture=replace(said, parallel=True))
    assert wrong.reasons == ("parallel is measured False, the config says True",)


def test_fewer_places_than_tokens_are_named_with_the_remedy() -> None:
    model = NanoGPT()
    model.transformer["wpe"] = torch.nn.Embedding(32, 64)
    with pytest.raises(ValueError, match=r"^NanoGPT does not run on 48 token ids alone \(.*\); .* tokens=IDS[^\n]*$"):
        check(model)
    assert check(model, torch.randint(50, (4, 33), generator=torch.Generator().manual_seed(0))).measured > 1


@pytest.mark.parametrize("wrong", ["tiny", {"model_type": "gpt2"}, parse_config(REAL["gpt2"])])
def test_what_is_no_architecture_is_refused_in_one_line(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"^architecture=.+ is not an Architecture; use theory\.preset[^\n]*$"):
        check(NanoGPT(), architecture=wrong)  # type: ignore[arg-type]


SLOW_REAL = [pytest.param(kind, marks=pytest.mark.slow) for kind in REAL if kind not in ("gpt2", "olmo2")]


@pytest.mark.parametrize("kind", ["gpt2", "olmo2", *SLOW_REAL])
def test_a_fresh_class_does_not_differ(kind: str) -> None:
    """About 256 wide, where one network of some classes does not scatter by much."""
    answer = check(build(REAL[kind]))
    assert answer.verdict == ("agrees" if answer.limit <= 2 * math.log1p(ACCURACY) else "undecided")
    assert answer.verdict == {"gpt2": "agrees", "olmo2": "undecided"}.get(kind, answer.verdict)
    assert len(answer.reasons) == (2 if answer.verdict == "undecided" else 0)
    assert f"predicted {answer.predicted:.4g} (sharp)" in str(answer)
    assert str(answer).count("\n") == 2 + len(answer.record.places) + len(answer.reasons)


def test_a_network_that_is_not_as_initialised_is_unknown() -> None:
    model = copy.deepcopy(real("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.25)
    answer = check(model)
    assert answer.verdict == "unknown"
    assert "ffn_out of layer 1" in answer.reasons[0]


def test_experts_that_are_not_as_initialised_are_told() -> None:
    model = copy.deepcopy(real("mixtral"))
    mlp = model.model.layers[1].mlp
    for part, role in (
        (mlp.experts.gate_up_proj, "ffn_in_gate"), (mlp.experts.down_proj, "ffn_out"), (mlp.gate.weight, "router"),
    ):  # fmt: skip
        for factor, told in ((1.0, False), (1.5, True)):
            before = part.detach().clone()
            with torch.no_grad():
                part.mul_(factor)
            found = disagreements(describe(model), parse_config(model.config.to_dict()).architecture)
            assert [reason.split(" has std")[0] for reason in found] == [f"{role} of layer 1"] * told
            with torch.no_grad():
                part.copy_(before)


@pytest.mark.parametrize(("n_experts", "router"), [(0, None), (2, 5 / math.sqrt(2 * 2 * 64)), (64, 0.15)])
def test_a_matrix_is_held_to_its_standard_deviation(n_experts: int, router: float | None) -> None:
    """On either side of the limit: 15 %, but five standard errors where a matrix has few entries."""
    a = replace(preset("tiny"), n_layers=2, n_experts=n_experts, experts_per_token=1)
    seen = describe(build_own(replace(a, n_experts=min(n_experts, 2)), seed=0))
    exact = replace(seen, stds=dict(initial_stds(seen, a)))
    assert exact.stds.keys() == seen.stds.keys()
    assert ("router" in seen.stds) == (n_experts > 0)
    assert disagreements(exact, a) == ()
    for role, stds in exact.stds.items():
        limit = router if role == "router" and router is not None else 0.15
        for wrong, told in ((0.97 * limit, False), (1.03 * limit, True)):
            for factor in (1 + wrong, 1 / (1 + wrong)):
                changed = replace(exact, stds=exact.stds | {role: (*stds[:-1], factor * stds[-1])})
                found = disagreements(changed, a)
                assert [reason.split(" has std")[0].split(" of layer")[0] for reason in found] == [role] * told


def test_matrices_that_are_not_independent_differ() -> None:
    """As large as they should be, each of them, so that the growth alone tells; control: the network as drawn."""
    model = build_own(replace(preset("tiny"), n_layers=3), seed=0)
    drawn = check(model)
    assert (drawn.verdict, drawn.reasons) == ("agrees", ())
    with torch.no_grad():
        for layer in model.layers:
            enter, leave = layer.feedforward.enter.weight, layer.feedforward.leave.weight
            leave.copy_(enter.T * (leave.std() / enter.std()))
    answer = check(model)
    assert (answer.verdict, answer.reasons) == ("differs", ())
    assert answer.predicted == drawn.predicted
    assert abs(math.log(answer.measured / drawn.measured)) > answer.limit


def test_a_config_that_lies_is_told() -> None:
    model = copy.deepcopy(real("granite"))
    model.config.residual_multiplier = 1.0
    answer = check(model)
    assert answer.verdict == "unknown"
    assert answer.reasons == ("residual_multiplier is measured 0.22, the config says 1",)


def test_a_class_without_a_prediction_is_unknown() -> None:
    model = copy.deepcopy(real("mixtral"))
    model.config.router_jitter_noise = 0.1
    answer = check(model)
    assert (answer.verdict, answer.predicted) == ("unknown", None)
    assert answer.measured > 0


def test_check_leaves_no_gradient() -> None:
    model = copy.deepcopy(real("gpt2")).train()
    before = torch.get_rng_state()
    check(model, some_batch())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(before, torch.get_rng_state())
    assert model.training


def test_our_own_transformer_agrees() -> None:
    answer = check(build_own(replace(preset("wide"), n_layers=3), seed=0))
    assert (answer.verdict, answer.reasons) == ("agrees", ())


def test_what_is_no_decoder_with_a_head_is_refused_in_a_line() -> None:
    headless = build(TINY["gpt2"]).transformer
    with pytest.raises(ValueError, match="GPT2Model gives no logits of every token; use the class with a language-mod"):
        check(headless)
    answer = check(headless, loss=lambda model, tokens, _: model(tokens).last_hidden_state.square().mean())
    assert answer.measured > 0  # control: with a loss of its own it is measured
    sizes = {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8, "vocab_size": 64}
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        check(T5ForConditionalGeneration(T5Config(**sizes)))
