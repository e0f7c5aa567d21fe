"""Checkpoints are whole or absent, and the one before is there when the last is damaged."""

import errno
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from ewavit import EwavitError
from ewavit.training import checkpoint as room
from ewavit.training.checkpoint import load_checkpoint, save_checkpoint, save_tensors
from ewavit.training.seal import sealed
from runs import facts

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
plain |= st.sampled_from([torch.float32, torch.bfloat16, torch.int64])
leaf = plain | st.lists(st.floats(width=32, allow_nan=False), min_size=1).map(torch.tensor)
trees = st.recursive(
    leaf,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.integers(), inner)
        | st.dictionaries(st.text(), inner)
    ),
    max_leaves=12,
)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        same = type(one) is type(other) and len(one) == len(other)
        return same and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and one == other


@given(trees)
def test_training_state_survives_the_trip_through_json_and_tensors(tree):
    tensors = {}
    skeleton = json.loads(json.dumps(room._split(tree, "key", tensors)))
    assert equal(room._join(skeleton, tensors), tree)


def save(run, number):
    weight, step = torch.full((3,), float(number)), torch.tensor(number)
    save_checkpoint(run, {"weight": weight}, {"step": step}, facts(number))


def epoch(checkpoint):
    return checkpoint.facts["progress"]["epoch"]


def test_a_new_checkpoint_replaces_the_old_and_keeps_it_as_previous(tmp_path):
    for number in (1, 2, 3):
        save(tmp_path, number)
    assert epoch(load_checkpoint(tmp_path)) == 3
    assert epoch(load_checkpoint(tmp_path / "checkpoint-previous")) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "checkpoint-previous"]


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_checkpoint_is_passed_over_and_said(tmp_path, file, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damaged = tmp_path / "checkpoint" / file
    if damage == "missing":
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[:-5])
    found = load_checkpoint(tmp_path)
    assert epoch(found) == 1
    assert torch.equal(found.model["weight"], torch.ones(3))
    assert "checkpoint-previous instead" in found.warning


def test_no_whole_checkpoint_is_an_error(tmp_path):
    with pytest.raises(EwavitError, match="no checkpoint in"):
        load_checkpoint(tmp_path)
    save(tmp_path, 1)
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"")
    with pytest.raises(EwavitError, match="no whole checkpoint is left"):
        load_checkpoint(tmp_path)


