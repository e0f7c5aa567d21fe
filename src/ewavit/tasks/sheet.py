"""`draw_sheet`: a grid of images or point clouds with captions, as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ewavit.data.batches import Data
from ewavit.data.sources import FileImages
from ewavit.files import replacing
from ewavit.tasks.inference import shown
from ewavit.tasks.task import Prediction

IN_LOG = 10  # images in the picture of a run
MOST_DRAWN = 60  # inputs of a contact sheet
THUMBNAIL = 240  # side of an image in it, in pixels
LONGEST_NAME = 28  # characters of a name in a caption
WRONG = "tab:red"  # the captions of wrong predictions


def short(text: str) -> str:
    """A text for a caption: on one line, cut in its middle, and no formula to matplotlib."""
    text = shown(text)
    if len(text) > LONGEST_NAME:
        text = f"{text[: LONGEST_NAME // 2 - 1]}…{text[-(LONGEST_NAME // 2) :]}"
    return text.replace("$", r"\$")


def draw_sheet(
    pictures: Sequence[Any],
    captions: Sequence[str],
    path: Path,
    wrong: Sequence[bool] = (),
    clouds: bool = False,
    columns: int | None = None,
) -> None:
    """Draw a grid of inputs with captions.

    Args:
        pictures: PIL images, or the points of clouds (points, 3), a fourth column is the part of a point.
        captions: one for each.
        path: file of the picture.
        wrong: for each, whether its prediction is wrong: then the caption is red.
        clouds: whether `pictures` are clouds.
        columns: of the grid; None chooses them by the number of pictures.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    usual = min(6, len(pictures)) if len(pictures) < 12 else min(8, math.ceil(math.sqrt(len(pictures))))
    columns = columns or usual
    rows = math.ceil(len(pictures) / columns)
    figure = pyplot.figure(figsize=(2.2 * columns, 2.6 * rows), layout="constrained")
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        axis = figure.add_subplot(rows, columns, number + 1, projection="3d" if clouds else None)
        (_draw_cloud if clouds else _draw_image)(axis, picture)
        axis.set_axis_off()
        axis.set_title(caption, fontsize=9, color=WRONG if number < len(wrong) and wrong[number] else "black")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)


def _draw_image(axis: Any, image: Any) -> None:
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    axis.imshow(image)


def _draw_cloud(axis: Any, points: Any) -> None:
    x, y, z, *parts = points.T  # without labels of parts the colour is y
    colours = {"c": parts[0].astype(int) % 10, "cmap": "tab10", "vmin": 0, "vmax": 9} if parts else {"c": y}
    axis.scatter(x, y, z, s=2, linewidths=0, **{"cmap": "viridis", **colours})
    axis.set_box_aspect((1, 1, 1), zoom=1.3)
    for limits in (axis.set_xlim, axis.set_ylim, axis.set_zlim):
        limits(-0.8, 0.8)


def draw_images(data: Data, predictions: Sequence[Any], path: Path) -> None:
    """Draw a few evaluation images with their classes and predicted classes; nothing for other tasks.

    Args:
        data: the data of the evaluation.
        predictions: one for each of its inputs, in order.
        path: file of the picture.
    """
    if not predictions or not isinstance(predictions[0], Prediction) or data.inputs.kind != "images":
        return
    chosen = list(np.unique(np.linspace(0, len(predictions) - 1, IN_LOG).astype(int)))
    files = [str(predictions[index].name) for index in chosen]
    if all(Path(file).is_file() for file in files):
        source = FileImages(files, [0] * len(files), ())
        pictures = [source.load(number, "RGB")[0] for number in range(len(files))]
    else:  # the first ones, as the model gets them
        inputs, _ = next(iter(data.eval_batches()))
        pictures = [_image(each, data) for each in inputs[:IN_LOG]]
        chosen = list(range(len(pictures)))
    rows = [predictions[index] for index in chosen]
    names = [(short(data.classes[row.label]), short(data.classes[row.prediction])) for row in rows]
    captions = [
        f"{label}\n{100 * row.probability:.0f} % {found}"
        for row, (label, found) in zip(rows, names, strict=True)
    ]
    draw_sheet(pictures, captions, path, [row.label != row.prediction for row in rows])


def _image(inputs: Tensor, data: Data) -> Image.Image:
    """An image (channels, height, width) as it was before its normalisation."""
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (data.mean, data.std))
    pixels = (255 * (inputs.cpu() * std + mean)).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())
