"""Omniglot's small sets as a folder for `--task retrieval`, and Recall@1 of raw pixels and of random ViTs.

    python benchmarks/omniglot_retrieval.py omniglot_small.zip FOLDER [--seeds 42 43 44 45 46]

The characters of images_background_small1 become train/, those of images_background_small2 val/. Alphabets in
both (Greek and Latin) are left out of both. Images are shrunk to 28x28 grey values. Writes
records/omniglot_retrieval.json.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import torch
from PIL import Image

from ewavit.data.options import DataOptions
from ewavit.tasks.neighbours import NeighbourMeter
from ewavit.tasks.retrieval import Retrieval
from ewavit.training.evaluation import evaluate_batches
from records import write_record

SIDE = 28
# Model and statistics of recipes/compare-retrieval.yaml: white paper becomes 0.
MODEL = {"patch_size": 7, "embed_dim": 64, "depth": 4, "num_heads": 4, "pool": "mean"}
MEAN, STD = (1.0,), (0.3,)


def prepare(archive: Path, folder: Path) -> None:
    """Write the folder, unless it is there."""
    if folder.exists():
        return
    with zipfile.ZipFile(archive) as stored:
        names = [name for name in stored.namelist() if name.endswith(".png")]
        alphabets = [{n.split("/")[1] for n in names if n.split("/")[0].endswith(part)} for part in "12"]
        for name in names:
            part, alphabet, character, drawing = name.split("/")
            if alphabet in alphabets[0] & alphabets[1]:
                continue
            split = "train" if part.endswith("1") else "val"
            file = folder / split / f"{alphabet}-{character}" / drawing
            file.parent.mkdir(parents=True, exist_ok=True)
            image = Image.open(io.BytesIO(stored.read(name))).convert("L")
            image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46])
    options = parser.parse_args()
    prepare(options.archive, options.folder)
    task = Retrieval()
    data = task.open_data(str(options.folder), DataOptions(batch_size=128, workers=0, mean=MEAN, std=STD))

    def measured(predict):
        return dict(evaluate_batches(predict, data.eval_batches(), NeighbourMeter("images")).values)

    def pixels(images):
        return torch.nn.functional.normalize(images.flatten(1) - images.flatten(1).mean(1, True), dim=1)

    found = {"train": data.num_train, "val": data.num_eval, "pixels": measured(pixels), "random_vit": []}
    for seed in options.seeds:
        torch.manual_seed(seed)
        model, _ = task.build_model("vit_tiny_patch16_224", data.inputs, **MODEL)
        found["random_vit"].append(measured(model.eval()))
    settings = {"model": MODEL, "mean": MEAN, "std": STD, "seeds": options.seeds}
    command = "python benchmarks/omniglot_retrieval.py omniglot_small.zip OMNIGLOT"
    write_record("omniglot_retrieval", settings, found, command)


if __name__ == "__main__":
    main()
