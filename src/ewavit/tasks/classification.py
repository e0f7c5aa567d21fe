"""Image classification: a timm model, cross-entropy, top-1 as the judging metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from ewavit.data.augmentation import Mix
from ewavit.data.batches import Data, ImageInputs, Inputs
from ewavit.data.image_files import ImageFiles
from ewavit.data.in_memory import TensorData, is_in_memory
from ewavit.data.input_files import InputFiles
from ewavit.data.loading import LoaderData, StreamData
from ewavit.data.options import PREPARATION, DataOptions
from ewavit.data.sources import TIMM_PREFIXES, is_folder, is_streamed, is_timm
from ewavit.errors import EwavitError
from ewavit.points.sources import POINT_PREFIXES
from ewavit.tasks.class_inference import ClassInference
from ewavit.tasks.confusion import Confusion
from ewavit.tasks.inference import Inference, InferenceOptions
from ewavit.tasks.judge import TOP1
from ewavit.tasks.task import Cell, Listed, Meter, Metrics, Mixing, Prediction, Table, Task
from ewavit.tasks.timm_models import (
    as_arguments,
    build_timm_model,
    create_timm_model,
    fitting_patch,
    is_timm_folder,
    timm_config,
    transform_code,
)

DEFAULT_MODEL = "vit_tiny_patch16_224"
# The first kind that a spec belongs to opens it.
OPENERS: tuple[tuple[Callable[[str], bool], Callable[[str, DataOptions], Data]], ...] = (
    (is_streamed, StreamData.open),
    (is_timm, LoaderData.open),
    (is_in_memory, TensorData.open),
    (is_folder, LoaderData.open),
)
ACCEPTED = (
    "fashion-mnist-mini or solids, a folder with train/ and val/, of CIFAR-10/100 (python format) or "
    "Tiny-ImageNet, or timm's "
    + ", ".join(f"{prefix}/..." for prefix in TIMM_PREFIXES)
    + ", or point clouds, "
    + ", ".join(f"{prefix}:PATH" for prefix in POINT_PREFIXES)
)


class Classification(Task):
    """One class for each image."""

    name = "classification"
    kind = "images"
    judge = TOP1
    suffixes = IMG_EXTENSIONS

    def open_data(self, spec: str, options: DataOptions) -> Data:
        for belongs, open_kind in OPENERS:
            if belongs(spec):
                return open_kind(spec, options)
        raise EwavitError(f"unknown data {spec!r}, and no folder either: give {ACCEPTED}")

    def preparation(self, model: str | None) -> dict[str, Any]:
        config = timm.get_pretrained_cfg(model or DEFAULT_MODEL)
        return {} if config is None else {name: getattr(config, name) for name in PREPARATION}

    def inputs(self, classes: int, in_chans: int, img_size: int, num_points: int | None) -> Inputs:
        return ImageInputs(classes, in_chans, img_size)

    def default_model(self, inputs: Inputs, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        assert isinstance(inputs, ImageInputs)
        kwargs = {**kwargs}
        kwargs.setdefault("patch_size", fitting_patch(inputs.img_size))
        return DEFAULT_MODEL, kwargs

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
        return build_timm_model(name, inputs, pretrained, initial_checkpoint, say, kwargs)

    def create_model(self, name: str, settings: Mapping[str, Any]) -> nn.Module:
        return create_timm_model(name, settings)

    def loading_code(
        self, name: str, settings: Mapping[str, Any], file: Path, pretrained_cfg: Mapping[str, Any]
    ) -> str:
        if is_timm_folder(file):
            source = f"local-dir:{file.parent}"
            return f"import timm\nmodel = timm.create_model({source!r}, pretrained=True).eval()"
        lines = ["import timm", f"settings = dict({as_arguments(settings)})"]
        more = ""
        if pretrained_cfg:
            lines.append(f"data = dict({as_arguments(pretrained_cfg)})")
            more = ", pretrained_cfg_overlay=data"
        create = f"timm.create_model({name!r}, checkpoint_path={str(file)!r}{more}, **settings)"
        return "\n".join([*lines, f"model = {create}.eval()"])

    def transform_code(self, pretrained_cfg: Mapping[str, Any]) -> str:
        return transform_code(pretrained_cfg) if pretrained_cfg else ""

    def timm_config(
        self,
        name: str,
        settings: Mapping[str, Any],
        classes: Sequence[str],
        pretrained_cfg: Mapping[str, Any],
    ) -> dict[str, Any] | None:
        return timm_config(name, settings, classes, pretrained_cfg) if pretrained_cfg else None

    def input_text(self, inputs: Inputs) -> str:
        mode = "L" if inputs.in_chans == 1 else "RGB"
        return (
            f"transform(ImageOps.exif_transpose(image).convert({mode!r})) of PIL images; "
            "timm.data.create_transform(**timm.data.resolve_model_data_config(model)) is the same transform"
        )

    def open_files(
        self, names: Sequence[str], inputs: Inputs, options: DataOptions, classes: Sequence[str]
    ) -> InputFiles:
        assert isinstance(inputs, ImageInputs)
        return ImageFiles(names, inputs, options)

    def inference(self, files: InputFiles, options: InferenceOptions) -> Inference:
        return ClassInference(files, options)

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=smoothing)

    def mixing(self, mixup: float, cutmix: float, num_classes: int) -> Mixing | None:
        return Mix(mixup, cutmix, num_classes) if mixup or cutmix else None

    def meter(self, data: Data, device: torch.device | str = "cpu") -> Meter:
        return ClassMeter(self.kind, data.num_classes, device)

    def predictions(self, data: Data, inputs: Tensor, outputs: Tensor, targets: Tensor) -> list[Listed]:
        found = outputs.argmax(1)
        probability = outputs.softmax(1).gather(1, found.unsqueeze(1)).squeeze(1)
        top = map(tuple, outputs.topk(min(5, outputs.shape[1])).indices.tolist())
        return list(map(Prediction, targets.tolist(), found.tolist(), probability.tolist(), top))

    def table(self, predictions: Sequence[Listed], classes: Sequence[str], names: Sequence[Cell]) -> Table:
        rows = (
            (
                *row[:2], name, classes[row.label], classes[row.prediction], f"{row.probability:.4f}",
                "|".join(classes[label] for label in row.top),
            )
            for name, row in zip(names, predictions, strict=True)
        )  # fmt: skip
        return ("label", "prediction", "input", "class", "predicted_class", "probability", "top5"), rows


class ClassMeter(Meter):
    """Cross-entropy, and top-1, top-5 and the mean over classes of top-1 in percent.

    Args:
        kind: kind of the inputs in the sentence, "images" or "clouds".
        num_classes: number of classes. With five or fewer, top-5 is always 100 % and no part of the sentence.
        device: device of the metrics.
    """

    def __init__(self, kind: str, num_classes: int, device: torch.device | str = "cpu") -> None:
        from torchmetrics import MeanMetric, SumMetric  # its import takes seconds, and plan needs no metrics
        from torchmetrics.classification import MulticlassAccuracy

        self.kind, self.num_classes = kind, num_classes
        self.loss, self.count = MeanMetric().to(device), SumMetric().to(device)
        self.accuracy = {
            "top1": MulticlassAccuracy(num_classes, average="micro").to(device),
            "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro").to(device),
            "mean_class": MulticlassAccuracy(num_classes, average="macro").to(device),
        }

    def update(self, inputs: Tensor, outputs: Tensor, targets: Tensor) -> None:
        self.count.update(len(targets))
        self.loss.update(F.cross_entropy(outputs, targets), weight=len(targets))
        for metric in self.accuracy.values():
            metric.update(outputs, targets)

    def compute(self) -> Metrics:
        percent = {name: round(100 * float(metric.compute()), 4) for name, metric in self.accuracy.items()}
        loss, count = float(self.loss.compute()), int(self.count.compute())
        top5 = f"top-5 {percent['top5']:.2f} %, " if self.num_classes > 5 else ""
        sentence = (
            f"top-1 {percent['top1']:.2f} % (mean of classes {percent['mean_class']:.2f} %), "
            f"{top5}loss {loss:.4f} on {count:,} {self.kind}"
        )
        return Metrics({"loss": loss, **percent}, count, self.kind, sentence)


class ConfusionMeter(Meter):
    """Adds a confusion matrix to the metrics of another meter.

    Args:
        meter: the other one, empty.
        classes: names of the classes.
        device: device of the counts.
    """

    def __init__(self, meter: Meter, classes: tuple[str, ...], device: torch.device | str = "cpu") -> None:
        from torchmetrics.classification import MulticlassConfusionMatrix

        self.meter, self.classes = meter, classes
        self.counts = MulticlassConfusionMatrix(len(classes)).to(device)

    def update(self, inputs: Tensor, outputs: Tensor, targets: Tensor) -> None:
        self.meter.update(inputs, outputs, targets)
        self.counts.update(outputs, targets)

    def compute(self) -> Metrics:
        metrics = self.meter.compute()
        counts = self.counts.compute().cpu().numpy().astype(np.int64)
        return replace(metrics, confusion=Confusion(self.classes, counts, metrics.kind))
