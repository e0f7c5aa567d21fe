"""accelerate with averaged experts: accelerate launch with_accelerate.py 2; again with 4 it goes on."""

import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

import ewavit as ewa
from ewavit.data.arrays import read_bundled

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 2
data = read_bundled()  # Fashion-MNIST
images, labels = torch.from_numpy(data.train_images)[:300] / 255, torch.from_numpy(data.train_labels)[:300]

accelerator = Accelerator()
set_seed(0)
model = timm.create_model("test_vit", num_classes=10, in_chans=1, img_size=28, patch_size=4)
ewa.expand(model)  # before the optimizer is built and before prepare
optimizer = torch.optim.AdamW(ewa.param_groups(model, weight_decay=0.05), lr=1e-3)
loader = DataLoader(TensorDataset(images, labels), 50, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
ewa.ExpertAveraging(model, share_rate=0.3, ramp_steps=20).attach(optimizer)
states = sorted(Path("states").glob("epoch-*"))
if states:
    accelerator.load_state(str(states[-1]))
for epoch in range(len(states), epochs):
    set_seed(epoch)  # the order of the images
    for batch, targets in loader:
        loss = F.cross_entropy(model(batch), targets)
        accelerator.backward(loss)
        optimizer.step()  # averages the experts
        optimizer.zero_grad()
    accelerator.print(f"epoch {epoch + 1}  loss {loss.item():.3f}")
    accelerator.save_state(f"states/epoch-{epoch:04}")
accelerator.save(ewa.collapse(accelerator.unwrap_model(model)).state_dict(), "vit.pt")  # the plain ViT
