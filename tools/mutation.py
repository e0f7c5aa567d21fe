"""Change the core in one place at a time and look whether a test notices: mutmut on eight files.

mutmut leaves decorated functions alone, among them what runs under `torch.no_grad()`. In the copy that it
works on, `@decorator` above a function becomes `name = decorator(name)` below it, so that these are mutated,
too. The record counts changes of words in messages apart: they change no result.

    python tools/mutation.py --record records/mutation.json
    python tools/mutation.py --only core/partition.py

mutmut has to be importable, by PYTHONPATH if it is not in the environment: `make mutation`.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime, timezone
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Each file, and the tests that concern it.
TESTS = {
    "core/partition.py": ("partition", "draws"),
    "core/experts.py": ("experts", "optimizers", "surgery", "attachments"),
    "core/averaging.py": ("averaging", "attachments"),
    "core/surgery.py": ("surgery", "experts", "attachments", "split"),
    "core/routing.py": ("routing",),
    "core/draws.py": ("draws", "partition"),
    "core/steps.py": ("draws", "averaging", "split"),
    "training/checkpoint.py": ("checkpoint", "released"),
}
SETTINGS = """
[tool.mutmut]
source_paths = ["src"]
only_mutate = ["{file}"]
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = ["-p", "no:cacheprovider", "-k", "not compil"]  # mutmut's switches break torch's graphs
also_copy = [{beside}]
process_isolation = "forkserver"
use_git_change_detection = false
timeout_constant = 20.0
timeout_multiplier = 5.0
"""
KILLED, SURVIVED, NO_TESTS = (
    (1, 3),
    (0,),
    (5, 33),
)  # mutmut's exit codes; all others are time-outs and crashes


def undecorated(source: str) -> str:
    """The source with the decorators of functions applied below them, where that means the same."""
    lines = source.splitlines()
    for node in sorted(ast.walk(ast.parse(source)), key=lambda each: -getattr(each, "lineno", 0)):
        if not isinstance(node, ast.FunctionDef) or len(node.decorator_list) != 1:
            continue
        decorator = ast.unparse(node.decorator_list[0])
        if decorator in ("staticmethod", "classmethod") or decorator.endswith(".setter"):
            continue
        if "custom_op" in decorator or decorator.endswith(".register_fake"):
            continue  # torch reads the signatures of operators, and mutmut replaces them
        indent, first = " " * node.col_offset, node.decorator_list[0]
        lines.insert(node.end_lineno or 0, f"{indent}{node.name} = {decorator}({node.name})")
        del lines[first.lineno - 1 : first.end_lineno]
    return "\n".join([*lines, ""])


def copied(folder: Path, file: str) -> Path:
    """A copy of the checkout for mutmut, with its settings."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout
    for name in filter(None, names.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    path = folder / "src/ewavit" / file
    path.write_text(undecorated(path.read_text()))
    tests = [f"tests/test_{name}.py" for name in TESTS[file]]
    beside = ", ".join(
        f'"{each.name}"' for each in sorted(folder.iterdir()) if each.name not in ("tests", "src")
    )
    settings = SETTINGS.format(file=f"src/ewavit/{file}", tests=json.dumps(tests), beside=f'"src", {beside}')
    with (folder / "pyproject.toml").open("a") as handle:
        handle.write(settings)
    return path


def mutants(path: Path, module: str) -> list[str]:
    """The names of all mutants of a file."""
    from mutmut.mutation.file_mutation import mutate_file_contents

    made = mutate_file_contents(str(path), path.read_text())
    return [f"{module}.{name}" for name in made.mutant_names]


def tried(file: str, most: int, seed: int, match: str) -> dict[str, Any]:
    """Run mutmut on one file: the number of mutants by end, and what survived."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    begun, module = time.perf_counter(), "ewavit." + file.removesuffix(".py").replace("/", ".")
    with tempfile.TemporaryDirectory(prefix="mutation-") as place:
        folder = Path(place)
        path = copied(folder, file)
        names = [name for name in mutants(path, module) if fnmatch(name, match)]
        chosen = names if len(names) <= most else sorted(random.Random(seed).sample(names, most))
        command = [sys.executable, "-m", "mutmut"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "run", "--max-children", "1", *chosen],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        meta = folder / f"mutants/src/ewavit/{file}.meta"
        codes = json.loads(meta.read_text())["exit_code_by_key"] if meta.exists() else {}
        ends = {name: codes.get(name) for name in chosen}
        if None in ends.values():
            raise SystemExit(f"mutmut did not finish {file}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        os.chdir(folder)  # where mutmut finds its files
        row: dict[str, Any] = {"mutants": len(names), "tried": len(chosen)}
        survivors, words = [], Counter[str]()
        for name, code in ends.items():
            how = (
                "killed"
                if code in KILLED
                else "survived"
                if code in SURVIVED
                else "no tests"
                if code in NO_TESTS
                else "timeout"
            )
            lines = get_diff_for_mutant(name, path=f"src/ewavit/{file}").splitlines()
            old, new = (
                [
                    line[1:].strip()
                    for line in lines
                    if line.startswith(sign) and not line.startswith(3 * sign)
                ]
                for sign in "-+"
            )
            if _same_but_words(" ".join(old), " ".join(new)):
                words[how] += 1
                continue
            row[how] = row.get(how, 0) + 1
            if how in ("survived", "no tests"):
                function = re.sub(r"^(x_|xǁ)|__mutmut_\d+$", "", name.removeprefix(f"{module}."))
                function = function.replace("ǁ", ".")
                survivors.append({"in": function, "was": " ".join(old), "is": " ".join(new), "why": ""})
    noticed = row.get("killed", 0) + row.get("timeout", 0)
    row["killed_share"] = round(
        noticed / max(1, noticed + row.get("survived", 0) + row.get("no tests", 0)), 4
    )
    return row | {
        "words": words,
        "tests": list(TESTS[file]),
        "seconds": round(time.perf_counter() - begun),
        "survivors": survivors,
    }


def _same_but_words(old: str, new: str) -> bool:
    """Whether two pieces of code differ within string literals only, as mutmut changes a message."""
    plain = [re.sub(r"""f?("|')(XX)?(.*?)(XX)?\1""", "''", text) for text in (old, new)]
    return plain[0] == plain[1] and old != new


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=TESTS, help="this file alone; may be repeated")
    parser.add_argument("--match", default="*", help="pattern of the mutants' names")
    parser.add_argument(
        "--most", type=int, default=400, help="mutants of each file, drawn at random (default: 400)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--record", type=Path, help="JSON file to write; the reasons in it are kept")
    options = parser.parse_args()
    record = options.record and options.record.absolute()
    for file in options.only or TESTS:
        row = tried(file, options.most, options.seed, options.match)
        counts = f"{row['tried']} of {row['mutants']} mutants"
        print(f"{file}: {counts}, {row['killed_share']:.1%} killed, {row['seconds']} s", flush=True)
        for each in row["survivors"]:
            print(f"  {each['in']}: {each['was']}\n    -> {each['is']}")
        if record is not None:
            write(record, {file: row}, options.seed)
    return 0


def write(file: Path, rows: dict[str, Any], seed: int) -> None:
    """Write the record; other files and the reasons of survivors are taken from the one in place."""
    old = json.loads(file.read_text())["files"] if file.exists() else {}
    why = {
        (each["in"], each["was"], each["is"]): each["why"]
        for row in old.values()
        for each in row["survivors"]
    }
    for row in rows.values():
        for each in row["survivors"]:
            each["why"] = why.get((each["in"], each["was"], each["is"]), "")
    packages = ("mutmut", "torch", "pytest")
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "seed": seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
    file.write_text(json.dumps(facts | {"files": old | rows}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
