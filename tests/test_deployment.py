"""What a run leaves for other tools: timm, torchvision and transformers prepare images as the run did."""

import copy
import csv
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.nn.utils import prune
from torchvision.datasets import ImageFolder

import ewavit
from ewavit.cli import main
from ewavit.compare.reading import read_run
from ewavit.core import moe_layers
from ewavit.core.pretrained import with_mean_ffns
from ewavit.data.arrays import read_bundled
from ewavit.errors import EwavitError
from ewavit.tasks.confusion import Confusion
from ewavit.tasks.judge import TOP1
from ewavit.training.export import evaluate, export, load_model
from ewavit.training.loop import resume, train
from ewavit.training.opening import open_recipe_data
from ewavit.training.processes import Interrupted
from ewavit.training.recipe import Recipe
from ewavit.training.run_folder import RunFolder
from runs import TINY, recipe, stop_after
from stripes import MODEL, predicted, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("stripes"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder):
    settings = {**TINY, **MODEL, "data": str(folder), "epochs": 3, "limit": None, "workers": 0}
    return train(recipe(tmp_path_factory.mktemp("runs"), "folder", **settings))


def accuracy(model, transform, images) -> float:
    with torch.no_grad():
        right = [model(transform(image)[None]).argmax().item() == label for image, label in images]
    return 100 * sum(right) / len(right)


def timm_transform(model):
    return create_transform(**resolve_model_data_config(model))


def in_pil_mode(images, mode):
    return [(image.convert(mode), label) for image, label in images]


