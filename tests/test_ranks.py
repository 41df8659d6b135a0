"""Trainings on several ranks: the same run whatever their number and however weights are spread."""

from __future__ import annotations

import gc
import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gmixout_optim import GMixoutOptimizer, compiled, shards
from gmixout_optim.packed_gradient import PackedGradient
from gmixout_optim.shards import whole_of
from gmixout_optim.testing import check_invariants
from tests import meshes
from tests.ranks import needs_gloo, on_ranks

pytestmark = needs_gloo

GRIDS: list[tuple[str, int]] = [
    ("ddp", 2),
    ("fsdp", 1),
    ("fsdp", 2),
    ("fsdp", 3),
    ("fsdp", 4),
    ("hsdp", 4),
    ("tp", 2),
    ("tp", 3),
    ("fsdp_tp", 4),
]

# One process equals these up to the rounding of what is added up in another order.
SETTINGS: list[dict[str, Any]] = [
    dict(granularity="element", sampler="bernoulli", rescale=True),
    dict(granularity=3, grad_layout="packed"),
    dict(granularity="column", layout="dense"),
    dict(granularity="row", residual="persistent"),
]

# ... and these to the last bit, since gradients are exact.
SINGLE = partial(torch.optim.AdamW, fused=False, foreach=False)
EXACT: list[dict[str, Any]] = [
    dict(granularity="element"),
    dict(granularity=8, sampler="bernoulli"),
    dict(granularity=5, rescale=True),
    dict(granularity="column", grad_layout="packed", sampler="bernoulli"),
    dict(granularity="row", layout="dense", sampler="bernoulli"),
    dict(granularity="row", residual="persistent"),
    dict(granularity="element", dtype=torch.bfloat16, stochastic_rounding=True),
    dict(granularity="column", dtype=torch.bfloat16, grad_layout="packed"),
]


def fitting(spread: str, settings: dict[str, Any]) -> dict[str, Any]:
    """DDP's reducer owns the gradients."""
    return {**settings, "grad_layout": "dense"} if spread == "ddp" else settings


def trained(spread: str, settings: dict[str, Any]) -> tuple[list[Tensor], ...]:
    settings = fitting(spread, settings)
    model = meshes.SPREADS[spread](meshes.net())
    optimizer = meshes.wrap(model, **settings)
    norms = meshes.train(model, optimizer, spread, range(7), clip=0.5)
    masks, weights = meshes.whole_masks(optimizer), meshes.whole_weights(model)
    check_invariants(optimizer)
    optimizer.consolidate()
    return masks, norms, weights, meshes.whole_weights(model)


