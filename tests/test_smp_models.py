"""Models of segmentation-models-pytorch in the task of segmentation."""

import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import ewavit
from ewavit import EwavitError
from ewavit.cli import main
from ewavit.data.shapes import make_shapes
from ewavit.tasks.segmentation import Segmentation
from ewavit.tasks.smp_models import create_smp_model
from ewavit.training.export import evaluate, export, load_model
from ewavit.training.loop import resume, train
from ewavit.training.processes import Interrupted
from runs import assert_same_end, recipe, stop_after

SHAPE = {"num_classes": 3, "in_chans": 3, "img_size": 64}
TINY = {"task": "segmentation", "data": "shapes", "model": "smp:segformer:mit_b0", "model_kwargs": "",
        "experts": 2, "unit": "image", "limit": 16, "batch_size": 8, "epochs": 2,
        "warmup_epochs": 1}  # fmt: skip


@pytest.fixture
def smp():
    import segmentation_models_pytorch

    return segmentation_models_pytorch


@pytest.mark.slow
def test_a_segformer_dealt_by_image_resumes_exactly_and_leaves_a_stock_model(smp, tmp_path, monkeypatch):
    whole = train(recipe(tmp_path, "whole", **TINY))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)  # in the second epoch
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, "parts", **TINY))
    resume(tmp_path / "parts")
    assert_same_end(whole.run, tmp_path / "parts")
    loaded, card = load_model(whole.run)
    stock = smp.create_model("segformer", "mit_b0", None, 3, len(card.classes))
    stock.load_state_dict(load_file(whole.model_file))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(stock.eval()(images), loaded(images))
    names = {}
    exec(card.loading_code(whole.model_file), names)
    torch.testing.assert_close(names["model"](images), loaded(images))
    assert "ewavit" not in card.loading_code(whole.model_file)
    for ending in ("safetensors", "onnx", "pt2"):
        assert "logits equal the model's" in export(whole.run, tmp_path / f"plain.{ending}")
    assert evaluate(whole.run)["miou"] == pytest.approx(whole.row["eval_miou"], abs=1e-3)
    Image.fromarray(make_shapes()[2][0]).save(tmp_path / "photo.png")
    assert (
        main(["predict", str(whole.run), str(tmp_path / "photo.png"), "--to", str(tmp_path / "found")]) == 0
    )
    assert (tmp_path / "found" / "photo.png").exists()


@pytest.mark.parametrize("name", ["smp:dpt:tu-vit_tiny_patch16_224", "smp:fpn:tu-convnext_atto"])
def test_encoders_of_timm_are_expanded_token_by_token_and_collapse_to_stock(smp, name):
    model = create_smp_model(name, SHAPE).eval()
    keys = list(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        ewavit.expand(model, 2)
        ewavit.collapse(model)
        torch.testing.assert_close(model.eval()(images), before, atol=1e-4, rtol=1e-4)
    assert list(model.state_dict()) == keys


def test_pretrained_encoders_say_their_normalisation(smp, monkeypatch):
    found = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_space": "RGB"}
    monkeypatch.setattr(smp.encoders, "get_preprocessing_params", lambda *_: found)
    task = Segmentation()
    assert task.preparation("smp:unet:resnet18") == {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    assert task.preparation("smp:dpt:tu-vit_tiny_patch16_224")["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("smp:segfomer:mit_b0", {}, "has no 'segfomer': did you mean segformer"),
        ("smp:segformer:mit_b9", {}, "has no 'mit_b9': did you mean mit_b"),
        ("smp:segformer", {}, "has no '': give smp:segformer:mit_b0"),
        ("smp:segformer:tu-nonsense", {}, "has no 'tu-nonsense'"),
        (
            "smp:segformer:mit_b0",
            {"activation": "sigmoid"},
            "activation changes what smp:segformer:mit_b0 returns",
        ),
        ("smp:segformer:mit_b0", {"depth": 2}, "does not work with 64x64 images and these settings"),
        ("smp:segformer:mit_b0", {"encoder_weights": "imagenet"}, "does not work with 64x64 images"),
        ("smp:segformer:mit_b0", {"img_size": 50}, "does not work with 50x50 images and these settings"),
    ],
)
def test_names_and_settings_that_do_not_work_are_refused(smp, name, settings, said):
    with pytest.raises(EwavitError, match=said):
        create_smp_model(name, SHAPE | settings)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "segmentation", "--model", "smp:segformer:mit_b0"], "pip install 'ewavit[smp]'"),
        (["--model", "smp:segformer:mit_b0"], "smp:segformer:mit_b0 is for --task segmentation"),
    ],
)
def test_without_the_library_or_the_task_one_line_says_what_to_do(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    assert main(["train", *words, "--limit", "16", "--batch-size", "8", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
