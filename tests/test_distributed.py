"""Several ranks are one process: the same numbers, checkpoints for any number of ranks, and no rank that hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers.kills import spread
from helpers.ranks import ROOT, Launcher
from helpers.training import cut, files, flip
from safetensors.torch import load_file

from empirics.__main__ import main, parser
from empirics.kept import load_model
from empirics.model import Transformer
from empirics.run import lock_path
from empirics.train_command import specification
from theory.__main__ import chosen
from theory.hf_config import parse_config
from theory.records import read_records

FLOAT32 = 1e-5  # nats: the stated target for two orders of float32 sums


@pytest.fixture(scope="module")
def launch() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


# The one in shards of whole vectors of 16 numbers, what is left over being rounded differently by Adam's kernel; the
# other goes evenly over no number of ranks.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 288,
        "intermediate_size": 64, "max_position_embeddings": 32, "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 36, "n_layer": 2, "n_head": 2, "vocab_size": 259, "n_positions": 32,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def command(text: Path, out: Path, *more: str, config: str = "llama", steps: int = 12) -> list[str]:
    """Clipping acts at every step."""
    path = text.parent / f"{config}.json"
    path.write_text(json.dumps(CONFIGS[config]))
    sizes = ["--seq-len", "16", "--batch", "4", "--steps", str(steps), "--checkpoint-every", "4"]
    data = ["--data", str(text), "--tokenizer", "bytes", "--warmup", "3", "--clip", "0.5", "--probe-every", "5"]
    return ["train", str(path), *sizes, *data, "--keep-checkpoint", "--out", str(out), *more]


def losses(out: Path) -> np.ndarray:
    return np.array([json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()])


def record(out: Path) -> dict[str, Any]:
    (found,) = read_records(out / "records")
    return found


def weights(out: Path) -> dict[str, torch.Tensor]:
    (path,) = (out / "models").glob("*/model.safetensors")
    return load_file(path)


@pytest.fixture(scope="module")
def two(launch: Launcher, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run on two ranks."""
    out = tmp_path_factory.mktemp("two")
    ended = launch(2, command(text, out))
    assert ended.statuses == [0, 0], ended.said
    assert ended.said.count("held-out loss") == 1
    return out


# --- the same numbers -------------------------------------------------------------------------------------------


def test_two_ranks_are_one_process_with_two_micro_batches(text: Path, two: Path, tmp_path: Path) -> None:
    """The same sums in the same order: equal bits, in every loss and every weight, with probes and clipping."""
    assert main(command(text, tmp_path, "--micro-batch", "2")) == 0
    assert (two / "losses.jsonl").read_bytes() == (tmp_path / "losses.jsonl").read_bytes()
    one, both = record(tmp_path), record(two)
    assert both["environment"] == one["environment"] | {"ranks": 2}
    for name, values in one["series"].items():
        if name not in ("distributions", "diverged_at", "probes", "left_out"):
            # Norms add up shard by shard: the gradient's in float64, those of updates in float32.
            rounding = 1e-6 if "update" in name else 1e-12
            np.testing.assert_allclose(both["series"][name], values, rtol=rounding, err_msg=name)
    assert_same_probes(both["series"]["probes"], one["series"]["probes"])
    assert both["series"]["left_out"] == one["series"]["left_out"]
    kept = weights(two)
    for name, weight in weights(tmp_path).items():
        assert torch.equal(kept[name], weight), name


