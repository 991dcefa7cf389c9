"""Test-wide settings: hypothesis profiles, and one thread so that timings and rounding do not depend on the cores; and
the text that trainings are given."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when numpy is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is: no test reaches out

import pytest
import torch
from hypothesis import HealthCheck, settings

# Explicit Jacobians take milliseconds to tenths of a second: neither a deadline nor slow generation is a failure.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=60, derandomize=True, **_COMMON)
settings.register_profile("long", max_examples=10_000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(1)

# The first forward-mode product loads torch's own TorchScript decompositions, which torch itself warns about.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.func.jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers.training import write_text  # imports the whole package, which not every test needs; as below

    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    from helpers.tokens import write_documents

    return write_documents(tmp_path)


@pytest.fixture
def little_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers.tokens import read_little

    read_little(monkeypatch)