def trained_exactly(spread: str, settings: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    settings = fitting(spread, dict(settings))
    model = meshes.SPREADS[spread](meshes.exact(settings.pop("dtype", torch.float32)))
    optimizer = meshes.wrap(model, SINGLE, exclude=(), **settings)
    meshes.train_exactly(model, optimizer, spread, range(7))
    return meshes.whole_masks(optimizer), meshes.whole_weights(model)


def all_trained(rank: int, spread: str) -> tuple[list[Any], list[Any]]:
    warnings.simplefilter("ignore")  # the models are random
    return [trained(spread, each) for each in SETTINGS], [
        trained_exactly(spread, each) for each in EXACT
    ]


@pytest.fixture(scope="module")
def alone() -> tuple[list[Any], list[Any]]:
    """The same in one process without process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [trained("one", each) for each in SETTINGS], [
            trained_exactly("one", each) for each in EXACT
        ]


@pytest.mark.parametrize(("spread", "size"), GRIDS)
def test_invariant_14_training_does_not_depend_on_ranks(
    spread: str, size: int, alone: tuple[list[Any], list[Any]]
) -> None:
    for rounded, exact in on_ranks(size, all_trained, spread, limit=120):
        for ours, theirs, settings in zip(rounded, alone[0], SETTINGS, strict=True):
            assert all(map(torch.equal, ours[0], theirs[0])), f"index sets of {settings}"
            for some, others in zip(ours[1:], theirs[1:], strict=True):
                torch.testing.assert_close(some, others, rtol=1e-10, atol=1e-12)
        for ours, theirs, settings in zip(exact, alone[1], EXACT, strict=True):
            for some, others in zip(ours, theirs, strict=True):
                assert all(map(torch.equal, some, others)), settings


def fsdp_exactly(rank: int, feature: str) -> tuple[list[Tensor], list[Tensor]]:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    warnings.simplefilter("ignore")
    options: dict[str, dict[str, Any]] = {
        "resharding": dict(reshard_after_forward=True),
        "no resharding": dict(reshard_after_forward=False),
        "mixed precision": dict(
            mp_policy=MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=True
            )
        ),
        "offload": dict(offload_policy=CPUOffloadPolicy(pin_memory=False)),
    }
    model: Any = meshes.exact()
    if feature == "activation checkpointing":
        model.blocks = nn.ModuleList([checkpoint_wrapper(block) for block in model.blocks])
    model = meshes.fsdp(model, **options.get(feature, {}))
    packs = feature in ("resharding", "mixed precision", "accumulation")
    optimizer = meshes.wrap(
        model,
        SINGLE,
        exclude="blocks.1.weights.3",
        grad_layout="packed" if packs else "dense",
        granularity="column",
        mask_prob=0.5,
    )

    def accumulate() -> None:
        """Two micro-batches that add up to nothing, one of them without communication."""
        model.set_requires_gradient_sync(False)
        model(torch.tensor(3.0)).backward()
        model.set_requires_gradient_sync(True)
        model(torch.tensor(-3.0)).backward()

    before = accumulate if feature == "accumulation" else None
    meshes.train_exactly(model, optimizer, "fsdp", range(7), before)
    assert not packs or any(
        type(shards.local_of(param.grad)) is PackedGradient for param in model.parameters()
    )
    return meshes.whole_masks(optimizer), meshes.whole_weights(model)


@pytest.mark.parametrize(
    "feature",
    [
        "resharding",
        "no resharding",
        "mixed precision",
        "offload",
        "accumulation",
        "activation checkpointing",
    ],
)
def test_what_fsdp2_offers_changes_nothing(feature: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = meshes.exact()
        optimizer = meshes.wrap(
            model, SINGLE, exclude="blocks.1.weights.3", granularity="column", mask_prob=0.5
        )
    meshes.train_exactly(model, optimizer, "one", range(7))
    expected = meshes.whole_masks(optimizer), meshes.whole_weights(model)
    for ours in on_ranks(2, fsdp_exactly, feature):
        for some, others in zip(ours, expected, strict=True):
            assert all(map(torch.equal, some, others))


# What is written to pieces, and what the next forward pass sees


def forward_passes(rank: int, options: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")
    model = meshes.fsdp(meshes.net(), **options)
    optimizer = meshes.wrap(model, resample_every=None)
    meshes.train(model, optimizer, "fsdp", range(3))
    inputs, _ = meshes.batch(0)

    @torch.no_grad()
    def shown() -> Tensor:
        output: Tensor = model(inputs)
        return output

    live = shown()
    with optimizer.eval_weights():
        deployed = shown()
    assert not torch.equal(live, deployed)
    assert torch.equal(shown(), live)
    optimizer.eval()
    assert torch.equal(shown(), deployed)
    optimizer.train()
    assert torch.equal(shown(), live)
    optimizer.resample()
    assert torch.equal(shown(), deployed)
    meshes.train(model, optimizer, "fsdp", range(3, 5))
    shown()
    pieces = [param for group in optimizer.param_groups for param in group["params"]]

    @torch.no_grad()
    def fill(number: float) -> None:
        for param in pieces:
            shards.local_of(param).fill_(number)

    fill(0.5)
    optimizer.resync()
    half = shown()
    fill(0.25)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not torch.equal(shown(), half)
    meshes.train(model, optimizer, "fsdp", range(5, 7))
    before = shown()
    optimizer.consolidate()
    assert not torch.equal(shown(), before)


@pytest.mark.parametrize(
    "options", [{}, dict(reshard_after_forward=True), dict(reshard_after_forward=False)]
)
def test_the_next_forward_pass_sees_what_was_written(options: dict[str, Any]) -> None:
    on_ranks(2, forward_passes, options)


# Gradients


def clipped(spread: str, how: str, grad_layout: str, p: float) -> list[Tensor]:
    warnings.simplefilter("ignore")
    model = meshes.SPREADS[spread](meshes.net())
    optimizer = meshes.wrap(model, grad_layout=grad_layout, rescale=True)
    norms = []
    for step in range(3):
        x, y = meshes.batch(step)
        part = meshes.part_of_batch(spread, len(x))
        optimizer.zero_grad()
        (model(x[part]) - y[part]).square().mean().backward()
        if how == "ours":
            norms.append(optimizer.clip_grad_norm_(0.1, p))
        else:
            norms.append(whole_of(nn.utils.clip_grad_norm_(model.parameters(), 0.1, p)))
        optimizer.step()
    return [*norms, *meshes.whole_weights(model)]


def all_clipped(rank: int, spread: str, cases: list[Any]) -> list[Any]:
    return [clipped(spread, *case) for case in cases]


@pytest.mark.parametrize(("spread", "size"), [("fsdp", 3), ("hsdp", 4), ("fsdp_tp", 4)])
def test_norms_are_those_of_the_whole(spread: str, size: int) -> None:
    powers = [1.0, 2.0, 3.0, float("inf"), float("-inf"), 0.0]
    cases: list[Any] = [("ours", "dense", p) for p in powers]
    cases += [("ours", "packed", 2.0)]
    if spread != "fsdp_tp":  # torch's own clips parameters of one mesh alone
        cases += [("torch", "packed", 2.0), ("torch", "packed", 1.0)]
    with warnings.catch_warnings():
        expected = [clipped("one", *case) for case in cases]
    for ours in on_ranks(size, all_clipped, spread, cases):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def buffers(rank: int) -> None:
    warnings.simplefilter("ignore")
    model = meshes.fsdp(meshes.net())
    optimizer = meshes.wrap(model, grad_layout="packed")
    meshes.train(model, optimizer, "fsdp", range(2))
    for name, param in model.named_parameters():
        grad = shards.local_of(param.grad)
        if "head" in name:  # not mixed
            assert type(grad) is Tensor
            assert grad.untyped_storage().nbytes() == grad.nbytes
        else:
            assert type(grad) is type(param.grad.to_local()) is PackedGradient
    optimizer.zero_grad(set_to_none=False)
    for sign in (1, -1):  # two backward passes are added up in the packed gradients
        (sign * model(meshes.batch(0)[0]).sum()).backward()
    assert optimizer.clip_grad_norm_(1.0) < 1e-9
    optimizer.consolidate()
    optimizer.zero_grad()
    model(meshes.batch(0)[0]).sum().backward()
    assert all(type(shards.local_of(param.grad)) is Tensor for param in model.parameters())


def test_packed_gradients_leave_no_reduce_buffer_behind() -> None:
    on_ranks(2, buffers)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(40)
        self.up = nn.Linear(40, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.norm(x))
        return out


def sequence_parallel(
    rank: int, options: dict[str, Any], clips: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """A norm's weight is on all ranks, each with the gradient of its part of the sequence."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    warnings.simplefilter("ignore")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Normed().double()
    part = slice(None)
    if dist.is_initialized():
        up = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
        mesh = init_device_mesh("cpu", (2,))
        parallelize_module(model, mesh, {"norm": SequenceParallel(), "up": up})
        part = slice(4 * rank, 4 * rank + 4)
    optimizer = meshes.wrap(model, exclude=(), **options)
    norms = []
    for step in range(7):
        x = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(step)).double()
        optimizer.zero_grad()
        model(x[:, part]).square().mean().backward()
        if clips:
            norms.append(optimizer.clip_grad_norm_(0.5))
        optimizer.step()
    return norms, meshes.whole_weights(model)


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("options", [{}, dict(grad_layout="packed"), dict(layout="dense")])
def test_gradients_that_are_summands_are_added_up(options: dict[str, Any], clips: bool) -> None:
    expected = sequence_parallel(0, options, clips)
    for ours in on_ranks(2, sequence_parallel, options, clips):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


