"""`ewavit export`: the plain model as a file, a folder or a repository."""

from __future__ import annotations

import argparse
import json

from ewavit.cli import output
from ewavit.cli.parser import nonempty, nonempty_path
from ewavit.errors import EwavitError

SUMMARY = "write the plain model as one checked file"
DESCRIPTION = (
    "Write the plain model. The model of a run is built, and the logits and the accuracy of the written "
    "file are checked against it. The safetensors of any expanded model are collapsed tensor by tensor, "
    "in little memory."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ewavit export`."""
    parser.add_argument(
        "source",
        metavar="RUN_OR_FILE",
        nargs="+",
        type=nonempty_path,
        help="folder of a run, its checkpoint, or .safetensors of any expanded model (shards: their index or "
        "folder); with --toward also several runs to merge",
    )
    parser.add_argument(
        "--to",
        type=nonempty_path,
        metavar="FILE",
        help="file to write, .safetensors, .onnx or .pt2 (torch.export); or a new folder, for shards, or for "
        "the model with the config.json that timm loads it by (local-dir:FOLDER)",
    )
    parser.add_argument(
        "--hub",
        metavar="ORG/NAME",
        type=nonempty,
        help="push the model with a model card to the Hugging Face hub (public, unless the repository exists "
        "and is private); with --to FOLDER or HF_HUB_OFFLINE=1 only write that folder. RUN may also be a "
        "folder of transformers' Trainer",
    )
    parser.add_argument(
        "--license", metavar="ID", type=nonempty, help="licence in the model card, e.g. apache-2.0"
    )
    parser.add_argument(
        "--data",
        metavar="TEXT",
        type=nonempty,
        help="data set that checks the accuracy (default: that of the run)",
    )
    parser.add_argument(
        "--collapse",
        action="store_true",
        help="export the plain model with the mean expert of a routed run (a different model)",
    )
    parser.add_argument(
        "--toward",
        metavar="FILE",
        type=nonempty_path,
        help="move the weights towards those of this file, which the training started from",
    )
    parser.add_argument(
        "--by",
        metavar="SHARE",
        type=nonempty,
        help="share of that way, 0 to 1 (WiSE-FT), or stock: for each tensor from the angle between the "
        "experts or runs (Model Stock)",
    )
    output.add_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Write the plain model, and print what was checked."""
    with output.reporting(options):
        said = _export(options) if options.hub is None else _publish(options)
        if not options.json:
            print(said)
    if options.json:
        to = None if options.to is None else str(options.to)
        print(json.dumps({"to": to, "hub": options.hub, "report": said}, indent=2))
    return 0


def _export(options: argparse.Namespace) -> str:
    if options.to is None or options.license is not None:
        raise EwavitError(
            "--license needs --hub ORG/NAME" if options.to else "give --to FILE or --hub ORG/NAME"
        )

    from ewavit.training.export import export

    source, *more = options.source
    return export(source, options.to, options.data, options.collapse, options.toward, options.by, more)


def _publish(options: argparse.Namespace) -> str:
    for name in ("data", "toward", "by"):
        if getattr(options, name) is not None:
            raise EwavitError(f"--{name} does not go with --hub: leave it out")
    source, *more = options.source
    if more:
        raise EwavitError(f"--hub takes one run, not {len(options.source)}: leave out {more[0]}")

    from ewavit.compare.reading import verdict_of
    from ewavit.training.hub import publish

    words = {"mean_expert": options.collapse, "licence": options.license}
    return publish(source, options.hub, options.to, verdict=verdict_of(source), **words)
