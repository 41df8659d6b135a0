"""Which runs the study is made of, as far as the results so far decide them.

A *cell* is what one process does at a time: a training run (for soups, the runs that are mixed) and
what is measured of it. The stages:

- tuning: each method with as many settings as any other, one seed, measured on in-distribution
  validation images alone.
- final: the settings that won, with seeds that tuning has not seen; everything measured.
- imbalance: the same settings on a long-tailed training set.
- why: what the weights do on the way; a cell has all seeds.
- levers: the bare optimizer, and GMixout around the library's defaults.
- attempts: what might make GMixout better; a learning rate that does not fall.
- schedules: a learning rate that does not warm up, or never changes.
- longer: several times as many steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from study.attempts import CHANGES
from study.methods import Settings
from study.tasks import task as named

Row = dict[str, Any]

TUNING_SEED = 100
# GMixout is tuned around its defaults (the first), which its levers have shown.
# "Defaults" in the results file are these; a test holds them against the library.
DEFAULTS = {
    "mask_prob": 0.9,
    "resample_every": 20,
    "anchor_decay": 0.5,
    "lr_scale": "auto",
    "episode_warmup": "auto",
}
GMIXOUT: list[Settings] = [
    {},
    {"anchor_decay": 0.7},
    {"anchor_decay": 0.3},
    {"resample_every": 40},
]
# What was best before there was a warm-up in episodes.
SUDDEN = {"resample_every": 10, "anchor_decay": 0.8, "episode_warmup": 0}
LEARNING_RATES = {
    "A": (1e-4, 2e-4, 4e-4, 8e-4),
    "B": (3e-5, 6e-5, 1e-4, 2e-4),
    "C": (3e-5, 6e-5, 1e-4, 2e-4),
}
EMA_DECAYS = (0.9, 0.95, 0.98, 0.99)
WISE_SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Cell:
    """A part of the study that is run, and stored, as a whole."""

    task: str
    stage: str
    method: str  # a key of METHODS, or "pool": LP-FT at several learning rates, and what mixes them
    settings: Settings
    seed: int

    @property
    def key(self) -> str:
        """What identifies the cell in the results file."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass
class Results:
    """The cells that were run: a line of the results file each."""

    rows: dict[str, Row] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """A later row replaces an earlier one of the same cell."""
        self.rows[Cell(**row["cell"]).key] = row

    def __contains__(self, cell: Cell) -> bool:
        return cell.key in self.rows

    def __getitem__(self, cell: Cell) -> Row:
        return self.rows[cell.key]

    def of(self, **values: object) -> list[Row]:
        """Rows whose cell has those values."""
        return [
            row
            for row in self.rows.values()
            if all(row["cell"][name] == value for name, value in values.items())
        ]


@dataclass(frozen=True)
class Scope:
    """How much is run."""

    tasks: tuple[str, ...] = ("B", "A")
    seeds: int = 5
    choices: int = 4  # settings that each method is tuned over
    levers: int | None = None  # lever settings, all by default


FULL = Scope()
TOY = Scope(("toy A",), seeds=2, choices=1, levers=2)


def chosen(results: Results, task: str, method: str, choices: int = 4) -> Settings | None:
    """The settings that won on validation images: by accuracy, then by loss. None: not yet
    known."""
    cells = [_tuning(task, method, settings) for settings in grid(task, method)[:choices]]
    if not cells or any(cell not in results for cell in cells):
        return None
    best = max(cells, key=lambda cell: _quality(results[cell]["models"]["final"]))
    return best.settings


