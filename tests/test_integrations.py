"""The examples of other people's training loops: they run, and a killed run goes on as if it had
not been."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gmixout_optim import GMixoutOptimizer
from tests.training import assert_equal, saved_and_loaded, weights

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import accelerate_loop
import hf_trainer
import lightning_module
import tensorboard_log
import timm_factory
from tiny_task import Spirals, pretrained

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


@pytest.fixture(autouse=True, params=["dense", "packed", "active"])
def grad_layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Loops accumulate, clip and zero gradients in their own ways: the examples run with both
    kinds."""
    defaults = GMixoutOptimizer.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "grad_layout", request.param)
    if request.param == "active":
        monkeypatch.setitem(defaults, "granularity", "row")
        monkeypatch.setattr("gmixout_optim.active_gradient.LEAST_MULTIPLY_ADDS", 0)
    return request.param


@pytest.mark.parametrize("grad_layout", ["packed", "active"], indirect=True)
def test_packed_gradients_are_what_the_examples_run_with(grad_layout: str) -> None:
    model = pretrained()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters()))
    model(torch.randn(4, 2))["logits"].sum().backward()
    assert {type(param.grad).__name__ for param in model.parameters()} == {"PackedGradient"}
    kinds = {tensor.gradient for tensor in optimizer.report().tensors}
    assert kinds == {"packed", grad_layout}
    optimizer.step()


def equals_its_deployed_weights(model: nn.Module, optimizer: GMixoutOptimizer) -> bool:
    now = weights(model)
    with optimizer.eval_weights():
        deployed = weights(model)
    return all(torch.equal(a, b) for a, b in zip(now, deployed, strict=True))


# Hugging Face Trainer


def hf(folder: Path, **arguments: Any) -> Any:
    quiet = dict(disable_tqdm=True, use_cpu=True, logging_strategy="no")
    return hf_trainer.make_trainer(folder, steps=20, **{**quiet, **arguments})


def hf_optimizer(trainer: Any) -> GMixoutOptimizer:
    return trainer.optimizer.optimizer


@pytest.mark.parametrize("evaluates", [False, True], ids=["saves", "evaluates-and-saves"])
@pytest.mark.parametrize("killed_at", [5, 13])
def test_hf_trainer_resumes_exactly(tmp_path: Path, killed_at: int, evaluates: bool) -> None:
    """Checkpoints are saved in mid-episode, with the weights to deploy in the model."""
    every = dict(eval_strategy="steps" if evaluates else "no", eval_steps=killed_at)
    whole = hf(tmp_path / "whole", save_steps=killed_at, **every)
    whole.train()
    resumed = hf(tmp_path / "resumed", save_strategy="no", **every)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{killed_at}"))
    assert_equal(weights(whole.model), weights(resumed.model))
    ours, theirs = (hf_optimizer(trainer).state_dict() for trainer in (whole, resumed))
    assert_equal(ours, theirs)
    assert ours["param_groups"][0]["gmixout"]["episode"] > 1


def test_hf_trainer_evaluates_and_saves_the_weights_to_deploy(tmp_path: Path) -> None:
    seen: dict[str, list[Tensor]] = {}

    class Spy(hf_trainer.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["optimizer"].train()  # as Trainer does before each training step
            if state.global_step == 10:
                with kwargs["optimizer"].optimizer.eval_weights():
                    seen["deployed"] = weights(kwargs["model"])
                seen["live"] = weights(kwargs["model"])

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.setdefault("evaluated", weights(kwargs["model"]))

    trainer = hf(tmp_path, save_steps=10, eval_steps=10)
    trainer.add_callback(Spy())
    trainer.train()
    assert_equal(seen["deployed"], seen["evaluated"])
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-10" / "model.safetensors")
    names = [name for name, _ in trainer.model.named_parameters()]
    assert_equal(seen["deployed"], [saved[name] for name in names])
    assert any(not torch.equal(a, b) for a, b in zip(seen["live"], seen["deployed"], strict=True))
    assert equals_its_deployed_weights(trainer.model, hf_optimizer(trainer))


# Accelerate


@pytest.mark.parametrize("killed_at", [6, 8, 14])
def test_accelerate_resumes_exactly(tmp_path: Path, killed_at: int) -> None:
    """Killed after some batches, two of which make a step, and eight steps an episode."""
    whole = accelerate_loop.Run()
    for number, _ in enumerate(whole.epoch(), start=1):
        if number == killed_at:
            whole.accelerator.save_state(str(tmp_path))
    list(whole.epoch())

    resumed = accelerate_loop.Run()
    resumed.accelerator.load_state(str(tmp_path))
    data = resumed.data
    resumed.data = resumed.accelerator.skip_first_batches(data, killed_at)
    list(resumed.epoch())
    resumed.data = data
    list(resumed.epoch())
    assert_equal(weights(whole.model), weights(resumed.model))
    assert_equal(whole.gmixout.state_dict(), resumed.gmixout.state_dict())


def test_accelerate_counts_steps_not_batches() -> None:
    run = accelerate_loop.Run()
    list(run.epoch())
    assert run.gmixout.steps_in_episode + 8 * run.gmixout.episode == len(run.data) // 2
    assert run.validate() > 0.3


# Lightning


def lightning(tmp_path: Path, epochs: int, **settings: Any) -> Any:
    quiet = dict(enable_progress_bar=False, enable_model_summary=False)
    return lightning_module.make_trainer(epochs, default_root_dir=tmp_path, **quiet, **settings)


def test_lightning_resumes_exactly(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    modules = []
    keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, filename="{epoch}")
    for path in (None, tmp_path / "kept" / "epoch=1.ckpt"):
        module = lightning_module.Module()
        callbacks = [keep] if path is None else []
        trainer = lightning(tmp_path, 4, callbacks=callbacks, enable_checkpointing=path is None)
        trainer.fit(module, *lightning_module.loaders(), ckpt_path=path, weights_only=False)
        modules.append(module)
    assert_equal(*(weights(module) for module in modules))


def test_lightning_validates_and_saves_the_weights_to_deploy(tmp_path: Path) -> None:
    seen = {}

    class Spying(lightning_module.Module):
        def validation_step(self, batch: dict[str, Tensor], number: int) -> None:
            optimizer = self.optimizers().optimizer
            seen["evaluating"] = equals_its_deployed_weights(self, optimizer)
            super().validation_step(batch, number)

    module = Spying()
    trainer = lightning(tmp_path, 2, enable_checkpointing=False)
    trainer.fit(module, *lightning_module.loaders())
    assert seen["evaluating"]
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, GMixoutOptimizer)
    assert equals_its_deployed_weights(module, optimizer)


