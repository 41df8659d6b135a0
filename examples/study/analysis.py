"""The study in numbers: rows of tables, intervals, paired differences; all from the results
file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, stdev

from study import plan
from study.methods import Settings
from study.plan import FULL, Results, Row, Scope, chosen_wise, final_settings

# Two-sided 95 % points of Student's t, by degrees of freedom from 1.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

MEASURES = ("id", "ood", "corruption")


@dataclass(frozen=True)
class Model:
    """A line of a table: models that differ in the seed alone.

    Attributes:
        measured: what was measured of them, in the order of the seeds.
        rows: the cells that they come from.
        runs: trainings that one such model takes, tuning not counted.
    """

    name: str
    measured: list[dict[str, object]]
    rows: list[Row]
    runs: int

    def values(self, what: str) -> list[float]:
        """By seed."""
        return [float(each[what]) for each in self.measured]  # type: ignore[arg-type]

    def mean(self, what: str) -> float:
        """Over seeds."""
        return mean(self.values(what))

    def interval(self, what: str) -> float | None:
        """Half of the 95 % confidence interval over seeds; None for a single one."""
        values = self.values(what)
        return _half_width(values) if len(values) > 1 else None


# Rows of the final tables: name, the cell's row in `final_settings`, the model in it, trainings.
_LINES: tuple[tuple[str, str, str, int], ...] = (
    ("full fine-tuning", "fine_tuning", "final", 1),
    ("LP-FT", "pool", "final", 1),
    ("L2-SP", "l2_sp", "final", 1),
    ("weight EMA", "pool", "ema", 1),
    ("WiSE-FT", "pool", "wise", 1),
    ("uniform soup", "pool", "uniform soup", 4),
    ("greedy soup", "pool", "greedy soup", 4),
    ("LoRA", "lora", "final", 1),
    ("random masking", "random_masking", "final", 1),
    ("Mixout", "mixout", "final", 1),
    ("High-rate Mixout", "high_rate_mixout", "final", 1),
    ("GMixout, one line", "gmixout, defaults", "final", 1),
    ("GMixout, no warm-up in episodes", "gmixout, sudden", "final", 1),
    ("GMixout", "gmixout", "final", 1),
    ("GMixout + WiSE-FT", "gmixout, wise", "wise", 1),
)
METHOD_NAMES = {
    "lp_ft": "LP-FT",
    "mixout": "High-rate Mixout",
    "gmixout": "GMixout, one line",
}
NAMES = ("linear probe", *(line[0] for line in _LINES))


def models(
    results: Results, task: str, stage: str = "final", scope: Scope = FULL
) -> dict[str, Model]:
    """The lines of a task's table, as far as all of their seeds were run.

    Args:
        task: whose settings were chosen, "A" or "B".
        stage: "final", or "imbalance" for the long-tailed training set.
    """
    where = f"{task} long-tailed" if stage == "imbalance" else task
    found: dict[str, Model] = {}
    for row in results.of(task=where, stage=stage, method="pretrained"):
        found["linear probe"] = Model("linear probe", [row["models"]["final"]], [row], 0)
    settings = final_settings(results, task, scope)
    for name, source, kind, runs in _LINES:
        if source not in settings:
            continue
        method, choice = settings[source]
        rows = results.of(task=where, stage=stage, method=method, settings=choice)
        model = _kind(results, task, source, kind, scope)
        rows = sorted((row for row in rows if model in row["models"]), key=_seed)
        if len(rows) == len(plan.seeds_of(stage, task, scope)):
            found[name] = Model(name, [row["models"][model] for row in rows], rows, runs)
    return found


def curve(results: Results, task: str, line: str, scope: Scope = FULL) -> list[Model]:
    """From the linear probe to fine-tuned weights, for the line "WiSE-FT" or "GMixout +
    WiSE-FT"."""
    lines = models(results, task, scope=scope)
    rows = lines[line].rows
    names = sorted(name for name in rows[0]["models"] if name.startswith("wise "))
    if "wise 1" not in names:
        names.append("final")
    mixed = [Model(name, [row["models"][name] for row in rows], rows, 1) for name in names]
    return [lines["linear probe"], *mixed]


