"""Readers of point clouds, each on a tiny set in its published layout; solids, augmentation, votes, IoU."""

import shutil

import numpy as np
import pytest
import torch

import point_sets
from ewavit import EwavitError
from ewavit.data.augmentation import Augmentation
from ewavit.data.options import DataOptions
from ewavit.points.augmentation import PointAugmentation
from ewavit.points.files import checked, load_file
from ewavit.points.metrics import part_ious
from ewavit.points.solids import SOLIDS, make_solid_parts, make_solids
from ewavit.points.sources import SCANOBJECTNN, PointSet, read_points, save_points
from ewavit.training.opening import open_data
from point_sets import CLASSES, POINTS, cloud

NUM_POINTS = 32


def normalised(points: np.ndarray) -> np.ndarray:
    points = points.astype(np.float64) - points.astype(np.float64).mean(0)
    return points / np.linalg.norm(points, axis=1).max()


def same_cloud(found: np.ndarray, points: np.ndarray) -> bool:
    """Whether all found points are points of the normalised cloud, without repetition."""
    apart = np.linalg.norm(found[:, None] - normalised(points)[None], axis=-1)
    return bool((apart.min(1) < 1e-5).all() and len(set(apart.argmin(1).tolist())) == len(found))


def read(spec: str, num_points: int = NUM_POINTS, **options: bool) -> PointSet:
    return read_points(spec, num_points, **options)


# --- formats ---


def test_meshes_are_sampled_by_area(tmp_path):
    found = read(f"modelnet40:{point_sets.write_off(tmp_path)}", 2000)
    assert found.classes == CLASSES
    assert found.train_points.shape == (4, 4000, 3)
    assert found.train_labels.tolist() == [0, 0, 1, 1]
    assert found.eval_labels.tolist() == [0, 1]
    # the box of 1 x 2 x 3 has faces of 12, 6 and 4 of 22 normal to its axes
    points = found.train_points[0]
    on_faces = np.minimum(points - points.min(0), points.max(0) - points) < 1e-4
    np.testing.assert_allclose(on_faces.mean(0), [12 / 22, 6 / 22, 4 / 22], atol=0.03)


def test_resampled_text_files(tmp_path):
    found = read(f"modelnet40:{point_sets.write_text(tmp_path)}")
    assert (found.name, found.classes) == ("modelnet40", CLASSES)
    assert found.train_points.shape == (4, POINTS, 3)
    assert found.train_labels.tolist() == [0, 0, 1, 1]
    assert same_cloud(found.train_points[2], cloud(2))
    assert same_cloud(found.eval_points[1], cloud(1))


def test_h5_files(tmp_path):
    found = read(f"modelnet40:{point_sets.write_modelnet_h5(tmp_path)}")
    assert found.train_points.shape == (4, 2 * NUM_POINTS, 3)
    assert found.train_labels.tolist() == [0, 1, 0, 1]
    assert same_cloud(found.train_points[3], cloud(11, 2 * POINTS))
    assert same_cloud(found.eval_points[0], cloud(20, 2 * POINTS))


def test_the_ten_classes_are_taken_out_of_forty(tmp_path):
    others = tuple(f"other{number}" for number in range(9))
    classes = ("airplane", "bed", *others, "chair")
    point_sets.write_modelnet_h5(tmp_path, classes)
    assert read(f"modelnet40:{tmp_path}").classes == classes
    found = read(f"modelnet10:{tmp_path}")
    assert found.classes == ("bed", "chair")
    assert found.train_labels.tolist() == [0, 1, 0, 1]
    assert same_cloud(found.train_points[1], cloud(11, 2 * POINTS))


def test_npz_files_and_the_one_that_is_written(tmp_path):
    found = read(f"modelnet10:{point_sets.write_npz(tmp_path / 'a')}")
    assert found.classes == CLASSES
    assert found.train_labels.tolist() == [1, 0]
    assert same_cloud(found.eval_points[0], cloud(5).astype(np.float16))
    save_points(found, tmp_path / "again.npz")
    again = read(f"modelnet10:{tmp_path / 'again.npz'}")
    assert again.eval_labels.tolist() == found.eval_labels.tolist()
    assert same_cloud(again.eval_points[0], found.eval_points[0])


