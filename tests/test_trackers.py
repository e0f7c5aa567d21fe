"""`--log`: rows, pictures and resumption in experiment trackers; no secrets; missing packages are named."""

import csv
import importlib.util
import os
import sys
import types
from typing import ClassVar

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ewavit.cli import main
from ewavit.errors import EwavitError
from ewavit.training.loop import resume, train
from ewavit.training.processes import Interrupted
from ewavit.training.recipe import TRACKERS, Recipe
from runs import TINY, recipe, stop_after

SMALL = {"limit": 128, "holdout": 0.5}  # two steps in an epoch, 64 images to evaluate
SECRET = "s3cret-of-the-environment"


class StandIn(GeneralTracker):
    """Takes what a tracker's class of accelerate gets, and keeps it."""

    requires_logging_directory = False
    kept: ClassVar[list] = []

    def __init__(self, project, **given):
        super().__init__(_blank=True)
        self.given, self.settings, self.rows, self.pictures, self.finished = given, None, [], [], False
        number = given.get("run_id") or "number of the library"
        self.tracker = types.SimpleNamespace(info=types.SimpleNamespace(run_id=number))
        self.kept.append(self)

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None):
        self.rows.append((step, values))

    def log_images(self, values, step=None):
        self.pictures.append(values)

    def log_artifact(self, path):
        self.pictures.append(path)

    def finish(self):
        self.finished = True


def stand_in(monkeypatch, name):
    kind = type("StandIn", (StandIn,), {"name": name, "kept": []})
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, kind)
    module = types.ModuleType(name)
    module.Image = lambda image: image
    module.__spec__ = importlib.util.spec_from_loader(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    return kind.kept


def events(run):
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return found


def rows_of(run):
    return list(csv.DictReader((run / "summary.csv").open()))


def test_tensorboard_has_the_columns_of_the_csv_and_a_picture(tmp_path):
    run = train(recipe(tmp_path, "events", log="tensorboard", **SMALL)).run
    found, rows = events(run), rows_of(run)
    assert set(found.Tags()["scalars"]) == set(rows[0])
    assert {"train_loss", "eval_top1", "share_rate", "images_per_second"} <= set(rows[0])
    assert [name for name in rows[0] if name.startswith("spread/")]
    for name in rows[0]:
        values = [(event.step, event.value) for event in found.Scalars(name)]
        assert values == [
            (number, pytest.approx(float(row[name]), rel=1e-6)) for number, row in enumerate(rows, 1)
        ]
    assert found.Tags()["images"] == ["predictions"]
    assert (run / "predictions.png").exists()


def test_a_resumed_run_goes_on_in_the_same_events(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, "stopped", log="tensorboard", **SMALL))
    run = resume(tmp_path / "stopped").run
    values = [(event.step, event.value) for event in events(run).Scalars("eval_top1")]
    assert [step for step, _ in values] == [1, 2]
    assert [value for _, value in values] == pytest.approx([float(row["eval_top1"]) for row in rows_of(run)])
    assert sorted(path.name for path in (run / "tensorboard").iterdir() if path.is_dir()) == []


@pytest.mark.parametrize("name", TRACKERS[1:])
def test_a_tracker_gets_settings_rows_and_a_picture_and_goes_on_after_a_stop(tmp_path, monkeypatch, name):
    kept = stand_in(monkeypatch, name)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, "stopped", log=name, **SMALL))
    run = resume(tmp_path / "stopped").run
    first, second = kept
    assert first.finished
    assert second.finished
    assert first.settings["model_kwargs"] == TINY["model_kwargs"]
    assert second.settings is None
    assert [step for step, _ in first.rows] == [1]
    assert [step for step, values in second.rows if "eval_top1" in values] == [2]
    shown = second.pictures or [values for _, values in second.rows if "predictions" in values]
    assert len(shown) == 1
    if name == "mlflow":
        assert [each.given["run_id"] for each in kept] == [None, "number of the library"]
    else:
        assert first.given == second.given
        assert second.given["resume"] == "allow"
    assert [float(row["eval_top1"]) for row in rows_of(run)] == [
        values["eval_top1"] for each in kept for _, values in each.rows if "eval_top1" in values
    ]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    kept = stand_in(monkeypatch, "wandb")

    def fail(tracker, values, step=None):
        raise ConnectionError("no route to the host")

    monkeypatch.setattr(LOGGER_TYPE_TO_CLASS["wandb"], "log", fail)
    run = train(recipe(tmp_path, "failing", log="wandb, tensorboard ,wandb", **SMALL)).run
    assert capsys.readouterr().out.count("--log wandb failed") == 1
    assert len(kept) == 1
    assert len(rows_of(run)) == len(events(run).Scalars("eval_top1")) == 2


def test_a_tracker_that_cannot_start_is_one_line(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, "wandb")

    def fail(tracker):
        raise RuntimeError("no API key configured\nand more")

    monkeypatch.setattr(LOGGER_TYPE_TO_CLASS["wandb"], "start", fail)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    assert main(["train", *words, "--output", str(tmp_path), "--log", "wandb"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ewavit: --log wandb cannot be started (no API key configured)")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named_before_the_run(tmp_path, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda word, *more: None if word == name else find(word))
    package = r"'ewavit\[train\]'" if name == "tensorboard" else name
    with pytest.raises(EwavitError, match=f"--log {name} needs the package {name}: pip install {package}$"):
        train(recipe(tmp_path, "missing", log=name, **SMALL))
    assert not (tmp_path / "missing").exists()


def test_an_unknown_tracker_is_refused():
    with pytest.raises(EwavitError, match="--log 'comet' is unknown: give one or several of tensorboard"):
        Recipe(log="tensorboard,comet")


def test_no_file_holds_a_secret_of_the_environment(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    stand_in(monkeypatch, "wandb")
    kept = stand_in(monkeypatch, "mlflow")
    run = train(recipe(tmp_path, "secret", log="tensorboard,wandb,mlflow", epochs=1, **SMALL)).run
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in str([each.__dict__ for each in kept])
    assert os.environ["HF_TOKEN"] == SECRET


@pytest.mark.parametrize(("old", "log"), [(True, "tensorboard"), (False, None)])
def test_settings_of_earlier_runs_keep_their_meaning(old, log):
    assert Recipe.from_dict({"tensorboard": old}, "args.yaml").log == log
