"""GMixout in Lightning: the one line in configure_optimizers, and a callback for the weights to
deploy.

Lightning validates and saves the weights that are in the model, which between steps are the live
ones. The callback shows the weights to deploy while Lightning validates, puts them beside the live
ones in each checkpoint, and leaves them in the model after training.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tiny_task import Spirals, pretrained
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision_compat import ensure_torchvision

from gmixout_optim import GMixoutOptimizer

ensure_torchvision()  # torchmetrics imports it
import lightning as L  # noqa: E402


class DeployWeights(L.Callback):
    """Validation on, and saving of, the weights to deploy."""

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.eval()

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.train()

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        self.on_validation_end(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for optimizer in trainer.optimizers:
            with optimizer.eval_weights():
                weights = module.state_dict().items()
                checkpoint["deploy_state_dict"] = {key: item.clone() for key, item in weights}

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.consolidate()


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = pretrained()

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.model.named_parameters(), lr=0.02)
        optimizer = GMixoutOptimizer(optimizer, exclude="head.*", resample_every=8)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self.model(**batch)["loss"]

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.log("loss", self.model(**batch)["loss"], prog_bar=True)


def loaders() -> tuple[DataLoader, DataLoader]:
    train = Spirals(512, turns=(0.2, 0.8))
    return DataLoader(train, batch_size=32), DataLoader(Spirals(512, seed=2), batch_size=512)


def make_trainer(epochs: int, **settings: Any) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[DeployWeights(), *settings.pop("callbacks", [])],
        **{"logger": False, **settings},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="epochs (default: 10)")
    args = parser.parse_args()
    trainer = make_trainer(args.epochs, enable_checkpointing=False)
    trainer.fit(Module(), *loaders())
    print(f"deployed: loss {trainer.validate(trainer.model, loaders()[1])[0]['loss']:.3f}")


if __name__ == "__main__":
    main()
