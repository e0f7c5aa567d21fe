"""Retrieval: descriptors, loss, batches, metrics and runs, through the same loop as classification."""

import csv
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from ewavit import EwavitError
from ewavit.cli import main
from ewavit.compare.reading import read_run
from ewavit.data import retrieval as sets
from ewavit.data.batches import BatchPlan, ClassPlan, ImageInputs
from ewavit.data.options import DataOptions
from ewavit.tasks.contrastive import ContrastiveLoss, contrastive, koleo
from ewavit.tasks.neighbours import NeighbourMeter, rank
from ewavit.tasks.retrieval import Retrieval
from ewavit.training.export import evaluate, export, load_model
from ewavit.training.loop import resume, train
from ewavit.training.opening import open_data
from ewavit.training.processes import Interrupted
from ewavit.training.recipe import Recipe
from ewavit.training.run_folder import RunFolder
from processes import in_processes
from runs import assert_same_end, stop_after

BUNDLED = "fashion-mnist-mini"
TINY = {
    "task": "retrieval", "model": "vit_tiny_patch16_224", "experts": 2, "limit": 200, "batch_size": 40,
    "model_kwargs": "patch_size=7,embed_dim=32,depth=2,num_heads=2", "epochs": 2, "warmup_epochs": 1,
    "memory": 100,
}  # fmt: skip
INPUTS = ImageInputs(5, 1, 28)
SMALL = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}


def described(count, classes, seed=0, dim=4):
    generator = torch.Generator().manual_seed(seed)
    descriptors = F.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1)
    return descriptors, torch.arange(count) % classes


def write_folder(root, splits, size=8):
    """Class folders: for each split the names of its classes and the number of images of each."""
    for split, (names, count) in splits.items():
        for number, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for image in range(count):
                grey = np.full((size, size), 20 * number + image, np.uint8)
                Image.fromarray(grey).save(folder / f"{image}.png")
    return root


# The loss.


def test_the_contrastive_loss_is_the_sum_over_pairs_as_written_down():
    descriptors, labels = described(7, 3)
    others, of_others = described(9, 4, seed=1)
    total = 0.0
    for z, y in zip(descriptors, labels, strict=True):
        for w, v in zip(others, of_others, strict=True):
            s = float(z @ w)
            total += 1 - s if y == v else max(0.0, s - 0.3)
    found = contrastive(descriptors, labels, others, of_others, 0.3)
    assert float(found) == pytest.approx(total / 7, rel=1e-12)


def test_koleo_is_minus_the_mean_logarithm_of_the_nearest_distance():
    descriptors, _ = described(6, 2)
    nearest = [
        min(float((z - w).norm()) for number, w in enumerate(descriptors) if number != own)
        for own, z in enumerate(descriptors)
    ]
    assert float(koleo(descriptors)) == pytest.approx(-np.mean(np.log(nearest)), rel=1e-6)


def test_the_memory_holds_the_latest_descriptors_and_they_are_paired():
    loss, (descriptors, labels) = ContrastiveLoss(0.5, 0.7, size=10), described(12, 3)
    descriptors = descriptors.float()
    first = loss(descriptors[:6], labels[:6])
    alone = contrastive(descriptors[:6], labels[:6], descriptors[:6], labels[:6], 0.5)
    assert torch.allclose(first, alone + 0.7 * koleo(descriptors[:6]))
    second = loss(descriptors[6:], labels[6:])
    everything = torch.cat([descriptors[6:], descriptors[:6]]), torch.cat([labels[6:], labels[:6]])
    assert torch.allclose(
        second, contrastive(descriptors[6:], labels[6:], *everything, 0.5) + 0.7 * koleo(descriptors[6:])
    )
    assert torch.equal(loss.memory, descriptors[[10, 11, 2, 3, 4, 5, 6, 7, 8, 9]])
    assert torch.equal(loss.labels, labels[[10, 11, 2, 3, 4, 5, 6, 7, 8, 9]])


