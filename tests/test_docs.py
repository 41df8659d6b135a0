"""The code in README and docs runs, in the order of the page."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gmixout_optim
from tests.training import small_model

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def names_a_reader_has() -> dict[str, Any]:
    """A training script's own names."""
    model = small_model(torch.float32)
    return {
        "torch": torch,
        "GMixoutOptimizer": gmixout_optim.GMixoutOptimizer,
        "mixout_param_groups": gmixout_optim.mixout_param_groups,
        "model": model,
        "batches": [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(3)],
        "loss_function": nn.functional.cross_entropy,
        "validate": lambda model: 0.5,
    }


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group, as torchrun's script has one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name == "distributed.md":
        request.getfixturevalue("one_rank")
    names = names_a_reader_has()
    for code in blocks(page):
        exec(compile(code, str(page), "exec"), names)


def test_readme_has_code() -> None:
    assert len(blocks(ROOT / "README.md")) >= 3


def test_readme_names_every_setting_with_its_default() -> None:
    import inspect

    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (ROOT / "README.md").read_text(), re.M))
    signature = inspect.signature(gmixout_optim.GMixoutOptimizer.__init__)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            written = rows[name].strip().strip("`").replace('"', "'")
            assert written == ("none" if parameter.default == () else repr(parameter.default))


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page.name, target)


def test_docstrings() -> None:
    results = doctest.testmod(gmixout_optim.optimizer, extraglobs=names_a_reader_has())
    assert results.failed == 0
    assert results.attempted > 0
