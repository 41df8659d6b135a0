"""What ``import gmixout_optim`` brings in beside torch: nothing that takes time."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, torch
before = set(sys.modules)
import gmixout_optim
print(*sorted(set(sys.modules) - before))
"""


def test_import_adds_no_modules_but_its_own() -> None:
    """Counted, not timed. torch._dynamo, say, takes a second."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    added = run.stdout.split()
    assert "gmixout_optim.optimizer" in added
    foreign = [name for name in added if name.split(".")[0] != "gmixout_optim"]
    assert len(foreign) <= 3, foreign
    assert not any(name.startswith("gmixout_optim.bench") for name in added)


def test_an_older_torch_without_some_optimizers_will_do() -> None:
    """Muon came with torch 2.9; whoever has none of it imports the library all the same."""
    program = "import torch; del torch.optim.Muon; import gmixout_optim"
    subprocess.run([sys.executable, "-c", program], check=True)
