"""Runs on point clouds: everything that runs on images have, through the same loop."""

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import point_sets
from ewavit import EwavitError
from ewavit.cli import main
from ewavit.compare.reading import read_run
from ewavit.data.options import DataOptions
from ewavit.points.files import checked
from ewavit.points.transformer import create_point_model, load_point_checkpoint
from ewavit.tasks.choice import task_for
from ewavit.tasks.judge import INSTANCE_IOU
from ewavit.training.export import evaluate, export, load_model
from ewavit.training.loop import resume, train
from ewavit.training.opening import open_data
from ewavit.training.processes import Interrupted
from ewavit.training.recipe import Recipe
from ewavit.training.run_folder import RunFolder
from processes import in_processes
from runs import assert_same_end, stop_after

KWARGS = "dim=16,depth=3,num_heads=2,num_group=6,group_size=4,encoder_width=4"
TINY = {
    "model_kwargs": KWARGS,
    "num_points": 32,
    "batch_size": 2,
    "epochs": 2,
    "warmup_epochs": 1,
    "experts": 2,
}


def recipe(root: Path, name: str, **settings: object) -> Recipe:
    if "data" not in settings:
        clouds = root / "clouds"
        if not clouds.exists():
            point_sets.write_folder(clouds)
        settings["data"] = f"points:{clouds}"
    return Recipe(**{**TINY, **settings}, output=str(root), name=name)


