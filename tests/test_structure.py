"""The inside: imports go one way, and only what is documented is public."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import torch

import gmixout_optim
from gmixout_optim import GMixoutOptimizer
from tests.training import small_model

PACKAGE = Path(gmixout_optim.__file__).parent
PUBLIC = {
    "active_mask",
    "anchor",
    "base",
    "clip_grad_norm_",
    "consolidate",
    "episode",
    "eval",
    "eval_weights",
    "mixout",
    "random_masking",
    "register_resample_hook",
    "register_resample_pre_hook",
    "report",
    "resample",
    "resync",
    "steps_in_episode",
    "train",
}


def imports_of(file: Path) -> set[str]:
    """The package's modules that a file imports, wherever it does: TYPE_CHECKING counts."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gmixout_optim"):
            if node.module == "gmixout_optim":
                found |= {alias.name for alias in node.names}
            else:
                found.add(node.module.split(".")[1])
    return found


def test_imports_go_one_way() -> None:
    modules = {file.stem: imports_of(file) for file in PACKAGE.glob("*.py")}
    del modules["__init__"]
    graph = {name: found & modules.keys() for name, found in modules.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises where there is a circle
    assert order[-1] == "optimizer"
    assert graph["index_sets"] == graph["rounding"] == graph["shards"] == set()
    assert graph["bases"] == {"shards"}
    assert not (graph["checkpoint"] | graph["report"]) & {"optimizer", "wrapper", "packed", "dense"}


def test_only_what_is_documented_is_public() -> None:
    optimizer = GMixoutOptimizer(torch.optim.AdamW(small_model().parameters()))
    own = {name for name in dir(optimizer) if not name.startswith("_")}
    assert own - set(dir(torch.optim.Optimizer)) - {"defaults", "param_groups", "state"} == PUBLIC
