"""What is saved on some ranks in the middle of an episode, others go on from, to the last bit."""

from __future__ import annotations

import warnings
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from gmixout_optim import shards
from tests import meshes
from tests.ranks import needs_gloo, on_ranks
from tests.test_ranks import SINGLE

pytestmark = [needs_gloo, pytest.mark.filterwarnings("ignore")]

SAVED_AT, END = 5, 9  # the second episode of three steps is at its second

SETTINGS: list[dict[str, Any]] = [
    dict(granularity="element"),
    dict(granularity="column", sampler="bernoulli"),
    dict(granularity=5, rescale=True),
    dict(granularity="row", layout="dense", sampler="bernoulli"),
    dict(granularity="row", residual="persistent"),
    dict(granularity="element", dtype=torch.bfloat16, stochastic_rounding=True),
    dict(granularity="column", base=partial(torch.optim.SGD, foreach=False)),
]


def made(spread: str, settings: dict[str, Any], seed: int) -> tuple[Any, Any]:
    settings = dict(settings)
    model = meshes.SPREADS[spread](meshes.exact(settings.pop("dtype", torch.float32)))
    base = settings.pop("base", SINGLE)
    exclude = "*blocks.1.weights.3"
    return model, meshes.wrap(model, base, exclude=exclude, seed=seed, **settings)


