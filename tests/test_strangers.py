"""Files from strangers run nothing, reach nothing, and say in one line what is wrong with them."""

import json
import os
import zipfile
from dataclasses import asdict

import h5py
import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models import _builder, _hub

import ewavit as ewa
from ewavit.cli import main
from ewavit.points.files import checked
from ewavit.points.files import load_file as load_cloud
from ewavit.points.sources import read_points
from ewavit.training.card import ModelCard
from ewavit.training.export import evaluate, export
from ewavit.training.loop import train
from runs import recipe

SMALL = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 2,
    "in_chans": 1,
}
CARD = {
    "model": "vit_tiny_patch16_224", "model_kwargs": SMALL, "classes": ["a", "b"], "in_chans": 1,
    "img_size": 16, "mean": [0.5], "std": [0.5], "data": "fashion-mnist-mini",
}  # fmt: skip


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.fixture
def unreachable(monkeypatch):
    """timm must not look for weights, wherever it may."""

    def reached(*args, **kwargs):
        raise AssertionError("timm was sent for weights")

    for module, names in {
        _builder: (
            "load_pretrained",
            "load_custom_pretrained",
            "load_state_dict_from_hf",
            "load_state_dict_from_path",
        ),
        _hub: ("download_cached_file", "hf_hub_download", "load_model_config_from_hf"),
        timm.models._factory: ("load_checkpoint", "load_model_config_from_hf", "load_model_config_from_path"),
    }.items():  # fmt: skip
        for name in names:
            monkeypatch.setattr(module, name, reached, raising=False)


def stored(tmp_path, card=CARD, weights=None):
    """A file whose metadata hold a card; the weights fit `CARD`."""
    if weights is None:
        weights = timm.create_model(CARD["model"], **SMALL).state_dict()
    file = tmp_path / "a.safetensors"
    save_file(weights, file, {"ewavit": card if isinstance(card, str) else json.dumps(card)})
    return file


def one_line(problem):
    text = str(problem.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


@pytest.mark.parametrize("data", ["hfds/a/b", "HFDS/a", "wds/a", "tfds/mnist", "hfids/a"])
def test_data_that_a_file_names_are_not_fetched(tmp_path, unreachable, data):
    with pytest.raises(ewa.EwavitError, match="if you trust them, give --data"):
        evaluate(stored(tmp_path, {**CARD, "data": data}))


def test_a_whole_file_loads(tmp_path, unreachable):
    model = ewa.load(stored(tmp_path))
    assert model(torch.zeros(1, 1, 16, 16)).shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depth", 10**6), ("checkpoint_path", "FILE"), ("pretrained", True),
        ("pretrained_cfg", {"file": "FILE"}),
        ("pretrained_cfg_overlay", {"file": "FILE"}), ("cache_dir", "FILE"), ("features_only", True),
        ("pretrained_strict", False), ("checkpoint_file", "FILE"), ("hf_hub_id", "a/b"), ("url", "FILE"),
        ("embed_dim", {"file": "/etc/passwd"}), ("norm_layer", "/etc/passwd"),
        ("act_layer", "os.system('x')"),
        ("__class__", 1), ("a b", 1), ("num_heads", [[[[[[2]]]]]]), ("depth", 1e300), ("depth", 10**9),
        ("embed_dim", 0), ("embed_dim", -16), ("depth", "many"), ("num_heads", 0), ("num_heads", 3.5),
    ],
)  # fmt: skip
def test_a_card_gives_arguments_of_an_architecture_only(tmp_path, unreachable, name, value):
    evil = tmp_path / "evil.pth"
    torch.save(Evil(tmp_path / "ran"), evil)
    value = json.loads(json.dumps(value).replace("FILE", str(evil)))
    file = stored(tmp_path, {**CARD, "model_kwargs": {**SMALL, name: value}})
    for use in (ewa.load, evaluate, lambda file: export(file, tmp_path / "out.onnx")):
        with pytest.raises(ewa.EwavitError) as problem:
            use(file)
        one_line(problem)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    "model",
    [
        "hf-hub:a/b",
        "hf_hub:a/b",
        "local-dir:/tmp",
        "timm/vit_tiny",
        "../evil",
        "/tmp/evil",
        "",
        "no_such_model",
        "x" * 10**6,
    ],
)
def test_a_card_names_a_model_of_the_registry(tmp_path, unreachable, model):
    with pytest.raises(ewa.EwavitError) as problem:
        ewa.load(stored(tmp_path, {**CARD, "model": model}))
    one_line(problem)