def grid(task: str, method: str) -> list[Settings]:
    """The settings that a method is tuned over, four each."""
    rates = LEARNING_RATES[_setting(task)]
    low, medium, high, highest = rates
    large = _setting(task) != "A"
    new_head = (low / 3, low * 2 / 3, low, medium) if large else rates
    strengths = (3.0, 30.0) if large else (0.03, 0.3)
    masked_times = (1, 3, 6, 10) if large else (6, 10, 20, 30)
    high_rate = (medium, high) if large else (high, highest)
    return {
        "fine_tuning": [{"lr": lr} for lr in new_head],
        "lp_ft": [{"lr": lr, "ema": list(EMA_DECAYS)} for lr in rates],
        "l2_sp": [{"lr": lr, "strength": s} for lr in (medium, high) for s in strengths],
        "lora": [{"lr": lr, "rank": rank} for lr in (1e-3, 3e-3) for rank in (4, 16)],
        "random_masking": [{"lr": high * times, "mask_prob": 0.9} for times in masked_times],
        "mixout": [{"lr": lr, "mask_prob": p} for lr in (medium, high) for p in (0.3, 0.6)],
        "high_rate_mixout": [{"lr": lr, "mask_prob": p} for lr in high_rate for p in (0.8, 0.9)],
        "gmixout": [{"lr": high, **options} for options in GMIXOUT],
    }[method]


TUNED = (
    "lp_ft",
    "gmixout",
    "fine_tuning",
    "l2_sp",
    "lora",
    "random_masking",
    "mixout",
    "high_rate_mixout",
)


# Seeds that neither tuning nor the final table has.
LEVER_SEEDS = (10, 11)
ATTEMPT_SEEDS = {"A": (10, 11, 12), "B": (10, 11), "C": (10, 11)}
IMBALANCE_SEEDS = 3
SCHEDULE_SEEDS = 3


# What is changed of the defaults. "lr" is a multiple of the learning rate in the middle.
SWEEPS: dict[str, list[Settings]] = {
    "together": [
        SUDDEN,
        {"episode_warmup": 0},
        {"anchor_decay": 0.7},
        {"resample_every": 10},
        {"lr": 2.0},
    ],
    "mask_prob": [{"mask_prob": p} for p in (0.5, 0.8, 0.99)],
    "resample_every": [{"resample_every": k} for k in (5, 50)],
    "anchor_decay": [{"anchor_decay": decay} for decay in (0.0, 0.7, 0.9)],
    "episode_warmup": [{"episode_warmup": 0}, SUDDEN],
    "lr": [{"lr": times} for times in (0.5, 2.0)],
    # Run before there was a warm-up, and not again.
    "sudden lr": [
        {**SUDDEN, "mask_prob": p, "lr": times} for p in (0.5, 0.9) for times in (0.25, 0.5, 2.0)
    ],
    "sudden variants": [
        {**SUDDEN, "rescale": True, "anchor_decay": 0.0},
        {**SUDDEN, "sampler": "bernoulli"},
        {**SUDDEN, "granularity": "row"},
        {**SUDDEN, "granularity": 16},
    ],
    "sudden vectors": [{**SUDDEN, "mixed": "matrices"}],
}
# What goes together is shown on the foundation model, each lever alone where runs are cheap. The
# EfficientNet trains no vectors: its BatchNorm is frozen.
_ON_FOUNDATION_MODEL = ("together", "sudden vectors")


def sweep(task: str, name: str | None = None) -> list[Settings]:
    """The cells' settings of a sweep, with the learning rate itself; without a name of all."""
    middle = LEARNING_RATES[_setting(task)][2]
    names = SWEEPS if name is None else [name]
    large = _setting(task) != "A"
    names = [each for each in names if (each in _ON_FOUNDATION_MODEL) == large]
    changes = [change for each in names for change in SWEEPS[each]]
    return [{**change, "lr": middle * change.get("lr", 1.0)} for change in changes]


def baseline(sweep: str) -> Settings:
    """What a sweep changes."""
    return SUDDEN if sweep.startswith("sudden") else {}


def seeds_of(stage: str, task: str, scope: Scope) -> tuple[int, ...]:
    """Seeds of all cells of the stage."""
    if stage in ("levers", "attempts"):
        seeds = LEVER_SEEDS if stage == "levers" else ATTEMPT_SEEDS[_setting(task)]
        return seeds if scope.levers is None else seeds[:1]
    most = {"imbalance": IMBALANCE_SEEDS, "schedules": SCHEDULE_SEEDS}.get(stage, scope.seeds)
    return tuple(range(min(scope.seeds, most)))


