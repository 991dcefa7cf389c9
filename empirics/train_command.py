"""`python -m empirics train`: one training from the command line, or the plan of one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from empirics.command_line import check_device, check_memory, not_negative, positive, positive_or_off
from empirics.data import ORDERS, is_shards
from empirics.data_sheets import DEVICES
from empirics.distributed import Ranks, ranks_of
from empirics.lock import is_held
from empirics.plan import STATE_BYTES, plan
from empirics.registry import find, schedule
from empirics.run import LOCK, model_path, record_path, run
from empirics.run_spec import SCHEDULES, RunSpec, decay_steps
from empirics.tensorboard import TensorBoard
from empirics.tokenizer import GPT2_VOCAB, make_tokenizer, read_tokenizer, require_room, require_vocabulary
from theory.__main__ import add_architecture_options, chosen, emit, natural, whole
from theory.architecture import Architecture
from theory.records import plain, read_record, remove_unfinished, write_bytes
from theory.words import brief, counted

EXPERIMENT = "train"
WARMUP = 20


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add `train` to the commands of a parser."""
    train = commands.add_parser(
        "train",
        help="one training run",
        description="Train once; a killed run resumes, a finished one is not trained again. Ctrl-C or SIGTERM keeps a "
        "checkpoint and ends with status 130; a second one ends at once. A folder holds one run, and one process "
        "trains it: another is refused. Exit status: 0 finished, also where the run diverged, which the last lines and "
        "the record say with the step; 2 bad input; 130 stopped. "
        "On several devices: torchrun --nproc-per-node K -m empirics train ...; it is the same run, and resumes on "
        "another number of them (docs/scale-out.md).",
    )
    add_architecture_options(train)
    train.add_argument("--seed", type=natural, default=0, help="of the weights and of the batches (default 0)")
    train.add_argument("--lr", type=positive, default=1e-3, metavar="R", help="peak learning rate (default 1e-3)")
    add_run_options(train)
    train.add_argument(
        "--keep-checkpoint", action="store_true",
        help="keep the final model in the folder: models/RUN with weights, architecture and tokenizer",
    )  # fmt: skip
    train.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="write every step's numbers there too (extra tensorboard)"
    )
    train.add_argument(
        "--out", metavar="DIR", help="folder of the run: record, losses.jsonl, checkpoints; only --plan needs none"
    )
    train.add_argument(
        "--plan", metavar="GPU",
        help=f"train nothing: print parameters, FLOPs, memory and hours on {', '.join(DEVICES)}; status 0 also "
        "where it does not fit",
    )  # fmt: skip
    train.add_argument(
        "--devices", type=whole, default=1, metavar="K",
        help="over which --plan shares the run (default 1); a training is given several by torchrun",
    )  # fmt: skip
    train.add_argument("--json", action="store_true", help="print the plan as JSON")
    train.add_argument("--plan-out", metavar="FILE", help="write the plan to a file instead of standard output")
    train.set_defaults(run=command)
    return train


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What decides a run beside its architecture, seed and learning rate."""
    parser.add_argument("--steps", type=whole, default=300, metavar="N", help="of the training (default 300)")
    parser.add_argument(
        "--batch", type=whole, default=8, metavar="B", help="sequences a step, of all devices (default 8)"
    )
    parser.add_argument(
        "--micro-batch", type=whole, metavar="N",
        help="sequences at once on a device, gradients accumulated (default its share of --batch)",
    )  # fmt: skip
    parser.add_argument(
        "--data", default="sympy", metavar="TEXT",
        help="sympy (default), hf:NAME, a file, a folder or a glob of files, or a folder that tokenise wrote",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", metavar="NAME",
        help="bpe (default; trained on the text), bytes, gpt2, or the path of a tokenizer.json or of its folder; the "
        "network's vocabulary stays, and one with more ids is refused",
    )  # fmt: skip
    parser.add_argument(
        "--order", choices=ORDERS, default="random",
        help="windows of the text at random with replacement (default), or each once an epoch",
    )  # fmt: skip
    parser.add_argument(
        "--mask-documents", action="store_true",
        help="no token attends to another document of its window (default: windows are read as one text); the "
        "held-out loss and what is measured on the kept model likewise",
    )  # fmt: skip
    _add_optimization(parser)
    _add_execution(parser)


def _add_optimization(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group(
        "optimization",
        "AdamW. Weight decay acts on the matrices inside the layers and on the head, never on gains and biases, and "
        "on token and position tables only with --decay-embeddings; a tied head is the token table.",
    )
    group.add_argument(
        "--warmup", type=natural, metavar="N",
        help=f"steps of linear warm-up (default {WARMUP}; of fewer --steps all, and all but its decay for wsd)",
    )  # fmt: skip
    group.add_argument(
        "--schedule", choices=SCHEDULES, default="cosine",
        help="after the warm-up: cosine (default) falls to a tenth, linear to 0, wsd is constant and then falls to 0; "
        "a fall begins at the peak rate, so that one of a single step lowers nothing, nor does a training of one step",
    )  # fmt: skip
    group.add_argument(
        "--decay-fraction", type=positive, metavar="F", help="share of the steps over which wsd falls (default 0.1)"
    )
    group.add_argument(
        "--clip", type=positive_or_off, default=1.0, metavar="NORM",
        help="largest gradient norm (default 1), or off; the norms before and after are recorded",
    )  # fmt: skip
    group.add_argument("--beta1", type=not_negative, default=0.9, metavar="B", help="default 0.9")
    group.add_argument("--beta2", type=not_negative, default=0.95, metavar="B", help="default 0.95")
    group.add_argument("--weight-decay", type=not_negative, default=0.0, metavar="W", help="default 0")
    group.add_argument(
        "--decay-embeddings", action="store_true", help="decay the tables too; this can undo a scaled embedding"
    )
    group.add_argument(
        "--z-loss", type=not_negative, default=0.0, metavar="Z",
        help="weight of the mean (log Z)^2 that is added to the loss (default 0; PaLM 1e-4); recorded apart",
    )  # fmt: skip


def _add_execution(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("execution")
    group.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="default float32")
    group.add_argument("--compile", action="store_true", help="torch.compile the loss")
    group.add_argument(
        "--attention", choices=("auto", "fused", "plain"), default="auto",
        help="auto (default): plain for at most 512 tokens in bfloat16 on a CPU, where it is the faster one by "
        "benchmarks/training.py, else fused; the record says which",
    )  # fmt: skip
    group.add_argument(
        "--deterministic", action="store_true",
        help="only algorithms that give the same bits every time (torch.use_deterministic_algorithms): slower on a "
        "GPU, an error where there is none; one thread on a CPU is repeatable without",
    )  # fmt: skip
    group.add_argument(
        "--probes", default="default", metavar="NAMES",
        help="default (the cheap ones), none, or names with commas, such as default,stack_jacobian; dear ones are "
        "taken of the first micro-batch, before the first step and after the last, NAME@N every N steps; `probes "
        "--list` names them all",
    )  # fmt: skip
    group.add_argument("--probe-every", type=whole, default=20, metavar="N", help="steps between probes (default 20)")
    group.add_argument(
        "--checkpoint-every", type=whole, default=100, metavar="N", help="steps between checkpoints (default 100)"
    )


def command(arguments: argparse.Namespace) -> int:
    """Run `train`.

    Raises:
        ValueError: bad input, in one line.
    """
    if arguments.plan is not None:
        return _plan(arguments)
    with ranks_of(arguments.device) as ranks:
        return _train(arguments, ranks)


def _plan(arguments: argparse.Namespace) -> int:
    architecture, longest, _ = chosen(arguments)
    spec = specification(arguments, architecture, arguments.seq_len or longest)
    _check_vocabulary(spec)
    probes = [find(name) for name in schedule(spec.probes, spec.probe_every)]
    left_out = ["--mask-documents"] * spec.mask_documents + [probe.name for probe in probes if probe.cost == "dear"]
    planned = plan(
        architecture, device=arguments.plan, devices=arguments.devices, steps=spec.steps, batch_size=spec.batch_size,
        seq_len=spec.seq_len, precision=spec.precision, micro_batch=spec.micro_batch, attention=spec.attention,
        z_loss=spec.z_loss, probed=any(probe.in_training for probe in probes), left_out=left_out,
    )  # fmt: skip
    emit(json.dumps(planned.record(), indent=2) if arguments.json else str(planned), arguments.plan_out)
    return 0


def _check_vocabulary(spec: RunSpec) -> None:
    """Refuse the vocabulary that a training would; no text is read, and GPT-2's tokenizer not fetched where it fits."""
    size = spec.architecture.vocab_size
    if is_shards(spec.data):
        require_room(read_tokenizer(Path(spec.data).expanduser()), size, f"the tokenizer of {spec.data}")
        return
    require_vocabulary(size)
    if spec.tokenizer != "bpe" and not (spec.tokenizer == "gpt2" and size >= GPT2_VOCAB):
        make_tokenizer(spec.tokenizer, (), size)