# What ranks tell each other


def stepped(rank: int, spread: str, given: dict[str, Any], late: bool) -> str:
    """The error of a first step, or of the first after loading, where the last rank differs."""
    warnings.simplefilter("ignore")
    is_last = rank == dist.get_world_size() - 1
    settings = {key: values[is_last] for key, values in given.items()}
    model = meshes.SPREADS[spread](meshes.net())
    optimizer = meshes.wrap(model, **({} if late else settings))
    if late:
        meshes.train(model, optimizer, spread, range(2))
        state = optimizer.state_dict()
        for group in state["param_groups"]:
            group["gmixout"].update(settings)
        optimizer.load_state_dict(state)
    before = [shards.local_of(param.detach()).clone() for param in model.parameters()]
    with pytest.raises(RuntimeError) as error:
        meshes.train(model, optimizer, spread, range(1))
    after = [shards.local_of(param.detach()) for param in model.parameters()]
    assert all(map(torch.equal, before, after))
    return str(error.value)


@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (dict(seed=[0, 1]), "seed=0 on rank 0 are not those of ranks 1"),
        (dict(resample_every=[3, 4]), "resample_every=3, episode_warmup=3 on rank 0"),
        (dict(mask_prob=[0.5, 0.6]), "the parameters that are mixed on rank 0"),
        (dict(exclude=["*head*", "*embed*"]), "the parameters that are mixed on rank 0"),
        (dict(anchor_decay=[0.5, 0.9]), "the options of the groups on rank 0"),
        (dict(lr=[0.01, 0.02]), "the options of the groups on rank 0"),
    ],
)
def test_ranks_that_differ_are_found_at_the_first_step(
    spread: str, given: dict[str, Any], shown: str
) -> None:
    first, second = on_ranks(2, stepped, spread, given, False)
    assert first.startswith("ranks differ: ")
    assert shown in first
    assert "on rank 1 are not those of ranks 0" in second