@pytest.mark.parametrize("variant", ["obj_bg", "obj_only", "pb_t50_rs"])
def test_scanobjectnn(tmp_path, variant):
    found = read(f"{variant}:{point_sets.write_scanobjectnn(tmp_path)}")
    assert (found.name, found.classes) == (variant, SCANOBJECTNN)
    assert found.train_labels.tolist() == [0, 14]
    folder, rest = {
        "obj_bg": ("main_split", "objectdataset"),
        "obj_only": ("main_split_nobg", "objectdataset"),
        "pb_t50_rs": ("main_split", "objectdataset_augmentedrot_scale75"),
    }[variant]
    assert same_cloud(found.train_points[0], cloud(len(folder) + len(rest), 2 * POINTS))


def test_a_folder_of_every_kind_of_file(tmp_path):
    found = read(f"points:{point_sets.write_folder(tmp_path / 'scans')}")
    assert (found.name, found.classes) == ("scans", CLASSES)
    assert found.train_points.shape == (14, POINTS, 3)
    for number, seed in ((0, 1), (1, 2), (2, 4), (5, 5), (6, 6)):
        assert same_cloud(found.train_points[number], cloud(seed)), number
    assert same_cloud(found.eval_points[0], cloud(7))


def test_parts_stay_with_their_points(tmp_path):
    found = read(f"shapenetpart:{point_sets.write_shapenetpart(tmp_path)}")
    assert len(found.classes) == 50
    assert (found.categories[0], found.categories[15]) == ((0, 1, 2, 3), (47, 48, 49))
    assert found.train_category.tolist() == [0, 15, 15]
    assert found.eval_category.tolist() == [0, 15]
    assert found.train_points.shape == (3, NUM_POINTS, 3)
    points = normalised(cloud(0, 90))
    nearest = np.linalg.norm(found.train_points[0][:, None] - points, axis=-1).argmin(1)
    assert found.train_labels[0].tolist() == np.resize((0, 1, 2, 3), 90)[nearest].tolist()
    assert len(np.unique(found.eval_points[1], axis=0)) == 25  # filled up by repetition


def test_every_cloud_is_centred_and_has_radius_one(tmp_path):
    found = read(f"modelnet40:{point_sets.write_text(tmp_path)}")
    np.testing.assert_allclose(found.train_points.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found.train_points, axis=-1).max(1), 1, rtol=1e-6)


def test_reading_again_gives_the_same_points(tmp_path):
    spec = f"modelnet40:{point_sets.write_off(tmp_path)}"
    assert np.array_equal(read(spec).train_points, read(spec).train_points)


# --- what is wrong with a set or a cloud is named ---


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.empty((0, 3)), "somewhere is empty"),
        (np.ones((5, 2)), r"has the shape \(5, 2\)"),
        (np.ones(5), r"has the shape \(5,\)"),
        (np.full((5, 3), np.nan), "coordinates that are not finite"),
        (np.array([[0, 0, np.inf]] * 5), "coordinates that are not finite"),
        (np.eye(3), "has 3 points: remove it, or choose --num-points 3"),
        (np.ones((5, 3)), "all its points in one place"),
    ],
)
def test_a_bad_cloud_is_named(points, message):
    with pytest.raises(EwavitError, match=message):
        checked(points, "somewhere", 4)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.ply", b"no ply"), ("a.off", b"no off"), ("a.npy", b"no npy"), ("a.npz", b"no npz"),
        ("a.pcd", b"no pcd"),
        ("a.pcd", b"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 99\nDATA binary\n1234"),
        ("a.pcd", b"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 9\nDATA binary_compressed\n1234"),
        ("a.pcd", b"FIELDS x y\nSIZE 4 4\nTYPE F F\nPOINTS 1\nDATA ascii\n1 2\n"),
        ("a.ply", b"ply\nformat ascii 1.0\nelement vertex 0\nproperty float x\nend_header\n"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_or_skipped(tmp_path, name, content):
    point_sets.write_folder(tmp_path)
    bad = tmp_path / "train" / "bed" / name
    bad.write_bytes(content)
    with pytest.raises(EwavitError, match=rf"train/bed/{name} (cannot be read as a point cloud|is empty)"):
        read(f"points:{tmp_path}")
    found = read(f"points:{tmp_path}", skip_bad=True)
    assert found.bad == 1
    assert found.train_labels.tolist().count(1) == 7


def test_objects_in_numpy_files_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([print, 1], object))
    with pytest.raises(ValueError, match="Python objects, which could run code"):
        load_file(tmp_path / "a.npy", 8, np.random.default_rng(0))


