"""Callbacks of Lightning and of Hugging Face's Trainer around the wrapper: those that load, average
and freeze weights, in either order with the examples' own."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gmixout_optim import GMixoutOptimizer
from tests.training import assert_equal, weights

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import hf_trainer
import lightning_module
from tiny_task import Spirals, pretrained

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

ORDERS = pytest.mark.parametrize("ours_first", [True, False], ids=["ours-first", "ours-last"])


def in_order(ours_first: bool, ours: Any, *others: Any) -> list[Any]:
    return [ours, *others] if ours_first else [*others, ours]


# Lightning

L = lightning_module.L
from lightning.pytorch.callbacks import Checkpoint  # noqa: E402


def make_trainer(tmp_path: Path, callbacks: list[Any], epochs: int, **settings: Any) -> Any:
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=13,  # so that training ends in mid-episode
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        **settings,
    )


def fit(
    tmp_path: Path, module: Any, callbacks: list[Any], epochs: int, ckpt_path: Any = None
) -> Any:
    trainer = make_trainer(tmp_path, callbacks, epochs)
    trainer.fit(module, *lightning_module.loaders(), ckpt_path=ckpt_path, weights_only=False)
    return trainer


class LoadBest(L.Callback):
    """As scripts do: the best checkpoint goes into the model when the training ends."""

    def on_train_end(self, trainer: Any, module: nn.Module) -> None:
        self.best = {key: 0.5 * item for key, item in module.state_dict().items()}
        module.load_state_dict(self.best)


@ORDERS
@pytest.mark.parametrize("stops", [False, True], ids=["runs-out", "stops-early"])
def test_lightning_keeps_the_best_checkpoint(tmp_path: Path, ours_first: bool, stops: bool) -> None:
    load = LoadBest()
    others: list[Any] = [load]
    if stops:
        others.insert(0, L.pytorch.callbacks.EarlyStopping("loss", patience=0, min_delta=10.0))
    module = lightning_module.Module()
    callbacks = in_order(ours_first, lightning_module.DeployWeights(), *others)
    trainer = fit(tmp_path, module, callbacks, 4)
    assert (trainer.current_epoch < 4) == stops
    assert_equal(list(load.best.values()), list(module.state_dict().values()))


@ORDERS
def test_lightning_average_is_swapped_in_and_out(tmp_path: Path, ours_first: bool) -> None:
    """Weights are trained as without the average, which is what is validated and left."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Watch(L.Callback):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def on_train_batch_end(self, trainer: Any, module: nn.Module, *_: Any) -> None:
            self.seen += weights(module)

    runs = []
    for average in (None, EMAWeightAveraging()):
        watch, module = Watch(), lightning_module.Module()
        others = [watch] if average is None else [watch, average]
        callbacks = in_order(ours_first, lightning_module.DeployWeights(), *others)
        fit(tmp_path, module, callbacks, 3)
        runs.append(watch.seen)
    assert_equal(*runs)
    assert average is not None
    assert average._average_model is not None
    assert_equal(weights(average._average_model.module), weights(module))


@ORDERS
def test_lightning_stochastic_weight_averaging(tmp_path: Path, ours_first: bool) -> None:
    swa = L.pytorch.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    module = lightning_module.Module()
    callbacks = in_order(ours_first, lightning_module.DeployWeights(), swa)
    fit(tmp_path, module, callbacks, 5)
    assert_equal(weights(swa._average_model), weights(module))


