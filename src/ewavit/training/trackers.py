"""`Trackers`: sends the rows of a run to TensorBoard, wandb, trackio or MLflow, through accelerate."""

from __future__ import annotations

import importlib.util
import json
import uuid
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

from ewavit.errors import EwavitError, first_line
from ewavit.files import replacing
from ewavit.training.recipe import Recipe
from ewavit.training.report import Row, say
from ewavit.training.run_folder import RunFolder

PROJECT = "ewavit"  # of wandb and trackio, experiment of MLflow


def check_trackers(recipe: Recipe) -> None:
    """Check that the packages of `--log` are installed.

    Raises:
        EwavitError: one is not.
    """
    for name in recipe.trackers:
        if importlib.util.find_spec(name) is None:
            package = "'ewavit[train]'" if name == "tensorboard" else name
            raise EwavitError(f"--log {name} needs the package {name}: pip install {package}")


class Trackers:
    """A context manager with the open logs of `--log`.

    A log that was started is found again by its number in the run's folder, so that a resumed run goes on in
    it. A log that fails later is left out with a warning: the run goes on, and `summary.csv` has all rows.

    Args:
        recipe: of the run.
        files: of the run.
        epoch: epochs done.
        main: whether this process writes; the others log nothing.

    Raises:
        EwavitError: a log cannot be started.
    """

    def __init__(self, recipe: Recipe, files: RunFolder, epoch: int, main: bool) -> None:
        self._recipe, self._files, self._epoch = recipe, files, epoch
        self._names = recipe.trackers if main else ()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Trackers:
        numbers: dict[str, str] = {}
        with suppress(OSError, ValueError):
            numbers = dict(json.loads(self._files.trackers.read_text()))
        for name in self._names:
            try:
                numbers[name] = self._start(name, numbers.get(name))
            except Exception as problem:  # each library raises its own
                self.__exit__(None, None, None)
                raise EwavitError(
                    f"--log {name} cannot be started ({first_line(problem)}): log in, choose its offline "
                    "mode, or leave it out"
                ) from None
        if self._names:
            with replacing(self._files.trackers) as partial:
                partial.write_text(json.dumps(numbers) + "\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._open):
            self._try(name, "finish")
        self._open.clear()

    def _start(self, name: str, number: str | None) -> str:
        """Start a log, or go on with the one of this number; its number."""
        known, run = number is not None, self._files.path
        number = number or uuid.uuid4().hex[:8]
        given: dict[str, dict[str, Any]] = {
            "tensorboard": {"logging_dir": run, "purge_step": self._epoch + 1 if known else None},
            "wandb": {"name": run.name, "id": number, "resume": "allow"},
            "trackio": {"name": f"{run.name}-{number}", "resume": "allow"},
            "mlflow": {"run_name": run.name, "run_id": number if known else None},
        }
        tracker = LOGGER_TYPE_TO_CLASS[name](name if name == "tensorboard" else PROJECT, **given[name])
        tracker.start()
        self._open[name] = tracker
        if name == "mlflow":
            number = str(tracker.tracker.info.run_id)
        if (
            not known and name != "tensorboard"
        ):  # which makes a run of its own of them; args.yaml is beside it
            settings = {key: value for key, value in asdict(self._recipe).items() if value is not None}
            plain = (bool, int, float, str)
            tracker.store_init_configuration(
                {key: value if isinstance(value, plain) else str(value) for key, value in settings.items()}
            )
        return number

    def log(self, row: Row, epoch: int) -> None:
        """Log the row of an epoch."""
        for name in list(self._open):
            self._try(name, "log", row, step=epoch)

    def picture(self, file: Path, epoch: int) -> None:
        """Log a picture, if there is one."""
        if not file.exists() or not self._open:
            return
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        for name in list(self._open):
            if name == "tensorboard":
                import numpy as np

                pixels = {file.stem: np.asarray(image)[None]}
                self._try(name, "log_images", pixels, step=epoch, dataformats="NHWC")
            elif name == "wandb":
                self._try(name, "log_images", {file.stem: [image]}, step=epoch)
            elif name == "mlflow":
                self._try(name, "log_artifact", str(file))
            else:
                self._try(name, "log", {file.stem: _of_trackio(image)}, step=epoch)

    def _try(self, name: str, method: str, *words: Any, **more: Any) -> None:
        try:
            getattr(self._open[name], method)(*words, **more)
        except Exception as problem:  # a log must not end a training
            say(f"warning: --log {name} failed and is left out from here ({first_line(problem)})")
            del self._open[name]


def _of_trackio(image: Image.Image) -> Any:
    return importlib.import_module("trackio").Image(image)