@pytest.mark.parametrize(
    "card",
    [
        "", "[]", "null", "{", "[" * 10**5, '{"model": "\\ud800"}', "1e999", '"card"',
        *({key: value for key, value in CARD.items() if key != missing} for missing in CARD),
        *({**CARD, key: None} for key in CARD),
        *({**CARD, key: value} for key, value in {
            "model": 7, "model_kwargs": [], "classes": "ab", "in_chans": "1", "img_size": -16, "mean": ["x"],
            "std": [0.0], "data": 3, "metric": "good", "mixture": 5, "num_points": 4, "more": 1,
            "crop_pct": 70, "interpolation": "telepathy", "crop_mode": "x",
        }.items()),
        {**CARD, "classes": []}, {**CARD, "classes": ["a"] * 3}, {**CARD, "mean": [0.5] * 3},
        {**CARD, "in_chans": 10**12}, {**CARD, "img_size": 10**9}, {**CARD, "mean": [float("nan")]},
        {**CARD, "mixture": {"num_experts": 10**8, "layers": ["blocks.0.mlp"], "router": {}}},
        {**CARD, "mixture": {"num_experts": 2, "layers": ["blocks.0.mlp"], "router": {"k": "x"}}},
        {**CARD, "mixture": {"num_experts": 2, "layers": ["nothing"], "router": {}}},
    ],
)  # fmt: skip
def test_a_wrong_card_is_named_in_one_line(tmp_path, unreachable, card):
    file = stored(tmp_path, card)
    with pytest.raises(ewa.EwavitError, match=r"a\.safetensors") as problem:
        ewa.load(file)
    one_line(problem)


def test_on_the_command_line_a_wrong_card_is_status_2(tmp_path, capsys):
    file = stored(tmp_path, {**CARD, "classes": 5})
    assert main(["evaluate", str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".safetensors"])
def test_weights_that_would_run_code_are_refused(tmp_path, suffix):
    file = tmp_path / f"evil{suffix}"
    torch.save({"state_dict": {"a": torch.zeros(2)}, "more": Evil(tmp_path / "ran")}, file)
    words = ["train", "--initial-checkpoint", str(file), "--output", str(tmp_path / "runs"), "--limit", "64"]
    for command in (
        words,
        ["evaluate", str(file)],
        ["export", str(file), "--to", str(tmp_path / "o.safetensors")],
    ):
        assert main(command) == 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_when_they_are_loaded(tmp_path, value):
    weights = timm.create_model(CARD["model"], **SMALL).state_dict()
    weights["blocks.0.mlp.fc1.weight"][3, 4] = value
    with pytest.raises(ewa.EwavitError, match=r"a\.safetensors: blocks\.0\.mlp\.fc1\.weight holds 1 values"):
        ewa.load(stored(tmp_path, weights=weights))
    file = tmp_path / "start.pth"
    torch.save({"model": weights}, file)
    settings = {"model_kwargs": "patch_size=8,embed_dim=16,depth=1,num_heads=2", "img_size": 16}
    with pytest.raises(ewa.EwavitError, match=r"blocks\.0\.mlp\.fc1\.weight holds 1 values"):
        train(recipe(tmp_path, "run", initial_checkpoint=str(file), **settings))


def test_weights_of_another_shape_than_the_card_says_are_named(tmp_path):
    with pytest.raises(ewa.EwavitError, match="holds another model than it says"):
        ewa.load(stored(tmp_path, {**CARD, "model_kwargs": {**SMALL, "embed_dim": 32}}))


