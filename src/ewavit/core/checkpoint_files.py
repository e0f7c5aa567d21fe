"""`collapse_checkpoint`: from files of an expanded model to files of the plain one, a few MiB at a time.

It reads and writes the safetensors format itself, so a checkpoint may be many times larger than memory, and
torch is enough.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from ewavit.core.experts import SeparateExperts
from ewavit.core.ffn import BRANCHES
from ewavit.core.moe import MoE
from ewavit.core.tensor_files import (
    INDEX,
    ITEM_BITS,
    Stored,
    printable,
    read_header,
    read_index,
    said,
    strict_json,
)
from ewavit.errors import EwavitError
from ewavit.files import is_torch_file, regular, replacing

EXPERTS = "ewavit_experts"  # the metadata key that lists the tensors of the experts
BLOCK = 2**22  # bytes to read and average at a time; fastest if they fit a cache (benchmarks/export.py)
LEAST = 512  # bytes of an expert at a time; whole vectors, so that the sums are rounded as in one piece
MOST_EXPERTS = BLOCK // LEAST
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BRANCHES = f"{BRANCHES}."  # gates of training only: the plain model has none
_EXPERT_KEY = re.compile(
    r"(?:(?P<mixture>.+?)\.)?experts\.(?:ffn|copies\.(?P<copy>0|[1-9][0-9]{0,8}))\.(?P<name>.+)"
)


@dataclass(frozen=True)
class StoredMixture:
    """One MoE in a file: N experts, "stacked" or "separate", and the names of the FFN's parameters.

    Other tensors among the experts are the FFN's buffers; `collapse` keeps those of the first expert.
    """

    num_experts: int
    experts: str
    parameters: frozenset[str]


@dataclass(frozen=True)
class _Source:
    """What there is to read: tensors by key, each file's metadata, and the index of the shards."""

    tensors: dict[str, Stored]
    metadata: dict[Path, dict[str, str]]
    index: Path | None
    index_metadata: dict[str, Any]


def expert_metadata(model: nn.Module) -> dict[str, str]:
    """Metadata for a safetensors file that lists the experts in an expanded model's state dict.

    Returns:
        An empty dict for a model without mixtures.

    Examples:
        >>> metadata = {"format": "pt", **expert_metadata(model)}
        >>> safetensors.torch.save_file(model.state_dict(), "expanded.safetensors", metadata)
        >>> collapse_checkpoint("expanded.safetensors", "plain.safetensors")
    """
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):  # state dicts repeat shared layers
        if isinstance(module, MoE):
            ffn = module.experts.ffns()[0]
            found[name] = {
                "num_experts": module.num_experts,
                "experts": "separate" if isinstance(module.experts, SeparateExperts) else "stacked",
                "parameters": [key for key, _ in ffn.named_parameters(remove_duplicate=False)],
            }
    return {EXPERTS: json.dumps(found)} if found else {}


def is_expert_key(key: str) -> bool:
    """Whether a key of a state dict names a tensor of experts."""
    return _EXPERT_KEY.fullmatch(key) is not None


def is_checkpoint_file(source: Path) -> bool:
    """Whether `collapse_checkpoint` reads this, by its name: a file or a folder of shards."""
    return source.suffix == ".safetensors" or source.name.endswith(INDEX) or any(source.glob(f"*{INDEX}"))


