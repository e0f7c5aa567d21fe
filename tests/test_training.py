"""Properties of whole runs: exact resumption, what a run leaves behind, evaluation, export, two processes."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from ewavit import EwavitError
from ewavit.core import moe_layers
from ewavit.training import loop
from ewavit.training.checkpoint import load_checkpoint
from ewavit.training.export import evaluate, export, load_model
from ewavit.training.loop import TrainingRun, resume, train
from ewavit.training.processes import Interrupted
from ewavit.training.recipe import Recipe
from ewavit.training.weight_average import TrainableWeightAverage
from runs import TINY, assert_same_end, raise_after, recipe, stop_after

EVERYTHING = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "reprob": 0.25,
    "drop_path": 0.1,
    "model_ema": True,
    "model_ema_decay": 0.9,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, for tests that only look at it."""
    return train(Recipe(**TINY, output=str(tmp_path_factory.mktemp("runs")), name="finished"))


@pytest.mark.parametrize("updates", [3, 8, 11], ids=["mid-epoch", "epoch end", "second epoch"])
def test_interrupted_and_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch, updates):
    settings = {**EVERYTHING, "opt": "adamw", "clip_grad": 1.0}
    whole = train(recipe(tmp_path, "whole", **settings)).run
    with monkeypatch.context() as patch:
        stop_after(patch, updates)
        with pytest.raises(Interrupted) as stopped:
            train(recipe(tmp_path, "parts", **settings))
    assert stopped.value.exit_status == 128 + signal.SIGTERM
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    resume(tmp_path / "parts")
    assert_same_end(whole, tmp_path / "parts")


def test_resume_is_exact_with_gradient_accumulation_sgd_and_augmentation(tmp_path, monkeypatch):
    settings = {"grad_accum_steps": 2, "opt": "sgd", "lr": 0.05, "aa": "rand-m9", "every_setting": None}
    settings.pop("every_setting")
    whole = train(recipe(tmp_path, "whole", **settings)).run
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, "parts", **settings))
    resume(tmp_path / "parts")
    assert_same_end(whole, tmp_path / "parts")


@pytest.mark.parametrize(
    ("owner", "name", "settings"),
    [
        (loop, "evaluate_batches", {}),
        (loop, "evaluate_batches", {"model_ema": True, "model_ema_switch": True}),
        (loop, "evaluate_batches", {"swa": 0.5}),
        (TrainableWeightAverage, "_mean", {"twa": 1}),
        (loop.Listing, "gathered", {}),  # the resumed run predicts anew
        (loop.TrainingState, "save", {}),
    ],
)
def test_a_signal_outside_the_steps_stops_the_run_which_then_ends_with_the_same_bits(
    owner, name, settings, tmp_path, monkeypatch
):
    whole = train(recipe(tmp_path, "whole", **settings)).run
    original = getattr(owner, name)

    def signalled(*args, **kwargs):
        result = original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        with pytest.raises(Interrupted) as stopped:
            train(recipe(tmp_path, "parts", **settings))
    assert stopped.value.exit_status == 128 + signal.SIGTERM
    resume(tmp_path / "parts")
    assert_same_end(whole, tmp_path / "parts")


def test_killed_run_goes_on_from_its_recovery_checkpoint(tmp_path, monkeypatch):
    whole = train(recipe(tmp_path, "whole")).run
    with monkeypatch.context() as patch:
        raise_after(patch, 7, MemoryError)
        with pytest.raises(MemoryError):
            train(recipe(tmp_path, "parts", recovery_interval=5))
    assert load_checkpoint(tmp_path / "parts").facts["progress"]["update"] == 5
    resume(tmp_path / "parts")
    assert_same_end(whole, tmp_path / "parts")


def test_dense_and_expanded_runs_see_the_same_images(tmp_path, monkeypatch):
    seen = {}

    def watch(name):
        original = TrainingRun.training_batches

        def recorded(run, epoch, start=0):
            for batch in original(run, epoch, start):
                seen.setdefault(name, []).append(batch[0].clone())
                yield batch

        return recorded

    for name, experts in (("dense", 1), ("ewa", 4)):
        with monkeypatch.context() as patch:
            patch.setattr(TrainingRun, "training_batches", watch(name))
            train(recipe(tmp_path, name, experts=experts, epochs=1))
    assert len(seen["dense"]) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen["dense"], seen["ewa"], strict=True))


def test_one_expert_trains_the_dense_model(tmp_path):
    result = train(recipe(tmp_path, "dense", experts=1))
    assert load_checkpoint(result.run).facts["layers"] == []
    assert result.row["expert_spread"] == result.row["share_rate"] == 0.0


