"""Lead and lag between spikes: a planted one is found with its sign, and without one nothing but chance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from empirics.__main__ import main
from empirics.spike_definitions import DEFINITIONS
from empirics.spike_lag import WINDOW, lag, pairs

DEFINITION = DEFINITIONS["six-sigma"]
Series = NDArray[np.float64]


def steps_of_spikes(rng: np.random.Generator, length: int, count: int) -> NDArray[np.int64]:
    """Far enough apart for every definition to tell them apart."""
    places = np.sort(rng.choice((length - 200) // 40, size=count, replace=False))
    return 180 + 40 * places + rng.integers(0, 20, size=count)


def spiky(rng: np.random.Generator, length: int, steps: NDArray[np.int64], size: float = 5.0) -> Series:
    series = 1 + 0.1 * rng.normal(size=length)
    series[steps] += size
    return series


def test_pairs() -> None:
    assert pairs([5, 100, 200], [3, 104, 300]) == (-4, 2)
    assert pairs([7, 10], [9]) == (1,)  # the nearest
    assert pairs([8, 10], [9]) == (-1,)  # of two equally near, the earlier
    assert pairs([8, 10], [9, 12]) == (-2, -1)  # each event once
    assert pairs([0], [WINDOW]) == (-WINDOW,)
    assert pairs([0], [WINDOW + 1]) == ()
    assert pairs([], [3]) == pairs([3], []) == ()


@pytest.mark.parametrize("planted", [-3, 0, 4])
@pytest.mark.parametrize("name", ["six-sigma", "twice-median", "robust-deviation"])
def test_a_planted_lag_is_found(planted: int, name: str) -> None:
    rng = np.random.default_rng(abs(planted))
    steps = steps_of_spikes(rng, 2000, 12)
    found = lag(DEFINITIONS[name], spiky(rng, 2000, steps + planted), spiky(rng, 2000, steps))
    assert found.events == found.other_events == len(found.lags) == 12
    assert found.median == planted
    assert set(found.lags) == {planted}
    assert found.chance is not None
    assert found.chance < 0.01
    assert found.pairs_by_chance is not None
    assert found.pairs_by_chance < 6
    assert found.chance_of_side is not None
    assert (found.chance_of_side < 0.05) == (planted != 0)


def test_some_spikes_of_each_stand_alone() -> None:
    rng = np.random.default_rng(5)
    steps = steps_of_spikes(rng, 4000, 30)
    found = lag(DEFINITION, spiky(rng, 4000, steps[:20] - 2), spiky(rng, 4000, steps[10:])).record()
    assert (found["events"], found["other_events"]) == (20, 20)
    assert found["leading"] >= 10
    assert found["median_lag"] == -2
    assert found["chance"] < 0.05


def test_what_chance_gives_is_calibrated() -> None:
    """Control: series that have nothing to do with each other are within chance's 5 % as often as it says."""
    rng = np.random.default_rng(0)
    runs, by_pairs, by_side, medians = 100, 0, 0, []
    for _ in range(runs):
        one, other = (spiky(rng, 700, np.sort(rng.choice(np.arange(100, 700), 8, replace=False))) for _ in range(2))
        found = lag(DEFINITIONS["twice-median"], one, other)
        assert found.chance is not None
        assert found.chance_of_side is not None
        by_pairs += found.chance <= 0.05
        by_side += found.chance_of_side <= 0.05
        medians += [] if found.median is None else [found.median]
    most = 0.05 * runs + 4 * np.sqrt(0.05 * 0.95 * runs)  # four standard errors
    assert by_pairs <= most
    assert by_side <= most
    assert abs(np.mean(medians)) < 4 * np.std(medians) / np.sqrt(len(medians))


def test_logs_that_say_nothing() -> None:
    """No events, or a log too short to turn: numbers that are not there are None, not 0."""
    rng = np.random.default_rng(1)
    steps = np.array([200, 400])
    quiet, spikes = spiky(rng, 700, steps, size=0.0), spiky(rng, 700, steps)
    for pair in ((quiet, spikes), (spikes, quiet), (quiet, quiet)):
        found = lag(DEFINITION, *pair)
        assert found.lags == ()
        assert found.shifts == 0
        assert found.median is found.chance is found.pairs_by_chance is found.chance_of_side is None
    short = lag(DEFINITION, spikes[190:230], spikes[190:230])
    assert (short.shifts, short.median, short.chance) == (0, None, None)
    ends = np.where(np.arange(700) >= 300, np.nan, spikes)
    assert lag(DEFINITION, ends, spikes).other_events == 1


def test_a_long_log_takes_a_share_of_the_shifts() -> None:
    rng = np.random.default_rng(2)
    steps = steps_of_spikes(rng, 20_000, 50)
    found = lag(DEFINITION, spiky(rng, 20_000, steps - 1), spiky(rng, 20_000, steps))
    assert 1000 < found.shifts <= 2000
    assert found.median == -1


# --- the command --------------------------------------------------------------------------------------------------


def write_log(path: Path, rng: np.random.Generator, steps: NDArray[np.int64], length: int = 1000) -> Path:
    columns = [spiky(rng, length, steps + planted) for planted in (0, -3, -2)]
    rows = zip(range(length), *columns, strict=True)
    lines = [f"{n},{loss},{gradient},{update}" for n, loss, gradient, update in rows]
    path.write_text("step,loss,gradient_norm,update_norm\n" + "\n".join(lines))
    return path


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(3)
    log = write_log(tmp_path / "run.csv", rng, steps_of_spikes(rng, 1000, 8))
    calm = write_log(tmp_path / "calm.csv", rng, np.array([], dtype=np.int64))
    assert main(["spikes", str(log), "--lag", "--reference", str(calm), "--json"]) == 0
    told: Any = json.loads(capsys.readouterr().out)
    rows = {(row["series"], row["against"], row["definition"]): row for row in told["lag"]["rows"]}
    assert len(rows) == 3 * len(DEFINITIONS)
    pairs = {("gradient_norm", "loss"): -3, ("update_norm", "loss"): -2, ("update_norm", "gradient_norm"): 1}
    for columns, planted in pairs.items():
        for kind in ("raw", "paired"):
            found = rows[*columns, "twice-median" if kind == "raw" else "robust-deviation"][kind]
            assert (found["pairs"], found["median_lag"]) == (8, planted)
            assert found["chance"] < 0.05
            assert found["leading" if planted < 0 else "lagging"] == 8
    assert main(["spikes", str(log), "--lag", "--definition", "six-sigma"]) == 0
    text = capsys.readouterr().out
    assert "gradient_norm  loss           six-sigma" in text
    assert "update_norm    gradient_norm  six-sigma" in text
    assert "8, 0, 0" in text
    assert main(["spikes", str(log), "--json"]) == 0
    assert "lag" not in json.loads(capsys.readouterr().out)


def test_command_needs_the_series(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "losses.jsonl").write_text("".join(f'{{"step": {n}, "loss": 1.0}}\n' for n in range(200)))
    assert main(["spikes", str(tmp_path / "losses.jsonl"), "--lag"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "--lag needs the series gradient_norm and update_norm" in err
    assert "name the folder of a run" in err
