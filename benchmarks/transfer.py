"""Fine-tuning on few images, where a ViT overfits: is EWA worth it there?

    python benchmarks/transfer.py --cifar100 PATH_OF/cifar-100-python --cifar10 PATH_OF/cifar-10-batches-py

Cuts CIFAR-100 into 80 classes, on which a small ViT is trained, and 20 others. Then compares arms that
fine-tune it on 20 images of each of the 20 classes, tested on their 11,600 other images, and on 400 images
of CIFAR-10 (recipes/search/transfer-*.yaml), and keeps the records. Finished runs stay: stop it and start it
again. With --prepare it only writes the classes and trains the weights, for recipes/few-images*.yaml.
"""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np

RECIPES = Path(__file__).parent.parent / "recipes" / "search"


def cut(source: Path, target: Path, classes: list[int], each: int | None = None) -> None:
    """Write the images of some classes of CIFAR-100 in its own format.

    Args:
        source, target: folders of the python files.
        classes: their numbers in the source.
        each: so many training images of each class; the others become test images. None: the published split.
    """
    images, labels = {}, {}
    for split in ("train", "test"):
        content = pickle.loads((source / split).read_bytes(), encoding="bytes")
        found = np.array(content[b"fine_labels"])
        chosen = np.isin(found, classes)
        images[split], labels[split] = content[b"data"][chosen], np.searchsorted(classes, found[chosen])
    if each is not None:
        number = [(labels["train"][:i] == label).sum() for i, label in enumerate(labels["train"])]
        stay = np.array(number) < each
        for parts in (images, labels):
            parts["test"] = np.concatenate([parts["test"], parts["train"][~stay]])
            parts["train"] = parts["train"][stay]
    target.mkdir(parents=True, exist_ok=True)
    for split in images:
        content = {b"data": images[split], b"fine_labels": labels[split].tolist()}
        (target / split).write_bytes(pickle.dumps(content, protocol=2))
    names = pickle.loads((source / "meta").read_bytes(), encoding="bytes")[b"fine_label_names"]
    (target / "meta").write_bytes(pickle.dumps({b"fine_label_names": [names[old] for old in classes]}, 2))


def ewavit(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "ewavit.cli", *map(str, words)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar100", type=Path, required=True, help="folder of the published python files")
    parser.add_argument("--cifar10", type=Path, required=True, help="folder of the published python files")
    parser.add_argument("--prepare", action="store_true", help="compare nothing")
    parser.add_argument("--output", type=Path, default=Path("runs/transfer"))
    args = parser.parse_args()

    order = np.random.default_rng(0).permutation(100).tolist()
    pretraining, few = (args.output / part / "cifar-100-python" for part in ("classes80", "classes20"))
    cut(args.cifar100, pretraining, sorted(order[20:]))
    cut(args.cifar100, few, sorted(order[:20]), each=20)  # order[80:] served the screening
    cut(args.cifar100, args.output / "classes20-pool" / "cifar-100-python", sorted(order[:20]))
    weights = args.output / "pretrained" / "model.safetensors"
    if not weights.exists():
        recipe = ["--config", RECIPES / "transfer-pretraining.yaml", "--data", pretraining]
        ewavit("train", *recipe, "--output", args.output, "--name", "pretrained")
    if args.prepare:
        return
    start = ["--initial-checkpoint", weights, "--output", args.output]
    for name, data in (("transfer-cifar", few), ("transfer-cifar10", args.cifar10)):
        ewavit("compare", "--config", RECIPES / f"{name}.yaml", "--data", data, *start)
        keep = Path(__file__).parent / "records.py"
        subprocess.run([sys.executable, str(keep), str(args.output / name)], check=True)


if __name__ == "__main__":
    main()
