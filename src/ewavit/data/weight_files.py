"""`read_weights`: what a file of weights holds, safetensors or torch's, without running code from it."""

from __future__ import annotations

import io
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path, PosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ewavit.core.checkpoint_files import collapse_checkpoint, is_expert_key
from ewavit.core.tensor_files import INDEX, read_index
from ewavit.errors import EwavitError, first_line
from ewavit.files import regular

# In a folder, the first of these: a finished run has the first one, an interrupted run the second.
_IN_FOLDER = ("model.safetensors", "checkpoint/model.safetensors", "checkpoint-previous/model.safetensors")
# What a training saves beside its weights.
_NO_WEIGHTS = ("optim", "lr_sched", "scheduler", "callback", "loop", "scaler", "amp", "args", "hyper_param")


def read_weights(source: Path) -> dict[str, Any]:
    """Read a file of weights. Experts become their mean, as `ewavit.collapse` computes it.

    Args:
        source: a .safetensors file, an index of shards, a file of `torch.save`, or the folder of a run, a
            checkpoint or shards. From torch files only tensors, numbers, paths and `argparse.Namespace` are
            unpickled.

    Returns:
        Tensors by key, as stored: a torch file may have dicts in dicts.

    Raises:
        EwavitError: there is no such file, it cannot be read, or it holds a routed mixture.
    """
    file = _in_folder(source) if source.is_dir() else source
    if not file.exists():
        raise EwavitError(f"no file {source}: give the file with the weights, or the folder of a run")
    try:
        regular(file)
    except OSError as problem:
        raise EwavitError(f"{file} cannot be read as weights ({first_line(problem)})") from None
    try:
        state = _read(file)
    except EwavitError:
        raise
    except Exception as problem:  # whatever a damaged or foreign file makes the readers raise
        raise EwavitError(f"{file} cannot be read as weights ({_reason(file, problem)})") from None
    if not isinstance(state, Mapping):
        raise EwavitError(f"{file} holds a {type(state).__name__}, not weights by name: give a checkpoint")
    if any(is_expert_key(key) for key, _ in named_tensors(state)):
        return _collapsed(file, state)
    return dict(state)


def named_tensors(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state that may have dicts in dicts, with joined keys; without an optimizer's."""
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping) and not str(key).startswith(_NO_WEIGHTS):
            yield from named_tensors(value, f"{prefix}{key}.")


def check_finite(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are NaN or infinite where a fresh model's are finite.

    Args:
        tensors: of a file, by the model's keys.
        own: of the fresh model.
        source: the file, for messages.

    Raises:
        EwavitError: it names the first such tensor.
    """
    for key, value in tensors.items():
        if not value.is_floating_point() or _is_finite(value) or (key in own and not _is_finite(own[key])):
            continue
        raise EwavitError(
            f"{source}: {key} holds {int((~value.float().isfinite()).sum()):,} values that are NaN or "
            "infinite: use weights from before the training diverged"
        )


def _is_finite(values: Tensor) -> bool:
    if values.is_floating_point() and values.element_size() == 1:
        values = values.float()  # torch has no isfinite for 8 bits
    return bool(values.isfinite().all())


def _in_folder(folder: Path) -> Path:
    indices = sorted(folder.glob(f"*{INDEX}"))
    files = [*(folder / name for name in _IN_FOLDER), *indices, folder / "pytorch_model.bin"]
    found = next((file for file in files if file.exists()), None)
    if found is None:
        raise EwavitError(
            f"{folder} holds no {_IN_FOLDER[0]} and no checkpoint: give the file with the weights itself"
        )
    return found


def _read(file: Path) -> Any:
    from safetensors.torch import load_file

    if file.name.endswith(INDEX):
        shards = sorted(set(read_index(file)[0].values()))
        return {key: value for shard in shards for key, value in load_file(regular(shard)).items()}
    if file.suffix == ".safetensors":
        return load_file(file)
    with file.open("rb") as handle:  # of an old file, torch reads as many bytes as a damaged length says
        zipped = handle.read(4) == b"PK\x03\x04"
    with torch.serialization.safe_globals(_harmless()):
        source = file if zipped else io.BytesIO(file.read_bytes())
        return torch.load(source, map_location="cpu", weights_only=True)


def _reason(file: Path, problem: Exception) -> str:
    """Why a file cannot be read; torch says at length that it does not unpickle some class."""
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    except Exception:  # it is no zip file of torch's
        foreign = []
    harmless = {f"{kind.__module__}.{kind.__name__}" for kind in _harmless() if not isinstance(kind, tuple)}
    if foreign := sorted(set(foreign) - harmless):
        return (
            f"beside tensors it holds {', '.join(foreign[:3])}, which could run code: save the weights "
            "alone, torch.save(model.state_dict(), FILE)"
        )
    return first_line(problem)


def _collapsed(file: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        expanded, plain = file, Path(folder) / "plain.safetensors"
        if file.suffix != ".safetensors" and not file.name.endswith(INDEX):
            expanded = Path(folder) / "expanded.safetensors"
            save_file({key: value.clone() for key, value in named_tensors(state)}, expanded)
        try:
            collapse_checkpoint(expanded, plain)
        except EwavitError as problem:
            raise EwavitError(str(problem).replace(str(expanded), str(file))) from None
        return load_file(plain)


def _harmless() -> list[Any]:
    """What torch files may hold beside tensors: numbers of numpy, arguments and paths. None runs code."""
    scalar = np.float64(0).__reduce__()[0]
    old = (scalar, "numpy.core.multiarray.scalar")  # before numpy 2
    kinds = [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")]
    return [scalar, old, np.dtype, *kinds, Namespace, PosixPath, (PureWindowsPath, "pathlib.WindowsPath")]
