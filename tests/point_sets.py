"""Tiny point sets in the published layouts, which the tests write."""

import json
from pathlib import Path

import h5py
import numpy as np
import trimesh

CLASSES = ("bed", "chair")
POINTS = 40


def cloud(seed: int, count: int = POINTS) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)


def mesh() -> trimesh.Trimesh:
    return trimesh.creation.box((1, 2, 3))


def write_off(root: Path) -> Path:
    """The meshes of ModelNet, some with counts behind OFF in the first line, as published."""
    for name in CLASSES:
        for split, count in (("train", 2), ("test", 1)):
            folder = root / name / split
            folder.mkdir(parents=True)
            for number in range(count):
                text = mesh().export(file_type="off")
                file = folder / f"{name}_{number:04}.off"
                file.write_text(text.replace("OFF\n", "OFF", 1) if number else text)
    return root


def write_text(root: Path, prefix: str = "modelnet40", classes: tuple[str, ...] = CLASSES) -> Path:
    """The resampled text files: six columns with commas."""
    root.mkdir(exist_ok=True)
    (root / f"{prefix}_shape_names.txt").write_text("\n".join(classes) + "\n")
    for split, numbers in (("train", (1, 2)), ("test", (3,))):
        names = [f"{name}_{number:04}" for name in classes for number in numbers]
        (root / f"{prefix}_{split}.txt").write_text("\n".join(names) + "\n")
        for seed, name in enumerate(names):
            (root / name.rpartition("_")[0]).mkdir(exist_ok=True)
            rows = np.concatenate([cloud(seed), cloud(seed + 9)], 1)
            np.savetxt(root / name.rpartition("_")[0] / f"{name}.txt", rows, "%.6f", ",")
    return root


def write_h5(file: Path, labels: list[int], first: int = 0, count: int = 2 * POINTS) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as stored:
        stored["data"] = np.stack([cloud(first + number, count) for number in range(len(labels))])
        stored["label"] = np.array(labels, np.uint8)[:, None]


def write_modelnet_h5(root: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    """Two training files and one test file."""
    for name, first in (("train0", 0), ("train1", 10), ("test0", 20)):
        write_h5(root / f"ply_data_{name}.h5", list(range(len(classes))), first)
    (root / "shape_names.txt").write_text("\n".join(classes) + "\n")
    return root


def write_npz(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    arrays = {
        f"{split}_{what}": value
        for split, first in (("train", 0), ("test", 5))
        for what, value in (
            ("points", np.stack([cloud(first), cloud(first + 1)]).astype(np.float16)),
            ("label", np.array([1, 0], np.uint8)),
        )
    }
    np.savez(root / "clouds.npz", classes=np.array(CLASSES), **arrays)
    return root


def write_scanobjectnn(root: Path) -> Path:
    for folder, rest in (
        ("main_split", "objectdataset"),
        ("main_split_nobg", "objectdataset"),
        ("main_split", "objectdataset_augmentedrot_scale75"),
    ):
        for split, labels in (("training", [0, 14]), ("test", [3])):
            write_h5(root / folder / f"{split}_{rest}.h5", labels, len(folder) + len(rest))
    return root


def write_folder(root: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    """A file of every kind per class; test/ instead of val/."""
    for name in classes:
        folder = root / "train" / name
        folder.mkdir(parents=True)
        np.save(folder / "a.npy", cloud(1))
        np.savez(folder / "b.npz", points=cloud(2), normals=cloud(3))
        trimesh.PointCloud(cloud(4)).export(folder / "c.ply")
        mesh().export(folder / "d.ply")
        mesh().export(folder / "e.off")
        write_pcd(folder / "f.pcd", cloud(5), "ascii")
        write_pcd(folder / "g.pcd", cloud(6), "binary")
        (root / "test" / name).mkdir(parents=True)
        np.save(root / "test" / name / "a.npy", cloud(7))
    return root


def write_pcd(file: Path, points: np.ndarray, kind: str) -> None:
    """With a colour and a feature of three numbers before the coordinates, as sensors write them."""
    header = (
        "# .PCD v0.7 - Point Cloud Data file format\nVERSION 0.7\nFIELDS rgb fpfh x y z\nSIZE 4 4 4 4 4\n"
        f"TYPE U F F F F\nCOUNT 1 3 1 1 1\nWIDTH {len(points)}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\n"
        f"POINTS {len(points)}\nDATA {kind}\n"
    )
    before = np.arange(4 * len(points)).reshape(len(points), 4)
    if kind == "binary":
        kinds = [("rgb", "<u4"), ("fpfh", "<f4", 3), ("xyz", "<f4", 3)]
        rows = np.empty(len(points), kinds)
        rows["rgb"], rows["fpfh"], rows["xyz"] = before[:, 0], before[:, 1:], points
        file.write_bytes(header.encode() + rows.tobytes())
    else:
        lines = [" ".join(map(str, [*b, *p])) for b, p in zip(before, points.tolist(), strict=True)]
        file.write_text(header + "\n".join(lines) + "\n")


def write_shapenetpart(root: Path) -> Path:
    """Airplanes (parts 0 to 3) and tables (47 to 49); one table has fewer points than are asked for."""
    (root / "train_test_split").mkdir(parents=True)
    (root / "synsetoffset2category.txt").write_text("Airplane\t02691156\nTable\t04379243\n")
    shapes = {"train": ["a1", "t1"], "val": ["t2"], "test": ["a2", "t3"]}
    for split, names in shapes.items():
        paths = []
        for name in names:
            folder, parts = ("02691156", (0, 1, 2, 3)) if name[0] == "a" else ("04379243", (47, 48, 49))
            (root / folder).mkdir(exist_ok=True)
            points = cloud(len(paths), 25 if name == "t3" else 90)
            rows = np.column_stack([points, points, np.resize(parts, len(points))])
            np.savetxt(root / folder / f"{name}.txt", rows, "%.6f")
            paths.append(f"shape_data/{folder}/{name}")
        (root / "train_test_split" / f"shuffled_{split}_file_list.json").write_text(json.dumps(paths))
    return root
