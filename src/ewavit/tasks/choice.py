"""`task_for`: from a data spec, and the name of a task, to the task."""

from __future__ import annotations

from collections.abc import Mapping

from ewavit.data.masks import SHAPES
from ewavit.errors import EwavitError
from ewavit.points.sources import has_parts, is_points
from ewavit.tasks.classification import Classification
from ewavit.tasks.clouds import CloudClassification
from ewavit.tasks.part_segmentation import PartSegmentation
from ewavit.tasks.retrieval import Retrieval
from ewavit.tasks.segmentation import Segmentation
from ewavit.tasks.task import Task

# The tasks of each kind of data; the first one is the default.
TASKS: Mapping[str, tuple[type[Task], ...]] = {
    "images": (Classification, Segmentation, Retrieval),
    "images with masks": (Segmentation,),
    "clouds": (CloudClassification,),
    "clouds with parts": (PartSegmentation,),
}
OWN_SETTINGS = {name for tasks in TASKS.values() for task in tasks for name in task.own_settings}


def task_for(data: str, name: str | None = None) -> Task:
    """The task of a data spec.

    Args:
        data: the spec.
        name: of the task, as `--task` takes it; None for the default of this kind of data.

    Raises:
        EwavitError: the data are of another kind than the task needs.
    """
    kind = "images with masks" if data == SHAPES else "images"
    if is_points(data):
        kind = "clouds with parts" if has_parts(data) else "clouds"
    for task in TASKS[kind]:
        if name in (None, task.name):
            return task()
    names = ", ".join(task.name for task in TASKS[kind])
    raise EwavitError(
        f"--task {name} does not go with {data!r} ({kind}): choose other data, or --task {names}"
    )