def levers(task: str) -> list[tuple[str, Settings]]:
    """The bare optimizer, GMixout with its defaults, and all sweeps around them."""
    lr = LEARNING_RATES[_setting(task)][2]
    ours = [{"lr": lr}, {"lr": lr, **SUDDEN}, *sweep(task)]
    return [("lp_ft", {"lr": lr, "ema": [0.98]}), *(("gmixout", settings) for settings in ours)]


def few_attempts(task: str) -> list[tuple[str, Settings]]:
    """Where a training takes minutes: the average of GMixout's live weights."""
    lr = LEARNING_RATES[_setting(task)][2]
    return [("attempt", {"lr": lr, **SUDDEN, "change": "none"})]


# What a script does that has no warm-up, or no schedule at all.
PLAIN_SCHEDULES = ("cosine without warm-up", "constant without warm-up")


def schedules(results: Results, task: str, choices: int = 4) -> list[tuple[str, Settings]]:
    """LP-FT, and the line added to it, at the learning rate that was tuned with a schedule."""
    lp_ft = chosen(results, task, "lp_ft", choices)
    if lp_ft is None:
        return []
    return [
        (method, {"lr": lp_ft["lr"], "schedule": schedule, **settings})
        for schedule in PLAIN_SCHEDULES
        for method, settings in (("lp_ft", {"ema": [0.98]}), ("gmixout", {}))
    ]