def test_clouds_that_are_too_small_are_named(tmp_path):
    spec = f"modelnet40:{point_sets.write_text(tmp_path)}"
    with pytest.raises(
        EwavitError, match=rf"bed_0001.txt has {POINTS} points: remove it, or choose --num-points"
    ):
        read(spec, POINTS + 1)


def test_what_a_set_lacks_is_named(tmp_path):
    text = point_sets.write_text(tmp_path / "text")
    (text / "chair" / "chair_0003.txt").unlink()
    h5 = point_sets.write_modelnet_h5(tmp_path / "h5")
    (h5 / "ply_data_test0.h5").write_bytes(b"no h5")
    wrong = tmp_path / "wrong"
    point_sets.write_modelnet_h5(wrong, ("bed", "chair", "sofa"))
    (wrong / "shape_names.txt").write_text("bed\nchair\n")
    folder = point_sets.write_folder(tmp_path / "folder")
    (folder / "test" / "bed").rename(folder / "test" / "desk")
    empty = point_sets.write_folder(tmp_path / "empty")
    (empty / "test" / "bed" / "a.npy").unlink()
    parts = point_sets.write_shapenetpart(tmp_path / "parts")
    file = parts / "04379243" / "t1.txt"
    file.write_text(file.read_text().replace(" 47.000000", " 0.000000"))
    np.savez(tmp_path / "foreign.npz", a=np.ones(3))
    for spec, message in (
        (f"modelnet40:{text}", "chair_0003.txt cannot be read"),
        (f"modelnet40:{h5}", "ply_data_test0.h5 cannot be read as an h5 file"),
        (f"modelnet40:{wrong}", "cloud 2 of .*train0.h5 belongs to none of the 2 classes"),
        (f"modelnet40:{tmp_path / 'nowhere'}", "no folder or file"),
        (f"modelnet40:{folder}", "does not hold ModelNet"),
        (f"modelnet10:{tmp_path / 'foreign.npz'}", "cannot be read as an .npz file of clouds"),
        (f"obj_bg:{folder}", "has no main_split/training_objectdataset.h5"),
        (f"points:{folder}", r"differ \(bed, desk\)"),
        (f"points:{empty}", "test/bed has no clouds"),
        (f"points:{text}", "text has no train/: it must hold train/ and val/"),
        (f"shapenetpart:{folder}", "synsetoffset2category.txt is missing"),
        (f"shapenetpart:{parts}", "t1.txt has parts of another category"),
        ("modelnet10", "no folder or file ''"),
        (f"teapots:{text}", "unknown point data"),
    ):
        with pytest.raises(EwavitError, match=message):
            read(spec)


def held_out(root, val: str | None, inner: str = "train"):
    """A folder of clouds whose evaluation split is called `val`, or is missing; opened with holdout then."""
    point_sets.write_folder(root)
    shutil.rmtree(root / "test") if val is None else (root / "test").rename(root / val)
    if not inner:
        for name in CLASSES:
            (root / "train" / name).rename(root / name)
        (root / "train").rmdir()
    options = {} if val else {"holdout": 0.25}
    return open_data(f"points:{root}", DataOptions(batch_size=2, num_points=NUM_POINTS, **options))


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_a_folder_of_clouds_has_its_validation_folder_under_each_usual_name(tmp_path, val):
    data = held_out(tmp_path, val)
    assert (data.num_train, data.num_eval) == (14, 2)


