"""The examples run as their first lines say, on less data, and do what they promise."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, load_model

import ewavit

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.slow


def run(example, *words, folder):
    """What an example prints, run in a folder of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / example), *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    said = run("finetune.py", "--images", 100, "--epochs", 3, "--output", "whole", folder=folder)
    return folder, said


def test_finetuning_leaves_a_file_that_stock_timm_loads_with_the_accuracy_it_printed(finetuned):
    folder, said = finetuned
    settings = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=10, **settings)
    load_model(plain, folder / "whole" / "vit.safetensors", strict=True)
    last, deployed = re.findall(r"accuracy ([\d.]+) %", said)[-2:]
    assert float(deployed) == pytest.approx(float(last), abs=0.1)


def test_finetuning_resumed_ends_with_the_same_bits(finetuned):
    folder, _ = finetuned
    run("finetune.py", "--images", 100, "--epochs", 1, "--output", "parts", folder=folder)
    checkpoint = "parts/checkpoint.pt"
    run(
        "finetune.py",
        "--images",
        100,
        "--epochs",
        3,
        "--output",
        "parts",
        "--resume",
        checkpoint,
        folder=folder,
    )
    whole, parts = (load_file(folder / name / "vit.safetensors") for name in ("whole", "parts"))
    assert list(whole) == list(parts)
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_a_run_from_python_gives_the_plain_model(tmp_path):
    said = run("from_python.py", "--limit", 256, "--epochs", 1, folder=tmp_path)
    assert "torch.Size([1, 10])" in said
    (only,) = (tmp_path / "runs").iterdir()
    assert str(only.relative_to(tmp_path)) in said
    assert not ewavit.core.moe_layers(ewavit.load(only))


def test_the_notebook_runs_and_has_no_outputs_committed(capsys, monkeypatch):
    cells = json.loads((EXAMPLES / "finetune.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    namespace: dict[str, object] = {}
    for cell in code:
        source = "".join(cell["source"])
        is_size = source.startswith("# parameters")
        exec("num_images, epochs = 100, 1" if is_size else source, namespace)
    assert "VisionTransformer accuracy" in capsys.readouterr().out
    assert namespace["num_images"] == 100


def share(said, when):
    return float(re.search(rf"{when}.*: (\d+) %", said)[1])


@pytest.mark.parametrize(("example", "steps", "least"), [("detection.py", 80, 0), ("clip.py", 60, 50)])
def test_detection_and_clip_train_as_mixtures_and_end_as_stock_models(example, steps, least, tmp_path):
    said = run(example, steps, folder=tmp_path)
    assert share(said, "after") > share(said, "before") + least
    assert share(said, "stock model") == share(said, "after")