def _train(arguments: argparse.Namespace, ranks: Ranks) -> int:
    architecture, longest, _ = chosen(arguments)
    seq_len = arguments.seq_len or longest
    if arguments.devices > 1:
        raise ValueError(
            f"--devices {arguments.devices} is for a plan; add --plan GPU, or to train on as many start it with "
            f"torchrun --nproc-per-node {arguments.devices} -m empirics train"
        )
    if arguments.json or arguments.plan_out is not None:
        raise ValueError("--json and --plan-out are for a plan; add --plan GPU, or use the record that a run leaves")
    if arguments.out is None:
        raise ValueError("nowhere to write the run; use --out DIR")
    if ranks.size == 1 or arguments.device == "cpu":  # with a device each, this machine's memory is not what counts
        at_once = arguments.batch if arguments.micro_batch is None else ranks.size * arguments.micro_batch
        check_memory(
            architecture, batch_size=at_once, seq_len=seq_len, state=STATE_BYTES, precision=arguments.precision,
            attention=arguments.attention, z_loss=arguments.z_loss,
        )  # fmt: skip
    check_device(arguments.device)
    spec, out = specification(arguments, architecture, seq_len), Path(arguments.out)
    if ranks.first:
        _require_own_folder(spec, out)
    ranks.wait()
    sink = None if arguments.tensorboard is None or not ranks.first else TensorBoard(arguments.tensorboard)
    try:
        record = run(
            spec, out, progress=True, checkpoint_every=arguments.checkpoint_every,
            keep_model=arguments.keep_checkpoint, sink=sink, ranks=ranks,
        )  # fmt: skip
    finally:
        if sink is not None:
            sink.close()
    if ranks.first:
        _report(arguments, spec, out, record)
    ranks.wait()
    return 0


