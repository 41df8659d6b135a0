"""The study's pictures, drawn from the results file alone."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from picture import style
from results import write_atomically

from study.analysis import METHOD_NAMES, Model, curve, losses, models, why
from study.analysis import levers as all_levers
from study.plan import DEFAULTS, FULL, Results, Scope
from study.tasks import task
from study.why import SNAPSHOTS

_OURS, _OTHERS, _WISE = "#1f77b4", "#7a7a7a", "#cf5f36"
LEVERS = {
    "mask_prob": "mask_prob, p",
    "resample_every": "resample_every, k; below: subnetworks seen",
    "anchor_decay": "anchor_decay, lambda",
}
_SHIFTS = {"ood": "other styles", "corruption": "corruptions"}


def save(figure: Figure, path: Path) -> None:
    """Writes a picture whole or not at all."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=140))
    plt.close(figure)


def plane(results: Results, name: str, scope: Scope = FULL) -> Figure:
    """Accuracy in distribution against accuracy under both shifts, a point for each method."""
    figure, panels = plt.subplots(1, 2, figsize=(11.5, 5.2), layout="constrained")
    lines = models(results, name, scope=scope)
    for axes, (shift, words) in zip(panels, _SHIFTS.items(), strict=True):
        style(axes)
        for line, colour in (("WiSE-FT", _WISE), ("GMixout + WiSE-FT", _OURS)):
            if line in lines:
                between = curve(results, name, line, scope)
                axes.plot(
                    [model.mean("id") for model in between],
                    [model.mean(shift) for model in between],
                    color=colour,
                    alpha=0.45,
                    zorder=1,
                    label=f"{line}, from the probe to fine-tuned",
                )
        for model in lines.values():
            _point(axes, model, shift)
        axes.set_xlabel(f"in distribution: accuracy on {task(name).domain} (%)")
        axes.set_ylabel(
            f"accuracy under {words} (%)" if shift == "corruption" else f"accuracy on {words} (%)"
        )
    panels[0].legend(loc="best", frameon=False, fontsize=8)
    figure.suptitle(f"{task(name).model}: mean and 95 % interval over seeds", x=0.02, ha="left")
    for axes, shift in zip(panels, _SHIFTS, strict=True):
        _label(axes, list(lines.values()), "id", shift)
    return figure


# Where a label may stand, in points from what it names, the first that is free.
_PLACES = [
    (x, y) for far in (1, 2.2, 3.5, 5) for x in (6 * far, -6 * far) for y in (5 * far, -11 * far)
]


def _label(axes: Axes, lines: list[Model], x: str, y: str) -> None:
    """Names the points, without writing one name over another. Once all else is drawn."""
    canvas = FigureCanvasAgg(axes.get_figure(root=True))
    canvas.draw()
    renderer = canvas.get_renderer()
    points = [(model.mean(x), model.mean(y)) for model in lines]
    taken = [Bbox.from_bounds(*axes.transData.transform(point) - 5, 10, 10) for point in points]
    if axes.get_legend() is not None:
        taken.append(axes.get_legend().get_window_extent())
    for model, point in zip(lines, points, strict=True):
        for place in _PLACES:
            text = axes.annotate(
                model.name,
                point,
                textcoords="offset points",
                xytext=place,
                ha="left" if place[0] > 0 else "right",
                fontsize=8,
                color=_colour(model),
                arrowprops={"arrowstyle": "-", "color": "#cccccc", "linewidth": 0.6},
            )
            text.set_in_layout(False)
            text.update_positions(renderer)
            box = Text.get_window_extent(text)  # without the line to the point
            inside = axes.bbox.x0 <= box.x0 and axes.bbox.y0 <= box.y0 and box.x1 <= axes.bbox.x1
            if place == _PLACES[-1] or (inside and not any(box.overlaps(t) for t in taken)):
                taken.append(box)
                break
            text.remove()


def _colour(model: Model) -> str:
    return _OURS if "GMixout" in model.name else _WISE if model.name == "WiSE-FT" else _OTHERS


def _point(axes: Axes, model: Model, shift: str) -> None:
    x, y = model.mean("id"), model.mean(shift)
    axes.errorbar(
        x,
        y,
        xerr=model.interval("id"),
        yerr=model.interval(shift),
        fmt="o",
        color=_colour(model),
        markersize=6,
        elinewidth=0.8,
        alpha=0.9,
    )


