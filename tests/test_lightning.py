"""`EWACallback` in Lightning's Trainer: exact to resume, a plain module at the end."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

import ewavit as ewa
from ewavit.core import moe_layers
from ewavit.core.replicas import ReplicaExperts
from ewavit.integrations.lightning import EWACallback
from processes import in_processes
from small_models import images, tiny_vit

warnings.filterwarnings("ignore", ".*does not have many workers.*")


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.vit = tiny_vit(2)  # without dropout: Lightning saves no generator

    def training_step(self, batch, index):
        return F.cross_entropy(self.vit(batch[0]), batch[1])

    def test_step(self, batch, index):
        self.log("loss", F.cross_entropy(self.vit(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(ewa.param_groups(self), lr=1e-2)


def loader():
    torch.manual_seed(3)
    data = torch.utils.data.TensorDataset(images(24), torch.randint(3, (24,)))
    return torch.utils.data.DataLoader(data, batch_size=8)


def fit(folder, epochs=2, callbacks=(), ckpt=None, **settings):
    seed_everything(7, verbose=False)
    module = Classifier()
    arguments = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, **settings}
    mine = [
        EWACallback(4, ramp_steps=4),
        *callbacks,
        ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}"),
    ]
    trainer = Trainer(
        max_epochs=epochs, callbacks=mine, enable_model_summary=False, log_every_n_steps=1,
        default_root_dir=folder, **arguments,
    )  # fmt: skip
    trainer.fit(module, loader(), ckpt_path=ckpt, weights_only=False if ckpt else None)
    return module, trainer


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_a_resumed_fit_is_exact_over_all_tensors(tmp_path, settings):
    whole, _ = fit(tmp_path / "whole", **settings)
    resumed, _ = fit(tmp_path / "resumed", ckpt=tmp_path / "whole/epoch=0.ckpt", **settings)
    one, other = (
        torch.load(tmp_path / name / "epoch=1.ckpt", weights_only=False)["state_dict"]
        for name in ("whole", "resumed")
    )
    assert any(".experts." in name for name in one)
    assert_equal(one, other)
    assert_equal(whole.state_dict(), resumed.state_dict())


def test_after_fit_the_module_is_plain_and_what_the_callback_logged_is_there(tmp_path):
    module, trainer = fit(tmp_path)
    assert not moe_layers(module)
    assert module.state_dict().keys() == Classifier().state_dict().keys()
    assert float(trainer.callback_metrics["ewa/share_rate"]) == pytest.approx(0.3)
    assert float(trainer.callback_metrics["ewa/spread"]) > 0


def test_a_checkpoint_with_experts_is_tested_as_its_plain_model(tmp_path):
    first, trainer = fit(tmp_path / "one", epochs=1)
    expected = trainer.test(first, loader(), verbose=False)
    module, trainer = fit(tmp_path / "two")
    found = trainer.test(
        module, loader(), ckpt_path=tmp_path / "two/epoch=0.ckpt", weights_only=False, verbose=False
    )
    assert found == expected
    assert not moe_layers(module)
    assert_equal(module.state_dict(), first.state_dict())
    another = Classifier()  # with the same trainer and callback
    trainer.fit_loop.max_epochs = 3
    trainer.fit(another, loader())
    trainer.test(
        another, loader(), ckpt_path=tmp_path / "two/epoch=0.ckpt", weights_only=False, verbose=False
    )
    assert_equal(another.state_dict(), first.state_dict())


def test_an_average_beside_it_is_of_the_experts_and_is_what_is_deployed(tmp_path):
    # A decay of 0 makes the average the latest weights, which the last checkpoint's own module holds.
    module, _ = fit(tmp_path / "plain")
    averaged, _ = fit(tmp_path / "ema", callbacks=[EMAWeightAveraging(decay=0.0)])
    assert_equal(averaged.state_dict(), module.state_dict())
    slow, _ = fit(tmp_path / "slow", callbacks=[EMAWeightAveraging(decay=0.9)])
    assert not moe_layers(slow)
    assert not torch.equal(slow.vit.blocks[1].mlp.fc1.weight, module.vit.blocks[1].mlp.fc1.weight)


def test_an_average_before_it_is_refused(tmp_path):
    trainer = Trainer(
        callbacks=[EMAWeightAveraging(), EWACallback()], logger=False, accelerator="cpu",
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ewa.EwavitError, match="put EWACallback before it"):
        trainer.fit(Classifier(), loader())


def check_processes(folder, placement):
    seed_everything(7, verbose=False)
    module, kinds = Classifier(), []

    class Look(EWACallback):
        def on_train_start(self, trainer, pl_module):
            kinds.extend(type(moe.experts) for moe in moe_layers(pl_module).values())

    number = None if placement == "replicas" else 4
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
        callbacks=[Look(number, placement=placement)], enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, loader())
    assert kinds
    assert all((kind is ReplicaExperts) == (placement == "replicas") for kind in kinds)
    assert not moe_layers(module)
    for name, value in module.state_dict().items():
        values = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(values, value)
        assert torch.equal(*values), name


@pytest.mark.parametrize("placement", ["local", "replicas"])
def test_two_processes_end_with_one_plain_module(tmp_path, placement):
    in_processes(2, check_processes, tmp_path, placement)