def collapse_checkpoint(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> str:
    """Collapse the safetensors of an expanded model to those of the plain model, with little memory.

    Every mixture becomes an FFN with the experts' mean, computed in float32 (float64 for float64) in pieces.
    Other tensors are copied. Keys, types and metadata are those of the collapsed model. The metadata of
    `expert_metadata`, which `ewavit train` writes, lists the experts; without it the keys decide.

    Args:
        source: a .safetensors file, an index of shards (.safetensors.index.json), or the folder of either.
        target: a .safetensors file; or, for shards, a new folder for shards and their index.

    Returns:
        A sentence that says what was written.

    Raises:
        EwavitError: the source is damaged, incomplete or not expanded, or the target cannot be written. Then
            no partial file remains.
    """
    source, target = Path(source), Path(target)
    found = _open(source)
    outputs, mixtures = _plan(found, source)
    single = target.suffix == ".safetensors"
    if not single and (found.index is None or target.suffix):
        shards = "" if found.index is None else ", or a new folder for shards"
        raise EwavitError(f"{target} is not a name for the plain model: choose FILE.safetensors{shards}")
    if not target.parent.is_dir():
        raise EwavitError(f"no folder {target.parent}: make it first")
    if target.exists():
        what = "there already, and is no file" if single and not target.is_file() else "there already"
        is_source = single and any(target.samefile(file) for file in found.metadata)
        if is_source or not single or not target.is_file():
            raise EwavitError(f"{target} is {'the source' if is_source else what}: choose another name")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one core adds faster than a disk reads, and this fixes the order of the sum
    try:
        with replacing(target) as partial, _Reader() as reader:
            if single:
                merged = {key: value for each in found.metadata.values() for key, value in each.items()}
                written = _write(partial, outputs, merged, reader)
            else:
                written = _write_shards(partial, outputs, found, reader)
    except OSError as problem:
        raise EwavitError(
            f"{target} could not be written ({problem.strerror or problem}): make room there"
        ) from None
    finally:
        torch.set_num_threads(threads)
    what = "1 mixture" if mixtures == 1 else f"{mixtures} mixtures"
    return f"wrote {target} ({written / 1e6:,.1f} MB): {what} collapsed, tensor by tensor"


# Reading


def _open(source: Path) -> _Source:
    """Find the files of a source and read their headers."""
    if source.is_dir():
        indices = sorted(source.glob(f"*{INDEX}"))
        if len(indices) > 1:
            raise EwavitError(f"{source} holds {len(indices)} indices of shards: name one of them")
        source = indices[0] if indices else source / "model.safetensors"
    try:
        regular(source)
    except OSError as problem:
        what = f"{source} cannot be read ({said(problem)})" if source.exists() else f"no file {source}"
        raise EwavitError(
            f"{what}: give a .safetensors file, an index of shards, or the folder of either"
        ) from None
    if is_torch_file(source):
        raise EwavitError(
            f"{source} is a file of torch.save, and only safetensors are collapsed in pieces: load it into "
            "the model and call ewavit.collapse(model), or write safetensors.torch.save_file("
            "model.state_dict(), FILE, ewavit.expert_metadata(model))"
        )
    if not source.name.endswith(INDEX):
        tensors, metadata = read_header(source)
        return _Source(tensors, {source: metadata}, None, {})
    of_key, index_metadata = read_index(source)
    headers = {file: read_header(file) for file in dict.fromkeys(of_key.values())}
    if lost := [key for key, file in of_key.items() if key not in headers[file][0]]:
        raise EwavitError(
            f"{of_key[lost[0]]} lacks {printable(lost[0])}, but {source.name} puts it there: fetch it again"
        )
    tensors = {key: headers[file][0][key] for key, file in of_key.items()}
    return _Source(tensors, {file: header[1] for file, header in headers.items()}, source, index_metadata)


class _Reader(ExitStack):
    """Open files and one buffer for all reading."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[Path, BinaryIO] = {}
        self.buffer = bytearray(BLOCK)

    def fill(self, file: Path, begin: int, view: memoryview) -> None:
        """Read `len(view)` bytes of a file."""
        try:
            if file not in self._files:
                self._files[file] = self.enter_context(file.open("rb", buffering=0))
            handle = self._files[file]
            handle.seek(begin)
            while view:
                count = handle.readinto(view)  # type: ignore[attr-defined]
                if not count:
                    raise OSError(None, "the file ended too early")
                view = view[count:]
        except OSError as problem:
            raise EwavitError(f"{file} cannot be read ({problem.strerror}): fetch it again") from None


# Which tensors become which


def _plan(found: _Source, source: Path) -> tuple[dict[str, list[Stored]], int]:
    """For each key of the plain model the one tensor to copy or the N tensors to average."""
    mixtures = _mixtures(found, source)
    outputs: dict[str, list[Stored]] = {}
    matches = {key: _EXPERT_KEY.fullmatch(key) for key in found.tensors if not key.startswith(_BRANCHES)}
    in_order = sorted(matches.items(), key=lambda item: int((item[1] and item[1]["copy"]) or 0))
    for key, match in in_order:  # in the order of the copies: the sum then equals that of `collapse` exactly
        stored = found.tensors[key]
        if match is None or (mixture_name := match["mixture"] or "") not in mixtures:
            owner = next((name for name in _prefixes(key) if name in mixtures), None)
            if owner is None:
                outputs.setdefault(key, []).append(stored)
            elif not _is_stored_mean(key, owner, found.tensors):  # else the experts give it
                if key.endswith(".dispatcher.fusion"):
                    raise EwavitError(
                        f"{source} holds fused experts ({printable(key)}), and their mean is another model: "
                        "load it and call ewavit.collapse(model)"
                    )
                raise EwavitError(
                    f"{source} is a routed mixture ({printable(key)}); no plain model computes the same: to "
                    "deploy its mean expert, a different model, load it and call ewavit.collapse(model)"
                )
            continue
        name, mixture = match["name"], mixtures[mixture_name]
        target = _in(mixture_name, name)
        stacked = mixture.experts == "stacked"
        if stacked != (match["copy"] is None) or int(match["copy"] or 0) >= mixture.num_experts:
            kind = f"{mixture.num_experts} {mixture.experts} experts"
            raise EwavitError(f"{source}: {printable(key)} does not belong to {kind}: fetch it again")
        if name not in mixture.parameters:
            if match["copy"] in (None, "0"):
                outputs.setdefault(target, []).append(stored)
        elif not stacked:
            outputs.setdefault(target, []).append(stored)
        elif stored.shape[:1] == (mixture.num_experts,):
            outputs.setdefault(target, []).append(stored.unstacked())
        else:
            raise EwavitError(
                f"{source}: {printable(key)} {stored.shape} is not {mixture.num_experts} experts stacked"
            )
    wanted = {_in(name, key): each.num_experts for name, each in mixtures.items() for key in each.parameters}
    for key in {**wanted, **outputs}:
        parts, count = outputs.get(key, []), wanted.get(key, 1)
        held = sum(part.count for part in parts)
        if held != count or len({(part.dtype, part.shape) for part in parts}) != 1:
            raise EwavitError(
                f"{source} holds {held} tensors for {printable(key)}, not {count} of one shape and type: it "
                "is damaged, fetch it again"
            )
        if count > 1 and parts[0].dtype not in FLOATS:
            raise EwavitError(
                f"{source}: experts of type {parts[0].dtype} ({printable(key)}) cannot be averaged: save "
                "them as F32"
            )
    return outputs, len(mixtures)


def _in(mixture: str, name: str) -> str:
    """The key of a tensor of a mixture; the mixture "" is the whole model."""
    return f"{mixture}.{name}" if mixture else name


def _prefixes(key: str) -> Iterator[str]:
    """The modules that a tensor is in, the outermost first."""
    parts = key.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))


def _is_stored_mean(key: str, mixture: str, keys: Container[str]) -> bool:
    """Whether a tensor is of the mean FFN that `save_pretrained` puts beside the experts for a Trainer."""
    rest = key.removeprefix(f"{mixture}.")
    return any(f"{mixture}.experts.{held}.{rest}" in keys for held in ("ffn", "copies.0"))


def _mixtures(found: _Source, source: Path) -> dict[str, StoredMixture]:
    """The mixtures from the metadata, or without metadata from the keys."""
    texts = [each[EXPERTS] for each in (*found.metadata.values(), found.index_metadata) if EXPERTS in each]
    try:
        mixtures = {
            name: _stored_mixture(name, each)
            for text in texts
            for name, each in strict_json(text.encode()).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise EwavitError(
            f"{source} has unknown metadata about experts ({said(problem)}): save it again with "
            "ewavit.expert_metadata(model)"
        ) from None
    mixtures = mixtures or _guessed(found.tensors, source)
    if not mixtures:
        raise EwavitError(f"{source} holds no mixture of experts: it is already a plain model")
    return mixtures


def _stored_mixture(name: str, entry: Mapping[str, Any]) -> StoredMixture:
    """A mixture as the metadata describe it."""
    count, experts, parameters = entry["num_experts"], entry["experts"], entry["parameters"]
    if type(count) is not int or not 1 <= count <= MOST_EXPERTS:
        raise ValueError(f"num_experts of {printable(name)} is {printable(count)}, not 1 to {MOST_EXPERTS:,}")
    if experts not in ("stacked", "separate"):
        raise ValueError(f"experts of {printable(name)} is {printable(experts)}, not stacked or separate")
    if type(parameters) is not list or not parameters or not all(type(each) is str for each in parameters):
        raise ValueError(f"parameters of {printable(name)} is {printable(parameters)}, not a list of names")
    return StoredMixture(count, experts, frozenset(parameters))


def _guessed(tensors: Mapping[str, Stored], source: Path) -> dict[str, StoredMixture]:
    """The mixtures by their keys; an error if these are ambiguous."""
    parts: dict[str, list[tuple[str | None, str, Stored]]] = {}
    for key, stored in tensors.items():
        if match := _EXPERT_KEY.fullmatch(key):
            parts.setdefault(match["mixture"] or "", []).append((match["copy"], match["name"], stored))
    mixtures = {}
    for mixture, found in parts.items():
        copies = {copy for copy, _, _ in found}
        stacked = copies == {None}
        counts = {stored.shape[:1] for _, _, stored in found} if stacked else {(len(copies),)}
        names = frozenset(name for _, name, _ in found)
        numbered = stacked or copies == {str(number) for number in range(len(copies))}
        floats = all(stored.dtype in FLOATS for _, _, stored in found)
        dims = {len(stored.shape) for _, _, stored in found}
        one_ffn = stacked and (min(dims) < 2 or max(dims) < 3)  # neither stacked vectors nor stacked matrices
        count = next(iter(counts.pop()), 0) if len(counts) == 1 else 0
        if not 1 <= count <= MOST_EXPERTS or one_ffn or not numbered or not floats:
            raise EwavitError(
                f"{source} does not say which tensors of {printable(mixture)} are experts: save it with the "
                "metadata of ewavit.expert_metadata(model)"
            )
        mixtures[mixture] = StoredMixture(count, "stacked" if stacked else "separate", names)
    return mixtures


# Writing


def _write(
    file: Path, outputs: Mapping[str, Sequence[Stored]], metadata: Mapping[str, str], reader: _Reader
) -> int:
    """Write one safetensors file; returns its size in bytes."""
    # The order of the safetensors library: the widest types first, so that all tensors are aligned.
    order = sorted(outputs, key=lambda key: (-ITEM_BITS[outputs[key][0].dtype], key))
    header: dict[str, Any] = {"__metadata__": _without_experts({"format": "pt", **metadata})}
    end = 0
    for key in order:
        first = outputs[key][0]
        begin, end = end, end + first.size
        header[key] = {"dtype": first.dtype, "shape": first.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            for piece in _averaged(outputs[key], reader):
                handle.write(piece)
        handle.flush()
        os.fsync(handle.fileno())
    return 8 + len(text) + end


def _write_shards(
    folder: Path, outputs: Mapping[str, Sequence[Stored]], found: _Source, reader: _Reader
) -> int:
    """Write a folder of shards under their old names, without empty ones, the index, and other JSON files."""
    assert found.index is not None
    base = found.index.parent
    shards: dict[Path, dict[str, Sequence[Stored]]] = {}
    for key, parts in outputs.items():
        shards.setdefault(parts[0].file, {})[key] = parts
    written = 0
    for file, tensors in shards.items():
        to = folder / file.relative_to(base)
        to.parent.mkdir(parents=True, exist_ok=True)
        written += _write(to, tensors, found.metadata[file], reader)
    size = sum(parts[0].size for parts in outputs.values())
    index = {
        "metadata": _without_experts({**found.index_metadata, "total_size": size}),
        "weight_map": {
            key: parts[0].file.relative_to(base).as_posix() for key, parts in sorted(outputs.items())
        },
    }
    (folder / found.index.name).write_text(json.dumps(index, indent=2) + "\n")
    for file in base.glob(
        "*.json"
    ):  # what transformers wants beside the shards: the model, the preprocessing
        if file.is_file() and not file.name.endswith(INDEX) and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    return written


def _without_experts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key != EXPERTS}


def _averaged(experts: Sequence[Stored], reader: _Reader) -> Iterator[memoryview]:
    """The bytes of the mean of equal tensors, or of one tensor, in pieces; each is valid until the next."""
    places = [(part.file, part.begin + n * part.size) for part in experts for n in range(part.count)]
    count, size = len(places), experts[0].size
    width = BLOCK // count // 4096 * 4096 or BLOCK // count // LEAST * LEAST  # bytes of each at a time
    dtype = FLOATS.get(experts[0].dtype, torch.uint8)
    mean = torch.empty(0, dtype=torch.promote_types(dtype, torch.float32))
    result = bytearray(width if count > 1 else 0)
    for done in range(0, size, width):
        each = min(width, size - done)
        piece = memoryview(reader.buffer)[: count * each]
        for number, (file, begin) in enumerate(places):
            reader.fill(file, begin + done, piece[number * each : (number + 1) * each])
        if count == 1:
            yield piece
            continue
        values = torch.frombuffer(piece, dtype=dtype).view(count, -1)
        torch.mean(values, 0, dtype=mean.dtype, out=mean.resize_(values.shape[1]))
        torch.frombuffer(result, dtype=dtype, count=len(mean)).copy_(mean)
        yield memoryview(result)[:each]
