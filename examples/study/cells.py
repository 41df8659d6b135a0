"""Runs a cell: trains, measures, and returns a line of the results file."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from models import Classifier

from study.methods import averaged, interpolated
from study.plan import SUDDEN, WISE_SHARES, Cell, Row
from study.tasks import Task, task
from study.training import Trained, measure, train, validation
from study.why import decomposed, distance, path

_WITH_WISE = ("tuning", "final", "imbalance", "longer")
Measured = dict[str, dict[str, Any]]


def run(cell: Cell) -> Row:
    """Everything that the cell asks for.

    Returns:
        "cell", "seconds" of training, "optimizer_bytes", "losses" of its steps, and "models": what
        was measured of the trained model ("final") and of those made from it, as "ema 0.98".
    """
    where = task(cell.task)
    if cell.method == "pretrained":
        return _row(cell, None, {"final": everything(where, where.pretrained)})
    if cell.method == "pool":
        return _pool(cell, where)
    if cell.stage == "why":
        return {
            "cell": asdict(cell),
            "errors": decomposed(where, cell.method, cell.settings, range(cell.seed)),
            "path": path(where, cell.method, cell.settings, 0),
        }
    trained = train(where, cell.method, cell.settings, cell.seed)
    models = {"final": trained.model, **trained.averages}
    earlier = cell.settings.items() >= SUDDEN.items()
    if cell.stage in _WITH_WISE and cell.method in ("lp_ft", "gmixout") and not earlier:
        models |= _wise(where, trained.model)
    look = validation if cell.stage == "tuning" else everything
    return _row(cell, trained, {name: look(where, model) for name, model in models.items()})


def everything(where: Task, model: Classifier) -> dict[str, Any]:
    """What is measured of a model, and how far it is from the pretrained one."""
    return {**measure(where, model), "distance": distance(where, model)}


def _pool(cell: Cell, where: Task) -> Row:
    """LP-FT at several learning rates; the methods that need no more training than that."""
    settings = cell.settings
    average_lr, decay = settings["ema"]
    pool: dict[float, Trained] = {}
    for number, lr in enumerate(settings["lrs"]):
        # What has a line of its own shares its seed, its order of images, with all methods.
        own = lr in (settings["lp_ft"], settings["wise"], average_lr)
        averages = {"ema": [decay]} if lr == average_lr else {}
        seed = cell.seed if own else cell.seed + 1000 * (number + 1)
        pool[lr] = train(where, "lp_ft", {"lr": lr, **averages}, seed)
    tuned = pool[settings["lp_ft"]]
    models = {"final": tuned.model, **_wise(where, pool[settings["wise"]].model)}
    models["wise 1"] = pool[settings["wise"]].model
    models["ema"] = pool[average_lr].averages[f"ema {decay:g}"]
    ingredients = [run.model for run in pool.values()]
    models["uniform soup"] = averaged([(model, 1 / len(pool)) for model in ingredients])
    models["greedy soup"] = greedy_soup(where, ingredients)
    return _row(cell, tuned, {name: everything(where, model) for name, model in models.items()})


def greedy_soup(where: Task, ingredients: list[Classifier]) -> Classifier:
    """Models added in the order of their validation accuracy while that does not fall.

    Source: Wortsman et al., Model Soups (arXiv 2203.05482), recipe 1.
    """
    scored = [(validation(where, model)["val"], model) for model in ingredients]
    (best, soup), *others = sorted(scored, key=lambda entry: entry[0], reverse=True)
    chosen = [soup]
    for _, model in others:
        tried = averaged([(part, 1 / (len(chosen) + 1)) for part in [*chosen, model]])
        score = validation(where, tried)["val"]
        if score >= best:
            chosen, soup, best = [*chosen, model], tried, score
    return soup


def _wise(where: Task, model: Classifier) -> dict[str, Classifier]:
    return {
        f"wise {share:g}": interpolated(where.pretrained, model, share) for share in WISE_SHARES
    }


def _row(cell: Cell, trained: Trained | None, models: Measured) -> Row:
    return {
        "cell": asdict(cell),
        "seconds": round(trained.seconds, 1) if trained else 0.0,
        "optimizer_bytes": trained.optimizer_bytes if trained else 0,
        "losses": trained.losses if trained else [],
        "models": models,
    }
