"""What came out: accuracies and their differences, as a table and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gmixout_optim import GMixoutOptimizer


@dataclass(frozen=True)
class Scores:
    """Which test emoji were classified correctly in one domain."""

    emoji: Tensor  # int64 [N]
    correct: Tensor  # bool [N]

    @property
    def accuracy(self) -> float:
        """In %."""
        return 100 * self.correct.double().mean().item()


@dataclass(frozen=True)
class Run:
    """One trained model."""

    seed: int | None
    seconds: float
    optimizer_bytes: int
    scores: dict[str, Scores]  # by domain

    def accuracy(self, domains: Sequence[str]) -> float:
        """Mean over domains, in %."""
        return sum(self.scores[domain].accuracy for domain in domains) / len(domains)


@dataclass
class Method:
    """One way to adapt the model, run with one or more seeds."""

    name: str
    runs: list[Run] = field(default_factory=list)

    def accuracy(self, domains: Sequence[str]) -> float:
        """Mean over runs and domains, in %."""
        return sum(run.accuracy(domains) for run in self.runs) / len(self.runs)

    def per_emoji(self, domains: Sequence[str]) -> Tensor:
        """Each emoji's accuracy over runs and domains, in %; NaN for emoji that were not tested."""
        scores = [run.scores[domain] for run in self.runs for domain in domains]
        size = 1 + max(int(score.emoji.max()) for score in scores)
        total, count = torch.zeros(2, size, dtype=torch.double)
        for score in scores:
            total.index_add_(0, score.emoji, 100 * score.correct.double())
            count.index_add_(0, score.emoji, torch.ones(len(score.emoji), dtype=torch.double))
        return total / count


@dataclass(frozen=True)
class Results:
    """All methods, tested in the domain trained on (in-distribution) and in the shifted ones."""

    id_domain: str
    shifted: tuple[str, ...]
    methods: list[Method]

    def difference(self, a: Method, b: Method, domains: Sequence[str]) -> tuple[float, float]:
        """Accuracy of `a` minus that of `b`, with its standard error, in points.

        The methods are tested on the same emoji and compared emoji by emoji, which is surer than
        either accuracy alone. An emoji is one observation, however many domains show it.
        """
        gain = a.accuracy(domains) - b.accuracy(domains)
        return gain, _standard_error(a.per_emoji(domains) - b.per_emoji(domains))

    def describe_difference(self, a: Method, b: Method) -> str:
        """The difference in and out of distribution, in a line."""
        id_gain, id_error = self.difference(a, b, [self.id_domain])
        ood_gain, ood_error = self.difference(a, b, self.shifted)
        return (
            f"{a.name} against {b.name}: {id_gain:+.1f} ± {id_error:.1f} in-distribution, "
            f"{ood_gain:+.1f} ± {ood_error:.1f} under shift"
        )

    def table(self) -> str:
        """Accuracy in %, training time per run, and what the optimizer keeps beside the model."""
        header = ["method", "ID", "OOD mean", *self.shifted, "seconds", "optimizer"]
        rows = [
            header,
            ["", self.id_domain, f"of {len(self.shifted)}", *[""] * len(self.shifted), "", "MB"],
        ]
        for method in self.methods:
            accuracies = [
                method.accuracy([self.id_domain]),
                method.accuracy(self.shifted),
                *(method.accuracy([domain]) for domain in self.shifted),
            ]
            seconds = sum(run.seconds for run in method.runs) / len(method.runs)
            megabytes = max(run.optimizer_bytes for run in method.runs) / 1e6
            rows.append(
                [method.name]
                + [f"{accuracy:.1f}" for accuracy in accuracies]
                + [f"{seconds:.0f}", f"{megabytes:.1f}" if megabytes else "-"]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows
        ]
        return "\n".join([*lines[:2], "-" * max(map(len, lines)), *lines[2:]])

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts."""
        return {
            "id_domain": self.id_domain,
            "shifted_domains": list(self.shifted),
            "methods": [
                {
                    "name": method.name,
                    "id_accuracy": method.accuracy([self.id_domain]),
                    "ood_accuracy": method.accuracy(self.shifted),
                    "runs": [
                        {
                            "seed": run.seed,
                            "seconds": run.seconds,
                            "optimizer_bytes": run.optimizer_bytes,
                            "accuracy": {
                                domain: score.accuracy for domain, score in run.scores.items()
                            },
                        }
                        for run in method.runs
                    ],
                }
                for method in self.methods
            ],
        }

    def save_json(self, path: Path, settings: dict[str, Any]) -> None:
        """The settings and all accuracies."""
        text = json.dumps({"settings": settings, **self.to_dict()}, indent=2, default=str) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Whoever reads `path`, even after an interrupt, finds the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the optimizer keeps beside the model and its gradients."""
    if isinstance(optimizer, GMixoutOptimizer):
        return optimizer.report().total("bytes")
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _standard_error(values: Tensor) -> float:
    values = values[~values.isnan()]
    return (values.std() / len(values) ** 0.5).item()