def assert_same_probes(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, series in expected.items():
        assert {key: found[name][key] for key in ("labels", "steps")} == {
            key: series[key] for key in ("labels", "steps")
        }
        rounding = (
            1e-5 if "update" in name or name == "matrix_gradient" else 1e-12
        )  # norms of a matrix's parts add up in float32
        np.testing.assert_allclose(found[name]["values"], series["values"], rtol=rounding, err_msg=name)


def test_every_probe_sees_the_whole_batch_and_whole_weights(launch: Launcher, text: Path, tmp_path: Path) -> None:
    """Also those that are no sums over tokens: of the first sequence, of a stack of layers, of whole matrices."""
    wanted = "default,head_entropy,stack_jacobian@3,bound_ratio@3,weight_opnorm"
    argv = [command(text, tmp_path / name, "--probes", wanted, steps=4) for name in ("one", "two")]
    ended = launch(2, argv[1])
    assert ended.statuses == [0, 0], ended.said
    assert main([*argv[0], "--micro-batch", "2"]) == 0
    one, two = (record(tmp_path / name)["series"]["probes"] for name in ("one", "two"))
    assert one["stack_jacobian"]["steps"] == one["bound_ratio"]["steps"] == [0, 3, 4]
    assert_same_probes(two, one)


def test_two_ranks_are_one_process(text: Path, two: Path, tmp_path: Path) -> None:
    """Against the whole batch at once float32 sums have another order."""
    assert main(command(text, tmp_path)) == 0
    difference = np.abs(losses(two) - losses(tmp_path)).max()
    assert 0 < difference < FLOAT32
    one, both = record(tmp_path), record(two)
    assert one["id"] == both["id"]
    assert both["final"]["heldout_loss"] == pytest.approx(one["final"]["heldout_loss"], abs=FLOAT32)


def test_distributions_are_those_of_all_ranks(text: Path, two: Path, tmp_path: Path) -> None:
    """Before training nothing is rounded differently: moments of x, x' and every matrix are equal."""
    assert main(command(text, tmp_path)) == 0
    start, both = (record(out)["series"]["distributions"]["start"] for out in (tmp_path, two))
    assert start["weights"] == both["weights"]
    for place, other in zip(start["places"], both["places"], strict=True):
        assert other["entries"] == place["entries"]
        for name in ("std", "skewness", "excess_kurtosis", "normal_distance"):
            assert other[name] == pytest.approx(place[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("ranks", "config", "more"),
    [
        (4, "llama", ["--embedding", "embed-ln"]),
        (2, "llama", ["--micro-batch", "1", "--z-loss", "1e-3", "--weight-decay", "0.1"]),
        (2, "gpt2", ["--schedule", "constant"]),
    ],
    ids=["4 ranks, Embed LN", "micro-batches, z-loss", "tied, biases"],
)
def test_variants_are_one_process(
    launch: Launcher, text: Path, tmp_path: Path, ranks: int, config: str, more: list[str]
) -> None:
    argv = [command(text, tmp_path / name, *more, config=config, steps=8) for name in ("one", "several")]
    assert main(argv[0]) == 0
    ended = launch(ranks, argv[1])
    assert ended.statuses == [0] * ranks, ended.said
    assert np.abs(losses(tmp_path / "one") - losses(tmp_path / "several")).max() < FLOAT32
    one, several = (record(tmp_path / name)["series"] for name in ("one", "several"))
    for name in ("gradient_norm", "residual_std", "place_gradient", "layer_gradient", "z_loss"):
        np.testing.assert_allclose(several[name], one[name], rtol=1e-3, err_msg=name)


def test_bfloat16(launch: Launcher, text: Path, tmp_path: Path) -> None:
    """Matrices are rounded before they are gathered and not after, gains not at all, evaluation is in float32."""
    argv = [command(text, tmp_path / name, "--precision", "bfloat16", "--micro-batch", "2") for name in ("one", "two")]
    assert main(argv[0]) == 0
    ended = launch(2, argv[1])
    assert ended.statuses == [0, 0], ended.said
    difference = np.abs(losses(tmp_path / "one") - losses(tmp_path / "two"))
    assert difference[0] == 0.0
    assert difference.max() < 1e-3  # bfloat16 itself rounds such a loss to 0.02
    one, two = (record(tmp_path / name)["final"]["heldout_loss"] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-3)


# --- stopped, killed, damaged -----------------------------------------------------------------------------------


def checkpoint_folder(out: Path) -> Path:
    (folder,) = (out / "checkpoints").iterdir()
    return folder


@pytest.mark.parametrize("order", [(2, 1), (1, 2), (2, 4, 1, 2)], ids=str)
def test_resumes_on_another_number_of_ranks(
    launch: Launcher, text: Path, two: Path, tmp_path: Path, order: tuple[int, ...]
) -> None:
    """Stopped three steps further each time; the last ones go to the end."""
    for done, ranks in enumerate(order[:-1]):
        ended = launch(ranks, command(text, tmp_path), stop_after=3)
        assert ended.statuses == [130] * ranks, ended.said
        taken = 3 * (done + 1)
        assert ended.said.splitlines()[-1].endswith(
            f"stopped and saved after {taken} of 12 steps; run the same command again to go on"
        )
        assert ended.said.count("stopped") == 1
        shards = list((checkpoint_folder(tmp_path) / f"step-{taken:08d}").glob("shard-*"))
        assert len(shards) == (ranks if ranks > 1 else 0)
    ended = launch(order[-1], command(text, tmp_path))
    assert ended.statuses == [0] * order[-1], ended.said
    assert np.abs(losses(tmp_path) - losses(two)).max() < FLOAT32


def test_a_checkpoint_in_shards_is_measured(
    launch: Launcher, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the folder of the run, and by the checkpoint itself: the weights are those that its files hold in parts."""
    assert launch(2, command(text, tmp_path), stop_after=4).statuses == [130, 130]
    (state,) = (tmp_path / "checkpoints").glob("*/step-00000004")
    parts = [load_file(path) for path in sorted(state.glob("shard-*.safetensors"))]
    model = load_model(state)
    for name, parameter in model.named_parameters():  # FSDP2 cuts rows
        whole = torch.cat([part[name] for part in parts if name in part])
        assert torch.equal(parameter, whole), name
    matrix = model.layers[0].attention.query.weight.detach()
    expected = float(matrix.square().mean().sqrt())
    for folder in (tmp_path, state):
        assert main(["measure", str(folder), "--seeds", "1", "--seq-len", "8", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["name"].endswith(f" of {state}")
        assert answer["stds"]["query"]["values"][0] == pytest.approx(expected)
        assert main(["probes", str(folder), "--only", "weight_norm", "--seq-len", "8"]) == 0
        assert str(state) in capsys.readouterr().out
    next(state.glob("shard-*.safetensors")).write_bytes(b"cut")
    assert main(["measure", str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_rank_holds_its_part(launch: Launcher, text: Path, tmp_path: Path) -> None:
    """Two ranks' shards of the weights and of the moments: half each, and together every number once."""
    launch(2, command(text, tmp_path), stop_after=2)
    step = checkpoint_folder(tmp_path) / "step-00000002"
    parts = [load_file(path) for path in sorted(step.glob("*.safetensors"))]
    sizes = [sum(tensor.numel() for tensor in part.values()) for part in parts]
    architecture = parse_config(CONFIGS["llama"]).architecture
    counts = [parameter.numel() for parameter in Transformer(architecture).parameters()]
    assert sum(sizes) == 3 * sum(counts) + len(counts)  # weights and two moments; Adam's step counts
    assert max(sizes) < 1.02 * min(sizes)
    manifest = json.loads((step / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in step.iterdir()} - {"manifest.json"}


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_is_the_same(launch: Launcher, text: Path, tmp_path: Path, kills: int) -> None:
    """All ranks at once, by SIGKILL, from the first steps to the last ones: while they step or write a checkpoint."""
    steps = 10 * kills
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    undisturbed = launch(2, command(text, calm, steps=steps), steps=steps)
    assert undisturbed.statuses == [0, 0], undisturbed.said
    for kill in spread(kills, steps):
        ended = launch(2, command(text, killed, steps=steps), kill=kill, steps=steps)
        assert ended.statuses == [-9, -9]
        assert ended.step is not None
        assert ended.step >= kill["step"]  # it had come so far
    ended = launch(2, command(text, killed, steps=steps), steps=steps)
    assert ended.statuses == [0, 0], ended.said
    assert files(killed) == files(calm)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(cut, " bytes and not "), (flip, "has another SHA-256"), (Path.unlink, "is missing")],
    ids=["truncated", "one bit", "missing"],
)
def test_damaged_shard_is_named_and_the_last_good_one_used(
    launch: Launcher, text: Path, two: Path, tmp_path: Path, damage: Any, words: str
) -> None:
    """The second rank's file: only that rank reads through it, and all fall back together."""
    launch(2, command(text, tmp_path), stop_after=4)
    launch(2, command(text, tmp_path), stop_after=2)
    newest = checkpoint_folder(tmp_path) / "step-00000006"
    damage(newest / "shard-00002-model-00001-of-00001.safetensors")
    ended = launch(2, command(text, tmp_path))
    assert ended.statuses == [0, 0], ended.said
    (line,) = [line for line in ended.said.splitlines() if " is damaged (" in line]
    assert f"checkpoint {newest} is damaged (shard-00002-model-00001-of-00001.safetensors" in line
    assert words in line
    assert line.endswith("; the one of step 4 is used")
    assert files(tmp_path) == files(two)


# --- what goes wrong on a rank ----------------------------------------------------------------------------------


def lines_of(said: str) -> list[str]:
    """Without the progress bar."""
    return [line for line in re.sub(r"\r?\w+: +\d+%\|[^|]*\|[^]]*\]", "", said).splitlines() if line]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_ends_all_with_one_line(launch: Launcher, text: Path, tmp_path: Path, rank: int) -> None:
    ended = launch(2, command(text, tmp_path), fault={"rank": rank, "step": 5, "what": "error"})
    assert ended.statuses == [2, 2]
    assert lines_of(ended.said) == ["python -m empirics: the disk is on fire; fetch water"]
    assert ended.seconds < 30
    assert launch(2, command(text, tmp_path)).statuses == [0, 0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_lost_ends_the_others(
    launch: Launcher, text: Path, two: Path, tmp_path: Path, rank: int
) -> None:
    ended = launch(2, command(text, tmp_path), fault={"rank": rank, "step": 5, "what": "killed"})
    assert sorted(ended.statuses) == [-9, 2]
    (line,) = lines_of(ended.said)
    assert f"rank {1 - rank} lost the others" in line
    assert "run the same command again" in line
    assert ended.seconds < 30
    assert launch(2, command(text, tmp_path)).statuses == [0, 0]
    assert files(tmp_path) == files(two)


def test_a_signal_to_all_keeps_one_checkpoint(launch: Launcher, text: Path, two: Path, tmp_path: Path) -> None:
    ended = launch(2, command(text, tmp_path), signal=int(signal.SIGTERM))
    assert ended.statuses == [130, 130], ended.said
    assert ended.said.count("stopped and saved after 4 of 12 steps") == 1
    assert launch(2, command(text, tmp_path)).statuses == [0, 0]
    assert files(tmp_path) == files(two)


@pytest.mark.parametrize(
    ("ranks", "more", "words"),
    [
        (3, [], "--batch 4 does not go evenly over 3 ranks; use a multiple of 3"),
        (2, ["--micro-batch", "4"], "does not go evenly over 2 ranks of --micro-batch 4; use a multiple of 8"),
        (2, ["--device", "cuda:1"], "--device cuda:1 names one device for 2 ranks; use --device cuda, a device each"),
        (2, ["--stepss", "3"], "unrecognized arguments: --stepss 3"),
        (2, ["--data", "/nowhere"], "there is no text '/nowhere'"),
    ],
)
def test_bad_input_is_one_line(
    launch: Launcher, text: Path, tmp_path: Path, ranks: int, more: list[str], words: str
) -> None:
    ended = launch(ranks, command(text, tmp_path / "out", *more))
    assert ended.statuses == [2] * ranks
    (line,) = lines_of(ended.said)
    assert words in line


def test_a_run_that_another_process_trains_is_one_line(launch: Launcher, text: Path, tmp_path: Path) -> None:
    argv = command(text, tmp_path, steps=3)
    arguments = parser().parse_args(argv)
    spec = specification(arguments, chosen(arguments)[0], arguments.seq_len)
    with FileLock(lock_path(spec, tmp_path)):
        ended = launch(2, argv)
        assert ended.statuses == [2, 2]
        (line,) = lines_of(ended.said)
        assert f"{spec.identity} is being trained by another process" in line
    ended = launch(2, argv)
    assert ended.statuses == [0, 0], ended.said


# --- the launcher -----------------------------------------------------------------------------------------------


def test_torchrun(text: Path, two: Path, tmp_path: Path) -> None:
    """The real launcher; ranks that the tests fork leave the same bytes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "empirics",
         *command(text, tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss") == 1
    assert files(tmp_path) == files(two)


# --- on several GPUs: written, and not run yet -------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch warns in its own compiler, and of float32 products without TF32
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    "more", [[], ["--precision", "bfloat16"], ["--compile"]], ids=["float32", "bfloat16", "compile"]
)
def test_two_gpus_are_one(text: Path, tmp_path: Path, more: list[str]) -> None:
    """By NCCL; a GPU adds up in an order of its own, so that bits may differ."""
    argv = [command(text, tmp_path / name, "--device", "cuda", *more) for name in ("one", "two")]
    assert main(argv[0]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "empirics",
         *argv[1]], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    difference = np.abs(losses(tmp_path / "one") - losses(tmp_path / "two")).max()
    assert difference < (0.02 if "bfloat16" in more else 1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch warns of TorchScript in its own compiler
def test_compiled_layers(launch: Launcher, text: Path, two: Path, tmp_path: Path) -> None:
    """Each layer compiled by itself, probes uncompiled: the same numbers to rounding; needs a C++ compiler."""
    ended = launch(2, command(text, tmp_path, "--compile"))
    assert ended.statuses == [0, 0], ended.said
    np.testing.assert_allclose(losses(tmp_path), losses(two), rtol=1e-5)
    one, both = record(tmp_path)["series"], record(two)["series"]
    np.testing.assert_allclose(one["residual_std"], both["residual_std"], rtol=1e-4)
    np.testing.assert_allclose(one["place_gradient"], both["place_gradient"], rtol=1e-3)