def test_a_restored_memory_goes_on_with_the_same_losses():
    one, (descriptors, labels) = ContrastiveLoss(size=10), described(24, 3)
    for part in range(2):
        one(descriptors[6 * part : 6 * part + 6], labels[6 * part : 6 * part + 6])
    other = ContrastiveLoss(size=10)
    other.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    for part in range(2, 4):
        batch = descriptors[6 * part : 6 * part + 6], labels[6 * part : 6 * part + 6]
        assert torch.equal(one(*batch), other(*batch))
    with pytest.raises(EwavitError, match="holds 10 descriptors, not 8"):
        ContrastiveLoss(size=8).load_state_dict(one.state_dict())


def _check_memory(rank):
    descriptors, labels = described(12, 3)
    loss = ContrastiveLoss(size=20)
    loss(descriptors[rank::2], labels[rank::2])
    kept = torch.cat([descriptors[0::2], descriptors[1::2]]).float()
    assert torch.equal(loss.memory[:12], kept)
    assert torch.equal(loss.labels[:12], torch.cat([labels[0::2], labels[1::2]]))
    assert int(loss.written) == 12


def _in_a_process():
    _check_memory(torch.distributed.get_rank())


def test_the_memory_of_every_process_holds_the_batches_of_all():
    in_processes(2, _in_a_process)


# The batches.


def test_batches_hold_groups_of_a_class_and_ranks_share_them():
    labels = np.repeat(np.arange(6), [9, 8, 4, 3, 12, 8])
    plans = [ClassPlan(44, 5, 8, 3, rank, 2, tuple(labels.tolist()), 4) for rank in (0, 1)]
    batches = [list(plan.train_indices(1)) for plan in plans]
    assert [len(each) for each in batches] == [plans[0].batches_per_epoch] * 2 == [2, 2]
    for batch in (batch for each in batches for batch in each):
        groups = labels[batch].reshape(-1, 4)
        assert (groups == groups[:, :1]).all()
    used = Counter(np.concatenate([batch for each in batches for batch in each]).tolist())
    of_small_class = set(np.flatnonzero(labels == 3).tolist())  # its three images make a group of four
    assert all(times == 1 for index, times in used.items() if index not in of_small_class)


def test_an_epoch_of_class_batches_resumes_at_any_batch_and_differs_from_the_next():
    plan = ClassPlan(40, 5, 8, 3, 0, 1, tuple([0, 1, 2, 3, 4] * 8), 4)
    whole = [batch.tolist() for batch in plan.train_indices(2)]
    assert [batch.tolist() for batch in plan.train_indices(2, start=3)] == whole[3:]
    assert [batch.tolist() for batch in plan.train_indices(3)] != whole
    assert sorted(index for batch in whole for index in batch) == list(range(40))


def test_class_batches_evaluate_like_others():
    plan = ClassPlan(40, 11, 8, 3, 1, 2, tuple([0, 1] * 20), 4)
    other = BatchPlan(40, 11, 8, 3, 1, 2)
    assert [a.tolist() for a in plan.eval_indices()] == [b.tolist() for b in other.eval_indices()]


# The metrics.


def slow_ranking(descriptors, labels, roles):
    """Recall@K and mAP@R query by query."""
    hits, precisions = [], []
    for query in range(len(labels)):
        if roles[query] == sets.GALLERY:
            continue
        others = [i for i in range(len(labels)) if i != query and roles[i] != sets.QUERY]
        others.sort(key=lambda i: -float(descriptors[query] @ descriptors[i]))
        right = [bool(labels[i] == labels[query]) for i in others]
        if not any(right):
            continue
        hits.append([any(right[:k]) for k in (1, 2, 4, 8)])
        total = sum(right)
        precisions.append(sum(sum(right[: i + 1]) / (i + 1) for i in range(total) if right[i]) / total)
    return np.mean(hits, 0), np.mean(precisions), len(hits)


