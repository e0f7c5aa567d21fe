"""The documentation: every public name is on the API page, and the code of the pages runs."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import LightningModule
from scipy import stats
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

import ewavit as ewa
from ewavit.cli import build_parser
from ewavit.core import moe_layers

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "tools" / "docs_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_on_the_api_page_and_has_a_docstring(site):
    assert site.undocumented((ROOT / "docs" / "api.md").read_text()) == []


def test_a_name_that_the_api_page_lacks_is_found(site):
    page = (ROOT / "docs" / "api.md").read_text()
    without = page.replace("::: ewavit.expand\n", "").replace("::: ewavit.training.export.export\n", "")
    assert site.undocumented(without) == [
        "ewavit.expand is not on docs/api.md",
        "ewavit.training.export.export is not on docs/api.md",
    ]


def test_a_public_name_without_a_docstring_is_found(site, monkeypatch):
    monkeypatch.setattr(ewa.ExpertAveraging.step, "__doc__", None)
    monkeypatch.setattr(ewa.core.FFN, "__doc__", "FFN(name: str)")  # as a dataclass writes it
    assert site.undocumented((ROOT / "docs" / "api.md").read_text()) == [
        "ewavit.ExpertAveraging.step has no docstring",
        "ewavit.core.FFN has no docstring",
    ]


def test_the_site_shows_each_framework_in_a_tab_with_its_whole_script(site):
    page = (ROOT / "docs" / "where_you_train.md").read_text()
    before, tabs = site.with_tabs(page).split("=== ", 1)
    assert before in page
    scripts = sorted((ROOT / "examples").glob("with_*.py"))
    assert len(scripts) == 6
    for script in scripts:
        shown = "".join(f"    {line}" if line.strip() else line for line in script.open())
        assert shown in tabs, script.name
    assert tabs.count('=== "') == 6  # timm's script is in its tab without an example of ours
    assert site.with_tabs("## no tabs\n") == "## no tabs\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_links_to_files_that_exist(page):
    generated = {"command-line.md", "changelog.md"}
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if link not in generated and not (page.parent / link).exists()] == []


def test_the_code_of_the_loop_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = partial(timm.create_model, img_size=32, embed_dim=32, depth=2, num_heads=2)
    monkeypatch.setattr(timm, "create_model", small)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "loop.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    three, save, router, scale = blocks
    names = {}
    exec(three.partition("...")[0], names)
    exec(save, names)
    exec(three.partition("...")[2].partition("\n")[2], names)
    assert type(names["model"].blocks[1].mlp) is type(small("vit_small_patch16_224").blocks[1].mlp)
    exec(router, names)
    exec(scale, names)
    names |= {"scaler": torch.amp.GradScaler("cpu", enabled=False), "accumulation_steps": 2}
    names["model"](torch.randn(2, 3, 32, 32)).sum().backward()
    names["optimizer"].step()
    assert min(ewa.expert_spread(names["model"]).values()) > 0


def test_the_code_for_other_trainers_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "where_you_train.md").read_text()
    for_transformers, for_lightning = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **size))
    pixels = torch.randn(8, 3, 16, 16)
    data = [{"pixel_values": image, "labels": 0} for image in pixels]
    args = TrainingArguments("out", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    names = {"model": model, "data": data, "args": args}
    exec(for_transformers, names)
    assert not moe_layers(names["model"])
    assert (tmp_path / "vit" / "model.safetensors").exists()

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.vit = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **size))

        def training_step(self, batch, index):
            return self.vit(batch).logits.square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    module = Module()
    exec(for_lightning.replace("max_epochs=10", "max_epochs=1, accelerator='cpu'"), {
        "module": module, "loader": torch.utils.data.DataLoader(pixels, batch_size=4),
    })  # fmt: skip
    saved = torch.load(tmp_path / "vit.ckpt", weights_only=False)["state_dict"]
    assert saved.keys() == Module().state_dict().keys()


def test_the_script_for_slurm_is_that_of_the_page_and_its_command_is_understood():
    script = ROOT / "examples" / "compare.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    (shown,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "compare.md").read_text(), re.DOTALL)
    assert script.read_text().endswith(shown)
    words = shlex.split(shown.partition(" -- ")[2].replace("\\\n", " "))
    assert words[0] == "ewavit"
    options = build_parser().parse_args(words[1:])
    assert (options.ray, options.arms, options.seeds) == ("$address", ["dense", "ema", "ewa"], 5)
    assert options.command.__module__ == "ewavit.cli.compare"


def test_the_measures_of_the_house_are_counted_from_the_source(tmp_path):
    files = {"a": "", "b": "import ewavit.a\n", "c/__init__": "", "c/x": "from . import y\n", "c/y": ""}
    files["c/y"] = "def f():\n    from ewavit.c.x import g\n    from ewavit.b import h\n\n    return g, h\n"
    for name, text in {"__init__": "from ewavit import c\n", **files}.items():
        file = tmp_path / "src" / "ewavit" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    script = ROOT / "tools" / "measure_house.py"
    printed = subprocess.check_output([sys.executable, script, tmp_path], text=True)
    found = {line[:38].strip(): line[38:] for line in printed.splitlines()}
    assert found["rooms"] == "3: a, b, c"
    assert found["arrows between rooms"] == "2"
    assert found["floors"] == "3"
    assert found["circles of files"] == "1; ewavit.c.x, ewavit.c.y"
    assert found["longest function, lines"] == "5 (y.py:f)"


def _metrics_and_losses(file):
    """The metric and the loss of every run of a record, by arm and seed."""
    record = json.loads(file.read_text())
    if "arms" in record:
        metric = record.get("judge", {"column": "top1"})["column"]
        found = {arm["name"]: {run["seed"]: run for run in arm["runs"]} for arm in record["arms"]}
        columns = metric, "eval_loss"
    elif "flatness" in record["result"]:
        rows = record["result"]["flatness"]["traces_by_seed"]
        found, columns = (
            {arm: dict(enumerate(runs)) for arm, runs in rows.items()},
            ("test_top1", "test_loss"),
        )
    else:
        rows = record["result"]["last_rows"]
        found, columns = (
            {arm: dict(enumerate(runs)) for arm, runs in rows.items()},
            ("eval_top1", "eval_loss"),
        )
    return {
        arm: {seed: [run[name] for name in columns] for seed, run in runs.items()}
        for arm, runs in found.items()
    }


RESULTS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "results.md").read_text().splitlines()
    if re.match(r"\| [PRO]\d+ \|", line)
]


@pytest.mark.parametrize("row", RESULTS, ids=lambda row: row[0])
def test_a_row_of_the_results_has_the_figures_of_its_record(row):
    number, _, setting, contrast, metric, loss, sure, source = row
    verdict = re.match(r"\*\*([a-z ]+)\*\*", sure)[1]
    assert verdict in ("confirmed", "shown", "hint", "untold", "fell", "worse", "not measured")
    records = re.findall(r"\.\./records/[^)]+", source)
    if verdict == "not measured":
        assert (metric, loss, records) == ("", "", [])
        return
    (record,) = records
    arm, reference = re.fullmatch("`(.+)` − `(.+)`", contrast).groups()
    runs = _metrics_and_losses(ROOT / "docs" / record)
    seeds = sorted(runs[arm].keys() & runs[reference].keys())
    assert f"{len(seeds)} seeds, `{reference}` " in setting
    values = np.array([[runs[name][seed] for seed in seeds] for name in (arm, reference)])
    assert float(setting.rpartition(" ")[2]) == pytest.approx(values[1, :, 0].mean(), abs=0.0051)
    for column, text, rounding in ((0, metric, 0.0051), (1, loss, 0.00051)):
        differences = values[0, :, column] - values[1, :, column]
        low, high = stats.ttest_1samp(differences, 0).confidence_interval()
        written = [float(part) for part in re.findall(r"[+-][\d.]+", text)]
        assert written == pytest.approx([differences.mean(), low, high], abs=rounding), number
        if column == 0 and verdict not in ("fell",):
            assert (low <= 0 <= high) == (verdict == "untold")


def test_the_results_name_each_row_once_and_every_comparison_of_the_records():
    assert len({row[0] for row in RESULTS}) == len(RESULTS) > 50
    named = {Path(name).name for row in RESULTS for name in re.findall(r"records/[^)]+", row[-1])}
    assert {file.name for file in (ROOT / "records").glob("compare-*.json")} <= named
