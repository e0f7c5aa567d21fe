"""Normals and colours of points: from solids and files, through augmentation and model, to a prediction."""

import csv

import numpy as np
import pytest
import torch
import trimesh

import ewavit
import point_sets
from ewavit import EwavitError
from ewavit.cli import main
from ewavit.points.augmentation import PointAugmentation
from ewavit.points.features import checked_features
from ewavit.points.solids import NOISE, SOLIDS, make_solid_parts, make_solids
from ewavit.points.sources import read_cloud, read_points
from ewavit.points.transformer import NUM_CATEGORIES, create_point_model
from ewavit.training.export import evaluate, export
from ewavit.training.loop import resume, train
from ewavit.training.processes import Interrupted
from runs import assert_same_end, recipe, stop_after

KWARGS = "dim=16,depth=3,num_heads=2,num_group=6,group_size=4,encoder_width=4"
TINY = {"model": None, "model_kwargs": KWARGS, "num_points": 32, "batch_size": 4, "experts": 2}
POINTS = point_sets.cloud(0, 60).astype(np.float64)
NORMALS = point_sets.cloud(1, 60).astype(np.float64)
NORMALS /= np.linalg.norm(NORMALS, axis=1, keepdims=True)
COLOURS = np.random.default_rng(2).integers(0, 256, (60, 3))
TABLE = np.concatenate([POINTS, NORMALS, COLOURS], 1)
HEADER = "x y z nx ny nz red green blue"


def test_solids_have_the_outward_normals_of_their_surface_and_the_same_points():
    plain, more = make_solids(64), make_solids(64, normals=True)
    for index in (1, 3):
        assert np.array_equal(plain[index], more[index][..., :3])
        assert np.allclose(np.linalg.norm(more[index][..., 3:], axis=-1), 1, atol=1e-6)
    clouds, labels, names = more[1].astype(np.float64), more[2], tuple(SOLIDS)
    for name in set(names) - {"torus"}:
        for cloud in clouds[labels == names.index(name)]:
            for side in np.unique(cloud[:, 3:].round(5), axis=0):
                on = np.abs(cloud[:, 3:] - side).max(1) < 1e-4
                heights = (cloud[:, :3] - cloud[on, :3].mean(0)) @ side
                assert np.abs(heights[on]).max() < 5 * NOISE  # a face is flat
                assert heights.max() < 6 * NOISE  # and the solid behind it
    parts, same = make_solid_parts(64)[2], make_solid_parts(64, normals=True)[2]
    assert np.array_equal(parts.points, same.points[..., :3])
    assert same.points.shape[-1] == 6


def test_normals_turn_with_the_cloud_and_stay_perpendicular_to_its_surface():
    generator = torch.Generator().manual_seed(0)
    flat = torch.cat([torch.randn(5, 40, 2, generator=generator), torch.zeros(5, 40, 1)], -1)
    up = torch.tensor([0.0, 0, 1]).expand(5, 40, 3)
    colours = torch.rand(5, 40, 3, generator=generator)
    augment = PointAugmentation.parse("scale2-shift0.3-rotx180-roty90-rotz180-drop0.5")
    torch.manual_seed(1)
    alone = augment(flat)
    torch.manual_seed(1)
    found = augment(torch.cat([flat, up, colours], -1), normals=True)
    assert torch.equal(found[..., :3], alone)
    points, normals = found[..., :3], found[..., 3:6]
    assert torch.allclose(normals.norm(dim=-1), torch.ones(5, 40), atol=1e-6)
    inside = points - points[:, :1]
    assert torch.allclose((inside * normals).sum(-1), torch.zeros(5, 40), atol=1e-5)
    assert (normals[..., 2] < 0.9).any()
    moved = (found[..., 6:] != colours).any(-1)  # a dropped point becomes the first one, colour included
    assert torch.equal(found[..., 6:][moved], colours[:, :1].expand(-1, 40, -1)[moved])
    assert moved.any()