def attempts(task: str) -> list[tuple[str, Settings]]:
    """Changes of GMixout, and a learning rate that stays with and without it.

    The steps are such that a run ends just before an episode's end: how it ends matters.
    """
    middle = LEARNING_RATES[_setting(task)][2]
    falls = {"lr": middle, "steps": max(3, named(task).steps // 10 * 10 - 1), **SUDDEN}
    stays = {**falls, "schedule": "constant"}
    return [
        *(("attempt", {**falls, "change": change}) for change in CHANGES),
        ("lp_ft", {**without(stays, SUDDEN), "ema": [0.98]}),
        ("attempt", {**stays, "change": "none"}),
    ]


def without(settings: Settings, others: Settings) -> Settings:
    """Settings less those that others have, too."""
    return {
        name: value
        for name, value in settings.items()
        if name not in others or others[name] != value
    }


# How many times as many steps, and GMixout's settings.
LONGER: dict[str, tuple[int, list[Settings]]] = {
    "A": (6, [{}, {"resample_every": 50}, SUDDEN]),
    "B": (3, [{}, SUDDEN]),
    "C": (3, [{}, {"resample_every": 50}]),
}


def longer(task: str) -> list[tuple[str, Settings]]:
    """More steps, at the same learning rate."""
    lr = LEARNING_RATES[_setting(task)][2]
    times, ours = LONGER[_setting(task)]
    cells: list[tuple[str, Settings]] = [("lp_ft", {"lr": lr, "ema": [0.98]})]
    cells += [("gmixout", {"lr": lr, **settings}) for settings in ours]
    return [
        (method, {**settings, "steps": times * named(task).steps}) for method, settings in cells
    ]


def why(results: Results, task: str, scope: Scope) -> list[tuple[str, Settings]]:
    """The methods whose weights are looked at: LP-FT, High-rate Mixout, GMixout as one line."""
    found = final_settings(results, task, scope)
    pool, ours = found.get("pool"), found.get("gmixout, defaults")
    if pool is None or ours is None or "high_rate_mixout" not in found:
        return []
    return [("lp_ft", {"lr": pool[1]["lp_ft"]}), found["high_rate_mixout"], ours]


def _setting(task: str) -> str:
    return task.removeprefix("toy ")[0]


def _quality(measured: dict[str, Any]) -> tuple[float, float]:
    return measured["val"], -measured["val_loss"]


def _tuning(task: str, method: str, settings: Settings) -> Cell:
    return Cell(task, "tuning", _trained_as(method), settings, TUNING_SEED)


def _trained_as(method: str) -> str:
    return "mixout" if method == "high_rate_mixout" else method


def chosen_ema(results: Results, task: str, choices: int = 4) -> tuple[float, float] | None:
    """Learning rate and decay of the weight average that won; None: not yet known."""
    if chosen(results, task, "lp_ft", choices) is None:
        return None
    averages = [
        (measured, settings["lr"], float(name.removeprefix("ema ")))
        for settings in grid(task, "lp_ft")[:choices]
        for name, measured in results[_tuning(task, "lp_ft", settings)]["models"].items()
        if name.startswith("ema ")
    ]
    _, lr, decay = max(averages, key=lambda average: _quality(average[0]))
    return lr, decay


def chosen_wise(
    results: Results, task: str, method: str, choices: int = 4
) -> tuple[Settings, float] | None:
    """Settings of the training and WiSE-FT's share of its weights that won together."""
    if chosen(results, task, method, choices) is None:
        return None
    mixed = [
        (results[_tuning(task, method, settings)]["models"][f"wise {share:g}"], settings, share)
        for settings in grid(task, method)[:choices]
        for share in WISE_SHARES
    ]
    _, settings, share = max(mixed, key=lambda each: _quality(each[0]))
    return settings, share


def final_settings(results: Results, task: str, scope: Scope) -> dict[str, tuple[str, Settings]]:
    """The runs of the final table, by the name of their row, as far as tuning has decided them.

    Returns:
        how the cell is trained, and its settings.
    """
    found: dict[str, tuple[str, Settings]] = {}
    lp_ft = chosen(results, task, "lp_ft", scope.choices)
    if lp_ft is not None:
        ema = chosen_ema(results, task, scope.choices)
        wise = chosen_wise(results, task, "lp_ft", scope.choices)
        assert ema is not None
        assert wise is not None
        found["pool"] = (
            "pool",
            {
                "lrs": [settings["lr"] for settings in grid(task, "lp_ft")[: scope.choices]],
                "lp_ft": lp_ft["lr"],
                "ema": list(ema),
                "wise": wise[0]["lr"],
            },
        )
        # The line added to the tuned optimizer, and nothing else changed.
        found["gmixout, defaults"] = "gmixout", {"lr": lp_ft["lr"]}
        found["gmixout, sudden"] = "gmixout", {"lr": lp_ft["lr"], **SUDDEN}
    for method in TUNED[1:]:
        settings = chosen(results, task, method, scope.choices)
        if settings is not None:
            found[method] = _trained_as(method), settings
    wise = chosen_wise(results, task, "gmixout", scope.choices)
    if wise is not None:
        found["gmixout, wise"] = "gmixout", wise[0]
    return found


def known_cells(results: Results, scope: Scope) -> Iterator[Cell]:
    """All cells that can be named now, also those that were run, in the order to run them."""
    for task in scope.tasks:
        for method in TUNED:
            for choice in grid(task, method)[: scope.choices]:
                yield _tuning(task, method, choice)
        yield from _seeds(task, "final", results, scope)
    for task in scope.tasks:
        if _setting(task) != "B":  # there a training takes minutes
            yield from _seeds(task, "imbalance", results, scope)
        if _setting(task) == "A":  # all seeds of it
            for method, choice in why(results, task, scope):
                yield Cell(task, "why", method, choice, scope.seeds)
        staged = {
            "levers": levers(task)[: scope.levers],
            "attempts": attempts(task) if _setting(task) == "A" else few_attempts(task),
            "schedules": schedules(results, task, scope.choices),
        }
        for stage, cells in staged.items():
            for seed in seeds_of(stage, task, scope):
                yield from (Cell(task, stage, *cell, seed) for cell in cells)
    for task in scope.tasks:
        for cell in longer(task)[: scope.levers]:
            yield Cell(task, "longer", *cell, LEVER_SEEDS[0])


def _seeds(task: str, stage: str, results: Results, scope: Scope) -> Iterator[Cell]:
    """The cells of a table of all methods, with the settings that were chosen for the task."""
    settings = final_settings(results, task, scope)
    where = f"{task} long-tailed" if stage == "imbalance" else task
    if settings:
        yield Cell(where, stage, "pretrained", {}, 0)
    for seed in seeds_of(stage, task, scope):
        for method, choice in settings.values():
            yield Cell(where, stage, method, choice, seed)