@pytest.mark.parametrize("mixed", [False, True], ids=["all against all", "query and gallery"])
def test_recall_and_map_at_r_equal_their_slow_twin(mixed, monkeypatch):
    monkeypatch.setattr("ewavit.tasks.neighbours.AT_ONCE", 7)
    descriptors, labels = described(40, 10)
    labels[0] = 99  # no other image of its class
    roles = (
        torch.tensor([sets.QUERY, sets.GALLERY, sets.GALLERY] * 14)[:40] if mixed else torch.zeros(40).long()
    )
    found, (recall, precision, count) = (
        rank(descriptors, labels, roles),
        slow_ranking(descriptors, labels, roles),
    )
    assert found.recall == pytest.approx(recall, abs=1e-12)
    assert found.map_at_r == pytest.approx(precision, abs=1e-12)
    assert found.queries == count
    assert 0 < recall[0] < 1


def test_the_loss_of_a_ranking_is_the_mean_over_both_kinds_of_pairs():
    descriptors, labels = described(12, 3)
    s = descriptors @ descriptors.T
    other = ~torch.eye(12, dtype=torch.bool)
    same = (labels[:, None] == labels) & other
    expected = (1 - s[same]).mean() + (s[~same & other] - 0.5).clamp(min=0).mean()
    assert rank(descriptors, labels, torch.zeros(12).long()).loss == pytest.approx(float(expected), rel=1e-9)


def test_queries_without_a_match_are_one_line():
    descriptors, labels = described(4, 4)
    with pytest.raises(EwavitError, match="no query has another image of its class"):
        rank(descriptors, labels, torch.zeros(4).long())


def _metrics_of(rank_of, world):
    descriptors, labels = described(21, 4)
    meter = NeighbourMeter("images")
    targets = torch.stack([labels, torch.zeros_like(labels)], 1)
    meter.update(descriptors, descriptors[rank_of::world], targets[rank_of::world])
    return meter.compute()


def _same_metrics(values):
    found = _metrics_of(torch.distributed.get_rank(), 2)
    assert found.values == pytest.approx(values)
    assert found.count == 21


def test_metrics_of_two_processes_are_those_of_all_images():
    in_processes(2, _same_metrics, dict(_metrics_of(0, 1).values))


# The model.


@pytest.mark.parametrize("pool", ["token", "mean", "gem"])
def test_descriptors_have_length_one_and_the_asked_dimension(pool):
    torch.manual_seed(0)
    task, images = Retrieval(), torch.randn(3, 1, 28, 28)
    model, settings = task.build_model("vit_tiny_patch16_224", INPUTS, pool=pool, dim=6, **SMALL)
    found = model.eval()(images)
    assert found.shape == (3, 6)
    assert torch.allclose(found.norm(dim=1), torch.ones(3), atol=1e-6)
    again = task.create_model("vit_tiny_patch16_224", settings).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images), found)


def test_gem_is_the_power_mean_over_the_patches():
    torch.manual_seed(0)
    model, _ = Retrieval().build_model("vit_tiny_patch16_224", INPUTS, pool="gem", **SMALL)
    images = torch.randn(2, 1, 28, 28)
    tokens = model.eval().forward_features(images)[:, 1:].clamp(min=1e-6)
    expected = F.normalize((tokens**3).mean(1) ** (1 / 3), dim=1)
    assert torch.allclose(model(images), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pool": "max"}, "pool=max is unknown: choose one of token, mean, gem"),
        ({"dim": -1}, "dim=-1 is out of range"),
        ({"patch_size": 5}, "patch size 5 does not divide"),
    ],
)
def test_wrong_descriptors_are_one_line(kwargs, message):
    with pytest.raises(EwavitError, match=message) as caught:
        Retrieval().build_model("vit_tiny_patch16_224", INPUTS, **{**SMALL, **kwargs})
    assert "\n" not in str(caught.value)


# The data.


def test_the_bundled_set_evaluates_classes_that_it_does_not_train_on():
    data = open_data(BUNDLED, DataOptions(batch_size=40, per_class=4), "retrieval")
    inputs, labels = next(data.train_batches(0))
    assert len(inputs) == 40
    assert set(Counter(labels.tolist()).values()) <= {4 * n for n in range(1, 11)}
    targets = torch.cat([targets for _, targets in data.eval_batches()])
    assert targets.shape == (1000, 2)
    assert set(targets[:, 0].tolist()) == {0, 1, 2, 3, 4}
    assert not set(data.classes) & set(data.eval_classes)


