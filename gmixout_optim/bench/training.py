"""Whole training steps, forward, backward and optimizer: ``python -m gmixout_optim.bench
--training``.

Each method's steps take turns with plain AdamW's in one process, and its peak memory is that of a
process of its own. As a command it takes a :class:`Case` in JSON and a method, trains, and prints
what that took.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch.optim import Optimizer

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.bench import options
from gmixout_optim.bench.machine import machine_facts, proc_field
from gmixout_optim.bench.memory import peak_bytes, run_child
from gmixout_optim.bench.methods import METHODS, kept_bytes, why_missing
from gmixout_optim.bench.models import count_weights, find_model
from gmixout_optim.bench.models.workload import Workload
from gmixout_optim.bench.progress import Progress
from gmixout_optim.bench.table import NOTHING, pipe_table
from gmixout_optim.bench.timing import Cost, Turn, take_turns

PLAIN = "AdamW"
RESAMPLE_EVERY = 20
STEPS = 3  # in the process whose memory is measured


@dataclass(frozen=True)
class Case:
    """What is trained: a model by name, and how."""

    model: str
    batch_size: int
    autocast: bool
    compiled: bool
    device_name: str
    threads: int

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_name)

    @property
    def form(self) -> str:
        """All but the model and the machine, for people."""
        precision = "bfloat16 autocast" if self.autocast else "float32"
        compiled = ", model compiled" if self.compiled else ""
        return f"batch size {self.batch_size}, {precision}{compiled}"


@dataclass(frozen=True)
class Outcome:
    """What a method came to.

    Attributes:
        step: one step in ms, and in AdamW's steps of the same rounds.
        redraw: what an episode's end adds to each of its 20 steps, in AdamW's steps.
        above_model: the most bytes that its process had above those with the model alone.
        kept: bytes between two steps beside the model's weights, gradients in place.
        error: why there is none of that.
    """

    method: str
    step: Cost | None = None
    redraw: float = 0.0
    above_model: int | None = None
    kept: int | None = None
    error: str | None = None


class Side:
    """A model and its optimizer, to be stepped. Its episodes end when they are asked to."""

    def __init__(self, case: Case, method: str) -> None:
        torch.manual_seed(0)
        self.case = case
        with case.device:
            self.model: Workload = find_model(case.model)()
            self.inputs, self.targets = self.model.batch(case.batch_size)
        self.model_bytes = _resident(case.device)
        self.optimizer: Optimizer = METHODS[method](self.model)
        self.loss: Callable[..., Any] = self.model.loss
        if case.compiled:
            self.loss = torch.compile(self.model.loss)

    def backward(self) -> None:
        case = self.case
        with torch.autocast(case.device.type, torch.bfloat16, enabled=case.autocast):
            loss = self.loss(self.inputs, self.targets)
        loss.backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def redraw(self) -> None:
        if isinstance(self.optimizer, GMixoutOptimizer):
            self.optimizer.resample()


def measure(
    case: Case, methods: Sequence[str], rounds: int, begin: Callable[[str], None]
) -> list[Outcome]:
    outcomes = []
    memory = {}
    for method in methods:
        begin(f"{method}, memory")
        memory[method] = _memory_of(case, method)
    begin(PLAIN)
    plain = Side(case, PLAIN)
    for method in methods:
        begin(f"{method}, time")
        above, kept, error = memory[method]
        if error is not None:
            outcomes.append(Outcome(method, error=error))
            continue
        ours = plain if method == PLAIN else Side(case, method)
        turns = [Turn(plain.step), Turn(ours.step)]
        times = take_turns(rounds, turns, case.device)
        redraws = [0.0]
        if isinstance(ours.optimizer, GMixoutOptimizer):
            turns = [Turn(ours.redraw, prepare=ours.backward)]
            (redraws,) = take_turns(3, turns, case.device)
        share = median(redraws) / RESAMPLE_EVERY / median(times[0])
        outcomes.append(Outcome(method, Cost.of(times[1], times[0]), share, above, kept))
        del ours, turns
        gc.collect()
    return outcomes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the other methods print and warn of."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _memory_of(case: Case, method: str) -> tuple[int | None, int | None, str | None]:
    """``above_model``, ``kept`` and ``error``."""
    given = json.dumps(asdict(case)), method
    found, error = run_child("gmixout_optim.bench.training", *given)
    above, kept = found or (None, None)
    return above, kept, error


def _train(case: Case, method: str) -> tuple[int, int]:
    """Train in this process."""
    torch.set_num_threads(case.threads)
    side = Side(case, method)
    for _ in range(STEPS):
        side.step()
        side.redraw()
    side.backward()
    side.optimizer.step()
    return peak_bytes(case.device) - side.model_bytes, kept_bytes(side.model, side.optimizer)


def _resident(device: torch.device) -> int:
    """Bytes that the process has now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    kibibytes = proc_field("/proc/self/status", "VmRSS")
    return peak_bytes(device) if kibibytes is None else 1024 * int(kibibytes.split()[0])


