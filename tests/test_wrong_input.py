"""Wrong input of every kind, to every command: one line that begins with "ewavit: ", status 2, no file."""

import os
import warnings

import numpy as np
import pytest
from PIL import Image

from ewavit.cli import COMMANDS, main
from ewavit.errors import EwavitError
from ewavit.training.recipe import Recipe, kinds
from runs import TINY

SMALL = ("--model", TINY["model"], "--model-kwargs", TINY["model_kwargs"], "--limit", "64")
SMALL += ("--batch-size", "32", "--epochs", "1", "--workers", "0")
LONG = "x" * 5000
HUGE = "1" + "0" * 40
NUL = "a\0b"


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def one_line(capsys, *arguments):
    """Run a command that must be refused; return its one line."""
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as warned:  # each would be a second line
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", ResourceWarning)
        status = main([str(word) for word in arguments])
    assert [str(each.message) for each in warned] == []
    said = capsys.readouterr()
    assert status == 2, said
    assert said.err.startswith("ewavit: "), said.err
    assert said.err.count("\n") == 1, said.err
    assert len(said.err) < 1000
    assert "Traceback" not in said.out + said.err
    assert "ewavit:" not in said.err[8:]  # the name of the command appears once
    return said.err


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with one thing of each kind that may stand where another is expected."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "broken.safetensors").write_bytes(b"xx")
    (tmp_path / "broken.onnx").write_bytes(b"xx")
    (tmp_path / "broken.npz").write_bytes(b"xx")
    return tmp_path


# Flags of a recipe that are refused whatever the command; each line is followed by words that are said.
SETTINGS = [
    ("--layer-decay 0", "--layer-decay 0"),
    ("--layer-decay 1e9", "--layer-decay"),
    ("--mixup 1e300", "--mixup 1e+300"),
    ("--cutmix 1e300", "--cutmix"),
    ("--lr 0", "--lr 0"),
    ("--lr 1e300", "--lr 1e+300"),
    ("--lr -1", "--lr -1"),
    ("--lr nan", "finite"),
    ("--weight-decay 1e300", "--weight-decay"),
    ("--expert-lr 1e300", "--expert-lr"),
    ("--capacity-ratio 1e300", "--capacity-ratio"),
    ("--decay-epochs 0", "--decay-epochs"),
    ("--warmup-lr 1e300", "--warmup-lr"),
    ("--min-lr 1e300", "--min-lr"),
    ("--clip-grad 1e300", "--clip-grad"),
    ("--ramp -1", "--ramp -1"),
    ("--share-rate 1e300", "--share-rate"),
    ("--smoothing 2", "--smoothing 2"),
    ("--reprob -1", "--reprob -1"),
    ("--swa 2", "--swa 2"),
    ("--votes 0", "--votes 0"),
    ("--k 0", "--k 0"),
    ("--workers -1", "--workers -1"),
    (f"--seed {HUGE}", "--seed"),
    ("--seed -1", "--seed -1"),
    (f"--epochs {HUGE}", "--epochs"),
    ("--epochs 1.5", "1.5"),
    (f"--batch-size {HUGE}", "--batch-size"),
    ("--img-size 100000", "--img-size 100000"),
    ("--img-size 0", "--img-size 0"),
    ("--num-points 1000000000", "--num-points"),
    (f"--experts {HUGE}", "--experts"),
    ("--experts 0", "--experts 0"),
    ("--experts -1", "--experts -1"),
    ("--name a/b", "a/b"),
    ("--name ..", ".."),
    ("--model-kwargs num_classes=7", "num_classes=7 does not work: the data"),
    ("--model-kwargs in_chans=2", "in_chans=2 does not work: the data"),
    ("--model-kwargs img_size=7", "give --img-size"),
    ("--model-kwargs pretrained=True", "give --pretrained"),
    ("--model-kwargs features_only=True", "features"),
    ("--model-kwargs depth=(1", "open bracket"),
    ("--model-kwargs =", "key=value"),
    ("--bach-size 3", "unknown flag --bach-size: did you mean --batch-size?"),
    ("--epohcs=3", "did you mean --epochs?"),
    ("--no-pretraind", "did you mean --no-pretrained?"),
    ("--zzz", "unknown flag --zzz (see ewavit"),
    ("extra", "unexpected word extra"),
    ("--sched cosin", "did you mean cosine?"),
    ("--sched zzz", "choose one of cosine, tanh"),
    ("--epochs", "--epochs"),
    ("--shots 0", "--shots 0"),
    ("--fold -1", "--fold -1"),
    ("--fold 1", "--fold 1 is out of range: --holdout 0 has 1 of them"),
    ("--holdout 0.2 --fold 5", "--holdout 0.2 has 5 of them, counted from 0"),
    ("--limit 9 --shots 2", "leave out one"),
    ("--resample", "--resample needs a subset of the training images: give --limit or --shots"),
    ("--test-on-rest", "--test-on-rest needs a subset"),
    ("--limit 9 --test-on-rest --holdout 0.5", "--test-on-rest and --holdout both choose"),
]  # fmt: skip


