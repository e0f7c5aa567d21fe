"""From a file of weights to a model: which tensor goes where, and a report of it.

Files differ in what is around the weights (containers, prefixes), in a few names, and in what they have
besides a model's body: no head, one, two, a decoder, a second network. Here their tensors get the model's
names; timm resizes and converts them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ewavit.data.weight_files import named_tensors, read_weights

MOST_NAMED = 4  # keys in a message

# What wrappers put into keys.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Of several copies of the weights in a file the first kind here is taken; any other name is before the last.
_COPIES = ("ema", "teacher", "target", "dict")  # `dict` is that of state_dict
_LAST_COPIES = ("momentum", "student")
# In files whose names only timm knows the weights are in the first of these.
_CONTAINERS = ("state_dict_ema.", "model_ema.", "state_dict.", "model.", "")
# Names of a model's body; other tensors that a model lacks are left over without harm.
_BODY = re.compile(r"(?!decoder|mask|head|lm_head|pre_logits)\w*(token|embed|norm|block|layer|stage|stem)")
_NORMS = (("norm.", "fc_norm."), ("fc_norm.", "norm."))


@dataclass
class LoadReport:
    """What became of the tensors of a file.

    Attributes:
        source: the file.
        loaded: keys of the model that got the file's values, resized ones included.
        resized: such keys with the shapes in the file and in the model.
        new: keys of the model with fresh values.
        left_over: keys of the file that the model has no place for.
        remarks: what was done to the keys.
    """

    source: str
    loaded: list[str]
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Three lines: what was loaded, what was resized or is new, what was left over."""
        total = len(self.loaded) + len(self.new)
        remarks = f" ({', '.join(self.remarks)})" if self.remarks else ""
        resized = [f"{key} {before} -> {after}" for key, (before, after) in self.resized.items()]
        groups = Counter(_group(key) for key in self.left_over)
        rest = [f"{name} {count}" if count > 1 else name for name, count in groups.most_common()]
        return [
            f"loaded {len(self.loaded)} of the model's {total} tensors from {self.source}{remarks}",
            f"resized: {_listed(resized)}; new: {_listed(self.new)}",
            f"left over: {_listed(rest)}",
        ]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more if names else "none"


def _group(key: str) -> str:
    """The module of a key, for a list of many: `decoder_blocks`, `student.backbone`."""
    parts = key.split(".")[:-1] or [key]
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: min([2, *numbers])]) or key


@dataclass(frozen=True)
class Fitted:
    """The tensors of a file under a model's names.

    Attributes:
        weights: for the model; with all of its names, unless only timm knows those of the file.
        num_classes: of the heads in `weights`.
        report: what will have been done once they are loaded.
    """

    weights: dict[str, Tensor]
    num_classes: int
    report: LoadReport


def fit(file: str, own: Mapping[str, Tensor], heads: Sequence[str], num_classes: int) -> Fitted:
    """Find a model's tensors in a file.

    Args:
        file: see `read_weights`.
        own: the state dict of a fresh model; its heads are taken where the file has none that fits.
        heads: names of the modules of the model that map features to classes.
        num_classes: classes of the fresh model.

    Raises:
        EwavitError: the file cannot be read.
    """
    stored = dict(named_tensors(read_weights(Path(file))))
    report = LoadReport(file, [])
    names = _unwrapped(stored, own, heads, report)
    used = set(names.values())
    report.left_over += [key for key in stored if key not in used]
    tensors = {name: stored[key] for name, key in names.items()}
    for old, name in _NORMS:
        if f"{name}weight" in own and f"{name}weight" not in tensors and f"{old}weight" not in own:
            moved = [key for key in tensors if key.startswith(old)]
            for key in moved:
                tensors[name + key.removeprefix(old)] = tensors.pop(key)
            report.remarks += [f"{old[:-1]} as {name[:-1]}"] if moved else []
    classes = _fit_heads(tensors, own, heads, num_classes, report)
    missing = [key for key in own if key not in tensors]
    for key in [key for key in tensors if key not in own]:
        if not missing and not _BODY.match(key):  # else timm may know the names
            report.left_over.append(key)
            del tensors[key]
    if missing:
        report.remarks.append("names converted by timm")
    new = set(report.new)
    report.loaded += [key for key in own if key not in new]
    shapes = {
        key: (tuple(tensors[key].shape), tuple(own[key].shape)) for key in report.loaded if key in tensors
    }
    report.resized |= {
        key: pair for key, pair in shapes.items() if pair[0] != pair[1] and not _of_head(key, heads)
    }
    return Fitted(tensors, classes, report)


