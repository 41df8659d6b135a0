"""A long training on several ranks in which everything happens that may: it stays right and does
not grow."""

from __future__ import annotations

import gc
import multiprocessing
import random
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.shards import is_dtensor
from gmixout_optim.testing import check_invariants
from tests.meshes import Net, fsdp, part_of_batch, whole_weights
from tests.ranks import needs_gloo, on_ranks

RANKS = 2
STEPS_IN_EPISODE = 5
# A run has an optimizer of its own, on the model that the one before it left.
EPISODES_IN_RUN, RUNS = 20, 10
WARM_UP = 3  # runs


class Parts(Net):
    """A model of which blocks may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.left_out: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for number, block in enumerate(self.blocks):
            x = x if number in self.left_out else block(x)
        out: Tensor = self.head(x)
        return out


def spread(model: nn.Module, kind: str) -> nn.Module:
    if kind == "fsdp":
        return fsdp(model)
    return DistributedDataParallel(model, find_unused_parameters=True)


class Kept(NamedTuple):
    """What a process holds between two runs, and what the optimizer said that it held."""

    tensors: int
    objects: int
    resident: int
    reported: int


def kept(reported: int) -> Kept:
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(item), Tensor) for item in objects)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Kept(tensors, len(objects), pages * 4096, reported)


class Training:
    """Steps, and what may come between them: the same on all ranks."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.kind = kind
        self.inner = Parts().double()
        self.model = spread(self.inner, kind)
        self.random = random.Random(0)
        self.count: dict[str, int] = {}
        self.step_number = 0

    def groups(self) -> list[nn.Module]:
        """Modules whose parameters are trained by and by."""
        return [self.inner.embed, self.inner.blocks[0], self.inner.blocks[1], self.inner.head]

    def begin(self, seed: int) -> None:
        self.added = 2
        self.seed = seed
        self.optimizer: Any = self.make_optimizer()
        self.snapshot: Any = None

    def make_optimizer(self) -> Any:
        groups = [{"params": list(part.parameters())} for part in self.groups()[: self.added]]
        base = torch.optim.AdamW(groups, lr=0.003)
        return GMixoutOptimizer(
            base, mask_prob=0.7, resample_every=STEPS_IN_EPISODE, seed=self.seed, granularity="row"
        )

    def step(self) -> None:
        self.step_number += 1
        generator = torch.Generator().manual_seed(self.step_number)
        x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        part = part_of_batch(self.kind, len(x))
        self.optimizer.zero_grad()
        (self.model(x[part]) - 1).square().mean().backward()
        self.optimizer.step()

    def act(self) -> None:
        """One thing or none."""
        choices = {
            None: 40,
            self.leave_out: 15,
            self.freeze: 10,
            self.add_group: 3,
            self.move_on: 3,
            self.load_again: 3,
            self.evaluate: 10,
            self.resample: 3,
            self.check: 5,
        }
        (action,) = self.random.choices(list(choices), list(choices.values()))
        if action is not None:
            self.count[action.__name__] = self.count.get(action.__name__, 0) + 1
            action()

    def leave_out(self) -> None:
        self.inner.left_out = set(self.random.sample([0, 1], self.random.choice([0, 1, 1, 2])))

    def freeze(self) -> None:
        """Some parameters, or thaw them. The head stays, so that there is something to train."""
        params = [param for part in self.groups()[:3] for param in part.parameters()]
        for param in self.random.sample(params, 4):
            param.requires_grad_(not param.requires_grad)

    def add_group(self) -> None:
        if self.added < len(self.groups()):
            self.optimizer.add_param_group(
                {"params": list(self.groups()[self.added].parameters()), "lr": 0.002}
            )
            self.added += 1

    def move_on(self) -> None:
        """Into an optimizer that is built anew."""
        state = self.optimizer.state_dict()
        del self.optimizer
        self.snapshot = None
        self.optimizer = self.make_optimizer()
        self.optimizer.load_state_dict(state)

    def load_again(self) -> None:
        self.optimizer.load_state_dict(self.optimizer.state_dict())

    def evaluate(self) -> None:
        with self.optimizer.eval_weights(), torch.no_grad():
            self.model(torch.zeros(4, 5, dtype=torch.float64))

    def resample(self) -> None:
        self.optimizer.resample()

    def check(self) -> None:
        self.snapshot = check_invariants(self.optimizer, snapshot=self.snapshot)

    def end(self) -> int:
        """The bytes that the optimizer kept, with all groups."""
        while self.added < len(self.groups()):
            self.add_group()
        self.inner.left_out = set()
        for param in self.inner.parameters():
            param.requires_grad_(True)
        self.step()
        self.check()
        reported = self.optimizer.report().total("bytes")
        self.optimizer.consolidate()
        self.optimizer.zero_grad()
        del self.optimizer, self.snapshot
        return reported