def written(folder, name):
    file = folder / name
    if name == "named.txt":
        rows = TABLE[:, [6, 7, 8, 0, 1, 2, 3, 4, 5]]  # the header counts, not the place
        np.savetxt(file, rows, "%.9f", header="red green blue x y z nx ny nz", comments="#")
    elif name.endswith(".txt"):
        np.savetxt(file, TABLE, "%.9f")
    elif name.endswith(".npy"):
        np.save(file, TABLE)
    elif name.endswith(".npz"):
        np.savez(file, points=TABLE.astype(np.float32))
    elif name.endswith(".pcd"):
        fields = HEADER.replace("nx ny nz", "normal_x normal_y normal_z")
        sizes = " ".join("8" * 9)
        head = f"FIELDS {fields}\nSIZE {sizes}\nTYPE {' '.join('F' * 9)}\nPOINTS 60\nDATA binary\n"
        file.write_bytes(head.encode() + TABLE.astype("<f8").tobytes())
    else:
        kinds = ["double"] * 6 + ["uchar"] * 3
        properties = "\n".join(
            f"property {kind} {name}" for kind, name in zip(kinds, HEADER.split(), strict=True)
        )
        lines = "\n".join(" ".join(map(str, [*row[:6], *row[6:].astype(int)])) for row in TABLE)
        file.write_text(f"ply\nformat ascii 1.0\nelement vertex 60\n{properties}\nend_header\n{lines}\n")
    return file


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.txt", "named.txt", "a.pcd", "a.ply"])
def test_every_format_gives_each_point_its_own_features(tmp_path, name):
    plain = read_cloud(written(tmp_path, name), 60)
    found = read_cloud(tmp_path / name, 60, "normals,colours")
    assert np.array_equal(found[:, :3], plain)
    order = np.array([np.argmin(np.abs(NORMALS - row).sum(1)) for row in found[:, 3:6]])
    assert sorted(order) == list(range(60))
    assert np.allclose(found[:, 6:], COLOURS[order] / 127.5 - 1, atol=1e-5)
    centred = POINTS - POINTS.mean(0)
    assert np.allclose(plain, (centred / np.linalg.norm(centred, axis=1).max())[order], atol=1e-5)


def test_a_mesh_has_the_normals_of_its_faces(tmp_path):
    point_sets.mesh().export(tmp_path / "a.off")
    found = read_cloud(tmp_path / "a.off", 60, "normals")
    assert np.allclose(np.abs(found[:, 3:]).max(1), 1)
    assert ((found[:, :3] * found[:, 3:]).sum(1) > 0).all()  # outwards
    with pytest.raises(EwavitError, match="colours of a mesh are not read"):
        read_cloud(tmp_path / "a.off", 60, "colours")


