"""The tables and the picture of whole training steps in docs/performance.md, from its results file.

Each line of docs/training.jsonl is what one call of
`python -m gmixout_optim.bench --training --json` printed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patheffects import withStroke
from picture import style

from gmixout_optim.bench.models import count_weights
from gmixout_optim.bench.training import Case

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = DOCS / "training.jsonl"
PICTURE = DOCS / "images" / "training.png"
OURS, THEIRS = "#1f77b4", "#7a7a7a"
_BESIDE = ("LoRA", "APOLLO", "BAdam", "GMixout, active, column")  # beside others: labelled apart


def load() -> list[dict[str, Any]]:
    """All results, in the order in which they were measured."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def title(result: dict[str, Any]) -> str:
    case = Case(**result["case"])
    return f"{case.model}, {case.form}"


def price(result: dict[str, Any], outcome: dict[str, Any]) -> tuple[float, float]:
    """Time and peak memory above the model, as ratios to plain AdamW's."""
    (plain,) = [each for each in result["outcomes"] if each["method"] == "AdamW"]
    time = outcome["step"]["plain_steps"]["median"] + outcome["redraw"]
    return time, outcome["above_model"] / plain["above_model"]


def table(result: dict[str, Any]) -> str:
    """Time with the 10th and 90th percentile of its rounds, peak and bytes, a row a method."""
    lines = [
        "| method | time of a step | peak above the model | kept, bytes per weight |",
        "|---|---|---|---|",
    ]
    weights = count_weights(result["case"]["model"])
    for outcome in filter(lambda outcome: outcome["step"], result["outcomes"]):
        time, peak = price(result, outcome)
        spread = outcome["step"]["plain_steps"]
        megabytes = outcome["above_model"] / 1e6
        kept = outcome["kept"] / weights
        lines.append(
            f"| {outcome['method']} | {time:.2f}x ({spread['low']:.2f} to {spread['high']:.2f}) | "
            f"{peak:.2f}x ({megabytes:,.0f} MB) | {kept:.2f} |"
        )
    return "\n".join(lines)


def save_picture(result: dict[str, Any], path: Path) -> None:
    """A point per method: down and to the left is cheaper."""
    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    style(axes)
    shown = [o for o in result["outcomes"] if o["step"] and price(result, o)[0] < 2]
    for outcome in shown:
        colour = OURS if outcome["method"].startswith("GMixout") else THEIRS
        x, y = price(result, outcome)
        axes.plot(x, y, "o", color=colour, markersize=9)
        beside = outcome["method"] in _BESIDE
        axes.annotate(
            outcome["method"],
            (x, y),
            textcoords="offset points",
            xytext=(9, -4) if beside else (0, 9),
            ha="left" if beside else "center",
            color=colour,
            fontweight="bold" if colour == OURS else "normal",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
    axes.margins(x=0.18, y=0.15)
    axes.set_xlabel("time of a training step, in steps of AdamW")
    axes.set_ylabel("peak memory above the model, AdamW's = 1")
    axes.set_title(title(result), loc="left")
    figure.savefig(path, dpi=160)
    plt.close(figure)


if __name__ == "__main__":
    found = load()
    save_picture(found[0], PICTURE)
    for each in found:
        print(f"{title(each)}:\n\n{table(each)}\n")
