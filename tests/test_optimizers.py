"""`--opt`: each of timm's optimizers trains, or is refused in one line that says why."""

import pytest
import torch
from timm.optim import list_optimizers

from ewavit.cli import main
from ewavit.core import SeparateExperts, StackedExperts, moe_layers
from ewavit.training.building import expand_by_recipe
from ewavit.training.recipe import Recipe
from runs import TINY
from small_models import tiny_vit

# What timm lists and this environment cannot have: they need CUDA and a package of their own.
ELSEWHERE = tuple(name for name in list_optimizers() if name.startswith(("bnb", "fused")))


def short_run(folder, name):
    arguments = ["--model", TINY["model"], "--model-kwargs", "patch_size=14,embed_dim=24,depth=2,num_heads=2"]
    arguments += ["--limit", "72", "--holdout", "0.1", "--batch-size", "32", "--epochs", "1"]
    return main(["train", *arguments, "--opt", name, "--output", str(folder), "--name", "run"])


@pytest.fixture
def quick(monkeypatch):
    """No pictures, and the optimizers that compile themselves run as they are written."""
    monkeypatch.setattr("ewavit.training.report.draw_curves", lambda *arguments: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in list_optimizers() if n not in (*ELSEWHERE, "adahessian")])
@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
def test_each_optimizer_of_timm_trains_and_leaves_a_checkpoint(tmp_path, quick, name):
    assert short_run(tmp_path, name) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("name", [*ELSEWHERE, "adahessian"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="these optimizers work on a GPU with their packages")
def test_an_optimizer_that_cannot_train_here_is_refused_in_one_line(capsys, tmp_path, quick, name):
    assert short_run(tmp_path, name) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("ewavit: ")
    assert f"--opt {name}" in said
    assert ("second derivatives" if name == "adahessian" else "CUDA required") in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "layout"),
    [("adamw", StackedExperts), *((n, SeparateExperts) for n in ("muon", "cadamw", "mars", "lambc"))],
)
def test_a_run_has_the_layout_of_experts_that_its_optimizer_needs(name, layout):
    model = expand_by_recipe(tiny_vit(2), Recipe(opt=name))
    assert {type(moe.experts) for moe in moe_layers(model).values()} == {layout}


@pytest.mark.parametrize("name", ["adafactorbv", "adamw"])
def test_settings_of_an_optimizer_survive_a_checkpoint_whatever_their_type(tmp_path, quick, name):
    from ewavit.training.checkpoint import load_checkpoint

    assert short_run(tmp_path, name) == 0
    groups = load_checkpoint(tmp_path / "run").training["optimizer"]["param_groups"]
    kinds = [group.get("momentum_dtype") for group in groups]
    assert all(isinstance(kind, torch.dtype) for kind in kinds) == (name == "adafactorbv"), kinds
