"""Composer with averaged experts: python with_composer.py 2; again with 4 it goes on.

mosaicml 0.32.1 asks for torch<2.7.1 and ewavit for torch>=2.11: install mosaicml with `pip install --no-deps`
and its other requirements by hand.
"""

import sys

import timm
import torch
from composer import Trainer
from composer.models import ComposerClassifier
from composer.utils import reproducibility
from torch.utils.data import DataLoader, TensorDataset

import ewavit as ewa
from ewavit.data.arrays import read_bundled

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 2
data = read_bundled()  # Fashion-MNIST
images, labels = torch.from_numpy(data.train_images)[:300] / 255, torch.from_numpy(data.train_labels)[:300]

reproducibility.seed_all(0)
model = timm.create_model("test_vit", num_classes=10, in_chans=1, img_size=28, patch_size=4)
ewa.expand(model)  # before the optimizer is built
optimizer = torch.optim.AdamW(ewa.param_groups(model, weight_decay=0.05), lr=1e-3)
ewa.ExpertAveraging(model, share_rate=0.3, ramp_steps=20).attach(optimizer)
trainer = Trainer(
    model=ComposerClassifier(model, num_classes=10),
    optimizers=optimizer,
    train_dataloader=DataLoader(TensorDataset(images, labels), 50, shuffle=True),
    max_duration=f"{epochs}ep",
    save_folder="checkpoints",
    run_name="vit",
    autoresume=True,
    seed=0,
)
trainer.fit()
torch.save(ewa.collapse(model).state_dict(), "vit.pt")  # the plain ViT