@pytest.mark.parametrize("inner", ["train", ""])
def test_clouds_are_held_out_of_a_folder_without_other_splits(tmp_path, inner):
    data = held_out(tmp_path, None, inner)
    assert (data.classes, data.num_train, data.num_eval) == (CLASSES, 10, 4)
    assert len(list(data.eval_batches())) == 2


def test_hidden_clouds_and_links_to_a_folder_above_do_not_count_and_other_formats_are_counted(tmp_path):
    folder = point_sets.write_folder(tmp_path) / "train" / "bed"
    for hidden in (".ipynb_checkpoints", "@eaDir"):
        (folder / hidden).mkdir()
        np.save(folder / hidden / "a.npy", cloud(0))
    (folder / "up").symlink_to("..")
    (folder / "a.laz").write_bytes(b"")
    data = open_data(f"points:{tmp_path}", DataOptions(batch_size=2, num_points=NUM_POINTS))
    assert (data.classes, data.num_train) == (CLASSES, 14)
    assert data.notes == ("not read beside the clouds: 1 file of other formats (.laz 1)",)


# --- coordinates far away, missing points, text ---


@pytest.mark.parametrize("kind", [np.float64, np.int64])
@pytest.mark.parametrize("offset", [0, 1e3, -5.4e6, 1e12])
def test_map_coordinates_keep_the_shape_of_the_object(kind, offset):
    shape = (1000 * np.random.default_rng(0).normal(size=(64, 3))).round()
    found = checked((shape + np.array([offset, -offset, 0])).astype(kind), "somewhere", 4)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, normalised(shape), atol=1e-6)


@pytest.mark.parametrize("size", [1e-300, 1e-20, 1e20, 1e300])
def test_very_large_and_very_small_clouds_are_scaled_as_others(size):
    np.testing.assert_allclose(
        checked(size * cloud(0).astype(np.float64), "somewhere", 4), normalised(cloud(0)), atol=1e-6
    )


@pytest.mark.parametrize("far", [1e9, -1e30, 1e300])
def test_a_cloud_that_an_outlier_collapses_is_an_error(far):
    points = cloud(0).astype(np.float64)
    points[3, 1] = far
    with pytest.raises(EwavitError, match=r"somewhere collapses .*outlier"):
        checked(points, "somewhere", 4)


