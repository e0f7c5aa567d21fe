"""Nearest neighbours by descriptor: Recall@K and mAP@R, and the neighbours of images without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ewavit.data.batches import Data
from ewavit.data.input_files import InputFiles
from ewavit.data.retrieval import GALLERY, QUERY
from ewavit.errors import EwavitError
from ewavit.tasks.contrastive import MARGIN
from ewavit.tasks.inference import Inference, InferenceOptions, Value
from ewavit.tasks.sheet import MOST_DRAWN, draw_sheet, short
from ewavit.tasks.task import Meter, Metrics

RANKS = (1, 2, 4, 8)  # the K of Recall@K
AT_ONCE = 256  # queries in one block of similarities


class Ranking(NamedTuple):
    """What the ranking of the gallery gives for all queries that have an image of their class in it.

    Attributes:
        recall: for each K of `RANKS`, the share of queries with an image of their class among the first K.
        map_at_r: mean average precision at R, R the number of gallery images of the query's class.
        loss: mean of 1 - s over pairs of one class plus mean of max(0, s - 0.5) over all other pairs.
        queries: their number.
    """

    recall: tuple[float, ...]
    map_at_r: float
    loss: float
    queries: int


def similarities(
    descriptors: Tensor, roles: Tensor, gallery: Tensor, queries: Tensor | None = None
) -> Iterable[tuple[Tensor, Tensor]]:
    """Blocks of queries and their similarities to the gallery; a query's to itself is minus infinity.

    Args:
        descriptors: (images, dim).
        roles: (images,).
        gallery: numbers of the gallery images, (gallery,).
        queries: numbers of the queries; None for all images that are queries.
    """
    numbers = (roles != GALLERY).nonzero().squeeze(1) if queries is None else queries
    for block in torch.split(numbers, AT_ONCE):
        similarity = descriptors[block] @ descriptors[gallery].T
        yield block, similarity.masked_fill(block[:, None] == gallery, -torch.inf)


def in_gallery(roles: Tensor) -> Tensor:
    """Numbers of the images that are found, (gallery,)."""
    return (roles != QUERY).nonzero().squeeze(1)


def rank(descriptors: Tensor, labels: Tensor, roles: Tensor) -> Ranking:
    """Rank the gallery for each query.

    Args:
        descriptors: l2-normalised, (images, dim).
        labels: classes, (images,).
        roles: what each image is, (images,); see `ewavit.data.retrieval`.

    Raises:
        EwavitError: no query has an image of its class in the gallery.
    """
    gallery = in_gallery(roles)
    recall, precision = torch.zeros(len(RANKS), dtype=torch.float64), 0.0
    count, sums, pairs = 0, [0.0, 0.0], [0, 0]
    for block, similarity in similarities(descriptors, roles, gallery):
        same = labels[block][:, None] == labels[gallery]
        valid = similarity.isfinite()
        positive = same & valid
        found = positive.sum(1)
        with_class = found > 0
        if not with_class.any():
            continue
        for side, mask in enumerate((positive, ~same)):
            values = similarity[mask].double()
            sums[side] += float((1 - values if side == 0 else (values - MARGIN).clamp(min=0)).sum())
            pairs[side] += len(values)
        deepest = min(max(int(found.max()), RANKS[-1]), len(gallery))
        order = similarity[with_class].topk(deepest).indices
        right = positive[with_class].gather(1, order)
        for column, k in enumerate(RANKS):
            recall[column] += int(right[:, :k].any(1).sum())
        places = torch.arange(1, deepest + 1, device=right.device)
        within = right & (places <= found[with_class][:, None])
        precisions = within.cumsum(1).double() / places
        average = (precisions * within).sum(1) / found[with_class]
        precision += float(average.sum())
        count += len(order)
    if not count:
        raise EwavitError(
            "no query has another image of its class to find: give evaluation images with pairs"
        )
    loss = sums[0] / pairs[0] + (sums[1] / pairs[1] if pairs[1] else 0.0)
    return Ranking(tuple((recall / count).tolist()), precision / count, loss, count)


class NeighbourMeter(Meter):
    """Recall@1, 2, 4, 8 and mAP@R in percent, and the loss of `Ranking`.

    Args:
        kind: kind of the inputs in the sentence.
        device: device of the metrics.
    """

    def __init__(self, kind: str, device: torch.device | str = "cpu") -> None:
        from ewavit.tasks.collected import Collected

        self.kind = kind
        self.collected = Collected().to(device)

    def update(self, inputs: Tensor, outputs: Tensor, targets: Tensor) -> None:
        self.collected.update(outputs, targets)

    def compute(self) -> Metrics:
        descriptors, targets = self.collected.compute()
        if not descriptors.isfinite().all():
            raise EwavitError("a descriptor is not finite: lower --lr or set --clip-grad")
        ranking = rank(descriptors, *targets.T)
        recalls = {
            f"recall{k}": round(100 * share, 4) for k, share in zip(RANKS, ranking.recall, strict=True)
        }
        map_at_r = round(100 * ranking.map_at_r, 4)
        said = "/".join(f"{value:.2f}" for value in recalls.values())
        sentence = (
            f"Recall@{'/'.join(map(str, RANKS))} {said} %, mAP@R {map_at_r:.2f} %, loss {ranking.loss:.4f} "
            f"on {ranking.queries:,} queries"
        )
        values = {"loss": ranking.loss, **recalls, "map_at_r": map_at_r}
        return Metrics(values, len(descriptors), self.kind, sentence)


class Gallery(NamedTuple):
    """The evaluation images of this rank.

    Attributes:
        descriptors: (images, dim).
        targets: class and role, (images, 2).
        names: of the images, or their numbers.
    """

    descriptors: Tensor
    targets: Tensor
    names: list[str]

    @classmethod
    def of(cls, data: Data, predict: Callable[[Tensor], Tensor]) -> Gallery:
        """Describe the evaluation images of this rank."""
        with torch.inference_mode():
            batches = [(predict(inputs).float(), targets) for inputs, targets in data.eval_batches()]
        descriptors, targets = (torch.cat(each) for each in zip(*batches, strict=True))
        names = data.eval_names() or [str(number) for number in range(len(targets))]
        return cls(descriptors, targets, names)


def images_of(data: Data, numbers: Iterable[int]) -> dict[int, Image.Image]:
    """Some of this rank's evaluation images, as they are given to the model, by number."""
    wanted, found, first = set(numbers), {}, 0
    shape = (-1, 1, 1)
    for inputs, _ in data.eval_batches():
        for number in wanted & set(range(first, first + len(inputs))):
            mean, std = (torch.tensor(each).view(shape) for each in (data.mean, data.std))
            pixels = ((inputs[number - first].cpu() * std + mean) * 255).round().clamp(0, 255).byte()
            array = pixels.movedim(0, -1).numpy()
            found[number] = Image.fromarray(array.repeat(3 // array.shape[-1], -1))
        first += len(inputs)
    return found


class NeighbourInference(Inference):
    """The nearest evaluation images of the training's data set, for each input."""

    has_sheet = True

    def __init__(self, files: InputFiles, options: InferenceOptions) -> None:
        super().__init__(files, options)
        self.data = options.data()
        self.gallery = Gallery.of(self.data, options.predict)
        self.indices = in_gallery(self.gallery.targets[:, 1])
        self._found: list[tuple[int, list[int], list[float]]] = []  # number, neighbours, similarities

    def update(self, numbers: Sequence[int], inputs: Tensor, outputs: Tensor) -> None:
        found = outputs @ self.gallery.descriptors[self.indices].T
        nearest = found.topk(min(self.options.topk, len(self.indices)), 1)
        neighbours = self.indices[nearest.indices].tolist()
        self._found += zip(numbers, neighbours, nearest.values.tolist(), strict=True)

    def _class(self, number: int) -> str:
        return self.data.eval_classes[int(self.gallery.targets[number, 0])]

    def rows(self) -> list[dict[str, Value]]:
        return [
            {
                "input": self.files.names[number],
                "neighbours": [self.gallery.names[each] for each in neighbours],
                "classes": [self._class(each) for each in neighbours],
                "similarities": similarity,
            }
            for number, neighbours, similarity in self._found
        ]

    def line(self, row: dict[str, Value]) -> str:
        _, names, classes, values = row.values()
        assert isinstance(names, list)
        assert isinstance(classes, list)
        assert isinstance(values, list)
        return ", ".join(
            f"{name} ({of_class}) {value:.3f}"
            for name, of_class, value in zip(names, classes, values, strict=True)
        )

    def draw(self, path: Path) -> int:
        each = 1 + len(self._found[0][1])
        chosen = self._found[: max(1, MOST_DRAWN // each)]
        images = images_of(self.data, (near for _, neighbours, _ in chosen for near in neighbours))
        pictures: list[Any] = []
        captions = []
        for number, neighbours, values in chosen:
            pictures += [self.files.show(number), *(images[near] for near in neighbours)]
            captions.append(f"{short(Path(self.files.names[number]).name)}\nquery")
            captions += [
                f"{short(self._class(near))}\n{value:.3f}"
                for near, value in zip(neighbours, values, strict=True)
            ]
        draw_sheet(pictures, captions, path, columns=each)
        return len(chosen)
