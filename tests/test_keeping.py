"""Runs that keep earlier checkpoints or their best model, and runs that end early."""

import csv

import pytest
import torch
from safetensors.torch import load_file

from ewavit import EwavitError
from ewavit.training.checkpoint import load_checkpoint
from ewavit.training.export import evaluate, load_model
from ewavit.training.loop import resume, train
from ewavit.training.processes import Interrupted
from runs import assert_same_end, recipe, stop_after

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
