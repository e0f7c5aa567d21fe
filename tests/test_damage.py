"""Damage to a run is named and passed over, two starts of a run exclude each other, equal runs are equal."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

import ewavit
from ewavit import EwavitError
from ewavit.files import locked, replacing
from ewavit.training import checkpoint as room
from ewavit.training.checkpoint import load_checkpoint, save_tensors
from ewavit.training.loop import resume, train
from ewavit.training.run_folder import RunFolder
from ewavit.training.seal import sealed
from runs import raise_after, recipe

SMALLEST = {"model_kwargs": "patch_size=14,embed_dim=8,depth=2,num_heads=1", "limit": 64, "model_ema": True}
OLD = Path(__file__).parent / "released" / "0.1.0"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(recipe(tmp_path_factory.mktemp("runs"), "run", **SMALLEST)).run


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


# Damaged files


def flip(at):
    def damage(file):
        content = bytearray(file.read_bytes())
        content[int(at * (len(content) - 1))] ^= 1
        file.write_bytes(content)

    return damage


def put_folder(file):
    file.unlink()
    file.mkdir()


def put_pipe(file):
    file.unlink()
    os.mkfifo(file)


DAMAGES = {
    "first byte": flip(0),
    "header": flip(0.01),
    "middle": flip(0.5),
    "last byte": flip(1),
    "one byte less": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "one byte more": lambda file: file.write_bytes(file.read_bytes() + b" "),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "missing": Path.unlink,
    "a folder": put_folder,
    "a pipe": put_pipe,
}


FILES = ("model.safetensors", "training.safetensors", "state.json")
HARMLESS = ("state.json", "one byte more")  # a space behind JSON


@pytest.mark.parametrize(
    ("name", "damage"), [(name, kind) for name in FILES for kind in DAMAGES if (name, kind) != HARMLESS]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, name, damage):
    DAMAGES[damage](run / "checkpoint" / name)
    found = load_checkpoint(run)
    assert found.path == run / "checkpoint-previous"
    assert found.warning.startswith(f"{run / 'checkpoint'} is damaged (")
    assert found.warning.endswith(f"used {found.path} instead")
    assert len(found.warning.splitlines()) == 1


@pytest.mark.parametrize(
    "names", [["state.json"], ["model.safetensors"], ["training.safetensors", "state.json"]]
)
def test_a_set_mixed_of_two_checkpoints_is_damage(run, names):
    for name in names:
        shutil.copy(run / "checkpoint-previous" / name, run / "checkpoint" / name)
    assert "differs from its digest" in load_checkpoint(run).warning


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_to_the_same_end(run, finished, capsys):
    flip(0.7)(run / "checkpoint" / "model.safetensors")
    (run / "model.safetensors").unlink()
    resume(run)
    assert (
        "checkpoint is damaged (model.safetensors differs from its digest in state.json)"
        in capsys.readouterr().out
    )
    assert (run / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert (run / "checkpoint-damaged").is_dir()


@pytest.mark.parametrize("damage", [kind for kind in DAMAGES if kind != "missing"])  # else it is unfinished
def test_a_damaged_model_is_named_and_the_checkpoint_is_used(run, finished, damage):
    DAMAGES[damage](run / "model.safetensors")
    with pytest.warns(UserWarning, match=r"model.safetensors is damaged \(.*used the run's checkpoint"):
        found = ewavit.load(run).state_dict()
    for key, tensor in ewavit.load(finished).state_dict().items():
        assert torch.equal(tensor, found[key]), key


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model-average.safetensors", "predictions.csv", "summary.csv", "digests.json"],
)
def test_the_damaged_files_of_a_finished_run_are_written_again(run, finished, name, capsys):
    assert RunFolder(run).damage() is None
    with pytest.raises(EwavitError, match="nothing to resume"):
        resume(run)
    flip(0.6)(run / name)
    assert name in RunFolder(run).damage()
    resume(run)
    assert f"{run} is damaged ({name}" in capsys.readouterr().out
    assert RunFolder(run).damage() is None
    if name.startswith("model"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()


# Valid JSON with wrong content. Version 0.1.0 has no digests, so the content itself is checked.

WRONG = (None, True, -1, 10**40, 1.5, "text", [], {}, [[]])


def places(tree, path=()):
    """The paths of all values, of long lists the first two."""
    yield path
    items = (
        tree.items()
        if isinstance(tree, dict)
        else list(enumerate(tree))[:2]
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


def edited(tree, path, value):
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = edited(tree[path[0]], path[1:], value)
    return copy


def without(tree, path):
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = without(tree[path[0]], path[1:])
    return copy


@contextmanager
def suppress_error(said):
    """Collect the message of an `EwavitError`; any other exception fails the test."""
    try:
        yield
    except EwavitError as problem:
        said.append(str(problem))


@pytest.mark.parametrize("seal", [False, True], ids=["0.1.0", "digests"])
def test_wrong_content_of_a_state_is_no_traceback(run, tmp_path, seal):
    folder = run / "checkpoint"
    if not seal:
        folder = Path(shutil.copytree(OLD / "stopped" / "checkpoint", tmp_path / "old"))
    file = folder / "state.json"
    state = json.loads(file.read_text())
    state.pop("digest", None)
    changes = [(path, value) for path in places(state) for value in WRONG][::4]
    changed = [edited(state, path, value) for path, value in changes]
    changed += [without(state, path) for path in places(state) if path]
    said = []
    for change in changed:
        file.write_text(sealed(change) if seal and isinstance(change, dict) else json.dumps(change))
        with suppress_error(said):
            load_checkpoint(folder)
    assert len(said) > 250
    assert all(len(message.splitlines()) == 1 for message in said)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("facts", "progress", "epoch"), -1),
        (("facts", "progress", "epoch"), 99),
        (("facts", "progress", "batch"), "2"),
        (("facts", "progress", "update"), 10**40),
        (("facts", "progress", "lr"), None),
        (("facts", "progress", "rows"), [{"epoch": 0}]),
        (("facts", "progress"), []),
        (("facts", "recipe", "lr"), -1.0),
        (("facts", "recipe", "epochs"), "many"),
        (("facts", "layers"), "blocks.1.mlp"),
        (("facts", "processes"), -1),
        (("facts",), None),
        (("sizes",), {}),
        (("training",), {"dict": 1}),
        (("training",), {"other": []}),
    ],
)
def test_wrong_content_is_damage(tmp_path, path, value):
    run = Path(shutil.copytree(OLD / "stopped", tmp_path / "run"))
    file = run / "checkpoint" / "state.json"
    file.write_text(json.dumps(edited(json.loads(file.read_text()), path, value)))
    found = load_checkpoint(run)
    assert found.path == run / "checkpoint-previous"
    assert "checkpoint is damaged (" in found.warning


@pytest.mark.parametrize(
    "path",
    [("optimizer",), ("optimizer", "state"), ("averaging",), ("prediction",), ("average",), ("scaler",)],
)
@pytest.mark.parametrize("value", [None, 1, [], {}, {"parts": 3}])
def test_a_training_state_of_another_kind_is_named(tmp_path, path, value, monkeypatch):
    run = Path(shutil.copytree(OLD / "stopped", tmp_path / "run"))
    original = room._join

    def joined(node, tensors):
        tree = original(node, tensors)
        return edited(tree, path, value) if isinstance(tree, dict) and "optimizer" in tree else tree

    monkeypatch.setattr(room, "_join", joined)
    raise_after(monkeypatch, 7, KeyboardInterrupt())  # what is harmless goes on
    with pytest.raises((EwavitError, KeyboardInterrupt)) as caught:
        resume(run)
    if caught.type is not KeyboardInterrupt:
        assert str(caught.value).startswith(str(run / "checkpoint"))


def test_weights_that_are_not_finite_are_damage(run):
    file = run / "checkpoint" / "model.safetensors"
    tensors = load_file(file)
    tensors["norm.weight"][3] = float("nan")
    save_tensors(tensors, file)
    state = json.loads((run / "checkpoint" / "state.json").read_text())
    del state["digest"]
    state["digests"] = room.digests(file.parent, room.FILES)
    (file.parent / "state.json").write_text(sealed(state))
    assert "norm.weight in model.safetensors is not finite" in load_checkpoint(run).warning


# Two starts of one name

HOLDER = """
import sys
from contextlib import contextmanager
from pathlib import Path
from ewavit.training.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(run):
    command = [sys.executable, "-c", HOLDER, str(run)]
    environment = {**os.environ, "PYTHONPATH": str(Path(ewavit.__file__).parent.parent)}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_run_is_trained_by_one_process_at_a_time_and_a_kill_frees_it(run):
    (run / "model.safetensors").unlink()
    with holder(run) as process:
        message = rf"{run} is in use by process {process.pid} on .*: wait until it ends, or stop it"
        with pytest.raises(EwavitError, match=message):
            resume(run)
        process.kill()
    assert resume(run).model_file.exists()


