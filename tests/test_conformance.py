"""Ours passes every row of the battery that others are held against."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.conformance import CHECKS, PAGE, Make, ours

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("check", CHECKS.values(), ids=lambda check: check.__name__)
def test_ours(check: Callable[[Make], None]) -> None:
    check(ours)


def test_checks_can_fail() -> None:
    """A wrapper that forgets its state, and is no optimizer, passes few."""

    class Bad:
        def __init__(self, model: torch.nn.Module) -> None:
            self.inner = torch.optim.AdamW(model.parameters(), lr=0.01)
            self.zero_grad, self.step = self.inner.zero_grad, self.inner.step

        def state_dict(self) -> dict:
            return {}

        def load_state_dict(self, state: dict) -> None: ...

    passed = []
    for name, check in CHECKS.items():
        try:
            check(Bad)
            passed.append(name)
        except Exception:
            pass
    assert "resume, bit for bit" not in passed
    assert "`isinstance`, schedulers" not in passed
    assert set(passed) <= {
        "gradient accumulation",
        "closure",
        "deepcopy, pickle",
        "GradScaler, a step with inf",
    }


def test_the_page_has_every_row() -> None:
    page = PAGE.read_text()
    for row in CHECKS:
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {row} |")]
        assert line.split("|")[2].strip() == "yes"
