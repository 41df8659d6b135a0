"""Runs cells in processes of one thread each, and keeps every one that is done."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from tqdm import tqdm

from study import cells
from study.plan import Cell, Results, Row

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS = DOCS / "robustness.jsonl"


def load(path: Path) -> Results:
    """The results so far. A last line that was cut off by a kill counts as not run."""
    results = Results()
    for line in _whole_lines(path):
        results.add(json.loads(line))
    return results


def _whole_lines(path: Path) -> list[str]:
    return path.read_text().split("\n")[:-1] if path.exists() else []


def _drop_cut_off_line(path: Path) -> None:
    """To append after. Only the study itself may: a reader could meet a line in the making."""
    if path.exists() and not path.read_text().endswith("\n"):
        path.write_text("".join(line + "\n" for line in _whole_lines(path)))


def append(path: Path, row: Row) -> None:
    """Adds a line to the results file, on the disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def study(path: Path, plan: Callable[[Results], list[Cell]], workers: int) -> Results:
    """Runs what `plan` asks for, given the results so far, until it asks for nothing more."""
    _drop_cut_off_line(path)
    results = load(path)
    running: dict[Future[Row], Cell] = {}
    context = multiprocessing.get_context("spawn")  # a fork of a threaded process may hang
    with (
        tqdm(unit="cell", desc="study") as progress,
        ProcessPoolExecutor(workers, context, _begin, (os.getpid(),)) as executor,
    ):
        try:
            while True:
                started = {cell.key for cell in running.values()}
                planned = {cell.key: cell for cell in plan(results)}
                progress.total = len(planned)  # grows where a stage decides the next
                progress.n = sum(key in results.rows for key in planned)
                progress.refresh()
                waiting = [
                    cell
                    for key, cell in planned.items()
                    if key not in results.rows and key not in started
                ]
                for cell in waiting[: workers - len(running)]:
                    running[executor.submit(cells.run, cell)] = cell
                if not running:
                    return results
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    cell = running.pop(future)
                    row = future.result()
                    append(path, row)
                    results.add(row)
                    progress.set_postfix_str(f"{cell.stage} {cell.task} {cell.method}")
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _begin(parent: int) -> None:
    """Of a worker: one thread, and its end when the study has been killed."""
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
