"""Collapse from file to file: the same bits as in memory, little memory, and nothing half-written."""

import json
import math
import re
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import ewavit as ewa
from ewavit import EwavitError
from ewavit.cli import main
from ewavit.core import checkpoint_files as streaming
from ewavit.core import moe_layers
from ewavit.core.tensor_files import ITEM_BITS, read_header
from ewavit.data.weight_files import read_weights
from ewavit.training.export import load_model
from ewavit.training.loop import train
from ewavit.training.recipe import Recipe
from small_models import DIM, FFNS, ffn, randomised, separated


class Net(nn.Module):
    """Some blocks with an FFN each, a buffer of another type, and parameters outside."""

    def __init__(self, kind: str = "mlp", depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(3, DIM)
        self.blocks = nn.ModuleList(nn.ModuleDict({"mlp": ffn(kind)}) for _ in range(depth))
        self.register_buffer("position", torch.arange(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block["mlp"](x)
        return x


class Counting(nn.Module):
    """An FFN with a buffer, which no mean must touch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(DIM, DIM)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * self.scale.mean()


def expanded(num_experts=3, experts="auto", dtype=torch.float32, kind="mlp"):
    model = Net(kind)
    names = [f"blocks.{number}.mlp" for number in range(2)]
    return separated(ewa.expand(model.to(dtype), num_experts, select=names, experts=experts))


def save(model, file, metadata=None):
    said = {"format": "pt", **ewa.expert_metadata(model)} if metadata is None else metadata
    save_file(dict(model.state_dict()), file, said)
    return file


def shard(model, folder, parts=3, index_metadata=None):
    """Deal a state dict to files and write the index, as transformers and accelerate do."""
    folder.mkdir()
    state = model.state_dict()
    weight_map = {key: f"model-{1 + n % parts:05}-of-{parts:05}.safetensors" for n, key in enumerate(state)}
    for name in set(weight_map.values()):
        save_file(
            {key: state[key] for key in state if weight_map[key] == name}, folder / name, {"format": "pt"}
        )
    index = {"metadata": {"total_size": 1, **(index_metadata or {})}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def check_same(found, model):
    """Equal to the bit, keys, types and all."""
    expected = ewa.dense_state_dict(model)
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


def metadata_of(file):
    with safe_open(file, "pt") as handle:
        return handle.metadata()


@pytest.mark.parametrize("named", [True, False], ids=["metadata", "keys alone"])
@pytest.mark.parametrize("experts", ["stacked", "separate"])
@pytest.mark.parametrize("num_experts", [1, 2, 4, 8, 11])
def test_a_streamed_collapse_equals_the_one_in_memory_to_the_bit(tmp_path, num_experts, experts, named):
    model = expanded(num_experts, experts)
    source = save(model, tmp_path / "expanded.safetensors", None if named else {"format": "pt", "who": "me"})
    said = ewa.collapse_checkpoint(source, tmp_path / "plain.safetensors")
    check_same(load_file(tmp_path / "plain.safetensors"), model)
    assert "2 mixtures" in said
    kept = {"format": "pt"} if named else {"format": "pt", "who": "me"}
    assert metadata_of(tmp_path / "plain.safetensors") == kept


@pytest.mark.parametrize("kind", list(FFNS))
def test_every_kind_of_ffn_is_collapsed(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 3 * 4096)  # several pieces
    model = expanded(kind=kind)
    ewa.collapse_checkpoint(save(model, tmp_path / "expanded.safetensors"), tmp_path / "plain.safetensors")
    check_same(load_file(tmp_path / "plain.safetensors"), model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_mean_of_half_precision_is_rounded_once(tmp_path, dtype):
    model = expanded(4, dtype=dtype)
    ewa.collapse_checkpoint(save(model, tmp_path / "expanded.safetensors"), tmp_path / "plain.safetensors")
    found = load_file(tmp_path / "plain.safetensors")
    for name, moe in moe_layers(model).items():
        for key, values in moe.experts.values_by_parameter():
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert torch.equal(found[f"{name}.{key}"], torch.stack(values).to(wide).mean(0).to(dtype))


def test_tensors_larger_than_a_piece_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 4 * 4096)
    model = nn.Sequential(randomised(nn.Sequential(nn.Linear(70, 130), nn.Linear(130, 70))))
    separated(ewa.expand(model, 4, select=["0"]))
    ewa.collapse_checkpoint(save(model, tmp_path / "expanded.safetensors"), tmp_path / "plain.safetensors")
    check_same(load_file(tmp_path / "plain.safetensors"), model)


def test_the_writer_makes_the_bytes_that_safetensors_makes(tmp_path):
    model = expanded()
    ewa.collapse_checkpoint(save(model, tmp_path / "expanded.safetensors"), tmp_path / "plain.safetensors")
    save_file(ewa.dense_state_dict(model), tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("experts", ["stacked", "separate"])
@pytest.mark.parametrize("where", ["index", "keys"])
def test_shards_become_shards_or_one_file(tmp_path, experts, where):
    model = expanded(3, experts)
    folder = shard(
        model, tmp_path / "in", 4, ewa.expert_metadata(model) if where == "index" else {"by": "us"}
    )
    ewa.collapse_checkpoint(folder, tmp_path / "one.safetensors")
    check_same(load_file(tmp_path / "one.safetensors"), model)
    ewa.collapse_checkpoint(folder / "model.safetensors.index.json", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors.index.json", *files}
    found = {file: load_file(tmp_path / "out" / file) for file in files}
    check_same({key: found[file][key] for key, file in index["weight_map"].items()}, model)
    size = sum(value.nbytes for value in ewa.dense_state_dict(model).values())
    assert index["metadata"] == {"total_size": size} | ({} if where == "index" else {"by": "us"})


def test_buffers_are_taken_from_the_first_expert_as_collapse_does(tmp_path):
    for experts in ("stacked", "separate"):
        model = nn.Sequential(Counting())
        separated(ewa.expand(model, 2, select=["0"], experts=experts))
        for number, replica in enumerate(model[0].experts.ffns()):
            replica.scale.fill_(number + 1.0)
        source = save(model, tmp_path / f"{experts}.safetensors")
        ewa.collapse_checkpoint(source, tmp_path / f"plain-{experts}.safetensors")
        check_same(load_file(tmp_path / f"plain-{experts}.safetensors"), model)


def test_a_layer_that_is_registered_twice_is_collapsed_under_both_names(tmp_path):
    model = Net()
    model.blocks[1] = model.blocks[0]
    separated(ewa.expand(model, 2, select=["blocks.0.mlp"]))
    assert "blocks.1.mlp" in json.loads(ewa.expert_metadata(model)[streaming.EXPERTS])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "expanded.safetensors", ewa.expert_metadata(model))
    ewa.collapse_checkpoint(tmp_path / "expanded.safetensors", tmp_path / "plain.safetensors")
    check_same(load_file(tmp_path / "plain.safetensors"), model)


def test_a_runs_checkpoint_is_collapsed_without_the_training_extra(tmp_path, capsys):
    run = train(
        Recipe(
            model="vit_tiny_patch16_224",
            model_kwargs="patch_size=7,embed_dim=16,depth=2,num_heads=2",
            limit=64, batch_size=32, epochs=1, output=str(tmp_path), name="run",
        )
    ).run  # fmt: skip
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["safetensors", "timm", "numpy", "accelerate", "torchvision", "yaml"]))
import ewavit as ewa
ewa.collapse_checkpoint({str(run / "checkpoint")!r}, {str(tmp_path / "bare.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    found, card = load_model(tmp_path / "bare.safetensors")
    images = torch.randn(2, 1, 28, 28)
    assert torch.allclose(found(images), load_model(run)[0](images), atol=1e-6)
    assert card.data == "fashion-mnist-mini"

    source = run / "checkpoint" / "model.safetensors"
    assert main(["export", str(source), "--to", str(tmp_path / "cli.safetensors")]) == 0
    assert "nothing was run" in capsys.readouterr().out
    assert (tmp_path / "cli.safetensors").read_bytes() == (tmp_path / "bare.safetensors").read_bytes()
    assert main(["evaluate", str(source)]) == 2
    assert "holds experts" in capsys.readouterr().err


def test_a_mixture_of_more_experts_than_fit_a_page_each_is_collapsed(tmp_path):
    generator = torch.Generator().manual_seed(0)
    stacks = {"a.experts.ffn.w": torch.randn(1500, 9, 9, generator=generator)}
    stacks["a.experts.ffn.b"] = torch.randn(1500, 1100, generator=generator)
    save_file(stacks, tmp_path / "in.safetensors")
    ewa.collapse_checkpoint(tmp_path / "in.safetensors", tmp_path / "plain.safetensors")
    found = load_file(tmp_path / "plain.safetensors")
    assert torch.equal(found["a.w"], stacks["a.experts.ffn.w"].mean(0))
    assert torch.equal(found["a.b"], stacks["a.experts.ffn.b"].mean(0))


@pytest.mark.parametrize("dtype", [kind for kind in ITEM_BITS if kind not in streaming.FLOATS])
def test_every_type_of_the_format_is_copied_and_no_other_is_averaged(tmp_path, dtype):
    entries = {"a.experts.ffn.w": ("F32", [2, 2, 2]), "kept": (dtype, [4, 2])}
    data = written(tmp_path / "in.safetensors", entries)
    ewa.collapse_checkpoint(tmp_path / "in.safetensors", tmp_path / "plain.safetensors")
    found = dict(deserialize((tmp_path / "plain.safetensors").read_bytes()))
    assert (found["kept"]["dtype"], found["kept"]["shape"]) == (dtype, [4, 2])
    assert bytes(found["kept"]["data"]) == data["kept"]
    written(tmp_path / "in.safetensors", {"a.experts.ffn.w": (dtype, [2, 2, 8])}, said(parameters=["w"]))
    (tmp_path / "plain.safetensors").unlink()
    refused(tmp_path / "in.safetensors", tmp_path / "plain.safetensors", f"experts of type {dtype}")


def test_a_users_own_files_of_similar_names_stay(tmp_path):
    source = save(expanded(), tmp_path / "in.safetensors")
    own = [tmp_path / f"plain.safetensors{end}" for end in (".partial", ".tmp", "~")]
    for file in own:
        file.write_text("mine")
    ewa.collapse_checkpoint(source, tmp_path / "plain.safetensors")
    assert [file.read_text() for file in own] == ["mine"] * 3
    assert len(list(tmp_path.iterdir())) == 5


def test_what_transformers_wants_beside_the_shards_comes_along(tmp_path, capsys):
    folder = shard(expanded(), tmp_path / "in")
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps({"name": name}))
    (folder / "folder.json").mkdir()
    (folder / "notes.txt").touch()
    assert main(["export", str(folder), "--to", str(tmp_path / "out")]) == 0
    assert sorted(file.name for file in (tmp_path / "out").glob("*.json")) == [
        "config.json", "model.safetensors.index.json", "preprocessor_config.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"name": "config.json"}
    assert not (tmp_path / "out" / "notes.txt").exists()


def test_shards_of_one_name_in_two_folders_stay_apart(tmp_path):
    model = expanded()
    folder = shard(model, tmp_path / "in", 2)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    places = {
        name: f"{letter}/same.safetensors"
        for letter, name in zip("ab", sorted(set(index["weight_map"].values())), strict=True)
    }
    for old, new in places.items():
        (folder / new).parent.mkdir()
        (folder / old).rename(folder / new)
    index["weight_map"] = {key: places[name] for key, name in index["weight_map"].items()}
    file.write_text(json.dumps(index))
    ewa.collapse_checkpoint(folder, tmp_path / "one.safetensors")
    check_same(load_file(tmp_path / "one.safetensors"), model)
    ewa.collapse_checkpoint(folder, tmp_path / "out")
    found = json.loads((tmp_path / "out" / file.name).read_text())["weight_map"]
    assert set(found.values()) == set(places.values())
    check_same({key: load_file(tmp_path / "out" / name)[key] for key, name in found.items()}, model)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak from")
def test_peak_memory_stays_far_below_the_largest_tensor(tmp_path):
    """256 MiB of one mixture's weights, collapsed in some 16 MiB."""
    code = """
import re, sys, torch, ewavit as ewa
def peak():  # unlike ru_maxrss not the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
torch.zeros(64, 4096).mean(0)
before = peak()
ewa.collapse_checkpoint(*sys.argv[1:])
print((peak() - before) / 1024)
"""
    big = torch.randn(8, 1024, 4096)
    save_file({"a.experts.ffn.weight": big, "b": torch.ones(3)}, tmp_path / "big.safetensors")
    files = [str(tmp_path / "big.safetensors"), str(tmp_path / "plain.safetensors")]
    said = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert 4 < float(said.stdout) < 32
    assert torch.equal(load_file(files[1])["a.weight"], big.mean(0))


# What is wrong gets one line, and nothing is left behind.


def refused(source, target, word):
    before = {path: path.stat().st_size for path in target.parent.rglob("*")}
    with pytest.raises(EwavitError, match=re.escape(word)) as caught:
        ewa.collapse_checkpoint(source, target)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_size for path in target.parent.rglob("*")} == before


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda data: data[:-4], "bytes"),
        (lambda data: data + b"\0\0\0\0", "bytes"),
        (lambda data: data[:100], "header"),
        (lambda data: b"", "header"),
        (lambda data: b"\xff" * 8 + data[8:], "header"),
        (lambda data: data[:8] + b"x" * 40 + data[48:], "cannot be read as safetensors"),
        (lambda data: data[:8] + b"[1" + b",1" * 3 + b"]" + data[17:], "cannot be read as safetensors"),
        (lambda data: data.replace(b'"F32"', b'"F64"', 1), "of shape"),
        (lambda data: data.replace(b"data_offsets", b"data_offsetz", 1), "no 'data_offsets'"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, word):
    file = save(expanded(), tmp_path / "expanded.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    refused(file, tmp_path / "plain.safetensors", word)


def test_overlapping_tensors_are_refused(tmp_path):
    entry = '"%s":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = ("{" + ",".join(entry % key for key in "ab") + "}").encode()
    file = tmp_path / "expanded.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(file, tmp_path / "plain.safetensors", "overlap")


def test_missing_and_wrong_shards_are_named(tmp_path):
    folder = shard(expanded(), tmp_path / "in")
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    index.write_text(
        json.dumps({"weight_map": {**whole["weight_map"], "more": "model-00001-of-00003.safetensors"}})
    )
    refused(folder, tmp_path / "out", "lacks more")
    index.write_text(json.dumps(whole))
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, tmp_path / "out", "model-00002-of-00003.safetensors, but it is missing")
    index.write_text("{}")
    refused(folder, tmp_path / "out", "no 'weight_map'")
    refused(tmp_path / "nothing", tmp_path / "out", "no file")


def test_what_is_not_expanded_or_not_whole_is_refused(tmp_path):
    file, target = tmp_path / "in.safetensors", tmp_path / "plain.safetensors"
    save_file(Net().state_dict(), file)
    refused(file, target, "already a plain model")
    model = expanded(2)
    state = dict(model.state_dict())
    del state["blocks.0.mlp.experts.ffn.fc1.bias"]
    save_file(state, file, ewa.expert_metadata(model))
    refused(file, target, "0 tensors for blocks.0.mlp.fc1.bias")
    state = dict(model.state_dict()) | {"blocks.0.mlp.experts.ffn.fc1.bias": torch.zeros(3, 12)}
    save_file(state, file, ewa.expert_metadata(model))
    refused(file, target, "not 2 experts stacked")
    save_file(state, file)
    refused(file, target, "expert_metadata(model)")
    state = dict(model.state_dict()) | {"blocks.0.mlp.dispatcher.weight": torch.zeros(3)}
    save_file(state, file, ewa.expert_metadata(model))
    refused(file, target, "is a routed mixture (blocks.0.mlp.dispatcher.weight)")
    square = {"a.experts.ffn.weight": torch.zeros(3, 3), "a.experts.ffn.bias": torch.zeros(3)}  # no stack
    for bare in (square, {key: square[key] for key in list(square)[:1]}):
        save_file(bare, file)
        refused(file, target, "does not say which tensors of a are experts")
    save_file(model.state_dict(), file, {streaming.EXPERTS: "{"})
    refused(file, target, "has unknown metadata about experts")


def test_a_wrong_target_is_refused(tmp_path):
    file = save(expanded(), tmp_path / "expanded.safetensors")
    refused(file, file, "is the source")
    refused(file, tmp_path / "folder", "choose FILE.safetensors")
    refused(file, tmp_path / "plain.pt", "choose FILE.safetensors")
    refused(file, tmp_path / "none" / "plain.safetensors", "no folder")
    folder = shard(expanded(), tmp_path / "in")
    refused(folder, folder, "there already")


def written(file, entries, metadata=None):
    """Write a file with these types and shapes; returns the bytes of each tensor."""
    header, data = {} if metadata is None else {"__metadata__": {streaming.EXPERTS: metadata}}, b""
    for key, (dtype, shape) in entries.items():
        size = math.prod(shape) * ITEM_BITS[dtype] // 8
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += bytes(number % 251 for number in range(size))
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    offsets = {key: header[key]["data_offsets"] for key in entries}
    return {key: data[begin:end] for key, (begin, end) in offsets.items()}


def said(**changes):
    """Metadata about the experts of `a`."""
    entry = {"num_experts": 2, "experts": "stacked", "parameters": ["w", "b"], **changes}
    return json.dumps({"a": entry})


@pytest.mark.parametrize(
    ("metadata", "word"),
    [
        (said(num_experts=0), "num_experts of a is 0, not 1 to 8,192"),
        (said(num_experts=-2), "num_experts of a is -2"),
        (said(num_experts=10**8), "num_experts of a is 100000000"),
        (said(num_experts=2.0), "num_experts of a is 2.0"),
        (said(num_experts="2"), "num_experts of a is"),
        (said(num_experts=True), "num_experts of a is True"),
        (said(num_experts=1), "is not 1 experts stacked"),
        (said(num_experts=1025), "is not 1025 experts stacked"),
        (said(parameters="wb"), "parameters of a is wb, not a list of names"),
        (said(parameters=[]), "parameters of a is []"),
        (said(parameters=["w", 3]), "parameters of a is"),
        (said(parameters={"w": 1}), "parameters of a is"),
        (said(parameters=["w", "b", "c"]), "0 tensors for a.c"),
        (said(experts="separate"), "does not belong to 2 separate experts"),
        (said(experts="none"), "experts of a is none, not stacked or separate"),
        (json.dumps({"b": json.loads(said())["a"]}), "0 tensors for b."),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": {}, "a": {}}', "a key is there twice"),
        ('{"\\ud800": {}}', "surrogates not allowed"),
        ('{"a": NaN}', "NaN is no JSON"),
        ("[]", "its parts are of other types"),
        ("3", "its parts are of other types"),
    ],
)  # fmt: skip
def test_metadata_about_experts_are_checked(tmp_path, metadata, word):
    entries = {"a.experts.ffn.w": ("F32", [2, 3, 3]), "a.experts.ffn.b": ("F32", [2, 3])}
    written(tmp_path / "in.safetensors", entries, said())
    ewa.collapse_checkpoint(tmp_path / "in.safetensors", tmp_path / "right.safetensors")
    written(tmp_path / "in.safetensors", entries, metadata)
    refused(tmp_path / "in.safetensors", tmp_path / "plain.safetensors", word)


def test_copies_that_are_no_experts_are_refused(tmp_path):
    for names in (("0", "7"), ("0", "00"), ("0", "\u0661"), ("0", "9" * 500)):
        entries = {f"a.experts.copies.{name}.w": ("F32", [3]) for name in names}
        written(tmp_path / "in.safetensors", entries, said(experts="separate", parameters=["w"]))
        refused(tmp_path / "in.safetensors", tmp_path / "plain.safetensors", "a.experts.copies.")


@pytest.mark.parametrize(
    ("header", "word"),
    [
        ('{"a":' * 100_000, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ('{"\\ud800":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}', "surrogates not allowed"),
        ('{"__metadata__":{"a":"\\udc00"}}', "surrogates not allowed"),
        ('{"__metadata__":{"a":3}}', "metadata that are not text"),
        ('{"a":{"dtype":"Q8","shape":[8],"data_offsets":[0,8]}}', "a has the unknown type Q8"),
        ('{"a":{"dtype":"F4","shape":[15],"data_offsets":[0,8]}}', "of shape (15,) and type F4"),
        ('{"a":{"dtype":["U8"],"shape":[8],"data_offsets":[0,8]}}', "other types"),
        ('{"a":{"dtype":"U8","shape":[true,8],"data_offsets":[0,8]}}', "the size True"),
        ('{"a":{"dtype":"U8","shape":[8.0],"data_offsets":[0,8]}}', "the size 8.0"),
        ('{"a":{"dtype":"U8","shape":[-8],"data_offsets":[0,8]}}', "the size -8"),
        ('{"a":{"dtype":"U8","shape":[[1],9999999999],"data_offsets":[0,8]}}', "the size [1]"),
        ('{"a":{"dtype":"U8","shape":"8","data_offsets":[0,8]}}', "the size 8"),
        ('{"a":{"dtype":"U8","shape":[8],"data_offsets":"08"}}', "the size 0"),
        ('{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8,9]}}', "too many values"),
        ('{"a":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}}', "leave gaps"),
        ('{"a":{"dtype":"U8","shape":[8],"data_offsets":[8,0]}}', "in bytes 8 to 0"),
        ('{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}', "bytes"),
        ('{"a":{"dtype":"U8","shape":[18446744073709551624],"data_offsets":[0,8]}}', "the size 1844"),
        ('{"a":{"dtype":"F64","shape":[4294967296,4294967297],"data_offsets":[0,8]}}', "too large"),
        ('{"a":{"dtype":"U8","shape":[9223372036854775807,3,0],"data_offsets":[0,0]}}', "too large"),
        ('{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"a":{}}', "a key is there twice"),
        ('{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,Infinity]}}', "Infinity is no JSON"),
        (
            '{"%s":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}' % ("a" * 2000),
            "a key of 2,000 characters",
        ),
        ('{"\\u001b[2J":{"dtype":"Q8","shape":[8],"data_offsets":[0,8]}}', "'\\x1b[2J' has the unknown type"),
        ('{"a":8}', "other types"),
    ],
    ids=lambda text: text[:60],
)  # fmt: skip
def test_a_header_is_checked_before_anything_is_made_of_it(tmp_path, header, word):
    text = header.encode()
    data = len(text).to_bytes(8, "little") + text + bytes(8)
    (tmp_path / "in.safetensors").write_bytes(data)
    refused(tmp_path / "in.safetensors", tmp_path / "plain.safetensors", word)


def test_a_header_that_is_too_long_is_not_read(tmp_path):
    file = tmp_path / "in.safetensors"
    with file.open("wb") as handle:
        handle.write((2**30).to_bytes(8, "little"))
        handle.truncate(2**31)  # without blocks on the disk
    refused(file, tmp_path / "plain.safetensors", "a header of 1,073,741,824 bytes")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"b": "../b.safetensors"}, "'../b.safetensors', which is not a file in its folder"),
        ({"b": "a/../../b.safetensors"}, "not a file in its folder"),
        ({"b": "/etc/passwd"}, "'/etc/passwd', which is not a file in its folder"),
        ({"b": ""}, "not a file in its folder"),
        ({"b": "b\0.safetensors"}, "not a file in its folder"),
        ({"b": "b" * 5000}, "but it is missing"),
        ({"b": 3}, "other types"),
        ({"b": ["b.safetensors"]}, "other types"),
        ({"b": "\ud800"}, "surrogates not allowed"),
        ([], "other types"),
        ("text", "other types"),
    ],
    ids=repr,
)
def test_an_index_names_files_of_its_own_folder_only(tmp_path, change, word):
    folder = shard(expanded(), tmp_path / "in")
    written(tmp_path / "b.safetensors", {"b": ("U8", [8])})
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = {**index["weight_map"], **change} if isinstance(change, dict) else change
    file.write_text(json.dumps(index))
    refused(folder, tmp_path / "out", word)
    with pytest.raises(EwavitError, match=re.escape(word)):
        read_weights(file)


