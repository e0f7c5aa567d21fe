"""Semantic segmentation: a class for each pixel, pixel cross-entropy, mIoU as the judging metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ewavit.data.batches import Data, ImageInputs, Inputs
from ewavit.data.input_files import InputFiles
from ewavit.data.masks import IGNORED, MaskData
from ewavit.data.options import DataOptions
from ewavit.errors import EwavitError
from ewavit.tasks.classification import Classification
from ewavit.tasks.inference import Inference, InferenceOptions, Value
from ewavit.tasks.judge import MIOU
from ewavit.tasks.segmenters import backbone_settings, check_segmenter, create_segmenter, with_head
from ewavit.tasks.sheet import MOST_DRAWN, draw_sheet, short
from ewavit.tasks.smp_models import create_smp_model, smp_code, smp_preparation
from ewavit.tasks.task import Cell, Listed, Meter, Metrics, Mixing, Table
from ewavit.tasks.timm_models import SMP, as_arguments, check_timm_model, start

SHOWN = 6  # images in the picture of a run
OPACITY = 0.55  # of the classes' colours over an image


class Segmentation(Classification):
    """One class for each pixel of an image."""

    name = "segmentation"
    judge = MIOU
    names_classes = False  # not for every pixel
    no_mixing = "--mixup and --cutmix mix labels of images: leave them out for segmentation"

    def open_data(self, spec: str, options: DataOptions) -> Data:
        return MaskData.open(spec, options)

    def preparation(self, model: str | None) -> dict[str, Any]:
        smp = model is not None and model.startswith(SMP)
        return smp_preparation(str(model)) if smp else super().preparation(model)

    def build_model(
        self,
        name: str,
        inputs: Inputs,
        *,
        pretrained: bool = False,
        initial_checkpoint: str | None = None,
        say: Callable[[str], None] | None = None,
        **kwargs: Any,
    ) -> tuple[nn.Module, dict[str, Any]]:
        assert isinstance(inputs, ImageInputs)
        side, chans, classes = inputs.img_size, inputs.in_chans, inputs.num_classes
        kept = {**kwargs, "num_classes": classes, "in_chans": chans, "img_size": side}
        if name.startswith(SMP):
            if initial_checkpoint is not None:
                raise EwavitError(f"--initial-checkpoint does not go with {name}: leave it out")
            return create_smp_model(name, kept, pretrained), kept
        check_timm_model(name, kwargs)
        head = kwargs.get("head")
        settings = backbone_settings(chans, side, {k: v for k, v in kwargs.items() if k != "head"})
        backbone = start(name, settings, side, pretrained, initial_checkpoint, say)
        return with_head(backbone, classes, head, chans, side).train(), kept

    def create_model(self, name: str, settings: Mapping[str, Any]) -> nn.Module:
        if name.startswith(SMP):
            return create_smp_model(name, settings)
        check_segmenter(name, settings)
        return create_segmenter(name, **settings)

    def loading_code(
        self, name: str, settings: Mapping[str, Any], file: Path, pretrained_cfg: Mapping[str, Any]
    ) -> str:
        if name.startswith(SMP):
            return (
                f"from safetensors.torch import load_file\n{smp_code(name, settings)}\n"
                f"model.load_state_dict(load_file({str(file)!r}))"
            )
        return (
            "from safetensors.torch import load_file\n"
            "from ewavit.tasks.segmenters import create_segmenter\n"
            f"model = create_segmenter({name!r}, {as_arguments(settings)}).eval()\n"
            f"model.load_state_dict(load_file({str(file)!r}))\n"
            "# model.backbone is timm's own: its keys are those of timm without the prefix"
        )

    def timm_config(self, *_: Any) -> None:
        return None

    def input_text(self, inputs: Inputs) -> str:
        mode = "L" if inputs.in_chans == 1 else "RGB"
        return f"transform(ImageOps.exif_transpose(image).convert({mode!r})) of PIL images"

    def inference(self, files: InputFiles, options: InferenceOptions) -> Inference:
        return MaskInference(files, options)

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The mean over the pixels with a class; 0 for a batch without any."""
        total = F.cross_entropy(
            outputs, targets, ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum"
        )
        return total / (targets != IGNORED).sum().clamp(min=1)

    def mixing(self, mixup: float, cutmix: float, num_classes: int) -> Mixing | None:
        return None

    def meter(self, data: Data, device: torch.device | str = "cpu") -> Meter:
        return PixelMeter(self.kind, data.num_classes, device)

    def predictions(self, data: Data, inputs: Tensor, outputs: Tensor, targets: Tensor) -> list[Listed]:
        from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

        return [
            ImagePrediction(
                100 * float(multiclass_jaccard_index(*pair, data.num_classes, ignore_index=IGNORED)),
                100 * float(multiclass_accuracy(*pair, data.num_classes, "micro", ignore_index=IGNORED)),
            )
            for pair in zip(outputs.argmax(1), targets, strict=True)
        ]

    def table(self, predictions: Sequence[Listed], classes: Sequence[str], names: Sequence[Cell]) -> Table:
        rows = (
            (name, f"{row.miou:.4f}", f"{row.pixel_accuracy:.4f}")
            for name, row in zip(names, predictions, strict=True)
        )
        return ("input", "miou", "pixel_accuracy"), rows

    def picture(
        self, data: Data, predictions: Sequence[Listed], predict: Callable[[Tensor], Tensor], path: Path
    ) -> None:
        for inputs, targets in data.eval_batches():
            chosen, labels = inputs[:SHOWN], targets[:SHOWN].cpu().numpy()
            with torch.inference_mode():
                found = predict(chosen).argmax(1).cpu().numpy()
            break
        else:
            return
        shape = (1, -1, 1, 1)
        mean, std = (torch.tensor(each, device=chosen.device).view(shape) for each in (data.mean, data.std))
        pixels = ((chosen * std + mean) * 255).clamp(0, 255).byte().movedim(1, -1).cpu().numpy()
        pictures = []
        for image, label, mask in zip(pixels, labels, found, strict=True):
            shown = Image.fromarray(image.repeat(3 // image.shape[-1], -1))
            pictures += [shown, overlay(shown, label), overlay(shown, mask)]
        draw_sheet(pictures, ["image", "labels", "predicted"] * (len(pictures) // 3), path)


class ImagePrediction(NamedTuple):
    """How well the pixels of one image were classified, in percent; over pixels with a class.

    Attributes:
        miou: mean IoU of the classes that are present or predicted.
        pixel_accuracy: share of right pixels.
        name: of the image; None if it has none.
    """

    miou: float
    pixel_accuracy: float
    name: str | None = None


class PixelMeter(Meter):
    """Pixel cross-entropy, mIoU and pixel accuracy, over all pixels with a class of all images.

    The mIoU is the mean over the classes that are present or predicted anywhere.

    Args:
        kind: kind of the inputs in the sentence.
        num_classes: number of classes.
        device: device of the metrics.
    """

    def __init__(self, kind: str, num_classes: int, device: torch.device | str = "cpu") -> None:
        from torchmetrics import MeanMetric, SumMetric
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

        self.kind = kind
        self.loss, self.count = MeanMetric().to(device), SumMetric().to(device)
        self.iou = MulticlassJaccardIndex(num_classes, ignore_index=IGNORED).to(device)
        self.accuracy = MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED).to(device)

    def update(self, inputs: Tensor, outputs: Tensor, targets: Tensor) -> None:
        self.count.update(len(targets))
        pixels = (targets != IGNORED).sum()
        total = F.cross_entropy(outputs, targets, ignore_index=IGNORED, reduction="sum")
        self.loss.update(total / pixels.clamp(min=1), weight=pixels)
        found = outputs.argmax(1)
        self.iou.update(found, targets)
        self.accuracy.update(found, targets)

    def compute(self) -> Metrics:
        loss, count = float(self.loss.compute()), int(self.count.compute())
        miou, right = (round(100 * float(metric.compute()), 4) for metric in (self.iou, self.accuracy))
        sentence = f"mIoU {miou:.2f} %, pixels right {right:.2f} %, loss {loss:.4f} on {count:,} {self.kind}"
        return Metrics({"loss": loss, "miou": miou, "pixel_accuracy": right}, count, self.kind, sentence)


class MaskInference(Inference):
    """Masks and overlays of images without labels, in the size of each image; shares of the classes as rows.

    Raises:
        EwavitError: masks are written into a folder, and there are more than 255 classes.
    """

    has_sheet = True
    has_files = True

    def __init__(self, files: InputFiles, options: InferenceOptions) -> None:
        super().__init__(files, options)
        if len(options.classes) > 255 and options.folder is not None:
            raise EwavitError(f"masks of {len(options.classes)} classes do not fit 8 bits: leave out --to")
        self._rows: list[tuple[int, list[float]]] = []  # number, share of each class
        self._drawn: list[tuple[int, Any]] = []

    def update(self, numbers: Sequence[int], inputs: Tensor, outputs: Tensor) -> None:
        for number, mask in zip(numbers, outputs.argmax(1).cpu().numpy(), strict=True):
            counts = np.bincount(mask.ravel(), minlength=len(self.options.classes))
            self._rows.append((number, (counts / mask.size).tolist()))
            if self.options.sheet and len(self._drawn) < MOST_DRAWN:
                self._drawn.append((number, mask))
            if self.options.folder is not None:
                image = self.files.show(number)
                of_size = Image.fromarray(mask.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
                name = self.stem(number)
                of_size.save(self.options.folder / f"{name}.png")
                overlay(image, np.asarray(of_size)).save(self.options.folder / f"{name}-overlay.png")

    def rows(self) -> list[dict[str, Value]]:
        rows: list[dict[str, Value]] = []
        for number, shares in self._rows:
            present = sorted((label for label, share in enumerate(shares) if share), key=lambda c: -shares[c])
            names: list[str] = [self.options.classes[label] for label in present]
            found = [shares[label] for label in present]
            rows.append({"input": self.files.names[number], "classes": names, "shares": found})
        return rows

    def line(self, row: dict[str, Value]) -> str:
        _, names, shares = row.values()
        assert isinstance(names, list)
        assert isinstance(shares, list)
        return ", ".join(f"{name} {100 * share:.1f} %" for name, share in zip(names, shares, strict=True))

    def draw(self, path: Path) -> int:
        pictures = []
        for number, mask in self._drawn:
            image = self.files.show(number)
            of_size = Image.fromarray(mask.astype(np.int32)).resize(image.size, Image.Resampling.NEAREST)
            pictures.append(overlay(image, np.asarray(of_size)))
        captions = [short(Path(self.files.names[number]).name) for number, _ in self._drawn]
        draw_sheet(pictures, captions, path)
        return len(pictures)


def overlay(image: Image.Image, mask: Any) -> Image.Image:
    """An image under the colours of its classes; class 0 and pixels without a class stay as they are.

    Args:
        image: mode RGB.
        mask: (height, width).
    """
    pixels, shown = np.asarray(image, np.float32), (mask > 0)[..., None]
    colours = _colours(max(int(mask.max()) + 1, 1))[np.maximum(mask, 0)]
    mixed = np.where(shown, (1 - OPACITY) * pixels + OPACITY * colours, pixels)
    return Image.fromarray(mixed.astype(np.uint8))


def _colours(count: int) -> Any:
    """Pascal VOC's colours: three bits of a class's number make the first bits of red, green and blue."""
    numbers = np.arange(count)
    colours = np.zeros((count, 3), np.float32)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] += (numbers >> (3 * bit + channel) & 1) * 2 ** (7 - bit)
    return colours
