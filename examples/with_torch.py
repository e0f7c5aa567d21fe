"""A plain torch loop with averaged experts: python with_torch.py 2; again with 4 it goes on."""

import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import ewavit as ewa
from ewavit.data.arrays import read_bundled

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 2
checkpoint = Path("checkpoint.pt")
data = read_bundled()  # Fashion-MNIST
images, labels = torch.from_numpy(data.train_images)[:300] / 255, torch.from_numpy(data.train_labels)[:300]

torch.manual_seed(0)
model = timm.create_model("test_vit", num_classes=10, in_chans=1, img_size=28, patch_size=4)
ewa.expand(model)  # before the optimizer is built
optimizer = torch.optim.AdamW(ewa.param_groups(model, weight_decay=0.05), lr=1e-3)
ewa.ExpertAveraging(model, share_rate=0.3, ramp_steps=20).attach(optimizer)
done = 0
if checkpoint.exists():
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])  # has the count of steps, too
    done = state["epochs"]
for epoch in range(done, epochs):
    torch.manual_seed(epoch)  # the order of the images
    for batch in torch.randperm(len(images)).split(50):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()  # averages the experts
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}  loss {loss.item():.3f}")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}
    torch.save(state, checkpoint)
torch.save(ewa.collapse(model).state_dict(), "vit.pt")  # the plain ViT
