"""A progress bar on stderr, where somebody is looking."""

from __future__ import annotations

import sys

WIDTH = 30


class Progress:
    """One line for ``total`` parts of the work, gone at the end."""

    def __init__(self, total: int) -> None:
        self.total, self.begun = total, 0
        self.shown = sys.stderr.isatty()

    def begin(self, part: str) -> None:
        bar = ("#" * (WIDTH * self.begun // self.total)).ljust(WIDTH)
        self._show(f"[{bar}] {self.begun}/{self.total} {part}")
        self.begun += 1

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._show("")

    def _show(self, text: str) -> None:
        if self.shown:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