def test_full_disk_keeps_the_last_checkpoint_and_leaves_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(tensor):  # the header is written then
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(room, "_bytes", full)
    with pytest.raises(EwavitError, match="No space left on device"):
        save(tmp_path, 2)
    assert epoch(load_checkpoint(tmp_path)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_crash_between_the_renames_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    original = room.os.replace

    def crash(source, target):
        if target == tmp_path / "checkpoint":
            raise KeyboardInterrupt
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(room.os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert epoch(load_checkpoint(tmp_path)) == 1
    save(tmp_path, 3)
    assert epoch(load_checkpoint(tmp_path)) == 3


def test_tied_and_sliced_tensors_are_written_whole(tmp_path):
    base = torch.arange(6.0)
    save_tensors(
        {"a": base, "b": base, "slice": base[2:4], "turned": base.view(2, 3).t()}, tmp_path / "x.safetensors"
    )
    found = room.load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["b"], base)
    assert torch.equal(found["slice"], base[2:4])
    assert torch.equal(found["turned"], base.view(2, 3).t())


def test_who_may_read_other_files_may_read_weights(tmp_path):
    (tmp_path / "other").touch()
    save_tensors({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_the_models_file_says_what_it_holds_and_the_other_does_not(tmp_path):
    save_checkpoint(tmp_path, {"w": torch.ones(2)}, {"x": torch.ones(1)}, facts(), {"card": "of a model"})
    found = []
    for name in ("model", "training"):
        with safe_open(tmp_path / "checkpoint" / f"{name}.safetensors", "pt") as handle:
            found.append(handle.metadata())
    assert found == [{"card": "of a model", "format": "pt"}, {"format": "pt"}]


def test_tensors_of_mixed_types_are_aligned_in_their_file(tmp_path):
    dtypes = (torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.bool)
    tensors = {f"{number}": torch.ones(3, dtype=dtype) for number, dtype in enumerate(dtypes)}
    save_tensors(tensors, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0
    save_tensors(dict(reversed(tensors.items())), tmp_path / "y.safetensors")
    assert (tmp_path / "y.safetensors").read_bytes() == content


def test_a_disk_that_fails_is_named_with_its_place(tmp_path, monkeypatch):
    def failing(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(room, "sync", failing)
    with pytest.raises(EwavitError, match=re.escape(str(tmp_path / "checkpoint-new"))):
        save_checkpoint(tmp_path, {"w": torch.ones(2)}, {}, facts())


def test_files_reach_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    save(tmp_path, 1)
    done = []
    for module, name in ((room, "sync"), (room.os, "replace"), (room, "sync_names")):
        original = getattr(module, name)

        def noted(*paths, name=name, original=original):
            done.append((name, *(Path(path).name for path in paths)))
            original(*paths)

        monkeypatch.setattr(module, name, noted)
    save(tmp_path, 2)
    assert done[-4:] == [
        ("sync", "checkpoint-new"),
        ("replace", "checkpoint", "checkpoint-previous"),
        ("replace", "checkpoint-new", "checkpoint"),
        ("sync_names", tmp_path.name),
    ]


def test_what_a_killed_save_left_behind_is_no_part_of_the_next_checkpoint(tmp_path):
    run = tmp_path / "new" / "run"
    (run / "checkpoint-new").mkdir(parents=True)
    (run / "checkpoint-new" / "half.safetensors").touch()
    save(run, 1)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint"]
    assert sorted(path.name for path in (run / "checkpoint").iterdir()) == [
        "model.safetensors", "state.json", "training.safetensors",
    ]  # fmt: skip
    save(tmp_path / "not" / "there", 1)
    assert epoch(load_checkpoint(tmp_path / "not" / "there")) == 1


# What a run does not write


def progress(**changes):
    return {"progress": {**facts()["progress"], **changes}}


ROW = {"epoch": 0, "eval_loss": 1.0, "eval_top1": 50.0}


@pytest.mark.parametrize(
    "change",
    [
        {"processes": 1},
        {"layers": ["blocks.1.mlp"]},
        progress(epoch=9),
        progress(update=2**53 - 1),
        progress(loss_sum=-3.5, lr=0, rows=[]),
        progress(pending={"epoch": 1}),
        progress(rows=[ROW, {**ROW, "lr": 0.5}]),
    ],
)
def test_facts_at_the_edge_of_what_a_run_writes_are_read(tmp_path, change):
    save_checkpoint(tmp_path, {}, {}, {**facts(), **change})
    assert load_checkpoint(tmp_path).facts == json.loads(json.dumps({**facts(), **change}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": "blocks.1.mlp"}, "layers are 'blocks.1.mlp'"),
        ({"layers": [1]}, "layers are [1]"),
        ({"processes": 0}, "processes is 0"),
        ({"processes": 1.0}, "processes is 1.0"),
        ({"processes": True}, "processes is True"),
        (progress(epoch=10), "epoch is 10 of 9"),
        (progress(epoch=-1), "epoch is -1"),
        (progress(batch=2.5), "batch is 2.5"),
        (progress(update=True), "update is True"),
        (progress(update=2**53), "update is 9007199254740992"),
        (progress(seconds="3"), "seconds is '3'"),
        (progress(lr=math.nan), "lr is nan"),
        (progress(loss_sum=-math.inf), "loss_sum is -inf"),
        (progress(other=1), "progress has other fields"),
        (progress(rows={}), "progress has other fields"),
        (progress(rows=[{"epoch": 0, "eval_loss": 1.0}]), "a row of progress has no eval_top1"),
        (progress(rows=[{**ROW, "lr": "0.5"}]), "lr in a row of progress is '0.5'"),
        (progress(pending={"eval_loss": 1.0}), "a row of progress has no epoch"),
    ],
)
def test_facts_that_no_run_writes_are_damage_and_named(tmp_path, change, said):
    save_checkpoint(tmp_path, {}, {}, {**facts(), **change})
    with pytest.raises(EwavitError, match=re.escape(f"{tmp_path / 'checkpoint'} is damaged ({said})")):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 3}, "format 3, this version reads 1 and 2"),
        ({"digests": {}}, "state.json lists other files"),
        ({"training": {"dtype": "nn"}}, "nn is no dtype"),
        ({"training": {"set": []}}, "unknown kind set in the training state"),
        ({"training": {"tensor": "lost"}}, "no 'lost'"),
    ],
)
def test_a_state_of_another_form_is_damage_and_named(tmp_path, change, said):
    save(tmp_path, 1)
    file = tmp_path / "checkpoint" / "state.json"
    state = json.loads(file.read_text())
    del state["digest"]
    file.write_text(sealed(state | change))
    with pytest.raises(EwavitError, match=re.escape(f"is damaged ({said})")):
        load_checkpoint(tmp_path)


def test_weights_that_are_not_finite_are_damage_and_named(tmp_path):
    tensors = {"first": torch.ones(2), "second": torch.tensor([1.0, math.nan])}
    save_checkpoint(tmp_path, tensors, {}, facts())
    with pytest.raises(EwavitError, match=r"second in model\.safetensors is not finite"):
        load_checkpoint(tmp_path)


def test_a_file_of_another_size_is_damage_where_there_are_no_digests(tmp_path):
    old = Path(__file__).parent / "released" / "0.1.0" / "stopped"
    run = Path(shutil.copytree(old, tmp_path / "run"))
    newest, before = run / "checkpoint", run / "checkpoint-previous"
    assert load_checkpoint(run).warning == (
        f"{newest} is of version 0.1.0 and has no digests: damage within its files is not seen"
    )
    weights = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(weights + b" ")
    sizes = f"state.json: model.safetensors has {len(weights) + 1:,} of {len(weights):,} bytes"
    assert load_checkpoint(run).warning == (
        f"{newest} is damaged ({sizes}): used {before} instead; "
        f"{before} is of version 0.1.0 and has no digests: damage within its files is not seen"
    )
