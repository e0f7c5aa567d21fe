"""`ewavit export --hub`: the folder that is pushed is loaded by stock timm and transformers."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import transformers
import yaml
from huggingface_hub import constants

import ewavit
from ewavit.cli import main
from ewavit.data.arrays import read_bundled
from ewavit.integrations.transformers import EWACallback
from ewavit.training import hub
from ewavit.training.loop import train
from hf_trainer import Images, trainer
from runs import recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run within a comparison that has results."""
    folder = tmp_path_factory.mktemp("comparison")
    found = train(recipe(folder / "runs", "ewa-42", share_rate=0.2))
    record = Path(__file__).parent.parent / "records" / "compare-mini.json"
    results = record.read_text().replace("fashion-mnist-mini", str(folder))  # as if it had a path of data
    (folder / "results.json").write_text(results)
    return found


@pytest.fixture
def no_network(monkeypatch):
    """Every use of the hub fails."""
    monkeypatch.setattr(hub, "get_token", lambda: None)
    monkeypatch.setattr(hub, "HfApi", lambda: pytest.fail("the hub was asked"))


@pytest.fixture
def written(finished, tmp_path, no_network):
    words = ["--hub", "me/vit", "--to", str(tmp_path / "vit"), "--license", "mit"]
    assert main(["export", str(finished.run), *words]) == 0
    return tmp_path / "vit"


def readme(folder: Path) -> tuple[dict, str]:
    _, facts, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(facts), text


def assert_no_paths(folder: Path, *more: Path) -> None:
    for file in folder.iterdir():
        for place in (Path.cwd(), Path.home(), folder.parent, *more):
            assert str(place).encode() not in file.read_bytes(), f"{file.name} names {place}"


def test_plain_timm_loads_the_folder_and_finds_the_runs_accuracy(finished, written):
    assert sorted(file.name for file in written.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    arrays = read_bundled()
    torch.save([arrays.eval_images, arrays.eval_labels], written.parent / "images.pt")
    code = f"""
import sys, timm, torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
model = timm.create_model("local-dir:{written}", pretrained=True).eval()
transform = create_transform(**resolve_model_data_config(model))
images, labels = torch.load({str(written.parent / "images.pt")!r}, weights_only=False)
with torch.no_grad():
    found = model(torch.stack([transform(Image.fromarray(image[0])) for image in images])).argmax(1)
print(100 * float((found == torch.as_tensor(labels)).double().mean()))
assert "ewavit" not in sys.modules
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(said) == pytest.approx(finished.row["eval_top1"], abs=1e-3)


def test_timm_and_transformers_compute_the_runs_logits_from_the_folder(finished, written):
    images = torch.randn(3, 1, 28, 28)
    model = transformers.AutoModelForImageClassification.from_pretrained(written).eval()
    transformers.AutoImageProcessor.from_pretrained(written)
    with torch.no_grad():
        expected = ewavit.load(finished.run)(images)
        found = timm.create_model(f"local-dir:{written}", pretrained=True).eval()(images)
        assert torch.equal(found, expected)
        torch.testing.assert_close(model(images).logits, expected)


def test_the_model_card_says_recipe_metrics_data_experts_licence_and_verdict(finished, written):
    facts, text = readme(written)
    assert (facts["license"], facts["library_name"]) == ("mit", "timm")
    (result,) = facts["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(finished.row["eval_top1"], abs=1e-3)
    assert result["dataset"]["name"] == "fashion-mnist-mini"
    for words in (
        f"| top1 | {finished.row['eval_top1']} |", "| experts | 4 |", "| share_rate | 0.2 |", "hf-hub:me/vit",
        "| crop_pct | ", "Whether ewa helps cannot be told with 5 seeds", "On the first 2,000", "T-shirt/top",
    ):  # fmt: skip
        assert words in text, words
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert (settings["share_rate"], settings["limit"]) == (0.2, 256)
    assert not {"output", "name", "data_dir"} & settings.keys()


def test_no_exported_file_names_a_path_of_the_machine(finished, written):
    assert_no_paths(written, finished.run.parent.parent)


def test_in_offline_mode_the_folder_is_written_under_its_name(finished, tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["export", str(finished.run), "--hub", "me/vit"]) == 0
    assert (tmp_path / "vit" / "README.md").exists()


def test_a_push_uploads_that_folder_and_writes_the_token_nowhere(
    finished, written, tmp_path, monkeypatch, capsys
):
    seen = {}

    class Api:
        def create_repo(self, repo, exist_ok):
            seen["repo"] = (repo, exist_ok)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            seen["files"] = {file.name: file.read_bytes() for file in folder_path.iterdir()}

    monkeypatch.setattr(hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(hub, "HfApi", Api)
    assert main(["export", str(finished.run), "--hub", "me/vit", "--license", "mit"]) == 0
    assert seen["repo"] == ("me/vit", True)
    assert seen["files"] == {file.name: file.read_bytes() for file in written.iterdir()}
    assert not any(b"hf_secret" in content for content in seen["files"].values())
    assert "hf_secret" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hub", "vit"], "ORG/NAME"),
        (["--hub", "a/b/c"], "ORG/NAME"),
        (["--hub", "me/v it"], "ORG/NAME"),
        (["--hub", "me/vit"], "no token"),
        (["--hub", "me/vit", "--to", "."], "new folder"),
        (["--hub", "me/vit", "--data", "x"], "--data"),
        (["--hub", "me/vit", "--toward", "x"], "--toward"),
        (["other", "--hub", "me/vit"], "takes one run"),
        (["--to", "x.onnx", "--license", "mit"], "--hub"),
        ([], "--to FILE or --hub"),
    ],
)
def test_a_push_that_cannot_work_is_refused_in_one_line(
    finished, tmp_path, monkeypatch, capsys, no_network, words, said
):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(finished.run), *words]) == 2
    problem = capsys.readouterr().err
    assert said in problem
    assert problem.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_hub_that_cannot_be_reached_is_one_line(finished, monkeypatch, capsys):
    class Api:
        def create_repo(self, repo, exist_ok):
            raise huggingface_hub.errors.OfflineModeIsEnabled("no network\nat all")

    monkeypatch.setattr(hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(hub, "HfApi", Api)
    assert main(["export", str(finished.run), "--hub", "me/vit"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_trainers_checkpoint_becomes_a_stock_folder_of_transformers(tmp_path, no_network):
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    run = trainer(tmp_path / "run", EWACallback(share_rate=0.25, ramp_steps=6), eval_strategy="epoch")
    run.processing_class = processor
    run.train()
    source, folder = tmp_path / "run" / "checkpoint-8", tmp_path / "vit"
    assert main(["export", str(source), "--hub", "me/vit", "--to", str(folder)]) == 0
    model, report = transformers.AutoModelForImageClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not report["missing_keys"] | report["unexpected_keys"]
    pixels = torch.stack([Images()[index]["pixel_values"] for index in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(pixels).logits, run.model.eval()(pixels).logits)
    found = transformers.AutoImageProcessor.from_pretrained(folder)
    assert found.size == {"height": 16, "width": 16}
    facts, text = readme(folder)
    assert facts["library_name"] == "transformers"
    for words in ("| loss |", "| share_rate | 0.25 |", "| num_experts | 4 |", "| image_mean |"):
        assert words in text, words
    assert_no_paths(folder)
    broken = json.loads((source / "config.json").read_text()) | {"architectures": ["Unknown"]}
    (source / "config.json").write_text(json.dumps(broken))
    assert main(["export", str(source), "--hub", "me/vit", "--to", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()