def test_a_run_leaves_what_it_promises(finished):
    names = {file.name for file in finished.run.iterdir()}
    assert {"args.yaml", "summary.csv", "checkpoint", "model.safetensors", "curves.png"} <= names
    rows = list(csv.DictReader((finished.run / "summary.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    columns = {"train_loss", "eval_loss", "eval_top1", "eval_top5", "lr", "share_rate", "expert_spread"}
    assert columns | {"images_per_second"} <= set(rows[0])
    assert float(rows[0]["expert_spread"]) > 0
    assert (
        Recipe.from_dict(yaml.safe_load((finished.run / "args.yaml").read_text()), "args.yaml").limit == 256
    )
    assert not list(finished.run.rglob("*partial*"))


def test_stock_timm_loads_the_model_without_ewavit(finished):
    code = f"""
import sys, timm, torch
file = {str(finished.model_file)!r}
settings = dict(num_classes=10, in_chans=1, img_size=28, patch_size=7, embed_dim=32, depth=2, num_heads=2)
model = timm.create_model("vit_tiny_patch16_224", checkpoint_path=file, **settings).eval()
torch.manual_seed(0)
print(model(torch.randn(1, 1, 28, 28))[0, 0].item())
assert "ewavit" not in sys.modules
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    model, _ = load_model(finished.run)
    torch.manual_seed(0)
    assert float(said) == pytest.approx(model(torch.randn(1, 1, 28, 28))[0, 0].item(), abs=1e-6)


def test_evaluate_finds_the_accuracy_that_the_run_reported(finished):
    for source in (finished.run, finished.model_file, finished.run / "checkpoint"):
        metrics = evaluate(source)
        assert metrics.count == 2000
        assert metrics["top1"] == pytest.approx(finished.row["eval_top1"], abs=0.05)
        assert metrics["loss"] == pytest.approx(finished.row["eval_loss"], abs=1e-4)


@pytest.mark.parametrize("suffix", ["safetensors", "onnx", "pt2"])
def test_export_writes_a_file_with_the_runs_accuracy(finished, tmp_path, suffix):
    file = tmp_path / f"plain.{suffix}"
    said = export(finished.run / "checkpoint", file)
    assert f"top-1 {finished.row['eval_top1']:.2f} %" in said
    if suffix == "pt2":
        with pytest.raises(EwavitError, match="can run code"):
            evaluate(file)
    else:
        assert evaluate(file)["top1"] == pytest.approx(finished.row["eval_top1"], abs=0.1)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_export_that_computes_something_else_leaves_no_file(finished, tmp_path, monkeypatch):
    from ewavit.training import export as room

    spoiled = lambda tensors, path, metadata: room_save(  # noqa: E731
        {name: tensor * 1.1 for name, tensor in tensors.items()}, path, metadata
    )
    room_save = room.save_tensors
    monkeypatch.setattr(room, "save_tensors", spoiled)
    with pytest.raises(EwavitError, match="differ"):
        export(finished.run, tmp_path / "plain.safetensors")
    assert not list(tmp_path.iterdir())


# --- class names decide, not positions ---

COLOURS = {"c1": (250, 10, 10), "c2": (10, 250, 10), "c10": (10, 10, 250)}  # sorted plainly: c1, c10, c2


def write_colours(root: Path, renamed: dict[str, str] | None = None) -> Path:
    """A folder of three classes, each of one colour; some classes under another name."""
    for split, count in (("train", 12), ("val", 4)):
        for name, colour in COLOURS.items():
            folder = root / split / (renamed or {}).get(name, name)
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (14, 14), colour).save(folder / f"{number}.png")
    return root


def colour_recipe(tmp_path: Path, name: str, folder: Path, **settings) -> Recipe:
    more = {"limit": None, "batch_size": 12, "epochs": 6, "lr": 0.003, "workers": 0, "experts": 2}
    return recipe(tmp_path, name, data=str(folder), **more | settings)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """A finished run on the colours, 100 % right."""
    root = tmp_path_factory.mktemp("colours")
    result = train(colour_recipe(root, "run", write_colours(root / "data")))
    assert result.row["eval_top1"] == 100
    return result.run, root / "data"


def test_data_with_the_classes_in_another_order_are_evaluated_by_name(coloured, tmp_path):
    run, folder = coloured
    plainly_sorted = {"data": "torch/image_folder", "data_dir": str(folder), "workers": 0}
    assert evaluate(run, **plainly_sorted).values == pytest.approx(evaluate(run, workers=0).values)
    export(run, tmp_path / "file.onnx")
    assert evaluate(tmp_path / "file.onnx", **plainly_sorted)["top1"] == 100


@pytest.mark.parametrize(
    ("renamed", "words"),
    [
        ({"c1": "x1"}, ["1 only in the data: x1", "1 only in the model: c1"]),
        ({"c1": "x1", "c2": "c1"}, ["1 only in the data: x1", "1 only in the model: c2"]),
        ({"c1": "C1", "c2": "C2", "c10": "C10"}, ["3 only in the data: C1, C2, C10"]),
    ],
)
def test_renamed_classes_are_refused_by_name(coloured, tmp_path, renamed, words):
    other = write_colours(tmp_path / "renamed", renamed)
    run, _ = coloured
    for call in (
        lambda: evaluate(run, str(other), workers=0),
        lambda: export(run, tmp_path / "file.safetensors", str(other)),
    ):
        with pytest.raises(EwavitError) as caught:
            call()
        assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "file.safetensors").exists()


def test_fewer_classes_are_refused_by_name(coloured, tmp_path):
    other = write_colours(tmp_path / "fewer")
    for split in ("train", "val"):
        shutil.rmtree(other / split / "c2")
    with pytest.raises(EwavitError, match="1 only in the model: c2"):
        evaluate(coloured[0], str(other), workers=0)


def test_a_run_resumes_on_data_with_the_classes_in_another_order(tmp_path, monkeypatch):
    folder = write_colours(tmp_path / "data")
    whole = train(colour_recipe(tmp_path, "whole", folder))
    with monkeypatch.context() as patch:
        stop_after(patch, 15)
        with pytest.raises(Interrupted):
            train(colour_recipe(tmp_path, "parts", folder))
    with pytest.raises(EwavitError, match="1 only in the data: x1"):
        resume(tmp_path / "parts", data=str(write_colours(tmp_path / "other", {"c1": "x1"})))
    resumed = resume(tmp_path / "parts", data="torch/image_folder", data_dir=str(folder))
    assert resumed.row["eval_top1"] == 100
    # The order of the images is another one, and so are the weights; the labels are not.
    assert resumed.row["train_loss"] == pytest.approx(whole.row["train_loss"], abs=0.2)
    assert load_model(tmp_path / "parts")[1].classes == ("c1", "c2", "c10")


def test_the_experts_learning_rate_is_scaled_and_nothing_else(tmp_path):
    run = TrainingRun(recipe(tmp_path, "scaled", expert_lr=3.0), tmp_path / "scaled", Accelerator(cpu=True))
    experts = {id(p) for moe in moe_layers(run.state.model).values() for p in moe.parameters()}
    for update in (1, 5, 11):
        run.state.scheduler.step_update(update)
        rates = {True: set(), False: set()}
        for group in run.state.optimizer.param_groups:
            for parameter in group["params"]:
                rates[id(parameter) in experts].add(group["lr"])
        (rate,), (expert_rate,) = rates[False], rates[True]
        assert expert_rate == pytest.approx(3.0 * rate)


def test_evaluating_every_second_epoch_changes_no_weight(tmp_path):
    every = train(recipe(tmp_path, "every", epochs=3))
    seldom = train(recipe(tmp_path, "seldom", epochs=3, val_interval=2))
    rows = [list(csv.DictReader((result.run / "summary.csv").open())) for result in (every, seldom)]
    assert [row["epoch"] for row in rows[1]] == ["1", "2"]
    assert rows[1][-1]["eval_top1"] == rows[0][-1]["eval_top1"]
    assert [row["images"] for row in rows[0]] == ["256", "512", "768"]
    one, other = load_file(every.model_file), load_file(seldom.model_file)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_averaging_at_intervals_resumes_exactly(tmp_path, monkeypatch):
    settings = {"average_every": 3, "val_interval": 2}
    whole = train(recipe(tmp_path, "whole", **settings)).run
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, "parts", **settings))
    resume(tmp_path / "parts")
    assert_same_end(whole, tmp_path / "parts")


@pytest.mark.parametrize("settings", [{}, {"model_ema": True, "epochs": 1}], ids=["plain", "average"])
def test_the_last_evaluation_lists_what_a_pass_of_its_own_would(tmp_path, monkeypatch, settings):
    original = loop.TrainingRun._write_files

    def with_a_pass_of_its_own(run, *args):
        run._listing = None
        return original(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainingRun, "_write_files", with_a_pass_of_its_own)
        twice = train(recipe(tmp_path, "twice", **settings)).run
    monkeypatch.setattr(loop, "predictions", None)  # not called
    once = train(recipe(tmp_path, "once", **settings)).run
    assert (once / "predictions.csv").read_bytes() == (twice / "predictions.csv").read_bytes()


def test_predictions_agree_with_the_accuracy(finished):
    with (finished.run / "predictions.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert len(rows) == 2000
    assert 100 * right / len(rows) == pytest.approx(finished.row["eval_top1"], abs=1e-3)
    classes = load_model(finished.run)[1].classes
    top5 = sum(row["class"] in row["top5"].split("|") for row in rows)
    assert 100 * top5 / len(rows) == pytest.approx(finished.row["eval_top5"], abs=1e-3)
    for number, row in enumerate(rows):
        assert int(row["input"]) == number
        assert (row["class"], row["predicted_class"]) == (
            classes[int(row["label"])],
            classes[int(row["prediction"])],
        )
        assert row["top5"].split("|")[0] == row["predicted_class"]
        assert 0.1 <= float(row["probability"]) <= 1


def test_moving_average_is_evaluated_and_written(tmp_path):
    result = train(recipe(tmp_path, "ema", **EVERYTHING))
    assert "average_top1" in result.row
    averaged, raw = (load_file(result.run / f"{name}.safetensors") for name in ("model-average", "model"))
    assert averaged.keys() == raw.keys()
    assert any(not torch.equal(averaged[name], raw[name]) for name in raw)


@pytest.mark.parametrize("setting", [{"swa": 0.5}, {"twa": 1}, {"model_ema": True, "model_ema_switch": True}])
@pytest.mark.parametrize("experts", [1, 4])
def test_runs_with_an_average_of_their_weights_resume_exactly(tmp_path, monkeypatch, setting, experts):
    settings = {**setting, "experts": experts, "epochs": 4}
    whole = train(recipe(tmp_path, "whole", **settings))
    with monkeypatch.context() as patch:
        stop_after(patch, 27)
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, "parts", **settings))
    resume(tmp_path / "parts")
    assert_same_end(whole.run, tmp_path / "parts")
    averages = [load_file(run / "model-average.safetensors") for run in (whole.run, tmp_path / "parts")]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])
    predicted = list(csv.DictReader((whole.run / "predictions.csv").open()))
    right = sum(row["label"] == row["prediction"] for row in predicted)
    assert 100 * right / len(predicted) == pytest.approx(whole.row["average_top1"], abs=1e-3)
    assert whole.row["images"] == 4 * 256 + 3 * 256 * bool(setting.get("twa"))


def test_swa_holds_the_learning_rate_while_it_averages(tmp_path):
    rows = list(
        csv.DictReader((train(recipe(tmp_path, "swa", swa=0.5, epochs=4)).run / "summary.csv").open())
    )
    rates = [float(row["lr"]) for row in rows]
    assert rates[1] > rates[2] * 0.999
    assert rates[2] == rates[3] > 0


def test_fine_tuning_starts_from_the_files_weights_with_a_new_head(tmp_path):
    kwargs = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
    source = timm.create_model("vit_tiny_patch16_224", img_size=28, in_chans=1, num_classes=7, **kwargs)
    file = tmp_path / "source.pth"
    torch.save(source.state_dict(), file)
    result = train(recipe(tmp_path, "tuned", initial_checkpoint=str(file), lr=1e-12, epochs=1))
    tuned = load_file(result.model_file)
    body = source.state_dict()["blocks.1.mlp.fc1.weight"]
    assert torch.allclose(tuned["blocks.1.mlp.fc1.weight"], body, atol=1e-6)
    assert tuned["head.weight"].shape == (10, 32)


def test_bfloat16_autocast_and_layer_decay_train(tmp_path):
    result = train(recipe(tmp_path, "amp", amp=True, layer_decay=0.75, epochs=1))
    assert result.row["train_loss"] < 2.5


@pytest.mark.slow
def test_compiled_run_trains(tmp_path):
    result = train(recipe(tmp_path, "compiled", compile=True, epochs=1, limit=128))
    assert result.row["train_loss"] < 2.6
    assert evaluate(result.run)["top1"] == pytest.approx(result.row["eval_top1"], abs=0.1)


@pytest.mark.slow
def test_two_processes_share_the_work_and_one_writes(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
        "ewavit.cli",
        "train",
    ]
    command += [
        "--model",
        TINY["model"],
        "--model-kwargs",
        TINY["model_kwargs"],
        "--limit",
        "256",
        "--epochs",
        "1",
    ]
    command += ["--batch-size", "32", "--output", str(tmp_path), "--name", "two"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("epoch 1/1") == 1
    assert "on 2,000 test images" in done.stdout
    run = tmp_path / "two"
    assert len(list(csv.DictReader((run / "summary.csv").open()))) == 1
    facts = load_checkpoint(run).facts["progress"]
    assert facts["update"] == 256 // (2 * 32)
    row = next(csv.DictReader((run / "summary.csv").open()))
    assert evaluate(run)["top1"] == pytest.approx(float(row["eval_top1"]), abs=0.01)