@pytest.mark.parametrize("spread", ["hsdp", "fsdp_tp"])
def test_all_ranks_of_a_mesh_hear_of_one_that_differs(spread: str) -> None:
    for rank, error in enumerate(on_ranks(4, stepped, spread, dict(seed=[0, 1]), False)):
        others = "3" if rank < 3 else "0, 1, 2"
        assert f"seed={rank // 3} on rank {rank} are not those of ranks {others}," in error


def test_ranks_that_load_different_states_are_found() -> None:
    first, _ = on_ranks(2, stepped, "ddp", dict(steps_in_episode=[1, 2]), True)
    assert "ranks differ: steps_in_episode=1 on rank 0" in first


def unrelated(rank: int) -> None:
    """Ranks that train models of their own, with other settings, and not in the same steps."""
    warnings.simplefilter("ignore")
    model = meshes.net()
    optimizer = meshes.wrap(model, seed=rank)
    for step in range(rank + 1):
        model(meshes.batch(step)[0]).sum().backward()
        optimizer.step()
    optimizer.state_dict()
    print(optimizer.report())


def test_ranks_that_train_other_models_are_not_waited_for() -> None:
    on_ranks(2, unrelated, limit=20)


def local_report(rank: int) -> Any:
    warnings.simplefilter("ignore")
    model = meshes.fsdp(meshes.net())
    optimizer = meshes.wrap(model)
    meshes.train(model, optimizer, "fsdp", range(2))
    if rank == 0:
        dist.barrier()  # the other rank does not take part in the report
        return optimizer.report().total("bytes"), optimizer.report().total("state_bytes")
    report = optimizer.report().total("bytes"), optimizer.report().total("state_bytes")
    dist.barrier()
    return report


def test_a_report_is_of_one_rank() -> None:
    model = meshes.net()
    optimizer = meshes.wrap(model)
    meshes.train(model, optimizer, "one", range(2))
    report = optimizer.report()
    counts = sum(8 for _ in model.parameters())  # steps, float32, on each of the ranks
    shares = on_ranks(2, local_report)
    assert sum(share[1] for share in shares) == report.total("state_bytes") + counts / 2
    assert abs(shares[0][0] / report.total("bytes") - 0.5) < 0.1


def built_too_early(rank: int, spread: str) -> str:
    warnings.simplefilter("ignore")
    model = meshes.net()
    optimizer = meshes.wrap(model)
    model = meshes.SPREADS[spread](model)
    with pytest.raises(RuntimeError) as error:
        meshes.train(model, optimizer, spread, range(1))
    return str(error.value)


