"""`Collected`: a metric that keeps all outputs. Its own file, because torchmetrics is slow to import."""

from __future__ import annotations

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class Collected(Metric):  # type: ignore[misc]  # torchmetrics is untyped
    """Descriptors and targets of all batches and processes."""

    descriptors: list[Tensor]
    targets: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("descriptors", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, descriptors: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        self.descriptors.append(descriptors)
        self.targets.append(targets)

    def compute(self) -> tuple[Tensor, Tensor]:
        """All of them."""
        return dim_zero_cat(self.descriptors), dim_zero_cat(self.targets)