def test_lightning_checkpoint_holds_live_and_deployed_weights(tmp_path: Path) -> None:
    module = lightning_module.Module()
    files = []

    class Save(lightning_module.L.Callback):
        def on_train_batch_end(self, trainer: Any, module: nn.Module, *_: Any) -> None:
            if trainer.global_step == 5 and not files:
                files.append(tmp_path / "five.ckpt")
                trainer.save_checkpoint(files[0])
                self.live = weights(module)
                with trainer.optimizers[0].eval_weights():
                    self.deployed = weights(module)

    save = Save()
    lightning(tmp_path, 1, callbacks=[save], enable_checkpointing=False).fit(
        module, *lightning_module.loaders()
    )
    saved = torch.load(files[0], weights_only=False)
    names = [name for name, _ in module.named_parameters()]
    assert_equal(save.live, [saved["state_dict"][name] for name in names])
    assert_equal(save.deployed, [saved["deploy_state_dict"][name] for name in names])
    assert any(not torch.equal(a, b) for a, b in zip(save.live, save.deployed, strict=True))


# timm


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactorbv", "muon"])
def test_timm_factory(name: str, grad_layout: str) -> None:
    model = pretrained()
    if grad_layout != "dense" and name not in ("adamw", "sgd"):  # not known to be element-wise
        with pytest.raises(ValueError, match="needs layout='packed'"):
            timm_factory.make_optimizer(model, name)
        return
    optimizer = timm_factory.make_optimizer(model, name)
    start = weights(model)
    timm_factory.train(model, optimizer, epochs=2)
    assert all(not torch.equal(a, b) for a, b in zip(start, weights(model), strict=True))
    report = {tensor.name: tensor.mixed for tensor in optimizer.report().tensors}
    assert sum(report.values()) == 4  # the body, not the head

    resumed_model = pretrained()
    resumed = timm_factory.make_optimizer(resumed_model, name)
    of_model, of_optimizer = saved_and_loaded([model.state_dict(), optimizer.state_dict()])
    resumed_model.load_state_dict(of_model)
    resumed.load_state_dict(of_optimizer)
    data = Spirals(64)
    for of, by in ((model, optimizer), (resumed_model, resumed)):
        for _ in range(10):
            by.zero_grad()
            of(data.inputs, data.labels)["loss"].backward()
            by.step()
    if grad_layout == "active":
        # After consolidate(), with which train() ends, the first gradients are dense.
        torch.testing.assert_close(weights(model), weights(resumed_model))
    else:
        assert_equal(weights(model), weights(resumed_model))


# TensorBoard


def test_tensorboard_gets_drift_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(sys, "argv", ["log", "--epochs", "1", "--folder", str(tmp_path)])
    tensorboard_log.main()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert sorted(tag for tag in tags if tag.startswith("drift/")) == [
        f"drift/body.{layer}.{kind}" for layer in (0, 2) for kind in ("bias", "weight")
    ]
    drifts = [event.value for event in events.Scalars("drift/body.0.weight")]
    assert len(drifts) == 2
    assert min(drifts) > 0
