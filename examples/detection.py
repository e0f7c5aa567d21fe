"""Detection in torchvision's framework: Faster R-CNN on a Swin as a mixture, on generated boxes."""

import sys

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, box_iou

import ewavit as ewa
from ewavit.data.shapes import make_shapes

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 150
SIDE, BATCH = 64, 8
SWIN = {"img_size": SIDE, "embed_dim": 24, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}


class Backbone(nn.Module):
    """One feature map of a timm Swin, with channels first."""

    out_channels = 48

    def __init__(self) -> None:
        super().__init__()
        self.swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **SWIN)

    def forward(self, images: Tensor) -> Tensor:
        return self.swin.forward_intermediates(images, indices=[1], intermediates_only=True)[0]


def detector() -> FasterRCNN:
    return FasterRCNN(
        Backbone(), num_classes=2, min_size=SIDE, max_size=SIDE,
        rpn_anchor_generator=AnchorGenerator(((16, 24, 36),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 5, 2), rpn_pre_nms_top_n_train=100,
        rpn_post_nms_top_n_train=50, rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=25,
        box_batch_size_per_image=32, box_detections_per_img=10,
    )  # fmt: skip


def generated(images, masks):
    """Images with one shape each, and its box: masks say where the shapes are."""
    pairs = []
    for image, mask in zip(images, masks, strict=True):
        rows, columns = mask.nonzero()
        pixels = torch.from_numpy(image).movedim(-1, 0).float() / 255
        box = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) * (SIDE / 32)
        if len(set(mask.flat)) == 2:  # the background and one class
            large = nn.functional.interpolate(pixels[None], (SIDE, SIDE), mode="bilinear")[0]
            pairs.append((large, {"boxes": box[None].float(), "labels": torch.ones(1, dtype=torch.int64)}))
    return pairs


@torch.no_grad()
def found(model: FasterRCNN, pairs) -> float:
    """The share of boxes, in percent, that the best detection meets with an IoU of 0.5 or more."""
    model.eval()
    outputs = model([image for image, _ in pairs])
    best = [box_iou(output["boxes"][:1], target["boxes"]).max() if len(output["boxes"]) else torch.tensor(0.0)
            for output, (_, target) in zip(outputs, pairs, strict=True)]  # fmt: skip
    return 100 * float((torch.stack(best) >= 0.5).float().mean())


images, masks, *held = make_shapes()
train, test = generated(images, masks), generated(*held)[:40]
torch.manual_seed(0)
model = detector()
ewa.expand(model, 2, select="all")
optimizer = torch.optim.AdamW(ewa.param_groups(model, weight_decay=0.01), lr=3e-3)
ewa.ExpertAveraging(model, share_rate=0.3, ramp_steps=steps // 2).attach(optimizer)
print(f"before: {found(model, test):.0f} % of the boxes found")
model.train()
for _ in range(steps):
    chosen = [train[number] for number in torch.randint(len(train), (BATCH,))]
    losses = model([image for image, _ in chosen], [target for _, target in chosen])
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()  # averages the experts
print(f"after {steps} steps: {found(model, test):.0f} % of the boxes found")
ewa.collapse(model)
torch.save(model.state_dict(), "detector.pt")
stock = detector()  # torchvision's own model; its backbone is timm's
stock.load_state_dict(torch.load("detector.pt", weights_only=True))
print(f"stock model: {found(stock, test):.0f} % of the boxes found")
