"""Damage checkpoints and finished runs; each damage must be named, or harmless to the bit.

    python tests/faults/damage.py --cases 1000 --cuts 20 --record

A damage is a flipped bit, a cut, bytes overwritten or inserted, a file missing, swapped with the other
checkpoint's or another run's, or one value of a JSON file edited. Named: an error of one line, or the whole
checkpoint before it with a warning; either has the name of the damaged file. Harmless: what is read is the
undamaged content. The readers are `--resume`, `ewavit.load`, `compare` and, for a tenth of the damages,
`evaluate` and `export`.
With `--cuts N` the small files are also cut at every Nth byte, one after the other.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, ended, forked, report
from torch import Tensor

from ewavit.compare.reading import read_run
from ewavit.errors import EwavitError
from ewavit.tasks.judge import TOP1
from ewavit.training.checkpoint import load_checkpoint
from ewavit.training.export import evaluate, export, load_model
from ewavit.training.loop import train
from ewavit.training.run_folder import RunFolder
from runs import recipe

SMALL = 16_384  # bytes
SLOW_READERS = 0.1  # of the damages are read by `evaluate` and `export` too
VALUES: tuple[Any, ...] = (None, -1, 0, 2**70, 1e308, float("nan"), "", "x" * 1000, [], {}, True, [[]] * 3)


def flip(content: bytearray) -> None:
    """Flip one bit."""
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)


def flip_early(content: bytearray) -> None:
    """Flip one bit of the first 200 bytes, where headers are."""
    content[random.randrange(min(200, len(content)))] ^= 1 << random.randrange(8)


def cut(content: bytearray) -> None:
    """Cut the file at any place."""
    del content[random.randrange(len(content)) :]


def cut_end(content: bytearray) -> None:
    """Cut the last bytes."""
    del content[-random.randint(1, 8) :]


def overwrite(content: bytearray) -> None:
    """Overwrite a piece with zeros, as a lost block is."""
    start = random.randrange(len(content))
    content[start : start + 512] = bytes(len(content[start : start + 512]))


def insert(content: bytearray) -> None:
    """Insert random bytes."""
    start = random.randrange(len(content) + 1)
    content[start:start] = random.randbytes(random.randint(1, 64))


def edit(content: bytearray) -> None:
    """Change one value of a JSON file, or flip a bit of another one."""
    try:
        tree = json.loads(content)
    except ValueError:
        return flip(content)
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = random.choice(list(keys))
        if isinstance(node[key], dict | list) and node[key] and random.random() < 0.8:
            node = node[key]
            continue
        node[key] = random.choice(VALUES)
        content[:] = json.dumps(tree).encode()
        return None


CHANGES: tuple[Callable[[bytearray], None], ...] = (flip, flip_early, cut, cut_end, overwrite, insert, edit)


def content_of(run: Path) -> dict[str, Any]:
    """What a checkpoint holds, to compare."""
    checkpoint = load_checkpoint(run)
    return {"model": checkpoint.model, "training": checkpoint.training, "facts": checkpoint.facts}


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal, tensors to the bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(same(one[k], other[k]) for k in one)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)


class Tries:
    """Damages one run and looks what its readers say."""

    def __init__(self, tmp: Path) -> None:
        self.run, self.other, self.copy = tmp / "run", tmp / "other", tmp / "copy"
        for name, seed in (("run", 1), ("other", 2)):
            work = recipe(tmp, name, epochs=2, limit=64, seed=seed, recovery_interval=1)
            if ended(forked(lambda work=work: train(work), log=tmp / "log")):
                raise SystemExit((tmp / "log").read_text())
        before = self.run / "checkpoint-previous"
        self.whole, self.earlier = content_of(self.run), content_of(before)
        self.model = load_model(self.run)[0].state_dict()
        self.row = read_run(RunFolder(self.run), 1, TOP1)
        self.metrics = evaluate(self.run).values
        self.exported = self._exported(self.run)
        self.file = Path()  # the damaged one

    def damage(self) -> str:
        """Damage a fresh copy; returns what was done, in words."""
        self._renew()
        self.file = file = random.choice(self._files())
        name = file.relative_to(self.copy)
        kind = random.random()
        if kind < 0.06:
            file.unlink()
            return f"{name} missing"
        if kind < 0.14:
            source = self.other / name
            if name.parts[0] == "checkpoint" and random.random() < 0.5:
                source = self.copy / "checkpoint-previous" / file.name
            shutil.copyfile(source, file)
            return f"{name} of {source.parent.name}"
        content = bytearray(file.read_bytes())
        change = random.choice(CHANGES)
        if content:
            change(content)
        file.write_bytes(content)
        return f"{name}: {change.__name__}"

    def cuts(self, every: int) -> Iterator[str]:
        """Cut each small file at every so many bytes, alone, and say so before the next cut."""
        self._renew()
        for file in self._files():
            content = file.read_bytes()
            if len(content) <= SMALL:
                self.file = file
                for length in range(0, len(content), every):
                    file.write_bytes(content[:length])
                    yield f"{file.relative_to(self.copy)} cut to {length} bytes"
                file.write_bytes(content)

    def _renew(self) -> None:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.run, self.copy)

    def _files(self) -> list[Path]:
        """The files of the copy that a reader reads."""
        files = (file for file in self.copy.rglob("*") if file.is_file())
        return sorted(file for file in files if file.suffix != ".png" and file.name != ".lock")

    def outcome(self) -> str:
        """ "named", "harmless" or "silent", for the readers of a copy together."""
        named = False
        readers: list[Callable[[], bool]] = [self._checkpoint, self._model, self._tables]
        if random.random() < SLOW_READERS:
            readers += [self._evaluate, self._export]
        for reader in readers:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    if not reader():
                        return f"silent in {reader.__name__}"
                except EwavitError as problem:
                    if "\n" in str(problem):
                        return f"several lines in {reader.__name__}: {problem}"
                    caught.append(problem)
                for said in caught:
                    if self.file.name not in str(getattr(said, "message", said)):
                        return f"nameless in {reader.__name__}: {getattr(said, 'message', said)}"
                named |= bool(caught)
        return "named" if named else "harmless"

    def _checkpoint(self) -> bool:
        checkpoint = load_checkpoint(self.copy)
        found = {"model": checkpoint.model, "training": checkpoint.training, "facts": checkpoint.facts}
        if checkpoint.warning:
            warnings.warn(checkpoint.warning, stacklevel=1)
            return same(found, self.earlier) or same(found, self.whole)
        return same(found, self.whole)

    def _model(self) -> bool:
        return same(dict(load_model(self.copy)[0].state_dict()), dict(self.model))

    def _evaluate(self) -> bool:
        return evaluate(self.copy).values == self.metrics

    def _export(self) -> bool:
        return self._exported(self.copy) == self.exported

    def _exported(self, run: Path) -> bytes:
        """The file that `ewavit export` writes of a run."""
        to = self.run.with_name("plain.safetensors")
        export(run, to)
        return to.read_bytes()

    def _tables(self) -> bool:
        if problem := RunFolder(self.copy).damage():
            raise EwavitError(problem)
        return same(vars(read_run(RunFolder(self.copy), 1, TOP1)), vars(self.row))


def count(tries: Tries, damages: Iterator[str]) -> Counter[str]:
    """Try damages: how many were named, harmless, silent or a traceback."""
    found: Counter[str] = Counter({"silent": 0, "traceback": 0})
    for done in damages:
        try:
            outcome = tries.outcome()
        except Exception as problem:
            outcome = f"traceback {type(problem).__name__}: {problem}"
        if outcome not in ("named", "harmless"):
            print(f"{done}: {outcome}", flush=True)
            outcome = outcome.split()[0]
        found[outcome] += 1
    return found


def main() -> None:
    args = arguments(__doc__, cases=1000, cuts=0)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tries = Tries(Path(folder))
        found = count(tries, (tries.damage() for _ in range(args.cases)))
        cut = count(tries, tries.cuts(args.cuts) if args.cuts else iter(()))
    result: dict[str, object] = {"cases": args.cases, **found}
    if args.cuts:
        result["cuts of small files"] = {"cases": cut.total(), **cut}
    report("damage", args, begun, result)
    sys.exit(bool((set(+found) | set(+cut)) - {"named", "harmless"}))


if __name__ == "__main__":
    main()
