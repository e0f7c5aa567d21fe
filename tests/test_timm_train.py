"""timm's training script with averaged experts: exact to resume, and a plain checkpoint at the end."""

import argparse
import os
from pathlib import Path

import pytest
import timm
import torch
from timm.models import load_checkpoint

from ewavit.integrations.timm_train import main

SCRIPT = Path(__file__).parent / "timm_script.py"
EWA = ["--ewa", "--ewa-ramp-steps", "4"]


def saved(file):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, weights_only=True)


def run(folder, *words):
    folder.mkdir(exist_ok=True)
    assert main([str(SCRIPT), *EWA, "--output", str(folder), *words]) == 0


def test_a_plain_checkpoint_is_left_that_timm_loads(tmp_path, capsys):
    run(tmp_path / "run", "--teacher")
    said = capsys.readouterr().out
    assert "the plain model is" in said
    assert "experts in the teacher: False" in said
    assert any(".experts." in key for key in saved(tmp_path / "run/last.pth.tar")["state_dict"])
    for name in ("last", "model_best"):
        for ema in (False, True):
            model = timm.create_model("test_vit", num_classes=3, img_size=32)
            load_checkpoint(model, str(tmp_path / f"run/{name}-plain.pth.tar"), use_ema=ema, strict=True)
    plain = saved(tmp_path / "run/last-plain.pth.tar")
    assert "optimizer" not in plain
    assert plain["arch"] == "test_vit"
    assert not torch.equal(plain["state_dict"]["head.weight"], plain["state_dict_ema"]["head.weight"])


def test_a_resumed_training_is_exact(tmp_path):
    run(tmp_path / "whole", "--epochs", "3")
    run(tmp_path / "part", "--epochs", "3", "--stop", "1")
    run(tmp_path / "part", "--epochs", "3", "--resume", str(tmp_path / "part/last.pth.tar"))
    whole, resumed = (saved(tmp_path / name / "last.pth.tar") for name in ("whole", "part"))
    for state in ("state_dict", "state_dict_ema"):
        for key, value in whole[state].items():
            assert torch.equal(value, resumed[state][key]), key
    assert whole["optimizer"]["param_groups"][0]["ewavit_steps"] == 9


def test_without_ewa_the_script_runs_as_it_is(tmp_path):
    assert main([str(SCRIPT), "--output", str(tmp_path), "--epochs", "1"]) == 0
    assert not any("experts" in key for key in saved(tmp_path / "last.pth.tar")["state_dict"])
    assert not list(tmp_path.glob("*plain*"))
    assert timm.models.create_model is timm.create_model


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.py"], "missing.py is no file"),
        ([str(SCRIPT), "--ewa", "--ewa-share-rate", "3"], "share rate 3.0 is out of range"),
        ([str(SCRIPT), "--ewa", "--ewa-experts", "0"], "num_experts"),
        ([str(SCRIPT), "--ewa", "--ewa-select", "nothing"], "nothing"),
        ([str(SCRIPT), "--ewa", "--model", "resnet18"], "no FFN"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("ewavit: ")
    assert error.count("\n") == 1
    assert not os.listdir(tmp_path)
