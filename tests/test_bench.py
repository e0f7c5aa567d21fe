"""Measuring training steps: what is counted, what is compared with what, and what wrong input gets."""

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch

import ewavit as ewa
from ewavit.cli import main
from ewavit.study.bench import Times, Trainee, measure, ratios
from ewavit.training.building import set_grad_checkpointing
from ewavit.training.loop import train
from ewavit.training.recipe import Recipe

SMALL = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10, "img_size": 16}
KWARGS = "patch_size=7,embed_dim=16,depth=2,num_heads=2"


def small(experts: int = 1, checkpointing: bool = False) -> Trainee:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    if experts > 1:
        ewa.expand(model, experts)
    if checkpointing:
        set_grad_checkpointing(model)
    averaging = ewa.ExpertAveraging(model, 0.1) if experts > 1 else None
    return Trainee(model.train(), torch.optim.AdamW(ewa.param_groups(model)), averaging)


def batch(images: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(images, 3, 16, 16), torch.randint(10, (images,))


def test_every_round_takes_a_step_of_every_model():
    trainees = {"dense": small(), "ewa": small(4)}
    before = {name: [p.clone() for p in t.model.parameters()] for name, t in trainees.items()}
    times = measure(trainees, *batch(), rounds=4)
    for name, trainee in trainees.items():
        assert set(times[name].seconds) == {"forward", "backward", "optimizer", "averaging", "step"}
        assert all(len(seconds) == 4 for seconds in times[name].seconds.values())
        pairs = zip(trainee.model.parameters(), before[name], strict=True)
        assert not any(torch.equal(parameter, old) for parameter, old in pairs)
    assert trainees["ewa"].averaging.steps_done == 4 + 3  # the warm-up's too


def test_experts_keep_no_more_activations_than_the_dense_model():
    times = measure({"dense": small(), "ewa": small(4)}, *batch(64), rounds=1)
    assert times["ewa"].activation_bytes / times["dense"].activation_bytes == pytest.approx(1, abs=0.01)


def test_checkpointing_keeps_fewer_activations():
    trainees = {"dense": small(4), "checkpointed": small(4, checkpointing=True)}
    times = measure(trainees, *batch(64), rounds=1)
    assert times["checkpointed"].activation_bytes < 0.5 * times["dense"].activation_bytes


def test_ratios_are_of_rounds_and_the_averaging_is_a_share_of_its_own_step():
    nothing, half, two = np.zeros(3), np.full(3, 0.5), np.full(3, 2.0)
    dense = Times({"forward": np.array([1.0, 2, 4]), "averaging": nothing, "step": np.array([2.0, 4, 8])})
    ewa_times = Times({"forward": two, "averaging": half, "step": np.array([2.0, 5, 10])})
    found = ratios(ewa_times, dense)
    assert found["forward"].ratio == 1.0  # of 2, 1 and 0.5
    assert found["forward"].ms == 2000
    assert found["averaging"].ratio == pytest.approx(0.1)  # of 0.25, 0.1 and 0.05
    assert (found["step"].low, found["step"].high) == (1.0, 1.25)


def test_bench_measures_the_recipe_that_it_is_given(capsys):
    words = ["--model", "vit_tiny_patch16_224", "--model-kwargs", KWARGS, "--img-size", "28"]
    assert main(["bench", *words, "--batch-size", "8", "--rounds", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == "8 images of 28x28x3"
    assert found["rounds"] == 2
    assert found["ewa"]["step"]["ms"] > 0
    assert main(["bench", *words, "--batch-size", "8", "--rounds", "2"]) == 0
    assert "of the step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds", "0"], "--rounds 0 measures nothing"),
        (["--experts", "1"], "--experts 1 is the dense model itself"),
        (["--model", "vit_tini"], "timm has no model 'vit_tini'"),
        (["--model", "crossvit_9_240", "--grad-checkpointing"], "CrossVit has no activation checkpointing"),
    ],
)  # fmt: skip
def test_bench_refuses_in_one_line(words, said, capsys):
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_checkpointed_training_gives_the_weights_of_plain_training(tmp_path):
    shared = {"limit": 128, "epochs": 1, "model_kwargs": KWARGS, "batch_size": 32, "output": str(tmp_path)}
    runs = [train(Recipe(name=str(on), grad_checkpointing=on, **shared)) for on in (False, True)]
    plain, checkpointed = (timm.models.load_state_dict(str(run.model_file)) for run in runs)
    for key, value in plain.items():
        torch.testing.assert_close(checkpointed[key], value, atol=1e-6, rtol=1e-5)


def test_what_a_step_frees_is_kept_for_the_next_one():
    page_faults = """
import resource, torch
from ewavit.training.processes import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()
keep_freed_memory()
faults()
print(given_back, faults())
"""
    output = subprocess.run([sys.executable, "-c", page_faults], capture_output=True, text=True, check=True)
    given_back, kept = map(int, output.stdout.split())
    assert kept < given_back / 10
