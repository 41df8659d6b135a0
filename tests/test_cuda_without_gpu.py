"""The GPU path on a machine without a GPU: what it waits for, launches, moves and computes.

Each check is a process of its own, see :mod:`tests.cuda_without_gpu`: what they patch in torch is
not undone. docs/performance.md says what they prove and what they do not.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gmixout_optim.bench.pretend.device import why_not

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

ROOT = Path(__file__).parent.parent


def run(module: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", "-m", f"tests.cuda_without_gpu.{module}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


# What the host waits for, by phase: to know whether the model was replaced, and numbers to show.
# torch's ASGD makes its state of numbers on the host.
ALLOWED = [
    r"\| (eval_weights|consolidate) \| 1 x tolist on_host\.py",
    r"\| report \| 1 x tolist on_host\.py",
    r"^WAITS ASGD \| step \d \|",
    # Its step counts go back to the host, once after compiled steps: torch's eager form reads them.
    r"^WAITS Adagrad, options change \| step [35] \| \d x copy cuda to cpu",
]


@pytest.mark.parametrize("form", ["eager", "compiled"])
def test_steps_and_redraws_wait_for_nothing(form: str) -> None:
    """Of all element-wise optimizers and settings; nor does compiled code run on the host."""
    lines = run("waits", form).splitlines()
    wrong = [
        line
        for line in lines
        if re.match("WAITS|ON HOST|NOT COMPILED|EARLY WRITE|NO PLAN", line)
        and not any(re.search(pattern, line) for pattern in ALLOWED)
    ]
    assert not wrong
    summaries = [line for line in lines if re.match(r"[\w -]+: step", line)]
    assert len(summaries) > 20
    adamw = next(line for line in summaries if line.startswith("AdamW:"))
    assert ("step 0 +" in adamw) == (form == "eager")


@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize(
    ("granularity", "least", "launches"),
    [("element", 28, 6), ("16", 28, 6), ("column", 28, 4), ("row", 28, 6)],
)
def test_few_launches_the_least_bytes_and_no_spills(
    granularity: str, least: float, launches: int, arch: str
) -> None:
    """A step reads weights, gradients and two moments and writes all but the gradients: 28 bytes
    per element, and its index."""
    layouts = {"element": "dense", "16": "packed", "column": "packed", "row": "dense"}
    found = json.loads(run("kernels", granularity, layouts[granularity], arch))
    indices = found["indices"] / found["elements"]
    assert found["bytes_per_element"] == pytest.approx(least + indices, abs=0.05)
    assert found["launches"] == launches
    assert found["calls"] == 1
    assert found["redraw"] <= 15
    assert found["redraw_copies"] == 1
    assert found["eager"] <= 8
    assert not found["waits"]
    assert not found["others"]
    assert not found["on_host"]
    assert not found["is_atomic"]
    assert not found["large"]
    assert found["kernels"] >= 6
    assert not found["spilled"]
    assert found["registers"] <= 128


def test_the_plan_of_a_step_on_a_gpu() -> None:
    """Launches and bytes are the generated code's, sectors those of drawn sets."""
    command = [sys.executable, "-W", "ignore", "-m", "gmixout_optim.bench", "--plan-gpu", "a100"]
    command += ["--model", "1e6", "--granularity", "element", "16", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    plain, element, wide = json.loads(done.stdout)
    assert plain["bytes"] == plain["sectors"] == 28 * plain["weights"]
    assert 0.09 < element["weights"] / plain["weights"] < 0.11
    assert element["bytes"] / element["weights"] == pytest.approx(32, abs=0.2)
    assert wide["bytes"] / wide["weights"] == pytest.approx(28.5, abs=0.2)
    # Of three accesses to single elements each takes a sector of 32 bytes, or shares it.
    assert 32 + 2 * 28 < element["sectors"] / element["weights"] < 32 + 3 * 28
    assert wide["sectors"] == pytest.approx(wide["bytes"], rel=0.01)
    for cost in (plain, element, wide):
        assert cost["memory"] == pytest.approx(cost["sectors"] / 2.04e12)
        assert cost["launching"] == pytest.approx(4e-6 * cost["launches"])
    assert 0 < element["redraw"] <= 30


def test_deterministic_algorithms_sort_nothing() -> None:
    """Torch has a scatter sort its indices then, whose order does not matter here."""
    found = json.loads(run("kernels", "element", "deterministic"))
    assert found["launches"] <= 6
    assert not found["others"]


def test_interpreted_code_computes_what_eager_code_does() -> None:
    """All optimizers, granularities, dtypes, stochastic rounding and packed gradients, over
    redraws."""
    lines = run("interpret").splitlines()
    assert not [line for line in lines if not line.startswith("ok")]
    assert len(lines) > 25
