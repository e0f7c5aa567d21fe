"""Training checkpoints: safetensors plus JSON, written whole or not at all, with the one before kept.

`RUN/checkpoint/` holds `model.safetensors` (the expanded model), `training.safetensors` (optimizer, moving
average) and `state.json` (everything else, and the digests of all three). Nothing is pickled.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ewavit.errors import EwavitError
from ewavit.files import regular, remove, replacing, sync, sync_names
from ewavit.training.card import ModelCard
from ewavit.training.recipe import Recipe
from ewavit.training.report import Row
from ewavit.training.run_folder import RunFolder
from ewavit.training.seal import check, digests, said, sealed, unsealed

FORMAT = 2
WITHOUT_DIGESTS = 1  # of version 0.1.0: sizes of files only
FILES = ("model.safetensors", "training.safetensors")
# In the order in which the safetensors library writes them: the widest first, so that all are aligned.
DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64",
    torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
# What a damaged file may raise where it is read.
DAMAGE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RuntimeError,
    SafetensorError,
)  # fmt: skip


@dataclass
class Progress:
    """How far a run is; `batch` counts within the epoch, `update` optimizer steps in all.

    `pending` is the row of an epoch that was trained and not evaluated yet; `epoch` counts it as done.
    """

    epoch: int = 0
    batch: int = 0
    update: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    lr: float = 0.0  # of the latest step
    seconds: float = 0.0  # spent in training steps
    rows: list[Row] = field(default_factory=list)
    pending: Row | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], columns: tuple[str, ...] = ()) -> Progress:
        """The inverse of `asdict` after a trip through JSON.

        Args:
            values: the fields.
            columns: what each row has at least.

        Raises:
            TypeError: a field is missing, unknown or of another type.
            ValueError: a number is negative, too large or not finite.
        """
        values = {"pending": None, **values}  # version 0.1.0 has none
        if values.keys() != {each.name for each in fields(cls)} or not isinstance(values["rows"], list):
            raise TypeError("progress has other fields")
        numbers = {name: value for name, value in values.items() if name not in ("rows", "pending")}
        for name, value in numbers.items():
            if type(value) is not int and (type(value) is not float or name not in _FRACTIONS):
                raise TypeError(f"{name} is {value!r}")
            if not (0 <= value < 2**53 or (name == "loss_sum" and math.isfinite(value))):
                raise ValueError(f"{name} is {value}")
        rows = [(row, columns) for row in values["rows"]]
        if values["pending"] is not None:
            rows.append((values["pending"], ()))
        for row, needed in rows:
            if missing := [column for column in ("epoch", *needed) if column not in row]:
                raise TypeError(f"a row of progress has no {missing[0]}")
            if wrong := [name for name, value in row.items() if type(value) not in (int, float)]:
                raise TypeError(f"{wrong[0]} in a row of progress is {row[wrong[0]]!r}")
        return cls(**values)


_FRACTIONS = ("loss_sum", "lr", "seconds")


@dataclass(frozen=True)
class Checkpoint:
    """What was read: the model's tensors, the nested training state, JSON facts, and a warning if any."""

    path: Path
    model: dict[str, Tensor]
    training: Any
    facts: dict[str, Any]
    warning: str | None


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, tied ones as copies; equal tensors and metadata give equal bytes.

    The safetensors library writes metadata in a random order, and its own temporary file survives a kill.

    Raises:
        EwavitError: the disk is full or the file cannot be written; nothing is left behind.
    """
    rank = list(DTYPES).index
    order = sorted(tensors, key=lambda name: (rank(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    try:
        with replacing(path) as partial, partial.open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                handle.write(memoryview(_bytes(tensors[name])))
    except OSError as problem:
        raise _unwritable(path, problem) from None


def _bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor as an array."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def save_checkpoint(
    run: Path,
    model: Mapping[str, Tensor],
    training: Any,
    facts: dict[str, Any],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a checkpoint; the one in place is replaced only when the new one is whole.

    Args:
        run: the run's folder.
        model: state dict of the expanded model.
        training: nested dicts, lists and tuples of tensors and plain values (optimizer state and the like).
        facts: JSON-compatible, read back as they are.
        metadata: of the model's file, so that it can be read by itself.

    Raises:
        EwavitError: the disk is full or the folder cannot be written; the last checkpoint stays.
    """
    new = RunFolder(run).new_checkpoint
    try:
        remove(new)
        new.mkdir(parents=True)
        tensors: dict[str, Tensor] = {}
        skeleton = _split(training, "training", tensors)
        for name, content, more in zip(FILES, (model, tensors), (metadata, None), strict=True):
            save_tensors(content, new / name, more)
        state = {"format": FORMAT, "digests": digests(new, FILES), "facts": facts, "training": skeleton}
        (new / "state.json").write_text(sealed(state))
        _replace(RunFolder(run))
    except OSError as problem:
        raise _unwritable(new, problem) from None
    finally:
        remove(new)


