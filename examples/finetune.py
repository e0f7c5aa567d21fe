"""Fine-tune a timm ViT with averaged experts in a plain torch loop, and leave the plain ViT it was.

    python examples/finetune.py                           # two minutes on two cores
    python examples/finetune.py --resume finetuned/checkpoint.pt --epochs 8

A ViT is first trained on eight classes of Fashion-MNIST, in the place of weights from a hub, and then
fine-tuned on all ten from 1,000 images. Nothing but torch, timm and ewavit's core takes part in the training.
"""

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_file
from torch import Tensor, nn

import ewavit as ewa
from ewavit.data.arrays import read_bundled

VIT = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}


def create_vit(num_classes: int) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **VIT)


def read_images() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (n, 1, 28, 28) and labels (n,), for training and for testing: the set inside the package."""
    data = read_bundled()
    images, test_images = (torch.from_numpy(x) / 255 - 0.5 for x in (data.train_images, data.eval_images))
    labels, test_labels = map(torch.from_numpy, (data.train_labels, data.eval_labels))
    return (images, labels), (test_images, test_labels)


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """One pass in random order; the averaging runs within `optimizer.step()`."""
    model.train()
    total = 0.0
    for batch in torch.randperm(len(images)).split(50):
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += len(batch) * loss.item()
    return total / len(images)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent right. An expanded model in eval mode already computes what will be deployed."""
    model.eval()
    found = torch.cat([model(part).argmax(1) for part in images.split(500)])
    return 100 * (found == labels).float().mean().item()


def pretrain(images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """What would otherwise be `timm.create_model(..., pretrained=True)`: a ViT that knows eight classes."""
    known = labels < 8
    model = create_vit(num_classes=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        train_epoch(model, optimizer, images[known], labels[known])
    model.reset_classifier(10)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--pretraining-epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=1000, help="training images of the fine-tuning")
    parser.add_argument("--output", type=Path, default=Path("finetuned"))
    parser.add_argument("--resume", type=Path, help="go on from this checkpoint")
    args = parser.parse_args()
    args.output.mkdir(exist_ok=True)
    torch.manual_seed(0)
    (images, labels), (test_images, test_labels) = read_images()

    # 1. Pretrained weights; a resumed model gets its weights from the checkpoint.
    few, others = slice(args.images), slice(args.images, 5 * args.images)
    if args.resume:
        model = create_vit(num_classes=10)
    else:
        model = pretrain(images[others], labels[others], args.pretraining_epochs)

    # 2. The three lines. Expand before the optimizer is built: it has to hold the experts' parameters.
    ewa.expand(model, num_experts=4)
    optimizer = torch.optim.AdamW(ewa.param_groups(model, weight_decay=0.05), lr=3e-4)
    averaging = ewa.ExpertAveraging(model, share_rate=0.3, ramp_steps=50).attach(optimizer)
    print(ewa.summary(model))

    # 3. Any training loop. The number of steps, which the ramp follows, is saved with the optimizer's state.
    first = 0
    if args.resume:
        saved = torch.load(args.resume, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        averaging.load_state_dict(saved["averaging"])
        torch.set_rng_state(saved["generator"])  # the order of the images
        first = saved["epochs"]
    for epoch in range(first, args.epochs):
        loss = train_epoch(model, optimizer, images[few], labels[few])
        found = accuracy(model, test_images, test_labels)
        print(f"epoch {epoch + 1}  loss {loss:.3f}  accuracy {found:.2f} %")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}
        state |= {"averaging": averaging.state_dict(), "generator": torch.get_rng_state()}
        torch.save(state, args.output / "checkpoint.pt")

    # 4. The plain ViT again: same class, same keys. Stock timm loads its file.
    ewa.collapse(model)
    save_file(model.state_dict(), args.output / "vit.safetensors")
    plain = create_vit(num_classes=10)
    load_model(plain, args.output / "vit.safetensors", strict=True)
    print(f"{args.output}/vit.safetensors  accuracy {accuracy(plain, test_images, test_labels):.2f} %")


if __name__ == "__main__":
    main()
