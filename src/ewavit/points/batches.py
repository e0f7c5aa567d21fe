"""`PointData`: point clouds in memory behind the same seam as images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ewavit.data.batches import Batch, BatchPlan, Data
from ewavit.data.sources import Ints
from ewavit.points.augmentation import PointAugmentation
from ewavit.points.ops import gather_points
from ewavit.points.sources import PointSet
from ewavit.points.transformer import NUM_CATEGORIES

SHOWN = 10  # clouds in the picture of a run


class PointData(Data):
    """Clouds that lie on the device and are augmented there; draws come from the global generators.

    Inputs are (batch, num_points, 3), labels (batch,). For part segmentation the category follows each point
    as a one-hot vector, and labels are (batch, num_points).

    Args:
        points: the clouds.
        indices: which training clouds are used, in the order that `plan` counts, (plan.num_train,).
        plan: the order of the clouds.
        augmentation: what happens to training clouds.
        num_points: points per cloud; a random choice in training, the first ones in evaluation.
        votes: passes over each evaluation cloud, the first as it is, the others augmented, that are averaged.
        device: where all this happens.
    """

    def __init__(
        self,
        points: PointSet,
        indices: Ints,
        plan: BatchPlan,
        augmentation: PointAugmentation,
        num_points: int,
        votes: int,
        device: torch.device,
    ) -> None:
        self._plan, self._augment, self._votes = plan, augmentation, votes
        self._train_points = torch.from_numpy(points.train_points[indices]).to(device)
        self._train_labels = torch.from_numpy(points.train_labels[indices]).to(device)
        self._eval_points = torch.from_numpy(points.eval_points[:, :num_points]).to(device)
        self._eval_labels = torch.from_numpy(points.eval_labels).to(device)
        if points.categories:
            self._eval_labels = self._eval_labels[:, :num_points]
        self._categories = [
            None
            if category is None
            else F.one_hot(torch.from_numpy(category), NUM_CATEGORIES).float().to(device)
            for category in (
                points.train_category if points.train_category is None else points.train_category[indices],
                points.eval_category,
            )
        ]
        self.name, self.classes, self.categories = points.name, points.classes, points.categories
        self.num_train, self.num_eval = plan.num_train, plan.num_eval
        self.batches_per_epoch = plan.batches_per_epoch
        self.num_points = self._size = num_points
        self.in_chans = 3 + NUM_CATEGORIES if points.categories else 3
        self.img_size, self.mean, self.std = 0, (), ()
        self._bad = points.bad

    @property
    def bad_images(self) -> int:
        return self._bad

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for indices in self._plan.train(epoch, start):
            chosen = torch.from_numpy(indices).to(self._train_points.device)
            points, labels = self._train_points[chosen], self._train_labels[chosen]
            if points.shape[1] > self._size:
                draws = torch.rand(points.shape[:2], device=points.device)
                some = draws.topk(self._size, sorted=False)[1]
                points = gather_points(points, some)
                labels = labels.gather(1, some) if labels.ndim == 2 else labels
            yield self._with_category(self._augment(points), self._categories[0], chosen), labels

    def eval_batches(self) -> Iterator[Batch]:
        for indices in self._plan.eval():
            chosen = torch.from_numpy(indices).to(self._eval_points.device)
            points = self._with_category(self._eval_points[chosen], self._categories[1], chosen)
            yield points, self._eval_labels[chosen]

    def _with_category(self, points: Tensor, categories: Tensor | None, chosen: Tensor) -> Tensor:
        if categories is None:
            return points
        return torch.cat([points, categories[chosen].unsqueeze(1).expand(-1, points.shape[1], -1)], -1)

    def voting(self, predict: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The mean prediction for each cloud and for views of it, the same views in every evaluation."""
        if self._votes == 1:
            return predict

        def vote(points: Tensor) -> Tensor:
            total = predict(points).float()
            devices = [points.device] if points.is_cuda else []
            for number in range(1, self._votes):
                with torch.random.fork_rng(devices):
                    torch.manual_seed(number)
                    view = torch.cat([self._augment(points[..., :3]), points[..., 3:]], -1)
                total = total + predict(view).float()
            return total / self._votes

        return vote

    def picture(self, predictions: Sequence[tuple[int, int]], path: Path) -> None:
        if not predictions:
            return
        order = np.random.default_rng(0).permutation(len(predictions)).tolist()
        wrong = [index for index in order if predictions[index][0] != predictions[index][1]][: SHOWN // 2]
        right = [index for index in order if predictions[index][0] == predictions[index][1]]
        chosen = right[: SHOWN - len(wrong)] + wrong
        names = self.classes
        named = [(names[predictions[index][0]], names[predictions[index][1]]) for index in chosen]
        draw_clouds(self._eval_points[chosen].cpu().numpy(), named, path)


def draw_clouds(clouds: Any, names: Sequence[tuple[str, str]], path: Path) -> None:
    """Draw point clouds (clouds, points, 3) with their true and predicted class, the wrong ones in red."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    figure = pyplot.figure(figsize=(2.4 * columns, 2.6 * rows), layout="constrained")
    for number, (points, (label, found)) in enumerate(zip(clouds, names, strict=True), 1):
        axis = figure.add_subplot(rows, columns, number, projection="3d")
        x, y, z = points.T
        axis.scatter(x, y, z, c=y, s=2, cmap="viridis", linewidths=0)
        axis.set_box_aspect((1, 1, 1), zoom=1.3)
        for limits in (axis.set_xlim, axis.set_ylim, axis.set_zlim):
            limits(-0.8, 0.8)
        axis.set_axis_off()
        right = label == found
        title = label if right else f"{label}\npredicted {found}"
        axis.set_title(title, fontsize=9, color="black" if right else "tab:red")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