def test_plain_timm_loads_the_folder_of_a_run_and_finds_its_accuracy(finished, folder):
    code = f"""
import sys, timm, torch
from timm.data import create_transform, resolve_model_data_config
from torch.nn.utils import prune
from torchvision.datasets import ImageFolder
model = timm.create_model("local-dir:" + {str(finished.run)!r}, pretrained=True).eval()
transform = create_transform(**resolve_model_data_config(model))
images = ImageFolder({str(folder / "val")!r}, transform)
with torch.no_grad():
    right = sum(int(model(image[None]).argmax() == label) for image, label in images)
print(100 * right / len(images))
assert "ewavit" not in sys.modules
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(said) == pytest.approx(finished.row["eval_top1"], abs=1e-3)
    assert 34 < finished.row["eval_top1"] < 100  # so that the preprocessing matters


def test_the_accuracy_hangs_on_the_preprocessing(finished, folder):
    images = in_pil_mode(ImageFolder(folder / "val"), "RGB")
    model, card = load_model(finished.run)
    others = [{"crop_pct": 0.3}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}]
    for other in others:
        found = accuracy(model, create_transform(**{**card.pretrained_cfg, **other}), images)
        assert found != pytest.approx(finished.row["eval_top1"], abs=1e-3), other


def test_a_run_of_images_of_one_channel_is_prepared_by_timm_as_in_the_run(tmp_path):
    data = write_folder(tmp_path / "grey", mode="L")
    settings = {**TINY, **MODEL, "data": str(data), "limit": None, "workers": 0}
    done = train(recipe(tmp_path, "grey", **settings))
    model = timm.create_model(f"local-dir:{done.run}", pretrained=True).eval()
    images = in_pil_mode(ImageFolder(data / "val"), "L")
    assert accuracy(model, timm_transform(model), images) == pytest.approx(done.row["eval_top1"], abs=1e-3)


def test_images_of_the_models_size_are_evaluated_as_stored_by_timm_too(tmp_path):
    data = write_folder(tmp_path / "small", sizes=((32, 32),), val_images=30)
    settings = {**TINY, **MODEL, "img_size": None, "data": str(data), "limit": None, "workers": 0}
    done = train(recipe(tmp_path, "small", **settings))
    model = timm.create_model(f"local-dir:{done.run}", pretrained=True).eval()
    config = resolve_model_data_config(model)
    assert (config["input_size"], config["crop_pct"]) == ((3, 32, 32), 1.0)
    images = in_pil_mode(ImageFolder(data / "val"), "RGB")
    assert accuracy(model, timm_transform(model), images) == pytest.approx(done.row["eval_top1"], abs=1e-3)


def test_a_run_of_a_set_in_memory_is_prepared_by_timm_as_in_the_run(tmp_path):
    done = train(recipe(tmp_path, "memory"))
    model = timm.create_model(f"local-dir:{done.run}", pretrained=True).eval()
    arrays = read_bundled()
    images = zip(map(Image.fromarray, arrays.eval_images[:, 0]), arrays.eval_labels.tolist(), strict=True)
    assert accuracy(model, timm_transform(model), list(images)) == pytest.approx(
        done.row["eval_top1"], abs=1e-3
    )


def names_of(code):
    names: dict = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("to", ["plain.safetensors", "plain"])
def test_the_printed_lines_of_a_run_and_of_an_exported_file_find_the_accuracy(finished, folder, tmp_path, to):
    images = in_pil_mode(ImageFolder(folder / "val"), "RGB")
    _, card = load_model(finished.run)
    said = export(finished.run, tmp_path / to)
    file = tmp_path / "plain/model.safetensors" if to == "plain" else tmp_path / to
    exported = said.split("load it with\n\n")[1].split("\n\nand give it")[0]
    assert exported == card.loading_code(file)
    assert "local-dir" in card.loading_code(finished.model_file)
    for code in (card.loading_code(finished.model_file), exported):
        names = names_of(code)
        model = names["model"]
        for transform in (names["transform"], timm_transform(model)):
            found = accuracy(model, transform, images)
            assert found == pytest.approx(finished.row["eval_top1"], abs=1e-3)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_the_printed_transform_is_that_of_timm(finished, folder, crop_mode, interpolation):
    _, card = load_model(finished.run)
    card = replace(card, crop_mode=crop_mode, interpolation=interpolation, crop_pct=0.9)
    printed = names_of(card.loading_code(finished.model_file))["transform"]
    ours = create_transform(**card.pretrained_cfg)
    for image, _ in in_pil_mode(list(ImageFolder(folder / "val"))[:5], "RGB"):
        assert torch.equal(printed(image), ours(image))


def test_transformers_prepares_images_from_the_folder_of_a_run(finished, folder):
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(finished.run)
    model = transformers.AutoModelForImageClassification.from_pretrained(finished.run).eval()
    assert set(model.config.id2label.values()) == {"stripes, 0", "stripes, 1", "stripes, 2"}
    plain = timm.create_model(f"local-dir:{finished.run}", pretrained=True).eval()
    image = in_pil_mode(ImageFolder(folder / "val"), "RGB")[1][0]
    pixels = processor(image)["pixel_values"]
    assert torch.equal(pixels[0], timm_transform(plain)(image))
    with torch.no_grad():
        assert torch.allclose(model(pixels).logits, plain(pixels), atol=1e-6)


def test_a_loaded_model_knows_its_preprocessing(finished):
    model = ewavit.load(finished.run)
    assert resolve_model_data_config(model)["crop_pct"] == 0.875
    assert resolve_model_data_config(model)["input_size"] == (3, 32, 32)


def test_the_metadata_of_a_file_has_timms_pretrained_cfg(finished):
    with safe_open(finished.model_file, "pt") as file:
        found = json.loads(file.metadata()["pretrained_cfg"])
    assert found.keys() == {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}


def test_evaluation_prepares_other_images_as_the_run_did(finished, tmp_path):
    """Images of the model's size would be taken as stored in a run of their own."""
    data = write_folder(tmp_path / "small", sizes=((32, 32),), val_images=30)
    images = in_pil_mode(ImageFolder(data / "val"), "RGB")
    model = timm.create_model(f"local-dir:{finished.run}", pretrained=True).eval()
    found = evaluate(finished.run, str(data), workers=0)
    assert found["top1"] == pytest.approx(accuracy(model, timm_transform(model), images), abs=1e-3)


def test_a_file_of_an_older_version_is_still_evaluated(finished, tmp_path):
    from ewavit.training.card import ModelCard
    from ewavit.training.checkpoint import save_tensors

    model, card = load_model(finished.run)
    old = {k: v for k, v in asdict(card).items() if k not in ("interpolation", "crop_pct", "crop_mode")}
    assert ModelCard.from_dict(old).pretrained_cfg == {}
    file = tmp_path / "old.safetensors"
    save_tensors(model.state_dict(), file, {"ewavit": json.dumps(old)})
    assert evaluate(file, workers=0)["top1"] == pytest.approx(finished.row["eval_top1"], abs=1e-3)
    assert "T.Compose" not in ModelCard.from_dict(old).loading_code(file)