def test_map_coordinates_of_every_reader_keep_the_shape(tmp_path):
    far = cloud(0).astype(np.float64) + np.array([5e5, 5.4e6, 100])
    for name in CLASSES:
        for split in ("train", "val"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            np.save(folder / "a.npy", far)
            np.savez(folder / "b.npz", points=far)
            np.savetxt(folder / "c.csv", far, delimiter=",", header="x,y,z", comments="")
            point_sets.write_pcd(folder / "d.pcd", far, "ascii")
    for points in read(f"points:{tmp_path}").train_points:
        assert same_cloud(points, cloud(0))


def holes(kind: type) -> np.ndarray:
    """An organised cloud of 8 x 10 pixels, of which every fourth has no depth."""
    image = np.concatenate([cloud(0, 80), np.ones((80, 1))], 1).reshape(8, 10, 4).astype(kind)
    image[:, ::4, 2] = np.nan
    return image


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("flat", [True, False])
def test_missing_points_of_an_organised_cloud_are_left_out(tmp_path, kind, flat):
    image = holes(kind)
    measured = image[~np.isnan(image[..., 2])][:, :3]
    for name in CLASSES:
        for split in ("train", "val"):
            (tmp_path / split / name).mkdir(parents=True)
            np.save(tmp_path / split / name / "a.npy", image.reshape(-1, 4) if flat else image)
            point_sets.write_pcd(tmp_path / split / name / "b.pcd", image.reshape(-1, 4)[:, :3], "binary")
    found = read(f"points:{tmp_path}", 20)
    assert found.bad == 0
    assert found.train_points.shape == (4, 40, 3)
    assert all(same_cloud(points, measured) for points in found.train_points)


def test_a_cloud_of_missing_points_alone_is_named(tmp_path):
    point_sets.write_folder(tmp_path)
    np.save(tmp_path / "train" / "bed" / "z.npy", np.full((4, 10, 3), np.nan))
    with pytest.raises(EwavitError, match=r"z\.npy has coordinates that are not finite"):
        read(f"points:{tmp_path}")
    assert read(f"points:{tmp_path}", skip_bad=True).bad == 1


@pytest.mark.parametrize("suffix", [".txt", ".xyz", ".csv", ".pts", ".XYZ"])
@pytest.mark.parametrize(
    "text",
    [
        "1 2 3\n-4 5 6e-1\n",
        "\ufeff1,2,3\n-4,5,0.6",
        "1, 2, 3\n-4, 5, 0.6\n\n",
        "1;2;3\n-4;5;0,6\n",
        "2\n1 2 3 255\n-4 5 0.6 0\n",
        "# made by hand\n1\t2\t3\n-4\t5\t0.6",
        "//X Y Z R\n1 2 3 9\n-4 5 0.6 9",
        'scan no,"Z",X,y\n7,3,1,2\n7,0.6,-4,5\n',
        "//made by\n// x;y;z\n1;2;3\n-4;5;0.6",
    ],
)
def test_text_of_every_kind_is_read(tmp_path, suffix, text):
    file = tmp_path / f"cloud{suffix}"
    file.write_text(text)
    points = load_file(file, 8, np.random.default_rng(0))
    assert points[:, :3].tolist() == [[1, 2, 3], [-4, 5, 0.6]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r,g,b,px,py,pz\n1,2,3,4,5,6\n", "does not name x, y, z"),
        ("x,y,z\n1,2,3,4\n", "does not name x, y, z and every other column"),
        ("1,5 2,5 3,5\n4,5 5,5 6,5\n", "decimal points"),
        ("1,2,chair\n", "chair"),
        ("1 2 3\n4 5\n", "columns"),
    ],
)
def test_text_that_could_be_misread_is_refused(tmp_path, text, message):
    file = tmp_path / "cloud.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_file(file, 8, np.random.default_rng(0))


# --- solids ---


def test_solids_are_the_same_everywhere_and_balanced():
    classes, train, labels, held, held_labels = make_solids(64)
    assert classes == tuple(SOLIDS)
    assert (train.shape, held.shape) == ((2000, 64, 3), (500, 64, 3))
    assert np.bincount(labels).tolist() == [200] * 10
    assert np.bincount(held_labels).tolist() == [50] * 10
    # a figure that another stream of draws or another geometry would miss by far
    found = [float(np.linalg.norm(train, axis=-1).mean()), float(np.abs(train[0]).sum())]
    np.testing.assert_allclose(found, [0.665884, 56.773876], rtol=1e-5)
    assert np.linalg.norm(train, axis=-1).max() < 1.2


def test_points_of_a_solid_lie_on_its_surface_in_proportion_to_area():
    from ewavit.points import solids

    points, _ = solids._sample(solids._triangles(*SOLIDS["box"]), 20_000, np.random.default_rng(0))
    lid = np.abs(np.abs(points[:, 2]) - 1) < 1e-9
    side = np.abs(np.abs(points[:, :2]).sum(1) - 1) < 1e-9  # the base is a square on its corner, of area 2
    assert (lid | side).all()
    np.testing.assert_allclose(lid.mean(), 4 / (4 + 8 * 2**0.5), atol=0.01)


# --- augmentation ---


def batch() -> torch.Tensor:
    return torch.randn(50, 64, 3)


def test_scale_and_shift_are_one_draw_per_axis_and_cloud_within_the_range():
    points = batch()
    out = PointAugmentation(scale=1.5, shift=0.2)(points)
    centred, before = out - out.mean(1, keepdim=True), points - points.mean(1, keepdim=True)
    factor = (centred / before).median(1)[0]
    torch.testing.assert_close(centred, before * factor.unsqueeze(1), rtol=1e-4, atol=1e-4)
    shift = out.mean(1) - points.mean(1) * factor
    assert factor.min() > 1 / 1.5 - 1e-4
    assert factor.max() < 1.5 + 1e-4
    assert shift.abs().max() < 0.2 + 1e-4
    assert factor.std() > 0.1
    assert shift.std() > 0.05


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotation_keeps_the_axis_and_all_distances(axis):
    policy = PointAugmentation.parse(f"rot{'xyz'[axis]}180")
    points = batch()
    out = policy(points)
    torch.testing.assert_close(out[..., axis], points[..., axis])
    torch.testing.assert_close(torch.pdist(out[0]), torch.pdist(points[0]), rtol=1e-4, atol=1e-5)
    assert (out - points).norm(dim=-1).mean() > 0.5
    assert torch.linalg.det(torch.linalg.lstsq(points[0], out[0]).solution) > 0.99


