"""The picture: accuracy in-distribution against accuracy under shift."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files, also where there is no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from results import Results, write_atomically

_COLOURS = ("#7a7a7a", "#cf5f36", "#1f77b4")


def save_picture(path: Path, results: Results, caption: str) -> None:
    """A labelled point per method: up and to the right is better. Small dots are single seeds."""
    figure, axes = plt.subplots(figsize=(7.2, 5.0), layout="constrained")
    style(axes)
    for method, colour in zip(results.methods, _COLOURS, strict=True):
        by_run = [
            (run.accuracy([results.id_domain]), run.accuracy(results.shifted))
            for run in method.runs
        ]
        x, y = (sum(values) / len(values) for values in zip(*by_run, strict=True))
        axes.plot(
            *zip(*by_run, strict=True), "o", color=colour, markersize=5, alpha=0.4, mew=0, zorder=4
        )
        axes.plot(x, y, "o", color=colour, markersize=12)
        axes.annotate(
            f"{method.name}\n{x:.1f} in, {y:.1f} under shift",
            (x, y),
            textcoords="offset points",
            xytext=(0, 13),
            ha="center",
            color=colour,
            fontweight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
    axes.margins(x=0.3, y=0.25)  # room for the labels
    axes.set_xlabel(f"in-distribution: accuracy on {results.id_domain} (%)")
    axes.set_ylabel(f"under shift: mean over {len(results.shifted)} other styles (%)")
    axes.set_title(f"Fine-tuned on {results.id_domain}, tested on unseen emoji", loc="left")
    figure.supxlabel(caption, fontsize=8.5, color="#666666", x=0.02, ha="left")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=160))
    plt.close(figure)


def style(axes: Axes) -> None:
    """A pale grid behind the points, no frame."""
    axes.grid(color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