def test_a_folder_is_exported_whole_or_not_at_all(finished, tmp_path, monkeypatch):
    to = tmp_path / "plain"
    with monkeypatch.context() as patch:
        patch.setattr("ewavit.training.export.LARGEST_DIFFERENCE", -1.0)
        with pytest.raises(EwavitError, match="differ"):
            export(finished.run, to)
    assert list(tmp_path.iterdir()) == []
    export(finished.run, to)
    assert sorted(file.name for file in to.iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(EwavitError, match="exists already"):
        export(finished.run, to)


def test_predictions_name_the_file_and_the_classes(finished, folder):
    rows = predicted(finished.run)
    images = ImageFolder(folder / "val")
    assert len(rows) == len(images)
    model, _ = load_model(finished.run)
    transform = timm_transform(model)
    for row in rows:
        path = folder / row["input"]
        assert path.parent.name == row["class"] == images.classes[int(row["label"])]
        logits = model(transform(Image.open(path))[None])[0].detach()
        assert images.classes[int(logits.argmax())] == row["predicted_class"]
        assert float(row["probability"]) == pytest.approx(float(logits.softmax(0).max()), abs=1e-4)
        top = [images.classes[label] for label in logits.argsort(descending=True)]
        assert row["top5"].split("|") == top


def test_a_comparison_reads_predictions_of_classes_with_commas_and_spaces(finished):
    read = read_run(RunFolder(finished.run), 0, TOP1)
    assert read.labels.tolist() == [int(row["label"]) for row in predicted(finished.run)]
    assert 100 * (read.labels == read.predictions).mean() == pytest.approx(
        finished.row["eval_top1"], abs=1e-3
    )


def test_predictions_leave_out_skipped_images_and_name_the_others(tmp_path):
    data = write_folder(tmp_path / "data", train_images=48, val_images=15)
    broken = sorted((data / "val").rglob("*.png"))[4]
    broken.write_bytes(b"no image")
    settings = {**TINY, **MODEL, "data": str(data), "limit": None, "workers": 0, "epochs": 1}
    done = train(recipe(tmp_path, "skipping", skip_bad_images=True, **settings))
    names = [row["input"] for row in predicted(done.run)]
    assert len(names) == 14
    assert str(broken.relative_to(data)) not in names
    assert all(Path(row["input"]).parent.name == row["class"] for row in predicted(done.run))


def test_predictions_of_held_out_images_name_them(tmp_path):
    data = write_folder(tmp_path / "data", train_images=60, val_images=15)
    settings = {**TINY, **MODEL, "data": str(data), "limit": None, "workers": 0, "epochs": 1}
    done = train(recipe(tmp_path, "held", holdout=0.25, **settings))
    names = [row["input"] for row in predicted(done.run)]
    assert len(names) == 15
    assert all(name.startswith("train/") and (data / name).is_file() for name in names)


def test_the_confusion_matrix_counts_the_predictions(finished, tmp_path, capsys):
    file = tmp_path / "confusion.csv"
    assert main(["evaluate", str(finished.run), "--workers", "0", "--confusion", str(file)]) == 0
    rows = list(csv.reader(file.open(newline="")))
    classes = rows[0][1:]
    counts = np.zeros((3, 3), int)
    for row in predicted(finished.run):
        counts[int(row["label"]), int(row["prediction"])] += 1
    assert [row[0] for row in rows[1:]] == classes == ["stripes, 0", "stripes, 1", "stripes, 2"]
    assert np.array_equal(np.array([row[1:] for row in rows[1:]], int), counts)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**20)) > 20


def test_evaluate_per_class_agrees_with_the_predictions(finished, capsys):
    command = ["evaluate", str(finished.run), "--workers", "0", "--per-class"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = predicted(finished.run)
    assert found["top1"] == pytest.approx(finished.row["eval_top1"], abs=1e-3)
    for row in found["classes"]:
        of_class = [each for each in rows if each["class"] == row["class"]]
        said_so = [each for each in rows if each["predicted_class"] == row["class"]]
        right = sum(each["predicted_class"] == row["class"] for each in of_class)
        assert row["images"] == len(of_class)
        assert row["recall"] == pytest.approx(100 * right / len(of_class), abs=1e-3)
        if said_so:
            assert row["precision"] == pytest.approx(100 * right / len(said_so), abs=1e-3)
        assert f"{row['recall']:.2f} %" in text
        mistakes = Counter(
            each["predicted_class"] for each in of_class if each["predicted_class"] != row["class"]
        )
        assert row["times"] == max(mistakes.values(), default=0) == mistakes[row["mistaken_for"]]


def test_a_class_without_inputs_has_no_recall():
    found = Confusion(("a", "b", "c"), np.array([[2, 0, 0], [0, 0, 0], [1, 0, 0]]), "images")
    rows = found.per_class()
    assert [row["recall"] for row in rows] == [100, None, 0]
    assert [row["precision"] for row in rows] == [pytest.approx(66.6667), None, None]
    assert [row["mistaken_for"] for row in rows] == [None, None, "a"]
    assert len(found.table().splitlines()) == 4


@pytest.mark.parametrize("to", ["confusion.txt", "missing/confusion.csv"])
def test_a_confusion_matrix_that_cannot_be_written_is_refused_first(finished, tmp_path, capsys, to):
    assert main(["evaluate", str(finished.run), "--confusion", str(tmp_path / to)]) == 2
    assert ".csv" in capsys.readouterr().err


# What a run takes from the weights that it starts from.

AUGREG = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "crop_pct": 0.9}
IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "crop_pct": 0.875}


