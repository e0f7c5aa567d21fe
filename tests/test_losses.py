"""What a run minimises beside the task's loss, and which parameters it leaves alone."""

import json
import math
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ewavit import EwavitError
from ewavit.core.experts import StackedExperts
from ewavit.core.moe import moe_layers
from ewavit.data.options import DataOptions
from ewavit.tasks.choice import task_for
from ewavit.tasks.part_segmentation import PartSegmentation
from ewavit.training.building import build_optimizer, build_scheduler
from ewavit.training.loop import TrainingRun, resume, train
from ewavit.training.losses import Teacher, balanced_weights, training_loss
from ewavit.training.opening import open_data
from ewavit.training.processes import Interrupted
from ewavit.training.recipe import Recipe
from ewavit.training.run_folder import RunFolder
from runs import TINY, assert_same_end, recipe, stop_after

BUNDLED = "fashion-mnist-mini"


@pytest.fixture(scope="module")
def data():
    return open_data(BUNDLED, DataOptions(batch_size=32, limit=200))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A short run that can teach."""
    return train(recipe(tmp_path_factory.mktemp("teacher"), "teacher", epochs=1, experts=1)).run


def loss_of(data, **settings):
    return training_loss(Recipe(**TINY, **settings), task_for(BUNDLED), data, torch.device("cpu"))


OUTPUTS, LABELS = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def test_binary_cross_entropy_is_the_sum_over_classes_as_written_down(data):
    found = loss_of(data, bce_loss=True, smoothing=0.1)(OUTPUTS, OUTPUTS, LABELS)
    total = 0.0
    for row, label in zip(OUTPUTS.tolist(), LABELS.tolist(), strict=True):
        for number, logit in enumerate(row):
            p, wanted = 1 / (1 + math.exp(-logit)), 0.9 * (number == label) + 0.01
            total -= wanted * math.log(p) + (1 - wanted) * math.log(1 - p)
    assert float(found) == pytest.approx(total / OUTPUTS.numel(), rel=1e-6)
    mixed = F.one_hot(LABELS, 10).float()
    assert torch.equal(
        loss_of(data, bce_loss=True)(OUTPUTS, OUTPUTS, mixed),
        loss_of(data, bce_loss=True)(OUTPUTS, OUTPUTS, LABELS),
    )


def test_balanced_weights_make_every_class_count_alike(data):
    counts = data.class_counts()
    assert counts.sum() == 200
    weights = balanced_weights(data)
    assert torch.allclose(weights * torch.tensor(counts), torch.full((10,), 20.0))
    found = loss_of(data, class_weights="balanced", smoothing=0.0)(OUTPUTS, OUTPUTS, LABELS)
    assert torch.equal(found, F.cross_entropy(OUTPUTS, LABELS, weight=weights))


def test_hard_and_soft_distillation_follow_deit(data, taught):
    inputs = next(data.train_batches(0))[0][:8]
    teacher = Teacher.load(str(taught), data, torch.device("cpu"))
    logits = teacher(inputs)
    plain = F.cross_entropy(OUTPUTS, LABELS, label_smoothing=0.1)
    hard = loss_of(data, distill_from=str(taught), distillation_alpha=0.3)(inputs, OUTPUTS, LABELS)
    assert torch.allclose(hard, 0.7 * plain + 0.3 * F.cross_entropy(OUTPUTS, logits.argmax(1)))
    soft = {"distillation_type": "soft", "distillation_tau": 2.0, "distillation_alpha": 1.0}
    found = loss_of(data, distill_from=str(taught), **soft)(inputs, OUTPUTS, LABELS)
    ours, theirs = (OUTPUTS / 2).softmax(1), (logits / 2).softmax(1)
    divergence = (theirs * (theirs.log() - ours.log())).sum()
    assert torch.allclose(found, 4 * divergence / OUTPUTS.numel(), atol=1e-6)


def test_a_teacher_gets_its_own_normalisation_and_class_order(data, taught, tmp_path):
    inputs = next(data.train_batches(0))[0][:8]
    before = Teacher.load(str(taught), data, torch.device("cpu"))
    file = tmp_path / "other.safetensors"
    card = json.loads(metadata_of(taught)["ewavit"])
    order = [3, 1, 2, 0, 4, 5, 6, 7, 8, 9]
    weights = load_file(taught / "model.safetensors")
    for name in ("head.weight", "head.bias"):
        weights[name] = weights[name][order].contiguous()
    card |= {"classes": [card["classes"][label] for label in order], "mean": [0.1], "std": [0.2]}
    save_file(weights, file, {"format": "pt", "ewavit": json.dumps(card)})
    other = Teacher.load(str(file), data, torch.device("cpu"))
    pixels = inputs * data.std[0] + data.mean[0]
    expected = before.model((pixels - 0.1) / 0.2)
    assert torch.allclose(other(inputs), expected, atol=1e-4)


def metadata_of(run):
    with safe_open(run / "model.safetensors", "pt") as handle:
        return handle.metadata()


@pytest.mark.parametrize(
    "settings",
    [
        {"bce_loss": True, "mixup": 0.8},
        {"class_weights": "balanced", "grad_accum_steps": 2},
        {"distill_from": "teacher", "distillation_type": "soft"},
        {"freeze": r"patch_embed|blocks\.0\."},
        {"opt_kwargs": "betas=(0.8,0.9)", "sched_kwargs": "warmup_prefix=True"},
    ],
    ids=str,
)
def test_a_stopped_run_goes_on_to_the_same_bits(settings, taught, tmp_path, monkeypatch):
    if "distill_from" in settings:
        settings = settings | {"distill_from": str(taught)}
    whole = train(recipe(tmp_path, "whole", **settings)).run
    plain = train(recipe(tmp_path, "plain")).run
    first, second = (load_file(run / "model.safetensors")["head.weight"] for run in (whole, plain))
    assert not torch.equal(first, second)  # the setting does something
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, "parts", **settings))
    resume(tmp_path / "parts")
    assert_same_end(whole, tmp_path / "parts")


def test_a_run_with_a_teacher_goes_on_from_another_folder(taught, tmp_path, monkeypatch):
    monkeypatch.chdir(taught.parent)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, "moved", distill_from=taught.name))
    monkeypatch.chdir(tmp_path)
    resume(tmp_path / "moved")
    assert_same_end(train(recipe(tmp_path, "whole", distill_from=str(taught))).run, tmp_path / "moved")


def test_a_teacher_that_changed_is_refused_when_its_run_is_resumed(taught, tmp_path, monkeypatch):
    teacher = tmp_path / "teacher.safetensors"
    shutil.copy(RunFolder(taught).model, teacher)
    run = tmp_path / "student"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, run.name, distill_from=str(teacher)))
    with safe_open(teacher, "pt") as handle:
        metadata = handle.metadata()
    save_file({name: value * 2 for name, value in load_file(teacher).items()}, teacher, metadata)
    with pytest.raises(EwavitError, match=r"teacher\.safetensors is another model than the run learned from"):
        resume(run)
    shutil.copy(RunFolder(taught).model, teacher)
    assert resume(run).model_file.exists()


def test_frozen_parameters_stay_and_the_others_learn(tmp_path, taught):
    start = load_file(taught / "model.safetensors")
    settings = {"initial_checkpoint": str(taught), "freeze": "patch_embed", "select": "all"}
    end = load_file(train(recipe(tmp_path, "frozen", **settings)).model_file)
    for name, weight in start.items():
        assert torch.equal(weight, end[name]) == name.startswith("patch_embed"), name


def test_arguments_reach_the_optimizer_and_the_schedule():
    model = torch.nn.Linear(2, 2)
    made = build_optimizer(model, Recipe(opt_kwargs="betas=(0.5,0.6),eps=1e-3"))
    assert (made.defaults["betas"], made.defaults["eps"]) == ((0.5, 0.6), 1e-3)
    assert Recipe(opt_kwargs={"eps": 0.5}).parsed("opt_kwargs") == {"eps": 0.5}
    schedule = build_scheduler(made, Recipe(sched_kwargs="k_decay=1.5", epochs=9), 10)
    assert schedule.k_decay == 1.5


@pytest.mark.parametrize("given", ["", "caution=True"])
def test_experts_are_separate_where_an_argument_makes_the_optimizer_use_whole_tensors(given, tmp_path):
    run = TrainingRun(recipe(tmp_path, "x", opt="nadamw", opt_kwargs=given), tmp_path, Accelerator())
    (moe,) = moe_layers(run.state.model).values()
    assert isinstance(moe.experts, StackedExperts) == (not given)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"opt_kwargs": "lr=1"}, "--opt-kwargs lr=1 does not work: give --lr"),
        ({"opt_kwargs": "nonsense"}, "--opt-kwargs 'nonsense' is not key=value"),
        ({"opt_kwargs": "nonsense=1"}, "timm could not build the optimizer of --opt adamw"),
        ({"opt": "lamb", "opt_kwargs": "max_grad_norm=x"}, "--opt lamb --opt-kwargs max_grad_norm=x"),
        ({"sched_kwargs": "nonsense=1"}, "timm could not build the schedule of --sched cosine"),
        ({"sched_kwargs": "k_decay=x"}, "--sched cosine --sched-kwargs k_decay=x "),
        ({"sched_kwargs": "noise=x"}, "--sched-kwargs noise=x "),
        ({"sched_kwargs": "noise=0.1,noise_pct=0"}, "noise_pct 0 is too small for noise_std 1.0"),
        ({"sched_kwargs": "noise=0.1,noise_pct=9,noise_std=3"}, "the learning rate becomes -"),
        ({"sched_kwargs": "cycle_limit=2"}, "cycle_limit=2 does not work: a run is one cycle"),
        ({"sched": "none", "sched_kwargs": "k_decay=2"}, "k_decay=2 has no schedule with --sched none"),
        ({"bce_loss": True, "class_weights": "balanced"}, "--bce-loss has no class weights"),
        ({"freeze": "("}, r"--freeze '\(' is no regular expression"),
        ({"freeze": "nonsense"}, "--freeze 'nonsense' fits none of the"),
        ({"freeze": ""}, "--freeze is empty"),
        ({"freeze": ".*"}, "fits all of the"),
        ({"distill_from": "nonsense"}, "--distill-from nonsense is no file and no timm model"),
        ({"distillation_alpha": 0}, "--distillation-alpha 0.0 is out of range"),
        ({"class_weights": "odd"}, "--class-weights 'odd' is unknown"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_in_words(settings, said, tmp_path):
    with pytest.raises(EwavitError, match=said):
        train(recipe(tmp_path, "x", **settings))
    assert not (tmp_path / "x").exists()


def test_a_teacher_by_name_needs_its_weights_and_the_same_number_of_classes(data, monkeypatch):
    create, name = timm.create_model, "vit_tiny_patch16_224"

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(EwavitError, match=rf"--distill-from {name} could not be loaded \(no network\)"):
        loss_of(data, distill_from=name)
    monkeypatch.setattr("timm.create_model", lambda *_, **kwargs: create(name, img_size=28, in_chans=1))
    with pytest.raises(EwavitError, match=f"--distill-from {name} has 1000 classes, and .* has 10"):
        loss_of(data, distill_from=name)
    monkeypatch.setattr(
        "timm.create_model", lambda *_, **kwargs: create(name, img_size=28, in_chans=1, num_classes=10)
    )
    inputs = next(data.train_batches(0))[0][:8]
    assert loss_of(data, distill_from=name)(inputs, OUTPUTS, LABELS).isfinite()


def test_other_tasks_have_their_own_loss(data):
    for settings in ({"bce_loss": True}, {"class_weights": "balanced"}, {"distill_from": "x"}):
        with pytest.raises(EwavitError, match="is for classification: leave it out"):
            training_loss(Recipe(**settings), PartSegmentation(), data, torch.device("cpu"))


def test_a_teacher_of_other_classes_is_refused(taught, tmp_path):
    for split, count in (("train", 8), ("val", 2)):
        for label in "ab":
            (tmp_path / "set" / split / label).mkdir(parents=True)
            for number in range(count):
                Image.new("L", (28, 28), number * 20).save(tmp_path / "set" / split / label / f"{number}.png")
    settings = {"data": str(tmp_path / "set"), "limit": None, "batch_size": 4, "distill_from": str(taught)}
    with pytest.raises(EwavitError, match="with other names"):
        train(recipe(tmp_path, "x", **settings))