def test_a_runs_model_says_nothing_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "a-secret-of-the-environment")
    result = train(recipe(tmp_path, "run", epochs=1))
    with safe_open(result.model_file, "pt") as handle:
        said = json.dumps(handle.metadata())
    assert str(tmp_path) not in said
    assert os.getcwd() not in said
    for file in result.run.rglob("*"):
        if file.is_file():
            assert b"a-secret-of-the-environment" not in file.read_bytes(), file
    card = ModelCard.of_file(result.model_file)
    assert card is not None
    assert asdict(card)["absolute_data"] is None
    assert evaluate(result.model_file)["top1"] == result.row["eval_top1"]


# Data


def pickled_arrays(tmp_path):
    np.save(tmp_path / "evil.npy", np.array([Evil(tmp_path / "ran")], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "evil.npz", points=np.array([Evil(tmp_path / "ran")], dtype=object))
    return tmp_path / "evil.npy", tmp_path / "evil.npz"


def test_arrays_that_would_run_code_are_refused(tmp_path):
    for file in pickled_arrays(tmp_path):
        with pytest.raises(ValueError, match="Python objects"):
            load_cloud(file, 16, np.random.default_rng(0))
    assert not (tmp_path / "ran").exists()


def test_a_small_file_that_becomes_huge_is_refused(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as packed,
        packed.open("points.npy", "w", force_zip64=True) as stream,
    ):
        header = {"shape": (3 * 10**6, 3), "fortran_order": False, "descr": "<f8"}
        np.lib.format.write_array_header_1_0(stream, header)
        for _ in range(72):
            stream.write(bytes(10**6))
    with pytest.raises(ValueError, match="more than 100 times as many"):
        load_cloud(tmp_path / "bomb.npz", 16, np.random.default_rng(0))


def test_a_header_that_says_more_than_follows_is_refused(tmp_path):
    with (tmp_path / "a.npy").open("wb") as stream:
        np.lib.format.write_array_header_1_0(
            stream, {"shape": (10**12, 3), "fortran_order": False, "descr": "<f8"}
        )
    with pytest.raises(ValueError, match="its header says"):
        load_cloud(tmp_path / "a.npy", 16, np.random.default_rng(0))


def external_link(file, other):
    file["data"] = h5py.ExternalLink(str(other), "data")


def soft_link(file, other):
    file["data"] = h5py.SoftLink("/label")


def outside_storage(file, other):
    file.create_dataset("data", (1, 4, 3), "f4", external=[(str(other), 0, 48)])


def virtual(file, other):
    layout = h5py.VirtualLayout((1, 4, 3), "f4")
    layout[:] = h5py.VirtualSource(str(other), "data", (1, 4, 3))
    file.create_virtual_dataset("data", layout)


@pytest.mark.parametrize("make", [external_link, soft_link, outside_storage, virtual])
def test_h5_files_that_reach_for_other_files_are_refused(tmp_path, make):
    folder = tmp_path / "modelnet40_ply_hdf5_2048"
    folder.mkdir()
    (folder / "shape_names.txt").write_text("a\nb\n")
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["data"] = np.ones((1, 4, 3), "f4")
    for name in ("ply_data_train0.h5", "ply_data_test0.h5"):
        with h5py.File(folder / name, "w") as file:
            file["label"] = np.zeros((1, 1), "i8")
            make(file, tmp_path / "other.h5")
    with pytest.raises(ewa.EwavitError, match=r"links are not followed|in other files"):
        read_points(f"modelnet40:{folder}", 4, 0)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-3, 1.0, 1e8, 1e30, 2e38, 1e150, 1e300])
@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_clouds_of_any_size_are_scaled_right_or_refused(scale, kind):
    cloud = np.random.default_rng(0).normal(size=(64, 3))
    with np.errstate(all="ignore"):
        points = (cloud * scale).astype(kind)
    if not np.isfinite(points).all():
        with pytest.raises(ewa.EwavitError, match=r"a\.npy"):
            checked(points, "a.npy", 1)
        return
    found = checked(points, "a.npy", 1)
    expected = cloud - cloud.mean(0)
    expected /= np.linalg.norm(expected, axis=1).max()
    np.testing.assert_allclose(found, expected, atol=1e-4)
