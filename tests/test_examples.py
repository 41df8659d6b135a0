"""The demo as a newcomer runs it, at toy size."""

from __future__ import annotations

import importlib.util
import json
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent / "examples" / "finetune.py"

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("timm", "matplotlib", "tqdm")),
    reason="needs the examples extra",
)


def demo(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_quick_demo_from_any_folder(tmp_path: Path) -> None:
    done = demo("--quick", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for method in ("probe", "AdamW", "GMixout"):
        assert method in done.stdout
    files = {path.suffix: path for path in (tmp_path / "out").iterdir()}
    assert files[".png"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads(files[".json"].read_text())


def test_low_precision_curves(tmp_path: Path) -> None:
    script = DEMO.with_name("low_precision.py")
    arguments = ["--steps", "2", "--resample-every", "1", "--seeds", "1", "--quick"]
    command = [sys.executable, str(script), *arguments, "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "low_precision.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    losses = json.loads((tmp_path / "out" / "low_precision.json").read_text())["losses"]
    assert [len(runs) for runs in losses.values()] == [2, 3]
    assert all(
        len(run) == 3 for runs in losses.values() for curves in runs.values() for run in curves
    )


def test_help_explains_every_flag(tmp_path: Path) -> None:
    done = demo("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "--quick" in done.stdout
    assert "default" in done.stdout


def test_bad_flags_are_refused(tmp_path: Path) -> None:
    done = demo("--domain", "crayon", cwd=tmp_path)
    assert done.returncode == 2
    assert "crayon" in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupt_leaves_no_half_written_file(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", str(DEMO), "--quick", "--output", "out"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # not so in the background
    )
    try:
        begun, _, _ = select.select([process.stdout], [], [], 120)
        assert begun, "says nothing"
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert said.startswith("linear probe fitted")  # so it was in the training that comes next
    assert process.returncode == 130
    assert "Traceback" not in errors
    left = list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else []
    assert left == []
