"""Hypothesis profiles: quick by default, other examples each time in CI, more of them with
HYPOTHESIS_PROFILE=thorough."""

from __future__ import annotations

import os

# Tests run in parallel processes, and some start further ones: each has one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

_COMMON = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("quick", max_examples=25, derandomize=True, **_COMMON)
settings.register_profile("ci", max_examples=30, **_COMMON)
settings.register_profile("thorough", max_examples=60, **_COMMON)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "quick")
)


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors here are tiny, and the tests run in parallel processes."""
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
