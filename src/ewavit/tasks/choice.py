"""`task_for`: from a data spec to its task."""

from __future__ import annotations

from ewavit.points.sources import has_parts, is_points
from ewavit.tasks.classification import Classification
from ewavit.tasks.clouds import CloudClassification
from ewavit.tasks.part_segmentation import PartSegmentation
from ewavit.tasks.task import Task


def task_for(data: str) -> Task:
    """The task of a data spec: classification of images or clouds, or part segmentation."""
    if has_parts(data):
        return PartSegmentation()
    return CloudClassification() if is_points(data) else Classification()
