"""All that one run of the command found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gmixout_optim.bench.machine import machine_facts
from gmixout_optim.bench.memory import Peak
from gmixout_optim.bench.models import count_weights
from gmixout_optim.bench.options import Options
from gmixout_optim.bench.speed import Speed


@dataclass(frozen=True)
class Result:
    """``peaks`` is empty and ``speed`` None where they were left out."""

    options: Options
    peaks: list[Peak]
    speed: Speed | None

    @property
    def weights(self) -> int:
        """How many the model has."""
        return count_weights(self.options.subject.model)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        subject = self.options.subject
        return {
            "machine": machine_facts(subject.device),
            "weights": self.weights,
            "base": subject.base_title(),
            **asdict(self),
        }
