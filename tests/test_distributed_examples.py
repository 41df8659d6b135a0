"""The examples of trainings on several ranks, launched as a user launches them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import torch

from tests.ranks import needs_gloo

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = needs_gloo


def torchrun(ranks: int, script: str, *arguments: str, folder: Path, limit: float = 120) -> str:
    """Run an example and return what it says; no process of it is left."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launch, str(EXAMPLES / script), "--folder", str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        said, errors = process.communicate(timeout=limit)
    finally:
        process.kill()
        left = processes_with(str(folder))
        for number in left:
            os.kill(number, signal.SIGKILL)
    assert process.returncode == 0, errors
    assert not left
    return said


def processes_with(argument: str) -> list[int]:
    """Workers have process groups of their own, so they are found by what is on their command
    line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if argument in arguments:
            found.append(int(path.parent.name))
    return found


def losses(said: str) -> list[float]:
    return [float(number) for number in re.findall(r"validation loss ([\d.]+)", said)]


def test_fsdp_saved_on_two_ranks_goes_on_on_one(tmp_path: Path) -> None:
    sizes = ["--steps", "16", "--save-every", "6"]  # saved in the middle of episodes of 10 steps
    whole = losses(torchrun(2, "train_fsdp.py", *sizes, folder=tmp_path / "a"))
    assert len(whole) == 3
    assert whole[2] < whole[0]
    # As if it had been killed while it saved for the second time.
    killed = tmp_path / "b"
    shutil.copytree(tmp_path / "a", killed)
    (killed / "model.pt").unlink()
    shutil.rmtree(killed / "step-000016")
    (killed / "step-000012" / ".metadata").unlink()
    resumed = losses(torchrun(1, "train_fsdp.py", *sizes, "--resume", folder=killed))
    assert len(resumed) == 2
    for ours, theirs in zip(resumed, whole[1:], strict=True):
        assert abs(ours - theirs) < 0.01  # forward runs in bfloat16
    weights, others = (torch.load(folder / "model.pt") for folder in (tmp_path / "a", killed))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert type(weight) is torch.Tensor
        torch.testing.assert_close(weight, others[name], rtol=0.05, atol=0.005, msg=name)


def test_ddp_resumed_is_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    torchrun(2, "train_ddp.py", "--epochs", "2", folder=tmp_path / "a")
    killed = tmp_path / "b"
    killed.mkdir()
    shutil.copy(tmp_path / "a" / "epoch-001.pt", killed)
    said = torchrun(2, "train_ddp.py", "--epochs", "2", "--resume", folder=killed)
    assert "epoch 1" in said
    assert "epoch 0" not in said
    weights, others = (torch.load(folder / "model.pt") for folder in (tmp_path / "a", killed))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name
