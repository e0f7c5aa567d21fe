"""`ewavit data`: the published data sets, and whether a copy is as published."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from ewavit.cli.parser import nonempty
from ewavit.errors import EwavitError

SUMMARY = "list published data sets, or check a copy of one"
DESCRIPTION = (
    "list: the published sets with their counts and what --data takes. check: open PATH as train does, and "
    "compare its counts with the published ones, and the files of CIFAR with their MD5 sums. Exit status 1: "
    "the copy differs."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ewavit data`."""
    parser.add_argument("action", choices=("list", "check"), help="what to do")
    parser.add_argument(
        "path", metavar="PATH", nargs="?", type=nonempty, help="data to check, as --data takes them"
    )
    parser.add_argument("--task", choices=("segmentation", "retrieval"), help="task of the data")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """List or check; 1 if a copy differs from what was published."""
    if (options.action == "check") != (options.path is not None):
        wanted = "give the PATH to check" if options.path is None else f"leave out {options.path}"
        raise EwavitError(f"ewavit data {options.action}: {wanted}")

    from ewavit.study.published import PUBLISHED, check

    if options.action == "check":
        report = check(options.path, options.task)
        print(json.dumps(asdict(report), indent=2) if options.json else report)
        return int(bool(report.problems))
    if options.json:
        print(json.dumps([asdict(row) for row in PUBLISHED], indent=2))
        return 0
    print(f"{'set':24} {'training':>9} {'evaluation':>10} {'classes':>7}  --data")
    for row in PUBLISHED:
        task = f" (--task {row.task})" if row.task else ""
        print(f"{row.name:24} {row.train:9,} {row.evaluation:10,} {row.classes:7,}  {row.layout}{task}")
    return 0