def table(case: Case, outcomes: Sequence[Outcome], rounds: int) -> str:
    weights = count_weights(case.model)
    plain = next((o.above_model for o in outcomes if o.method == PLAIN), None)
    rows = []
    for one in outcomes:
        if one.step is None or one.above_model is None or one.kept is None:
            rows.append([one.method, f"failed: {one.error}", *[NOTHING] * 3])
            continue
        ratio, ms = one.step.plain_steps, one.step.ms
        rows.append(
            [
                one.method,
                f"{ratio.median + one.redraw:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})",
                f"{ms.median:,.0f}",
                f"{one.above_model / 1e6:,.0f}"
                + (f" ({one.above_model / plain:.2f}x)" if plain else ""),
                f"{one.kept / weights:.2f}",
            ]
        )
    header = ["method", "time of a step", "ms", "peak above the model, MB", "bytes kept per weight"]
    facts = machine_facts(case.device)
    return (
        f"{case.model}, {weights:,} weights, {case.form}\n"
        f"{', '.join(f'{key} {fact}' for key, fact in facts.items())}\n\n"
        f"Whole training steps, in turns with plain AdamW: median of {rounds} rounds (10th to 90th "
        f"percentile),\nwith a share of a redraw every {RESAMPLE_EVERY} steps. Peak memory above "
        "that with the model alone, of a process each.\nKept between two steps beside the weights: "
        "gradients, optimizer, adapters.\n\n"
    ) + pipe_table(header, rows)


def main(arguments: Sequence[str]) -> int:
    """Returns 1 where a method failed, with the reason in the output."""
    given = _parser().parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    case = Case(
        given.model,
        given.batch_size,
        given.autocast,
        given.compile_model,
        str(given.device),
        torch.get_num_threads(),
    )
    missing = {name: why for name in given.methods if (why := why_missing(name))}
    methods = [name for name in given.methods if name not in missing]
    with Progress(2 * len(methods) + 1) as progress, _quiet():
        outcomes = measure(case, methods, given.rounds, progress.begin)
    if given.json:
        facts = machine_facts(case.device)
        found = dict(
            machine=facts,
            case=asdict(case),
            rounds=given.rounds,
            outcomes=list(map(asdict, outcomes)),
        )
        print(json.dumps(found))
    else:
        print(table(case, outcomes, given.rounds))
        for name, why in missing.items():
            print(f"{name} is left out: {why}")
    return 1 if any(outcome.error for outcome in outcomes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{options.PROGRAM} --training",
        description="What whole training steps cost: GMixout, plain AdamW, and other ways to save "
        "memory that are installed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--training", action="store_true", help=argparse.SUPPRESS)
    add("--model", type=options.model_name, default="vit_b_16", help="as without --training")
    add("--batch-size", type=options.positive, default=2, help="of a step")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what is compared")
    add("--autocast", action="store_true", help="forward in bfloat16 where autocast has it so")
    add("--compile-model", action="store_true", help="of all methods, with torch.compile")
    add("--rounds", type=options.rounds, default=12, help="measured steps of each method")
    add(
        "--device",
        type=options.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda",
    )
    add("--threads", type=options.positive, help="of the CPU; None leaves it to torch")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


if __name__ == "__main__":
    print(json.dumps(_train(Case(**json.loads(sys.argv[1])), sys.argv[2])))