def test_a_second_start_of_a_new_run_is_refused(tmp_path):
    with holder(tmp_path / "run") as process:
        with pytest.raises(EwavitError, match=f"{tmp_path / 'run'} is in use by process {process.pid} on"):
            train(recipe(tmp_path, "run", **SMALLEST))
        process.kill()
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_lock_is_free_after_its_block(tmp_path):
    with locked(tmp_path / "lock", "it"):
        pass
    process = holder(tmp_path)
    process.communicate("")
    assert process.returncode == 0


def test_a_run_with_only_the_checkpoint_before_is_a_run(run):
    shutil.rmtree(run / "checkpoint")
    (run / "model.safetensors").unlink()
    with pytest.raises(EwavitError, match="holds a run already"):
        train(recipe(run.parent, "run", **SMALLEST))
    assert resume(run).row["epoch"] == 1


@pytest.mark.parametrize("name", ["..", ".", "/tmp/x", "a/b", "../x", "a/", "a\0b", "a/..", ""])
def test_a_name_stays_inside_the_output_folder(tmp_path, name):
    with pytest.raises(EwavitError, match="--name"):
        recipe(tmp_path, name)


# Durability


def test_a_start_removes_what_a_killed_one_left_and_nothing_else(run):
    (run / "model.safetensors").unlink()
    ours = [
        ".model.safetensors.ewavit-partial",
        ".summary.csv.ewavit-partial",
        ".digests.json.ewavit-partial",
    ]
    mine = [".tmpAb12cd", "model.safetensors.partial", "notes.txt", ".mine.ewavit-partial"]
    for name in (*ours, *mine):
        (run / name).write_text("half")
    (run / "checkpoint-new").mkdir()
    resume(run)
    assert all((run / name).read_text() == "half" for name in mine)
    assert not any((run / name).exists() for name in (*ours, "checkpoint-new"))