def rows(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "summary.csv").open()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run with mixtures, for tests that only look at it."""
    return train(recipe(tmp_path_factory.mktemp("runs"), "finished", votes=2))


def test_a_run_leaves_its_model_curves_predictions_and_a_picture_of_clouds(finished):
    run = finished.run
    assert {"curves.png", "model.safetensors", "predictions.png"} <= {file.name for file in run.iterdir()}
    last = rows(run)[-1]
    assert 0 <= float(last["eval_mean_class"]) <= 100
    assert float(last["expert_spread"]) > 0
    predicted = list(csv.DictReader((run / "predictions.csv").open(newline="")))
    assert [(row["input"], row["class"]) for row in predicted] == [("0", "bed"), ("1", "chair")]
    with Image.open(run / "predictions.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**20)) > 100


def test_the_deployed_model_is_a_plain_point_transformer(finished, capsys):
    model = create_point_model("point_transformer_s", 2, **Recipe(model_kwargs=KWARGS).parsed("model_kwargs"))
    assert load_point_checkpoint(model, finished.model_file) == []
    loaded, card = load_model(finished.run)
    clouds = torch.randn(3, card.num_points, 3)
    torch.testing.assert_close(model.eval()(clouds), loaded(clouds))
    names: dict[str, object] = {}
    exec(card.loading_code(finished.model_file), names)
    torch.testing.assert_close(names["model"](clouds), loaded(clouds))


def test_evaluation_with_the_same_votes_gives_the_figure_of_the_run(finished):
    for source in (finished.run, finished.run / "checkpoint", finished.model_file):
        metrics = evaluate(source, votes=2)
        assert (metrics["top1"], metrics["mean_class"]) == (
            finished.row["eval_top1"],
            finished.row["eval_mean_class"],
        )


@pytest.mark.parametrize("ending", ["safetensors", "onnx"])
def test_exported_files_compute_the_same(finished, tmp_path, ending):
    said = export(finished.run, tmp_path / f"model.{ending}")
    assert "logits equal the model's" in said
    with pytest.raises(EwavitError, match="'clouds'"):  # the file names no folder of this machine
        evaluate(tmp_path / f"model.{ending}")
    clouds = finished.run.parent / "clouds"
    assert evaluate(tmp_path / f"model.{ending}", data=f"points:{clouds}").count == 2


def test_interrupted_and_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    settings = {"aa": "scale1.5-shift0.2-rotz180-jitter0.01-drop0.3", "votes": 2, "drop_path": 0.1}
    whole = train(recipe(tmp_path, "whole", **settings)).run
    with monkeypatch.context() as patch:
        stop_after(patch, 9)  # in the second epoch
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, "parts", **settings))
    resume(tmp_path / "parts")
    assert_same_end(whole, tmp_path / "parts")


def train_here(folder: str) -> None:
    train(recipe(Path(folder), "two", lr=0.01, warmup_epochs=0, experts=1))


def test_processes_evaluate_with_the_batch_statistics_that_are_saved(tmp_path):
    point_sets.write_folder(tmp_path / "clouds")
    in_processes(2, train_here, str(tmp_path))
    loss = float(rows(tmp_path / "two")[-1]["eval_loss"])
    assert evaluate(tmp_path / "two")["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_run_on_other_classes_starts_from_a_checkpoint(finished, tmp_path):
    other = point_sets.write_folder(tmp_path / "clouds", ("desk", "sofa", "table"))
    settings = {
        "data": f"points:{other}",
        "initial_checkpoint": str(finished.model_file),
        "lr": 1e-9,
        "epochs": 1,
    }
    trained = load_model(train(recipe(tmp_path, "other", **settings)).run)[0].state_dict()
    before = load_model(finished.run)[0].state_dict()
    assert trained["cls_head_finetune.8.weight"].shape[0] == 3
    torch.testing.assert_close(
        trained["blocks.blocks.0.mlp.fc1.weight"], before["blocks.blocks.0.mlp.fc1.weight"]
    )


def test_parts_are_segmented_and_measured_by_their_ious(tmp_path):
    data = f"shapenetpart:{point_sets.write_shapenetpart(tmp_path / 'parts')}"
    result = train(recipe(tmp_path, "segmented", data=data, batch_size=3))
    last = rows(result.run)[-1]
    instance, by_class = float(last["eval_instance_iou"]), float(last["eval_class_iou"])
    assert 0 <= instance <= 100
    assert instance == pytest.approx(by_class, abs=1e-3)  # one cloud in each of two categories
    assert evaluate(result.run)["instance_iou"] == pytest.approx(instance, abs=1e-3)
    assert "logits equal" in export(result.run, tmp_path / "parts.safetensors")
    judge = task_for(data).judge
    read = read_run(RunFolder(result.run), 0, judge)
    assert read.predictions is None
    assert judge == INSTANCE_IOU
    assert read.metric == instance


def test_parts_of_generated_solids_train_resume_and_leave_their_ious_and_a_picture(tmp_path, monkeypatch):
    settings = {"data": "solid-parts", "limit": 8, "batch_size": 4, "experts": 2}
    whole = train(recipe(tmp_path, "whole", **settings))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)  # in the second epoch
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, "parts", **settings))
    resume(tmp_path / "parts")
    assert_same_end(whole.run, tmp_path / "parts")
    listed = list(csv.DictReader((whole.run / "predictions.csv").open()))
    assert {row["category"] for row in listed} == {"bottle", "lamp", "mushroom", "pencil"}
    mean = sum(float(row["iou"]) for row in listed) / len(listed)
    assert mean == pytest.approx(whole.row["eval_instance_iou"], abs=1e-2)
    with Image.open(whole.run / "predictions.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**20)) > 100
    assert load_model(whole.run)[1].task_name == "segmentation"
    assert "logits equal the model's" in export(whole.run, tmp_path / "parts.onnx")


def test_files_get_the_parts_that_their_run_predicts_and_every_point_a_label(tmp_path, capsys):
    root = point_sets.write_shapenetpart(tmp_path / "set")
    data = f"shapenetpart:{root}"
    run = train(recipe(tmp_path, "run", data=data, batch_size=3, epochs=1)).run
    capsys.readouterr()
    file = tmp_path / "Airplane" / "a2.txt"
    file.parent.mkdir()
    table = np.loadtxt(root / "02691156" / "a2.txt")
    table[:, :3] = 7 * table[:, :3] + 100  # any place and size
    np.savetxt(file, table, "%.6f")
    words = [
        str(file),
        str(file),
        "--json",
        "--to",
        str(tmp_path / "to"),
        "--sheet",
        str(tmp_path / "sheet.png"),
    ]
    assert main(["predict", str(run), *words, "--csv", str(tmp_path / "found.csv")]) == 0
    found = json.loads(capsys.readouterr().out)["clouds"]
    assert found[0]["category"] == "Airplane"
    model, _ = load_model(run)
    (inputs, _), *_ = open_data(data, DataOptions(batch_size=2, num_points=32)).eval_batches()
    own = model(inputs)[0, :4].argmax(0)  # Airplane has the first four parts
    shares = torch.bincount(own, minlength=4) / len(own)
    expected = {f"Airplane {part}": float(shares[part]) for part in range(4) if shares[part]}
    assert dict(zip(found[0]["parts"], found[0]["shares"], strict=True)) == pytest.approx(expected)
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["a2-0.csv", "a2-1.csv"]
    labelled = list(csv.DictReader((tmp_path / "to" / "a2-0.csv").open(newline="")))
    points = np.array([[float(row[axis]) for axis in "xyz"] for row in labelled])
    assert np.allclose(points, table[:, :3], atol=1e-6)
    scaled = checked(table, "a2.txt", 1)
    for point, row in zip(scaled, labelled, strict=True):
        nearest = np.argmin(((inputs[0, :, :3].numpy() - point) ** 2).sum(1))
        assert row["part"] == f"Airplane {own[nearest]}"
    with Image.open(tmp_path / "sheet.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**20)) > 20
    assert main(["predict", str(run), str(root / "02691156" / "a2.txt")]) == 2
    assert "is the name of its folder, and 02691156 is none: put" in capsys.readouterr().err


def test_solids_get_a_small_point_transformer_unless_told_otherwise(capsys):
    assert main(["plan", "--data", "solids", "--num-points", "64", "--json"]) == 0
    assert '"model": "point_transformer_s"' in (said := capsys.readouterr().out)
    assert '"images": "64x3 clouds, 10 classes"' in said
    assert re.search(
        r'"name": "blocks.blocks.5.mlp",\s+"class": "Mlp",\s+"verdict": "becomes a mixture', said
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vit_tiny_patch16_224"}, "unknown point model 'vit_tiny_patch16_224'"),
        ({"mixup": 0.8}, "--mixup and --cutmix mix images"),
        ({"batch_size": 1}, "--batch-size 1 is too small for the point transformer"),
        ({"pretrained": True}, "--pretrained loads timm's weights"),
        ({"num_points": 41}, "has 40 points: remove it, or choose --num-points 40"),
        ({"model_kwargs": "num_group=33"}, "32 points per cloud are too few for 33 groups"),
        (
            {"model": "point_transformer_s", "data": "fashion-mnist-mini"},
            "point_transformer_s is for point clouds",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, options, message):
    with pytest.raises(EwavitError, match=message):
        train(recipe(tmp_path, "wrong", **options))
    assert not (tmp_path / "wrong").exists()


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    spec = f"modelnet40:{point_sets.write_modelnet_h5(tmp_path)}"
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(EwavitError, match=r"h5py: pip install 'ewavit\[points\]'"):
        open_data(spec, DataOptions(batch_size=1))
