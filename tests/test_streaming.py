"""C4 through the real `datasets` library: a folder laid out as C4's repository is, read under C4's own name."""

from __future__ import annotations

import gc
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.training import record_bytes, specification, train_until

from empirics.run import run
from empirics.shards import open_shards
from empirics.texts import Documents, load_text
from empirics.tokenizer import load_tokenizer

# A stream that is left before its end: the library has the collector close its file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")

ROOT = Path(__file__).resolve().parents[1]
CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
- config_name: realnewslike
  data_files:
  - split: train
    path: realnewslike/c4-train.*.json.gz
---
"""
FILES, ROWS = 4, 30  # a file
# Shards end after a thousand tokens, and documents are read some seven hundred characters at a time.
SMALL = """
import sys
from empirics import shards, tokenizer
from empirics.__main__ import main
tokenizer.TRAINED_ON, shards.SHORT, shards.GROUP = 4500, 5000, 700
sys.exit(main(sys.argv[1:]))
"""


def text_of(split: str, n: int) -> str:
    return f"{split} page {n}: {n * n % 97} of {n % 7}, caf\u00e9\nand {n} more"


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def c4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `allenai/c4` lies."""
    root = tmp_path_factory.mktemp("hub")
    for config in ("en", "realnewslike"):
        folder = root / "allenai" / "c4" / config
        folder.mkdir(parents=True)
        for split, files in (("train", FILES), ("validation", 1)):
            for file in range(files):
                rows = [
                    {
                        "text": text_of(f"{config} {split}", n),
                        "timestamp": "2019-04-25T12:57:54Z",
                        "url": f"https://example.com/{n}",
                    }
                    for n in range(file * ROWS, (file + 1) * ROWS)
                ]
                name = f"c4-{split}.{file:05}-of-{files:05}.json.gz"
                (folder / name).write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    (root / "allenai" / "c4" / "README.md").write_text(CARD)
    return root


@pytest.fixture
def here(c4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(c4)


TRAIN = [text_of("en train", n) for n in range(FILES * ROWS)]


@pytest.mark.usefixtures("here")
def test_the_order_is_that_of_the_files() -> None:
    """English unless told otherwise, the training split unless told otherwise, the text alone."""
    assert list(Documents("hf:allenai/c4")) == TRAIN
    assert list(Documents("hf:allenai/c4:en:validation")) == [text_of("en validation", n) for n in range(ROWS)]
    assert next(iter(Documents("hf:allenai/c4:realnewslike"))) == text_of("realnewslike train", 0)
    assert load_text("hf:allenai/c4", limit=1000).digest == load_text("hf:allenai/c4", limit=1000).digest


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("taken", [1, ROWS - 1, ROWS, ROWS + 1, FILES * ROWS - 1])
def test_a_stream_goes_on_after_any_row(taken: int) -> None:
    """Within a file, at its end and in the next, by a position that has been through JSON."""
    first = Documents("hf:allenai/c4")
    rows = iter(first)
    for n in range(taken):
        assert next(rows) == TRAIN[n]
    position = json.loads(json.dumps(first.position))
    assert position["stream"]
    assert list(Documents("hf:allenai/c4", position=position)) == TRAIN[taken:]


def tokenise(out: Path, cwd: Path) -> subprocess.Popen[str]:
    command = ["tokenise", "hf:allenai/c4", "--tokenizer", "bytes", "--shard-tokens", "1000", "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-c", SMALL, *command], cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_killed_in_the_middle_is_the_same(c4: Path, tmp_path: Path) -> None:
    """A real SIGKILL after the second shard; what goes on reads none of the finished shards' rows again."""
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert tokenise(calm, c4).wait() == 0
    process = tokenise(killed, c4)
    while process.poll() is None and not (killed / "00001.bin").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(list(killed.glob("*.bin")))
    kept = {path: path.stat().st_mtime_ns for path in killed.glob("0000[0].*")}
    again = tokenise(killed, c4)
    _, said = again.communicate()
    assert again.returncode == 0, said
    assert 2 <= done < len(list(calm.glob("*.bin")))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    names = [path.name for path in calm.iterdir()]
    assert {name: (killed / name).read_bytes() for name in names} == {n: (calm / n).read_bytes() for n in names}
    ids = np.asarray(open_shards(killed)[0])
    tokenizer = load_tokenizer(str(killed))
    expected = [np.append(each, tokenizer.end_id) for each in tokenizer.encode(TRAIN)]
    np.testing.assert_array_equal(ids, np.concatenate(expected))


@pytest.mark.usefixtures("here")
def test_training_on_the_stream_is_shuffled_the_same_way_and_resumes(tmp_path: Path) -> None:
    spec = specification(Path("x"), data="hf:allenai/c4", order="epoch", steps=12)
    whole = run(spec, tmp_path / "whole")
    assert "allenai/c4, 120 documents" in whole["data"]["source"]
    train_until(spec, tmp_path / "killed", 7, every=2)
    run(spec, tmp_path / "killed")
    assert record_bytes(spec, tmp_path / "killed") == record_bytes(spec, tmp_path / "whole")
    other = run(specification(Path("x"), data="hf:allenai/c4", order="epoch", steps=12, seed=1), tmp_path / "whole")
    assert other["data"]["digest"] == whole["data"]["digest"]
    assert other["series"]["loss"] != whole["series"]["loss"]


def test_a_file_that_is_cut_is_one_line(c4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "allenai" / "c4" / "en"
    folder.mkdir(parents=True)
    for path in (c4 / "allenai" / "c4" / "en").iterdir():
        content = path.read_bytes()
        (folder / path.name).write_bytes(content[: len(content) // 2] if "train.00001" in path.name else content)
    (folder.parent / "README.md").write_text(CARD)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot stream hf:allenai/c4 ") as caught:
        list(Documents("hf:allenai/c4"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "how",
    [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}],
    ids=["told", "found"],
)
def test_without_a_network_one_line_names_the_remedy(how: dict[str, str], tmp_path: Path) -> None:
    """Offline by the library's own switch, and with a hub that nobody answers at."""
    command = ["train", "tiny", "--data", "hf:allenai/c4", "--out", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")} | how
    done = subprocess.run(
        [sys.executable, "-m", "empirics", *command], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "cannot stream hf:allenai/c4" in done.stderr
    assert "check its name and the network, or use sympy" in done.stderr
    assert not list((tmp_path / "run").glob("records/*"))