def test_jitter_moves_every_point_a_little():
    points = batch()
    moved = PointAugmentation.parse("jitter0.01")(points) - points
    assert moved.abs().max() <= 0.05 + 1e-6
    assert 0.009 < moved.std() < 0.011


def test_dropped_points_lie_where_the_first_one_does():
    points = batch()
    out = PointAugmentation.parse("drop0.5")(points)
    dropped = (out != points).any(-1)
    assert torch.equal(out[dropped], points[:, :1].expand_as(points)[dropped])
    shares = dropped.float().mean(1)
    assert shares.max() < 0.75
    assert 0.15 < shares.mean() < 0.35


def test_augmentation_repeats_with_the_global_seed_and_none_changes_nothing():
    points, augment = batch(), PointAugmentation.parse("scale2-shift0.1-roty90-jitter0.1-drop0.3")
    torch.manual_seed(5)
    first = augment(points)
    torch.manual_seed(5)
    assert torch.equal(augment(points), first)
    assert torch.equal(PointAugmentation.parse("none")(points), points)


def test_unknown_policies_are_named():
    for policy, message in (
        ("rand-m9", "'rand' is unknown for point clouds"),
        ("scale", "'scale' is unknown"),
        ("scale0.5", "scale 0.5 is less than 1"),
        ("drop1", "drop 1.0 is not a share"),
    ):
        with pytest.raises(EwavitError, match=message):
            PointAugmentation.parse(policy)


# --- behind the seam of all data ---


def test_batches_are_clouds_of_the_asked_size(tmp_path):
    data = open_data(
        f"modelnet40:{point_sets.write_modelnet_h5(tmp_path)}",
        DataOptions(batch_size=2, num_points=NUM_POINTS),
    )
    (points, labels), *more = data.train_batches(0)
    assert len(more) == 1
    assert (points.shape, labels.shape) == ((2, NUM_POINTS, 3), (2,))
    ((points, labels),) = data.eval_batches()
    assert (points.shape, labels.tolist()) == ((2, NUM_POINTS, 3), [0, 1])
    assert data.inputs.sample(4).shape == (4, NUM_POINTS, 3)
    assert str(data.inputs) == f"{NUM_POINTS}x3 clouds, 2 classes"


def test_training_draws_other_points_each_time_and_without_repetition(tmp_path):
    data = open_data(
        f"modelnet40:{point_sets.write_modelnet_h5(tmp_path)}",
        DataOptions(batch_size=1, num_points=NUM_POINTS, augmentation=Augmentation(aa="none")),
    )
    first, again = (next(data.train_batches(0))[0][0] for _ in range(2))
    assert len(first.unique(dim=0)) == NUM_POINTS
    assert not torch.equal(first.sort(0)[0], again.sort(0)[0])


def test_limit_and_holdout_choose_training_clouds(tmp_path):
    spec = f"modelnet40:{point_sets.write_modelnet_h5(tmp_path)}"
    limited = open_data(spec, DataOptions(batch_size=1, num_points=NUM_POINTS, limit=2))
    assert (limited.num_train, limited.num_eval) == (2, 2)
    held = open_data(spec, DataOptions(batch_size=1, num_points=NUM_POINTS, holdout=0.25))
    assert (held.num_train, held.num_eval) == (3, 1)
    points, _ = next(held.eval_batches())
    everything = read(spec).train_points[:, :NUM_POINTS]
    assert any(np.array_equal(points[0].numpy(), one) for one in everything)


