"""Runs the study, a cell at a time, and goes on where it was stopped.

PYTHONPATH=examples python -m study
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from study.plan import FULL, TOY, Cell, Results, known_cells
from study.runner import RESULTS, study


def main() -> None:
    """Runs the study from the command line."""
    parser = argparse.ArgumentParser(
        description="Compares ways of fine-tuning under distribution shift. Can be stopped at any "
        "time: what is in the results file is not run again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--results", type=Path, default=RESULTS, help="file that cells are read from and added to")
    add("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    add(
        "--toy",
        action="store_true",
        help="every method once, in three steps: its numbers mean nothing",
    )
    add("--stages", nargs="+", help="run these only, as far as they do not wait for others")
    add(
        "--tasks",
        nargs="+",
        choices=("A", "B", "C"),
        help="settings; B and A if not given, A at toy size; C needs study.pretrain",
    )
    settings = parser.parse_args()

    scope = TOY if settings.toy else FULL
    if settings.tasks:
        prefix = "toy " if settings.toy else ""
        scope = replace(scope, tasks=tuple(prefix + name for name in settings.tasks))

    def plan(results: Results) -> list[Cell]:
        cells = known_cells(results, scope)
        return [cell for cell in cells if not settings.stages or cell.stage in settings.stages]

    study(settings.results, plan, settings.workers)
    print(f"All cells are in {settings.results}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: the next start goes on from here", file=sys.stderr)
        sys.exit(130)