class Finetuned(lightning_module.Module):
    """With the backbone as Lightning's BackboneFinetuning wants it: frozen at first."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.model.body

    def configure_optimizers(self) -> Any:
        # Without names, as the group is that BackboneFinetuning adds.
        head = {"params": list(self.model.head.parameters()), "mask_prob": 0.0}
        return GMixoutOptimizer(torch.optim.AdamW([head], lr=0.02))


def thawing() -> Any:
    return L.pytorch.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)


def test_lightning_backbone_finetuning_resumes_past_the_unfreezing(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, filename="{epoch}")
    whole = Finetuned()
    start = weights(whole.backbone)
    trainer = fit(tmp_path, whole, [keep, thawing()], 4)
    (optimizer,) = trainer.optimizers
    assert len(optimizer.param_groups) == 2
    assert {tensor.mixed for tensor in optimizer.report().tensors if tensor.group == 1} == {True}
    assert all(not torch.equal(a, b) for a, b in zip(start, weights(whole.backbone), strict=True))

    class Look(L.Callback):
        def on_train_start(self, trainer: Any, module: nn.Module) -> None:
            self.state = copy.deepcopy(trainer.optimizers[0].state_dict())
            self.weights = weights(module)

    look = Look()
    path = tmp_path / "kept" / "epoch=2.ckpt"
    fit(tmp_path, Finetuned(), [thawing(), look], 4, ckpt_path=path)
    saved = torch.load(path, weights_only=False)
    assert_equal(saved["optimizer_states"][0], look.state)
    assert_equal([saved["state_dict"][name] for name, _ in whole.named_parameters()], look.weights)


def test_lightning_finds_a_learning_rate(tmp_path: Path) -> None:
    """The trial run is undone, and the next fit builds another optimizer."""
    from lightning.pytorch.tuner import Tuner

    class Tuned(lightning_module.Module):
        lr = 0.02

        def configure_optimizers(self) -> Any:
            base = torch.optim.AdamW(self.model.named_parameters(), lr=self.lr)
            return GMixoutOptimizer(base, exclude="head.*")

    module = Tuned()
    start = weights(module)
    trainer = make_trainer(tmp_path, [lightning_module.DeployWeights()], 1)
    Tuner(trainer).lr_find(module, *lightning_module.loaders(), num_training=20, attr_name="lr")
    assert_equal(start, weights(module))
    trainer.fit(module, *lightning_module.loaders())
    assert any(not torch.equal(a, b) for a, b in zip(start, weights(module), strict=True))


def test_lightning_fits_twice(tmp_path: Path) -> None:
    """Each fit builds an optimizer of its own; after consolidate() the first is out of the way."""
    module = lightning_module.Module()
    for _ in range(2):
        callbacks = [lightning_module.DeployWeights()]
        trainer = fit(tmp_path, module, callbacks, 1)
        assert trainer.optimizers


# Hugging Face Trainer


def noisy(points: int, seed: int) -> Spirals:
    """Labels half of which are wrong: training soon makes the loss on other points worse."""
    data = Spirals(points, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(points, generator=generator) < 0.5
    data.labels[wrong] = torch.randint(3, (int(wrong.sum()),), generator=generator)
    return data


class Average(hf_trainer.TrainerCallback):
    """An average of the weights: swapped in for evaluations, and left in the model at the end."""

    def swap(self, model: nn.Module) -> None:
        with torch.no_grad():
            for param, mean in zip(model.parameters(), self.mean, strict=True):
                held = param.clone()
                param.data.copy_(mean)
                mean.copy_(held)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mean = weights(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch._foreach_lerp_(self.mean, weights(kwargs["model"]), 0.1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.swap(kwargs["model"])
        self.mean = weights(kwargs["model"])


@ORDERS
@pytest.mark.parametrize("stops", [False, True], ids=["runs-out", "stops-early"])
def test_hf_trainer_keeps_the_best_checkpoint(
    tmp_path: Path, ours_first: bool, stops: bool
) -> None:
    from safetensors.torch import load_file
    from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

    model = pretrained()
    base = torch.optim.AdamW(model.named_parameters(), lr=0.05)
    optimizer = GMixoutOptimizer(base, exclude="head.*", resample_every=7)
    others = [EarlyStoppingCallback(2)] if stops else []
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path),
            max_steps=60,
            eval_strategy="steps",
            eval_steps=5,
            save_steps=5,
            per_device_train_batch_size=16,
            load_best_model_at_end=True,
            disable_tqdm=True,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=noisy(64, 1),
        eval_dataset=noisy(256, 2),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        callbacks=in_order(ours_first, hf_trainer.DeployWeights(), *others),
    )
    trainer.train()
    assert (trainer.state.global_step < 60) == stops
    folder = Path(str(trainer.state.best_model_checkpoint))
    assert folder.name != f"checkpoint-{trainer.state.global_step}"
    best = load_file(folder / "model.safetensors")
    assert_equal(best, dict(model.state_dict()))


@ORDERS
def test_hf_trainer_leaves_an_average_that_was_loaded(tmp_path: Path, ours_first: bool) -> None:
    average = Average()
    trainer = hf_trainer.make_trainer(tmp_path, 20, disable_tqdm=True, use_cpu=True)
    trainer.pop_callback(hf_trainer.DeployWeights)
    for callback in in_order(ours_first, hf_trainer.DeployWeights(), average):
        trainer.add_callback(callback)
    trainer.train()
    assert_equal(average.mean, weights(trainer.model))


def test_hf_trainer_freezing_callback(tmp_path: Path) -> None:
    """A layer thawed in mid-training trains from there on, as under the bare optimizer."""

    class Thaw(hf_trainer.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["model"].body[2].requires_grad_(state.global_step >= 10)
            if state.global_step == 10:
                self.before = weights(kwargs["model"].body[2])

    thaw = Thaw()
    trainer = hf_trainer.make_trainer(tmp_path, 20, disable_tqdm=True, use_cpu=True)
    trainer.add_callback(thaw)
    start = weights(trainer.model.body[2])
    trainer.train()
    assert_equal(start, thaw.before)
    after = weights(trainer.model.body[2])
    assert all(not torch.equal(a, b) for a, b in zip(thaw.before, after, strict=True))
