"""The paper's thirteen claims, each with a criterion in code and a verdict of its own.

A criterion is fixed before the run it judges. Marks in the sources: [C] confirmed from the paper, [S] from a
published summary of it, [R] recalled; claims of the last two kinds are judged all the same, and say so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from figures.corruptions import (
    SWAPPED,
    Corruption,
    detached_too_late,
    edited,
    far_from_normal,
    longer_norm,
    no_events,
    relabelled,
    scaled_prediction,
)
from figures.criteria import (
    LARGE_EXCESS,
    MEAN_ERRORS,
    NORMAL_DISTANCE,
    SMALL_EXCESS,
    Finding,
    accuracy,
    detach,
    final_losses,
    gradient_norms,
    half_layers_below,
    llama_style,
    norm_jacobian,
    normality,
    paper_sizes,
    post_ln,
    rate_gap,
    short_sequences,
    spikes,
    untested,
    xavier,
)
from figures.selection import Records

REPRODUCED, NOT_REPRODUCED, NOT_TESTED = "reproduced", "not reproduced", "not tested at this scale"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim, its criterion in words and in code, and a corruption of the records that flips the verdict."""

    id: str
    claim: str
    kind: str
    criterion: str
    source: str
    judge: Callable[[Records], Finding]
    control: Corruption

    def verdict(self, records: Records) -> dict[str, Any]:
        """The claim's row in `claims.json`."""
        finding = self.judge(records)
        word = NOT_TESTED if finding.holds is None else REPRODUCED if finding.holds else NOT_REPRODUCED
        return {
            "id": self.id,
            "claim": self.claim,
            "kind": self.kind,
            "verdict": word,
            "criterion": self.criterion,
            "observed": finding.observed,
            "predicted": finding.predicted,
            "error": finding.error,
            "seeds": list(finding.seeds),
            "source": self.source,
        }


CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="claim-01",
        claim="The feed-forward bound, eq. (15), holds",
        kind="estimate",
        criterion="every measured |dy/dx'| at initialisation is at most 1 + eq. (15)'s excess, from the configuration",
        source="takase2025spike, eq. (15) [C]",
        judge=half_layers_below("ffn_branch", "feedforward_half"),
        control=scaled_prediction("ffn_branch", 0.1),
    ),
    Claim(
        id="claim-02",
        claim="The attention bound, eq. (20), holds",
        kind="estimate",
        criterion="every measured |dx'/dx| of the whole sequence at initialisation is at most 1 + eq. (20)'s excess, "
        "with |J^Z| measured",
        source="takase2025spike, eq. (20) [C]",
        judge=half_layers_below("attention_branch", "attention_half"),
        control=scaled_prediction("attention_branch", 0.1),
    ),
    Claim(
        id="claim-03",
        claim="The LayerNorm Jacobian is (1/sigma)(I - zz'/d)",
        kind="estimate",
        criterion="spectral norm equal to 1/sigma within 1e-9, and the relative Frobenius gap below 1.5/sqrt(d)",
        source="takase2025spike, before eq. (15) [C]",
        judge=norm_jacobian,
        control=edited(longer_norm),
    ),
    Claim(
        id="claim-04",
        claim="x, x' and the weights are normal with mean 0 at initialisation (assumption 1)",
        kind="observation",
        criterion=f"Kolmogorov distance to normality at most {NORMAL_DISTANCE} and |mean| at most {MEAN_ERRORS:g} "
        "standard errors std/sqrt(d) for all of them at step 0; the end of training is reported beside",
        source="takase2025spike, assumption 1 [C]",
        judge=normality,
        control=edited(far_from_normal),
    ),
    Claim(
        id="claim-05",
        claim="At initialisation the bound is large in the first layer for Vanilla and Embed Detach, small elsewhere",
        kind="estimate",
        criterion=f"at 350M eq. (15)'s excess is above {LARGE_EXCESS:g} in the first layer of Vanilla and Embed Detach "
        f"and below {SMALL_EXCESS:g} in every layer of Scaled Embed and Embed LN",
        source="takase2025spike, figure of the bounds [S]",
        judge=paper_sizes,
        control=SWAPPED,
    ),
    Claim(
        id="claim-06",
        claim="Gradient norms in training are large for Vanilla and Embed Detach, small for the other two",
        kind="observation",
        criterion="at the highest rate, every Vanilla and Embed Detach run's median gradient norm exceeds every run's "
        "of Scaled Embed and Embed LN",
        source="takase2025spike, training curves [C]",
        judge=gradient_norms,
        control=SWAPPED,
    ),
    Claim(
        id="claim-07",
        claim="Vanilla's loss spikes, that of Scaled Embed and Embed LN does not",
        kind="observation",
        criterion="loss spikes (7 robust standard deviations) paired on the same batches, at the highest rate and in "
        "the long runs: at least one in every Vanilla seed, none for the others",
        source="takase2025spike, training curves [C]",
        judge=spikes,
        control=edited(no_events),
    ),
    Claim(
        id="claim-08",
        claim="A larger learning rate widens the gap; Scaled Embed trains at rates where Vanilla does not",
        kind="observation",
        criterion="the gap of mean final losses grows from each rate to the next, and Scaled Embed's best rate is at "
        "least Vanilla's",
        source="takase2025spike, learning-rate comparison [S]",
        judge=rate_gap,
        control=SWAPPED,
    ),
    Claim(
        id="claim-09",
        claim="Shorter sequences at the same tokens a batch are more stable",
        kind="observation",
        criterion="Vanilla has fewer gradient-norm events (twice the median) with half the sequence length, same seeds",
        source="takase2025spike, sequence lengths [R]",
        judge=short_sequences,
        control=edited(no_events),
    ),
    Claim(
        id="claim-10",
        claim="Scaled Embed with Xavier (sub-layers not small) is unstable too",
        kind="observation",
        criterion="at the highest rate every Xavier run's final loss is above every Scaled Embed run's",
        source="takase2025spike, Xavier comparison [R]",
        judge=xavier,
        control=relabelled({"Xavier + Scaled Embed": "Scaled Embed", "Scaled Embed": "Xavier + Scaled Embed"}),
    ),
    Claim(
        id="claim-11",
        claim="RMSNorm with SwiGLU (LLaMA style) behaves the same",
        kind="observation",
        criterion="final loss and median gradient norm of every Vanilla run above every Scaled Embed run's",
        source="takase2025spike, appendix [R]",
        judge=llama_style,
        control=SWAPPED,
    ),
    Claim(
        id="claim-12",
        claim="The same holds at 13B",
        kind="observation",
        criterion="trainings at 13B; needs GPUs",
        source="takase2025spike, 13B results [S]",
        judge=untested,
        control=SWAPPED,
    ),
    Claim(
        id="claim-13",
        claim="The analysis explains Post-LN too",
        kind="observation",
        criterion="trainings of Post-LN networks; not among the runs of this script",
        source="takase2025spike, discussion [S]",
        judge=post_ln,
        control=SWAPPED,
    ),
    Claim(
        id="question-01",
        claim="Embed Detach is Vanilla in activation gradients; only its embedding gradient is smaller, by its factor",
        kind="observation",
        criterion="at step 0, same seed and batch: gradients at every place equal and the embedding's 0.1 times, "
        "within 1e-5",
        source="spikecheck, from the definition of the method",
        judge=detach,
        control=edited(detached_too_late),
    ),
    Claim(
        id="question-02",
        claim="Gradient growth at initialisation follows from the configuration alone",
        kind="sharp",
        criterion="predicted growth within 5 % (Vanilla) and 1 % (Scaled Embed, Embed LN) of the measured, d >= 256",
        source="spikecheck, kernel recursion",
        judge=accuracy,
        control=scaled_prediction("gradient_growth", 1.1),
    ),
    Claim(
        id="question-03",
        claim="At a high learning rate Vanilla and Embed Detach end outside the seed bands of the other two",
        kind="observation",
        criterion="at the highest rate every Vanilla and Embed Detach run's final held-out loss is above every "
        "Scaled Embed and Embed LN run's",
        source="spikecheck, the paper's comparison at a rate that this scale can show",
        judge=final_losses,
        control=SWAPPED,
    ),
)


def judge_all(records: Records) -> list[dict[str, Any]]:
    """Every claim's row, in order."""
    return [claim.verdict(records) for claim in CLAIMS]
