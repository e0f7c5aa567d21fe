"""Comparisons as a whole: pairing, what a later start does, what wrong input and crashed runs get."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from comparisons import ERROR
from ewavit import EwavitError
from ewavit.cli import main
from ewavit.compare import compare as room
from ewavit.compare.arms import BUILT_IN, make_arms
from ewavit.compare.compare import compare
from ewavit.compare.engines import End, Kind, Processes
from ewavit.compare.reading import evaluated_epochs, latest_metric, read_run, without_other_data
from ewavit.compare.results import Run
from ewavit.compare.terminal import Screen
from ewavit.compare.tuning import Grids, best
from ewavit.compare.work import Work
from ewavit.tasks.judge import INSTANCE_IOU, TOP1
from ewavit.training.loop import train
from ewavit.training.processes import Interrupted
from ewavit.training.recipe import Recipe
from ewavit.training.report import write_summary
from ewavit.training.run_folder import RunFolder
from runs import TINY, stop_after

SMALL = {**TINY, "limit": 128, "holdout": 0.25, "workers": 0}
WILD = {"lr": 1e30, "warmup_epochs": 0}  # diverges at once


def words(settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def written(tmp_path, **content):
    file = tmp_path / "comparison.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


def same_end(one, other):
    first, second = (load_file(run / "model.safetensors") for run in (one, other))
    same = all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    return same and (one / "predictions.csv").read_text() == (other / "predictions.csv").read_text()


def results(folder):
    return list(csv.DictReader((folder / "results.csv").open()))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A comparison with two arms of equal settings and one that crashes: its folder, command and status."""
    place = tmp_path_factory.mktemp("a place with spaces")
    arms = {"dense": None, "ewa": None, "twin": {"share_rate": 0.3}, "wild": WILD}
    command = ["compare", "--config", written(place, **SMALL, arms=arms, seeds=2, jobs=2)]
    command += ["--output", str(place), "--name", "done"]
    return place / "done", command, main(command)


def test_arms_of_equal_settings_give_equal_bits_and_others_do_not(done):
    runs = done[0] / "runs"
    for seed in (42, 43):
        assert same_end(runs / f"ewa-{seed}", runs / f"twin-{seed}")
        assert not same_end(runs / f"ewa-{seed}", runs / f"dense-{seed}")
    assert not same_end(runs / "ewa-42", runs / "ewa-43")


def test_crashed_runs_are_listed_with_their_error_and_the_others_finish(done):
    folder, _, status = done
    assert status == 1
    errors = {(row["arm"], row["seed"]): row["error"] for row in results(folder)}
    assert len(errors) == 8
    for (arm, _), error in errors.items():
        assert ("lower --lr" in error) if arm == "wild" else error == ""
    found = json.loads((folder / "results.json").read_text())
    assert found["seeds"] == [42, 43]
    assert found["command"].startswith("ewavit compare --config")


