"""The script for each framework runs, goes on exactly, and leaves a model that its library loads."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from transformers import ViTForImageClassification

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("with_*.py"))
# No release of Composer can be installed beside ewavit's torch: its script runs where somebody has both.
COMPOSER = [("with_composer.py", ["vit.pt"])] if importlib.util.find_spec("composer") else []
VIT = {"num_classes": 10, "in_chans": 1, "img_size": 28, "patch_size": 4}


def run(folder, name, epochs, monkeypatch):
    """Run a script in a folder, as a fresh reader does."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, str(epochs)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def read(file):
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("with_torch.py", ["vit.pt"]),
        ("with_accelerate.py", ["vit.pt"]),
        ("with_torchvision.py", ["vit.pt", "vit_ema.pt"]),
        ("with_transformers.py", ["vit/model.safetensors"]),
        ("with_lightning.py", ["vit.pt"]),
        *COMPOSER,
    ],
)
def test_a_script_that_goes_on_ends_with_the_same_plain_model(tmp_path, monkeypatch, name, files):
    run(tmp_path / "whole", name, 2, monkeypatch)
    run(tmp_path / "parts", name, 1, monkeypatch)
    first = [read(tmp_path / "parts" / file) for file in files]
    run(tmp_path / "parts", name, 2, monkeypatch)
    for file, before in zip(files, first, strict=True):
        whole, parts = read(tmp_path / "whole" / file), read(tmp_path / "parts" / file)
        assert whole.keys() == parts.keys() == before.keys()
        assert all(torch.equal(value, parts[key]) for key, value in whole.items())
        assert not all(torch.equal(value, before[key]) for key, value in whole.items())
        if name == "with_transformers.py":
            _, report = ViTForImageClassification.from_pretrained(
                tmp_path / "whole/vit", output_loading_info=True
            )
            assert not report["missing_keys"]
            assert not report["unexpected_keys"]
        elif name == "with_torchvision.py":
            stock = torchvision.models.VisionTransformer(28, 4, 4, 4, 64, 128, num_classes=10)
            stock.load_state_dict(whole, strict=True)
        else:
            timm.create_model("test_vit", **VIT).load_state_dict(whole, strict=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_whole_and_has_at_most_40_lines(script):
    assert len(script.read_text().splitlines()) <= 40
