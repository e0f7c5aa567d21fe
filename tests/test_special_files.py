"""Only files are read: a named pipe, a socket, a device or a loop of links is named, never opened."""

import json
import os
import signal
import socket

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import point_sets
from ewavit import EwavitError, collapse_checkpoint
from ewavit.cli import main
from ewavit.compare.arms import make_arms
from ewavit.compare.engines import Kind, execute
from ewavit.compare.tuning import Grids
from ewavit.compare.work import Work
from ewavit.data.arrays import read_cifar
from ewavit.data.folders import class_folders, files_below
from ewavit.data.weight_files import read_weights
from ewavit.files import regular
from ewavit.points.files import load_file
from ewavit.points.sources import SUFFIXES, read_points
from ewavit.training.checkpoint import load_checkpoint, save_checkpoint
from ewavit.training.export import evaluate, export
from ewavit.training.recipe import Recipe
from ewavit.training.run_folder import RunFolder
from runs import facts


def pipe(path):
    os.mkfifo(path)


def bound_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket has at most 107 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


KINDS = {
    "a named pipe": pipe,
    "a socket": bound_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "symbolic links": lambda path: path.symlink_to(path.name),
    "a folder": lambda path: path.mkdir(),
}
PIPES = ("a named pipe", "a device")


@pytest.fixture(autouse=True)
def limit_of_time():
    """An open that waits for ever fails the test instead of stopping the suite."""

    def late(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_named(tmp_path, kind):
    place = tmp_path / "place"
    KINDS[kind](place)
    with pytest.raises(OSError, match=kind):
        regular(place)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert regular(tmp_path / "link") == tmp_path / "link"
    with pytest.raises(FileNotFoundError):
        regular(tmp_path / "nothing")


def shards(folder):
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "1.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "2.safetensors"


def of_folder(name):
    """A folder in which a file of this name is special."""

    def place(folder):
        folder.mkdir()
        return folder / name

    return place


WEIGHTS = {
    "safetensors": lambda folder: folder.with_suffix(".safetensors"),
    "torch": lambda folder: folder.with_suffix(".pth"),
    "index": lambda folder: folder.with_suffix(".safetensors.index.json"),
    "run": of_folder("model.safetensors"),
    "shard": shards,
}


@pytest.mark.parametrize("kind", PIPES)
@pytest.mark.parametrize("form", WEIGHTS)
def test_weights_that_are_no_file_are_refused(tmp_path, form, kind, capsys):
    place = WEIGHTS[form](tmp_path / "in")
    KINDS[kind](place)
    source = place if place.parent == tmp_path else place.parent
    calls = [
        lambda: read_weights(source),
        lambda: collapse_checkpoint(source, tmp_path / "plain.safetensors"),
    ]
    if form != "torch":
        calls.append(lambda: export(source, tmp_path / "plain.safetensors"))
    if form in ("safetensors", "run"):
        calls.append(lambda: evaluate(source))
        calls.append(lambda: export(source, tmp_path / "plain.onnx"))
    for call in calls:
        with pytest.raises(EwavitError, match=f"it is {kind}, not a file"):
            call()
    words = ["train", "--initial-checkpoint", str(source), "--output", str(tmp_path), "--limit", "128"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"it is {kind}, not a file" in said
    assert not (tmp_path / "plain.safetensors").exists()


@pytest.mark.parametrize("kind", PIPES)
def test_an_onnx_file_that_is_none_is_refused(tmp_path, kind):
    pytest.importorskip("onnxruntime")
    KINDS[kind](tmp_path / "model.onnx")
    with pytest.raises(EwavitError, match=f"it is {kind}, not a file"):
        evaluate(tmp_path / "model.onnx")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_settings_that_are_no_file_are_refused(tmp_path, capsys, command, kind):
    KINDS[kind](tmp_path / "settings.yaml")
    assert main([command, "--config", str(tmp_path / "settings.yaml")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert kind in said


@pytest.mark.parametrize("kind", PIPES)
@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "training.safetensors"])
def test_a_checkpoint_with_something_else_for_a_file_is_damaged(tmp_path, name, kind):
    folder = tmp_path / "checkpoint"
    save_checkpoint(tmp_path, {}, {}, facts(), {})
    assert load_checkpoint(tmp_path).model == {}
    (folder / name).unlink()
    KINDS[kind](folder / name)
    with pytest.raises(EwavitError, match="no whole checkpoint is left"):
        load_checkpoint(tmp_path)


# Data


def images(root):
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for index in range(20):
                pixels = np.full((8, 8), 100 * number + index, np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device", "symbolic links"])
def test_an_image_that_is_no_file_is_named_or_skipped(tmp_path, capsys, kind):
    root = images(tmp_path / "data")
    (root / "train" / "cat" / "10.png").unlink()
    KINDS[kind](root / "train" / "cat" / "10.png")
    KINDS[kind](root / "train" / "cat" / "other")  # never read
    words = ["train", "--data", str(root), "--workers", "0", "--output", str(tmp_path / "runs")]
    words += ["--epochs", "1", "--batch-size", "20", "--model", "vit_tiny_patch16_224", "--model-kwargs"]
    words += ["patch_size=4,embed_dim=32,depth=2,num_heads=2", "--img-size", "8"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "10.png" in said
    assert kind in said
    assert main([*words, "--skip-bad-images"]) == 0


def test_loops_of_links_are_seen_in_folders(tmp_path):
    root = images(tmp_path / "data") / "train"
    (root / "loop").symlink_to("loop")
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "self").symlink_to("self")
    (root / "cat" / "one").symlink_to("two")
    (root / "cat" / "two").symlink_to("one")
    (root / "cat" / "inner").mkdir()
    (root / "cat" / "inner" / "back").symlink_to(root / "cat")
    assert sorted(class_folders(root)) == ["cat", "dog"]
    files, others = files_below(root / "cat", [".png"])
    assert len(files) == 20
    assert others == {"no suffix": 3}


@pytest.mark.parametrize("kind", PIPES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_cloud_that_is_no_file_is_named(tmp_path, suffix, kind):
    KINDS[kind](tmp_path / f"cloud{suffix}")
    with pytest.raises(OSError, match=kind):
        load_file(tmp_path / f"cloud{suffix}", 8, np.random.default_rng(0))


def of_folder_set(root):
    point_sets.write_folder(root)
    return f"points:{root}", next(iter(sorted((root / "train").glob("*/*"))))


def of_modelnet_text(root):
    point_sets.write_text(root)
    return f"modelnet40:{root}", root / "modelnet40_shape_names.txt"


def of_modelnet_list(root):
    point_sets.write_text(root)
    return f"modelnet40:{root}", root / "modelnet40_test.txt"


def of_modelnet_h5(root):
    point_sets.write_modelnet_h5(root)
    return f"modelnet40:{root}", next(root.rglob("ply_data_train0.h5"))


def of_shapenetpart(root):
    point_sets.write_shapenetpart(root)
    return f"shapenetpart:{root}", next(root.rglob("shuffled_test_file_list.json"))


@pytest.mark.parametrize("kind", PIPES)
@pytest.mark.parametrize(
    "place", [of_folder_set, of_modelnet_text, of_modelnet_list, of_modelnet_h5, of_shapenetpart]
)
def test_a_set_of_clouds_with_something_else_for_a_file_is_refused(tmp_path, place, kind):
    root = tmp_path / "set"
    root.mkdir()
    spec, file = place(root)
    file.unlink()
    KINDS[kind](file)
    with pytest.raises(EwavitError) as caught:
        read_points(spec, 8)
    assert file.name in str(caught.value)
    assert f"it is {kind}, not a file" in str(caught.value)


@pytest.mark.parametrize("kind", PIPES)
def test_a_cifar_file_that_is_none_is_named(tmp_path, kind):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    KINDS[kind](folder / "batches.meta")
    with pytest.raises(EwavitError, match=rf"batches\.meta \(it is {kind}, not a file\)"):
        read_cifar(folder)


# What is written


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "symbolic links"])
def test_a_target_that_is_no_file_is_refused_and_stays(tmp_path, kind):
    source, target = tmp_path / "in.safetensors", tmp_path / "plain.safetensors"
    save_file({"a.experts.ffn.weight": torch.ones(2, 3, 3)}, source)
    KINDS[kind](target)
    before = os.lstat(target)
    for call in (collapse_checkpoint, export):
        with pytest.raises(EwavitError, match="there already, and is no file: choose another name"):
            call(source, target)
    assert os.lstat(target) == before
    assert len(os.listdir(tmp_path)) == 2


# Comparisons


def work(tmp_path):
    recipe = Recipe(limit=128, epochs=1, warmup_epochs=0, output=str(tmp_path), name="x")
    return Work(recipe, make_arms(["dense", "ewa"], recipe), (0, 1), Grids(), 1, "ewavit compare")


@pytest.mark.parametrize("kind", PIPES)
@pytest.mark.parametrize("name", ["summary.csv", "predictions.csv", "model.safetensors"])
def test_a_run_with_something_else_for_a_file_is_damaged(tmp_path, name, kind):
    made = work(tmp_path)
    cell = made.final()[0]
    cell.run.path.mkdir(parents=True)
    cell.run.predictions.write_text("label,prediction\n0,0\n")
    columns = "epoch,images,seconds,train_loss,eval_loss,eval_top1,lr,share_rate,peak_memory_mib"
    cell.run.summary.write_text(f"{columns}\n0,9,1,2,3,100,1e-3,0,1\n")
    save_file({}, cell.run.model)
    assert made.found(cell).error is None
    (cell.run.path / name).unlink()
    KINDS[kind](cell.run.path / name)
    assert f"{name} is damaged: it is {kind}, not a file" in made.found(cell).error
    assert cell.run.last_row() is None if name == "summary.csv" else cell.run.last_row()


@pytest.mark.parametrize("kind", KINDS)
def test_the_settings_of_a_comparison_are_a_file(tmp_path, kind):
    made = work(tmp_path)
    (made.folder / "runs" / "dense-0").mkdir(parents=True)
    if kind != "symbolic links":  # as if it were missing
        KINDS[kind](made.folder / "compare.yaml")
        with pytest.raises(EwavitError, match=rf"compare\.yaml cannot be read \(it is {kind}"):
            made.read()


def test_a_run_whose_log_is_a_pipe_fails_by_name(tmp_path):
    recipe = Recipe(limit=128, epochs=1, warmup_epochs=0, output=str(tmp_path), name="x")
    pipe(RunFolder.of(recipe).log)
    end = execute(recipe, 1)
    assert end.kind is Kind.FAILED
    assert "it is a named pipe, not a file" in end.error


def test_files_of_a_run_are_replaced_not_opened(tmp_path):
    for name in ("args.yaml", "summary.csv", "predictions.csv", "curves.png"):
        (tmp_path / "run").mkdir(exist_ok=True)
        pipe(tmp_path / "run" / name)
        pipe(tmp_path / "run" / f".{name}.ewavit-partial")
    words = ["train", "--output", str(tmp_path), "--name", "run", "--epochs", "1", "--limit", "128"]
    words += ["--model", "vit_tiny_patch16_224", "--workers", "0"]
    words += ["--model-kwargs", "patch_size=7,embed_dim=32,depth=2,num_heads=2"]
    assert main(words) == 0
    assert yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())["epochs"] == 1
    assert not [file for file in (tmp_path / "run").rglob("*") if not file.is_file() and not file.is_dir()]