def test_second_start_repeats_what_crashed_and_nothing_else(done, capsys):
    folder, command, _ = done
    models = {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/model.safetensors")}
    said = RunFolder(folder / "runs" / "wild-42").log.read_text()
    assert main(command) == 1
    assert {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/model.safetensors")} == models
    assert len(models) == 6
    again = RunFolder(folder / "runs" / "wild-42").log.read_text()
    assert again.startswith(said)
    assert again.count("lower --lr") == said.count("lower --lr") + 1
    printed = capsys.readouterr().out
    assert "failed: wild, seed 42" in printed
    assert str(folder / "report.html") in printed


def test_another_arm_and_seed_join_without_training_the_others_again(done):
    folder, command, _ = done
    before = (folder / "runs" / "dense-42" / "model.safetensors").stat().st_mtime_ns
    assert main([*command, "--arms", "dense,full", "--seeds", "3"]) == 0
    assert {(row["arm"], row["seed"]) for row in results(folder)} == {
        (arm, seed) for arm in ("dense", "full") for seed in ("42", "43", "44")
    }
    assert (folder / "runs" / "dense-42" / "model.safetensors").stat().st_mtime_ns == before
    assert set(yaml.safe_load((folder / "compare.yaml").read_text())["arms"]) == {
        "dense", "ewa", "twin", "wild", "full",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lr", "0.5"], ["--lr is 0.001 there and 0.5 here", "--name"]),
        (["--seed", "1"], ["--seed is 42 there and 1 here"]),
        (["--limit", "64"], ["--limit is 128 there and 64 here"]),
        (["--primary", "ewa:dense"], ["has runs, and its primary contrast is none, not ewa:dense"]),
    ],
)
def test_folder_of_another_recipe_is_refused_and_left_alone(done, capsys, more, said):
    folder, command, _ = done
    before = (folder / "compare.yaml").read_text()
    assert main([*command, *more]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert all(part in line for part in said)
    assert (folder / "compare.yaml").read_text() == before


def test_named_contrasts_judge_what_is_there_and_need_no_dense(done, tmp_path, capsys):
    content = dict(SMALL, arms={"twin": {"share_rate": 0.3}, "ewa": None}, seeds=2, contrasts={"twin": "ewa"})
    command = ["compare", "--config", written(tmp_path, **content), "--output", str(done[0].parent)]
    assert main([*command, "--name", "done"]) == 0
    assert "by named contrasts: whether twin helps against ewa cannot be told" in capsys.readouterr().out


def test_own_arm_that_changed_its_settings_is_refused(done, tmp_path):
    recipe = Recipe(**SMALL, output=str(done[0].parent), name="done")
    with pytest.raises(EwavitError, match=r"share_rate of arm twin is 0.3 there and 0.1 here"):
        compare(recipe, make_arms(["dense", "twin"], recipe, {"twin": {"share_rate": 0.1}}), 2)


def test_stopped_comparison_goes_on_and_a_half_done_run_ends_with_the_same_bits(
    tmp_path, monkeypatch, capsys
):
    arms = {"a-twin": {"share_rate": 0.3}, "dense": None, "ewa": None}  # two jobs: ewa is not begun
    config = written(tmp_path, **SMALL, arms=arms)
    command = ["compare", "--config", config, "--seeds", "2", "--output", str(tmp_path), "--name", "stopped"]
    with monkeypatch.context() as patch:
        patch.setattr(Screen, "show", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main([*command, "--jobs", "2"]) == 128 + signal.SIGTERM
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "go on with: ewavit compare --config" in line
    folder = tmp_path / "stopped"
    assert not (folder / "runs" / "ewa-42").exists()
    with monkeypatch.context() as patch:
        stop_after(patch, 3)  # of 2 x 3 updates: in the first epoch's last step
        with pytest.raises(Interrupted):
            train(Recipe(**SMALL, output=str(folder / "runs"), name="ewa-42"))
    assert main([*command, "--jobs", "1"]) == 0  # the number of threads stays that of the first start
    assert "resumed at epoch" in RunFolder(folder / "runs" / "ewa-42").log.read_text()
    assert same_end(folder / "runs" / "ewa-42", folder / "runs" / "a-twin-42")
    assert len(results(folder)) == 6


@pytest.mark.parametrize(
    ("arm", "flags"),
    [
        ("ewa-lr", ["--lrs", "3e-3,1e-7,1e30"]),
        ("ewa-tuned", ["--grid", "lr=3e-3,1e-7,1e30"]),
    ],
)
def test_tuned_arm_trains_with_the_settings_that_were_best_on_held_out_images(
    tmp_path, capsys, monkeypatch, arm, flags
):
    lrs = (1e-7, 3e-3, 1e30)  # the last one diverges
    settings = {**SMALL, "holdout": 0.0, "lr": 0.5, "seeds": 2, "jobs": 2, "epochs": 1}
    command = ["compare", *words(settings), "--arms", f"dense,{arm}", *flags]
    command += ["--output", str(tmp_path), "--name", "tuned"]
    if arm == "ewa-tuned":
        with monkeypatch.context() as patch:  # stopped while it tunes, it goes on
            patch.setattr(Screen, "show", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            assert main(command) == 128 + signal.SIGTERM
        assert not (tmp_path / "tuned" / "runs").exists()
    assert main(command) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "tuned" / "results.json").read_text())
    tuning, choice = found["tuning"], found["arms"][1]["choice"]
    assert {(one["arm"], one["tried"]["lr"], one["fold"]) for one in tuning} == {
        (arm, lr, fold) for lr in lrs for fold in (1, 2, 3, 4, 5)
    }
    assert all((one["top1"] is None) == (one["tried"]["lr"] == 1e30) for one in tuning)
    means = {lr: sum(one["top1"] for one in tuning if one["tried"]["lr"] == lr) for lr in lrs[:2]}
    best_lr = max(sorted(means), key=means.__getitem__)
    # every one of the 128 training images was held out once, by each candidate
    assert choice == {"settings": {"lr": best_lr}, "candidates": 3, "folds": 5, "readings": 128}
    sentence = (
        f"{arm} chose lr {best_lr:g}, the best of 3 by 128 readings on held-out data in 5 folds; fewer than"
    )
    assert sentence in said
    for seed in (42, 43):
        args = yaml.safe_load((tmp_path / "tuned" / "runs" / f"{arm}-{seed}" / "args.yaml").read_text())
        assert (args["lr"], args["holdout"]) == (best_lr, 0.0)
    args = yaml.safe_load(next((tmp_path / "tuned" / "tuning").glob("*/args.yaml")).read_text())
    assert args["holdout"] == 0.2
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("model.safetensors")}
    assert main(command) == 0  # a later start keeps the choice and trains nothing
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("model.safetensors")} == before
    assert json.loads((tmp_path / "tuned" / "results.json").read_text())["arms"][1]["choice"] == choice


def test_the_best_candidate_has_the_highest_mean_and_is_the_first_of_equals():
    assert best([[81, 81], [80, 82], [90, None]], TOP1) == 0
    assert best([[81, 81], [80, 83]], TOP1) == 1
    assert best([[None]], TOP1) is None


def test_the_best_candidate_by_an_error_has_the_lowest_mean():
    assert best([[81, 81], [80, 82], [9, None]], ERROR) == 0
    assert best([[81, 81], [80, 81]], ERROR) == 1
    assert best([[None], [None, 3]], ERROR) is None


def test_every_tuned_arm_tries_the_same_candidates_smallest_values_first():
    grids = Grids.parse([2e-3, 1e-3, 2e-3], ["lr=2e-3,1e-3", "drop-path=0.2,0", "epochs=50"])
    recipe = Recipe()
    arms = make_arms(["dense-tuned", "ewa-tuned", "ewa-lr"], recipe)
    grids.check(recipe, arms)
    tried = [{"lr": lr, "drop_path": rate, "epochs": 50} for lr in (1e-3, 2e-3) for rate in (0, 0.2)]
    assert grids.candidates(arms[0]) == grids.candidates(arms[1]) == tried
    assert grids.candidates(arms[2]) == [{"lr": 1e-3}, {"lr": 2e-3}]
    assert [arm.role for arm in arms] == ["control", "method", "method"]