def _replace(run: RunFolder) -> None:
    sync(run.new_checkpoint)
    if run.checkpoint.exists():
        remove(run.previous_checkpoint)
        os.replace(run.checkpoint, run.previous_checkpoint)
    os.replace(run.new_checkpoint, run.checkpoint)
    sync_names(run.path)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read the newest whole checkpoint of a run, or the given checkpoint folder.

    A damaged checkpoint is passed over for the one before it, and `warning` says so.

    Raises:
        EwavitError: there is no checkpoint, or none that is whole.
    """
    run = RunFolder(path)
    folders = [path] if (path / "state.json").exists() else [run.checkpoint, run.previous_checkpoint]
    present = [folder for folder in folders if folder.is_dir()]
    if not present:
        raise EwavitError(f"no checkpoint in {path}: give the folder of a run that `ewavit train` wrote")
    damage: list[str] = []
    for folder in present:
        try:
            return _read(folder, "; ".join(damage) + f": used {folder} instead" if damage else None)
        except DAMAGE as problem:
            damage.append(f"{folder} is damaged ({said(problem)})")
    raise EwavitError(f"{'; '.join(damage)}: no whole checkpoint is left in {path}")


def _read(folder: Path, warning: str | None) -> Checkpoint:
    try:
        text = regular(folder / "state.json").read_text()
        if old := text.startswith('{"format": 1, "sizes": '):
            state = json.loads(text)
            _check_sizes(folder, state["sizes"])
            unsure = f"{folder} is of version 0.1.0 and has no digests: damage within its files is not seen"
            warning = f"{warning}; {unsure}" if warning else unsure
        else:
            state = unsealed(text)
    except (OSError, ValueError, RecursionError) as problem:
        raise ValueError(f"state.json: {said(problem)}") from None
    if not old:
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']}, this version reads {WITHOUT_DIGESTS} and {FORMAT}")
        if set(state["digests"]) != set(FILES):
            raise ValueError("state.json lists other files")
        check(folder, state["digests"], "state.json")
    model, tensors = (load_file(folder / name) for name in FILES)
    if bad := [name for name, tensor in model.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{bad[0]} in model.safetensors is not finite")
    _check_facts(state["facts"], str(folder))
    try:
        training = _join(state["training"], tensors)
    except RecursionError:
        raise ValueError("state.json is nested too deeply") from None
    return Checkpoint(folder, model, training, state["facts"], warning)


def _check_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    """Compare files with their sizes, all that there is in a checkpoint of version 0.1.0."""
    if set(sizes) != set(FILES):
        raise ValueError("it lists other files")
    for name, size in sizes.items():
        if (found := regular(folder / name).stat().st_size) != size:
            raise ValueError(f"{name} has {found:,} of {size:,} bytes")


def _check_facts(facts: Mapping[str, Any], source: str) -> None:
    """Refuse facts that a run did not write."""
    recipe = Recipe.from_dict(facts["recipe"], source)
    card = ModelCard.from_dict(facts["card"], source)
    progress = Progress.from_dict(facts["progress"], ("eval_loss", f"eval_{card.task.judge.column}"))
    if progress.epoch > recipe.epochs:
        raise ValueError(f"epoch is {progress.epoch} of {recipe.epochs}")
    layers, processes = facts["layers"], facts.get("processes", 1)
    if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        raise TypeError(f"layers are {layers!r}")
    if type(processes) is not int or processes < 1:
        raise TypeError(f"processes is {processes!r}")


def _unwritable(path: Path, problem: Exception) -> EwavitError:
    reason = os.strerror(problem.errno) if isinstance(problem, OSError) and problem.errno else str(problem)
    return EwavitError(f"{path} could not be written ({reason}): make room and go on with --resume")


def _split(tree: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Replace the tensors of a tree by their keys; what is left is JSON."""
    if isinstance(tree, Tensor):
        tensors[key] = tree
        return {"tensor": key}
    if isinstance(tree, Mapping):
        return {"dict": [[k, _split(v, f"{key}.{k}", tensors)] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [_split(v, f"{key}.{i}", tensors) for i, v in enumerate(tree)]}
    if isinstance(tree, torch.dtype):
        return {"dtype": str(tree).removeprefix("torch.")}
    return {"value": tree}


def _join(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_split`."""
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: _join(v, tensors) for k, v in content}
    if kind == "dtype":
        if not isinstance(found := getattr(torch, content), torch.dtype):
            raise ValueError(f"{content} is no dtype")
        return found
    if kind == "value":
        return content
    if kind not in ("list", "tuple"):
        raise ValueError(f"unknown kind {kind} in the training state")
    joined = [_join(v, tensors) for v in content]
    return joined if kind == "list" else tuple(joined)
