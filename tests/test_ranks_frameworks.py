"""Other people's loops on two processes: Hugging Face's Trainer and Accelerate with
DistributedDataParallel, and Accelerate's FSDP2, which replaces the optimizer's parameters."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.shards import whole_of
from tests import meshes
from tests.ranks import needs_gloo, on_ranks
from tests.test_replaced_parameters import STAND_IN_CALLS, WAYS
from tests.training import assert_equal, weights

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

pytestmark = needs_gloo


def launch(rank: int) -> None:
    """The environment that torchrun makes; the process group is there already, and is taken."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    warnings.simplefilter("ignore")  # theirs


def whole(state: Any) -> Any:
    """A state dict with whole tensors in place of DTensors."""
    if isinstance(state, Tensor):
        return whole_of(state.detach()).clone()
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [whole(value) for value in state]
    return state


def seen(model: nn.Module, optimizer: GMixoutOptimizer) -> dict[str, Any]:
    return dict(
        weights=[whole_of(weight) for weight in weights(model)],
        masks=meshes.whole_masks(optimizer),
        counters=(optimizer.episode, optimizer.steps_in_episode),
        state=whole(optimizer.state_dict()),
    )


# Hugging Face Trainer: two micro-batches make a step, eight steps an episode.


def _trainer(rank: int, folder: str) -> Any:
    launch(rank)
    import hf_trainer

    def run(name: str, resume_from: str | None = None) -> dict[str, Any]:
        trainer = hf_trainer.make_trainer(
            Path(folder) / name,
            steps=12,
            save_steps=5,
            eval_steps=4,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=256,
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        in_steps: dict[int, tuple[int, int]] = {}
        optimizer = trainer.optimizer

        class Count(hf_trainer.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                in_steps[state.global_step] = optimizer.episode, optimizer.steps_in_episode

        trainer.add_callback(Count())
        trainer.train(resume_from_checkpoint=resume_from)
        assert type(trainer.model_wrapped) is torch.nn.parallel.DistributedDataParallel
        return {**seen(trainer.model, optimizer), "in_steps": in_steps}

    return run("whole"), run("resumed", f"{folder}/whole/checkpoint-5")


def test_trainer_on_two_processes_resumes_exactly(tmp_path: Path) -> None:
    """It evaluates in between, and a checkpoint holds the weights to deploy."""
    (whole, resumed), others = on_ranks(2, _trainer, str(tmp_path), limit=120)
    assert_equal([whole, resumed], list(others))
    assert whole.pop("in_steps") == {step: divmod(step, 8) for step in range(1, 13)}
    assert resumed.pop("in_steps") == {step: divmod(step, 8) for step in range(6, 13)}
    assert_equal(whole, resumed)
    assert_equal(whole["masks"], masks_of_one_process(whole["counters"][0]))


def masks_of_one_process(episode: int) -> list[Tensor]:
    from tiny_task import Classifier

    model = Classifier()
    optimizer = torch.optim.AdamW(model.named_parameters())
    optimizer = GMixoutOptimizer(optimizer, exclude="head.*")
    for _ in range(episode):
        optimizer.resample()
    return [optimizer.active_mask(param) for param in model.parameters()]


# Accelerate: two batches make a step, eight steps an episode.


def _accelerate(rank: int, folder: str) -> Any:
    launch(rank)
    import accelerate_loop

    def run(loads: bool) -> dict[str, Any]:
        run = accelerate_loop.Run()
        assert type(run.model) is torch.nn.parallel.DistributedDataParallel
        data = run.data
        if loads:
            run.accelerator.load_state(folder)
            run.data = run.accelerator.skip_first_batches(data, 6)
        for number, _ in enumerate(run.epoch(), start=1):
            if number == 6 and not loads:
                run.accelerator.save_state(folder)
                run.validate()
        run.data = data
        for _ in range(2):
            list(run.epoch())
        return seen(run.model, run.gmixout)

    return run(loads=False), run(loads=True)


def test_accelerate_on_two_processes_resumes_exactly(tmp_path: Path) -> None:
    import accelerate_loop

    (whole, resumed), others = on_ranks(2, _accelerate, str(tmp_path), limit=60)
    assert_equal([whole, resumed], list(others))
    assert_equal(whole, resumed)
    assert whole["counters"] == divmod(3 * 512 // (2 * 32 * 2), 8)
    single = in_one_process(accelerate_loop)
    assert_equal(single["masks"], whole["masks"])
    torch.testing.assert_close(single["weights"], whole["weights"])


def in_one_process(accelerate_loop: Any) -> dict[str, Any]:
    """With batches as large as those of both, and the scheduler stepped for both."""

    def data(dataset: Any, batch_size: int) -> DataLoader[Any]:
        return DataLoader(dataset, 2 * batch_size)

    with mock.patch.object(accelerate_loop, "DataLoader", data):
        run = accelerate_loop.Run()
    scheduler = run.scheduler.scheduler
    step = scheduler.step
    scheduler.step = lambda: (step(), step())
    for _ in range(3):
        list(run.epoch())
    return seen(run.model, run.gmixout)


# FSDP2 as Accelerate prepares it. On CPUs Accelerate makes DistributedDataParallel of it by itself.


def fsdp2_accelerator() -> Any:
    from accelerate import (
        Accelerator,
        DistributedType,
        FullyShardedDataParallelPlugin,
        PartialState,
    )

    accelerator = Accelerator(cpu=True)
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=False,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
    )
    assert accelerator.is_fsdp2
    return accelerator


def wrap(model: nn.Module, named: bool = True, **options: Any) -> GMixoutOptimizer:
    warnings.simplefilter("ignore")
    if named:
        return meshes.wrap(model, **options)
    groups = [
        dict(params=list(model.head.parameters()), mask_prob=0.0),
        dict(params=[*model.embed.parameters(), *model.blocks.parameters()]),
    ]
    return GMixoutOptimizer(
        torch.optim.AdamW(groups, lr=0.01), resample_every=3, mask_prob=0.7, seed=5, **options
    )


FSDP2_CASES: list[dict[str, Any]] = [
    {},
    dict(named=False),
    dict(layout="dense"),
    dict(grad_layout="packed"),
    dict(grad_layout="active", granularity="row", named=False),
    dict(residual="persistent", rescale=True),
]


def trained(model: nn.Module, optimizer: Any, steps: range = range(4)) -> dict[str, Any]:
    """Clips in the first step already, before anything else is called."""
    own = getattr(optimizer, "optimizer", optimizer)
    before = meshes.whole_weights(model)
    norms = []
    for step in steps:
        inputs, targets = meshes.batch(step)
        part = meshes.part_of_batch("fsdp", len(inputs))
        (model(inputs[part]) - targets[part]).square().mean().backward()
        norms.append(whole_of(own.clip_grad_norm_(0.5)))
        optimizer.step()
        optimizer.zero_grad()
    after = seen(model, own)
    moved = [not torch.equal(a, b) for a, b in zip(before, after["weights"], strict=True)]
    assert all(moved)
    return {**after, "norms": norms}


def in_right_order(options: dict[str, Any]) -> dict[str, Any]:
    model = meshes.fsdp(meshes.net())
    return trained(model, wrap(model, **options))


def _fsdp2(rank: int) -> list[Any]:
    launch(rank)
    accelerator = fsdp2_accelerator()
    found = []
    for options in FSDP2_CASES:
        model = meshes.net()
        prepared = accelerator.prepare(model, wrap(model, **options))
        found.append((trained(*prepared), in_right_order(options)))
        accelerator.free_memory()
    return found


def test_parameters_that_accelerate_shards_are_mixed() -> None:
    """Bit for bit as with an optimizer built after ``fully_shard()``."""
    found, others = on_ranks(2, _fsdp2, limit=60)
    assert_equal(found, others)
    for options, (prepared, expected) in zip(FSDP2_CASES, found, strict=True):
        assert_equal(prepared, expected)
        if options.get("named", True):
            masks = whole_masks_of_one_process(options, prepared["counters"][0])
            assert_equal(prepared["masks"], masks)


def whole_masks_of_one_process(options: dict[str, Any], episode: int) -> list[Tensor]:
    optimizer = wrap(meshes.net(), **options)
    for _ in range(episode):
        optimizer.resample()
    return meshes.whole_masks(optimizer)


def _calls_between(rank: int) -> Any:
    """Stand-ins of one element hold the places while Accelerate shards the model."""
    launch(rank)
    import accelerate.accelerator as module

    accelerator = fsdp2_accelerator()
    model = meshes.net()
    optimizer = wrap(model)
    shard, errors = module.fsdp2_prepare_model, {}

    def shard_and_call(*args: Any) -> Any:
        assert {param.shape for param in optimizer.param_groups[0]["params"]} == {(1,)}
        for moment in (lambda: None, lambda: shard(*args)):
            result = moment()
            for name, call in STAND_IN_CALLS.items():
                with pytest.raises(RuntimeError) as caught:
                    call(optimizer)
                errors[name] = str(caught.value)
        return result

    with mock.patch.object(module, "fsdp2_prepare_model", shard_and_call):
        prepared = accelerator.prepare(model, optimizer)
    return trained(*prepared), in_right_order({}), errors


def test_calls_while_accelerate_shards_are_refused_and_nothing_is_lost() -> None:
    for prepared, expected, errors in on_ranks(2, _calls_between, limit=60):
        assert_equal(prepared, expected)
        assert errors.keys() == STAND_IN_CALLS.keys()
        for message in errors.values():
            assert "lost embed.weight by hand, in whose place is another tensor" in message


def _replaced_by_hand(rank: int) -> Any:
    launch(rank)
    found = []
    for number, way in enumerate(WAYS):
        optimizer = wrap(meshes.net(), grad_layout="packed" if number % 2 else "dense")
        model = meshes.fsdp(meshes.net())
        way(optimizer, list(model.parameters()))
        found.append(trained(model, optimizer))
    before = meshes.whole_weights(model)
    other = meshes.fsdp(meshes.net())
    for way in WAYS:
        way(optimizer, list(other.parameters()))
        for call in (optimizer.step, optimizer.state_dict, optimizer.zero_grad):
            with pytest.raises(RuntimeError, match="before the first step alone"):
                call()
        way(optimizer, list(model.parameters()))
    assert_equal(before, meshes.whole_weights(model))
    trained(model, optimizer)
    return found, in_right_order({})


def test_groups_replaced_by_new_ones_with_dtensors() -> None:
    (found, expected), others = on_ranks(2, _replaced_by_hand, limit=60)
    assert_equal([found, expected], list(others))
    for trained in found:
        assert_equal(trained, expected)


def _fsdp2_resumes(rank: int, folder: str) -> Any:
    launch(rank)
    accelerator = fsdp2_accelerator()

    def run(loads: bool) -> dict[str, Any]:
        model = meshes.net()
        model, optimizer = accelerator.prepare(model, wrap(model))
        if loads:
            accelerator.load_state(folder)
        else:
            trained(model, optimizer, range(4))
            accelerator.save_state(folder)
        result = trained(model, optimizer, range(4, 8))
        accelerator.free_memory()
        return result

    return run(loads=False), run(loads=True)


def test_fsdp2_by_accelerate_resumes_exactly(tmp_path: Path) -> None:
    (whole, resumed), others = on_ranks(2, _fsdp2_resumes, str(tmp_path), limit=60)
    assert_equal([whole, resumed], list(others))
    assert_equal(whole, resumed)
