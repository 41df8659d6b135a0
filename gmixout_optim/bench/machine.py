"""Where something was measured, and with what."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from pathlib import Path

import torch

import gmixout_optim


def machine_facts(device: torch.device) -> dict[str, str | int]:
    return {
        "device": _device_title(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gmixout_optim": gmixout_optim.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
    }


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be had on the device now, None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    kibibytes = proc_field("/proc/meminfo", "MemAvailable")
    return None if kibibytes is None else 1024 * int(kibibytes.split()[0])


def _device_title(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return proc_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def proc_field(path: str, name: str) -> str | None:
    """The first line ``name: value`` of one of Linux's files."""
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return None