def prepared(**settings):
    """How a recipe's images are prepared, under the names of its flags."""
    data = open_recipe_data(Recipe(workers=0, **settings))
    return {"mean": data.mean, "std": data.std, **asdict(data.resizing)}


@pytest.mark.parametrize("model", [None, "vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k"])
def test_a_pretrained_model_gets_images_as_in_its_pretraining(folder, model):
    found = prepared(data=str(folder), model=model, pretrained=True)
    assert found == {**AUGREG, "crop_mode": "center"}
    assert IMAGENET.items() <= prepared(data=str(folder), model=model).items()


def test_other_models_get_what_timm_knows_of_them(folder):
    found = prepared(data=str(folder), model="deit_tiny_patch16_224", pretrained=True)
    assert (found["mean"], found["crop_pct"]) == (IMAGENET_DEFAULT_MEAN, 0.9)


def test_a_foreign_checkpoint_gets_images_as_timm_knows_them_of_the_model(folder, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict(), file)
    found = prepared(data=str(folder), initial_checkpoint=str(file))
    assert AUGREG.items() <= found.items()


def test_flags_come_before_what_the_first_weights_say(folder):
    given = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "box", "crop_pct": 0.6}
    assert given.items() <= prepared(data=str(folder), pretrained=True, **given).items()
    assert prepared(data=str(folder), crop_pct=0.6)["crop_pct"] == 0.6
    assert prepared(data=str(folder), mean=(0.5,), std=(0.2,))["std"] == (0.2, 0.2, 0.2)


def test_images_of_one_channel_get_the_mean_of_the_pretrained_channels(tmp_path):
    grey = write_folder(tmp_path / "grey", mode="L", train_images=6, val_images=6)
    found = prepared(data=str(grey), model="deit_tiny_patch16_224", pretrained=True)
    assert found["mean"] == pytest.approx((sum(IMAGENET_DEFAULT_MEAN) / 3,))


def test_images_in_memory_are_normalised_as_in_the_pretraining():
    assert prepared(pretrained=True)["mean"] == (0.5,)
    assert prepared()["mean"] == pytest.approx((0.286,), abs=2e-3)


def test_a_fine_tuned_run_prepares_images_as_its_source_and_goes_on_without_the_file(
    finished, tmp_path, monkeypatch
):
    data = write_folder(tmp_path / "grey", mode="L", train_images=96, val_images=30)
    shared = {**TINY, **MODEL, "data": str(data), "limit": None, "workers": 0}
    source = train(recipe(tmp_path, "source", mean=(0.3,), std=(0.1,), crop_pct=0.7, **shared))
    settings = {**shared, "initial_checkpoint": str(source.model_file)}
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, "tuned", **settings))
    source.model_file.unlink()
    done = resume(tmp_path / "tuned")
    _, card = load_model(done.run)
    assert (card.mean, card.std, card.crop_pct) == ((0.3,), (0.1,), 0.7)
    model = timm.create_model(f"local-dir:{done.run}", pretrained=True).eval()
    images = in_pil_mode(ImageFolder(data / "val"), "L")
    assert accuracy(model, timm_transform(model), images) == pytest.approx(done.row["eval_top1"], abs=1e-3)


def first_batch(folder, **settings):
    data = open_recipe_data(Recipe(data=str(folder), workers=0, batch_size=8, **settings))
    return next(data.train_batches(0))[0]