@pytest.mark.parametrize("spread", ["fsdp", "tp"])
def test_an_optimizer_that_was_built_before_sharding_is_refused(spread: str) -> None:
    for error in on_ranks(2, built_too_early, spread):
        assert "Build the base and its GMixoutOptimizer after them" in error


def compiled_never(rank: int) -> None:
    warnings.simplefilter("ignore")

    def fuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("compiled")

    compiled.fuse = fuse
    model = meshes.fsdp(meshes.exact())
    optimizer = meshes.wrap(model, SINGLE, exclude=(), compile=True)
    warnings.simplefilter("error")  # a compiler that fails is warned of
    meshes.train_exactly(model, optimizer, "fsdp", range(7))


def test_pieces_are_not_compiled() -> None:
    """Their sets differ in size from episode to episode."""
    on_ranks(2, compiled_never)


def muon(spread: str) -> list[Tensor]:
    """Matrices alone, which it orthogonalises whole."""
    warnings.simplefilter("ignore")
    model = meshes.SPREADS[spread](meshes.net())
    for param in model.parameters():
        param.requires_grad_(param.ndim == 2)
    matrices = [(name, param) for name, param in model.named_parameters() if param.ndim == 2]
    base = torch.optim.Muon(matrices, lr=0.01)
    optimizer = GMixoutOptimizer(base, resample_every=3, mask_prob=0.7, lr_scale=1.0)
    meshes.train(model, optimizer, spread, range(5))
    return meshes.whole_weights(model)


def muon_on(rank: int, spread: str) -> list[Tensor]:
    return muon(spread)


def test_muon_on_pieces() -> None:
    expected = muon("one")
    for ours in on_ranks(2, muon_on, "fsdp"):
        # It works in bfloat16.
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=2e-3)


def all_at_once(spread: str, options: dict[str, Any], grad_layout: str) -> list[Tensor]:
    warnings.simplefilter("ignore")
    model = meshes.SPREADS[spread](meshes.net())
    base = partial(torch.optim.AdamW, **options)
    same_rate: Any = dict(lr_scale=1.0, episode_warmup=0)
    optimizer = meshes.wrap(
        model, base, exclude=("*head*", "*up*"), grad_layout=grad_layout, **same_rate
    )
    meshes.train(model, optimizer, spread, range(4))
    return meshes.whole_weights(model)


def all_at_once_on(rank: int, *args: Any) -> list[Tensor]:
    return all_at_once("fsdp", *args)


@pytest.mark.parametrize("options", [dict(foreach=True), dict(fused=True)])
def test_plain_tensors_and_dtensors_are_not_stepped_together(options: dict[str, Any]) -> None:
    """Packed values are plain, what is not mixed are DTensors: torch refuses both in one list."""
    expected = all_at_once("one", options, "packed")
    for ours in on_ranks(2, all_at_once_on, options, "packed"):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def written_to(rank: int, through: str) -> None:
    """A weight that somebody loads after the last step is the one to deploy."""
    warnings.simplefilter("ignore")
    model = meshes.fsdp(meshes.net())
    optimizer = meshes.wrap(model, resample_every=None)
    meshes.train(model, optimizer, "fsdp", range(3))
    param = model.blocks[1].up.weight
    with torch.no_grad():
        (param if through == "dtensor" else param.to_local()).mul_(2.0)
    loaded = whole_of(param.detach())
    with pytest.warns(UserWarning, match="weights of blocks.1.up.weight were written"):
        optimizer.consolidate()
    assert torch.equal(whole_of(param.detach()), loaded)


@pytest.mark.parametrize("through", ["dtensor", "piece"])
def test_weights_that_were_written_from_outside_stay(through: str) -> None:
    on_ranks(2, written_to, through)


def communication(rank: int, settings: dict[str, Any]) -> dict[str, int]:
    """How many collectives each call makes, after the first step."""
    from torch.distributed.tensor.debug import CommDebugMode

    warnings.simplefilter("ignore")
    model = meshes.fsdp(meshes.net())
    optimizer = meshes.wrap(model, resample_every=2, **settings)
    meshes.train(model, optimizer, "fsdp", range(1))
    counts = {}
    calls = [optimizer.step, optimizer.step, optimizer.resample, optimizer.eval, optimizer.train]
    for call in [*calls, optimizer.report, optimizer.resync, optimizer.consolidate]:
        with CommDebugMode() as mode:
            call()
        counts[call.__name__] = counts.get(call.__name__, 0) + mode.get_total_counts()
    with CommDebugMode() as mode:  # it does see some
        optimizer.state_dict()
    assert mode.get_total_counts() > 0
    return counts


