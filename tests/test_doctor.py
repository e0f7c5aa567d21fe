"""`ewavit doctor`, `ewavit completion`, and where words go with `--quiet` and `--json`."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import timm
from safetensors.torch import save_file

import ewavit
from ewavit.cli import build_parser, doctor, main
from runs import TINY

SHORT = [
    word
    for key, value in {**TINY, "epochs": 1}.items()
    for word in (f"--{key.replace('_', '-')}", str(value))
]


def test_a_machine_that_trains_these_tests_is_well(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_FREE", 0)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert main(["doctor", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.endswith("all is well\n")
    assert "WRONG" not in said
    assert main(["doctor", "--json", "--output", str(tmp_path)]) == 0
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert {"python", "torch", "torchvision's operators", "threads", "devices"} <= set(found)
    assert all(check["fine"] for check in found.values())


BREAK = {
    "package": (lambda patch: patch.setattr(doctor, "_version", without_timm), "pip install"),
    "no threads": (
        lambda patch: patch.setenv("OMP_NUM_THREADS", "0"),
        "set OMP_NUM_THREADS to a number from 1",
    ),
    "threads": (lambda patch: patch.setenv("MKL_NUM_THREADS", "many"), "set MKL_NUM_THREADS"),
    "full": (lambda patch: patch.setattr("shutil.disk_usage", lambda _: Full()), "make room"),
    "read-only": (
        lambda patch: patch.setattr("tempfile.NamedTemporaryFile", unwritable),
        "choose another --output",
    ),
    "torchvision": (
        lambda patch: patch.setattr("torchvision.ops.nms", mismatched),
        "install torch and torchvision together",
    ),
}


@pytest.mark.parametrize("kind", BREAK)
def test_what_is_wrong_is_named_with_what_to_do(kind, monkeypatch, tmp_path, capsys):
    break_it, said = BREAK[kind]
    break_it(monkeypatch)
    assert main(["doctor", "--output", str(tmp_path / "runs")]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert any(said in line for line in wrong)


@pytest.mark.parametrize("folder", ["x" * 300, "a\nb"])
def test_an_odd_folder_is_one_line_and_no_end(folder, capsys):
    assert main(["doctor", "--json", "--output", folder]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["checks"][-2]["name"] == f"folder {folder}"


def without_timm(name):
    return None if name == "timm" else "1.0"


class Full:
    free = 1e9


def unwritable(**_):
    raise PermissionError(13, "Permission denied")


def mismatched(*_):
    raise RuntimeError("operator torchvision::nms does not exist")


@pytest.mark.parametrize(
    ("typed", "completed"), [("ewavit tr", "train"), ("ewavit train --share", "--share-rate")]
)
def test_bash_completes_commands_and_flags(typed, completed, capsys, tmp_path):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    words = typed.split()
    ask = (
        f"source {tmp_path}/script; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _shtab_ewavit; "
        'echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [completed]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    assert "share-rate" in capsys.readouterr().out


def test_quiet_training_prints_nothing_and_leaves_its_files(capfd, tmp_path):
    assert main(["train", *SHORT, "--quiet", "--output", str(tmp_path), "--name", "run"]) == 0
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "run" / "summary.csv").exists()


def test_json_is_alone_on_standard_output(capfd, tmp_path):
    assert main(["train", *SHORT, "--json", "--output", str(tmp_path), "--name", "run"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert found["model_file"] == str(tmp_path / "run" / "model.safetensors")
    assert 0 <= found["eval_top1"] <= 100
    assert "epoch 1/1" in err
    arms = ["--arms", "dense,ewa", "--seeds", "2", "--jobs", "2"]
    assert main(["compare", *SHORT, *arms, "--json", "--output", str(tmp_path), "--name", "two"]) == 0
    assert json.loads(capfd.readouterr().out)["reference"] == "dense"
    assert main(["compare", *SHORT, *arms, "--quiet", "--output", str(tmp_path), "--name", "two"]) == 0
    assert capfd.readouterr().out == ""


def test_quiet_lets_warnings_through(capsys, tmp_path):
    run = tmp_path / "run"
    assert main(["train", *SHORT, "--quiet", "--output", str(tmp_path), "--name", "run"]) == 0
    with (run / "predictions.csv").open("a") as handle:
        handle.write("0")
    assert main(["train", "--resume", str(run), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("warning: ")
    assert err.count("\n") == 1


def test_no_color_leaves_a_terminal_without_colours(tmp_path):
    script = "import pty, sys; pty.spawn([sys.executable, '-m', 'ewavit.cli', 'compare', *sys.argv[1:]])"
    words = [*SHORT, "--arms", "dense,ewa", "--seeds", "2", "--output", str(tmp_path), "--name", "x"]
    for value, coloured in (("1", False), ("", True)):
        environment = {**os.environ, "NO_COLOR": value, "TERM": "xterm-256color"}
        done = subprocess.run([sys.executable, "-c", script, *words], env=environment, capture_output=True)
        assert done.returncode == 0
        assert (b"\x1b[32m" in done.stdout) is coloured  # green


def test_every_command_with_a_result_prints_it_as_json_when_asked():
    (subparsers,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    without = {
        name for name, each in subparsers.choices.items() if "--json" not in each._option_string_actions
    }
    assert without == {"completion"}  # it prints a script


def test_export_prints_one_json_object_and_nothing_else(tmp_path, capfd):
    source, to = tmp_path / "experts.safetensors", tmp_path / "plain.safetensors"
    model = ewavit.expand(timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2), 2)
    save_file(model.state_dict(), source)
    assert main(["export", str(source), "--to", str(to), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said.keys() == {"to", "hub", "report"}
    assert said["to"] == str(to)
    assert said["report"].startswith("wrote ")
    assert main(["export", str(source), "--to", str(to), "--quiet"]) == 0
    assert capfd.readouterr().out == ""