@pytest.mark.parametrize("command", list(COMMANDS)[:4])
@pytest.mark.parametrize(("words", "said"), SETTINGS, ids=[words[:40] for words, _ in SETTINGS])
def test_a_setting_out_of_range_is_refused_by_every_command(capsys, place, command, words, said):
    before = files_below(place)
    assert said in one_line(capsys, command, *words.split())
    assert files_below(place) == before


@pytest.mark.parametrize("name", [name for name, kind in kinds().items() if kind is str])
@pytest.mark.parametrize("value", ["", NUL], ids=["empty", "NUL"])
def test_an_empty_text_and_a_nul_character_are_refused_by_name(name, value):
    if value or not name.endswith("_kwargs"):
        with pytest.raises(EwavitError, match=f"^--{name.replace('_', '-')} .*(is empty|NUL|unknown)"):
            Recipe(**{name: value})


# Words of a command that reaches the work itself.
COMMAND_LINES = [
    # what is no model, data, optimizer or selection
    (["train", "--data", LONG], "too long"),
    (["train", "--data", "file"], "file"),
    (["train", "--data", "folder"], "train/"),
    (["train", "--data", "日本語"], "日本語"),
    (["train", "--data", "points:nowhere"], "nowhere"),
    (["train", "--data", "modelnet10:broken.npz"], "broken.npz"),
    (["train", "--data", "points:"], "points:PATH"),
    (["train", "--data", "points:folder"], "folder"),
    (["train", "--data", "torch/"], "torch/"),
    (["train", "--data", "wds/x"], "wds/x"),
    (["train", "--data", "a\nb"], "a"),
    (["train", "--model", LONG], "too long"),
    (["train", "--name", "run", "--model", LONG], "timm has no model"),
    (["train", "--model", "日本語"], "日本語"),
    (["train", *SMALL, "--opt", LONG], "--opt"),
    (["train", *SMALL, "--opt", "adamww"], "did you mean"),
    (["train", *SMALL, "--opt", "adahessian"], "second derivatives"),
    (["train", *SMALL, "--select", "("], "("),
    (["train", *SMALL, "--select", LONG], "select"),
    (["train", *SMALL, "--aa", LONG], "aa"),
    (["train", *SMALL, "--aa", "rand-m1e9"], "aa"),
    (["train", "--data", "solids", "--aa", "zzz", "--num-points", "64"], "zzz"),
    (["train", *SMALL, "--initial-checkpoint", "folder"], "folder"),
    (["train", *SMALL, "--initial-checkpoint", "file"], "file"),
    (["train", *SMALL, "--initial-checkpoint", LONG], ""),
    (["train", *SMALL, "--grad-accum-steps", "1000000"], "--grad-accum-steps"),
    (["train", *SMALL, "--batch-size", "1000000000"], "--batch-size"),
    (["train", *SMALL, "--experts", "1000000000"], "--experts"),
    (["train", *SMALL, "--limit", "1"], "limit 1"),
    (["train", *SMALL, "--holdout", "0.9999999"], ""),
    (["train", *SMALL, "--crop-padding", "1000000000"], "crop_padding"),
    # settings that the model's constructor refuses
    (["train", "--model-kwargs", "num_heads=0"], "num_heads=0"),
    (["train", "--model-kwargs", "embed_dim=-1"], "embed_dim=-1"),
    (["train", "--model-kwargs", "embed_dim=0"], "embed_dim=0"),
    (["train", "--model-kwargs", "depth=0"], "no FFN"),
    (["train", "--model-kwargs", "depth=-1"], "depth=-1"),
    (["train", "--model-kwargs", "depth=x"], "depth=x"),
    (["train", "--model-kwargs", "patch_size=0"], "patch size 0"),
    (["train", "--model-kwargs", "patch_size=-7"], "patch size -7"),
    (["train", "--model-kwargs", "patch_size=(7,)"], "patch_size"),
    (["train", "--model-kwargs", "patch_size=x"], "patch_size"),
    (["train", "--model-kwargs", "mlp_ratio=1e300"], "mlp_ratio"),
    (["train", "--model-kwargs", "global_pool=zzz"], "global_pool=zzz"),
    (["train", "--model-kwargs", "global_pool="], ""),
    (["train", "--model-kwargs", "act_layer=zzz"], "act_layer=zzz"),
    (["train", "--data", "solids", "--num-points", "64", "--model-kwargs", "num_heads=0"], "cannot be built"),
    (["train", "--data", "solids", "--num-points", "64", "--model-kwargs", "depth=0,num_group=4"], ""),
    (["train", "--data", "solids", "--num-points", "64", "--model-kwargs", "num_group=0"], ""),
    (["train", "--data", "solids", "--num-points", "64", "--model-kwargs", "dim=-3"], "cannot be built"),
    # files and folders
    (["train", "--config", ""], "--config"),
    (["train", "--config", "folder"], "folder"),
    (["train", "--config", "empty.yaml"], "no settings"),
    (["train", "--config", "binary.yaml"], "binary.yaml"),
    (["train", "--config", LONG], ""),
    (["train", "--config", NUL], "NUL"),
    (["train", "--resume", ""], "--resume"),
    (["train", "--resume", "file"], "file"),
    (["train", "--resume", "folder"], "folder"),
    (["train", "--resume", LONG], ""),
    (["train", "--resume", "folder", "--epochs", "3"], "leave out --epochs"),
    (["train", *SMALL, "--output", "file", "--name", "x"], "file"),
    (["train", *SMALL, "--output", LONG], ""),
    (["train", *SMALL, "--name", LONG], ""),
    (["plan", "--devices", "0"], "--devices"),
    (["plan", "--devices", "-1"], "--devices"),
    (["plan", "--devices", HUGE], "--devices"),
    (["plan", "--model-kwargs", "num_heads=0"], "num_heads=0"),
    (["plan", *SMALL, "--experts", "1000000000"], "--experts"),
    (["bench", "--rounds", "0"], "--rounds"),
    (["bench", "--rounds", "-1"], "--rounds"),
    (["bench", "--experts", "1"], "--experts 1"),
    (["bench", *SMALL, "--opt", "adahessian"], "--opt"),
    (["compare", "--arms", ""], "--arms"),
    (["compare", "--arms", ",,"], ""),
    (["compare", "--arms", "ewa"], "dense"),
    (["compare", "--arms", "dense,ewaa"], "did you mean"),
    (["compare", "--seeds", "0"], "--seeds 0"),
    (["compare", "--seeds", HUGE], "--seeds"),
    (["compare", "--seeds", "1000000"], "--seeds 1000000"),
    (["compare", "--seeds", "x"], "--seeds"),
    (["compare", "--jobs", "0"], "--jobs"),
    (["compare", "--jobs", HUGE], "--jobs"),
    (["bench", "--rounds", HUGE], "--rounds"),
    (["compare", "--lrs", "0"], "--lrs"),
    (["compare", "--lrs", "x"], "--lrs"),
    (["compare", "--preset", ""], "--preset"),
    (["compare", "--preset", "zzz"], "--preset"),
    (["compare", "--config", "file"], "file"),
    (["compare", "--config", ""], "--config"),
    (["compare", "--output", "file", "--name", "x"], "file"),
    (["evaluate", ""], "RUN_OR_FILE"),
    (["evaluate", "nowhere"], "nowhere"),
    (["evaluate", NUL], "NUL"),
    (["evaluate", LONG], ""),
    (["evaluate", "folder"], "folder"),
    (["evaluate", "file"], "file"),
    (["evaluate", "broken.safetensors"], "broken.safetensors"),
    (["evaluate", "broken.onnx"], "broken.onnx"),
    (["evaluate", "folder", "--batch-size", "0"], ""),
    (["evaluate", "folder", "--bach-size", "3"], "did you mean --batch-size?"),
    (["export", "file"], "--to"),
    (["export", "file", "--to", ""], "--to"),
    (["export", "file", "--to", "x.zzz"], ".zzz"),
    (["export", "file", "--to", NUL], "NUL"),
    (["export", "file", "--to", "nowhere/x.onnx"], "nowhere"),
    (["export", "nowhere", "--to", "x.onnx"], "nowhere"),
    (["export", "broken.safetensors", "--to", "x.safetensors"], "broken.safetensors"),
    (["export", "folder", "--to", "x.safetensors"], "folder"),
    (["trian"], "did you mean train?"),
    (["zzz"], "choose one of train, plan"),
    ([], "COMMAND"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    COMMAND_LINES,
    ids=lambda value: (
        " ".join(value[:1] + value[-2:])[:60].replace("\0", "NUL") if isinstance(value, list) else ""
    ),
)
def test_wrong_input_gets_one_line_and_leaves_no_file(capsys, place, arguments, said):
    before = files_below(place)
    assert said in one_line(capsys, *arguments)
    assert files_below(place) == before


# What newcomers meet, and what simply works.


def image_folder(root, classes=("cat", "dog")):
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(16):
                pixels = generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def test_a_run_finds_its_data_from_any_working_directory(capsys, tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    image_folder(home / "pets", ("cat", "cow", "dog"))
    monkeypatch.chdir(home)
    assert main(["train", "--data", "pets", *SMALL, "--epochs", "2", "--name", "run"]) == 0
    run = home / "runs" / "run"
    capsys.readouterr()
    assert main(["evaluate", "runs/run", "--json"]) == 0
    here = capsys.readouterr().out
    assert "null" not in here
    monkeypatch.chdir(elsewhere)
    image_folder(elsewhere / "pets", ("ant", "bee"))  # the same name, other data
    assert main(["evaluate", str(run), "--json"]) == 0
    assert capsys.readouterr().out == here
    file = elsewhere / "plain.safetensors"
    assert main(["export", str(run), "--to", str(file)]) == 0
    assert "the run:" in capsys.readouterr().out  # its accuracy was compared
    assert str(home).encode() not in file.read_bytes()  # an exported file has no path of this machine
    (run / "model.safetensors").unlink()
    for folder in ("checkpoint", "checkpoint-previous"):
        assert (run / folder).is_dir()
    from ewavit.training.checkpoint import load_checkpoint

    assert load_checkpoint(run).facts["card"]["absolute_data"] == str(home / "pets")
    os.replace(home / "pets", home / "moved")
    os.replace(elsewhere / "pets", elsewhere / "moved")
    said = one_line(capsys, "evaluate", run)
    assert str(home / "pets") in said
    assert "--data" in said
    assert main(["evaluate", str(run), "--data", str(home / "moved"), "--json"]) == 0
    assert capsys.readouterr().out == here


def test_a_stopped_run_goes_on_from_another_working_directory(tmp_path, monkeypatch):
    from runs import raise_after

    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    image_folder(home / "pets")
    monkeypatch.chdir(home)
    with monkeypatch.context() as patch:
        raise_after(patch, 2, MemoryError)
        with pytest.raises(MemoryError):
            main(["train", "--data", "pets", *SMALL, "--epochs", "2", "--name", "run"])
    monkeypatch.chdir(elsewhere)
    assert main(["train", "--resume", str(home / "runs" / "run")]) == 0
    assert (home / "runs" / "run" / "model.safetensors").exists()


def test_a_relative_spec_of_clouds_is_found_as_well(tmp_path, monkeypatch):
    from ewavit.training.places import absolute_spec, found_spec

    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path)
    absolute = absolute_spec("modelnet10:set")
    assert absolute == f"modelnet10:{tmp_path / 'set'}"
    assert found_spec("modelnet10:set", absolute) == "modelnet10:set"
    monkeypatch.chdir("/")
    assert found_spec("modelnet10:set", absolute) == absolute
    for spec in ("solids", "fashion-mnist-mini", "torch/cifar10", "hfds/x/y"):
        assert absolute_spec(spec) is None
        assert found_spec(spec, None) == spec
    with pytest.raises(EwavitError, match=r"/gone.*--data"):
        found_spec("modelnet10:set", "modelnet10:/gone")


@pytest.mark.filterwarnings("error::UserWarning")
def test_evaluate_starts_no_more_readers_than_cores(capsys, tmp_path, monkeypatch):
    image_folder(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", "pets", *SMALL, "--name", "run"]) == 0
    assert main(["evaluate", "runs/run", "--workers", "64"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "top-5" not in said.out  # of two classes it is always right


@pytest.mark.parametrize(("classes", "shown"), [(3, False), (5, False), (6, True)])
def test_top_5_is_said_only_where_it_can_be_wrong(classes, shown):
    import torch

    from ewavit.tasks.classification import ClassMeter

    meter = ClassMeter("images", classes)
    meter.update(torch.empty(0), torch.eye(classes), torch.arange(classes))
    metrics = meter.compute()
    assert ("top-5" in metrics.sentence) == shown
    assert set(metrics.as_dict()) == {"loss", "top1", "top5", "mean_class", "images"}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"depth": 4}, "depth=4"),
        ({"depths": (2, 4), "name": "x"}, "depths=(2, 4),name=x"),
        ({"a": [1, (2, 3)], "b": {"c": 1, "d": 2}}, "a=[1, (2, 3)],b={'c': 1, 'd': 2}"),
        ({"number": "4", "flag": "True"}, "number='4',flag='True'"),
        ({"flag": True, "none": None, "rate": 1e-3}, "flag=True,none=None,rate=0.001"),
        ({}, ""),
    ],
)
def test_model_kwargs_may_be_a_dict(given, text):
    recipe = Recipe(model_kwargs=given)
    assert recipe.model_kwargs == text
    assert recipe.parsed("model_kwargs") == given
    assert Recipe(model_kwargs=text) == recipe