def levers(results: Results, name: str, scope: Scope = FULL) -> Figure:
    """Accuracy against each lever alone, the others at their defaults; the bare optimizer
    dotted."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained", sharey=True)
    for axes, (key, words) in zip(panels, LEVERS.items(), strict=True):
        style(axes)
        bare, ours, *others = all_levers(results, name, key, scope)
        points = {DEFAULTS[key]: ours}
        for model in others:
            points[model.rows[0]["cell"]["settings"][key]] = model
        for what, colour in (("id", _OTHERS), ("ood", _OURS), ("corruption", _WISE)):
            places = sorted(points)
            axes.errorbar(
                range(len(places)),
                [points[place].mean(what) for place in places],
                yerr=[_bar(points[place], what) for place in places],
                fmt="o-",
                color=colour,
                markersize=4,
                elinewidth=0.8,
                label={"id": "ID", "ood": "OOD", "corruption": "corrupted"}[what],
            )
            axes.axhline(bare.mean(what), color=colour, linestyle=":", linewidth=1)
        labels = [f"{place:g}" for place in places]
        if key == "resample_every":
            steps = task(name).steps
            labels = [f"{place:g}\n{math.ceil(steps / place)}" for place in places]
        axes.set_xticks(range(len(places)), labels)
        axes.set_xlabel(words)
    panels[0].set_ylabel("accuracy (%)")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{task(name).model}; dotted: without GMixout", x=0.02, ha="left")
    return figure


def warmup(results: Results, name: str, scope: Scope = FULL) -> Figure:
    """The training loss of the live weights, step by step, with and without a warm-up in
    episodes."""
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    style(axes)
    curves = losses(results, name, scope)
    for (words, values), colour in zip(curves.items(), (_OURS, _WISE), strict=True):
        axes.plot(range(1, len(values) + 1), values, color=colour, label=words, linewidth=1.2)
    k = DEFAULTS["resample_every"]
    for end in range(k, len(values), k):
        axes.axvline(end + 0.5, color="#dddddd", linewidth=0.8, zorder=0)
    axes.set_xlabel("step; grey: an episode begins")
    axes.set_ylabel("training loss")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _bar(model: Model, what: str) -> float:
    """Half an error bar; none of two seeds, whose interval says nothing."""
    half = model.interval(what)
    return 0.0 if half is None or len(model.measured) < 3 else half


def distance(results: Results, name: str, scope: Scope = FULL) -> Figure:
    """How far from the pretrained weights the methods end, and what they gain and lose there."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    lines = list(models(results, name, scope=scope).values())
    for axes, (what, words) in zip(
        panels, {"id": "in distribution", "ood": "on other styles"}.items(), strict=True
    ):
        style(axes)
        for model in lines:
            axes.plot(model.mean("distance"), model.mean(what), "o", color=_colour(model))
        axes.set_xlabel("distance |w - w0| / |w0| of the backbone")
        axes.set_ylabel(f"accuracy {words} (%)")
    for axes, what in zip(panels, ("id", "ood"), strict=True):
        _label(axes, lines, "distance", what)
    return figure


def errors(results: Results, name: str, scope: Scope = FULL) -> Figure:
    """Bias, variance and covariance of the errors of snapshots, stacked as they add up."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    rows = why(results, name, scope)
    for axes, shift in zip(panels, ("id", "ood"), strict=True):
        style(axes)
        for place, row in enumerate(rows):
            terms, bottom = row["errors"][shift], 0.0
            parts = {
                "bias": terms["bias"],
                "variance / M": terms["variance"] / SNAPSHOTS,
                "covariance": (SNAPSHOTS - 1) / SNAPSHOTS * terms["covariance"],
            }
            for (part, value), colour in zip(parts.items(), (_OTHERS, _WISE, _OURS), strict=True):
                axes.bar(place, value, bottom=bottom, color=colour, label=None if place else part)
                bottom += value
            axes.plot(
                place,
                terms["error"],
                "k_",
                markersize=22,
                label=None if place else "average of weights",
            )
        axes.set_xticks(range(len(rows)), [METHOD_NAMES[row["cell"]["method"]] for row in rows])
        axes.set_title(
            {"id": "in distribution", "ood": "other styles"}[shift], loc="left", fontsize=10
        )
    panels[0].set_ylabel("squared error of the probabilities")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def paths(results: Results, name: str, scope: Scope = FULL) -> Figure:
    """Accuracy on straight lines between pretrained, deployed and live weights, late in an
    episode."""
    figure, panels = plt.subplots(1, 3, figsize=(12.5, 3.8), layout="constrained")
    colours = (_OTHERS, _WISE, _OURS)
    words = {"id": "in distribution", "ood": "on other styles"}
    for axes, what in zip(panels, words, strict=False):
        for row, colour in zip(why(results, name, scope), colours, strict=True):
            method = row["cell"]["method"]
            for end, dashes in (("live", "--"), ("deployed", "-")):
                if end == "live" and method == "lp_ft":
                    continue  # it deploys the weights that it trains
                axes.plot(
                    row["path"]["shares"],
                    [point[what] for point in row["path"][end]],
                    dashes,
                    color=colour,
                    label=f"{METHOD_NAMES[method]}, {end}",
                )
        axes.set_xlabel("share of the way from the pretrained weights")
    panels[0].legend(frameon=False, fontsize=8)
    for row, colour in zip(why(results, name, scope), colours, strict=True):
        if row["cell"]["method"] != "lp_ft":
            for what, dashes in (("id", "-"), ("ood", ":")):
                panels[2].plot(
                    row["path"]["shares"],
                    [point[what] for point in row["path"]["between"]],
                    dashes,
                    color=colour,
                    label=f"{METHOD_NAMES[row['cell']['method']]}, {words[what]}",
                )
    panels[2].set_xlabel("share of the way from deployed to live")
    panels[2].legend(frameon=False, fontsize=8)
    for axes, title in zip(panels, [*words.values(), "from deployed to live"], strict=True):
        style(axes)
        axes.set_title(title, loc="left", fontsize=10)
    panels[0].set_ylabel("accuracy (%)")
    return figure
