"""The study's pictures, drawn from the results file alone."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import write_atomically

from study.analysis import Model, curve, models
from study.plan import Results
from study.tasks import task

_OURS, _OTHERS, _WISE = "#1f77b4", "#7a7a7a", "#cf5f36"
_SHIFTS = {"ood": "other styles", "corruption": "corruptions"}


def save(figure: Figure, path: Path) -> None:
    """Writes a picture whole or not at all."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=140))
    plt.close(figure)


def plane(results: Results, name: str) -> Figure:
    """Accuracy in distribution against accuracy under both shifts, a point for each method."""
    figure, panels = plt.subplots(1, 2, figsize=(11.5, 5.2), layout="constrained")
    lines = models(results, name)
    for axes, (shift, words) in zip(panels, _SHIFTS.items(), strict=True):
        _style(axes)
        for line, colour in (("LP-FT", _WISE), ("GMixout", _OURS)):
            if line in lines:
                between = curve(results, name, line)
                axes.plot(
                    [model.mean("id") for model in between],
                    [model.mean(shift) for model in between],
                    color=colour,
                    alpha=0.45,
                    zorder=1,
                    label=f"from the probe to {line} (WiSE-FT)",
                )
        for model in lines.values():
            _point(axes, model, shift)
        axes.set_xlabel(f"in distribution: accuracy on {task(name).domain} (%)")
        axes.set_ylabel(
            f"accuracy under {words} (%)" if shift == "corruption" else f"accuracy on {words} (%)"
        )
    panels[0].legend(loc="best", frameon=False, fontsize=8)
    figure.suptitle(f"{task(name).model}: mean and 95 % interval over seeds", x=0.02, ha="left")
    return figure


def _point(axes: Axes, model: Model, shift: str) -> None:
    colour = _OURS if "GMixout" in model.name else _WISE if model.name == "WiSE-FT" else _OTHERS
    x, y = model.mean("id"), model.mean(shift)
    axes.errorbar(
        x,
        y,
        xerr=model.interval("id"),
        yerr=model.interval(shift),
        fmt="o",
        color=colour,
        markersize=6,
        elinewidth=0.8,
        alpha=0.9,
    )
    axes.annotate(
        model.name, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8, color=colour
    )


def _style(axes: Axes) -> None:
    axes.grid(color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