@pytest.mark.parametrize("folder", [False, True])
def test_content_is_on_the_disk_before_it_takes_its_name_and_then_the_name(tmp_path, folder, monkeypatch):
    steps, fsync, rename = [], os.fsync, os.replace

    def record_fsync(descriptor):
        steps.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def record_rename(source, target):
        steps.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_rename)
    with replacing(tmp_path / "it") as partial:
        if folder:
            partial.mkdir()
        (partial / "inner" if folder else partial).write_text("content")
    written = [("sync", "inner")] if folder else []
    assert steps == [*written, ("sync", ".it.ewavit-partial"), ("rename", "it"), ("sync", tmp_path.name)]


# Equal runs are equal to the byte


def test_tensors_are_written_as_safetensors_writes_them(tmp_path):
    dtypes = [dtype for dtype in room.DTYPES if not dtype.is_complex]
    tensors = {f"{dtype}": torch.ones(3, 2).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "ключ": torch.arange(5).flip(0)[::2]}
    save_tensors(tensors, tmp_path / "x")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "x").read_bytes() == save(whole, {"format": "pt"})


def test_metadata_are_written_in_one_order(tmp_path):
    names = [str(number) for number in range(20)]
    for file, order in (("a", names), ("b", names[::-1])):
        save_tensors({"x": torch.ones(2)}, tmp_path / file, dict.fromkeys(order, "y"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def untimed(tree):
    """A state without what is measured: times, speeds and memory."""
    if isinstance(tree, dict):
        measured = ("seconds", "digest")
        return {
            key: untimed(value)
            for key, value in tree.items()
            if key not in measured and not key.endswith(("_per_second", "_mib"))
        }
    return [untimed(value) for value in tree] if isinstance(tree, list) else tree


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("settings", [{}, {"router": "topk", "model_ema": False}], ids=["ema", "router"])
def test_two_equal_runs_leave_equal_files(tmp_path, monkeypatch, threads, settings):
    torch.set_num_threads(threads)
    try:
        for part in ("one", "other"):
            (tmp_path / part).mkdir()
            monkeypatch.chdir(tmp_path / part)
            train(recipe("runs", "run", **{**SMALLEST, **settings, "output": "runs"}))
    finally:
        torch.set_num_threads(1)
    one, other = (tmp_path / part / "runs" / "run" for part in ("one", "other"))
    names = {file.relative_to(one) for file in one.rglob("*") if file.is_file()}
    assert names == {file.relative_to(other) for file in other.rglob("*") if file.is_file()}
    timed = {"state.json", "summary.csv", "digests.json", "curves.png", ".lock"}
    for name in names:
        if name.name not in timed:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
        if name.name == "state.json":
            first, second = (untimed(json.loads((folder / name).read_text())) for folder in (one, other))
            assert first == second
