"""Writes docs/robustness.md and its pictures from the results file.

The page is `robustness.md.in` beside this file, with calls as `{{table B}}` where numbers belong:

    PYTHONPATH=examples python -m study.report
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from study import analysis, figures, plan
from study.analysis import MEASURES, Model
from study.plan import FULL, Results, Scope
from study.runner import DOCS, RESULTS, load
from study.tasks import task as task_named

TEMPLATE = Path(__file__).with_name("robustness.md.in")
NOT_RUN = "*Not run yet.*"
_HEADS = {"id": "ID", "ood": "OOD", "corruption": "corrupted"}
_SUMMARY = (
    "linear probe",
    "full fine-tuning",
    "LP-FT",
    "GMixout, one line",
    "GMixout + WiSE-FT",
    "weight EMA",
    "WiSE-FT",
    "greedy soup",
)
_TERMS = ("bias", "variance", "covariance", "sum", "error")
PAGE = DOCS / "robustness.md"


class Report:
    """The functions that the page may call. Those that need cells which were not run say so."""

    def __init__(self, results: Results, scope: Scope = FULL) -> None:
        self.results = results
        self.scope = scope

    def table(self, task: str, stage: str = "final") -> str:
        """Accuracies of all methods, with differences to LP-FT."""
        lines = analysis.models(self.results, task, stage, self.scope)
        if "LP-FT" not in lines:
            return NOT_RUN
        what = ["id", "many", "medium", "few", "ood"] if stage == "imbalance" else [*MEASURES]
        compared = MEASURES if stage == "final" else ("id", "ood")
        header = ["method", *(_HEADS.get(each, each) for each in what)]
        header += [f"{_HEADS[each]} against LP-FT" for each in compared]
        rows = [
            [
                name,
                *(_with_interval(model, each) for each in what),
                *(
                    "" if name == "LP-FT" else _difference(model, lines["LP-FT"], each)
                    for each in compared
                ),
            ]
            for name, model in lines.items()
        ]
        return _markdown(header, rows)

    def costs(self, task: str) -> str:
        """Memory of each method, and the trainings that it takes."""
        lines = analysis.models(self.results, task, scope=self.scope)
        if "LP-FT" not in lines:
            return NOT_RUN
        rows = [
            [name, str(model.runs), f"{_kept(model) / 1e6:.0f} MB"]
            for name, model in lines.items()
            if model.runs
        ]
        return _markdown(["method", "trainings", "kept beside weights and gradients"], rows)

    def against(self, task: str, name: str) -> str:
        """Paired differences of a line to full fine-tuning, LP-FT and the best competitors."""
        lines = analysis.models(self.results, task, scope=self.scope)
        if name not in lines or "LP-FT" not in lines:
            return NOT_RUN
        others: dict[str, list[str]] = {"full fine-tuning": [], "LP-FT": []}
        for what in MEASURES:
            best = analysis.best_competitor(lines, lambda model, what=what: model.mean(what))  # type: ignore[misc]
            others.setdefault(best.name, []).append(_HEADS[what])
        rows = [
            [
                f"{other}, the best on {' and '.join(best)}" if best else other,
                *(_difference(lines[name], lines[other], each) for each in MEASURES),
            ]
            for other, best in others.items()
            if other in lines
        ]
        return _markdown([f"{name} against", *(_HEADS[each] for each in MEASURES)], rows)

    def tuning(self, task: str) -> str:
        """What each method was tuned over, and what won."""
        rows = []
        for method in plan.TUNED:
            winner = plan.chosen(self.results, task, method, self.scope.choices)
            tried = "; ".join(_words(settings) for settings in plan.grid(task, method))
            rows.append(
                [method.replace("_", " "), tried, _words(winner) if winner is not None else ""]
            )
        return _markdown(["method", "tried", "chosen"], rows)

    def levers(self, task: str, sweep: str) -> str:
        """The bare optimizer, the defaults, and the settings of a sweep: means over seeds."""
        return _beside(analysis.levers(self.results, task, sweep, self.scope), 1)

    def attempts(self, task: str) -> str:
        """What was tried to make GMixout better."""
        return _beside(analysis.attempts(self.results, task, self.scope), 0)

    def schedules(self, task: str) -> str:
        """Other schedules, with differences to LP-FT on the same."""
        found = analysis.schedules(self.results, task, self.scope)
        if len(found) <= len(plan.PLAIN_SCHEDULES):
            return NOT_RUN
        rows = [
            [
                shape,
                model.name,
                *(_with_interval(model, each) for each in MEASURES),
                *("" if model is lp_ft else _difference(model, lp_ft, each) for each in MEASURES),
            ]
            for shape, (lp_ft, *others) in found.items()
            for model in (lp_ft, *others)
        ]
        heads = [_HEADS[each] for each in MEASURES]
        return _markdown(
            ["learning rate", "method", *heads, *(f"{head} against LP-FT" for head in heads)], rows
        )

    def few_attempts(self, task: str) -> str:
        """The same where a training takes minutes."""
        return _beside(analysis.few_attempts(self.results, task, self.scope), 1)

    def longer(self, task: str) -> str:
        """Runs of several times as many steps."""
        rows = [
            [model.name, *(f"{model.mean(each):.1f}" for each in MEASURES)]
            for model in analysis.longer(self.results, task)
        ]
        return _markdown(["", "ID", "OOD", "corrupted"], rows) if rows else NOT_RUN

    def errors(self, task: str) -> str:
        """Bias, variance, covariance and locality of snapshots."""
        rows = []
        for row in analysis.why(self.results, task, self.scope):
            for shift in ("id", "ood"):
                terms = row["errors"][shift]
                rows.append(
                    [
                        f"{analysis.METHOD_NAMES[row['cell']['method']]}, {shift.upper()}",
                        *(f"{terms[name]:.3f}" for name in _TERMS),
                        f"{row['errors']['weights']['locality']:.4f}",
                    ]
                )
        return _markdown(["", *_TERMS, "locality"], rows) if rows else NOT_RUN

    def distances(self, task: str) -> str:
        """How far from the pretrained weights each method ends."""
        lines = analysis.models(self.results, task, scope=self.scope)
        rows = [
            [
                name,
                f"{model.mean('distance'):.4f}",
                f"{model.mean('id'):.1f}",
                f"{model.mean('ood'):.1f}",
            ]
            for name, model in lines.items()
        ]
        return _markdown(["", "distance", "ID", "OOD"], rows) if rows else NOT_RUN

    def summary(self, task: str) -> str:
        """The lines of the final table that README shows."""
        lines = analysis.models(self.results, task, scope=self.scope)
        if any(name not in lines for name in _SUMMARY):
            return NOT_RUN
        rows = [
            [name, str(lines[name].runs), *(_with_interval(lines[name], each) for each in MEASURES)]
            for name in _SUMMARY
        ]
        for shape, (lp_ft, _, ours) in analysis.schedules(self.results, task, self.scope).items():
            if shape in plan.PLAIN_SCHEDULES:
                rows += [
                    [f"{model.name}: {shape}", "1", *(_with_interval(model, m) for m in MEASURES)]
                    for model in (lp_ft, ours)
                ]
        return _markdown(["method", "trainings", *(_HEADS[each] for each in MEASURES)], rows)

    def cells(self) -> str:
        """How many cells the study has."""
        return str(sum(1 for _ in plan.known_cells(self.results, self.scope)))

    def model(self, task: str) -> str:
        """The pretrained model, in words."""
        return task_named(task).model

    def steps(self, task: str) -> str:
        """Optimizer steps of a training."""
        return str(task_named(task).steps)

    def picture(self, task: str, name: str, words: str) -> str:
        """A picture, once there is what it is drawn from."""
        drawn = name in pictures(self.results, task, self.scope)
        return f"![{words}](images/robustness_{name}_{task}.png)" if drawn else NOT_RUN

    def images(self, task: str) -> str:
        """How many images a long-tailed training set has."""
        return str(len(task_named(f"{task} long-tailed").train))


def render(template: str, results: Results, scope: Scope = FULL) -> str:
    """The page: calls in the template replaced by what they return."""
    report = Report(results, scope)

    def call(match: re.Match[str]) -> str:
        name, *arguments = [part.strip() for part in match[1].split("|")]
        function: Callable[..., str] = getattr(report, name)
        return function(*arguments)

    return re.sub(r"\{\{(.+?)\}\}", call, template)


def pictures(results: Results, task: str, scope: Scope = FULL) -> list[str]:
    """What there is enough of to draw: names of functions in `figures`."""
    names = []
    if "LP-FT" in analysis.models(results, task, scope=scope):
        names += ["plane", "distance"]
    if analysis.why(results, task, scope):
        names += ["errors", "paths"]
    if all(analysis.levers(results, task, lever, scope) for lever in figures.LEVERS):
        names.append("levers")
    if analysis.losses(results, task, scope):
        names.append("warmup")
    return names


def main() -> None:
    """Writes page and pictures."""
    results = load(RESULTS)
    PAGE.write_text(render(TEMPLATE.read_text(), results))
    for task in ("A", "B"):
        for name in pictures(results, task):
            figure = getattr(figures, name)(results, task)
            figures.save(figure, DOCS / "images" / f"robustness_{name}_{task}.png")


def _beside(lines: list[Model], baseline: int) -> str:
    """Means, and paired differences to one of the lines; those over fewer than three seeds bare."""
    if not lines:
        return NOT_RUN
    rows = [
        [
            model.name,
            *(f"{model.mean(each):.1f}" for each in MEASURES),
            *(
                "" if model is lines[baseline] else _difference(model, lines[baseline], each)
                for each in MEASURES
            ),
        ]
        for model in lines
    ]
    heads = [_HEADS[each] for each in MEASURES]
    name = lines[baseline].name
    return _markdown(["", *heads, *(f"{head} against {name}" for head in heads)], rows)


def _with_interval(model: Model, what: str) -> str:
    half = model.interval(what)
    return f"{model.mean(what):.1f}" + ("" if half is None else f" ± {half:.1f}")


def _difference(a: Model, b: Model, what: str) -> str:
    """Bold where the interval leaves zero out."""
    gain, half = analysis.difference(a, b, what)
    if half is None or len(a.measured) < 3:  # of two seeds an interval says nothing
        return f"{gain:+.1f}"
    text = f"{gain:+.1f} ± {half:.1f}"
    return f"**{text}**" if abs(gain) > half else text


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _words(settings: dict[str, object]) -> str:
    """Settings as a reader writes them, less what is measured on the way."""
    shown = {key: value for key, value in settings.items() if key != "ema"}
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in shown.items()
    )


def _kept(model: Model) -> float:
    """Bytes of optimizer state and copies of weights; those of a pool's cell are LP-FT's."""
    kept: int = max(row["optimizer_bytes"] for row in model.rows)
    copy = kept / 2  # AdamW has two values for each weight
    return kept + copy if model.name == "weight EMA" else kept


if __name__ == "__main__":
    main()