# One oracle for all headers: the safetensors library.

NUMBERS = st.one_of(
    st.integers(0, 8), st.sampled_from([-1, 2**31, 2**62, 2**63, 2**64, 1.0, True, None, "4", [1]])
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*ITEM_BITS, "Q8", "f32", None, 3]),
        "shape": st.one_of(st.lists(NUMBERS, max_size=3), NUMBERS),
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
    }
)
KEYS = st.one_of(
    st.sampled_from(["a", "m.experts.ffn.w", "m.experts.ffn.b", *(f"m.experts.copies.{n}.w" for n in "01")]),
    st.text(max_size=4),
)


@st.composite
def files(draw):
    """A safetensors file, mostly with one thing wrong."""
    header, end = {}, 0
    for key in draw(st.lists(KEYS, max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from(list(ITEM_BITS))), draw(st.lists(st.integers(0, 4), max_size=3))
        size = math.prod(shape) * ITEM_BITS[dtype] // 8
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    if draw(st.booleans()):
        texts = st.dictionaries(st.text(max_size=3), st.one_of(st.text(max_size=3), NUMBERS), max_size=2)
        header["__metadata__"] = draw(st.one_of(texts, NUMBERS))
    if header and draw(st.booleans()):
        header[draw(st.sampled_from(list(header)))] = draw(st.one_of(ENTRY, NUMBERS))
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    data = bytearray(len(text).to_bytes(8, "little") + text)
    data += bytes(max(0, end + draw(st.sampled_from([0, 0, 0, 1, -1]))))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(files())
def test_a_header_is_read_as_the_library_reads_it(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    file, target = folder / "in.safetensors", folder / "plain.safetensors"
    file.write_bytes(data)
    try:
        theirs = dict(deserialize(data))
    except SafetensorError:
        theirs = None
    if theirs is None:
        with pytest.raises(EwavitError):
            read_header(file)
        return
    mine, _ = read_header(file)
    assert {key: (each.dtype, list(each.shape)) for key, each in mine.items()} == {
        key: (each["dtype"], each["shape"]) for key, each in theirs.items()
    }
    for key, each in mine.items():
        assert data[each.begin : each.begin + each.size] == bytes(theirs[key]["data"])
    with suppress(EwavitError):
        ewa.collapse_checkpoint(file, target)
        deserialize(target.read_bytes())


@pytest.mark.parametrize("target", ["plain.safetensors", "out"])
def test_a_full_disk_leaves_nothing(tmp_path, target):
    """A limit on the size of files makes writing fail in the middle, as a full disk does."""
    folder = shard(expanded(), tmp_path / "in")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
    try:
        refused(folder, tmp_path / target, "could not be written (File too large)")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
