"""A script with transformers' Trainer: a small Llama, from its configuration."""

import os
import time

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Tokens(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(16) + index
        return {"input_ids": tokens, "labels": tokens}


class Note(TrainerCallback):
    def on_step_end(self, *_: object, **__: object) -> None:
        with open(os.environ["BENCH_STEPS"], "a") as log:
            log.write(f"{time.time()}\n")


config = LlamaConfig(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
arguments = TrainingArguments(
    "output", max_steps=1, per_device_train_batch_size=1, use_cpu=True, report_to=[], save_strategy="no"
)
Trainer(LlamaForCausalLM(config), arguments, train_dataset=Tokens(), callbacks=[Note()]).train()