def test_part_batches_carry_category_and_labels(tmp_path):
    spec = f"shapenetpart:{point_sets.write_shapenetpart(tmp_path)}"
    data = open_data(
        spec, DataOptions(batch_size=3, num_points=NUM_POINTS, augmentation=Augmentation(aa="none"))
    )
    points, labels = next(data.train_batches(0))
    assert (points.shape, labels.shape) == ((3, NUM_POINTS, 19), (3, NUM_POINTS))
    assert (points[..., 3:].sum(-1) == 1).all()
    category = points[:, 0, 3:].argmax(1)
    assert sorted(category.tolist()) == [0, 15, 15]
    assert ((labels < 4).all(1) == (category == 0)).all()


def test_votes_are_the_mean_of_the_cloud_and_of_the_same_views_every_time(tmp_path):
    data = open_data(
        f"modelnet40:{point_sets.write_modelnet_h5(tmp_path)}",
        DataOptions(batch_size=2, num_points=NUM_POINTS, votes=3),
    )
    points, _ = next(data.eval_batches())
    seen = []

    def predict(view: torch.Tensor) -> torch.Tensor:
        seen.append(view)
        return view.mean((1, 2)).unsqueeze(1)

    state = torch.get_rng_state()
    first = data.voting(predict)(points)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(data.voting(predict)(points), first)
    assert torch.equal(seen[0], points)
    assert not torch.equal(seen[1], seen[2])
    torch.testing.assert_close(first[:, 0], torch.stack([view.mean((1, 2)) for view in seen[:3]]).mean(0))


def test_options_of_images_are_refused_for_clouds():
    for options, message in (
        ({"img_size": 32}, "img_size is for images"),
        ({"augmentation": Augmentation(reprob=0.1)}, "reprob is for images"),
    ):
        with pytest.raises(EwavitError, match=message):
            open_data("solids", DataOptions(batch_size=2, **options))


# --- part segmentation ---


def part_iou_reference(predicted: list[int], labels: list[int], parts: tuple[int, ...]) -> float:
    values = []
    for part in parts:
        here = {point for point, value in enumerate(predicted) if value == part}
        there = {point for point, value in enumerate(labels) if value == part}
        values.append(len(here & there) / len(here | there) if here | there else 1.0)
    return sum(values) / len(values)


def test_part_ious_are_those_of_the_definition():
    categories = ((0, 1), (2, 3, 4), (5,))
    category = torch.tensor([0, 1, 1, 2])
    logits = torch.randn(4, 6, 12)
    labels = torch.stack(
        [torch.tensor(categories[c])[torch.randint(len(categories[c]), (12,))] for c in category]
    )
    labels[1] = 2  # two parts of this cloud are absent
    logits[1, 2] = 99.0
    expected = []
    for one, truth, number in zip(logits, labels, category, strict=True):
        parts = categories[number]
        predicted = [max(parts, key=lambda part, p=p: float(one[part, p])) for p in range(12)]
        expected.append(part_iou_reference(predicted, truth.tolist(), parts))
    found = part_ious(logits, labels, category, categories)
    torch.testing.assert_close(found, torch.tensor(expected))
    assert found[1] == 1


def test_generated_parts_are_labelled_by_place_and_come_back_the_same():
    names, categories, train, held = make_solid_parts(64)
    again = make_solid_parts(64)[2]
    assert np.array_equal(train.points, again.points)
    assert np.array_equal(train.parts, again.parts)
    assert sorted(part for parts in categories for part in parts) == list(range(len(names)))
    for clouds in (train, held):
        for category, parts in enumerate(categories):
            mine = clouds.parts[clouds.category == category]
            assert set(np.unique(mine)) == set(parts)
    # Parts lie apart: a point's nearest neighbour in its cloud mostly has its part.
    cloud, parts = train.points[:40], train.parts[:40]
    distance = np.linalg.norm(cloud[:, :, None] - cloud[:, None], axis=-1) + 9 * np.eye(64)
    nearest = np.take_along_axis(parts, distance.argmin(-1), 1)
    assert (nearest == parts).mean() > 0.75
