"""A rank is killed, in a step or while a checkpoint is written: what was saved is whole, and the
training goes on from it to the same bits. ``python -m tests.test_ranks_kill 100`` kills so often.
"""

from __future__ import annotations

import hashlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.shards import local_of
from gmixout_optim.testing import check_invariants
from tests.ranks import needs_gloo, on_ranks, ranks_running

RANKS = 2
STEPS, SAVE_EVERY = 45, 3
# What a rank does; the last two are a save.
STEP, STATE, WRITE = "step", "state", "write"
SECONDS = {STEP: 0.005, STATE: 0.03, WRITE: 0.03}


def build() -> tuple[nn.Module, GMixoutOptimizer]:
    """Sizes that two ranks cannot share equally."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    base = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    return model, GMixoutOptimizer(base, mask_prob=0.6, resample_every=4, seed=7)


def checkpoints(folder: Path) -> list[Path]:
    """Those that are complete, the newest last. Their metadata are written after all else."""
    return sorted(path.parent for path in folder.glob("*/.metadata"))


def unfinished(folder: Path) -> list[Path]:
    return [
        path for path in folder.iterdir() if path.is_dir() and not (path / ".metadata").exists()
    ]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[0])


def state_of(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


def load(model: nn.Module, optimizer: Any, checkpoint: Path) -> None:
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def digest(state: Any) -> str:
    """Of all bits that this rank holds."""
    found = hashlib.sha256()
    for item in leaves(state):
        is_tensor = isinstance(item, Tensor)
        found.update(local_of(item).numpy().tobytes() if is_tensor else repr(item).encode())
    return found.hexdigest()


def leaves(item: Any) -> Iterator[Any]:
    if isinstance(item, dict | list):
        for key in sorted(item) if isinstance(item, dict) else range(len(item)):
            yield key
            yield from leaves(item[key])
    else:
        yield item


def note(folder: Path, rank: int, what: str, step: int) -> None:
    """What a rank is doing, for who kills it."""
    path = folder / f"rank{rank}"
    path.with_suffix(".new").write_text(f"{what} {step}")
    path.with_suffix(".new").rename(path)


def train(rank: int, folder: Path, attempt: int) -> dict[int, str]:
    """From the newest checkpoint to the last step. Returns digests of what was saved, by step."""
    model, optimizer = build()
    found = checkpoints(folder)
    first = 0
    if found:
        first = step_of(found[-1])
        load(model, optimizer, found[-1])
    saved = {}
    for step in range(first, STEPS):
        note(folder, rank, STEP, step)
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x[rank::RANKS]) - 1).square().mean().backward()
        optimizer.step()
        if (step + 1) % SAVE_EVERY == 0:
            note(folder, rank, STATE, step)
            state = state_of(model, optimizer)
            saved[step + 1] = digest(state)
            note(folder, rank, WRITE, step)
            dcp.save(state, checkpoint_id=folder / f"{step + 1:04}-{attempt}")
    return saved


def load_all(rank: int, folder: Path) -> dict[str, str]:
    """Digests of all checkpoints that are complete, each loaded into a new optimizer."""
    found = {}
    for checkpoint in checkpoints(folder):
        model, optimizer = build()
        load(model, optimizer, checkpoint)
        check_invariants(optimizer)
        found[checkpoint.name] = digest(state_of(model, optimizer))
    return found


def kill_one(processes: list[Any], folder: Path, what: str, moments: random.Random) -> str | None:
    """Kill a rank, about while it does ``what``, and return what it was doing; None where the
    training has ended before."""
    victim = moments.randrange(RANKS)
    count = moments.randint(1, 12 if what == STEP else 4)
    delay = moments.uniform(0, SECONDS[what])
    rest_lives = moments.choice([0, 0.05])
    note_of_victim, seen = folder / f"rank{victim}", set()
    note_of_victim.unlink(missing_ok=True)
    while len(seen) < count:
        codes = [process.exitcode for process in processes]
        if any(codes) or codes == [0] * RANKS:
            return None  # results() tells
        if note_of_victim.exists() and note_of_victim.read_text().startswith(what):
            seen.add(note_of_victim.read_text())
        time.sleep(0.0005)
    time.sleep(delay)
    processes[victim].kill()
    processes[victim].join()
    time.sleep(rest_lives)  # it may write on
    return note_of_victim.read_text().split()[0]


def train_and_kill(seed: int, kills: int, expected: list[dict[int, str]]) -> Counter[str]:
    """A training in which ranks are killed. Returns what they were doing."""
    moments = random.Random(seed)
    hits: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for attempt in range(kills + 1):
            with ranks_running(RANKS, train, folder, attempt) as ranks:
                hit = None
                if attempt < kills:
                    what = (STEP, STATE, WRITE)[attempt % 3]
                    hit = kill_one(ranks.processes, folder, what, moments)
                if hit is None:
                    ended = ranks.results(limit=60)
                    break
            hits[hit] += 1
        hits["checkpoints left unfinished"] = len(unfinished(folder))
        for rank, saved in enumerate(ended):
            assert saved.items() <= expected[rank].items()
            assert STEPS in saved
        for rank, loaded in enumerate(on_ranks(RANKS, load_all, folder)):
            assert len(loaded) >= STEPS // SAVE_EVERY - kills
            for checkpoint, found in loaded.items():
                assert found == expected[rank][step_of(Path(checkpoint))], checkpoint
    return hits


def uninterrupted() -> list[dict[int, str]]:
    with tempfile.TemporaryDirectory() as folder:
        return on_ranks(RANKS, train, Path(folder), 0)


@needs_gloo
def test_a_killed_training_goes_on_from_what_was_saved() -> None:
    expected, hits = uninterrupted(), Counter[str]()
    for seed in range(3):  # on a slow machine a rank may do something else by then
        hits += train_and_kill(seed, 5, expected)
        if hits[STEP] and hits[STATE] + hits[WRITE]:
            break
    else:
        pytest.fail(f"kills hit {dict(hits)}")


def main(kills: int) -> None:
    expected, hits, done, seed = uninterrupted(), Counter[str](), 0, 1000
    while done < kills:
        hits += train_and_kill(seed, min(12, kills - done), expected)
        done, seed = sum(hits[what] for what in (STEP, STATE, WRITE)), seed + 1
        print(f"{done} kills: {dict(hits)}, {seed - 1000} trainings equal", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
