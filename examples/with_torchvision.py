"""The loop of torchvision's references/classification/train.py with averaged experts, EMA and resume."""

import sys
from pathlib import Path

import torch
import torchvision
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ewavit as ewa
from ewavit.data.arrays import read_bundled

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 2
data = read_bundled()  # Fashion-MNIST, as images of three channels
images = (torch.from_numpy(data.train_images)[:300] / 255).expand(-1, 3, -1, -1)
labels = torch.from_numpy(data.train_labels)[:300]

torch.manual_seed(0)
model = torchvision.models.VisionTransformer(28, 4, 4, 4, 64, 128, num_classes=10)
ewa.expand(model)  # after create_model, before set_weight_decay, the optimizer, DDP and EMA
criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
optimizer = torch.optim.AdamW(ewa.param_groups(model, weight_decay=0.05), lr=1e-3)
ewa.ExpertAveraging(model, share_rate=0.3, ramp_steps=20).attach(optimizer)
model_ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
parts = {"model": model, "optimizer": optimizer, "model_ema": model_ema}
start = 0
if Path("checkpoint.pth").exists():  # --resume
    checkpoint = torch.load("checkpoint.pth", weights_only=True)
    [part.load_state_dict(checkpoint[name]) for name, part in parts.items()]
    start = checkpoint["epoch"] + 1
for epoch in range(start, epochs):
    torch.manual_seed(epoch)  # the order of the images
    for batch in torch.randperm(len(images)).split(50):
        optimizer.zero_grad()
        criterion(model(images[batch]), labels[batch]).backward()
        optimizer.step()  # averages the experts
        model_ema.update_parameters(model)
    torch.save({name: part.state_dict() for name, part in parts.items()} | {"epoch": epoch}, "checkpoint.pth")
torch.save(ewa.collapse(model).state_dict(), "vit.pt")  # the plain ViT
torch.save(ewa.collapse(model_ema.module).state_dict(), "vit_ema.pt")