def test_two_folds_are_enough_for_a_set_with_many_held_out_images(tmp_path, monkeypatch):
    recipe = Recipe(**TINY, output=str(tmp_path), name="x")
    (arm, _) = arms = make_arms(["dense-tuned", "ewa"], recipe)
    work = Work(recipe, arms, (42, 43), Grids(grid={"lr": (1e-3, 2e-3)}), 1, "ewavit compare")

    def folds():
        return [cell.recipe.fold for cell in work.tuning()]

    assert folds() == [0, 0, 1, 1]
    for readings, expected in ((250, 2), (249, 5), (None, 2)):
        for cell in work.tuning():
            cell.run.path.mkdir(parents=True, exist_ok=True)
            cell.run.model.touch()
            cell.run.predictions.touch()
        monkeypatch.setattr(Work, "found", lambda self, cell, n=readings: Run(42, samples=n))
        assert max(folds()) + 1 == expected
        shutil.rmtree(tmp_path / "x")
    assert arm.tuned


def test_killed_process_is_told_by_its_signal():
    engine = Processes(jobs=1, threads=1)
    recipe = Recipe(output="/nowhere", name="run")
    assert engine.start(recipe)
    assert not engine.start(recipe)  # no room
    engine.kill()
    (end,) = engine.ended(600)
    assert end.error == "killed by SIGKILL (out of memory?)"
    assert end.kind is Kind.FAILED
    assert engine.ended(600) == []


@pytest.mark.slow
def test_runs_end_with_the_comparison_that_started_them(tmp_path):
    arms = {"dense": None, "short": {"epochs": 1}, "shorter": {"epochs": 1}}
    config = written(tmp_path, **{**SMALL, "epochs": 100_000}, arms=arms)
    command = [sys.executable, "-m", "ewavit.cli", "compare", "--config", config, "--jobs", "2"]
    parent = subprocess.Popen(
        [*command, "--output", str(tmp_path), "--name", "killed"], stdout=subprocess.PIPE, text=True
    )
    for line in parent.stdout:
        if line.startswith("2 of"):  # the short runs, one after the other; the dense one takes for ever
            break
    parent.kill()
    parent.wait()
    run = tmp_path / "killed" / "runs" / "dense-42"
    # The log is locked to the end of the run.
    waiting = f"import fcntl; fcntl.flock(open({str(RunFolder(run).log)!r}), fcntl.LOCK_EX)"
    subprocess.run([sys.executable, "-c", waiting], check=True, timeout=120)
    assert (run / "checkpoint").is_dir()
    assert not (run / "model.safetensors").exists()


@pytest.mark.slow
def test_ray_gives_the_same_bits(done, tmp_path):
    ray = pytest.importorskip("ray")
    recipe = Recipe(**SMALL, output=str(tmp_path), name="ray")
    comparison = compare(recipe, make_arms(["dense", "ewa"], recipe), 2, jobs=2, ray="")
    assert not ray.is_initialized()
    assert [run.error for arm in comparison.arms for run in arm.runs] == [None] * 4
    for run in ("dense-42", "ewa-43"):
        assert same_end(tmp_path / "ray" / "runs" / run, done[0] / "runs" / run)


def refused(capsys, tmp_path, *arguments):
    """Run a comparison that must be refused; return its one line."""
    capsys.readouterr()
    assert main(["compare", *words(SMALL), "--output", str(tmp_path), "--name", "x", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "1"], ["--seeds 1", "2 or more"]),
        (["--seeds", "0"], ["--seeds 0 gives no interval", "2 or more"]),
        (["--seeds", ""], ["--seeds", "''"]),
        (["--arms", "dense,ewaa"], ["'ewaa'", "did you mean ewa", "switch-ema", "-lr"]),
        (["--arms", "ewa,rup"], ["dense is missing", "add it"]),
        (["--arms", "dense"], ["nothing to compare"]),
        (["--arms", "dense,dense-lr"], ["'dense-lr'", "--lrs"]),
        (["--arms", "dense,dense-lr", "--lrs", "1e-3,fast"], ["--lrs", "fast"]),
        (["--arms", "dense,dense-lr", "--lrs", "-1"], ["--lrs -1"]),
        (["--arms", "dense,dense-tuned"], ["'dense-tuned'", "--grid"]),
        (["--arms", "dense,half-tuned", "--grid", "epochs=1,2"], ["'half-tuned' sets epochs, which --grid"]),
        (["--arms", "dense,dense-tuned", "--grid", "drop_path=0,2"], ["'dense-tuned'", "--drop-path 2"]),
        (["--pilot", "0"], ["--pilot 0", "above 0"]),
        (["--pilot", "nan"], ["--pilot nan"]),
        (["--pilot", "much"], ["--pilot", "much"]),
        (["--pilot", "--arms", "dense,dense-lr", "--lrs", "1"], ["--pilot needs two arms"]),
        (
            ["--pilot", "--arms", "dense,dense-lr", "--lrs", "1", "--primary", "dense-lr:dense"],
            ["tuned self"],
        ),
        (["--arms", "dense,wise-ft"], ["'wise-ft' goes back to the first weights", "--pretrained"]),
        (["--grid", "lr"], ["--grid lr is no setting with numbers"]),
        (["--grid", "lr=1,fast"], ["--grid lr=1,fast is no setting with numbers"]),
        (["--grid", "lr=nan"], ["--grid lr=nan"]),
        (["--grid", "dropp_path=0"], ["--grid dropp_path=0", "did you mean drop_path"]),
        (["--grid", "limit=9"], ["--grid limit=9", "all arms share"]),
        (["--grid", "opt=1"], ["--opt is no number"]),
        (["--grid", "lr=1", "lr=2"], ["lr is there twice"]),
        (["--jobs", "0"], ["--jobs 0"]),
        (["--preset", "maxi"], ["maxi", "mini"]),
        (["--experts", "1"], ["'ewa'", "--experts"]),
        (["--model-ema"], ["model_ema", "ewa+ema"]),
        (["--arms", "dense,half", "--epochs", "1"], ["'half'", "--epochs 1", "2 or more"]),
        (["--resume", "x"], ["--resume"]),
        (["--data", "fashion-mnist-maxi"], ["fashion-mnist-maxi"]),
        (["--opt", "adamwwww"], ["adamwwww"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_input_gets_one_line_and_status_two(capsys, tmp_path, arguments, said):
    line = refused(capsys, tmp_path, *arguments)
    assert all(part in line for part in said), line
    assert not [file for file in tmp_path.rglob("*") if file.is_dir() and file.name.startswith("dense-")]


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ({"mine": {"share_rat": 0.1}}, ["'mine'", "'share_rat'", "did you mean share_rate"]),
        ({"mine": {"share_rate": 0.9}}, ["mine", "0.9", "0.75"]),
        ({"mine": {"epochs": "many"}}, ["mine", "--epochs", "many"]),
        ({"mine": {"holdout": 0.1}}, ["'mine'", "holdout", "share"]),
        ({"mine-lr": {"lr": 0.1}}, ["'mine-lr'", "lr"]),
        ({"mine": 3}, ["'mine'", "3"]),
        ({"../mine": {"ramp": 0}}, ["'../mine'", "letters"]),
        ({"ewa": {"ramp": 0}}, ["'ewa'", "built in"]),
        ({"mine": None}, ["unknown arm 'mine'"]),
        ({"mine": {"batch_size": 1000}}, ["'mine'", "--batch-size"]),
    ],
    ids=str,
)
def test_wrong_arms_are_named(capsys, tmp_path, arms, said):
    line = refused(capsys, tmp_path, "--config", written(tmp_path, arms={"dense": None, **arms}))
    assert all(part in line for part in said), line


