"""What a pilot says before a comparison: its cost, and how many seeds it needs."""

import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest

from comparisons import make_comparison
from ewavit import EwavitError
from ewavit.cli import main
from ewavit.compare.arms import make_arms
from ewavit.compare.contrasts import Contrasts
from ewavit.compare.differences import seeds_needed
from ewavit.compare.pilot import Plan, forecast
from ewavit.compare.tuning import Grids
from ewavit.training.recipe import Recipe
from ewavit.training.run_folder import RunFolder
from runs import TINY

SECONDS = {"dense": 10, "ewa": 16}  # of a run


def made(tmp_path, arms=("dense", "ewa"), own=None, grid=None, contrasts=None, seeds=5, detect=0.5):
    """A plan, and its pilot with runs that took SECONDS."""
    recipe = Recipe(epochs=8, output=str(tmp_path), name="x")
    plan = Plan(
        recipe,
        make_arms(arms, recipe, own),
        Grids(grid=grid or {}),
        contrasts or Contrasts(),
        seeds,
        2,
        detect,
    )
    found = make_comparison(("dense", "ewa"), seeds=3, epochs=8)
    pilot = replace(found, name=plan.pilot()[0].name)
    for arm, seconds in SECONDS.items():
        for seed in pilot.seeds:
            run = RunFolder(tmp_path / "x-pilot" / "runs" / f"{arm}-{seed}")
            run.path.mkdir(parents=True)
            for file in (run.args, run.predictions, run.model):
                file.touch()
            os.utime(
                run.model, (0, os.stat(run.args).st_mtime + seconds + 100 * (seed == 2))
            )  # one was stopped
    return plan, pilot


def test_the_cost_is_that_of_every_run_in_its_own_epochs(tmp_path):
    grid = {"epochs": (4, 8)}
    plan, pilot = made(tmp_path, ["dense", "double", "ewa", "dense-tuned", "ewa-tuned"], grid=grid)
    found = forecast(plan, pilot)
    tuning = 5 * (10 / 2 + 10 + 16 / 2 + 16)
    final = 5 * (10 + 20 + 16 + 10 + 16)
    assert (found.runs, found.tuning_runs) == (45, 20)
    assert found.hours * 3600 * 2 == pytest.approx(tuning + final, rel=1e-3)
    assert found.seconds_per_run == pytest.approx((tuning + final) / 45, rel=1e-3)


def test_the_seeds_follow_from_the_spread_and_not_from_the_difference(tmp_path):
    plan, pilot = made(tmp_path, detect=0.05)
    found = forecast(plan, pilot)
    dense, ewa = ([run.metric for run in arm.runs] for arm in pilot.arms)
    assert found.sd == pytest.approx(np.std(np.subtract(ewa, dense), ddof=1))
    assert found.seeds_to_tell == seeds_needed(0.05, found.sd)
    assert found.safe_seeds == seeds_needed(0.05, found.sd_bound) > found.seeds_to_tell
    assert (
        seeds_needed(found.told * 1.001, found.sd) <= plan.seeds < seeds_needed(found.told * 0.999, found.sd)
    )
    shifted = replace(pilot.arms[1], runs=tuple(_better(run) for run in pilot.arms[1].runs))
    other = forecast(plan, replace(pilot, arms=(pilot.arms[0], shifted)))
    assert other.sd == pytest.approx(found.sd)
    assert (other.seeds_to_tell, other.safe_seeds) == (found.seeds_to_tell, found.safe_seeds)
    assert forecast(replace(plan, detect=5.0), pilot).seeds_to_tell < found.seeds_to_tell


def _better(run):
    """The same run with five more points of accuracy."""
    last = replace(run.curve[-1], metric=run.metric + 5)
    return replace(run, curve=(*run.curve[:-1], last))


@pytest.mark.parametrize("spread", [1.0, 0.3])
def test_the_bound_of_the_spread_holds_as_often_as_it_says(spread):
    from scipy import stats

    draws = np.random.default_rng(0).normal(0, spread, (4000, 3))
    bounds = np.std(draws, axis=1, ddof=1) * np.sqrt(2 / stats.chi2.ppf(0.2, 2))
    assert 0.78 < np.mean(bounds > spread) < 0.82


@pytest.mark.parametrize(
    ("arms", "contrasts", "pair"),
    [
        (["dense", "ema", "ewa", "rup"], Contrasts(), ("ewa", "dense")),
        (["dense", "dense-lr", "ema"], Contrasts(), ("ema", "dense")),
        (["dense-lr", "ema", "ewa-lr"], Contrasts("dense-lr"), ("ewa", "dense")),
        (["dense", "ema", "moe", "moe+ewa"], Contrasts(primary=("moe+ewa", "moe")), ("moe+ewa", "moe")),
    ],
)
def test_the_pilot_trains_what_will_be_judged(tmp_path, arms, contrasts, pair):
    recipe = Recipe(output=str(tmp_path), name="x")
    plan = Plan(recipe, make_arms(arms, recipe), Grids(), contrasts, 5, 1, 0.5)
    piloted, trained, saved, seeds = plan.pilot()
    assert tuple(arm.name for arm in trained) == pair
    assert not any(arm.tuned for arm in trained)
    assert (piloted.name, saved.reference, seeds) == ("x-pilot", pair[1], 3)


def test_a_pilot_of_failed_runs_is_refused(tmp_path):
    plan, pilot = made(tmp_path)
    failed = make_comparison(("dense", "ewa"), 3, 8, failed={("ewa", s): "no memory" for s in (0, 2)})
    with pytest.raises(EwavitError, match="two seeds that both arms finished: no memory"):
        forecast(plan, replace(failed, name=pilot.name))


def test_pilot_from_the_command_line(tmp_path, capsys):
    settings = {
        **TINY,
        "limit": 64,
        "holdout": 0.5,
        "workers": 0,
        "epochs": 1,
        "output": tmp_path,
        "name": "x",
    }
    command = ["compare", *(f"--{name.replace('_', '-')}={value}" for name, value in settings.items())]
    command += ["--arms", "dense,ema,ewa", "--seeds", "10", "--pilot", "5", "--jobs", "2"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "pilot: ewa and dense, 3 seeds\ncost: 30 runs, " in said
    assert re.search(r"\nseeds: .+ would tell 5 points, .+ the 10 planned would tell", said)
    assert not (tmp_path / "x").exists()
    assert len(list((tmp_path / "x-pilot" / "runs").glob("*/model.safetensors"))) == 6
    assert main([*command, "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["arms"] == ["ewa", "dense"]