def test_published_text_files_have_their_normals(tmp_path):
    root = point_sets.write_shapenetpart(tmp_path / "parts")
    for file in root.glob("*/*.txt"):
        rows = np.loadtxt(file)
        rows[:, 3:6] /= np.linalg.norm(rows[:, 3:6], axis=1, keepdims=True)
        np.savetxt(file, rows, "%.6f")
    found = read_points(f"shapenetpart:{root}", 40, features="normals")
    assert found.train_points.shape[-1] == 6
    assert np.allclose(np.linalg.norm(found.train_points[..., 3:], axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("features", "columns", "said"),
    [
        ("normals", 3, "has 3 columns, too few for --point-features normals: leave it out"),
        ("normals,colours", 6, "has 6 columns, too few for --point-features normals,colours"),
        ("colours", 6, "has no colours from 0 to 255, or from 0 to 1 in columns 4 to 6"),
        ("normals", [0, 1, 2, 6, 7, 8], "has no normals of length 1 in columns 4 to 6"),
        ("normals,colours", [0, 1, 2, 3, 4, 5, 3, 4, 5], "has no colours from 0 to 255, .* 7 to 9"),
    ],
)
def test_clouds_without_the_features_are_refused_by_name(features, columns, said):
    table = TABLE[:, :columns] if isinstance(columns, int) else TABLE[:, columns]
    with pytest.raises(EwavitError, match=f"^a.npy {said}"):
        checked_features(table, "a.npy", features)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "solids", "--point-features", "colours"], "solids has no colours: give --point-features"),
        (["--point-features", "normals"], "--point-features normals is not for classification: leave it out"),
        (
            ["--data", "solids", "--model-kwargs", "features=3"],
            "--model-kwargs features=3 does not work: give --point-features",
        ),
        (["--data", "solids", "--point-features", "noise"], "normals,colours"),
    ],
)
def test_features_that_cannot_be_had_are_refused_in_one_line(tmp_path, capsys, words, said):
    assert main(["train", *words, "--limit", "40", "--batch-size", "20", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_header_that_does_not_name_the_features_is_refused(tmp_path):
    np.savetxt(tmp_path / "a.csv", TABLE[:, :4], "%.6f", ",", header="x,y,z,intensity", comments="")
    with pytest.raises(EwavitError, match="its columns x y z intensity have no nx"):
        read_cloud(tmp_path / "a.csv", 60, "normals")
    trimesh.PointCloud(POINTS).export(tmp_path / "a.ply")
    with pytest.raises(EwavitError, match=r"have no nx|no normals are read"):
        read_cloud(tmp_path / "a.ply", 60, "normals")


@pytest.mark.parametrize("name", ["point_transformer_s", "point_transformer_seg_s"])
def test_a_model_that_ignores_the_features_computes_what_it_does_without_them(name):
    settings = {"dim": 16, "depth": 3, "num_heads": 2, "num_group": 6, "group_size": 4}
    plain = create_point_model(name, 5, **settings).eval()
    more = create_point_model(name, 5, features=6, **settings).eval()
    state = plain.state_dict()
    weight = state["encoder.first_conv.0.weight"]
    more.load_state_dict(
        state | {"encoder.first_conv.0.weight": torch.nn.functional.pad(weight, (0, 0, 0, 6))}
    )
    points, features = torch.randn(2, 40, 3), torch.randn(2, 40, 6)
    category = (
        torch.eye(NUM_CATEGORIES)[:2].unsqueeze(1).expand(-1, 40, -1) if "seg" in name else points[..., :0]
    )
    one = plain(torch.cat([points, category], -1))
    torch.testing.assert_close(more(torch.cat([points, features, category], -1)), one, atol=1e-5, rtol=1e-4)
    more.encoder.first_conv[0].weight.data[:, 3:] = 1
    assert not torch.allclose(more(torch.cat([points, features, category], -1)), one, atol=1e-4)


def test_a_run_with_normals_resumes_exactly_and_its_files_keep_them(tmp_path, monkeypatch):
    settings = {**TINY, "data": "solid-parts", "point_features": "normals", "limit": 24, "votes": 2}
    whole = train(recipe(tmp_path, "whole", **settings))
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, "parts", **settings))
    resume(tmp_path / "parts")
    assert_same_end(whole.run, tmp_path / "parts")
    for ending in ("onnx", "safetensors"):
        file = tmp_path / f"model.{ending}"
        assert "logits equal" in export(whole.run, file)
    found = evaluate(file, batch_size=4, votes=2)["instance_iou"]
    assert found == pytest.approx(whole.row["eval_instance_iou"], abs=1e-3)


def test_prediction_of_files_takes_the_features_of_the_training(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for label in ("dark", "light"):
            (tmp_path / "set" / split / label).mkdir(parents=True)
            for number in range(count):
                cloud, colours = generator.normal(size=(50, 3)), generator.random((50, 3)) / 2
                rows = np.concatenate([cloud, colours + 0.5 * (label == "light")], 1)
                np.save(tmp_path / "set" / split / label / f"{number}.npy", rows)
    data = f"points:{tmp_path / 'set'}"
    run = train(
        recipe(tmp_path, "run", **{**TINY, "data": data, "point_features": "colours", "limit": None})
    ).run
    own = list(csv.DictReader((run / "predictions.csv").open(newline="")))
    places = [tmp_path / "set" / "val" / label for label in ("dark", "light")]
    found = ewavit.predict(run, places)
    assert [row["predicted_class"] for row in found] == [row["predicted_class"] for row in own]
    for one, other in zip(found, own, strict=True):
        assert one["probability"] == pytest.approx(float(other["probability"]), abs=1.01e-4)
    np.save(tmp_path / "bare.npy", np.zeros((50, 3)) + np.arange(50)[:, None])
    with pytest.raises(EwavitError, match=r"bare\.npy has 3 columns, too few for --point-features colours"):
        ewavit.predict(run, [tmp_path / "bare.npy"])
