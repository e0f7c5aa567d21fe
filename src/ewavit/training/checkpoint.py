"""Training checkpoints: safetensors plus JSON, written whole or not at all, with the one before kept.

`RUN/checkpoint/` holds `model.safetensors` (the expanded model), `training.safetensors` (optimizer, moving
average) and `state.json` (everything else, and the size of each file). Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ewavit.errors import EwavitError
from ewavit.files import regular, replacing
from ewavit.training.run_folder import RunFolder

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """What was read: the model's tensors, the nested training state, JSON facts, and a warning if any."""

    path: Path
    model: dict[str, Tensor]
    training: Any
    facts: dict[str, Any]
    warning: str | None


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, tied ones as copies, by way of a temporary file.

    Raises:
        EwavitError: the disk is full or the file cannot be written; nothing is left behind.
    """
    seen: set[int] = set()
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        pointer = plain.untyped_storage().data_ptr()
        whole[name] = (
            plain.clone() if pointer in seen or plain.untyped_storage().nbytes() > plain.nbytes else plain
        )
        seen.add(pointer)
    try:
        with replacing(path) as partial:
            partial.touch()
            mode = partial.stat().st_mode  # safetensors would let nobody else read the file
            save_file(whole, partial, {"format": "pt", **(metadata or {})})
            partial.chmod(mode)
    except (OSError, SafetensorError) as problem:
        raise _unwritable(path, problem) from None


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
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        tensors: dict[str, Tensor] = {}
        skeleton = _split(training, "training", tensors)
        save_tensors(model, new / "model.safetensors", metadata)
        save_tensors(tensors, new / "training.safetensors")
        sizes = {file.name: file.stat().st_size for file in new.iterdir()}
        state = {"format": FORMAT, "sizes": sizes, "facts": facts, "training": skeleton}
        (new / "state.json").write_text(json.dumps(state))
        _replace(RunFolder(run))
    except OSError as problem:
        raise _unwritable(new, problem) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _replace(run: RunFolder) -> None:
    for file in run.new_checkpoint.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if run.checkpoint.exists():
        shutil.rmtree(run.previous_checkpoint, ignore_errors=True)
        os.replace(run.checkpoint, run.previous_checkpoint)
    os.replace(run.new_checkpoint, run.checkpoint)


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
        except (OSError, ValueError, KeyError, SafetensorError) as problem:
            damage.append(f"{folder} is damaged ({problem})")
    raise EwavitError(f"{'; '.join(damage)}: no whole checkpoint is left in {path}")


def _read(folder: Path, warning: str | None) -> Checkpoint:
    state = json.loads(regular(folder / "state.json").read_text())
    if state["format"] != FORMAT:
        raise ValueError(f"format {state['format']}, this version reads {FORMAT}")
    for name, size in state["sizes"].items():
        if (found := regular(folder / name).stat().st_size) != size:
            raise ValueError(f"{name} has {found:,} of {size:,} bytes")
    model = load_file(regular(folder / "model.safetensors"))
    training = _join(state["training"], load_file(regular(folder / "training.safetensors")))
    return Checkpoint(folder, model, training, state["facts"], warning)


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
        return getattr(torch, content)
    if kind == "value":
        return content
    joined = [_join(v, tensors) for v in content]
    return joined if kind == "list" else tuple(joined)