def load(rank: int, kind: str, runs: int) -> tuple[list[Kept], list[Tensor], dict[str, int]]:
    warnings.filterwarnings("ignore", ".*freshly initialised", UserWarning)
    training = Training(kind)
    found = []
    for run in range(runs):
        training.begin(seed=run)
        for episode in range(EPISODES_IN_RUN):
            for _ in range(STEPS_IN_EPISODE):
                training.act()
                training.step()
            if episode % 2:
                training.check()
        reported = training.end()
        if run in (WARM_UP, runs - 1):
            found.append(kept(reported))
    assert all(map(is_dtensor, training.inner.parameters())) == (kind == "fsdp")
    return found, whole_weights(training.inner), training.count


def check_long_training(runs: int) -> None:
    weights = []
    for kind in ("fsdp", "ddp"):
        ranks = on_ranks(RANKS, load, kind, runs, limit=240)
        for found, _, count in ranks:
            warm, last = found
            assert last.tensors <= warm.tensors
            assert last.objects < warm.objects + 500
            assert last.resident < warm.resident + 4_000_000
            assert min(count.values()) > runs
        reported = [[at.reported for at in found] for found, _, _ in ranks]
        assert len({sum(at) for at in zip(*reported, strict=True)}) == 1
        weights.append(ranks[0][1])
        for _, others, _ in ranks[1:]:
            assert all(map(torch.equal, weights[-1], others))
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert not multiprocessing.active_children()


@needs_gloo
def test_a_long_training_stays_right_and_does_not_grow() -> None:
    check_long_training(RUNS)


def step_without_gradients(rank: int) -> None:
    """Others of the model have some: they are trained later, or by another optimizer."""
    model = fsdp(Parts().double())
    optimizer = GMixoutOptimizer(torch.optim.SGD(model.blocks[0].parameters(), lr=0.1))
    model.left_out = {0}
    model(torch.ones(1, 5, dtype=torch.float64)).sum().backward()
    optimizer.step()
    optimizer.add_param_group({"params": list(model.blocks[1].parameters())})
    optimizer.step()
    assert len(optimizer.base.param_groups) == 2
    assert optimizer.steps_in_episode == 2


@needs_gloo
def test_a_step_in_which_only_others_of_the_model_have_gradients() -> None:
    on_ranks(1, step_without_gradients)


def meet_often(rank: int) -> tuple[int, int]:
    model = fsdp(Parts().double())
    optimizer = GMixoutOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.ones(1, 5, dtype=torch.float64)).sum().backward()
    optimizer.step()
    counts = []
    for _ in range(4):
        optimizer.state_dict()
        dist.barrier()
        counts.append(dist.distributed_c10d._get_default_store().num_keys())
        dist.barrier()
    return counts[1], counts[-1]


@needs_gloo
def test_state_dicts_leave_nothing_in_the_store() -> None:
    for second, last in on_ranks(RANKS, meet_often):
        assert last == second
