"""Weights: safetensors, shards and their index, files of torch.save, model cards. Oracle: safetensors."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_images import _CALLED, hostile
from fuzz_inputs import ACCEPTED, Draw, Wrong, answered, damaged, edited, outcome, target
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file

import ewavit
from ewavit.core.checkpoint_files import EXPERTS, collapse_checkpoint
from ewavit.core.routing import TopK
from ewavit.data.weight_files import read_weights
from ewavit.training.card import ModelCard

MIXTURE = "blocks.1.mlp"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def _expanded(experts: int = 3, kind: str = "stacked", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The state dict of a model with one mixture."""
    generator = torch.Generator().manual_seed(experts)
    names = {"fc1.weight": (4, 2), "fc1.bias": (4,)}
    state = {
        "embed.weight": torch.randn(2, 3, generator=generator),
        "position": torch.arange(5),
        "half": torch.randn(3, generator=generator).to(torch.float16),
        "empty": torch.zeros(0, 2),
    }
    for name, shape in names.items():
        if kind == "stacked":
            state[f"{MIXTURE}.experts.ffn.{name}"] = torch.randn(experts, *shape, generator=generator).to(
                dtype
            )
        else:
            for number in range(experts):
                key = f"{MIXTURE}.experts.copies.{number}.{name}"
                state[key] = torch.randn(*shape, generator=generator).to(dtype)
    return state


def _said(experts: int = 3, kind: str = "stacked") -> dict[str, Any]:
    return {MIXTURE: {"num_experts": experts, "experts": kind, "parameters": ["fc1.weight", "fc1.bias"]}}


