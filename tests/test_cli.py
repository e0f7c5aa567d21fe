"""The command line: what wrong input gets, where settings come from, what plan prints."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ewavit.cli import COMMANDS, main
from ewavit.errors import EwavitError
from ewavit.training.checkpoint import load_checkpoint
from ewavit.training.recipe import GROUPS, Recipe, kinds, settings
from ewavit.training.seal import sealed
from ewavit.training.setting import flag
from runs import TINY, observe, raise_after

SMALL = [
    "--model",
    TINY["model"],
    "--model-kwargs",
    TINY["model_kwargs"],
    "--limit",
    "128",
    "--batch-size",
    "32",
]
SMALL += ["--epochs", "2", "--warmup-epochs", "1", "--workers", "0"]


def image_folder(root, classes=("cat", "dog"), each=20, side=28, val_classes=None):
    generator = np.random.default_rng(0)
    for split, names in (("train", classes), ("val", val_classes or classes)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for number in range(each):
                pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def refused(capsys, tmp_path, *arguments):
    """Run a command that must be refused; return its one line."""
    capsys.readouterr()
    new_run = arguments[0] == "train" and "--resume" not in arguments
    status = main([*arguments, "--output", str(tmp_path / "runs")] if new_run else list(arguments))
    said = capsys.readouterr()
    assert status == 2
    assert said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "runs").exists()
    return said.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--model", "vit_tinny_patch16_224"],
            ["vit_tinny_patch16_224", "did you mean vit_tiny_patch16_224"],
        ),
        (["--data", "fashion-mnist-maxi"], ["fashion-mnist-maxi", "fashion-mnist-mini"]),
        ([*SMALL, "--share-rate", "0.9"], ["0.9", "4 experts", "0.75"]),
        ([*SMALL, "--share-rate", "-0.1"], ["-0.1"]),
        ([*SMALL, "--experts", "600"], ["600", "--batch-size"]),
        (["--model", "resnet18"], ["no FFN"]),
        (["--model", "levit_128s", "--img-size", "224", "--limit", "128"], ["no FFN", "BatchNorm"]),
        ([*SMALL, "--select", "blocks.7"], ["blocks.7"]),
        (["--model", "vit_tiny_patch16_224"], ["patch size 16", "too large", "patch_size=N"]),
        (["--model-kwargs", "patch_size=5"], ["patch size 5", "does not divide"]),
        (["--model-kwargs", "patch_size=1", "--img-size", "80"], ["patch size 1", "too small"]),
        (["--model-kwargs", "patch_size"], ["'patch_size'", "key=value"]),
        (["--model-kwargs", "no_such=1"], ["no_such"]),
        ([*SMALL, "--opt", "adamwwww"], ["adamwwww"]),
        ([*SMALL, "--epochs", "many"], ["--epochs", "many"]),
        ([*SMALL, "--epochs", "0"], ["--epochs 0"]),
        ([*SMALL, "--drop-path", "1.5"], ["--drop-path 1.5"]),
        ([*SMALL, "--min-lr", "-1"], ["--min-lr -1"]),
        ([*SMALL, "--lr", "inf"], ["--lr inf"]),
        ([*SMALL, "--mixup", "inf"], ["--mixup inf", "finite"]),
        ([*SMALL, "--cutmix", "nan"], ["--cutmix nan", "finite"]),
        ([*SMALL, "--weight-decay", "inf"], ["--weight-decay inf", "finite"]),
        ([*SMALL, "--clip-grad", "0"], ["--clip-grad 0"]),
        ([*SMALL, "--model-ema", "--model-ema-decay", "2"], ["--model-ema-decay 2"]),
        ([*SMALL, "--model-ema", "--swa", "0.25"], ["--model-ema and --swa", "choose one"]),
        ([*SMALL, "--warmup-epochs", "5", "--epochs", "10", "--swa", "0.8"], ["--swa 0.8", "warm-up"]),
        ([*SMALL, "--model-ema-switch"], ["--model-ema-switch", "--model-ema"]),
        ([*SMALL, "--holdout", "1"], ["--holdout 1"]),
        ([*SMALL, "--average-every", "0"], ["--average-every 0"]),
        ([*SMALL, "--ramp-shape", "cubic"], ["--ramp-shape", "cubic"]),
        ([*SMALL, "--crop-padding", "40"], ["crop_padding 40", "28"]),
        ([*SMALL, "--name", "../elsewhere"], ["../elsewhere", "--output"]),
        ([*SMALL, "--batch-size", "129"], ["128 training images", "--batch-size"]),
        ([*SMALL, "--no-such-flag"], ["--no-such-flag"]),
        ([*SMALL, "--sched", "cosin"], ["cosin", "cosine"]),
        ([*SMALL, "--initial-checkpoint", "nowhere.pth"], ["nowhere.pth"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    ],
    ids=lambda value: None if isinstance(value, list) and not value else " ".join(value)[-40:],
)
def test_wrong_input_gets_one_line_and_status_two(capsys, tmp_path, arguments, said):
    line = refused(capsys, tmp_path, "train", *arguments)
    for part in said:
        assert part in line


def test_wrong_folders_are_named(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    image_folder(tmp_path / "one", classes=("cat",))
    image_folder(tmp_path / "differ", val_classes=("cat", "cow"))
    for folder, said in (("empty", "train/"), ("one", "one class"), ("differ", "cow")):
        line = refused(
            capsys, tmp_path, "train", "--data", str(tmp_path / folder), "--model-kwargs", "patch_size=7"
        )
        assert said in line
        assert folder in line


def test_corrupt_image_is_named_or_skipped_and_counted(capsys, tmp_path):
    folder = image_folder(tmp_path / "data")
    bad = folder / "train" / "cat" / "3.png"
    bad.write_bytes(bad.read_bytes()[:50])
    arguments = [
        "train",
        "--data",
        str(folder),
        "--model",
        TINY["model"],
        "--model-kwargs",
        TINY["model_kwargs"],
    ]
    arguments += [
        "--batch-size",
        "8",
        "--epochs",
        "1",
        "--workers",
        "1",
        "--output",
        str(tmp_path / "runs"),
        "--name",
    ]
    assert main([*arguments, "stops"]) == 2
    said = capsys.readouterr().err
    assert "cat/3.png" in said
    assert "--skip-bad-images" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "runs" / "stops" / "model.safetensors").exists()
    assert main([*arguments, "goes-on", "--skip-bad-images"]) == 0
    assert "1 unreadable image" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "runs" / "goes-on"), "--workers", "0"]) == 0
    assert "on 40 images" in capsys.readouterr().out


def test_a_folder_of_class_folders_is_trained_on_and_evaluated_with_holdout(capsys, tmp_path):
    folder = image_folder(tmp_path / "data") / "train"
    (folder / "cat" / "more.heic").write_bytes(b"")
    flags = ["--data", str(folder), "--model", TINY["model"], "--model-kwargs", TINY["model_kwargs"]]
    flags += [
        "--batch-size",
        "8",
        "--epochs",
        "1",
        "--workers",
        "0",
        "--output",
        str(tmp_path),
        "--name",
        "run",
    ]
    line = refused(capsys, tmp_path, "train", *flags)
    assert "has no train/" in line
    assert "give --holdout 0.2" in line
    assert main(["train", *flags, "--holdout", "0.2"]) == 0
    said = capsys.readouterr().out
    assert "note: not read beside the training images: 1 file of other formats (.heic 1)" in said
    top1 = said.rpartition("top-1 ")[2].partition(" on")[0]
    assert main(["evaluate", str(tmp_path / "run"), "--workers", "0", "--holdout", "0.2"]) == 0
    out, err = capsys.readouterr()
    assert f"top-1 {top1}" in out
    assert ".heic 1" in err
    assert main(["evaluate", str(tmp_path / "run"), "--workers", "0"]) == 2


def test_existing_run_is_not_overwritten(capsys, tmp_path):
    arguments = ["train", *SMALL, "--output", str(tmp_path), "--name", "run"]
    assert main(arguments) == 0
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert "finished" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_checkpoint(capsys, tmp_path, monkeypatch):
    def poison(run):
        if run.progress.update == 6:  # the second step of the second epoch
            next(run.state.model.parameters()).data.fill_(float("nan"))

    observe(monkeypatch, poison)
    assert main(["train", *SMALL, "--output", str(tmp_path), "--name", "run"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "step 7" in said
    assert "last good checkpoint" in said
    found = load_checkpoint(tmp_path / "run")
    assert found.facts["progress"]["epoch"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in found.model.values())
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_weights_that_are_not_finite_are_never_saved(capsys, tmp_path, monkeypatch):
    def poison(run):
        if run.progress.update == 8:  # the last step: no loss comes after it
            next(run.state.model.parameters()).data.fill_(float("nan"))

    observe(monkeypatch, poison)
    assert main(["train", *SMALL, "--output", str(tmp_path), "--name", "run"]) == 2
    said = capsys.readouterr().err
    assert "weights are not finite after step 8" in said
    assert load_checkpoint(tmp_path / "run").facts["progress"]["epoch"] == 1


def test_checkpoint_of_another_model_is_refused(capsys, tmp_path):
    for name, more in (("one", []), ("other", ["--experts", "2"])):
        assert main(["train", *SMALL, "--output", str(tmp_path), "--name", name, *more, "--epochs", "1"]) == 0
    state = json.loads((tmp_path / "one" / "checkpoint" / "state.json").read_text())
    state["facts"]["recipe"] |= {"experts": 2, "epochs": 3}
    del state["digest"]
    (tmp_path / "one" / "checkpoint" / "state.json").write_text(sealed(state))
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "one")]) == 2
    said = capsys.readouterr().err
    assert "another model" in said
    assert said.count("\n") == 1


def test_truncated_checkpoint_falls_back_to_the_one_before_and_says_so(capsys, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        raise_after(patch, 10, MemoryError)
        with pytest.raises(MemoryError):
            main(["train", *SMALL, "--epochs", "3", "--output", str(tmp_path), "--name", "run"])
    file = tmp_path / "run" / "checkpoint" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "damaged" in said
    assert "resumed at epoch 2" in said


def test_full_disk_is_said_in_one_line(tmp_path):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    command = [
        sys.executable,
        "-m",
        "ewavit.cli",
        "train",
        *SMALL,
        "--output",
        str(tmp_path),
        "--name",
        "run",
    ]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "could not be written" in done.stderr
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_command_line_over_yaml_over_defaults(tmp_path):
    from ewavit.cli import build_parser
    from ewavit.cli.settings import recipe_of

    file = tmp_path / "recipe.yaml"
    file.write_text("epochs: 7\nlr: 5e-4\nmodel-kwargs: {patch_size: 7, depth: 2}\namp: true\nhflip: 0\n")
    options = build_parser().parse_args(["train", "--config", str(file), "--epochs", "3", "--no-amp"])
    recipe, given = recipe_of(options)
    assert given == {"epochs", "lr", "model_kwargs", "amp", "hflip"}
    assert (recipe.epochs, recipe.lr, recipe.amp) == (3, 5e-4, False)
    assert (recipe.hflip, recipe.batch_size) == (0.0, 128)
    assert recipe.parsed("model_kwargs") == {"patch_size": 7, "depth": 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochz: 3", "epochz"),
        ("epochs: lots", "lots"),
        ("epochs: lots", "recipe.yaml"),
        ("- 3", "no settings"),
        ("a: [", "YAML"),
    ],
)
def test_wrong_yaml_is_named(capsys, tmp_path, text, said):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    assert said in refused(capsys, tmp_path, "train", "--config", str(file))


def test_model_kwargs_may_hold_tuples():
    found = Recipe(model_kwargs="depths=(2,4),window_size=7,name=x").parsed("model_kwargs")
    assert found == {"depths": (2, 4), "window_size": 7, "name": "x"}


def test_plan_shows_what_becomes_a_mixture_and_its_cost(capsys):
    assert main(["plan", "--model", "vit_tiny_patch16_224", "--experts", "4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    chosen = [row["name"] for row in plan["candidates"] if "becomes" in row["verdict"]]
    assert chosen == [f"blocks.{number}.mlp" for number in (1, 3, 5, 7, 9, 11)]
    ffn = 192 * 768 * 2 + 768 + 192
    assert plan["training_parameters"] - plan["dense_parameters"] == 3 * 6 * ffn
    assert plan["training_optimizer_bytes"] == 8 * plan["training_parameters"]
    assert 2.4e9 < plan["forward_flops_per_image"] < 2.6e9  # 1.26 G multiply-adds, by timm's tables
    assert 1.0 < plan["expected_step_ratio"] < 1.5
    assert main(["plan", "--model", "vit_tiny_patch16_224"]) == 0
    assert "blocks.11.mlp" in capsys.readouterr().out


def test_plan_proposes_fewer_experts_where_each_has_few_tokens(capsys, monkeypatch):
    from ewavit.study import plan

    monkeypatch.setattr(plan, "_rates", lambda: (2e11, 2e10))  # a machine's FLOP/s and bytes/s

    def planned(*words):
        assert main(["plan", "--model", "vit_tiny_patch16_224", "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    few = planned("--batch-size", "16", "--experts", "8")
    assert f"only {197 * 16 // 8} tokens for each expert" in few["advice"]
    proposed = int(re.search(r"--experts (\d+)", few["advice"])[1])
    assert 2 <= proposed < 8
    at_most = planned("--batch-size", "16", "--experts", str(proposed))
    assert at_most["advice"] == ""
    assert at_most["expected_step_ratio"] <= plan.SLOW
    assert planned("--batch-size", "16", "--experts", str(proposed + 1))["expected_step_ratio"] > plan.SLOW
    assert planned("--batch-size", "512", "--experts", "8")["advice"] == ""
    assert "--experts" not in planned("--batch-size", "1", "--experts", "4")["advice"]  # not even two
    monkeypatch.setattr(plan, "_rates", lambda: (2e13, 2e11))
    assert main(["plan", "--model", "swin_tiny_patch4_window7_224", "--batch-size", "8"]) == 0
    said = capsys.readouterr().out
    assert "advice       a step has only 98 tokens for each expert of layers.3.blocks.1.mlp" in said
    assert "or a --select without layers.3.blocks.1.mlp" in said


def test_plan_follows_the_data_when_it_is_given(capsys):
    arguments = ["plan", "--model", TINY["model"], "--model-kwargs", TINY["model_kwargs"]]
    assert main(arguments) == 0
    assert "224x224x3 images, 1000 classes (no --data given" in capsys.readouterr().out
    assert main([*arguments, "--data", "fashion-mnist-mini"]) == 0
    assert "28x28x1 images, 10 classes;" in capsys.readouterr().out


def test_plan_names_why_candidates_are_refused(capsys):
    assert main(["plan", "--model", "levit_128s"]) == 2
    said = capsys.readouterr()
    assert "BatchNorm" in said.out
    assert said.err.count("\n") == 1


def test_evaluate_and_export_refuse_what_is_not_theirs(capsys, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"xx")
    (tmp_path / "folder").mkdir()
    for arguments, said in (
        (["evaluate", str(tmp_path / "missing")], "missing"),
        (["train", "--resume", str(tmp_path / "missing")], "no checkpoint"),
        (["evaluate", str(tmp_path / "broken.safetensors")], "broken.safetensors"),
        (["export", str(tmp_path / "folder"), "--to", str(tmp_path / "x.onnx")], "no checkpoint"),
        (["export", str(tmp_path / "folder"), "--to", str(tmp_path / "x.pt")], ".pt"),
    ):
        assert said in refused(capsys, tmp_path, *arguments)


@pytest.mark.parametrize("command", list(COMMANDS)[:4])
def test_help_names_every_setting_under_its_heading(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert "  --config FILE.yaml" in said
    assert ("  --resume RUN" in said) == (command == "train")
    places = [said.index(f"\n{group}:\n") for group in GROUPS]
    assert places == sorted(places)
    for setting in settings():
        begin = places[GROUPS.index(setting.metadata["group"])]
        end = min([place for place in places if place > begin], default=len(said))
        assert re.search(rf"^  --{flag(setting.name)}[ ,]", said[begin:end], re.MULTILINE), setting.name


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_and_describes_each_flag(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "==SUPPRESS==" not in said
    for option in re.findall(r"^  (--.*?)(?:  |$)", said, re.MULTILINE):
        assert re.search(rf"^  {re.escape(option)}\s+\S", said, re.MULTILINE), option


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        *(([command, "--help"], 0) for command in COMMANDS),
        (["train", "--no-such-flag"], 2),
        (["train", "--epochs", "0"], 2),
        (["plan", "--share-rate", "0.9"], 2),
        (["bench", "--k", "9", "--router", "topk"], 2),
        (["compare", "--arms", "dense,no-such"], 2),
        (["compare", "--seeds", "1"], 2),
        (["compare", "--jobs", "0"], 2),
        (["compare", "--lrs", "-1"], 2),
        (["plan", "--devices", "0"], 2),
        (["plan", "--devices", "8", "--router", "topk"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_help_and_wrong_settings_are_answered_without_torch(arguments, status):
    script = (
        "import sys; from ewavit.cli import COMMANDS, main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{status} False", done.stderr


@pytest.mark.parametrize("name", [name for name, kind in kinds().items() if kind in (int, float)])
def test_every_number_has_a_range_and_is_refused_outside_of_it(name):
    (limits,) = (setting.metadata for setting in settings() if setting.name == name)
    assert limits["least"] is not None or limits["above"] is not None
    outside = {"least": -1, "above": 0, "most": 1, "below": 0}
    for limit, step in outside.items():
        if limits[limit] is not None:
            with pytest.raises(EwavitError, match=f"^--{flag(name)} .* is out of range: choose "):
                Recipe(**{name: limits[limit] + step})


def test_the_page_of_the_command_line_has_every_command_and_flag():
    tool = Path(__file__).parent.parent / "tools" / "command_line_page.py"
    page, again = (
        subprocess.run([sys.executable, str(tool)], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert page == again
    for command in COMMANDS:
        assert f"\n## ewavit {command}\n" in page
    for group in GROUPS:
        assert f"\n### {group.capitalize()}\n" in page
    for setting in settings():
        row = rf"^\| `--(\[no-\])?{flag(setting.name)}\b.*[^| ] \|$"
        assert re.search(row, page, re.MULTILINE), setting.name


def test_a_plan_starts_without_the_packages_of_metrics_and_statistics():
    names = "{'torchmetrics', 'scipy', 'pandas'}"
    script = f"import sys, ewavit.study.plan; print(sorted({names} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
