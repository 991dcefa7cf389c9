"""`python -m empirics measure`: what a network is and how its gradient grows, beside what theory says of it."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm

from empirics.agreement import ACCURACY, DRAWS, Scatter, by_chance, enough, outcome, pooled
from empirics.anatomy import anatomy
from empirics.block_functions import has_experts
from empirics.block_norms import LAYER, STACK, block_norms
from empirics.command_line import add_text_options, check_device, require_memory
from empirics.comparison import disagreements, initial_stds, predict, scatter_of_one, within_documents
from empirics.decoder_growth import DecoderGrowth, measure_decoder
from empirics.footprint import footprint
from empirics.jacobian_probes import FUNCTIONS
from empirics.measure_tokens import batches_of
from empirics.measured import Measured
from empirics.networks import Network, network
from empirics.real_classes import n_parameters
from empirics.spectral import NormEstimate
from theory.__main__ import EXIT_UNKNOWN, add_architecture_options, emit, whole
from theory.architecture import PRESETS
from theory.growth import Growth
from theory.hf_config import UnknownArchitecture
from theory.records import plain
from theory.words import counted

LARGEST_SEEDS = 100_000
# The probes that have the same norms, as `probes --list` names them.
COLUMNS = {function: probe for probe, function in FUNCTIONS.items() if probe != "experts_jacobian"} | {
    "attention_half": "half_layer_jacobian attention", "feedforward_half": "half_layer_jacobian feedforward",
}  # fmt: skip
PATIENCE = 5.0  # seconds without a bar
SEQ_LEN = 128  # default where the context is longer: activations of the whole batch are kept


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add `measure` to the commands of a parser."""
    measure = commands.add_parser(
        "measure",
        help="what a network is and how its gradient grows, beside the prediction",
        description="Measure a decoder in float32 without dropout: which architecture it is, by perturbing its forward "
        "pass, and its gradient growth, beside the prediction. CONFIG is a preset; a config.json, built as the class "
        "of transformers with the weights that its own initialiser draws; or a folder with weights: a checkpoint of "
        "transformers (config.json, model.safetensors), or what `train` left (with --keep-checkpoint, or a checkpoint "
        "of an unfinished run). No code of a folder runs. Verdict: agrees (within the stated accuracy of "
        f"{100 * ACCURACY:g} % and what chance explains, itself no more than that), differs, undecided (as near, but "
        "chance could move the measured mean by more than the stated accuracy; more --seeds), or unknown. What chance "
        "explains is told from draws of one network's signs and from the seeds, pooled. Exit "
        "status: 0 measured, whatever came out; 2 bad input; 3 there is no prediction for it (it is measured all the "
        "same, if it can be).",
    )
    add_architecture_options(
        measure, most_tokens=SEQ_LEN, help=f"{', '.join(PRESETS)}, a config.json, or a folder with weights"
    )
    measure.add_argument(
        "--width", type=whole, metavar="D", help="d_model (default the configuration's), with heads as wide as before"
    )
    measure.add_argument(
        "--implementation", choices=("own", "transformers"),
        help="for a config.json: our Transformer or the real class (default the class, where transformers has it)",
    )  # fmt: skip
    measure.add_argument("--batch", type=whole, default=4, metavar="B", help="sequences (default 4)")
    measure.add_argument(
        "--seeds", type=whole, default=3, metavar="K",
        help="seeds 0..K-1 of weights and tokens (default 3); more where the verdict is undecided",
    )  # fmt: skip
    measure.add_argument(
        "--norms",
        action="store_true",
        help="Jacobian norms on one sequence: of every layer, its halves, branches and sub-layers, and of all layers",
    )
    add_text_options(measure)
    measure.add_argument("--json", action="store_true", help="print JSON")
    measure.add_argument("--out", metavar="FILE", help="write to a file instead of standard output")
    measure.set_defaults(run=run)
    return measure


def run(arguments: argparse.Namespace) -> int:
    """The command."""
    if arguments.seeds > LARGEST_SEEDS:
        raise ValueError(f"--seeds {arguments.seeds} is out of range; use at most {LARGEST_SEEDS}")
    device = check_device(arguments.device)
    unknown = None
    try:
        subject = network(
            arguments.config,
            implementation=arguments.implementation,
            n_layers=arguments.layers,
            width=arguments.width,
            embedding=arguments.embedding,
            init=arguments.init,
        )
        unknown = subject.unknown
        answer = _measured(subject, arguments, device)
    except (UnknownArchitecture, ValueError) as reason:
        if isinstance(reason, ValueError) and unknown is None:
            raise
        why = [reason_ for reason_ in (unknown, str(reason)) if reason_]
        nothing = {"verdict": "unknown", "why": why}
        emit(json.dumps(nothing) if arguments.json else f"unknown: {'; '.join(why)}", arguments.out)
        return EXIT_UNKNOWN
    emit(json.dumps(answer, indent=2, allow_nan=False) if arguments.json else text(answer), arguments.out)
    return 0 if unknown is None else EXIT_UNKNOWN