def _averaged(state: dict[str, torch.Tensor], said: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The plain model's state dict, from the whole file in memory."""
    made = {
        key: value for key, value in state.items() if not any(key.startswith(f"{name}.") for name in said)
    }
    for name, facts in said.items():
        for parameter in facts["parameters"]:
            if facts["experts"] == "stacked":
                values = state[f"{name}.experts.ffn.{parameter}"]
            else:
                copies = range(facts["num_experts"])
                values = torch.stack([state[f"{name}.experts.copies.{i}.{parameter}"] for i in copies])
            wide = torch.promote_types(values.dtype, torch.float32)
            made[f"{name}.{parameter}"] = values.to(wide).mean(0).to(values.dtype)
    return made


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if set(found) != set(expected):
        raise Wrong(f"keys {sorted(set(found) ^ set(expected))!s:.200}")
    for key, value in expected.items():
        there = found[key]
        if there.dtype != value.dtype or there.shape != value.shape:
            raise Wrong(
                f"{key} is {there.dtype} {tuple(there.shape)}, not {value.dtype} {tuple(value.shape)}"
            )
        if not torch.allclose(
            there.flatten().double(), value.flatten().double(), rtol=1e-2, atol=1e-6, equal_nan=True
        ):
            raise Wrong(f"{key} has other values")


def _collapsed(source: Path, target_file: Path) -> Exception | None:
    """Collapse a file; what a refusal leaves behind is wrong."""
    before = sorted(target_file.parent.iterdir())
    _, refusal = answered(lambda: collapse_checkpoint(source, target_file))
    if refusal is not None and sorted(target_file.parent.iterdir()) != before:
        raise Wrong(f"a refusal left files behind: {refusal}")
    return refusal


def _room(folder: Path) -> Path:
    (folder / "out").mkdir()
    return folder


@target("weights: collapse of sound files", 0.5, _room)
def sound_collapse(draw: Draw, folder: Path) -> str:
    kind, dtype = (
        draw(st.sampled_from(["stacked", "separate"])),
        draw(st.sampled_from(list(_DTYPES.values()))),
    )
    experts = draw(st.integers(1, 12))
    state, said = _expanded(experts, kind, dtype), _said(experts, kind)
    metadata = {"format": "pt", EXPERTS: json.dumps(said), "note": draw(st.text(max_size=5))}
    (folder / "in.safetensors").write_bytes(save(state, metadata))
    file = folder / "out/plain.safetensors"
    if refusal := _collapsed(folder / "in.safetensors", file):
        raise Wrong(f"a sound file was refused: {refusal}")
    _same(load_file(file), _averaged(state, said))
    file.unlink()
    return ACCEPTED


def _headers(folder: Path) -> tuple[Path, list[tuple[dict[str, Any], bytes]]]:
    """Headers as JSON, and the data behind them."""
    _room(folder)
    files = []
    for kind in ("stacked", "separate"):
        data = save(_expanded(3, kind), {"format": "pt", EXPERTS: json.dumps(_said(3, kind))})
        length = int.from_bytes(data[:8], "little")
        files.append((json.loads(data[8 : 8 + length]), data[8 + length :]))
    return folder, files


def _with_header(text: str, data: bytes) -> bytes:
    head = text.encode("utf-8", "surrogatepass")
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + data


@target("weights: collapse of files with another header", 2.0, _headers)
def odd_header(draw: Draw, shared: tuple[Path, list[tuple[dict[str, Any], bytes]]]) -> str:
    folder, files = shared
    header, data = draw(st.sampled_from(files))
    if draw(st.booleans()):
        header = edited(draw, header)
    else:  # the list of the experts
        said = edited(draw, json.loads(header["__metadata__"][EXPERTS]))
        header = header | {"__metadata__": {EXPERTS: json.dumps(said)}}
    return _try_collapse(folder, _with_header(json.dumps(header, ensure_ascii=draw(st.booleans())), data))


@target("weights: collapse of damaged files", 1.5, _headers)
def damaged_collapse(draw: Draw, shared: tuple[Path, list[tuple[dict[str, Any], bytes]]]) -> str:
    folder, files = shared
    header, data = draw(st.sampled_from(files))
    return _try_collapse(folder, damaged(draw, _with_header(json.dumps(header), data)))


def _try_collapse(folder: Path, data: bytes) -> str:
    source, file = folder / "in.safetensors", folder / "out/plain.safetensors"
    source.write_bytes(data)
    refusal = _collapsed(source, file)
    if refusal is None:
        found = load_file(file)  # what is written must be sound
        file.unlink()
        try:
            state = load(data)
        except Exception as problem:
            raise Wrong(f"a file that safetensors refuses ({problem}) was collapsed") from None
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
        if said := json.loads(metadata.get(EXPERTS, "{}")):  # else the keys decide
            listed = {name for facts in said.values() for name in facts["parameters"]}
            if listed == {"fc1.weight", "fc1.bias"}:  # any other tensor of an FFN is a buffer, as documented
                _same(found, _averaged(state, said))
    return outcome(refusal)


def _shards(folder: Path) -> tuple[Path, dict[str, Any]]:
    _room(folder)
    state = _expanded()
    weight_map = {key: f"model-{number % 2}.safetensors" for number, key in enumerate(sorted(state))}
    for name in set(weight_map.values()):
        part = {key: state[key] for key, file in weight_map.items() if file == name}
        save_file(part, folder / name, {"format": "pt"})
    (folder / "sub").mkdir()
    save_file({"embed.weight": state["embed.weight"]}, folder / "sub/model-0.safetensors")
    return folder, {"metadata": {"total_size": 1, EXPERTS: json.dumps(_said())}, "weight_map": weight_map}


@target("weights: index of shards", 1.5, _shards)
def shards(draw: Draw, shared: tuple[Path, dict[str, Any]]) -> str:
    folder, index = shared
    file = folder / "model.safetensors.index.json"
    made = edited(draw, index) if draw(st.integers(0, 4)) else json.loads(json.dumps(index))
    if (
        isinstance(made, dict)
        and isinstance(held := made.get("weight_map"), dict)
        and draw(st.integers(0, 3)) == 0
    ):
        key = draw(st.sampled_from(sorted(map(str, held)) or ["a"]))
        held[key] = draw(
            st.sampled_from(
                [
                    "sub/model-0.safetensors",
                    "../x.safetensors",
                    "/etc/passwd",
                    ".",
                    "",
                    str(folder / "model-0.safetensors"),
                    "/dev/zero",
                ]
            )
        )
    text = json.dumps(made).encode()
    file.write_bytes(text if draw(st.integers(0, 2)) else damaged(draw, text))
    if draw(st.booleans()):
        _, refusal = answered(lambda: read_weights(file))
        return outcome(refusal)
    to = folder / "out" / draw(st.sampled_from(["plain", "plain.safetensors"]))
    refusal = _collapsed(file, to)
    if refusal is None:
        parts = [to] if to.is_file() else sorted(to.rglob("*.safetensors"))
        found = {key: value for part in parts for key, value in load_file(part).items()}
        shutil.rmtree(to) if to.is_dir() else to.unlink()
        held = json.loads(file.read_bytes())["weight_map"]
        outside = [name for name in held.values() if folder not in (folder / name).resolve().parents]
        if outside:
            raise Wrong(f"an index named {outside[0]}, which is not in its folder")
        wanted = {key for key in held if ".experts." not in key} | {
            f"{MIXTURE}.fc1.weight",
            f"{MIXTURE}.fc1.bias",
        }
        said = made["metadata"].get(EXPERTS) if isinstance(made.get("metadata"), dict) else None
        if said == index["metadata"][EXPERTS] and set(found) != wanted:
            raise Wrong(f"keys {sorted(set(found) ^ wanted)!s:.200}")
    return outcome(refusal)


@target("weights: damaged safetensors", 1.0, _headers)
def damaged_safetensors(draw: Draw, shared: tuple[Path, list[tuple[dict[str, Any], bytes]]]) -> str:
    folder, files = shared
    header, data = draw(st.sampled_from(files))
    if draw(st.booleans()):
        content = damaged(draw, _with_header(json.dumps(header), data))
    else:
        content = _with_header(json.dumps(edited(draw, header)), data)
    file = folder / "in.safetensors"
    file.write_bytes(content)
    found, refusal = answered(lambda: read_weights(file))
    if found is not None:
        try:
            load(content)
        except Exception as problem:
            raise Wrong(f"a file that safetensors refuses was read ({problem})") from None
    return outcome(refusal)


def _torch_files(folder: Path) -> tuple[Path, list[bytes], dict[str, Any]]:
    state = {
        "state_dict": {"a.weight": torch.ones(2, 3), "b": torch.arange(4)},
        "epoch": 3,
        "args": Namespace(lr=1),
    }
    files = []
    for content in (
        state,
        state | {"lr": np.float64(1)},
        torch.ones(3),
        [1, 2],
        {"a": "b"},
        {1: torch.ones(2)},
    ):
        for new in (True, False):
            stored = io.BytesIO()
            torch.save(content, stored, _use_new_zipfile_serialization=new)
            files.append(stored.getvalue())
    return folder, files, state


@target("weights: files of torch.save", 1.5, _torch_files)
def torch_files(draw: Draw, shared: tuple[Path, list[bytes], dict[str, Any]]) -> str:
    folder, files, state = shared
    how, data = draw(st.integers(0, 9)), draw(st.sampled_from(files))
    if how == 0:
        stored = io.BytesIO()
        content = hostile(draw, state, draw(st.sampled_from(["state_dict", "x", "args"])))
        torch.save(content, stored, _use_new_zipfile_serialization=draw(st.booleans()))
        data = stored.getvalue()
    elif how == 1:  # the pickle in the archive is damaged, the archive is not
        data = _other_pickle(draw, files[0])
    elif how > 2:
        data = damaged(draw, data)
    file = folder / draw(st.sampled_from(["a.pth", "a.pt", "a.bin", "a.ckpt", "a"]))
    file.write_bytes(data)
    _CALLED.clear()
    try:
        _, refusal = answered(lambda: read_weights(file))
    finally:
        file.unlink()
    if _CALLED or Path("hostile").exists():
        raise Wrong("a file of weights ran code")
    if how == 0 and refusal is None:
        raise Wrong("a hostile file was accepted")
    return outcome(refusal)


def _other_pickle(draw: Draw, archive: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(
                entry.filename, damaged(draw, content) if entry.filename.endswith("data.pkl") else content
            )
    return made.getvalue()


# --- cards ---

_CARD = {
    "model": "vit_tiny_patch16_224",
    "model_kwargs": {
        "patch_size": 4,
        "embed_dim": 8,
        "depth": 1,
        "num_heads": 1,
        "num_classes": 2,
        "in_chans": 1,
        "img_size": 8,
    },
    "classes": ["a", "b"],
    "in_chans": 1,
    "img_size": 8,
    "mean": [0.5],
    "std": [0.5],
    "data": "fashion-mnist-mini",
    "metric": 50.0,
    "mixture": None,
    "num_points": None,
    "absolute_data": None,
    "data_dir": None,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def _cards(folder: Path) -> tuple[Path, list[tuple[dict[str, Any], dict[str, torch.Tensor]]]]:
    routed = _CARD | {
        "mixture": {"num_experts": 2, "layers": ["blocks.0.mlp"], "router": {"k": 1, "capacity_ratio": 1.25}}
    }
    clouds = _CARD | {
        "model": "point_transformer_s",
        "model_kwargs": {"dim": 12, "depth": 1, "num_classes": 2},
        "in_chans": 3,
        "img_size": 0,
        "mean": [],
        "std": [],
        "data": "solids",
        "num_points": 64,
        "interpolation": None,
        "crop_pct": None,
        "crop_mode": None,
    }
    made = []
    for content in (_CARD, routed, clouds):
        card = ModelCard.from_dict(json.loads(json.dumps(content)))
        model = card.task.create_model(card.model, card.model_kwargs)
        if card.mixture is not None:
            ewavit.expand(model, 2, select=card.mixture.layers, router=TopK(**card.mixture.router))
        made.append((content, model.state_dict()))
    # What a card must never do: read this file, or anything else that it names.
    torch.save({"x": 1}, folder / "named.pth")
    return folder, made


_HOSTILE_KWARGS = (
    {"checkpoint_path": "named.pth"},
    {"pretrained": True},
    {"pretrained_cfg": {"file": "named.pth"}},
    {"pretrained_cfg_overlay": {"file": "named.pth"}},
    {"embed_dim": 10**7},
    {"depth": 10**6},
    {"cache_dir": "named"},
    {"num_classes": 10**9},
    {"global_pool": "map"},
    {"no_such": 1},
    {"patch_size": 0},
    {"num_heads": 3},
    {"scriptable": True},
)
_HOSTILE_NAMES = (
    "hf-hub:someone/model",
    "local-dir:.",
    "hf_hub:a/b",
    "vit_tiny_patch16_224.augreg_in21k",
    "no_such_model",
    "",
    "vit_giant_patch14_224",
    "resnet18",
    "../x",
    "VIT_TINY_PATCH16_224",
    "eva02_enormous_patch14_clip_224",
)


@target("weights: model cards", 0.2, _cards)
def cards(draw: Draw, shared: tuple[Path, list[tuple[dict[str, Any], dict[str, torch.Tensor]]]]) -> str:
    folder, made = shared
    content, state = draw(st.sampled_from(made))
    how = draw(st.integers(0, 5))
    if how == 0:
        content = content | {"model_kwargs": content["model_kwargs"] | draw(st.sampled_from(_HOSTILE_KWARGS))}
    elif how == 1:
        content = content | {"model": draw(st.sampled_from(_HOSTILE_NAMES))}
    elif how < 5:
        content = edited(draw, content)
    text = json.dumps(content)
    if how == 5:
        text = damaged(draw, text.encode()).decode(errors="replace")
    file = folder / "model.safetensors"
    try:
        file.write_bytes(save(state, {"format": "pt", "ewavit": text}))
    except Exception:  # metadata that safetensors cannot hold
        return "not written"
    first, unread = answered(lambda: ModelCard.of_file(file))
    model, refusal = answered(lambda: ewavit.load(file))
    if model is not None:
        if first is None:
            raise Wrong(f"the card is refused ({unread}), the model is not")
        for key, value in model.state_dict().items():
            if key in state and not torch.equal(value, state[key]):
                raise Wrong(f"{key} is not the file's")
        if how == 0 and {"checkpoint_path", "pretrained"} & set(json.loads(text)["model_kwargs"]):
            raise Wrong("a card with a path or a pretrained flag was accepted")
    return outcome(refusal)