@pytest.mark.parametrize("bundled", [True, False])
def test_held_out_are_whole_classes(tmp_path, bundled):
    spec = BUNDLED if bundled else str(write_folder(tmp_path / "set", {"train": ("abcdef", 4)}))
    options = DataOptions(batch_size=4, per_class=2, holdout=0.4, workers=0)
    data = open_data(spec, options, "retrieval")
    trained = {int(label) for _, labels in data.train_batches(0) for label in labels}
    held = {int(label) for _, targets in data.eval_batches() for label in targets[:, 0]}
    assert len(held) == 2
    assert not trained & held


def test_a_folder_may_have_queries_and_a_gallery(tmp_path):
    root = write_folder(tmp_path, {"train": ("ab", 4), "query": ("cd", 1), "gallery": ("cde", 2)})
    data = open_data(str(root), DataOptions(batch_size=4, per_class=2, workers=0), "retrieval")
    targets = torch.cat([targets for _, targets in data.eval_batches()]).tolist()
    assert sorted(map(tuple, targets)) == [(0, 1), (0, 2), (0, 2), (1, 1), (1, 2), (1, 2), (2, 2), (2, 2)]
    assert data.eval_classes == ("c", "d", "e")


def test_classes_on_both_sides_are_one_line(tmp_path):
    root = write_folder(tmp_path, {"train": ("abc", 2), "val": ("cd", 2)})
    with pytest.raises(EwavitError, match="has c in training and in evaluation"):
        open_data(str(root), DataOptions(batch_size=4, workers=0), "retrieval")


def published(root, name):
    """A set of four training and four evaluation images of two classes each, laid out as published."""
    if name == "CUB-200":
        names = ("001.a", "002.b", "101.c", "102.d")
        write_folder(root, {"images": (names, 2)})
        images = [f"{folder}/{number}.png" for folder in names for number in range(2)]
        numbers = (1, 1, 2, 2, 101, 101, 102, 102)
        (root / "images.txt").write_text("".join(f"{i} {path}\n" for i, path in enumerate(images, 1)))
        (root / "image_class_labels.txt").write_text("".join(f"{i} {n}\n" for i, n in enumerate(numbers, 1)))
        (root / "classes.txt").write_text("".join(f"{int(n[:3])} {n}\n" for n in names))
        return
    folder = "shop" if name == "Stanford Online Products" else "Img/img"
    write_folder(root, {folder: ("abcd", 2)})
    images = [(f"{'shop' if folder == 'shop' else 'img'}/{c}/{i}.png", c) for c in "abcd" for i in range(2)]
    if folder == "shop":
        for file, part in (("Ebay_train.txt", images[:4]), ("Ebay_test.txt", images[4:])):
            rows = "".join(f"1 {ord(c)} 1 {path}\n" for path, c in part)
            (root / file).write_text(f"image_id class_id super_class_id path\n{rows}")
        return
    (root / "Eval").mkdir()
    splits = ["train"] * 4 + ["query", "gallery"] * 2
    rows = "".join(f"{path} id_{c} {split}\n" for (path, c), split in zip(images, splits, strict=True))
    (root / "Eval" / "list_eval_partition.txt").write_text(f"8\nimage_name item_id evaluation_status\n{rows}")


@pytest.mark.parametrize("name", ["CUB-200", "Stanford Online Products", "In-shop"])
def test_published_sets_are_read_and_their_counts_checked(tmp_path, monkeypatch, name):
    published(tmp_path, name)
    options = DataOptions(batch_size=4, per_class=2, workers=0)
    with pytest.raises(
        EwavitError, match=f"has 4 training images, {name} as published has [0-9,]+: "
    ) as caught:
        open_data(str(tmp_path), options, "retrieval")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sets.COUNTS, name, (4, 2, 4, 2))
    data = open_data(str(tmp_path), options, "retrieval")
    assert len(next(data.train_batches(0))[0]) == 4
    roles = torch.cat([targets for _, targets in data.eval_batches()])[:, 1].tolist()
    assert roles == ([1, 2, 1, 2] if name == "In-shop" else [0, 0, 0, 0])


