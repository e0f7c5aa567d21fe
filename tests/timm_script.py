"""A script that trains as timm's train.py does, by the same calls of timm, on a CPU and on random images."""

import argparse

import torch
from timm.models import create_model, load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3, random_seed

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="test_vit")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--stop", type=int, default=99)
parser.add_argument("--resume", default="")
parser.add_argument("--teacher", action="store_true")
parser.add_argument("--output", default=".")
args = parser.parse_args()

random_seed(42, 0)
size = {"img_size": 32} if "vit" in args.model else {}
model = create_model(args.model, num_classes=3, **size)
teacher = create_model("test_vit2", num_classes=3, img_size=32) if args.teacher else None
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
start = resume_checkpoint(model, args.resume, optimizer=optimizer) if args.resume else 0
ema = ModelEmaV3(model, decay=0.9)
if args.resume:
    load_checkpoint(ema.module, args.resume, use_ema=True)
saver = CheckpointSaver(
    model=model, optimizer=optimizer, args=args, model_ema=ema, checkpoint_dir=args.output,
    recovery_dir=args.output, max_history=4,
)  # fmt: skip
for epoch in range(start, min(args.epochs, args.stop)):
    model.train()
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(3):
        images, labels = torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 3
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
    saver.save_checkpoint(epoch, metric=float(epoch))
print(
    "experts in the teacher:", teacher is not None and any("experts" in key for key in teacher.state_dict())
)