def _measured(subject: Network, arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    seq_len = arguments.seq_len or min(subject.context, SEQ_LEN)
    a = subject.architecture
    if subject.positions is not None and seq_len > subject.positions:
        raise ValueError(f"--seq-len {seq_len} exceeds the {subject.positions} positions; use fewer tokens")
    _require_memory(subject, arguments.batch, seq_len)
    tokens = batches_of(
        subject, batch_size=arguments.batch, seq_len=seq_len, data=arguments.data, cache=arguments.cache, device=device
    )
    with ExitStack() as bars:
        bar: list[Any] = []

        def on_layer(total: int) -> None:
            if not bar:  # not before the first network is made: what is wrong with it is one line
                what = f"{subject.name}, {counted(arguments.seeds, 'seed')}, both ways"
                bar.append(bars.enter_context(tqdm(total=total, desc=what, unit="layer", delay=PATIENCE)))
                fewer = "" if subject.trained else "fewer --layers or "
                bar[0].set_postfix_str(f"shorter with {fewer}a smaller --seq-len", refresh=False)
            bar[0].update(1)

        grown = measure_decoder(
            subject.make, seeds=tuple(range(arguments.seeds)), batches=tokens.of, device=device, on_layer=on_layer
        )
    predicted = None if a is None else within_documents(predict(a, grown.tokens), grown.model, grown.tokens)
    return _answer(subject, arguments, grown, predicted, tokens.description, _norms(arguments, grown))


def _norms(arguments: argparse.Namespace, grown: DecoderGrowth) -> dict[str, Any]:
    """Of every layer and of all, by name, and why others have none."""
    if not arguments.norms:
        return {"norms": None, "stack_norm": None, "norms_left_out": None, "experts": None}
    found, _ = anatomy(grown.model)
    with tqdm(total=len(found.blocks), desc="norms", unit="layer", disable=None) as bar:
        norms = block_norms(grown.model, found, grown.tokens, on_layer=lambda _: bar.update(1))
    left_out: dict[str, Any] = {}
    for name in LAYER:
        whys = {n: row[name] for n, row in enumerate(norms.layers) if isinstance(row[name], str)}
        if len(whys) == len(norms.layers) and len(set(whys.values())) == 1:
            left_out[name] = whys[0]
        else:
            left_out |= {f"layer {n} {name}": why for n, why in whys.items()}
    return {
        "norms": [{name: _estimate(e) for name, e in row.items() if not isinstance(e, str)} for row in norms.layers],
        "stack_norm": None if isinstance(norms.stack, str) else _estimate(norms.stack),
        "norms_left_out": left_out | ({"stack": norms.stack} if isinstance(norms.stack, str) else {}),
        "experts": any(has_experts(wired.feedforward) for wired in found.wirings),
    }


def _estimate(found: NormEstimate) -> dict[str, Any]:
    return {name: getattr(found, name) for name in ("value", "likely_upper", "residual", "kind")}


def _require_memory(subject: Network, batch: int, seq_len: int) -> None:
    """In float32: two sets of weights (the present and the next seed's), and what the pass keeps."""
    a = subject.architecture
    if a is not None:
        # The attention of transformers is written out: logits and probabilities.
        attention = "plain" if subject.implementation == "transformers" else "auto"
        found = footprint(a, batch_size=batch, seq_len=seq_len, attention=attention, all_logits=True)
        parameters, kept = a.n_parameters, max(found.kept, found.activations)
    else:
        parameters, kept = n_parameters(subject.settings), 12 * batch * seq_len * subject.settings.vocab_size
    needed = (4 if subject.trained else 8) * parameters + kept
    smaller = "or a machine with more memory" if subject.trained else "fewer --layers or a smaller --width"
    require_memory(f"{subject.name} with {counted(batch * seq_len, 'token')} at once", needed, smaller=smaller)


# --- the answer -----------------------------------------------------------------------------------------------------


def _answer(
    subject: Network,
    arguments: argparse.Namespace,
    grown: DecoderGrowth,
    predicted: Growth | None,
    tokens: str,
    norms: dict[str, Any],
) -> dict[str, Any]:
    """Everything that was measured and predicted, ready for JSON; the same keys whatever was given."""
    a, growth = subject.architecture, grown.growth.values[0]
    drawn = initial_stds(grown.architecture, a) if a is not None else {}
    differences = () if a is None else disagreements(grown.architecture, a)
    if subject.trained and a is not None:
        said = disagreements(grown.architecture, a, weights=False)
        moved = len(differences) - len(said)
        kinds = f"{moved} of {len(drawn) + 1} kinds of weights"  # biases are one
        trained = f"{kinds} are not as initialised, and the prediction is of the initialisation"
        differences = (*said, *([trained] if moved else []))
    outside = (subject.unknown or "no prediction",) if predicted is None else predicted.reasons
    reasons = (*outside, *differences)
    verdict, limit, why = "unknown", math.nan, ()
    scatter, of = None, ""
    if predicted is not None and not reasons:
        scatter, of = _scatter(subject, grown)
        verdict, limit, why = outcome(predicted.value, growth, scatter)
        if verdict == "undecided" and scatter is not None:
            why = (*why, _more_seeds(subject, scatter))
    expected = None
    if a is not None and predicted is not None:
        names = dict(zip(place_names(a), zip(predicted.gradient, predicted.residual_std)))
        at = [names.get(place, (math.nan, math.nan)) for place in grown.places]
        expected = {
            "kind": "sharp",
            "of": "the initialisation",
            "gradient_growth": predicted.value,
            "in_domain": predicted.in_domain,
            "reasons": predicted.reasons,
            "gradient_profile": [gradient for gradient, _ in at],
            "residual_std": [std for _, std in at],
        }
    seeds_of = "tokens" if subject.trained else "weights and tokens"
    answer = {
        "verdict": verdict,
        "limit": limit,
        "why": (*reasons, *why),
        "name": subject.name,
        "implementation": subject.implementation,
        "class": type(grown.model).__name__,
        "trained": subject.trained,
        "reduced": subject.reduced,
        "assumed": subject.assumed,
        "architecture": a,
        "seq_len": grown.tokens.shape[1],
        "batch": grown.tokens.shape[0],
        "tokens": tokens,
        "seeds_of": seeds_of,
        "measured_architecture": grown.architecture,
        "stds": {
            role: {"kind": "measured", "values": values, "drawn_with": drawn.get(role)}
            for role, values in grown.architecture.stds.items()
        },
        "places": grown.places,
        "gradient_growth": {
            "kind": "measured",
            "value": growth,
            "log_sd": grown.log_sd,
            "seeds": grown.growth.seeds,
        },
        "scatter": None if scatter is None else {
            "log_sd": scatter.log_sd, "of": of, "degrees_of_freedom": scatter.draws - 1, "averaged": scatter.averaged,
            "by_chance": by_chance(scatter),
        },
        "gradient_profile": {
            "kind": "measured", "values": grown.gradient.values, "log_sd": grown.gradient.log_sd,
        },
        "residual_std": {
            "kind": "measured", "values": grown.residual_std.values, "log_sd": grown.residual_std.log_sd,
        },
        "predicted": expected,
    }  # fmt: skip
    return plain(answer | norms)


def _scatter(subject: Network, grown: DecoderGrowth) -> tuple[Scatter | None, str]:
    """The scatter of the measured growth, and what it is of: draws of the first network's signs, and the seeds.

    Of one network whose seeds are of its tokens alone it is of the draws; so it is of one seed.
    """
    seeds = len(grown.growth.seeds)
    with tqdm(total=DRAWS, desc="scatter", unit="draw", disable=None) as bar:
        drawn = scatter_of_one(grown.model, grown.tokens, grown.targets, on_draw=lambda _: bar.update(1))
    over_seeds = None if subject.trained else grown.log_sd
    if drawn is None:
        return (None, "") if over_seeds is None else (Scatter(over_seeds, seeds, seeds), counted(seeds, "seed"))
    of = f"{counted(drawn.draws, 'redraw')} of one network's signs"
    if over_seeds is None:
        return drawn._replace(averaged=1), of
    return pooled(drawn, over_seeds, seeds), f"{of} and {counted(seeds, 'seed')}, pooled"


def _more_seeds(subject: Network, scatter: Scatter) -> str:
    """What would decide; of one network's weights no --seeds do, which are then of its tokens."""
    n = enough(scatter.log_sd)
    if subject.trained:
        return (
            "one network does not decide, whatever its tokens; measure its configuration at initialisation, with about "
            f"--seeds {n}"
        )
    return f"about --seeds {n} would decide" if n <= LARGEST_SEEDS else "a larger --width would decide"


def place_names(architecture: Any) -> list[str]:
    """The places of `Growth`, by the names of `StabilityRecord`."""
    halves = [""] if architecture.parallel else [" attention", ""]
    return ["embedding", *(f"layer {n}{half}" for n in range(architecture.n_layers) for half in halves)]


def text(answer: dict[str, Any]) -> str:
    """The answer as a page to read."""
    growth, predicted = answer["gradient_growth"], answer["predicted"]
    seeds = f"{counted(len(growth['seeds']), 'seed')} of {answer['seeds_of']}"
    spread = f" ({seeds})" if growth["log_sd"] is None else f" (log sd {growth['log_sd']:.3f} over {seeds})"
    whose = {"own": "our Transformer", "transformers": f"{answer['class']} of transformers"}[answer["implementation"]]
    tokens = counted(answer["seq_len"], "token")
    lines = [f"{answer['name']} ({whose}), {tokens}: gradient growth {growth['value']:.4g}{spread}"]
    lines.append(f"tokens: {answer['tokens']}")
    if predicted is None:
        lines.append("predicted: none")
    elif predicted["gradient_growth"] is None:
        lines.append("predicted: not a number (sharp, outside its domain)")
    else:
        domain = "" if predicted["in_domain"] else ", outside its domain"
        start = ", at initialisation" if answer["trained"] else ""
        error = predicted["gradient_growth"] / growth["value"] - 1
        compared = "" if answer["trained"] and answer["verdict"] == "unknown" else f": {error:+.2%}"
        lines.append(f"predicted {predicted['gradient_growth']:.4g} (sharp{domain}{start}){compared}")
    allowed = ""
    if answer["verdict"] != "unknown":
        side = "by more than" if answer["verdict"] == "differs" else "within"
        allowed = f" ({side} {math.expm1(answer['limit']):.1%}: {ACCURACY:.0%} stated, and what scatter explains)"
    if (scatter := answer["scatter"]) is not None:
        lines.append(
            f"scatter: log sd {scatter['log_sd']:.3f} ({scatter['of']}); chance moves the measured growth by up to "
            f"{math.expm1(scatter['by_chance']):.1%}"
        )
    lines.append(f"verdict: {answer['verdict']}{allowed}")
    lines += [f"why: {reason}" for reason in answer["why"]]
    lines.append(f"measured to be: {Measured(**answer['measured_architecture'])}")
    lines += [f"reduced: {change}" for change in answer["reduced"]]
    lines += ["", f"{'':<20}{'residual std':>24}{'gradient over the last':>26}"]
    lines.append(f"{'place':<20}{'measured':>12}{'predicted':>12}{'measured':>14}{'predicted':>12}")
    blank = [None] * len(answer["places"])
    rows = zip(
        answer["places"],
        answer["residual_std"]["values"],
        predicted["residual_std"] if predicted else blank,
        answer["gradient_profile"]["values"],
        predicted["gradient_profile"] if predicted else blank,
    )
    lines += [
        f"{name:<20}{std:>12.4g}{_number(said):>12}{gradient:>14.4g}{_number(foretold):>12}"
        for name, std, said, gradient, foretold in rows
    ]
    lines += ["", f"{'':<34}{'std measured':>26}{'std drawn with':>26}"]
    lines.append(f"{'matrix':<34}{'first layer':>14}{'last layer':>12}{'first layer':>14}{'last layer':>12}")
    for role, stds in answer["stds"].items():
        lines.append(f"{role:<34}{_ends(stds['values'])}{_ends(stds['drawn_with'])}".rstrip())
    if answer["norms"] is not None:
        columns = COLUMNS | ({"feedforward": "experts_jacobian"} if answer["experts"] else {})
        lines += ["", "Jacobian norms, lower estimates:", *_norm_table(answer["norms"], columns)]
        lines += [f"all layers, stack_jacobian: {answer['stack_norm']['value']:.4g}"] if answer["stack_norm"] else []
        for name, why in answer["norms_left_out"].items():
            layer, _, function = name.rpartition(" ")
            layer = layer or ("all layers" if function == STACK else "every layer")
            lines.append(f"{layer}, {columns[function]}: left out; {why}")
    return "\n".join(lines)


def _norm_table(layers: Sequence[dict[str, Any]], columns: dict[str, str]) -> list[str]:
    """A row a layer; columns are headed by the probes' names, a word a line."""
    there = [name for name in LAYER if any(name in row for row in layers)]
    words = [[*re.split(r"(?<=_)| ", columns[name])] for name in there]
    height = max(map(len, words), default=0)
    heads = [[""] * (height - len(each)) + each for each in words]
    return [
        *("".join([f"{'':<10}", *(f"{head[line]:>13}" for head in heads)]).rstrip() for line in range(height)),
        *(
            "".join([f"{f'layer {n}':<10}", *(f"{_number(row.get(name, {}).get('value')):>13}" for name in there)])
            for n, row in enumerate(layers)
        ),
    ]


def _ends(values: Sequence[float] | None) -> str:
    """The first and the last layer's cells; one of a matrix that there is once."""
    ends = [values[0], *values[1:][-1:]] if values else [None]
    return "".join(f"{_number(value):>{width}}" for value, width in zip(ends, (14, 12))).ljust(26)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