def saved(rank: int, spread: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    states = {}
    for place, settings in enumerate(SETTINGS):
        model, optimizer = made(spread, settings, seed=5)
        meshes.train_exactly(model, optimizer, spread, range(SAVED_AT))
        states[str(place)] = get_state_dict(model, optimizer)
    dcp.save(by_name(states), checkpoint_id=folder)


def by_name(states: dict[str, Any]) -> dict[str, Any]:
    return {key: {"model": model, "optimizer": state} for key, (model, state) in states.items()}


def gone_on(rank: int, spread: str, folder: str) -> list[Any]:
    warnings.simplefilter("ignore")
    fresh = [made(spread, settings, seed=9) for settings in SETTINGS]  # until it is loaded
    states = {str(place): get_state_dict(*pair) for place, pair in enumerate(fresh)}
    assert all(optimizer.steps_in_episode == 0 for _, optimizer in fresh)
    dcp.load(by_name(states), checkpoint_id=folder)
    ends = []
    for (model, optimizer), (weights, state) in zip(fresh, states.values(), strict=True):
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        meshes.train_exactly(model, optimizer, spread, range(SAVED_AT, END))
        ends.append((meshes.whole_masks(optimizer), meshes.whole_weights(model)))
    return ends


@pytest.fixture(scope="module")
def saved_on(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders that ranks have saved to, made once for each way to spread a model."""

    @cache
    def folder(spread: str, size: int) -> str:
        path = str(tmp_path_factory.mktemp("saved"))
        on_ranks(size, saved, spread, path, limit=120)
        return path

    return folder


@pytest.fixture(scope="module")
def never_stopped() -> list[Any]:
    ends = []
    for settings in SETTINGS:
        model, optimizer = made("one", settings, seed=5)
        meshes.train_exactly(model, optimizer, "one", range(END))
        ends.append((meshes.whole_masks(optimizer), meshes.whole_weights(model)))
    return ends


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("fsdp", 2), ("one", 1)),
        (("one", 1), ("fsdp", 4)),
        (("fsdp", 3), ("fsdp", 2)),
        (("fsdp", 2), ("ddp", 2)),
        (("ddp", 2), ("fsdp", 3)),
        (("ddp", 2), ("one", 1)),
        (("hsdp", 4), ("fsdp", 2)),
        (("fsdp", 3), ("hsdp", 4)),
        (("fsdp", 2), ("tp", 3)),
        (("tp", 2), ("fsdp_tp", 4)),
        (("fsdp_tp", 4), ("one", 1)),
    ],
)
def test_invariant_8_other_ranks_go_on_in_mid_episode(
    first: tuple[str, int], then: tuple[str, int], never_stopped: list[Any], saved_on: Any
) -> None:
    for ends in on_ranks(then[1], gone_on, then[0], saved_on(*first), limit=120):
        for (masks, weights), (own_masks, own_weights), settings in zip(
            ends, never_stopped, SETTINGS, strict=True
        ):
            assert all(map(torch.equal, masks, own_masks)), f"index sets of {settings}"
            assert all(map(torch.equal, weights, own_weights)), settings


# Other ways to save


def by_torch_save(rank: int, folder: str) -> list[torch.Tensor]:
    """A file for each rank, loaded by as many; loading needs the classes of DTensor."""
    warnings.simplefilter("ignore")
    model, optimizer = made("fsdp", SETTINGS[0], seed=5)
    meshes.train_exactly(model, optimizer, "fsdp", range(SAVED_AT))
    torch.save([model.state_dict(), optimizer.state_dict()], f"{folder}/{rank}.pt")
    model, optimizer = made("fsdp", SETTINGS[0], seed=5)
    weights, state = torch.load(f"{folder}/{rank}.pt", weights_only=False)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    meshes.train_exactly(model, optimizer, "fsdp", range(SAVED_AT, END))
    return meshes.whole_weights(model)


def by_whole_tensors(rank: int, folder: str) -> list[torch.Tensor]:
    """Rank 0 has the whole state, as one process has it, and gives each rank its part."""
    warnings.simplefilter("ignore")
    model, optimizer = made("fsdp", SETTINGS[0], seed=5)
    meshes.train_exactly(model, optimizer, "fsdp", range(SAVED_AT))
    gather = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(model, optimizer, options=gather)
    assert bool(state) == (rank == 0)
    if rank == 0:
        torch.save([weights, state], f"{folder}/whole.pt")
    model, optimizer = made("fsdp", SETTINGS[0], seed=5)
    spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=spread)
    set_optimizer_state_dict(model, optimizer, state, options=spread)
    meshes.train_exactly(model, optimizer, "fsdp", range(SAVED_AT, END))
    return meshes.whole_weights(model)


def by_flat_names(rank: int, folder: str) -> list[torch.Tensor]:
    warnings.simplefilter("ignore")
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = made("fsdp", SETTINGS[0], seed=5)
    meshes.train_exactly(model, optimizer, "fsdp", range(SAVED_AT))
    weights = [shards.local_of(param.detach()).clone() for param in model.parameters()]
    state = get_optimizer_state_dict(model, optimizer, options=flat)
    dcp.save(state, checkpoint_id=folder)
    model, optimizer = made("fsdp", SETTINGS[0], seed=5)
    with torch.no_grad():
        for param, held in zip(model.parameters(), weights, strict=True):
            shards.local_of(param).copy_(held)
    state = get_optimizer_state_dict(model, optimizer, options=flat)
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state, options=flat)
    meshes.train_exactly(model, optimizer, "fsdp", range(SAVED_AT, END))
    return meshes.whole_weights(model)


@pytest.mark.parametrize("way", [by_torch_save, by_whole_tensors, by_flat_names])
def test_other_ways_to_save(way: Any, never_stopped: list[Any], tmp_path: Path) -> None:
    for weights in on_ranks(2, way, str(tmp_path)):
        assert all(map(torch.equal, weights, never_stopped[0][1]))


def test_a_whole_state_is_that_of_one_process(tmp_path: Path) -> None:
    on_ranks(2, by_whole_tensors, str(tmp_path))
    _, state = torch.load(tmp_path / "whole.pt", weights_only=False)
    model, optimizer = made("one", SETTINGS[0], seed=5)
    meshes.train_exactly(model, optimizer, "one", range(SAVED_AT))
    own = get_optimizer_state_dict(model, optimizer)
    torch.testing.assert_close(state["state"], own["state"], rtol=0, atol=0)
    assert state["param_groups"] == own["param_groups"]


def pieces_of_state(rank: int) -> dict[str, int]:
    """Bytes on a rank, and what is in the state dict, of ours and of AdamW's."""
    warnings.simplefilter("ignore")
    sizes = {}
    for name in ("adamw", "ours"):
        model: Any = torch.nn.Module()
        model.blocks = torch.nn.Sequential(torch.nn.Linear(300, 400, bias=False))
        model.forward = model.blocks.forward
        model = meshes.fsdp(model)
        optimizer = torch.optim.AdamW(model.named_parameters())
        if name == "ours":
            optimizer = meshes.wrap(model, mask_prob=0.9, exclude=())
        model(torch.ones(1, 300)).sum().backward()
        optimizer.step()
        state = optimizer.state_dict()
        sizes[name] = 0
        for entry in state["state"].values():
            for item in [*entry.values(), *entry.get("gmixout", {}).values()]:
                if isinstance(item, torch.Tensor):
                    assert item.ndim == 0 or shards.is_dtensor(item)
                    sizes[name] += shards.local_of(item).nbytes
    return sizes


def test_a_checkpoint_holds_less_than_a_sixth_on_each_rank() -> None:
    for sizes in on_ranks(2, pieces_of_state):
        assert sizes["ours"] <= 0.1501 * sizes["adamw"]


# Calls that all ranks have to make


def state_dict_alone(rank: int) -> str:
    """First on rank 0, then loading on rank 1."""
    warnings.simplefilter("ignore")
    model, optimizer = made("fsdp", SETTINGS[0], seed=5)
    meshes.train_exactly(model, optimizer, "fsdp", range(1))
    state = optimizer.state_dict()
    store: Any = dist.distributed_c10d._get_default_store()
    busy = [timedelta(seconds=30)]
    if rank == 1:
        store.wait(["saved"], *busy)
    call = partial(optimizer.load_state_dict, state) if rank else optimizer.state_dict
    waiting = pytest.warns(UserWarning, match=rf"state_dict\(\) is waiting for ranks {1 - rank}")
    with waiting, pytest.raises(RuntimeError) as error:
        call()
    store.set("loaded" if rank else "saved", "")
    if rank == 0:
        store.wait(["loaded"], *busy)
    for _ in range(2):  # together it works, also after that
        optimizer.load_state_dict(optimizer.state_dict())
    return str(error.value)


def test_a_state_dict_of_one_rank_alone_is_an_error_and_no_hang() -> None:
    for message in on_ranks(2, state_dict_alone, timeout=3):
        assert "state_dict() is a collective call" in message
    assert "and ranks 0 have not called it" in message


def first_steps_of_dcp(rank: int) -> None:
    """Fewer rows than ranks: what one rank has of a gradient can be empty, or all zeros."""
    warnings.simplefilter("ignore")
    model, optimizer = made("fsdp", SETTINGS[0], seed=5)
    get_optimizer_state_dict(model, optimizer)
    assert (optimizer.episode, optimizer.steps_in_episode) == (0, 0)
    model, optimizer = made("fsdp", SETTINGS[0], seed=5)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    if rank == 1:  # a gradient that rank 0 has nothing of
        shards.local_of(next(model.parameters()).grad).fill_(1.0)
    optimizer.step()
    assert optimizer.steps_in_episode == 1


def test_a_step_that_only_creates_state_is_one_on_all_ranks() -> None:
    on_ranks(2, first_steps_of_dcp)


def state_of_empty_pieces(rank: int) -> list[Any]:
    warnings.simplefilter("ignore")
    model, optimizer = made("fsdp", dict(granularity="row"), seed=5)
    meshes.train_exactly(model, optimizer, "fsdp", range(4))
    state = optimizer.state_dict()["state"]
    assert any(not shards.local_of(param).numel() for param in model.parameters()) == (rank == 3)
    return [
        (number, sorted(entry), sorted(entry.get("gmixout", {}))) for number, entry in state.items()
    ]


def test_ranks_with_empty_pieces_have_the_same_keys() -> None:
    first, *others = on_ranks(4, state_of_empty_pieces)
    assert first
    assert all(other == first for other in others)


@pytest.mark.parametrize("sampler", ["stratified", "bernoulli"])
def test_packed_vectors_have_one_size_in_all_episodes(sampler: Any) -> None:
    """torch.distributed.checkpoint loads into those of a fresh optimizer."""
    model = meshes.net()
    optimizer = meshes.wrap(model, sampler=sampler)
    sizes = set()
    for step in range(12):
        meshes.train(model, optimizer, "one", range(step, step + 1))
        state = optimizer.state_dict()["state"]
        shapes = [
            (entry["exp_avg"].shape, entry["gmixout"]["anchor"].shape)
            for entry in state.values()
            if "gmixout" in entry
        ]
        sizes.add(tuple(shapes))
    assert len(sizes) == 1


def odd_bits(rank: int) -> Any:
    """Signs of zeros, and what a nan carries, in pieces that overlap in nothing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    param = distribute_tensor(torch.zeros(4), mesh, [Shard(0)])
    found = []
    for dtype, ints in [
        (torch.float32, torch.int32),
        (torch.bfloat16, torch.int16),
        (torch.float64, torch.int64),
    ]:
        whole = torch.tensor([-0.0, float("nan"), float("-inf"), 1e-38], dtype=dtype)
        whole.view(ints)[1] += 1
        places = torch.tensor([[0, 3], [1, 2]])[rank]
        vector = shards.joined(param, whole[places], places, 5)
        assert shards.is_dtensor(vector)
        assert torch.equal(shards.whole_of(vector)[:4].view(ints), whole.view(ints))
        found.append(vector.placements)
    return found


def test_bits_are_kept() -> None:
    on_ranks(2, odd_bits)


# Calls that do not belong together


def crossed(rank: int, how: str) -> str:
    """The error that a rank gets; none where all is well."""
    warnings.simplefilter("ignore")
    first, second = (made("fsdp", SETTINGS[0], seed=5) for _ in range(2))
    for place, pair in enumerate((first, second)):
        meshes.train_exactly(*pair, "fsdp", range(1 + place))
    state = first[1].state_dict()
    try:
        if how == "saved in another order":
            (second, first)[rank][1].state_dict()
        elif how == "damaged on one rank":
            if rank == 1:
                del state["state"][0]["gmixout"]["anchor"]
            first[1].load_state_dict(state)
        elif how == "other values on one rank":
            state["param_groups"][0]["gmixout"]["episode"] += rank
            first[1].load_state_dict(state)
        elif how == "what a rank had":
            for entry in state["state"].values():
                entry["exp_avg"] = entry["exp_avg"].to_local().clone()
            first[1].load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        meshes.train_exactly(*first, "fsdp", range(1))  # it goes on as if nothing had been
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("saved in another order", "state_dict(): ranks {other} are in another call"),
        ("damaged on one rank", "load_state_dict(): ranks {other} are in another call"),
        ("other values on one rank", "load_state_dict(): ranks {other} are in another call"),
        ("what a rank had", "it is what one rank had"),
    ],
)
def test_calls_that_do_not_belong_together_are_refused(how: str, expected: str) -> None:
    for rank, error in enumerate(on_ranks(2, crossed, how, timeout=20)):
        assert expected.format(other=1 - rank) in error


def written_and_resumed(rank: int, folder: str) -> float:
    """Weights that were loaded after the last step are deployed as they are, after a resume too."""
    warnings.simplefilter("ignore")
    model, optimizer = made("fsdp", SETTINGS[0], seed=5)
    meshes.train_exactly(model, optimizer, "fsdp", range(SAVED_AT))
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.25)
    dcp.save(by_name({"0": get_state_dict(model, optimizer)}), checkpoint_id=folder)
    model, optimizer = made("fsdp", SETTINGS[0], seed=5)
    weights, state = get_state_dict(model, optimizer)
    dcp.load(by_name({"0": (weights, state)}), checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    optimizer.consolidate()
    return max(float((param - 0.25).abs().max()) for param in meshes.whole_weights(model))


def test_that_weights_were_written_is_resumed(tmp_path: Path) -> None:
    assert on_ranks(2, written_and_resumed, str(tmp_path)) == [0.0, 0.0]
