"""`ewavit predict`: what the run predicted itself, for any files, and nothing half-written."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ewavit
from ewavit.cli import main
from ewavit.data.arrays import read_bundled
from ewavit.errors import EwavitError
from ewavit.tasks.class_inference import ClassInference
from ewavit.tasks.classification import Classification
from ewavit.training.loop import train
from runs import TINY, recipe
from stripes import MODEL, predicted, write_folder

CLOUD_MODEL = "dim=16,depth=3,num_heads=2,num_group=6,group_size=4,encoder_width=4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("stripes"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder):
    settings = {**TINY, **MODEL, "data": str(folder), "epochs": 1, "limit": None, "workers": 0}
    return train(recipe(tmp_path_factory.mktemp("runs"), "folder", **settings)).run


def predict(*words) -> int:
    return main(["predict", *map(str, words), "--workers", "0"])


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def assert_as_in_the_run(rows, run, folder):
    """Equal rows; the run's own have the label as well, and a path relative to the data."""
    expected = predicted(run)
    assert len(rows) == len(expected) > 0
    for row, own in zip(rows, expected, strict=True):
        assert row["input"] == str(folder / own["input"])
        assert {name: row[name] for name in ("prediction", "predicted_class", "top5")} == {
            name: own[name] for name in ("prediction", "predicted_class", "top5")
        }
        assert float(row["probability"]) == pytest.approx(float(own["probability"]), abs=1.01e-4)


@pytest.mark.parametrize("source", ["run", "checkpoint", "file", "folder", "onnx"])
def test_the_test_images_get_the_predictions_of_the_run(finished, folder, tmp_path, source):
    names = {"file": "plain.safetensors", "folder": "plain", "onnx": "plain.onnx"}
    given = {"run": finished, "checkpoint": finished / "checkpoint"}.get(source)
    if given is None:
        given = tmp_path / names[source]
        assert main(["export", str(finished), "--to", str(given)]) == 0
    assert predict(given, folder / "val", "--csv", tmp_path / "found.csv") == 0
    assert_as_in_the_run(rows_of(tmp_path / "found.csv"), finished, folder)


def test_workers_and_batches_do_not_change_predictions(finished, folder, tmp_path):
    for name, words in (("one", ["--batch-size", "7"]), ("two", ["--batch-size", "64"])):
        words += ["--csv", str(tmp_path / f"{name}.csv"), "--workers", "1" if name == "one" else "0"]
        assert main(["predict", str(finished), str(folder / "val"), *words]) == 0
    one, two = (rows_of(tmp_path / f"{name}.csv") for name in ("one", "two"))
    assert [row["predicted_class"] for row in one] == [row["predicted_class"] for row in two]
    assert [row["input"] for row in one] == [row["input"] for row in two]


def test_images_of_a_set_in_memory_are_prepared_as_in_the_run(tmp_path):
    run = train(recipe(tmp_path, "memory", epochs=1)).run
    images = read_bundled().eval_images[:40]
    for number, pixels in enumerate(images):
        Image.fromarray(np.squeeze(pixels)).save(tmp_path / f"{number:02}.png")
    assert predict(run, tmp_path / "*.png", "--csv", tmp_path / "found.csv") == 0
    for row, own in zip(rows_of(tmp_path / "found.csv"), predicted(run)[:40], strict=True):
        assert row["top5"] == own["top5"]
        assert float(row["probability"]) == pytest.approx(float(own["probability"]), abs=1.01e-4)


