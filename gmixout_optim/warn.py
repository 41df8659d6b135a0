"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings

_INSIDE = ("gmixout_optim", "torch", "contextlib")


def warn(message: str) -> None:
    """Warn as of the line outside of the library and of torch that led here."""
    level = 1
    frame = sys._getframe()
    while (
        frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in _INSIDE
    ):
        frame = frame.f_back
        level += 1
    warnings.warn(message, UserWarning, level)
