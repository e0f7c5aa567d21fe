"""`ewavit train` in several processes: replicas, a killed process, the restart by torchrun."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ewavit as ewa
from ewavit.training import loop
from ewavit.training.checkpoint import load_checkpoint
from ewavit.training.export import evaluate, export
from ewavit.training.processes import Interrupted
from ewavit.training.recipe import Recipe
from processes import in_processes
from runs import TINY, assert_same_end, raise_after, stop_after
from stripes import write_folder

SETTINGS = {**TINY, "placement": "replicas", "recovery_interval": 2, "share_rate": 0.2, "clip_grad": 0.5}


def recipe(folder, name, **settings):
    return Recipe(**{**SETTINGS, **settings}, output=str(folder), name=name)


def train(folder, name, settings=()):
    loop.train(recipe(folder, name, **dict(settings)))


def stopped_after(updates, folder, name, settings):
    """Train until an error in every process."""
    with pytest.MonkeyPatch.context() as patch:
        raise_after(patch, updates, KeyError)
        with pytest.raises(KeyError):
            train(folder, name, settings)


def interrupted(rank, at, folder, name):
    """Train with a signal to one process, after an optimizer step or at the first batch of an evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        if at == "evaluation" and int(os.environ["RANK"]) == rank:
            signal_at_first_batch(patch)
        elif int(os.environ["RANK"]) == rank:
            stop_after(patch, at)
        with pytest.raises(Interrupted) as stopped:
            train(folder, name)
    assert stopped.value.exit_status == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def signal_at_first_batch(patch):
    original = loop.evaluate_batches

    def evaluate_batches(predict, batches, meter):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(predict, batches, meter)

    patch.setattr(loop, "evaluate_batches", evaluate_batches)