def _report(arguments: argparse.Namespace, spec: RunSpec, out: Path, record: dict[str, Any]) -> None:
    losses = "".join(
        json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(record["series"]["loss"])
    )
    write_bytes(out / "losses.jsonl", losses.encode())
    remove_unfinished(out / "losses.jsonl")
    final, steps = record["final"], counted(spec.steps, "step")
    if final["diverged_at"] is not None:
        print(f"diverged: the loss or its gradient was not finite at step {final['diverged_at']}")
    elif final["heldout_loss"] is None:
        print(f"diverged: the held-out loss is not finite after {steps}")
    else:
        print(f"held-out loss {final['heldout_loss']:.4f} nats a token after {steps}")
    if said := unscheduled(spec):
        print(said)
    for name, whys in record["series"].get("left_out", {}).items():  # older records have none
        for why, steps in whys.items():
            print(f"{name}: left out {_times(steps)}; {why}")
    print(f"record {record_path(spec, out)}\nlosses {out / 'losses.jsonl'}")
    if arguments.keep_checkpoint:
        print(f"model {model_path(spec, out)}")


def _times(steps: Sequence[int]) -> str:
    return f"at step {steps[0]}" if len(steps) == 1 else f"{len(steps)} times from step {steps[0]} on"


def specification(arguments: argparse.Namespace, architecture: Architecture, seq_len: int, **changes: Any) -> RunSpec:
    """The run that the options of `add_run_options` describe; `changes` are fields that they do not give.

    Raises:
        ValueError: bad input, in one line.
    """
    if arguments.tokenizer and is_shards(arguments.data):
        raise ValueError(f"{arguments.data} brings its own tokenizer; leave --tokenizer out")
    warmup = _default_warmup(arguments) if arguments.warmup is None else arguments.warmup
    if warmup > arguments.steps:
        raise ValueError(
            f"warmup={warmup} never reaches the peak rate in steps={arguments.steps}; use fewer, or more steps in all"
        )
    wsd = _decay(arguments)
    fields = {"label": architecture.name, "experiment": EXPERIMENT, **changes}
    return RunSpec(
        architecture=architecture,
        steps=arguments.steps,
        batch_size=arguments.batch,
        seq_len=seq_len,
        warmup=warmup,
        schedule=arguments.schedule,
        clip=arguments.clip,
        beta_1=arguments.beta1,
        beta_2=arguments.beta2,
        weight_decay=arguments.weight_decay,
        decay_embeddings=arguments.decay_embeddings,
        z_loss=arguments.z_loss,
        precision=arguments.precision,
        device=arguments.device,
        compile=arguments.compile,
        attention=arguments.attention,
        deterministic=arguments.deterministic,
        micro_batch=arguments.micro_batch,
        data=arguments.data,
        tokenizer=arguments.tokenizer or "bpe",
        order=arguments.order,
        mask_documents=arguments.mask_documents,
        probe_every=arguments.probe_every,
        probes=arguments.probes,
        **wsd,
        **({"seed": arguments.seed, "learning_rate": arguments.lr} | fields),
    )


