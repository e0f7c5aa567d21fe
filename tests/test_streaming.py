"""Collapse from file to file: the same bits as in memory, little memory, and nothing half-written."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import ewavit as ewa
from ewavit import EwavitError
from ewavit.cli import main
from ewavit.core import checkpoint_files as streaming
from ewavit.core import moe_layers
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
