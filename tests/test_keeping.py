"""Runs that keep earlier checkpoints or their best model, and runs that end early."""

import csv
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

from ewavit import EwavitError
from ewavit.training.checkpoint import load_checkpoint
from ewavit.training.export import evaluate, load_model
from ewavit.training.loop import resume, train
from ewavit.training.processes import Interrupted
from ewavit.training.run_folder import RunFolder
from processes import in_processes
from runs import assert_same_end, raise_after, recipe, stop_after

KEEPING = {"epochs": 6, "holdout": 0.3, "keep_best": "loss", "checkpoint_hist": 2, "lr": 0.01}


def rows(run):
    return list(csv.DictReader((run / "summary.csv").open()))


def test_the_best_epoch_by_held_out_loss_is_kept_beside_the_last_model(tmp_path):
    run = train(recipe(tmp_path, "best", **KEEPING, experts=1, smoothing=0.0)).run
    losses = [float(row["eval_loss"]) for row in rows(run)]
    metrics = evaluate(run / "model-best.safetensors", holdout=0.3, limit=256)
    assert metrics["loss"] == pytest.approx(min(losses), abs=1e-5)
    assert evaluate(run, holdout=0.3, limit=256)["loss"] == pytest.approx(losses[-1], abs=1e-5)
    card = load_model(run / "model-best.safetensors")[1]
    assert card.metric == float(rows(run)[losses.index(min(losses))]["eval_top1"])


def test_a_damaged_best_model_is_named_and_never_sealed_as_whole(tmp_path):
    run = train(recipe(tmp_path, "best", **{**KEEPING, "epochs": 2}, experts=1)).run
    best = run / "model-best.safetensors"
    content = bytearray(best.read_bytes())
    content[-5] ^= 1
    best.write_bytes(content)
    with pytest.raises(EwavitError, match=r"model-best\.safetensors is damaged"):
        load_model(best)
    with pytest.raises(EwavitError, match=r"model-best\.safetensors is damaged, and a finished run cannot"):
        resume(run)
    assert "model-best.safetensors" in RunFolder(run).damage()
    best.unlink()
    resume(run)
    assert RunFolder(run).damage() is None


def in_two(folder, name, stopped):
    settings = {
        "epochs": 5,
        "early_stop": 1,
        "lr": 0.02,
        "class_weights": "balanced",
        "freeze": "patch_embed",
    }
    made = recipe(folder, name, **{**KEEPING, **settings, "distill_from": f"{folder}/teacher"})
    with pytest.MonkeyPatch.context() as patch:
        if stopped:
            raise_after(patch, 4, KeyError)
        with pytest.raises(KeyError) if stopped else nullcontext():
            train(made)


def go_on(folder):
    resume(folder / "parts")


def test_two_processes_keep_stop_and_go_on_as_one_run(tmp_path):
    train(recipe(tmp_path, "teacher", epochs=1, experts=1))
    in_processes(2, in_two, tmp_path, "whole", False)
    in_processes(2, in_two, tmp_path, "parts", True)
    in_processes(2, go_on, tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert_same_end(whole, parts)
    first, second = (load_file(place / "model-best.safetensors") for place in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(rows(parts)) == len(rows(whole))
    names = [sorted(kept.name for kept in (run / "checkpoint-hist").iterdir()) for run in (whole, parts)]
    assert names[0] == names[1]
    assert len(names[0]) == 2


def test_the_last_checkpoints_are_kept_whole(tmp_path):
    run = train(recipe(tmp_path, "kept", **KEEPING)).run
    kept = sorted((run / "checkpoint-hist").iterdir())
    assert [folder.name for folder in kept] == ["epoch-00005", "epoch-00006"]
    found = [load_checkpoint(folder) for folder in kept]
    assert [each.facts["progress"]["epoch"] for each in found] == [5, 6]
    last = load_file(run / "checkpoint" / "model.safetensors")
    assert all(torch.equal(tensor, found[1].model[name]) for name, tensor in last.items())


def test_a_run_ends_after_so_many_evaluations_without_a_better_one(tmp_path):
    settings = {**KEEPING, "epochs": 40, "early_stop": 2, "lr": 0.02, "batch_size": 16, "smoothing": 0.0}
    run = train(recipe(tmp_path, "early", **settings)).run
    losses = [float(row["eval_loss"]) for row in rows(run)]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 40
    assert (run / "model.safetensors").exists()
    with pytest.raises(EwavitError, match=f"is finished after {len(losses)} epochs"):
        resume(run)


@pytest.mark.parametrize("averaged", [{}, {"model_ema": True}], ids=["plain", "EMA"])
def test_a_stopped_run_keeps_and_ends_the_same(averaged, tmp_path, monkeypatch):
    settings = {**KEEPING, "early_stop": 3, **averaged}
    whole = train(recipe(tmp_path, "whole", **settings)).run
    with monkeypatch.context() as patch:
        stop_after(patch, 12)
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, "parts", **settings))
    resume(tmp_path / "parts")
    assert_same_end(whole, tmp_path / "parts")
    first, second = (load_file(place / "model-best.safetensors") for place in (whole, tmp_path / "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep_best": "top1"}, "--keep-best top1 would choose by the test images: also give --holdout"),
        ({"early_stop": 3}, "--early-stop 3 would choose by the test images"),
        ({"keep_best": "top9", "holdout": 0.2}, "--keep-best top9 is unknown: choose top1 or loss"),
        ({"early_stop": 3, "holdout": 0.2, "swa": 0.5}, "has no last epochs to average: leave out --swa"),
        ({"checkpoint_hist": -1}, "--checkpoint-hist -1 is out of range"),
    ],
)  # fmt: skip
def test_what_would_choose_by_the_test_images_is_refused(settings, said, tmp_path):
    with pytest.raises(EwavitError, match=said):
        train(recipe(tmp_path, "x", **settings))
