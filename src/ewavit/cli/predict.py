"""`ewavit predict`: its flags, and its words out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ewavit.cli.parser import nonempty, nonempty_path, typed

SUMMARY = "predict for files without labels"
DESCRIPTION = (
    "Predict with the model of a run, a checkpoint or an exported file. Files are prepared as in the "
    "run's evaluation. Predictions are printed in the order of the inputs, or written with --csv and "
    "--sheet."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ewavit predict`."""
    parser.add_argument(
        "source",
        metavar="RUN_OR_FILE",
        type=nonempty_path,
        help="folder of a run, checkpoint, .safetensors or .onnx",
    )
    parser.add_argument(
        "inputs",
        metavar="INPUTS",
        nargs="+",
        type=nonempty,
        help="files, folders (also the folders in them) and patterns such as 'photos/*.jpg'",
    )
    parser.add_argument("--topk", default=5, **typed(int), help="classes to show for each input (default: 5)")
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="FILE.csv",
        help="write one row for each input, in the order of the inputs",
    )
    parser.add_argument(
        "--sheet",
        type=Path,
        metavar="FILE.png",
        help="draw a contact sheet: the first 60 inputs with their predictions",
    )
    parser.add_argument(
        "--to",
        type=nonempty_path,
        metavar="FOLDER",
        help="write a file for each input into a new folder, if the task makes such files",
    )
    parser.add_argument(
        "--batch-size",
        default=128,
        **typed(int),
        help="inputs per batch; routed tokens of one batch compete for the experts' capacity (default: 128)",
    )
    parser.add_argument("--workers", default=4, **typed(int), help="processes that read images (default: 4)")
    parser.add_argument(
        "--skip-bad-images", action="store_true", help="skip inputs that cannot be read, and name them"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Predict; print the predictions, or the files that were written."""
    from ewavit.tasks.inference import shown
    from ewavit.training.inference import Outputs, predict

    found, written = predict(
        options.source,
        options.inputs,
        topk=options.topk,
        outputs=Outputs(options.csv, options.sheet, options.to),
        batch_size=options.batch_size,
        workers=options.workers,
        skip_bad_images=options.skip_bad_images,
    )
    files = found.files
    skipped = [(files.names[number], reason) for number, reason in sorted(files.skipped.items())]
    for name, reason in skipped:
        print(f"note: skipped {shown(name)} ({shown(reason)})", file=sys.stderr)
    if options.json:
        entries = [{"input": name, "reason": reason} for name, reason in skipped]
        print(json.dumps({files.kind: found.rows(), "skipped": entries}, indent=2))
        return 0
    lines = written or [f"{shown(str(row['input']))}  {found.line(row)}" for row in found.rows()]
    print("\n".join(lines))
    return 0
