"""Functions run on several processes, which are ranks of one process group."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)

# Processes are forked from one that has imported all of this.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "tests.ranks"]
)


class Ranks:
    """Processes that run."""

    def __init__(self, processes: list[BaseProcess], folder: str) -> None:
        self.processes = processes
        self.folder = Path(folder)

    def wait(self, limit: float) -> bool:
        """Whether all end within some seconds; no longer than until one of them fails."""
        until = time.monotonic() + limit
        running = list(self.processes)
        while running and time.monotonic() < until:
            wait([process.sentinel for process in running], until - time.monotonic())
            running = [process for process in running if process.exitcode is None]
            if any(process.exitcode for process in self.processes):
                time.sleep(0.5)  # for what the others have to say
                return True
        return not running

    def results(self, limit: float) -> list[Any]:
        """What each returned. Fails the test where one fails, or is not there in time."""
        ended = self.wait(limit)
        self.kill()
        failures = [path.read_text() for path in sorted(self.folder.glob("*.failed"))]
        codes = [process.exitcode for process in self.processes]
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)
        if not ended or any(codes):
            what = "died" if ended else f"were still running after {limit} s"
            pytest.fail(f"ranks {what}: exit codes {codes}", pytrace=False)
        paths = [self.folder / f"{rank}.pt" for rank in range(len(codes))]
        return [torch.load(path, weights_only=False) for path in paths]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


@contextmanager
def ranks_running(
    size: int, work: Callable[..., Any], *args: Any, timeout: float = 60
) -> Iterator[Ranks]:
    """Call ``work(rank, *args)`` in ``size`` processes; none is left at the end of the block.

    Args:
        work: a function of a module, in which :mod:`torch.distributed` is set up with gloo.
        timeout: seconds after which a collective gives up.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks([], folder)
        try:
            for rank in range(size):
                process = _context.Process(
                    target=_run, args=(rank, size, folder, timeout, work, args)
                )
                process.start()
                ranks.processes.append(process)
            yield ranks
        finally:
            ranks.kill()


def on_ranks(
    size: int, work: Callable[..., Any], *args: Any, limit: float = 120, timeout: float = 60
) -> list[Any]:
    """What ``work(rank, *args)`` returns in each of ``size`` processes, see :func:`ranks_running`.

    Args:
        limit: seconds until all processes are killed and the test fails.
    """
    with ranks_running(size, work, *args, timeout=timeout) as ranks:
        return ranks.results(limit)


def _run(
    rank: int, size: int, folder: str, timeout: float, work: Callable[..., Any], args: tuple
) -> None:
    torch.set_num_threads(1)
    code = 0
    try:
        dist.init_process_group(
            "gloo",
            f"file://{folder}/store",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
        result = work(rank, *args)
        torch.save(result, f"{folder}/{rank}.pt")
        dist.barrier()
    except BaseException:
        code = 1
        Path(f"{folder}/{rank}.failed").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    os._exit(code)  # threads of gloo can keep a process from ending
