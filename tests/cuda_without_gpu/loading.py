"""Generated kernels as Python objects."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any


def load_kernel(name: str, text: str) -> Any:
    """What a kernel's source defines under its name: Triton reads a function's code from a file."""
    path = Path(tempfile.mkdtemp(), f"{name}.py")
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