@pytest.mark.parametrize(
    "settings", [{"scale": (0.5, 0.6)}, {"ratio": (1.0, 1.0)}, {"color_jitter": 0.0}], ids=str
)
def test_scale_ratio_and_colour_jitter_change_the_training_images(folder, settings):
    usual = first_batch(folder)
    assert torch.equal(usual, first_batch(folder, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3], color_jitter=0.4))
    assert not torch.equal(usual, first_batch(folder, **settings))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mean", "0.5"], "belong together"),
        (["--mean", "0.5", "0.5", "--std", "1", "1"], "3 channels"),
        (["--mean", "2", "--std", "1"], "--mean .* out of range"),
        (["--scale", "0.5"], "--scale 0.5 is not a range"),
        (["--scale", "1", "0.5"], "--scale 1.0 0.5 is not a range"),
        (["--ratio", "0", "1"], "--ratio .* out of range"),
        (["--color-jitter", "-1"], "--color-jitter"),
        (["--crop-pct", "0"], "--crop-pct"),
        (["--interpolation", "cubic"], "interpolation"),
    ],
)
def test_preprocessing_that_cannot_work_is_refused(folder, tmp_path, capsys, words, said):
    assert main(["train", "--data", str(folder), "--workers", "0", "--output", str(tmp_path), *words]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_settings_with_several_values_come_from_words_and_from_yaml(folder, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("mean: [0.1, 0.2, 0.3]\nstd: [0.2, 0.2, 0.2]\nscale: [0.3, 0.9]\n")
    words = ["--config", str(file), "--ratio", "0.9", "1.1", "--epochs", "1", "--output", str(tmp_path)]
    model = ["--model-kwargs", MODEL["model_kwargs"], "--img-size", "32", "--batch-size", "32"]
    data = ["--data", str(folder), "--workers", "0", "--name", "run"]
    assert main(["train", *words, *model, *data]) == 0
    saved = Recipe.from_dict(yaml.safe_load((tmp_path / "run" / "args.yaml").read_text()), "args.yaml")
    assert (saved.mean, saved.scale, saved.ratio) == ((0.1, 0.2, 0.3), (0.3, 0.9), (0.9, 1.1))
    _, card = load_model(tmp_path / "run")
    assert card.mean == (0.1, 0.2, 0.3)


def test_point_clouds_have_no_preprocessing_of_images():
    with pytest.raises(EwavitError, match="mean is for images"):
        open_recipe_data(Recipe(data="solids", mean=(0.5,), std=(0.5,)))


# Graphs: ONNX and torch.export.


def graph_of(file):
    """What maps images to logits by a graph, without ewavit."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.fixture(scope="module")
def resizable(tmp_path_factory, folder):
    kwargs = "patch_size=8,embed_dim=32,depth=2,num_heads=2,dynamic_img_size=True"
    settings = {**TINY, **MODEL, "data": str(folder), "epochs": 1, "limit": None, "workers": 0}
    return train(recipe(tmp_path_factory.mktemp("runs"), "any", **{**settings, "model_kwargs": kwargs}))


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_graph_computes_batches_and_images_of_any_size_where_the_model_does(resizable, tmp_path, ending):
    export(resizable.run, tmp_path / f"plain.{ending}")
    graph, model = graph_of(tmp_path / f"plain.{ending}"), ewavit.load(resizable.run)
    for shape in ((1, 3, 32, 32), (5, 3, 32, 32), (2, 3, 48, 64)):
        images = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(graph(images), model(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_graph_has_any_batch_size_and_no_path_of_the_machine(finished, tmp_path, ending):
    file = tmp_path / f"plain.{ending}"
    export(finished.run, file)
    graph, model = graph_of(file), ewavit.load(finished.run)
    with torch.no_grad():
        for batch in (1, 7):
            images = torch.randn(batch, 3, 32, 32)
            torch.testing.assert_close(graph(images), model(images), atol=1e-4, rtol=1e-4)
    with pytest.raises(Exception, match=r"32|shape|dimension"):
        graph(torch.randn(2, 3, 48, 48))
    text = file.read_bytes()
    for place in (timm.__file__, torch.__file__, str(finished.run), str(Path.cwd())):
        assert str(Path(place).parent).encode() not in text
    if ending == "pt2":
        said = {"ewavit": "", "pretrained_cfg": ""}
        torch.export.load(file, extra_files=said)
        assert json.loads(said["ewavit"])["classes"] == ["stripes, 0", "stripes, 1", "stripes, 2"]
        assert json.loads(said["pretrained_cfg"])["crop_pct"] == 0.875


# Expanded models in the hands of transformers, torch.fx and TorchScript.


def tiny_transformer():
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**size, image_size=32, patch_size=8, num_labels=3)
    return transformers.ViTForImageClassification(config).eval()


def with_different_experts(model, **options):
    ewavit.expand(model, 3, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("experts", ["stacked", "separate"])
@pytest.mark.parametrize("for_trainer", [False, True])
def test_save_pretrained_of_an_expanded_model_publishes_the_mean_experts(tmp_path, experts, for_trainer):
    model = with_different_experts(tiny_transformer(), experts=experts)
    file = tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path, **({"state_dict": None} if for_trainer else {}))
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert bool(report["unexpected_keys"]) == for_trainer  # the experts, for the Trainer to resume
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.eval()(images).logits, model(images).logits)
    if for_trainer:
        # transformers writes the layers of a ViT under other names than it has in memory.
        held = {key.rpartition("mlp.")[2]: value for key, value in load_file(file).items()}
        kept = {key: value for key, value in model.state_dict().items() if "experts" in key}
        assert kept
        assert all(torch.equal(held[key.rpartition("mlp.")[2]], value) for key, value in kept.items())


def test_save_pretrained_works_on_copies_and_parts_and_as_before_after_collapse(tmp_path):
    model = with_different_experts(tiny_transformer())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    copied.save_pretrained(tmp_path / "copy")
    assert all(not value.any() for value in load_file(tmp_path / "copy/model.safetensors").values())
    model.vit.save_pretrained(tmp_path / "part")
    _, report = type(model.vit).from_pretrained(tmp_path / "part", output_loading_info=True)
    assert report["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}  # a classifier has none
    assert not report["unexpected_keys"]
    ewavit.collapse(model)
    assert not any("save_pretrained" in vars(module) for module in model.modules())
    model.save_pretrained(tmp_path / "collapsed")
    loaded, report = type(model).from_pretrained(tmp_path / "collapsed", output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(images).logits, model(images).logits)


@pytest.mark.parametrize("experts", ["stacked", "separate"])
def test_a_trainers_checkpoint_is_collapsed_file_to_file(tmp_path, experts):
    model = with_different_experts(tiny_transformer(), experts=experts)
    both = with_mean_ffns(model, model.state_dict(), keep_experts=True)
    assert len(both) == len(model.state_dict()) + 4
    save_file(both, tmp_path / "both.safetensors")
    ewavit.collapse_checkpoint(tmp_path / "both.safetensors", tmp_path / "plain.safetensors")
    found, plain = load_file(tmp_path / "plain.safetensors"), ewavit.dense_state_dict(model)
    assert found.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(found[key], value)
        torch.testing.assert_close(both[key], value)


def test_save_pretrained_takes_a_dense_state_dict_as_it_is(tmp_path):
    model = with_different_experts(tiny_transformer())
    model.save_pretrained(tmp_path, state_dict=ewavit.dense_state_dict(model))
    _, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]


@pytest.mark.parametrize("experts", ["stacked", "separate"])
def test_save_pretrained_refuses_experts_that_were_pruned_since_expand(tmp_path, experts):
    model = with_different_experts(tiny_transformer(), experts=experts)
    for moe in moe_layers(model).values():
        for ffn in moe.experts.ffns():
            prune.l1_unstructured(ffn.fc1, "weight", 0.5)
    with pytest.raises(EwavitError, match=r"pruned .*collapse\(copy"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        output = model(images).logits
        ewavit.collapse(model).save_pretrained(tmp_path)
        torch.testing.assert_close(type(model).from_pretrained(tmp_path).eval()(images).logits, output)


def test_save_pretrained_of_a_routed_mixture_is_refused(tmp_path):
    model = ewavit.expand(tiny_transformer(), 3, router=ewavit.TopK())
    with pytest.raises(EwavitError, match="routed mixture"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    ("tool", "name"), [(torch.fx.symbolic_trace, "fx"), (torch.jit.script, "TorchScript")]
)
def test_fx_and_torchscript_refuse_an_expanded_model_and_take_a_collapsed_one(tool, name, mode):
    settings = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
    model = with_different_experts(timm.create_model("vit_tiny_patch16_224", **settings)).train(mode)
    with pytest.raises(EwavitError, match=f"{name} cannot .* ewavit.collapse"):
        tool(model)
    plain = ewavit.collapse(model).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(tool(plain)(images), plain(images))