@pytest.mark.parametrize("value", [{"norm_layer": len}, {"a": "x,y=1"}, {"a b": 1}, {1: 2}])
def test_model_kwargs_that_no_text_can_hold_are_refused(value):
    with pytest.raises(EwavitError, match="cannot be written as text"):
        Recipe(model_kwargs=value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": "3"}, "--epochs '3' does not work: give a whole number"),
        ({"epochs": 1.5}, "--epochs 1.5 does not work: give a whole number"),
        ({"epochs": None}, "--epochs None does not work: give a whole number"),
        ({"lr": "fast"}, "--lr 'fast' does not work: give a number"),
        ({"lr": 10**400}, "finite"),
        ({"seed": float("nan")}, "finite"),
        ({"amp": "yes"}, "--amp 'yes' does not work: give True or False"),
        ({"amp": 2}, "--amp 2 does not work: give True or False"),
        ({"data": 3}, "--data 3 does not work: give text"),
        ({"data": None}, "--data None does not work: give text"),
        ({"model_kwargs": ["depth=4"]}, "--model-kwargs"),
        ({"scale": 1}, "--scale 1 does not work: give numbers"),
    ],
)
def test_a_recipe_of_the_wrong_type_is_refused_by_name(settings, said):
    with pytest.raises(EwavitError) as caught:
        Recipe(**settings)
    assert said in str(caught.value)