@pytest.mark.parametrize(
    "settings",
    [{}, dict(layout="dense"), dict(residual="persistent"), dict(granularity="row")],
)
def test_steps_and_redraws_communicate_nothing(settings: dict[str, Any]) -> None:
    for counts in on_ranks(2, communication, settings):
        assert len(counts) == 7
        assert not any(counts.values()), counts


def gathers_of_teacher(rank: int) -> list[int]:
    """A model beside the trained one, which FSDP2 may keep gathered."""
    from torch.distributed.tensor.debug import CommDebugMode

    warnings.simplefilter("ignore")
    model, teacher = (
        meshes.fsdp(meshes.net()),
        meshes.fsdp(meshes.net(), reshard_after_forward=False),
    )
    optimizer = meshes.wrap(model)
    counts = []
    for step in range(3):
        with CommDebugMode() as mode, torch.no_grad():
            teacher(meshes.batch(step)[0])
        counts.append(mode.get_total_counts())
        meshes.train(model, optimizer, "fsdp", range(step, step + 1))
    return counts


def test_other_models_stay_gathered() -> None:
    for first, *others in on_ranks(2, gathers_of_teacher):
        assert first > 0
        assert others == [0, 0]


def unsynced(spread: str) -> list[Tensor]:
    """Gradients of two micro-batches, which ranks exchange in the second one."""
    warnings.simplefilter("ignore")
    model: Any = meshes.SPREADS[spread](meshes.net())
    optimizer = meshes.wrap(model)
    for step in range(5):
        optimizer.zero_grad()
        for micro in range(2):
            x, y = meshes.batch(2 * step + micro)
            part = meshes.part_of_batch(spread, len(x))
            with model.no_sync() if spread == "ddp" and not micro else nullcontext():
                (model(x[part]) - y[part]).square().mean().backward()
        optimizer.step()
    return meshes.whole_weights(model)


def unsynced_on(rank: int) -> list[Tensor]:
    return unsynced("ddp")


def test_ddp_accumulates_without_communication() -> None:
    expected = unsynced("one")
    first, second = on_ranks(2, unsynced_on)
    assert all(map(torch.equal, first, second))
    torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-12)


def hooks_left(rank: int) -> list[int]:
    warnings.simplefilter("ignore")
    model = meshes.fsdp(meshes.net())
    for _ in range(3):
        optimizer = meshes.wrap(model, grad_layout="packed")
        meshes.train(model, optimizer, "fsdp", range(1))
        del optimizer
        gc.collect()
    return [len(param._post_accumulate_grad_hooks or ()) for param in model.parameters()]


def test_optimizers_that_are_gone_leave_no_hooks() -> None:
    assert not any(map(sum, on_ranks(2, hooks_left)))


class Middle(nn.Module):
    """A weight of the root between two modules that FSDP2 gathers for themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(5, 40), nn.Linear(40, 2)])
        self.middle = nn.Linear(40, 40)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks[1](torch.tanh(self.middle(torch.tanh(self.blocks[0](x)))))
        return out


def stepped_in_backward(rank: int) -> list[Tensor]:
    """An optimizer for each parameter, which steps as soon as there is a gradient."""
    warnings.simplefilter("ignore")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = Middle().double()
    spread = "fsdp" if dist.is_initialized() else "one"
    model = meshes.SPREADS[spread](model)
    for param in model.parameters():
        optimizer = GMixoutOptimizer(torch.optim.AdamW([param], lr=0.01), resample_every=2)

        def step(param: Tensor, optimizer: Any = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        param.register_post_accumulate_grad_hook(step)
    for step_ in range(5):
        x, y = meshes.batch(step_)
        part = meshes.part_of_batch(spread, len(x))
        (model(x[part]) - y[part]).square().mean().backward()
    return meshes.whole_weights(model)


def test_steps_in_backward() -> None:
    expected = stepped_in_backward(0)
    for ours in on_ranks(2, stepped_in_backward):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