def misfit(fitted: Fitted, own: Mapping[str, Tensor], heads: Sequence[str]) -> str:
    """Why tensors that were fitted do not load, with the names of some keys."""
    missing = [key for key in own if key not in fitted.weights]
    unknown = [key for key in fitted.weights if key not in own]
    if len(missing) == len([key for key in own if key not in fitted.report.new]):
        return f"none of the model's names is in it; it has {_listed(unknown)}"
    shapes = [
        f"{key} is {before}, the model's {after}" for key, (before, after) in fitted.report.resized.items()
    ]
    # Position embeddings and the like can be resized, so another tensor is the reason, if there is one.
    shapes.sort(key=lambda text: bool(re.search("pos|patch_embed", text.split()[0])))
    sides = ((missing, "it lacks"), (unknown, "the model lacks"), (shapes[:2], "of other shapes"))
    return "; ".join(f"{words} {_listed(names)}" for names, words in sides if names) or "its shapes differ"


def _of_head(key: str, heads: Sequence[str]) -> bool:
    return any(key.startswith(f"{head}.") for head in heads)


def _unwrapped(
    stored: Mapping[str, Tensor], own: Mapping[str, Tensor], heads: Sequence[str], report: LoadReport
) -> dict[str, str]:
    """The file's key for each name, without the prefix under which most of the model's names are."""
    chunked = not any(re.match(r"blocks\.\d+\.\d+\.", key) for key in own)
    clean = {}
    for key in stored:
        name = key
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        if chunked:  # DINOv2's training saves blocks in chunks, with their numbers in the second place
            name = re.sub(r"(^|\.)blocks\.\d+\.(\d+)\.", r"\1blocks.\2.", name)
        clean[name] = key
    body = [key for key in own if not _of_head(key, heads)]
    wanted, counts = set(body), Counter[str]()
    for name in clean:
        parts = name.split(".")
        for place in range(len(parts)):
            if ".".join(parts[place:]) in wanted:
                counts[".".join([*parts[:place], ""])] += 1
    most = max(counts.values(), default=0)
    if 2 * most >= len(body):
        prefix = min((prefix for prefix, count in counts.items() if count == most), key=_copy)
    else:
        prefix = next((each for each in _CONTAINERS if any(name.startswith(each) for name in clean)), "")
        if clean and all(name.startswith(f"{prefix}module.") for name in clean if name.startswith(prefix)):
            prefix += "module."
    if prefix:
        report.remarks.append(f"its keys under {prefix[:-1]}")
    return {name.removeprefix(prefix): key for name, key in clean.items() if name.startswith(prefix)}


def _copy(prefix: str) -> int:
    """The place of a copy of the weights among the copies in a file."""
    words = re.split(r"[._]", prefix)
    if any(word in words for word in _LAST_COPIES):
        return len(_COPIES) + 1
    return next((place for place, word in enumerate(_COPIES) if word in words), len(_COPIES))


def _fit_heads(
    tensors: dict[str, Tensor],
    own: Mapping[str, Tensor],
    heads: Sequence[str],
    num_classes: int,
    report: LoadReport,
) -> int:
    """Take the file's heads if they go with the features and are complete, else fresh ones; their classes."""
    found = [tensors.get(f"{head}.weight") for head in heads]
    shapes = {tuple(weight.shape) for weight in found if weight is not None}
    widths = {tuple(own[key].shape[1:]) for head in heads if (key := f"{head}.weight") in own}
    whole = all(weight is not None for weight in found) and len(shapes) == 1
    if whole and {shape[1:] for shape in shapes} == widths:
        (shape,) = shapes
        if shape[0] != num_classes:
            report.new += [key for key in own if _of_head(key, heads)]
            report.left_over += [key for key in tensors if _of_head(key, heads)]
        return int(shape[0])
    for key in [key for key in tensors if _of_head(key, heads)]:
        report.left_over.append(key)
        del tensors[key]
    around = [head.rpartition(".")[0] for head in heads]  # e.g. its BatchNorm
    around = [name for name in around if name and not _has(tensors, name)]
    for key in own:
        if key not in tensors and _of_head(key, [*heads, *around]):
            tensors[key] = own[key]
            report.new.append(key)
    return num_classes


def _has(tensors: Mapping[str, Tensor], name: str) -> bool:
    return any(key.startswith(f"{name}.") for key in tensors)
