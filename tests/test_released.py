"""Runs of released versions can be loaded, evaluated, exported and resumed.

`released/VERSION/` holds three runs of that version, without pictures:

    COMMON="--model vit_tiny_patch16_224 --model-kwargs patch_size=14,embed_dim=8,depth=2,num_heads=1
      --limit 128 --batch-size 32 --epochs 2 --warmup-epochs 1 --lr 0.01"
    ewavit train $COMMON --name finished
    ewavit train $COMMON --name routed --router topk
    ewavit train $COMMON --name stopped --model-ema --model-ema-decay 0.5   # SIGTERM in step 6 of 8

`figures.json` holds what `ewavit evaluate --json` printed, and the last row of `stopped` after `--resume`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from timm import create_model

import ewavit
from ewavit.core.moe import moe_layers
from ewavit.training.export import evaluate, export, load_model
from ewavit.training.loop import resume

RELEASED = Path(__file__).parent / "released"
FINISHED = ("finished", "routed")

pytestmark = pytest.mark.parametrize("version", sorted(folder.name for folder in RELEASED.iterdir()))


@pytest.fixture
def runs(version, tmp_path):
    return Path(shutil.copytree(RELEASED / version, tmp_path / version))


@pytest.fixture
def figures(version):
    return json.loads((RELEASED / version / "figures.json").read_text())


def assert_close(row, figures):
    """Equal but for the rounding of another processor: of 2,000 images 5 may count differently."""
    for name, value in figures.items():
        assert row[name] == pytest.approx(value, abs=0.25 if "top1" in name else 2e-4), name


@pytest.mark.parametrize("name", [*FINISHED, "stopped"])
def test_released_runs_evaluate_as_they_did(runs, figures, name):
    assert_close(evaluate(runs / name), figures[name])


@pytest.mark.parametrize("name", FINISHED)
def test_the_checkpoint_of_a_released_run_is_its_model(runs, name):
    model, checkpoint = ewavit.load(runs / name), ewavit.load(runs / name / "checkpoint")
    assert bool(moe_layers(model)) == (name == "routed")
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, checkpoint.state_dict()[key]), key


@pytest.mark.parametrize("name", [*FINISHED, "stopped"])
def test_released_runs_export_to_files_that_timm_loads(runs, name):
    export(runs / name, runs / "plain", mean_expert=name == "routed")
    plain, card = load_model(runs / "plain")
    model = create_model(f"local-dir:{runs / 'plain'}", pretrained=True).eval()
    images = card.sample(2)
    assert torch.equal(model(images), plain(images))


def test_a_released_run_resumes_to_the_end_that_it_had(runs, figures):
    assert_close(resume(runs / "stopped").row, figures["resumed"])
