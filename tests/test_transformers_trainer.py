"""`EWACallback` in transformers' Trainer: exact to resume, a stock model at the end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTForImageClassification,
)

import ewavit as ewa
from ewavit.core import moe_layers
from ewavit.integrations.transformers import EWACallback
from hf_trainer import Images, trainer
from processes import in_processes
from steps import fresh_compiler


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"max_grad_norm": 0.1, "lr_scheduler_type": "cosine"},
    ],
    ids=["plain", "accumulation", "bf16", "checkpointing", "checkpointing without reentry", "clipping"],
)
def test_a_resumed_training_is_exact_over_all_tensors(tmp_path, settings):
    if "gradient_accumulation_steps" in settings:
        settings = {**settings, "save_steps": 2}
    every = settings.get("save_steps", 3)
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{every}"))
    last = f"checkpoint-{whole.state.max_steps}"
    assert_equal(weights(tmp_path / "whole" / last), weights(tmp_path / "resumed" / last))
    assert any(".experts." in name for name in weights(tmp_path / "whole" / last))
    assert_equal(whole.model.state_dict(), resumed.model.state_dict())


def test_after_training_the_model_is_stock_and_loads_without_a_missing_or_unexpected_key(tmp_path):
    run = trainer(tmp_path)
    assert moe_layers(run.model)
    run.train()
    assert not moe_layers(run.model)
    run.save_model(str(tmp_path / "final"))
    loaded, report = ViTForImageClassification.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    pixels = torch.stack([Images()[i]["pixel_values"] for i in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(pixels).logits, run.model.eval()(pixels).logits)


def test_the_best_model_is_that_of_its_checkpoint_collapsed(tmp_path):
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)
    seen = {}

    class Keep(EWACallback):
        def on_save(self, args, state, control, **kwargs):
            seen[state.global_step] = ewa.dense_state_dict(kwargs["model"])

    run = trainer(
        tmp_path, Keep(share_rate=0.1), eval_strategy="steps", eval_steps=3, load_best_model_at_end=True
    )
    run.train()
    best = int(run.state.best_model_checkpoint.rpartition("-")[2])
    assert_equal(run.model.state_dict(), seen[best])


def test_share_rate_and_spread_are_logged(tmp_path):
    run = trainer(tmp_path)
    run.train()
    rows = [row for row in run.state.log_history if "loss" in row]
    assert [row["ewa/share_rate"] for row in rows] == pytest.approx([0.1, 0.2, 0.3, 0.3])
    assert all(row["ewa/spread"] > 0 for row in rows)
    saved = json.loads((tmp_path / "checkpoint-8/trainer_state.json").read_text())
    assert saved["log_history"][0]["ewa/share_rate"] == pytest.approx(0.1)


def test_a_model_without_ffns_is_refused_when_the_trainer_is_made(tmp_path):
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ewa.EwavitError, match="no FFN"):
        Trainer(nn.Linear(3, 3), args, callbacks=[EWACallback()])


def check_sharding(folder):
    with pytest.raises(ewa.EwavitError, match="a sharded model cannot be: leave out fsdp"):
        trainer(folder, ddp_backend="gloo", fsdp=True)


def test_a_trainer_that_shards_the_model_is_refused_before_training(tmp_path):
    in_processes(2, check_sharding, tmp_path)


def check_two_processes(folder):
    run = trainer(folder, ddp_backend="gloo", save_strategy="epoch", per_device_train_batch_size=4)
    assert run.args.world_size == 2
    run.train()
    assert not moe_layers(run.model)
    for name, value in run.model.state_dict().items():
        values = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(values, value)
        assert torch.equal(*values), name
    run.save_model(str(folder / "final"))
    dist.barrier()
    report = ViTForImageClassification.from_pretrained(folder / "final", output_loading_info=True)[1]
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_two_processes_end_with_one_stock_model(tmp_path):
    in_processes(2, check_two_processes, tmp_path)


class Tracker(TrainerCallback):
    """A tracker that keeps what it sees, as those of `report_to` do."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append(dict(logs))


def test_trackers_see_the_logged_values_once_the_callback_is_first(tmp_path):
    run = trainer(tmp_path)
    tracker = Tracker()
    run.callback_handler.callbacks.insert(0, tracker)
    run.callback_handler.callbacks.sort(key=lambda each: not isinstance(each, EWACallback))
    run.train()
    assert [row["ewa/share_rate"] for row in tracker.rows if "loss" in row] == pytest.approx(
        [0.1, 0.2, 0.3, 0.3]
    )
    assert not moe_layers(run.model)


def test_push_to_hub_after_training_uploads_a_stock_model(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run", push_to_hub=False)
    run.train()
    pushed = tmp_path / "pushed"

    class Api:
        def upload_folder(self, repo_id, folder_path, **kwargs):
            shutil.copytree(folder_path, pushed, ignore=shutil.ignore_patterns("checkpoint-*"))

    monkeypatch.setattr(transformers.trainer, "hf_api", Api)
    run.hub_model_id = "me/vit"
    run.push_to_hub()
    loaded, report = ViTForImageClassification.from_pretrained(pushed, output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]
    assert_equal(loaded.state_dict(), run.model.state_dict())


def test_a_compiled_training_ends_with_a_stock_model_near_the_plain_one(tmp_path):
    settings = {"max_steps": 2, "torch_compile_backend": "aot_eager", "optim": "sgd"}
    runs = [trainer(tmp_path / str(on), torch_compile=on, **settings) for on in (False, True)]
    with fresh_compiler():
        for run in runs:
            for module in run.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0  # compiled code draws other masks
            run.train()
    for run in runs:
        assert not moe_layers(run.model)
        run.save_model()
        report = ViTForImageClassification.from_pretrained(run.args.output_dir, output_loading_info=True)[1]
        assert not report["missing_keys"] | report["unexpected_keys"]
    for name, value in runs[0].model.state_dict().items():
        torch.testing.assert_close(runs[1].model.state_dict()[name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_an_average_of_the_expanded_model_collapses_to_a_stock_model(tmp_path):
    run = trainer(tmp_path)
    averaged = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)

    class Average(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            averaged.update_parameters(kwargs["model"])

    run.add_callback(Average())
    run.train()
    assert moe_layers(averaged.module)
    pixels = torch.stack([Images()[index]["pixel_values"] for index in range(4)])
    with torch.no_grad():
        expected = averaged.module.eval()(pixels).logits
        plain = ewa.collapse(averaged.module)
        plain.save_pretrained(tmp_path / "average")
        loaded, report = ViTForImageClassification.from_pretrained(
            tmp_path / "average", output_loading_info=True
        )
        torch.testing.assert_close(loaded.eval()(pixels).logits, expected)
    assert not report["missing_keys"] | report["unexpected_keys"]
    assert not torch.equal(plain.classifier.weight, run.model.classifier.weight)


def test_torchrun_trains_one_stock_model(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from hf_trainer import trainer\n"
        "run = trainer('run', ddp_backend='gloo', per_device_train_batch_size=4, max_steps=3)\n"
        "assert run.args.world_size == 2\n"
        "run.train()\n"
        "run.save_model('vit')\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, script], cwd=tmp_path, env=environment, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    _, report = ViTForImageClassification.from_pretrained(tmp_path / "vit", output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]
    state = json.loads((tmp_path / "run/checkpoint-3/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["EWACallback"]["args"]["num_experts"] == 4