def test_clouds_get_the_predictions_of_their_run(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 6)):
        for label, scale in (("flat", (1, 1, 0.1)), ("round", (1, 1, 1))):
            (tmp_path / "set" / split / label).mkdir(parents=True)
            for number in range(count):
                cloud = generator.normal(size=(100 + number, 3)) * scale
                np.save(tmp_path / "set" / split / label / f"{number}.npy", cloud)
    settings = {"model": None, "model_kwargs": CLOUD_MODEL, "num_points": 32, "batch_size": 4, "limit": None}
    run = train(recipe(tmp_path, "clouds", data=f"points:{tmp_path / 'set'}", epochs=1, **settings)).run
    places = [tmp_path / "set" / "val" / label for label in ("flat", "round")]
    words = ["--csv", tmp_path / "found.csv", "--sheet", tmp_path / "sheet.png", "--batch-size", "4"]
    assert predict(run, *places, *words) == 0
    names = ("prediction", "predicted_class", "top5")
    found, own = rows_of(tmp_path / "found.csv"), predicted(run)
    assert [[row[name] for name in names] for row in found] == [[row[name] for name in names] for row in own]
    for one, other in zip(found, own, strict=True):
        assert float(one["probability"]) == pytest.approx(float(other["probability"]), abs=1.01e-4)
    with Image.open(tmp_path / "sheet.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**20)) > 20
    np.save(places[0] / "0.npy", np.full((100, 3), np.inf))
    with pytest.raises(EwavitError, match=r"0\.npy has coordinates that are not finite"):
        ewavit.predict(run, places)
    assert len(ewavit.predict(run, places, skip_bad_images=True)) == len(own) - 1


def test_the_order_is_that_of_the_words_and_files_may_repeat(finished, folder, tmp_path):
    for name in ("b.png", "a.png", "[1].png", "deep/c.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "val" / "stripes, 1" / "1.png", tmp_path / name)
    given = [
        tmp_path / "b.png",
        tmp_path / "?.png",
        tmp_path / "[1].png",
        tmp_path / "deep",
        tmp_path / "b.png",
    ]
    found = [Path(row["input"]).name for row in ewavit.predict(finished, given)]
    assert found == ["b.png", "a.png", "b.png", "[1].png", "c.PNG", "b.png"]


def test_json_has_the_classes_with_their_probabilities(finished, folder, capsys):
    assert predict(finished, folder / "val" / "stripes, 0", "--topk", 2, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["skipped"] == []
    assert said["images"] == ewavit.predict(finished, folder / "val" / "stripes, 0", topk=2)
    for row in said["images"]:
        assert row["top2"][0] == row["predicted_class"]
        assert row["top2_probabilities"] == sorted(row["top2_probabilities"], reverse=True)
        assert row["top2_probabilities"][0] == row["probability"]


def test_without_a_file_each_input_has_one_line(finished, folder, tmp_path, capsys):
    shutil.copy(folder / "val" / "stripes, 1" / "1.png", tmp_path / "new\nline.png")
    shutil.copy(folder / "val" / "stripes, 1" / "1.png", tmp_path / "plain.png")
    assert predict(finished, tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{tmp_path}/new\\nline.png  ")
    assert sorted(part.partition(" % ")[2] for part in lines[1].split("; ")) == [
        "stripes, 0", "stripes, 1", "stripes, 2",
    ]  # fmt: skip


def test_no_cell_is_a_formula(finished, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "val" / "stripes, 1" / "1.png", "=cmd.png")
    assert predict(finished, "=cmd.png", "--csv", "found.csv") == 0
    assert rows_of(Path("found.csv"))[0]["input"] == "'=cmd.png"


@pytest.fixture
def with_bad(folder, tmp_path):
    place = tmp_path / "images"
    place.mkdir()
    for number in range(5):
        shutil.copy(folder / "val" / "stripes, 1" / f"{1 + 3 * number}.png", place / f"{number}.png")
    (place / "3.png").write_bytes(b"no image")
    return place


def test_a_bad_image_is_named_and_nothing_is_written(finished, with_bad, tmp_path, capsys):
    (tmp_path / "found.csv").write_text("kept")
    words = ["--csv", tmp_path / "found.csv", "--sheet", tmp_path / "sheet.png"]
    assert predict(finished, with_bad, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ewavit: cannot read {with_bad / '3.png'} (")
    assert len(said.splitlines()) == 1
    assert (tmp_path / "found.csv").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.csv", "images"]


@pytest.mark.parametrize("size", [1, 2, 128])
def test_bad_images_are_left_out_and_named_when_asked(finished, with_bad, capsys, size):
    shutil.copy(with_bad / "3.png", with_bad / "2.png")
    assert predict(finished, with_bad, "--skip-bad-images", "--json", "--batch-size", size) == 0
    found = capsys.readouterr()
    said = json.loads(found.out)
    assert [Path(row["input"]).name for row in said["images"]] == ["0.png", "1.png", "4.png"]
    assert [Path(row["input"]).name for row in said["skipped"]] == ["2.png", "3.png"]
    assert "2.png" in found.err
    assert "3.png" in found.err
    for name in ("0.png", "1.png", "4.png"):
        (with_bad / name).unlink()
    assert predict(finished, with_bad, "--skip-bad-images") == 2
    assert "none of the 2 images can be read" in capsys.readouterr().err


def test_no_file_gets_its_name_before_all_are_written(finished, with_bad, tmp_path, monkeypatch):
    def fail(found, path):
        raise OSError("the disk is full")

    monkeypatch.setattr(ClassInference, "draw", fail)
    words = ["--csv", tmp_path / "found.csv", "--sheet", tmp_path / "sheet.png", "--skip-bad-images"]
    assert predict(finished, with_bad, *words) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_contact_sheet_shows_the_first_inputs(finished, folder, tmp_path, capsys):
    assert predict(finished, folder / "val", "--sheet", tmp_path / "sheet.png") == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'sheet.png'}: the first 60 of 90 images\n"
    with Image.open(tmp_path / "sheet.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**20)) > 20


def test_a_task_writes_a_file_for_each_input_into_a_new_folder(finished, with_bad, tmp_path, monkeypatch):
    class Written(ClassInference):
        has_files = True

        def update(self, numbers, inputs, outputs):
            super().update(numbers, inputs, outputs)
            for number in numbers:
                (self.options.folder / f"{Path(self.files.names[number]).stem}.txt").write_text("x")

    to = tmp_path / "masks"
    assert predict(finished, with_bad, "--to", to, "--skip-bad-images") == 2  # a classification has no files
    monkeypatch.setattr(Classification, "inference", lambda task, files, options: Written(files, options))
    assert predict(finished, with_bad, "--to", to, "--batch-size", 2) == 2
    assert not to.exists()
    assert predict(finished, with_bad, "--to", to, "--skip-bad-images") == 0
    assert sorted(path.name for path in to.iterdir()) == ["0.txt", "1.txt", "2.txt", "4.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "masks"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-"], "standard input"),
        (["missing.png"], "no file or folder missing.png"),
        (["*.gif"], r"no file fits \*.gif"),
        (["."], ""),
        (["0.png", "--topk", "0"], "--topk 0"),
        (["0.png", "--csv", "found.txt"], "ends in .csv"),
        (["0.png", "--csv", "missing/found.csv"], "existing folder"),
        (["0.png", "--sheet", "sheet.jpg"], "ends in .png"),
        (["0.png", "--sheet", "0.png"], "0.png is one of the inputs"),
        (["0.png", "--to", "masks"], "no file for each input"),
        (["0.png", "--to", "."], "new folder"),
        (["0.png", "--batch-size", "0"], "batch_size 0"),
        ([], "INPUTS"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_one_line(finished, folder, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    if words == ["."]:
        (tmp_path / "3.txt.orig").touch()
        said = "has no images, but 1 file of other formats"
    else:
        shutil.copy(folder / "val" / "stripes, 1" / "1.png", "0.png")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert predict(finished, *words) == 2
    found = capsys.readouterr().err
    assert len(found.splitlines()) == 1
    assert said.replace("\\", "") in found
    assert sorted(path.name for path in tmp_path.iterdir()) == before
