"""State dicts that released versions wrote: later versions go on from them.

``python -m tests.test_state_dict_versions`` writes the file of the present version; files of
released versions stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.settings import VERSION
from tests.training import small_model, train, weights

FOLDER = Path(__file__).parent / "data"
RUNS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], dict[str, Any]]] = {
    "packed": (torch.optim.AdamW, dict(lr=0.05), dict()),
    "rows": (torch.optim.SGD, dict(lr=0.05, momentum=0.9), dict(granularity="row", rescale=True)),
    "bernoulli": (torch.optim.Adam, dict(lr=0.05), dict(sampler="bernoulli")),
    "dense": (torch.optim.Adafactor, dict(lr=0.05), dict(granularity=2)),
    "persistent": (torch.optim.AdamW, dict(lr=0.05), dict(residual="persistent", rescale=True)),
}


def build(name: str, seed: int) -> tuple[nn.Module, GMixoutOptimizer]:
    kind, options, settings = RUNS[name]
    model = small_model()
    base = kind(model.named_parameters(), **options)
    common = dict(
        exclude="head.*", mask_prob=0.5, resample_every=4, anchor_decay=0.9, episode_warmup=0
    )
    settings = dict(**common, lr_scale=1.0, seed=seed, **settings)
    return model, GMixoutOptimizer(base, **settings)


def write() -> None:
    saved = {}
    for name in RUNS:
        model, optimizer = build(name, seed=11)
        train(model, optimizer, range(6))
        at_six = {key: item.clone() for key, item in model.state_dict().items()}
        state = torch.utils._pytree.tree_map(
            lambda item: item.clone() if isinstance(item, torch.Tensor) else item,
            optimizer.state_dict(),
        )
        train(model, optimizer, range(6, 12))
        saved[name] = dict(model=at_six, optimizer=state, after=weights(model))
    FOLDER.mkdir(exist_ok=True)
    torch.save(saved, FOLDER / f"state_dicts_{VERSION}.pt")


def test_the_present_version_has_its_file() -> None:
    assert (FOLDER / f"state_dicts_{VERSION}.pt").exists()


OLD = sorted(FOLDER.glob("state_dicts_[1-4].pt"))


@pytest.mark.parametrize("file", OLD, ids=lambda file: file.stem)
def test_runs_that_carried_state_over_a_redraw_are_refused(file: Path) -> None:
    """That setting is gone; in the older files the run with Bernoulli sets has it."""
    saved = torch.load(file, weights_only=True)["bernoulli"]
    _, optimizer = build("bernoulli", seed=0)
    with pytest.raises(ValueError, match=r"carry_state=True, which is no longer there.*new one"):
        optimizer.load_state_dict(saved["optimizer"])
    assert (optimizer.episode, optimizer.steps_in_episode) == (0, 0)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        pytest.param(file, name, id=f"{name}-{file.stem}")
        for file in sorted(FOLDER.glob("state_dicts_*.pt"))
        for name in RUNS
        if not (name == "bernoulli" and file in OLD)
    ],
)
def test_goes_on_from_what_a_version_saved(file: Path, name: str) -> None:
    saved = torch.load(file, weights_only=True)[name]
    model, optimizer = build(name, seed=0)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert (optimizer.episode, optimizer.steps_in_episode) == (1, 2)
    train(model, optimizer, range(6, 12))
    torch.testing.assert_close(weights(model), saved["after"])


@pytest.mark.parametrize("name", [name for name in RUNS if name != "bernoulli"])
def test_a_run_that_an_older_version_saved_in_eval_gets_its_live_weights_back(name: str) -> None:
    """Before version 5 they followed from the values, and were not in the file."""
    saved = torch.load(FOLDER / "state_dicts_4.pt", weights_only=True)[name]
    model, optimizer = build(name, seed=0)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    live = weights(model)
    optimizer.eval()
    shown = {key: item.clone() for key, item in model.state_dict().items()}
    for group in saved["optimizer"]["param_groups"]:
        group["gmixout"]["evaluating"] = True
    model, optimizer = build(name, seed=0)
    model.load_state_dict(shown)
    optimizer.load_state_dict(saved["optimizer"])
    optimizer.train()
    torch.testing.assert_close(weights(model), live, rtol=1e-12, atol=1e-12)


if __name__ == "__main__":
    write()
