"""The command's options, checked before any work."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gmixout_optim.bench.bases import BASES
from gmixout_optim.bench.machine import free_bytes
from gmixout_optim.bench.models import MODELS, find_model
from gmixout_optim.bench.speed import bytes_needed
from gmixout_optim.bench.subject import Setting, Subject
from gmixout_optim.cells import Granularity
from gmixout_optim.settings import check_granularity

PROGRAM = "python -m gmixout_optim.bench"


@dataclass(frozen=True)
class Options:
    """What to measure and how to show it."""

    command: str
    subject: Subject
    settings: list[Setting]
    resample_every: int
    rounds: int
    batch_size: int
    threads: int
    with_speed: bool
    with_memory: bool
    json: bool

    @property
    def memory_settings(self) -> list[Setting | None]:
        """The training loops: plain, and each density and gradient layout at the first granularity,
        not compiled."""
        if not self.with_memory:
            return []
        first = self.settings[0].granularity
        return [None, *(s for s in self.settings if s.granularity == first and not s.compiled)]


def read_options(arguments: Sequence[str]) -> Options:
    """Exits with a message where an option is wrong or the speed part would not fit into memory."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    device = given.device
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"argument --device: {device}: torch sees no CUDA device")
    subject = Subject(given.model, given.base, given.dtype, str(device))
    settings = [
        Setting(density, granularity, grad_layout, given.stochastic_rounding, compiled)
        for density in given.density
        for granularity in given.granularity
        for grad_layout in given.grad_layout
        for compiled in ((False, True) if given.compile else (False,))
    ]
    free = free_bytes(subject.device)
    needed = 0 if given.only_memory else bytes_needed(subject, settings)
    if free is not None and needed > free:
        parser.error(
            f"--model {given.model} in {given.dtype} needs about {needed / 1e9:.1f} GB on {device} "
            f"for both optimizers at once, {free / 1e9:.1f} GB are free: choose a smaller model, a "
            "narrower --dtype, or --only-memory"
        )
    return Options(
        command=shlex.join([*PROGRAM.split(), *arguments]),
        subject=subject,
        settings=settings,
        resample_every=given.resample_every,
        rounds=given.rounds,
        batch_size=given.batch_size,
        threads=torch.get_num_threads(),
        with_speed=not given.only_memory,
        with_memory=not given.no_memory,
        json=given.json,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="What GMixoutOptimizer costs against the optimizer that it wraps: time, bytes, "
        "traffic, peak memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model",
        type=model_name,
        default="vit_b_16",
        help=f"{', '.join(MODELS)}, or a number of weights such as 1e6 for an MLP",
    )
    add(
        "--base",
        choices=BASES,
        default="adamw",
        help="the optimizer that is wrapped, and compared with",
    )
    add(
        "--density",
        type=density,
        nargs="+",
        default=[0.1],
        metavar="D",
        help="share of the weights that trains, 1 - p",
    )
    add_cells(parser, ["dense", "packed"])
    add_training(parser)
    add(
        "--stochastic-rounding",
        action="store_true",
        help="how parameters below float32 are written",
    )
    add(
        "--compile",
        action="store_true",
        help="measure the compiled step too (it takes minutes to compile)",
    )
    add("--rounds", type=rounds, default=30, help="measured steps of each optimizer")
    add(
        "--batch-size",
        type=positive,
        default=1,
        help="of the training loop whose peak memory is measured",
    )
    add(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda",
    )
    add("--threads", type=positive, help="of the CPU; None leaves it to torch")
    add("--json", action="store_true", help="print JSON instead of tables")
    add(
        "--training",
        action="store_true",
        help="measure whole training steps instead, beside other methods: see --training --help",
    )
    add(
        "--plan-gpu",
        metavar="DEVICE",
        help="calculate what a step costs on h100, a100 or 4090 instead; --plan-gpu h100 --help",
    )
    add(
        "--plan",
        action="store_true",
        help="calculate what training on many ranks costs in bytes instead; --plan --help",
    )
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--no-memory", action="store_true", help="leave out the training loops")
    parts.add_argument(
        "--only-memory", action="store_true", help="run nothing but the training loops"
    )
    return parser


def add_cells(parser: argparse.ArgumentParser, grad_layouts: list[str]) -> None:
    """The options of the wrapper of which there may be several; ``grad_layouts`` are a default."""
    parser.add_argument(
        "--granularity",
        type=_granularity,
        nargs="+",
        default=["element", 16, "column", "row"],
        metavar="G",
        help="element, column, row, or a number of elements",
    )
    parser.add_argument(
        "--grad-layout",
        choices=("dense", "packed"),
        nargs="+",
        default=grad_layouts,
        help="how gradients are kept",
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """What is trained, and how often index sets are redrawn."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the parameters",
    )
    parser.add_argument(
        "--resample-every",
        type=positive,
        default=20,
        metavar="K",
        help="steps over which a redraw is spread",
    )


def model_name(text: str) -> str:
    try:
        find_model(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def density(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"density must be a number in (0, 1], got {text!r}")
    return share


def _granularity(text: str) -> Granularity:
    try:
        return check_granularity(int(text) if text.lstrip("-").isdigit() else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"device must be cpu or cuda, got {text!r}")
    return device


def positive(text: str) -> int:
    return _at_least(1, text)


def rounds(text: str) -> int:
    return _at_least(2, text)  # a spread needs two


def _at_least(least: int, text: str) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least {least}, got {text!r}"
        )
    return int(text)