def levers(results: Results, task: str, name: str, scope: Scope = FULL) -> list[Model]:
    """A sweep: the bare optimizer, the defaults, and what is changed of them. Empty until all is
    run."""
    sweep = plan.sweep(task, name)
    if not sweep:  # it is of the other model
        return []
    bare, (_, defaults), *_ = plan.levers(task)
    before = plan.baseline(name)
    cells = [bare, ("gmixout", {**defaults, **before}), *(("gmixout", each) for each in sweep)]
    names = ["without GMixout", "before" if before else "defaults"]
    names += [_in_words(plan.without(each, before)) for each in plan.SWEEPS[name]]
    return _lines(
        results,
        task,
        [
            _Line(words, "levers", method, settings)
            for words, (method, settings) in zip(names, cells, strict=True)
        ],
        scope,
    )


@dataclass(frozen=True)
class _Line:
    """Where a line of a table is found."""

    name: str
    stage: str
    method: str
    settings: Settings
    kind: str = "final"


def _lines(results: Results, task: str, lines: list[_Line], scope: Scope) -> list[Model]:
    """With the seeds that all lines have; nothing until those are all that were planned."""
    by_seed = [
        {
            _seed(row): row
            for row in results.of(
                task=task, stage=line.stage, method=line.method, settings=line.settings
            )
        }
        for line in lines
    ]
    seeds = sorted(set.intersection(*map(set, by_seed)))
    if not all(set(plan.seeds_of(line.stage, task, scope)) <= set(seeds) for line in lines):
        return []
    found = []
    for line, run in zip(lines, by_seed, strict=True):
        rows = [run[seed] for seed in seeds]
        found.append(Model(line.name, [row["models"][line.kind] for row in rows], rows, 1))
    return found


def losses(results: Results, task: str, scope: Scope = FULL) -> dict[str, list[float]]:
    """The training loss of each step, means over seeds: with a warm-up in episodes and without."""
    (_, defaults) = plan.levers(task)[1]
    lines = [
        _Line("defaults", "levers", "gmixout", defaults),
        _Line(
            "without warm-up in episodes", "levers", "gmixout", {**defaults, "episode_warmup": 0}
        ),
    ]
    return {
        model.name: [
            mean(each) for each in zip(*(row["losses"] for row in model.rows), strict=True)
        ]
        for model in _lines(results, task, lines, scope)
    }


def attempts(results: Results, task: str, scope: Scope = FULL) -> list[Model]:
    """GMixout before it warmed up in episodes, what was tried to better it, a learning rate that
    stays."""
    stays = "constant learning rate: "
    lines = []
    for method, settings in plan.attempts(task):
        if method == "lp_ft":
            names = {"final": stays + "LP-FT", "ema 0.98": stays + "LP-FT, its EMA"}
        elif settings["change"] != "none":
            names = {"final": settings["change"]}
        else:
            before = stays if "schedule" in settings else ""
            names = {kind: before + end for kind, end in _ENDS.items()}
        lines += [_Line(name, "attempts", method, settings, kind) for kind, name in names.items()]
    return _lines(results, task, lines, scope)


def few_attempts(results: Results, task: str, scope: Scope = FULL) -> list[Model]:
    """Averages of weights with and without GMixout, before it warmed up in episodes."""
    lp_ft, _, ours = plan.levers(task)[:3]
    (averaged,) = plan.few_attempts(task)
    lines = [
        _Line("LP-FT", "levers", *lp_ft),
        _Line("before", "levers", *ours),
        _Line("LP-FT, its EMA", "levers", *lp_ft, kind="ema 0.98"),
        _Line("before, its EMA", "attempts", *averaged, kind="ema 0.98"),
    ]
    return _lines(results, task, lines, scope)


def schedules(
    results: Results, task: str, scope: Scope = FULL
) -> dict[str, tuple[Model, Model, Model]]:
    """By schedule LP-FT, its EMA, and GMixout as one line; those that were run."""
    finals = models(results, task, scope=scope)
    plain = plan.schedules(results, task, scope.choices)
    found = {}
    if "GMixout, one line" in finals:
        found["cosine with warm-up"] = (
            finals["LP-FT"],
            finals["weight EMA"],
            finals["GMixout, one line"],
        )
    for shape in plan.PLAIN_SCHEDULES:
        lines = [
            _Line(name, "schedules", method, settings, kind)
            for method, settings in plain
            if settings["schedule"] == shape
            for kind, name in _OF_SCHEDULES[method].items()
        ]
        if lines and (run := _lines(results, task, lines, scope)):
            lp_ft, average, ours = run
            found[shape] = lp_ft, average, ours
    return found