def _decay(arguments: argparse.Namespace) -> dict[str, float]:
    return {} if arguments.decay_fraction is None else {"decay_fraction": arguments.decay_fraction}


def _default_warmup(arguments: argparse.Namespace) -> int:
    """At most so many steps that wsd has its decay left; the other schedules may have no step of their own."""
    steps: int = arguments.steps
    left = steps - decay_steps(steps, **_decay(arguments)) if arguments.schedule == "wsd" else steps
    return max(0, min(WARMUP, left))


def unscheduled(spec: RunSpec) -> str | None:
    """A line that says so where the schedule lowers no rate, so that a constant one gives the same run."""
    if spec.schedule == "constant" or spec.steps == 1 or spec.rate(spec.steps - 1) < spec.learning_rate:
        return None
    # The first step of a fall is at the peak rate, so that it takes two.
    left = spec.steps - 2
    instead = f"--warmup {left}{' or less' if left else ''}"
    if spec.schedule == "wsd":
        instead = f"a larger --decay-fraction{f' with {instead}' if spec.warmup > left else ''}"
    return (
        f"note: {spec.schedule} never lowers the rate in {spec.steps} steps, {spec.warmup} of them warm-up; give more "
        f"--steps, or {instead}"
    )


def _require_own_folder(spec: RunSpec, out: Path) -> None:
    """Refuse a folder whose losses.jsonl is, or will be, another run's."""
    pattern = f"{EXPERIMENT}-*"
    found = [path.stem for path in (out / "records").glob(f"{pattern}.json")]
    found += [path.name for path in (out / "checkpoints").glob(pattern)]
    # One that trains has no checkpoint at first.
    found += [path.name[1 : -len(LOCK)] for path in out.glob(f".{pattern}{LOCK}") if is_held(path)]
    others = sorted({name for name in found if name != spec.identity})
    if others:
        differing = _differing(spec, read_record(out / "records" / f"{others[0]}.json"))
        raise ValueError(f"{out} holds another run, {others[0]}{differing}; use another --out, one folder a run")


def _differing(spec: RunSpec, record: dict[str, Any] | None) -> str:
    """In what a finished run differs from this one, in words; empty where there is no record that says so."""
    theirs, ours = (record or {}).get("spec"), plain(spec)
    if not (isinstance(theirs, dict) and isinstance(theirs.get("architecture"), dict)):
        return ""
    pairs = [(ours, theirs), (ours["architecture"], theirs["architecture"])]
    found = [
        f"{name}={_told(there[name])} and not {_told(here[name])}"
        for here, there in pairs
        for name in here
        if name not in ("architecture", "label")
        and name in there
        and here[name] != there[name]  # older records lack some
    ]
    return f" ({', '.join(found)})" if found else ""


def _told(value: Any) -> str:
    return "none" if value is None else brief(value)  # a clip that is off is null in a record
