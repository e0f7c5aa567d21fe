"""Semantic segmentation: data, model, metrics and runs, through the same loop as classification."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from ewavit import EwavitError
from ewavit.cli import main
from ewavit.compare.reading import read_run
from ewavit.data.augmentation import Augmentation
from ewavit.data.batches import ImageInputs
from ewavit.data.masks import IGNORED, MaskData
from ewavit.data.options import DataOptions
from ewavit.data.relabelled import with_classes
from ewavit.data.shapes import CLASSES, make_shapes
from ewavit.tasks.choice import TASKS, task_for
from ewavit.tasks.segmentation import PixelMeter, Segmentation
from ewavit.training.card import ModelCard
from ewavit.training.export import evaluate, export, load_model
from ewavit.training.loop import resume, train
from ewavit.training.opening import open_data
from ewavit.training.processes import Interrupted
from ewavit.training.recipe import BUNDLED, Recipe, choices
from ewavit.training.run_folder import RunFolder
from runs import assert_same_end, stop_after

SIDE = 16
VIT = "patch_size=4,embed_dim=16,depth=2,num_heads=2"
SWIN = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 2, "patch_size": 2}
TINY = {"task": "segmentation", "model": "vit_tiny_patch16_224", "model_kwargs": VIT, "experts": 2,
        "limit": 16, "batch_size": 8, "epochs": 2, "warmup_epochs": 1}  # fmt: skip
PLAIN = Augmentation(hflip=0, scale=(1, 1), ratio=(1, 1), color_jitter=0)


def write_pair(images: Path, masks: Path, name: str, mask: np.ndarray, suffix: str = ".png") -> None:
    """A mask, and an image whose grey values are 50 times the classes."""
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    grey = np.repeat((mask % 255 * 50 % 256).astype(np.uint8)[..., None], 3, -1)
    Image.fromarray(grey).save(images / f"{name}{suffix}")
    stored = Image.fromarray(mask.astype(np.uint8), "P")
    stored.putpalette(list(range(256)) * 3)
    stored.save(masks / f"{name}.png")


def quarters(*values: int) -> np.ndarray:
    """A mask with one value in each quarter."""
    return np.array(values).reshape(2, 2).repeat(SIDE // 2, 0).repeat(SIDE // 2, 1)


def write_folder(root: Path, splits: tuple[str, ...] = ("train", "val")) -> Path:
    for split in splits:
        for number in range(6):
            mask = quarters(number % 3, 1, 2, 255)
            write_pair(root / "images" / split, root / "masks" / split, f"image{number}", mask)
    return root


def open_masks(path: Path, **options: object) -> MaskData:
    data = open_data(str(path), DataOptions(**{"batch_size": 2, "workers": 0, **options}), "segmentation")
    assert isinstance(data, MaskData)
    return data


def recipe(tmp_path: Path, name: str, **settings: object) -> Recipe:
    return Recipe(**{**TINY, **settings}, output=str(tmp_path), name=name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(recipe(tmp_path_factory.mktemp("runs"), "finished"))


# --- the name of a task ---


def test_every_task_of_a_recipe_is_in_the_table_and_has_bundled_data():
    names = {task.name for tasks in TASKS.values() for task in tasks}
    assert names == set(choices("task")) == set(BUNDLED)
    for name in names:
        assert task_for(Recipe(task=name).data, name).name == name


def test_data_and_task_have_defaults_of_each_other():
    assert Recipe().data == "fashion-mnist-mini"
    assert Recipe(task="segmentation").data == "shapes"
    assert task_for("shapes").name == "segmentation"
    assert task_for("a/folder").name == "classification"
    assert task_for("a/folder", "segmentation").name == "segmentation"


def test_data_of_another_kind_than_the_task_needs_are_refused_in_one_line(tmp_path, capsys):
    assert main(["train", "--task", "segmentation", "--data", "solids", "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err.strip()
    assert "--task segmentation does not go with 'solids' (clouds)" in said
    assert "\n" not in said
    assert not list(tmp_path.iterdir())


def test_a_card_without_a_task_has_the_default_of_its_data_and_others_keep_theirs(finished):
    _, card = load_model(finished.run)
    assert card.task_name == "segmentation"
    with_folder = ModelCard(card.model, {}, ("a", "b"), 3, 32, (0.5,), (0.5,), "somewhere")
    assert with_folder.task.name == "classification"
    assert (
        ModelCard.from_dict({**with_folder.__dict__, "task_name": "segmentation"}).task.name == "segmentation"
    )
    with pytest.raises(EwavitError, match="task_name"):
        ModelCard.from_dict({**with_folder.__dict__, "task_name": "detection"})


# --- data ---


def test_generated_shapes_are_the_same_every_time_and_have_every_class():
    first, second = make_shapes(), make_shapes()
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    images, masks, *_ = first
    assert images.shape[:3] == masks.shape
    assert set(np.unique(masks)) == set(range(len(CLASSES)))
    quiet = [images[number][masks[number] == 0].std(0).mean() for number in range(20)]
    assert max(quiet) < 40  # within a mask's background lies one colour and noise, so masks are exact


@pytest.mark.parametrize("augmentation", [Augmentation(scale=(0.3, 1.0), color_jitter=0), PLAIN])
def test_image_and_mask_are_transformed_alike(tmp_path, augmentation):
    """The grey value of a pixel is the class of the pixel, before and after cropping and flipping."""
    data = open_masks(write_folder(tmp_path), augmentation=augmentation, mean=(0,), std=(1,), batch_size=6)
    for batches in (data.train_batches(0), data.eval_batches()):
        images, masks = next(iter(batches))
        grey = (images * 255 / 50).round().mean(1)
        known = masks != IGNORED
        assert known.any()
        assert (grey == masks)[known].float().mean() > 0.75  # interpolation mixes greys at borders
        inner = F.max_pool2d(masks.float()[:, None], 3, 1, 1) == -F.max_pool2d(
            -masks.float()[:, None], 3, 1, 1
        )
        sure = inner[:, 0] & known
        if augmentation is PLAIN:
            assert torch.equal(grey[sure], masks[sure].float())


def test_a_batch_depends_on_seed_epoch_and_number_alone(tmp_path):
    folder = write_folder(tmp_path)
    whole = list(open_masks(folder, seed=3).train_batches(1))
    torch.manual_seed(7)
    resumed = list(open_masks(folder, seed=3, workers=1).train_batches(1, start=1))
    for one, other in zip(whole[1:], resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(whole[0][0], next(open_masks(folder, seed=3).train_batches(0))[0])


def test_a_folder_is_split_by_train_and_val_or_by_holdout(tmp_path):
    data = open_masks(write_folder(tmp_path / "two"))
    assert (data.num_train, data.num_eval, data.classes) == (6, 6, ("0", "1", "2"))
    flat = open_masks(write_folder(tmp_path / "one", ("",)), holdout=0.5)
    assert (flat.num_train, flat.num_eval) == (3, 3)
    (tmp_path / "two" / "classes.txt").write_text("sky\nsea\nland\n")
    assert open_masks(tmp_path / "two").classes == ("sky", "sea", "land")


def test_pascal_voc_is_read_as_published(tmp_path):
    place = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("a", "b", "c"):
        mask = quarters(0, 20, 15, 255)
        write_pair(place / "JPEGImages", place / "SegmentationClass", name, mask, ".jpg")
    lists = place / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\n")
    data = open_masks(tmp_path)
    assert len(data.classes) == 21
    assert (data.num_train, data.num_eval) == (2, 1)
    assert "published are 1,464 and 1,449" in data.notes[0]
    _, masks = next(iter(data.eval_batches()))
    assert set(masks.unique().tolist()) == {0, 15, 20, IGNORED}


def test_ade20k_is_read_as_published_with_its_zero_not_labelled(tmp_path):
    for split in ("training", "validation"):
        write_pair(
            tmp_path / "images" / split, tmp_path / "annotations" / split, "a", quarters(0, 1, 150, 7), ".jpg"
        )
    data = open_masks(tmp_path, batch_size=1)
    assert len(data.classes) == 150
    assert "published are 20,210 and 2,000" in data.notes[0]
    _, masks = next(iter(data.eval_batches()))
    assert set(masks.unique().tolist()) == {IGNORED, 0, 149, 6}


def damage(folder: Path, what: str) -> None:
    mask = folder / "masks" / "train" / "image3.png"
    if what == "missing":
        mask.unlink()
    elif what == "size":
        Image.new("L", (5, 7)).save(mask)
    elif what == "class":
        (folder / "classes.txt").write_text("a\nb\n")
    elif what == "colours":
        (folder / "classes.txt").write_text("a\nb\nc\n")
        Image.new("RGB", (SIDE, SIDE)).save(mask)
    elif what == "no masks":
        shutil.rmtree(folder / "masks")
    else:
        shutil.rmtree(folder / "images" / "val")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "image3.png has no mask"),
        ("size", "has 5x7 pixels, the image 16x16"),
        ("class", "has the class 2, and the classes are 0 to 1"),
        ("colours", "has mode RGB"),
        ("no masks", "has no images/ and masks/"),
        ("no val", "has no train/ and val/"),
    ],
)
def test_wrong_masks_are_named_in_one_line(tmp_path, capsys, what, message):
    folder = write_folder(tmp_path / "set")
    damage(folder, what)
    words = [
        "train",
        "--task",
        "segmentation",
        "--data",
        str(folder),
        "--model-kwargs",
        VIT,
        "--workers",
        "0",
    ]
    more = ["--batch-size", "6", "--epochs", "1", "--output", str(tmp_path / "runs"), "--name", "wrong"]
    assert main([*words, *more]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said
    assert not (tmp_path / "runs" / "wrong" / "model.safetensors").exists()


def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path):
    for settings, message in (
        ({"mixup": 0.2}, "--mixup and --cutmix mix labels of images"),
        ({"aa": "rand-m9"}, "aa rand-m9 does not change masks"),
        ({"model_kwargs": f"{VIT},head=none"}, "head=none is unknown"),
        ({"img_size": 30}, "patch size 4 does not divide 30x30 images"),
    ):
        with pytest.raises(EwavitError, match=message):
            train(recipe(tmp_path, "wrong", **settings))
    assert not (tmp_path / "wrong").exists()


def test_pixels_without_a_class_stay_so_where_classes_have_another_order(tmp_path):
    data = open_masks(write_folder(tmp_path), batch_size=6)
    _, before = next(iter(data.eval_batches()))
    _, after = next(iter(with_classes(data, ("2", "0", "1")).eval_batches()))
    assert torch.equal(after == IGNORED, before == IGNORED)
    assert torch.equal((after + 2) % 3, before.where(before != IGNORED, (after + 2) % 3))


# --- metrics ---


def reference(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[float, float, float]:
    """Loss, mIoU and pixel accuracy by their definitions, pixel by pixel."""
    hits, unions, right, losses = {}, {}, [], []
    for logits, label in zip(
        outputs.movedim(1, -1).reshape(-1, outputs.shape[1]), targets.flatten().tolist(), strict=True
    ):
        if label == IGNORED:
            continue
        found = int(logits.argmax())
        right.append(found == label)
        losses.append(float(logits.logsumexp(0) - logits[label]))
        for number in {found, label}:
            unions[number] = unions.get(number, 0) + 1
            hits[number] = hits.get(number, 0) + (found == label)
    ious = [hits[number] / unions[number] for number in unions]
    return np.mean(losses), 100 * np.mean(ious), 100 * np.mean(right)


def test_metrics_and_loss_equal_their_definitions():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 4, 3, 3, generator=generator)
    targets = torch.randint(3, (5, 3, 3), generator=generator)  # the class 3 is predicted only
    targets[0, 0], targets[3] = IGNORED, IGNORED
    meter = PixelMeter("images", 4)
    for part in (slice(0, 2), slice(2, 4), slice(4, 5)):
        meter.update(outputs[part], outputs[part], targets[part])
    found = meter.compute()
    loss, miou, right = reference(outputs, targets)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["miou"] == pytest.approx(miou, abs=1e-3)
    assert found["pixel_accuracy"] == pytest.approx(right, abs=1e-3)
    task = Segmentation()
    assert float(task.loss(outputs, targets)) == pytest.approx(loss, rel=1e-5)
    smoothed = F.cross_entropy(outputs, targets, ignore_index=IGNORED, label_smoothing=0.1)
    torch.testing.assert_close(task.loss(outputs, targets, 0.1), smoothed)
    assert float(task.loss(outputs[3:4], targets[3:4])) == 0


# --- models ---


@pytest.mark.parametrize(
    ("name", "settings", "head"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}, "linear"),
        ("vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}, "pyramid"),
        ("swin_tiny_patch4_window7_224", SWIN, None),
    ],
)
def test_any_head_gives_logits_of_every_pixel_and_the_backbone_is_timms(name, settings, head):
    more = {} if head is None else {"head": head}
    model, kept = Segmentation().build_model(name, ImageInputs(3, 3, SIDE), **settings, **more)
    model.eval()
    images = torch.randn(2, 3, SIDE, SIDE)
    assert model(images).shape == (2, 3, SIDE, SIDE)
    again = Segmentation().create_model(name, kept).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(images), model(images))
    stock = timm.create_model(name, num_classes=0, in_chans=3, img_size=SIDE, **settings)
    stock.load_state_dict(model.backbone.state_dict())
    assert sum(p.requires_grad for p in model.parameters()) == len(list(model.parameters()))
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_backbone_starts_from_a_run_of_classification_and_of_segmentation(finished, tmp_path):
    classified = timm.create_model(
        "vit_tiny_patch16_224", num_classes=7, img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2
    )
    torch.save(classified.state_dict(), tmp_path / "classified.pt")
    settings = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    for file, key in ((tmp_path / "classified.pt", ""), (finished.model_file, "backbone.")):
        stored = classified.state_dict() if not key else load_file(file)
        model, _ = Segmentation().build_model(
            "vit_tiny_patch16_224", ImageInputs(5, 3, 32), initial_checkpoint=str(file), **settings
        )
        name = "blocks.1.mlp.fc1.weight"
        assert torch.equal(model.backbone.state_dict()[name], stored[f"{key}{name}"])


# --- runs ---


def test_a_run_leaves_model_predictions_and_a_picture_and_its_figure_is_found_again(finished):
    run = finished.run
    assert {"curves.png", "predictions.csv", "predictions.png"} <= {file.name for file in run.iterdir()}
    rows = list(csv.DictReader((run / "predictions.csv").open()))
    assert len(rows) == 200
    accuracy = np.mean([float(row["pixel_accuracy"]) for row in rows])
    assert accuracy == pytest.approx(finished.row["eval_pixel_accuracy"], abs=1e-2)
    with Image.open(run / "predictions.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**22)) > 100
    for source in (run, run / "checkpoint"):
        assert evaluate(source)["miou"] == pytest.approx(finished.row["eval_miou"], abs=1e-3)
    assert not (run / "config.json").exists()  # timm has no such model
    assert finished.row["expert_spread"] > 0


def test_the_deployed_model_is_loaded_by_its_code_and_its_backbone_by_timm(finished):
    names: dict[str, object] = {}
    loaded, card = load_model(finished.run)
    exec(card.loading_code(finished.model_file), names)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(names["model"](images), loaded(images))
    kwargs = {k: v for k, v in card.model_kwargs.items() if k != "num_classes"}
    stock = timm.create_model(card.model, num_classes=0, **kwargs)
    weights = load_file(finished.model_file)
    stock.load_state_dict(
        {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    )


@pytest.mark.parametrize("ending", ["safetensors", "onnx"])
def test_exported_files_compute_the_same(finished, tmp_path, ending):
    said = export(finished.run, tmp_path / f"model.{ending}")
    assert "logits equal the model's" in said
    assert "mIoU" in said
    found = evaluate(tmp_path / f"model.{ending}")
    assert found["miou"] == pytest.approx(finished.row["eval_miou"], abs=0.05)


def test_interrupted_and_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    whole = train(recipe(tmp_path, "whole", drop_path=0.1)).run
    with monkeypatch.context() as patch:
        stop_after(patch, 3)  # in the second epoch
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, "parts", drop_path=0.1))
    resume(tmp_path / "parts")
    assert_same_end(whole, tmp_path / "parts")


def test_a_comparison_reads_a_run_by_its_miou(finished):
    judge = Segmentation.judge
    read = read_run(RunFolder(finished.run), 0, judge)
    assert (read.metric, read.predictions) == (finished.row["eval_miou"], None)
    assert (judge.name, judge.text(read.metric)) == ("mIoU", f"{read.metric:.2f} %")


def test_predictions_are_masks_in_the_size_of_the_image_and_overlays(finished, tmp_path, capsys):
    Image.fromarray(make_shapes()[2][0]).resize((50, 40)).save(tmp_path / "photo.png")
    to = tmp_path / "found"
    assert main(["predict", str(finished.run), str(tmp_path / "photo.png"), "--to", str(to), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["images"]
    assert set(row["classes"]) <= set(CLASSES)
    assert sum(row["shares"]) == pytest.approx(1)
    assert {file.name for file in to.iterdir()} == {"photo.png", "photo-overlay.png"}
    for file in to.iterdir():
        assert Image.open(file).size == (50, 40)
    values = np.unique(np.asarray(Image.open(to / "photo.png")))
    assert {CLASSES[value] for value in values} <= set(row["classes"])
    sheet = tmp_path / "sheet.png"
    assert main(["predict", str(finished.run), str(tmp_path / "photo.png"), "--sheet", str(sheet)]) == 0
    assert sheet.is_file()


def test_the_confusion_matrix_and_a_bench_answer_for_pixels(finished, capsys):
    with pytest.raises(EwavitError, match="need one class for each input"):
        evaluate(finished.run, confusion=True)
    words = ["bench", "--task", "segmentation", "--model-kwargs", VIT, "--model", TINY["model"]]
    assert main([*words, "--batch-size", "2", "--rounds", "2", "--experts", "2", "--json"]) == 0