# Runs.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(Recipe(**TINY, output=str(tmp_path_factory.mktemp("runs")), name="whole")).run


def test_a_run_leaves_what_evaluation_comparison_and_export_need(finished, tmp_path):
    rows = list(csv.DictReader((finished / "predictions.csv").open()))
    last = list(csv.DictReader((finished / "summary.csv").open()))[-1]
    right = np.mean([row["class"] == row["nearest_class"] for row in rows])
    assert 100 * right == pytest.approx(float(last["eval_recall1"]), abs=0.2)
    assert all(row["input"] != row["nearest"] for row in rows)
    assert (finished / "predictions.png").stat().st_size > 1000
    metrics = evaluate(finished)
    assert metrics["recall1"] == pytest.approx(float(last["eval_recall1"]), abs=0.2)
    assert read_run(RunFolder(finished), 42, Retrieval.judge).metric == pytest.approx(
        metrics["recall1"], abs=0.2
    )
    said = export(finished, tmp_path / "plain.safetensors")
    assert "Recall@1" in said
    model, card = load_model(tmp_path / "plain.safetensors")
    assert card.task.name == "retrieval"
    keys = set(load_file(tmp_path / "plain.safetensors"))
    assert "blocks.0.mlp.fc1.weight" in keys
    assert torch.allclose(model(torch.randn(2, 1, 28, 28)).norm(dim=1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("updates", [3, 7])
def test_a_run_stopped_within_an_epoch_resumes_exactly_with_its_memory(
    finished, tmp_path, monkeypatch, updates
):
    recipe = Recipe(**TINY, output=str(tmp_path), name="stopped")
    with monkeypatch.context() as patch:
        stop_after(patch, updates)
        with pytest.raises(Interrupted):
            train(recipe)
    resume(tmp_path / "stopped")
    assert_same_end(tmp_path / "stopped", finished)


def test_predict_names_and_draws_the_nearest_images(finished, tmp_path, capsys):
    Image.fromarray(np.arange(784, dtype=np.uint8).reshape(28, 28)).save(tmp_path / "new.png")
    assert main(["predict", str(finished), str(tmp_path / "new.png"), "--json", "--topk", "3"]) == 0
    row = json.loads(capsys.readouterr().out)["images"][0]
    assert len(row["neighbours"]) == len(row["classes"]) == 3
    assert row["similarities"] == sorted(row["similarities"], reverse=True)
    assert (
        main(["predict", str(finished), str(tmp_path / "new.png"), "--sheet", str(tmp_path / "a.png")]) == 0
    )
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width > sheet.height


def test_an_onnx_file_gives_the_same_descriptors(finished, tmp_path):
    assert "Recall@1" in export(finished, tmp_path / "model.onnx")


def test_retrieval_compares_its_arms_by_recall_at_1(tmp_path, capsys):
    settings = [
        "--task",
        "retrieval",
        "--model-kwargs",
        TINY["model_kwargs"],
        "--limit",
        "100",
        "--batch-size",
        "40",
    ]
    command = ["compare", *settings, "--arms", "dense,ewa", "--seeds", "2", "--epochs", "1", "--experts", "2"]
    assert main([*command, "--output", str(tmp_path), "--name", "c", "--jobs", "1"]) == 0
    assert "Recall@1" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "c")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--task", "retrieval", "--mixup", "0.2"], "--mixup and --cutmix mix classes"),
        (["--task", "retrieval", "--batch-size", "30"], "--batch-size 30 is no multiple of --per-class 4"),
        (["--task", "retrieval", "--bce-loss"], "--bce-loss is for classification"),
        (["--task", "retrieval", "--data", "nowhere"], "unknown data 'nowhere' for --task retrieval"),
        (["--task", "retrieval", "--holdout", "0.9"], "leaves fewer than two on a side"),
        (["--task", "retrieval", "--memory", "8", "--twa", "1"], "changes the losses that --twa compares"),
        (["--koleo", "0.5"], "--koleo 0.5 is not for classification: leave it out"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, capsys, given, message):
    assert main(["train", *given, "--output", str(tmp_path), "--name", "x"]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "x").exists()
