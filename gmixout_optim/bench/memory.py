"""Peak memory of a training loop with the real model, in a process of its own.

As a command it takes a :class:`Loop` in JSON and prints what it found in JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from gmixout_optim.bench.machine import proc_field
from gmixout_optim.bench.models import find_model
from gmixout_optim.bench.subject import Setting, Subject

STEPS = 3
# The mask is redrawn within the loop, gradients still there.
RESAMPLE_EVERY = 2


# glibc by itself keeps freed tensors of up to 32 MB in a heap with holes, which changes a peak by a
# quarter from run to run. So large tensors go back to the system at once, in all loops alike. A
# user's own setting counts for more.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072"}


@dataclass(frozen=True)
class Loop:
    """Some steps of training; without ``setting`` the plain optimizer's."""

    subject: Subject
    batch_size: int
    threads: int
    setting: Setting | None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Loop:
        given = json.loads(text)
        setting = given.pop("setting")
        return cls(
            subject=Subject(**given.pop("subject")),
            setting=None if setting is None else Setting(**setting),
            **given,
        )


@dataclass(frozen=True)
class Peak:
    """What a loop came to.

    Attributes:
        peak: the most bytes that its process had.
        baseline: the most before there was a model.
        beyond_baseline: the difference.
        peak_ratio, beyond_baseline_ratio: to the plain optimizer's.
        error: why there is none of all that.
    """

    setting: Setting | None
    peak: int | None = None
    baseline: int | None = None
    beyond_baseline: int | None = None
    peak_ratio: float | None = None
    beyond_baseline_ratio: float | None = None
    error: str | None = None


def measure_peaks(loops: Sequence[Loop], begin: Callable[[str], None]) -> list[Peak]:
    """Of each loop, the first being the plain optimizer's; ``begin`` is called with a title as each
    begins."""
    peaks: list[Peak] = []
    for loop in loops:
        begin(f"training loop, {loop.setting or 'plain'}")
        peak = peak_of(loop)
        plain = peaks[0] if peaks else peak
        peaks.append(
            replace(
                peak,
                peak_ratio=_ratio(peak.peak, plain.peak),
                beyond_baseline_ratio=_ratio(peak.beyond_baseline, plain.beyond_baseline),
            )
        )
    return peaks


def peak_of(loop: Loop) -> Peak:
    """Run the loop in a child process; a failure there, such as too little memory, is part of the
    result."""
    found, error = run_child("gmixout_optim.bench.memory", loop.to_json())
    if error is not None:
        return Peak(loop.setting, error=error)
    peak, baseline = found
    return Peak(loop.setting, peak, baseline, peak - baseline)


def run_child(module: str, *arguments: str) -> tuple[Any, str | None]:
    """What a module prints last, in JSON, in a process of its own; and why it failed."""
    command = [sys.executable, "-m", module, *arguments]
    child = subprocess.run(command, capture_output=True, text=True, env={**_MALLOC, **os.environ})
    if child.returncode == 0:
        return json.loads(child.stdout.strip().splitlines()[-1]), None
    if child.returncode < 0:
        return None, f"killed by signal {-child.returncode}: too little memory?"
    return None, (child.stderr.strip() or "no message").splitlines()[-1]


def _ratio(ours: int | None, plain: int | None) -> float | None:
    return None if ours is None or plain is None else ours / plain


def train(loop: Loop) -> tuple[int, int]:
    """Train in this process; ``(peak, baseline)`` as in :class:`Peak`."""
    torch.set_num_threads(loop.threads)
    subject, setting = loop.subject, loop.setting
    baseline = peak_bytes(subject.device)
    with subject.where_tensors_are_made():
        model = find_model(subject.model)()
        inputs, targets = model.batch(loop.batch_size)
    optimizer = subject.make_base(model.parameters())
    if setting is not None:
        optimizer = setting.wrap(optimizer, RESAMPLE_EVERY)
    for _ in range(STEPS):
        model.loss(inputs, targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return peak_bytes(subject.device), baseline


def peak_bytes(device: torch.device) -> int:
    """The most so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not ru_maxrss: on Linux a process begins at the maximum of the one that started it.
    kibibytes = proc_field("/proc/self/status", "VmHWM")
    if kibibytes is not None:
        return 1024 * int(kibibytes.split()[0])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    print(json.dumps(train(Loop.from_json(sys.argv[1]))))