_OF_SCHEDULES = {
    "lp_ft": {"final": "LP-FT", "ema 0.98": "weight EMA"},
    "gmixout": {"final": "GMixout, one line"},
}


def why(results: Results, task: str, scope: Scope = FULL) -> list[Row]:
    """The cells that look into the methods, with the settings that were chosen; none until all
    ran."""
    rows = [
        row
        for method, settings in plan.why(results, task, scope)
        for row in results.of(task=task, stage="why", method=method, settings=settings)
    ]
    return rows if len(rows) == len(METHOD_NAMES) else []


_ENDS = {
    "final": "before",
    "live": "last episode taken in full",
    "whole episodes": "last episode left out",
    "ema 0.98": "its EMA",
}


def longer(results: Results, task: str) -> list[Model]:
    """Of several times as many steps: LP-FT, its average, GMixout."""
    found = []
    for method, settings in plan.longer(task):
        for row in results.of(task=task, stage="longer", method=method, settings=settings):
            own = {k: v for k, v in settings.items() if k not in ("lr", "ema", "steps")}
            words = _in_words(own) or "defaults"
            trained = "LP-FT" if method == "lp_ft" else f"GMixout, {words}"
            for kind, measured in row["models"].items():
                if words == "before" and kind != "final":
                    continue
                name = trained if kind == "final" else f"{trained}, {kind}"
                found.append(Model(name, [measured], [row], 1))
    return found


def _in_words(settings: Settings) -> str:
    if settings == plan.SUDDEN:
        return "before"
    return ", ".join(_setting_in_words(*item) for item in settings.items())


def _setting_in_words(name: str, value: object) -> str:
    if name == "lr":
        return f"lr x {value:g}"
    return f"`{name}={value!r}`"


def difference(a: Model, b: Model, what: str) -> tuple[float, float | None]:
    """The mean of `a` minus that of `b`, paired by seed and by test emoji.

    Returns:
        the difference in points and half of its 95 % confidence interval, over seeds and over test
        emoji together: the two half widths, squared, summed. None where there is one seed only.
    """
    if len(b.measured) == 1:
        b = Model(b.name, b.measured * len(a.measured), b.rows, b.runs)
    if len(a.measured) == 1:
        a = Model(a.name, a.measured * len(b.measured), a.rows, a.runs)
    by_seed = [x - y for x, y in zip(a.values(what), b.values(what), strict=True)]
    if len(by_seed) == 1:
        return by_seed[0], None
    by_emoji = [x - y for x, y in zip(_by_emoji(a, what), _by_emoji(b, what), strict=True)]
    over_emoji = 1.96 * stdev(by_emoji) / len(by_emoji) ** 0.5
    return mean(by_seed), (_half_width(by_seed) ** 2 + over_emoji**2) ** 0.5


def best_competitor(lines: dict[str, Model], score: Callable[[Model], float]) -> Model:
    """The best line that is not GMixout's."""
    return max((model for name, model in lines.items() if "GMixout" not in name), key=score)


def _by_emoji(model: Model, what: str) -> list[float]:
    """Accuracy on each test emoji, over seeds, in %. Styles and corruptions of it are averaged."""
    counts = [each["by_emoji"][what] for each in model.measured]  # type: ignore[index]
    most = {"id": 1, "ood": 5, "corruption": 8}[what]
    return [100 * mean(map(int, digits)) / most for digits in zip(*counts, strict=True)]


def _half_width(values: list[float]) -> float:
    return _T95[len(values) - 2] * stdev(values) / len(values) ** 0.5


def _kind(results: Results, task: str, source: str, kind: str, scope: Scope) -> str:
    """The model's name in its row: WiSE-FT's has the share that was chosen."""
    if kind != "wise":
        return kind
    found = chosen_wise(results, task, "lp_ft" if source == "pool" else "gmixout", scope.choices)
    assert found is not None
    return f"wise {found[1]:g}"


def _seed(row: Row) -> int:
    seed: int = row["cell"]["seed"]
    return seed
