"""The Trainer of transformers with averaged experts: python with_transformers.py 2; with 4 it goes on."""

import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from ewavit.data.arrays import read_bundled
from ewavit.integrations.transformers import EWACallback

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 2
data = read_bundled()  # Fashion-MNIST
images, labels = torch.from_numpy(data.train_images)[:300] / 255, data.train_labels[:300]
train = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]

set_seed(0)
size = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
model = ViTForImageClassification(
    ViTConfig(image_size=28, patch_size=4, num_channels=1, num_labels=10, **size)
)
args = TrainingArguments(
    "checkpoints",
    num_train_epochs=epochs,
    per_device_train_batch_size=50,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    save_strategy="epoch",
    logging_strategy="epoch",
    report_to=[],
)
callback = EWACallback(share_rate=0.3, ramp_steps=20)  # expands the model, when the Trainer is made
trainer = Trainer(model, args, train_dataset=train, callbacks=[callback])
trainer.train(resume_from_checkpoint=any(Path("checkpoints").glob("checkpoint-*")))
trainer.save_model("vit")  # a stock model: ViTForImageClassification.from_pretrained("vit")
