"""`ewavit evaluate`: the metrics of a run or a file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ewavit.cli.parser import nonempty, nonempty_path, typed
from ewavit.cli.settings import in_words
from ewavit.errors import EwavitError

SUMMARY = "evaluate a run or a file"
DESCRIPTION = "Evaluate the model of a run, a checkpoint or an exported file."


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ewavit evaluate`."""
    parser.add_argument(
        "source",
        metavar="RUN_OR_FILE",
        type=nonempty_path,
        help="folder of a run, checkpoint, .safetensors or .onnx",
    )
    for name, default, help_text in (
        ("data", None, "data set (default: that of the training)"),
        ("batch-size", 128, "images per batch; routed tokens of one batch compete for the experts' capacity"),
        ("workers", 4, "processes that read images"),
        ("data-dir", None, "root folder of timm data sets"),
        ("train-split", "train", "training split"),
        ("val-split", "validation", "evaluation split"),
        ("holdout", 0.0, "evaluate on the share of the training images that --holdout held out"),
        ("votes", 1, "passes over each cloud, averaged"),
    ):
        kind = str if default is None else type(default)
        options = typed(kind) | ({"type": nonempty} if kind is str else {})
        parser.add_argument(f"--{name}", default=default, **options, help=help_text + in_words(default))
    parser.add_argument("--skip-bad-images", action="store_true", help="skip images that cannot be read")
    parser.add_argument(
        "--per-class",
        action="store_true",
        help="also print recall, precision and the usual mistake of each class",
    )
    parser.add_argument(
        "--confusion",
        type=Path,
        metavar="FILE.csv",
        help="write the confusion matrix (row: true class, column: predicted class) and a picture, FILE.png",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Evaluate, and print the metrics."""
    from ewavit.training.export import evaluate

    names = (
        "data", "batch_size", "workers", "data_dir", "train_split", "val_split", "holdout", "votes",
        "skip_bad_images",
    )  # fmt: skip
    given = {name: getattr(options, name) for name in names}
    to: Path | None = options.confusion
    if to is not None and (to.suffix != ".csv" or not to.parent.is_dir()):
        raise EwavitError(
            f"--confusion {to} does not work: give a path that ends in .csv, in an existing folder"
        )
    metrics = evaluate(options.source, confusion=options.per_class or to is not None, **given)
    found = metrics.confusion
    if to is not None and found is not None:
        found.write(to)
        found.draw(to.with_suffix(".png"), f"{options.source}: {metrics.count:,} {metrics.kind}")
    if options.json:
        classes = {"classes": found.per_class()} if options.per_class and found is not None else {}
        print(json.dumps({**metrics.as_dict(), **classes}))
    else:
        print(metrics.sentence)
        if options.per_class and found is not None:
            print(found.table())
    return 0