def test_refused_settings_can_be_mended_under_the_same_name(capsys, tmp_path):
    assert "nowhere" in refused(capsys, tmp_path, "--data", "nowhere")
    assert "elsewhere" in refused(capsys, tmp_path, "--data", "elsewhere")


def test_folder_of_something_else_is_refused(capsys, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").touch()
    assert "is no comparison" in refused(capsys, tmp_path)
    assert os.listdir(tmp_path / "x") == ["thesis.tex"]


def test_missing_extra_is_named(capsys, tmp_path, monkeypatch):
    from ewavit.compare import arms

    monkeypatch.setattr(arms, "find_spec", lambda name: None)
    assert "pip install 'ewavit[compare]'" in refused(capsys, tmp_path)
    assert main(["compare", "--from", f"{tmp_path}/t.csv:a"]) == 2
    assert "pip install 'ewavit[compare]'" in capsys.readouterr().err


def test_full_disk_is_said_in_one_line_and_finished_runs_are_kept(done, capsys, monkeypatch):
    from ewavit.compare import report

    def full(comparison, folder):
        raise OSError(28, "No space left on device")

    folder, command, _ = done
    monkeypatch.setattr(report, "write_results", full)
    assert main([*command, "--arms", "dense,ewa"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "No space left on device" in line
    assert (folder / "runs" / "ewa-42" / "model.safetensors").exists()


def test_every_built_in_arm_fits_the_recipe_and_has_its_role():
    recipe = Recipe(experts=8, epochs=40)
    arms = {
        arm.name: arm for arm in make_arms([*BUILT_IN, "ewa+ema-lr", "mine-lr"], recipe, {"mine": {"lr": 1}})
    }
    controls = {"dense", "ema", "swa", "twa", "switch-ema", "wise-ft", "cca", "scheme"}
    controls |= {"half", "double", "drop-path", "mixup"}
    assert {name for name, arm in arms.items() if arm.role == "control"} == controls
    assert arms["full"].overrides["share_rate"] == 7 / 8
    assert arms["ewa+ema-lr"].tuned
    assert arms["ewa+ema-lr"].overrides == arms["ewa+ema"].overrides
    assert arms["mine-lr"].overrides == {}
    assert not arms["ewa"].tuned


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"epochs": 9}, [{"epochs": 4}, {"epochs": 18}, {"drop_path": 0.2}, {"mixup": 0.2}]),
        (
            {"epochs": 2, "drop_path": 0.2, "mixup": 0.8},
            [{"epochs": 1}, {"epochs": 4}, {"drop_path": 0.3}, {"mixup": 1.6}],
        ),
    ],
    ids=["plain", "regularised"],
)
def test_ordinary_controls_differ_from_dense_whatever_the_recipe_has(given, expected):
    recipe = Recipe(**given)
    arms = make_arms(["half", "double", "drop-path", "mixup"], recipe)
    assert [arm.overrides for arm in arms] == [{"experts": 1} | overrides for overrides in expected]
    assert all(arm.role == "control" for arm in arms)


def test_presets_are_whole_comparisons():
    from ewavit.cli.compare import OWN, comparison_yaml, presets

    for file in presets().values():
        own = {}
        given = comparison_yaml(file, "--preset", own)
        recipe = Recipe(**{name: given[name] for name in given.keys() - OWN})
        assert len(make_arms(given["arms"], recipe, own)) > 1
        assert given["seeds"] >= 3


@pytest.mark.parametrize(
    ("flags", "subset"), [([], (20, True, True)), (["--data", "PATH"], (None, False, False))], ids=str
)
def test_the_preset_for_few_images_draws_of_the_bundled_set_and_takes_all_of_others(
    tmp_path, monkeypatch, capsys, flags, subset
):
    command = ["compare", "--preset", "few-images", "--output", str(tmp_path), *flags]
    assert main(command) == 2
    assert "'wise-ft' goes back to the first weights" in capsys.readouterr().err

    def refuse(recipe, *_, **__):
        raise EwavitError(str((recipe.shots, recipe.resample, recipe.test_on_rest)))

    monkeypatch.setattr(room, "compare", refuse)
    assert main([*command, "--initial-checkpoint", "W"]) == 2
    assert str(subset) in capsys.readouterr().err


