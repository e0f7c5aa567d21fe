"""`ContrastiveLoss`: the loss of IRT (arXiv 2102.05644) with a cross-batch memory and KoLeo."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ewavit.errors import EwavitError

MARGIN = 0.5


def contrastive(
    descriptors: Tensor, labels: Tensor, others: Tensor, of_others: Tensor, margin: float
) -> Tensor:
    """IRT's contrastive loss: the mean over descriptors of a sum over pairs.

    A pair of one class adds 1 - s, a pair of two classes max(0, s - margin), with s the scalar product. The
    pair of a descriptor with itself adds 0.

    Args:
        descriptors: l2-normalised, (batch, dim).
        labels: their classes, (batch,).
        others: what they are paired with, (others, dim).
        of_others: their classes, (others,).
        margin: similarity from which a pair of two classes counts.
    """
    similarity = descriptors @ others.T
    same = labels[:, None] == of_others
    return torch.where(same, 1 - similarity, (similarity - margin).clamp(min=0)).sum(1).mean()


def koleo(descriptors: Tensor) -> Tensor:
    """KoLeo: minus the mean logarithm of the distance to the nearest other descriptor of the batch.

    Args:
        descriptors: l2-normalised, (batch, dim).
    """
    with torch.no_grad():
        nearest = (descriptors @ descriptors.T).fill_diagonal_(-2).argmax(1)
    distance = F.pairwise_distance(descriptors, descriptors[nearest], eps=1e-8)
    return -(distance + 1e-8).log().mean()


class ContrastiveLoss(nn.Module):
    """Contrastive loss over a batch and a memory of earlier batches, plus `weight` times KoLeo.

    The memory is a ring of descriptors and classes, the latest of all processes, and part of the state dict:
    a resumed run goes on exactly. (That of pytorch-metric-learning 2.9 keeps its position and whether it is
    full outside of its state dict.)

    Args:
        margin: similarity from which a pair of two classes counts.
        weight: lambda of KoLeo; 0 is IRT_L.
        size: descriptors in the memory; 0 keeps none.
    """

    labels: Tensor
    written: Tensor
    memory: Tensor

    def __init__(self, margin: float = MARGIN, weight: float = 0.7, size: int = 0) -> None:
        super().__init__()
        self.margin, self.weight, self.size = margin, weight, size
        self.register_buffer("memory", torch.zeros(size, 0))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))  # descriptors so far

    def load_state_dict(self, state: dict[str, Tensor], *_: object, **__: object) -> None:  # type: ignore[override]
        """Go on from a saved state.

        Raises:
            EwavitError: it is of a memory of another size.
        """
        if len(state["memory"]) != self.size or len(state["labels"]) != self.size:
            raise EwavitError(f"the memory holds {len(state['memory'])} descriptors, not {self.size}")
        for name in ("memory", "labels", "written"):
            setattr(self, name, state[name].to(getattr(self, name).device))

    def forward(self, descriptors: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch; then the batch of every process enters the memory. A collective.

        Args:
            descriptors: l2-normalised, (batch, dim).
            labels: their classes, (batch,).
        """
        descriptors = descriptors.float()
        kept = min(int(self.written), self.size)
        others, of_others = descriptors, labels
        if kept:
            others, of_others = (
                torch.cat([others, self.memory[:kept]]),
                torch.cat([labels, self.labels[:kept]]),
            )
        loss = contrastive(descriptors, labels, others, of_others, self.margin)
        if self.weight:
            loss = loss + self.weight * koleo(descriptors)
        if self.size and self.training:
            self._remember(descriptors.detach(), labels)
        return loss

    @torch.no_grad()
    def _remember(self, descriptors: Tensor, labels: Tensor) -> None:
        new, of_new = (
            torch.cat(list(_of_all(each.contiguous())))[-self.size :] for each in (descriptors, labels)
        )
        if not self.memory.shape[1]:
            self.memory = new.new_zeros(self.size, new.shape[1])
        places = (self.written + torch.arange(len(new), device=new.device)) % self.size
        self.memory[places], self.labels[places] = new, of_new
        self.written += len(new)


def _of_all(tensor: Tensor) -> Iterable[Tensor]:
    """The tensor of each process, in their order."""
    if not (dist.is_available() and dist.is_initialized()):
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return gathered