def resume(folder, name):
    loop.resume(Path(folder) / name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two replicas that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs")
    in_processes(2, train, str(folder), "whole")
    return folder / "whole"


def test_a_run_of_replicas_leaves_a_plain_model_and_every_expert(whole, tmp_path):
    (*_, row) = csv.DictReader((whole / "summary.csv").open())
    assert float(row["expert_spread"]) > 1e-3
    checkpoint = load_checkpoint(whole)
    assert checkpoint.facts["recipe"]["experts"] == checkpoint.facts["processes"] == 2
    experts = checkpoint.model["blocks.1.mlp.experts.ffn.fc1.weight"]
    assert experts.shape == (2, 128, 32)
    assert not torch.equal(experts[0], experts[1])
    moments = [values["exp_avg"] for values in checkpoint.training["optimizer"]["state"].values()]
    (of_fc1,) = [moment for moment in moments if moment.shape == experts.shape]
    assert not torch.equal(of_fc1[0], of_fc1[1])
    plain = load_file(whole / "model.safetensors")
    assert torch.allclose(plain["blocks.1.mlp.fc1.weight"], experts.mean(0), atol=1e-7)
    for source in (whole, whole / "checkpoint"):
        assert evaluate(source)["top1"] == pytest.approx(float(row["eval_top1"]), abs=0.05)
    assert f"top-1 {float(row['eval_top1']):.2f} %" in export(whole, tmp_path / "plain.safetensors")


def test_a_run_of_replicas_resumes_exactly_with_a_moving_average(tmp_path):
    settings = {"model_ema": True, "model_ema_decay": 0.5, "epochs": 1}
    in_processes(2, train, str(tmp_path), "whole", settings)
    in_processes(2, stopped_after, 3, str(tmp_path), "parts", settings)
    in_processes(2, resume, str(tmp_path), "parts")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    averages = [load_file(tmp_path / name / "model-average.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(averages[0][key], averages[1][key]) for key in averages[0])


@pytest.mark.parametrize(("rank", "at", "stops_after"), [(1, 5, 6), (1, "evaluation", 4), (0, 4, 4)])
def test_a_signal_to_one_process_stops_all_after_the_same_step_and_the_run_goes_on_exactly(
    whole, tmp_path, rank, at, stops_after
):
    in_processes(2, interrupted, rank, at, str(tmp_path), "stopped")
    assert load_checkpoint(tmp_path / "stopped").facts["progress"]["update"] == stops_after
    assert not (tmp_path / "stopped/model.safetensors").exists()
    in_processes(2, resume, str(tmp_path), "stopped")
    assert_same_end(whole, tmp_path / "stopped")


def torchrun(restarts, folder, name, script="killed_process.py", settings=SETTINGS):
    words = {**settings, "output": str(folder), "name": name}
    flags = [word for key, value in words.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), str(Path(__file__).parent / script), "train"]
    return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_leaves_a_checkpoint_that_resumes_exactly(whole, tmp_path):
    done = torchrun(0, tmp_path, "killed")
    assert done.returncode == 1
    assert "rank      : 1" in done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr
    checkpoint = load_checkpoint(tmp_path / "killed")
    assert checkpoint.warning is None
    assert checkpoint.facts["progress"]["update"] == 4
    in_processes(2, resume, str(tmp_path), "killed")
    assert_same_end(whole, tmp_path / "killed")


@pytest.mark.slow
def test_torchrun_restarts_a_killed_run_which_goes_on_exactly(whole, tmp_path):
    done = torchrun(1, tmp_path, "restarted")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed at epoch 2, batch 0" in done.stdout
    assert_same_end(whole, tmp_path / "restarted")


@pytest.mark.slow
def test_a_signal_to_torchrun_stops_the_processes_and_spares_workers_by_forkserver(tmp_path):
    images = write_folder(tmp_path / "images", "L", ((32, 32),), train_images=48, val_images=12)
    settings = {**SETTINGS, "data": str(images), "img_size": 32, "batch_size": 8, "workers": 1}
    settings |= {"model_kwargs": "patch_size=8,embed_dim=32,depth=2,num_heads=2", "limit": 48}
    done = torchrun(0, tmp_path, "stopped", "signalled_launcher.py", settings)
    assert done.returncode == 1  # torchrun's own
    assert "got signal: 15" in done.stderr
    for rank in range(2):
        assert f"process {rank} ends with 143" in done.stdout
    assert "DataLoader" not in done.stderr
    assert load_checkpoint(tmp_path / "stopped").facts["progress"]["pending"]["epoch"] == 0
    in_processes(2, train, str(tmp_path), "whole", {**settings, "workers": 0})
    in_processes(2, resume, str(tmp_path), "stopped")
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


def test_a_restart_takes_no_run_of_other_settings_and_leaves_a_finished_one(whole, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (*_, row) = csv.DictReader((whole / "summary.csv").open())
    again = loop.train(recipe(whole.parent, "whole"))
    assert again.row["eval_top1"] == float(row["eval_top1"])
    assert again.model_file == whole / "model.safetensors"
    with pytest.raises(ewa.EwavitError, match="holds a run already: choose another --name"):
        train(whole.parent, "whole", {"lr": 0.5})


def test_what_replicas_cannot_do_is_told_before_anything_starts(tmp_path, monkeypatch):
    for settings, told in (
        ({"twa": 1}, "--twa 1 does not work with --placement replicas: leave out --twa"),
        ({"router": "topk"}, "--router topk does not work"),
        ({"amp": True, "amp_dtype": "float16"}, "--amp-dtype float16 does not work"),
    ):
        with pytest.raises(ewa.EwavitError, match=told):
            recipe(tmp_path, "wrong", **settings)
    with pytest.raises(ewa.EwavitError, match="takes one process for each expert: use torchrun"):
        train(tmp_path, "alone")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(ewa.EwavitError, match="found by its name: give --name"):
        loop.train(Recipe(**TINY, output=str(tmp_path)))
    assert not (tmp_path / "alone").exists()