def test_a_recipe_takes_paths_and_numbers_of_numpy(tmp_path):
    recipe = Recipe(output=tmp_path, epochs=np.int64(3), lr=np.float32(0.5), share_rate=0)
    assert recipe == Recipe(output=str(tmp_path), epochs=3, lr=0.5, share_rate=0.0)
    recipe.save(tmp_path / "args.yaml")
    assert main(["plan", "--config", str(tmp_path / "args.yaml"), "--epochs", "0"]) == 2


def test_repr_of_the_averaging_shows_its_schedule_and_state():
    import torch

    import ewavit as ewa
    from small_models import MlpNet

    model = ewa.expand(MlpNet(), 3)
    averaging = ewa.ExpertAveraging(model, share_rate=0.3, ramp_steps=100, every=2)
    text = "ExpertAveraging(LinearRamp(rate=0.3, steps=100), every=2, steps_done={}, {})"
    assert repr(averaging) == text.format(0, "not attached")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaging.attach(optimizer)
    optimizer.step()
    assert repr(averaging) == text.format(1, "attached")
    averaging.detach()
    assert repr(averaging) == text.format(1, "not attached")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong-input")
    assert main(["train", *SMALL, "--output", str(folder), "--name", "run"]) == 0
    return folder / "run"


OF_A_RUN = [
    (["evaluate", "RUN", "--batch-size", "0"], "batch_size 0"),
    (["evaluate", "RUN", "--batch-size", "-1"], "batch_size -1"),
    (["evaluate", "RUN", "--batch-size", HUGE], "--batch-size"),
    (["evaluate", "RUN", "--batch-size", "x"], "'x' is not a whole number"),
    (["evaluate", "RUN", "--workers", "-1"], "workers -1"),
    (["evaluate", "RUN", "--votes", "0"], "votes 0"),
    (["evaluate", "RUN", "--data", ""], "--data"),
    (["evaluate", "RUN", "--data", "nowhere"], "nowhere"),
    (["evaluate", "RUN", "--data", "file"], "file"),
    (["evaluate", "RUN", "--data", "folder"], "folder"),
    (["evaluate", "RUN", "--data", NUL], "NUL"),
    (["evaluate", "RUN", "--data", LONG], "too long"),
    (["evaluate", "RUN", "--data", "solids"], "solids"),
    (["evaluate", "RUN", "--data", "torch/cifar10", "--data-dir", "nowhere"], "torch/cifar10"),
    (["evaluate", "RUN/args.yaml"], "args.yaml"),
    (["evaluate", "RUN/summary.csv"], "summary.csv"),
    (["export", "RUN", "--to", "folder"], "folder"),
    (["export", "RUN", "--to", "taken.safetensors"], "taken.safetensors"),
    (["export", "RUN", "--to", "taken.onnx"], "taken.onnx"),
    (["export", "RUN", "--to", "file/x.onnx"], "file"),
    (["export", "RUN", "--to", f"{LONG}.onnx"], "too long"),
    (["export", "RUN", "--to", "x.safetensors", "--data", ""], "--data"),
    (["export", "RUN", "--to", "x.safetensors", "--data", "nowhere"], "nowhere"),
    (["train", "--resume", "RUN"], "finished"),
    (["train", "--resume", "RUN", "--data", ""], "--data"),
    (["train", "--resume", "RUN", "--lr", "1"], "leave out --lr"),
    (["train", "--config", "RUN"], "RUN"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), OF_A_RUN, ids=lambda value: "")
def test_wrong_input_beside_a_run_leaves_the_run_as_it_is(capsys, place, run, arguments, said):
    for suffix in ("safetensors", "onnx"):
        (place / f"taken.{suffix}").mkdir()
    before = files_below(place), files_below(run), (run / "model.safetensors").read_bytes()
    line = one_line(capsys, *(word.replace("RUN", str(run)) for word in arguments))
    assert said.replace("RUN", str(run)) in line
    assert (files_below(place), files_below(run), (run / "model.safetensors").read_bytes()) == before