def test_help_names_every_built_in_arm(capsys):
    assert main(["compare", "--help"]) == 0
    said = re.split(r"[\s,]+", capsys.readouterr().out)
    assert set(BUILT_IN) <= set(said)


@pytest.mark.parametrize(("data", "kind"), [("solids", "clouds"), ("fashion-mnist-mini", "images")])
def test_a_comparison_calls_its_data_what_they_are(tmp_path, data, kind):
    recipe = Recipe(data=data, limit=100, holdout=0.2, output=str(tmp_path), name="x")
    arms = make_arms(["dense", "ewa"], recipe)
    found = Work(recipe, arms, (0, 1), Grids(), 1, "ewavit compare").comparison()
    assert found.kind == kind
    assert found.judge == TOP1
    assert found.data == f"the first 100 training {kind} of {data}, by held-out training {kind},"


def test_part_segmentation_is_judged_by_its_instance_iou(tmp_path):
    recipe = Recipe(data="shapenetpart:PATH", num_points=64, output=str(tmp_path), name="x")
    found = Work(recipe, make_arms(["dense", "ewa"], recipe), (0, 1), Grids(), 1, "ewavit compare")
    assert (found.comparison().judge, found.comparison().kind) == (INSTANCE_IOU, "clouds")


def test_a_run_is_judged_by_its_averaged_weights_where_it_has_them(tmp_path):
    run = RunFolder(tmp_path)
    facts = {"epoch": 0, "images": 9, "seconds": 1, "train_loss": 2, "lr": 1e-3, "share_rate": 0}
    facts |= {"peak_memory_mib": 1, "eval_loss": 3, "eval_top1": 50, "eval_chamfer": 7}
    run.predictions.write_text("label,prediction\n" + "0,0\n0,1\n" * 5)
    write_summary([facts], run.summary)
    assert read_run(run, 0, TOP1).metric == latest_metric(run, TOP1) == 50
    assert read_run(run, 0, ERROR).metric == latest_metric(run, ERROR) == 7
    assert (read_run(run, 0, TOP1).samples, read_run(run, 0, ERROR).samples) == (10, None)
    write_summary([facts | {"average_loss": 4, "average_top1": 60}], run.summary)
    run.predictions.write_text("label,prediction\n" + "0,0\n0,0\n1,1\n0,1\n0,1\n" * 2)
    read = read_run(run, 0, TOP1)
    assert (read.metric, latest_metric(run, TOP1), read.curve[0].eval_loss) == (60, 60, 4)
    with pytest.raises(EwavitError, match="no average_chamfer"):  # never the raw weights in place of them
        read_run(run, 0, ERROR)


# --- damaged runs

LAST = -1


def in_rows(file, change):
    """Rewrite a CSV file after `change(rows)`, a list of dicts."""
    with file.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    names = list(rows[0])
    change(rows)
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, names)
        writer.writeheader()
        writer.writerows(rows)


def cell(column, value, row=LAST):
    """Set one value of a run's summary."""
    return lambda run: in_rows(run.summary, lambda rows: rows[row].update({column: value}))


def cut(file, share=0.5):
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def one_more_right(run):
    def change(rows):
        wrong = next(row for row in rows if row["label"] != row["prediction"])
        wrong["prediction"] = wrong["label"]

    in_rows(run.predictions, change)


def predicted(column, value):
    def change(rows):
        row = next(row for row in rows if row["label"] != row["prediction"])
        row[column] = value

    return lambda run: in_rows(run.predictions, change)


def encoded(encoding):
    return lambda run: run.summary.write_text(run.summary.read_text(), encoding)


def in_place(name, make):
    """Put something else in the place of a file."""

    def change(run):
        getattr(run, name).unlink()
        make(getattr(run, name))

    return change


def carded(text):
    """Write another card into the model's file."""
    return lambda run: save_file(load_file(run.model), run.model, {"ewavit": text})


