"""Lightning with averaged experts: python with_lightning.py 2; again with 4 it goes on."""

import sys

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ewavit as ewa
from ewavit.data.arrays import read_bundled
from ewavit.integrations.lightning import EWACallback


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.vit = timm.create_model("test_vit", num_classes=10, in_chans=1, img_size=28, patch_size=4)

    def training_step(self, batch, index):
        return F.cross_entropy(self.vit(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(ewa.param_groups(self, weight_decay=0.05), lr=1e-3)


epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 2
seed_everything(0)  # before each fit: the partition goes by it
data = read_bundled()  # Fashion-MNIST
images, labels = torch.from_numpy(data.train_images)[:300] / 255, torch.from_numpy(data.train_labels)[:300]
dataset = TensorDataset(images, labels)
loader = DataLoader(dataset, 50, sampler=DistributedSampler(dataset, 1, 0))  # one process, order by epoch
callbacks = [EWACallback(share_rate=0.3, ramp_steps=20), ModelCheckpoint("checkpoints", save_last=True)]
trainer = Trainer(max_epochs=epochs, callbacks=callbacks, logger=False)
module = Classifier()
trainer.fit(module, loader, ckpt_path="last")  # goes on, if there is a last checkpoint
torch.save(module.vit.state_dict(), "vit.pt")  # the plain ViT
