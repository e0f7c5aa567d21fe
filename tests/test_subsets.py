"""Which training samples a run trains on: the first ones, drawn ones, so many of each class; and the rest."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ewavit import EwavitError
from ewavit.compare.arms import make_arms
from ewavit.compare.compare import compare
from ewavit.compare.tuning import Grids
from ewavit.compare.work import Work
from ewavit.data.augmentation import Augmentation
from ewavit.data.options import DataOptions
from ewavit.data.subsets import split
from ewavit.tasks.judge import TOP1
from ewavit.training.export import export
from ewavit.training.loop import train
from ewavit.training.opening import open_data, open_recipe_data
from ewavit.training.recipe import Recipe
from runs import TINY

PLAIN = Augmentation(hflip=0, crop_padding=0, scale=(1, 1), color_jitter=0)
LABELS = np.repeat(np.arange(4), (9, 7, 8, 6))


def parts(labels=LABELS, **options):
    return split(len(labels), DataOptions(batch_size=1, **options), lambda: labels)


@pytest.mark.parametrize("subset", [{"limit": 12}, {"shots": 3}], ids=str)
@given(seed=st.integers(0, 2**63 - 1), shuffled=st.booleans())
def test_a_draw_follows_from_the_seed_and_leaves_the_rest(subset, seed, shuffled):
    labels = np.random.default_rng(0).permutation(LABELS) if shuffled else LABELS
    options = {**subset, "resample": True, "test_on_rest": True, "seed": seed}
    drawn, rest = parts(labels, **options)
    assert np.array_equal(drawn, parts(labels, **options)[0])
    assert not np.array_equal(drawn, parts(labels, **options | {"seed": seed + 1})[0])
    assert len(drawn) == 12
    assert np.array_equal(np.sort(np.concatenate([drawn, rest])), np.arange(len(labels)))
    if "shots" in subset:
        assert np.bincount(labels[drawn]).tolist() == [3, 3, 3, 3]


def test_every_sample_is_drawn_equally_often():
    counts = np.zeros(len(LABELS))
    for seed in range(2000):
        counts[parts(limit=6, resample=True, seed=seed)[0]] += 1
    expected = 2000 * 6 / len(LABELS)
    assert np.abs(counts - expected).max() < 5 * expected**0.5


def test_shots_without_a_draw_are_the_first_ones_whatever_the_seed():
    for seed in (0, 1):
        assert parts(shots=2, seed=seed)[0].tolist() == [0, 1, 9, 10, 16, 17, 24, 25]


@pytest.mark.parametrize(("folds", "limit"), [(5, 29), (4, None), (3, 11)])
def test_folds_hold_out_every_training_sample_once(folds, limit):
    held = []
    for fold in range(folds):
        options = {"limit": limit, "resample": limit == 11, "seed": 3, "holdout": 1 / folds, "fold": fold}
        kept, out = parts(**options)
        assert set(kept) | set(out) == set(parts(**options | {"holdout": 0.0, "fold": 0})[0])
        assert not set(kept) & set(out)
        held += out.tolist()
    assert len(held) == len(set(held)) == (limit or len(LABELS))


def folder_of_images(root: Path) -> str:
    for name in ("cat", "dog"):  # no val/: the rest needs none
        (root / "train" / name).mkdir(parents=True)
        for number in range(6):
            pixels = np.random.default_rng((number, ord(name[0]))).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{number}.png")
    return str(root)


@pytest.mark.parametrize("kind", ["memory", "folder", "clouds", "masks"])
def test_the_rest_is_evaluated_and_never_trained_on(tmp_path, kind):
    spec = {"memory": "fashion-mnist-mini", "clouds": "solids", "masks": "shapes"}
    data = spec.get(kind) or folder_of_images(tmp_path)
    more = {"mean": (0.0,), "std": (1.0,)} if kind in ("memory", "folder") else {}
    options = DataOptions(
        batch_size=3, limit=6, resample=True, test_on_rest=True, seed=7, workers=0, num_points=32,
        augmentation=replace(PLAIN, aa="none") if kind == "clouds" else PLAIN, **more,
    )  # fmt: skip
    task = "segmentation" if kind == "masks" else None
    opened = open_data(data, options, task)
    whole = open_data(
        data, replace(options, resample=False, test_on_rest=False, limit=None, holdout=0.5), task
    )
    assert opened.num_train == 6
    assert opened.num_train + opened.num_eval == whole.num_train + whole.num_eval
    if kind in ("memory", "folder"):
        trained, rest = (
            {image.numpy().tobytes() for batch, _ in batches for image in batch}
            for batches in (opened.train_batches(0), opened.eval_batches())
        )
        assert (len(trained), len(rest)) == (6, opened.num_eval)
        assert not trained & rest


def test_arms_of_one_seed_share_their_draw_and_seeds_do_not(tmp_path):
    subset = {"limit": None, "shots": 8, "resample": True, "test_on_rest": True, "workers": 0, "epochs": 1}
    recipe = Recipe(**{**TINY, **subset}, output=str(tmp_path), name="draws", val_interval=9)
    arms = make_arms(["dense", "twin"], recipe, {"twin": {"experts": 1}})
    found = compare(recipe, arms, 2, jobs=2)
    assert "8 training images of each class, drawn anew with each seed, of fashion-mnist-mini" in found.data
    assert found.data.endswith("by all other training images,")
    dense, twin = ({run.seed: run for run in arm.runs} for arm in found.arms)
    for seed in (42, 43):
        assert dense[seed].error is twin[seed].error is None
        assert np.array_equal(dense[seed].labels, twin[seed].labels)
        assert np.array_equal(dense[seed].predictions, twin[seed].predictions)
        assert len(dense[seed].labels) == 10_000 - 80
    assert not np.array_equal(dense[42].labels, dense[43].labels)


def test_the_draw_depends_on_no_setting_of_an_arm(tmp_path):
    recipe = Recipe(**{**TINY, "limit": 40}, resample=True, output=str(tmp_path), name="x")
    arms = make_arms(["dense", "ewa"], recipe)
    cells = Work(recipe, arms, (42,), Grids(), 1, "ewavit compare").final()
    draws = [open_recipe_data(cell.recipe).class_counts().tolist() for cell in cells]
    assert draws[0] == draws[1]
    assert sum(draws[0]) == 40


@pytest.mark.parametrize("judged_on", [{"resample": True, "test_on_rest": True}, {"holdout": 0.5}], ids=str)
def test_export_compares_the_accuracy_on_the_images_that_judged_the_run(tmp_path, judged_on):
    settings = {**TINY, "limit": 64, "epochs": 1, "workers": 0, "seed": 3, **judged_on}
    done = train(Recipe(**settings, output=str(tmp_path), name="run"))
    said = export(done.run, tmp_path / "out.safetensors")
    count = 32 if "holdout" in judged_on else 10_000 - 64
    metric = TOP1.text(done.row["eval_top1"])
    assert f"top-1 {metric} on {count:,} images (the run: {metric})" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shots": 7}, "shots 7 is more than the 6 samples of a class: give fewer"),
        ({"limit": 30, "test_on_rest": True}, "test_on_rest has no rest: all 30 training samples"),
        ({"limit": 1, "resample": True}, "limit 1 leaves one class only: raise it"),
        ({"holdout": 0.01}, "holdout 0.01 of 30 training samples leaves one side empty"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_subset_without_samples_is_refused(options, said):
    with pytest.raises(EwavitError, match=said):
        parts(**options)


@pytest.mark.parametrize(
    ("spec", "task", "options", "said"),
    [
        (
            "shapes",
            "segmentation",
            {"shots": 2},
            "shots 2 needs samples of one class each: give limit instead",
        ),
        (
            "fashion-mnist-mini",
            "retrieval",
            {"limit": 99, "test_on_rest": True},
            "test_on_rest does not work",
        ),
        ("wds/x", None, {"shots": 2}, "shots does not work for wds/x, a streamed set"),
    ],
)
def test_data_that_a_subset_does_not_fit_are_refused(spec, task, options, said):
    with pytest.raises(EwavitError, match=said):
        open_data(spec, DataOptions(batch_size=2, **options), task)