DAMAGES = {
    "bytes": (lambda run: run.summary.write_bytes(b"\xff\x00" * 50), "summary.csv", "decode"),
    "empty": (lambda run: run.summary.write_text(""), "summary.csv", "it has no rows"),
    "missing": (lambda run: run.summary.unlink(), "summary.csv", "it is missing"),
    "header": (lambda run: cut(run.summary, 0.05), "summary.csv", "it has no rows"),
    "cut": (lambda run: cut(run.summary, 0.8), "summary.csv", "another number of values"),
    "last row": (
        lambda run: in_rows(run.summary, lambda rows: rows.pop()),
        "summary.csv",
        "no row of epoch 1",
    ),
    "first row": (
        lambda run: in_rows(run.summary, lambda rows: rows.pop(0)),
        "summary.csv",
        "no row of epoch 0",
    ),
    "a row twice": (
        lambda run: in_rows(run.summary, lambda rows: rows.append(rows[1])),
        "summary.csv",
        "follows",
    ),
    "500 %": (cell("eval_top1", "500"), "summary.csv", "eval_top1 is 500 in epoch 1, possible is 0 to 100"),
    "500 % before": (cell("eval_top1", "500", 0), "summary.csv", "eval_top1 is 500 in epoch 0"),
    "below 0 %": (cell("eval_top1", "-1"), "summary.csv", "eval_top1 is -1"),
    "nan": (cell("eval_top1", "nan"), "summary.csv", "eval_top1 is nan"),
    "a word": (cell("eval_top1", "good"), "summary.csv", "eval_top1 is 'good' in epoch 1, not a number"),
    "negative loss": (cell("eval_loss", "-0.5"), "summary.csv", "eval_loss is -0.5"),
    "nan loss": (cell("train_loss", "nan", 0), "summary.csv", "train_loss is nan"),
    "no loss": (cell("eval_loss", ""), "summary.csv", "eval_loss is ''"),
    "infinite time": (cell("seconds", "inf"), "summary.csv", "seconds is inf"),
    "another learning rate": (cell("lr", "0.123", 0), "summary.csv", "differs from its digest"),
    "another metric": (cell("eval_top1", "99.0"), "summary.csv", "the model's file says"),
    "one more right": (one_more_right, "predictions.csv", "the summary's top-1 is"),
    "a word predicted": (predicted("prediction", "cat"), "predictions.csv", "'cat'"),
    "huge": (predicted("prediction", "9" * 30), "predictions.csv", "too large"),
    "prediction": (predicted("prediction", "10"), "predictions.csv", "prediction 10 is out of range"),
    "label": (predicted("label", "-1"), "predictions.csv", "label -1 is out of range"),
    "no predictions": (lambda run: cut(run.predictions, 0.0), "predictions.csv", "it has no rows"),
    "half": (lambda run: cut(run.predictions), "predictions.csv", ""),
    "column": (
        lambda run: run.predictions.write_text(run.predictions.read_text().replace("label", "truth")),
        "predictions.csv",
        "it has no column label",
    ),
    "model": (lambda run: cut(run.model), "model.safetensors", ""),
    "UTF-16": (encoded("utf-16"), "summary.csv", "decode"),
    "byte order mark": (encoded("utf-8-sig"), "summary.csv", "it has no column epoch"),
    "Latin-1": (
        lambda run: run.predictions.write_bytes(
            run.predictions.read_bytes().replace(b"T-shirt", b"T-sh\xefrt")
        ),
        "predictions.csv",
        "decode",
    ),
    "NUL": (lambda run: run.summary.write_bytes(b"epoch,\0\n0,\0\n"), "summary.csv", ""),
    "a huge cell": (cell("eval_top1", "1" * 200_000), "summary.csv", "field larger"),
    "an open quote": (cell("eval_top1", '"'), "summary.csv", ""),
    "half an epoch": (cell("epoch", "0.5", 0), "summary.csv", "epoch is 0.5, not a whole number"),
    "part of an image": (cell("images", "0.5", 0), "summary.csv", "images is 0.5 in epoch 0, possible is 1"),
    "negative spread": (cell("spread/blocks.1.mlp", "-1"), "summary.csv", "spread/blocks.1.mlp is -1"),
    "nan spread": (cell("spread/blocks.1.mlp", "nan", 0), "summary.csv", "spread/blocks.1.mlp is nan"),
    "infinite prediction": (cell("predicted_spread", "inf"), "summary.csv", "predicted_spread is inf"),
    "a share of 2": (cell("share_rate", "2"), "summary.csv", "share_rate is 2"),
    "folder": (in_place("summary", Path.mkdir), "summary.csv", "it is a folder, not a file"),
    "pipe": (in_place("predictions", os.mkfifo), "predictions.csv", "it is a named pipe, not a file"),
    "device": (
        in_place("predictions", lambda file: file.symlink_to("/dev/zero")),
        "predictions.csv",
        "it is a device, not a file",
    ),
    "loop": (in_place("summary", lambda file: file.symlink_to(file.name)), "summary.csv", ""),
    "rows twice": (
        lambda run: in_rows(run.predictions, lambda rows: rows.extend(list(rows))),
        "predictions.csv",
        "rows are missing or there twice",
    ),
    "a right row less": (
        lambda run: in_rows(run.predictions, lambda rows: rows.pop(3)),
        "predictions.csv",
        "rows are missing or there twice",
    ),
    "deep card": (carded("[" * 100_000), "model.safetensors", "recursion"),
    "card of a list": (carded("[]"), "model.safetensors", ""),
    "card of other types": (carded('{"classes": 3}'), "model.safetensors", ""),
    "card of no JSON": (carded("{"), "model.safetensors", ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_refused_with_its_file_and_what_is_wrong(done, tmp_path, damage):
    change, file, said = DAMAGES[damage]
    run = RunFolder(tmp_path / "ewa-42")
    shutil.copytree(done[0] / "runs" / "ewa-42", run.path)
    assert read_run(run, 42, TOP1, (0, 1)).samples == 32
    change(run)
    with pytest.raises(EwavitError) as caught:
        read_run(run, 42, TOP1, (0, 1))
    message = str(caught.value)
    assert message.startswith(f"{file} is damaged: ")
    assert said in message
    assert message.endswith(f"; delete the run's folder {run.path} to train it again")


def test_a_few_predictions_of_thousands_may_differ_in_a_second_evaluation(tmp_path):
    run = RunFolder(tmp_path)
    facts = {"epoch": 0, "images": 9, "seconds": 1, "train_loss": 2, "lr": 1e-3, "share_rate": 0}
    write_summary([facts | {"peak_memory_mib": 1, "eval_loss": 3, "eval_top1": 50.0}], run.summary)
    for right, refused in ((1001, False), (1002, False), (1003, True)):
        run.predictions.write_text("label,prediction\n" + "0,0\n" * right + "0,1\n" * (2000 - right))
        if refused:
            with pytest.raises(
                EwavitError, match=r"1003 of its 2,000 predictions are right, that is 50.15 %"
            ):
                read_run(run, 0, TOP1)
        else:
            assert read_run(run, 0, TOP1).metric == 50.0


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_table_of_runs_is_drawn_whatever_a_run_holds_that_goes_on(done, tmp_path, damage):
    recipe = Recipe(**SMALL, output=str(tmp_path), name="table")
    work = Work(recipe, make_arms(["dense", "ewa"], recipe), (42,), Grids(), 1, "ewavit compare")
    going = work.final()[1]
    shutil.copytree(done[0] / "runs" / "ewa-42", going.run.path)
    DAMAGES[damage][0](going.run)
    going.run.model.unlink()
    for running in (True, False):
        assert isinstance(Screen(work.final(), work)._state(going, running), str)


RANDOM = st.one_of(
    st.sampled_from(["", "nan", "-1", "1e999", "500", "0.5", "x", "\0", '"', ",", "\n", "1e400", "=1"]),
    st.text(max_size=5),
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_run_is_read_or_named_whatever_its_tables_hold(done, tmp_path, data):
    sound, run = RunFolder(done[0] / "runs" / "ewa-42"), RunFolder(tmp_path)
    for name in ("summary.csv", "predictions.csv", "model.safetensors"):
        shutil.copyfile(sound.path / name, run.path / name)
    file = data.draw(st.sampled_from([run.summary, run.predictions]))
    found = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(found)))
        end = data.draw(st.integers(place, min(len(found), place + 30)))
        found[place:end] = data.draw(RANDOM).encode()
    file.write_bytes(found)
    try:
        read = read_run(run, 42, TOP1, (0, 1))
    except EwavitError as problem:
        named = file.name in str(problem) and "\n" not in str(problem)
        assert named, problem  # noqa: PT017
    else:
        assert 0 <= read.metric <= 100
        assert read.samples == len(read.predictions)
    run.last_row()


WRONG_SETTINGS = {
    "no YAML": ("a: [", None),
    "deep": ("[" * 100_000, None),
    "bytes": (b"\xff\xfe\x00", None),
    "a date": ("a: 2001-99-99", None),
    "a list": ("[]", "it holds no settings"),
    "nothing": ("", "it holds no settings"),
    "no arms": ({"arms": None}, "its arms cannot be 'None'"),
    "arms of text": ({"arms": "dense"}, "its arms"),
    "an arm of text": ({"arms": {"dense": "x"}}, "its arms"),
    "recipe of text": ({"recipe": "x"}, "its recipe"),
    "recipe of a list": ({"recipe": []}, "its recipe"),
    "unknown setting": ({"recipe": {"epocs": 3}}, "unknown settings epocs"),
    "setting of another type": ({"recipe": {"epochs": "many"}}, "epochs"),
    "setting of a list": ({"recipe": {"data": [1]}}, "data"),
    "threads of text": ({"threads": "many"}, "its threads cannot be 'many'"),
    "no thread": ({"threads": 0}, "its threads"),
    "many threads": ({"threads": 10**9}, "its threads"),
    "true threads": ({"threads": True}, "its threads"),
    "device": ({"device": 3}, "its device"),
    "machines of text": ({"machines": "cpu"}, "its machines"),
    "lrs of text": ({"lrs": "1e-3"}, "its lrs"),
    "negative lr": ({"lrs": [-1]}, "its lrs"),
    "chosen list": ({"chosen": [1]}, "its chosen"),
    "chosen text": ({"chosen": {"ewa-lr": "fast"}}, "its chosen"),
    "chosen nan": ({"chosen": {"ewa-lr": math.nan}}, "its chosen"),
    "chosen half": ({"chosen": {"ewa-lr": {"settings": {"lr": 0.1}}}}, "its chosen"),
    "chosen unknown": (
        {"chosen": {"ewa-lr": {"settings": {"rate": 0.1}, "candidates": 2, "folds": 2, "readings": 9}}},
        "its chosen",
    ),
    "grid text": ({"grid": {"lr": "fast"}}, "its grid"),
    "grid unknown": ({"grid": {"rate": [0.1]}}, "its grid"),
}


@pytest.mark.parametrize("wrong", WRONG_SETTINGS)
def test_edited_settings_of_a_comparison_are_named_and_nothing_is_lost(copied, capsys, wrong):
    folder, command = copied
    change, said = WRONG_SETTINGS[wrong]
    file = folder / "compare.yaml"
    if isinstance(change, dict):
        change = yaml.safe_dump(yaml.safe_load(file.read_text()) | change)
    file.write_bytes(change if isinstance(change, bytes) else change.encode())
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    assert main(command) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "compare.yaml" in line
    assert (said or "compare.yaml cannot be read") in line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("name", ["results.csv", "results.json", "report.html"])
def test_results_are_written_again_over_whatever_is_there(copied, capsys, name):
    folder, command = copied
    for make in (lambda file: file.write_bytes(b"\xff"), os.mkfifo, Path.mkdir):
        with suppress(FileNotFoundError):
            (folder / name).unlink()
        make(folder / name)
        capsys.readouterr()
        status = main(command)
        if (folder / name).is_dir():
            line = capsys.readouterr().err
            assert status == 2
            assert line.count("\n") == 1
            assert "Is a directory" in line
        else:
            assert status == 0
            assert (folder / name).is_file()
            assert len(results(folder)) == 6


@pytest.fixture
def copied(done, tmp_path):
    """A copy of the finished comparison, and the command that goes on with its sound arms."""
    shutil.copytree(done[0], tmp_path / "done")
    return tmp_path / "done", [*done[1], "--output", str(tmp_path), "--arms", "dense,ewa,twin"]


def test_a_damaged_run_is_named_and_the_others_count(copied, capsys):
    folder, command = copied
    damaged = RunFolder(folder / "runs" / "ewa-42")
    cell("eval_top1", "500")(damaged)
    capsys.readouterr()
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "failed: ewa, seed 42: summary.csv is damaged: eval_top1 is 500" in said
    assert f"delete the run's folder {damaged.path} to train it again" in said
    found = {(row["arm"], row["seed"]): row for row in results(folder)}
    assert [key for key, row in found.items() if row["error"]] == [("ewa", "42")]
    assert [key for key, row in found.items() if not row["top1"]] == [("ewa", "42")]
    assert "summary.csv is damaged" in found["ewa", "42"]["error"]
    pairs = json.loads((folder / "results.json").read_text())["statistics"]["against"]["dense"]
    assert {pair["arm"]: pair["seeds"] for pair in pairs} == {"ewa": [43], "twin": [42, 43]}
    assert "summary.csv is damaged" in (folder / "report.html").read_text()
    shutil.rmtree(damaged.path)
    assert main(command) == 0
    assert same_end(damaged.path, folder / "runs" / "twin-42")


def test_the_table_of_runs_marks_a_damaged_one(done, tmp_path):
    recipe = Recipe(**SMALL, output=str(tmp_path), name="table")
    work = Work(recipe, make_arms(["dense", "ewa"], recipe), (42, 43), Grids(), 1, "ewavit compare")
    for one in work.final():
        shutil.copytree(done[0] / "runs" / one.run.path.name, one.run.path)
    cells = work.final()
    cell("eval_top1", "500")(cells[0].run)
    states = [Screen(cells, work)._state(one, False) for one in cells]
    assert states[0] == "[red]damaged[/]"
    assert all(state.startswith("[green]") for state in states[1:])
    cut(cells[0].run.summary, 0.7)
    cells[0].run.model.unlink()  # a run that goes on
    assert Screen(cells, work)._state(cells[0], True).strip().endswith("%")


def test_a_run_with_other_labels_than_most_is_named(copied, capsys):
    folder, command = copied

    def drop_a_right_one(rows):
        rows.remove(next(row for row in rows if row["label"] == row["prediction"]))

    def sort_labels(rows):
        rows.sort(key=lambda row: row["label"])
        for number, row in enumerate(rows):
            row["input"] = number

    run = RunFolder(folder / "runs" / "twin-43")
    run.digests.unlink()  # as of version 0.1.0
    in_rows(run.predictions, sort_labels)
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "failed: twin, seed 43: predictions.csv is damaged: its 32 labels are not those" in said
    assert sum("failed:" in line for line in said.splitlines()) == 1
    in_rows(run.predictions, drop_a_right_one)
    assert main(command) == 1
    assert "failed: twin, seed 43: predictions.csv is damaged: " in capsys.readouterr().out


def test_without_most_labels_no_run_counts():
    one, other = (np.array([0, 1, label]) for label in (0, 1))
    runs = {
        RunFolder(Path(f"{i}")): Run(i, labels=labels) for i, labels in enumerate((one, one, other, other))
    }
    assert all(run.error for run in without_other_data(runs).values())
    runs[RunFolder(Path("4"))] = Run(4, labels=one)
    assert [run.error is None for run in without_other_data(runs).values()] == [
        True,
        True,
        False,
        False,
        True,
    ]
    runs = {RunFolder(Path("0")): Run(0, labels=one), RunFolder(Path("1")): Run(1, error="x")}
    assert without_other_data(runs) == runs


def test_a_damaged_tuning_run_leaves_its_arm_without_settings(done, tmp_path):
    recipe = Recipe(**SMALL, output=str(tmp_path), name="tuned")
    arms = make_arms(["dense", "ewa-lr"], recipe)
    work = Work(recipe, arms, (42, 43), Grids((1e-3, 2e-3)), 1, "ewavit compare")
    for _ in ("the first folds", "the others"):
        for cell_ in work.tuning():
            shutil.copytree(done[0] / "runs" / "ewa-42", cell_.run.path, dirs_exist_ok=True)
    broken = work.tuning()[1].run
    cell("eval_top1", "500")(broken)
    work.choose()
    assert work.chosen == {}
    said = f"nothing chosen yet: tuning run {broken.path.name}: summary.csv is damaged"
    assert said in work.untuned["ewa-lr"]
    errors = [run.error for run in work.comparison().arms[1].runs]
    assert errors == [work.untuned["ewa-lr"]] * 2
    shutil.copy(done[0] / "runs" / "ewa-42" / "summary.csv", broken.summary)
    work.choose()
    assert {arm: choice.settings for arm, choice in work.chosen.items()} == {"ewa-lr": {"lr": 1e-3}}


@pytest.mark.parametrize(("interval", "epochs"), [(1, (0, 1, 2, 3, 4)), (2, (1, 3, 4)), (5, (4,)), (9, (4,))])
def test_the_last_epoch_is_always_evaluated(interval, epochs):
    assert evaluated_epochs(Recipe(epochs=5, val_interval=interval, warmup_epochs=0)) == epochs


# --- how runs end


def ended(recipe):
    """How a run ends in a process of its own."""
    engine = Processes(jobs=1, threads=1)
    assert engine.start(recipe)
    (end,) = engine.ended(600)
    return end


def test_the_end_of_a_run_has_a_kind_whatever_its_folder_holds(tmp_path):
    recipe = Recipe(**SMALL, output=str(tmp_path), name="run")
    end = ended(replace(recipe, data="nowhere"))
    assert (end.kind, "nowhere" in end.error) == (Kind.REFUSED, True)
    assert not (tmp_path / "run").exists()
    end = ended(replace(recipe, **WILD))
    assert (end.kind, "not finite" in end.error or "the loss is" in end.error) == (Kind.DIVERGED, True)
    assert (tmp_path / "run").exists()
    assert ended(replace(recipe, data="nowhere")).kind is Kind.REFUSED  # the folder has no checkpoint
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    end = ended(recipe)
    assert (end.kind, "no whole checkpoint" in end.error) == (Kind.FAILED, True)
    shutil.rmtree(tmp_path / "run")
    assert ended(replace(recipe, epochs=1)) == End(replace(recipe, epochs=1), Kind.DONE)
