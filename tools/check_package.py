"""Check the sdist and the wheel in dist/ and run the tests of the unpacked sdist against the wheel.

`make package` builds both and calls this with pytest's arguments. The tests fail if the sdist lacks a file
that a test reads, or if the wheel lacks a file that the package reads.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEEDED = (
    "fashion_mnist_mini.npz",
    "report.html",
    "report.css",
    "report.js",
    "mini.yaml",
    "cifar100-vit-ti.yaml",
    "py.typed",
)
NOT_IN_SDIST = (".github/",)  # forms and workflows of the hosting site


def only(pattern: str) -> Path:
    """The one file in dist/ that fits the pattern."""
    found = list((ROOT / "dist").glob(pattern))
    if len(found) != 1:
        sys.exit(f"dist/ holds {len(found)} files {pattern}, expected one: run `make package`")
    return found[0]


def files_of_sdist(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive if member.isfile()}


def problems(wheel: Path, in_sdist: set[str]) -> list[str]:
    """What is wrong with the two lists of files, one sentence each."""
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = {name.removeprefix("src/") for name in in_sdist if name.startswith("src/")}
    found = [f"the wheel lacks {name}" for name in sorted(source - in_wheel)]
    found += [f"the wheel holds {name}, which is not in src/" for name in sorted(in_wheel - source)]
    found += [f"the wheel lacks {name}" for name in NEEDED if not any(Path(f).name == name for f in in_wheel)]
    tests = [name for name in in_wheel if any(part.startswith("test") for part in Path(name).parts)]
    found += [f"the wheel holds the test {name}" for name in sorted(tests)]
    if (ROOT / ".git").exists():
        tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")[:-1]
        missing = [name for name in sorted(set(tracked) - in_sdist) if not name.startswith(NOT_IN_SDIST)]
        found += [f"the sdist lacks {name}: add it to pyproject.toml's include" for name in missing]
    return found


def test(wheel: Path, sdist: Path) -> int:
    """Exit status of pytest in the unpacked sdist, with the wheel's package before any installed one."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder)
        site = Path(folder) / "site"
        python = [sys.executable, "-m"]
        install = [*python, "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel]
        subprocess.run(install, check=True)
        unpacked = Path(folder) / sdist.name.removesuffix(".tar.gz")
        environment = {**os.environ, "PYTHONPATH": str(site)}
        where = [sys.executable, "-c", "import ewavit; print(ewavit.__file__)"]
        imported = subprocess.check_output(where, cwd=unpacked, env=environment, text=True).strip()
        if not imported.startswith(str(site)):
            sys.exit(f"the tests would import {imported} and not the wheel")
        return subprocess.run([*python, "pytest", *sys.argv[1:]], cwd=unpacked, env=environment).returncode


if __name__ == "__main__":
    wheel, sdist = only("*.whl"), only("*.tar.gz")
    if found := problems(wheel, files_of_sdist(sdist)):
        sys.exit("\n".join(found))
    sys.exit(test(wheel, sdist))
