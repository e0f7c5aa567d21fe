"""A small training in transformers' Trainer for tests: its model, images and settings."""

import copy

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from ewavit.integrations.transformers import EWACallback

CONFIG = ViTConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
    patch_size=8, num_labels=3, hidden_dropout_prob=0.1,
)  # fmt: skip


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": index % 3}


def trainer(folder, callback=None, **settings):
    set_seed(0)
    model = ViTForImageClassification(copy.deepcopy(CONFIG))
    arguments = {
        "num_train_epochs": 2, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 3,
        "logging_steps": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-2,
        "dataloader_pin_memory": False, **settings,
    }  # fmt: skip
    callbacks = [callback or EWACallback(ramp_steps=6)]
    args = TrainingArguments(str(folder), **arguments)
    return Trainer(model, args, train_dataset=Images(), eval_dataset=Images(), callbacks=callbacks)
