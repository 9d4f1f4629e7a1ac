"""A script with Lightning: its Trainer runs one step of a small module."""

import os
import time

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset


class Small(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 1)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())

    def on_train_batch_end(self, *_: object) -> None:
        with open(os.environ["BENCH_STEPS"], "a") as log:
            log.write(f"{time.time()}\n")


trainer = lightning.Trainer(
    accelerator="cpu",
    devices=int(os.environ["LOCAL_WORLD_SIZE"]),
    max_steps=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Small(), DataLoader(TensorDataset(torch.ones(64, 16)), batch_size=1))
