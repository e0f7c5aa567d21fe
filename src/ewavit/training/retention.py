"""`Retention`: how well a model's features still serve an old task, without a head for it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewavit.core.moe import MoE
from ewavit.core.surgery import collapsed
from ewavit.data.options import DataOptions
from ewavit.errors import EwavitError
from ewavit.training.card import ModelCard
from ewavit.training.opening import open_data, usable_workers
from ewavit.training.recipe import Recipe

NEIGHBOURS, TEMPERATURE = 20, 0.07  # as DINO evaluates features (arXiv 2104.14294)
ROWS = 1024  # of similarities at a time


def neighbour_accuracy(features: Tensor, labels: Tensor, k: int = NEIGHBOURS) -> float:
    """Accuracy in percent of a vote among each input's k nearest other inputs.

    Args:
        features: (inputs, dim); compared by their cosine.
        labels: (inputs,).
        k: neighbours, weighted by exp(cosine / 0.07); at most all others.
    """
    unit = F.normalize(features.float(), dim=1)
    votes, right = int(labels.max()) + 1, 0
    for first in range(0, len(unit), ROWS):
        similar = unit[first : first + ROWS] @ unit.T
        rows = torch.arange(len(similar), device=unit.device)
        similar[rows, rows + first] = -torch.inf  # itself
        best, index = similar.topk(min(k, len(unit) - 1), dim=1)
        weights = ((best - 1) / TEMPERATURE).exp()
        count = weights.new_zeros(len(rows), votes).scatter_add_(1, labels[index], weights)
        right += int((count.argmax(1) == labels[first : first + ROWS]).sum())
    return 100 * right / len(unit)


class Retention:
    """The evaluation set of an old task (`--retain`).

    Args:
        recipe: its `retain` is the data spec.
        card: of the model; the images are prepared as those of its training.
        processes: number of processes of the run.
        device: where the model is.

    Raises:
        EwavitError: the data cannot be read or has other channels, or there are several processes.
    """

    def __init__(self, recipe: Recipe, card: ModelCard, processes: int, device: torch.device) -> None:
        if processes > 1:
            raise EwavitError(
                f"--retain {recipe.retain} works in one process, and here are {processes}: leave it out"
            )
        workers, folder = usable_workers(recipe.workers), recipe.data_dir
        options = {"workers": workers, "device": device, "data_dir": folder, **card.preparation}
        try:
            self.data = open_data(str(recipe.retain), DataOptions(batch_size=recipe.batch_size, **options))
        except EwavitError as problem:
            raise EwavitError(f"--retain {recipe.retain}: {problem}") from None
        if self.data.in_chans != card.in_chans or card.num_points is not None:
            raise EwavitError(
                f"--retain {recipe.retain} does not fit {card.model}: give images with {card.in_chans} "
                "channels"
            )

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Nearest-neighbour accuracy in percent of what a model in eval mode gives its head.

        Raises:
            EwavitError: the model does not say its features.
        """
        features, labels = [], []
        with collapsed(model) if isinstance(model, MoE) else nullcontext():
            if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
                raise EwavitError(
                    f"{type(model).__name__} has no forward_features for --retain: leave it out"
                )
            plain: Any = model.eval()
            for inputs, targets in self.data.eval_batches():
                features.append(plain.forward_head(plain.forward_features(inputs), pre_logits=True))
                labels.append(targets)
        return neighbour_accuracy(torch.cat(features), torch.cat(labels))
