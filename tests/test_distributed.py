"""Several processes compute what one does: DDP, FSDP2, HSDP, by torch's and by accelerate's APIs."""

import os
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import ewavit as ewa
from ewavit.core import moe_layers
from ewavit.core.devices import whole
from ewavit.core.partition import Partition, RandomPartition
from ewavit.distributed import expert_placement
from processes import in_processes
from small_models import perturbed, tiny_vit
from steps import STEPS, batch

kinds_in_worlds = pytest.mark.parametrize(
    ("experts", "world"), [("stacked", 2), ("stacked", 4), ("separate", 2)]
)


class RoundRobin(RandomPartition):
    """Deals unit t to expert t mod N: where N divides a process's units, as it does in the whole batch."""

    def draw(self, num_units, device="cpu"):
        slots = torch.arange(num_units, device=device).view(-1, self.num_experts).t().reshape(-1)
        return Partition(slots, torch.argsort(slots), None)


def build(experts="auto", num_experts=4, apart=True, **kwargs):
    """The same expanded model in every process, dealt to without chance; 16 tokens an image."""
    torch.manual_seed(1)
    model = tiny_vit(class_token=False, global_pool="avg", **kwargs)
    ewa.expand(model, num_experts, select="all", experts=experts)
    if apart:
        perturbed(model, 0.3)
    for moe in moe_layers(model).values():
        moe.dispatcher = RoundRobin(num_experts)
    return model.double()  # in float32 AdamW makes a step of what is rounding in a gradient of nothing


def training(model, plain=None, opt=torch.optim.AdamW):
    """Optimizer and attached averaging of a model, wrapped or not."""
    optimizer = opt(ewa.param_groups(model), lr=1e-2)
    return optimizer, ewa.ExpertAveraging(plain or model, 0.2, ramp_steps=3).attach(optimizer)


def train(model, optimizer, steps=range(STEPS), micro_batches=1, skip_sync=None, autocast=False):
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in steps:
        x, y = batch(step, rank, world)
        x = x.to(next(model.parameters()).dtype)
        parts = list(zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True))
        for i, (inputs, labels) in enumerate(parts):
            with skip_sync(i < micro_batches - 1) if skip_sync else nullcontext():
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = F.cross_entropy(model(inputs), labels)
                (loss / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()


def alone(model=None, steps=range(STEPS), autocast=False, opt=torch.optim.AdamW):
    """The expanded model after the same steps on the whole batches in one process."""
    model = model or build()
    optimizer, _ = training(model, opt=opt)
    for step in steps:
        x, y = batch(step)
        x = x.to(next(model.parameters()).dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_same(model, reference, tolerance=1e-8):
    expected = reference.state_dict()
    found = {key.removeprefix("module."): value for key, value in model.state_dict().items()}
    assert list(found) == list(expected)
    for key, value in found.items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        assert torch.allclose(value, expected[key], atol=tolerance, rtol=tolerance), key
    assert max(ewa.expert_spread(reference).values()) > 0.01


def sharded(model, mesh=None, **kwargs):
    mesh = mesh or whole_mesh()
    placement = expert_placement(model, mesh)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=placement, **kwargs)
    return fully_shard(model, mesh=mesh, shard_placement_fn=placement, **kwargs)


def whole_mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def hybrid_mesh():
    world = dist.get_world_size()
    return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))


# --- the same weights as one process ----------------------------------------------------------------------


def ddp(experts):
    model = build(experts)
    model.set_grad_checkpointing()
    wrapped = DistributedDataParallel(model)
    optimizer, averaging = training(wrapped)
    no_sync = lambda skip: wrapped.no_sync() if skip else nullcontext()  # noqa: E731
    train(wrapped, optimizer, micro_batches=2, skip_sync=no_sync)
    assert_same(wrapped, alone(build(experts)))
    with CommDebugMode() as counted:
        averaging.step()
    assert counted.get_total_counts() == 0


@kinds_in_worlds
def test_ddp_trains_as_one_process_does(world, experts):
    in_processes(world, ddp, experts)


def fsdp(experts, mesh):
    model = build(experts)
    model.set_grad_checkpointing()
    sharded(model, mesh())
    optimizer, averaging = training(model)

    def skip_sync(skip):
        model.set_requires_gradient_sync(not skip)
        return nullcontext()

    with CommDebugMode() as counted:
        # Only the total is read. The module tracker of torch 2.11 raises IndexError when a module runs twice.
        counted.advanced_module_tracker.__exit__()
        train(model, optimizer, micro_batches=2, skip_sync=skip_sync)
    assert counted.get_total_counts() > 0
    reference = alone(build(experts))
    assert_same(model, reference)

    with CommDebugMode() as counted:
        averaging.step()
        ewa.average_experts_(model, 0.1)
    assert counted.get_total_counts() == 0

    ewa.average_experts_(reference, 0.2)
    ewa.average_experts_(reference, 0.1)
    spread, expected = ewa.expert_spread(model), ewa.expert_spread(reference)
    assert spread == pytest.approx(expected, rel=1e-5)
    assert str(ewa.summary(model)) == str(ewa.summary(reference))

    with CommDebugMode() as counted:
        dense = ewa.dense_state_dict(model)
    expected = ewa.dense_state_dict(reference)
    assert counted.get_total_counts() == len(expected)  # each tensor once, and only as large as the dense one
    assert list(dense) == (list(expected) if dist.get_rank() == 0 else [])
    for key, value in dense.items():
        assert type(value) is torch.Tensor
        assert torch.allclose(value, expected[key], atol=1e-8, rtol=1e-8), key
    plain = build(experts, apart=False)
    ewa.load_dense_state_dict(model, ewa.dense_state_dict(plain))
    assert max(ewa.expert_spread(model).values()) < 1e-6
    assert all(torch.equal(whole(p), q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    with pytest.raises(ewa.EwavitError, match=r"the model is sharded: call ewavit\.dense_state_dict"):
        ewa.collapse(model)


@kinds_in_worlds
def test_fsdp2_trains_as_one_process_does_and_gathers_once(world, experts):
    in_processes(world, fsdp, experts, whole_mesh)


def test_hsdp_trains_as_one_process_does_and_gathers_once():
    in_processes(4, fsdp, "stacked", hybrid_mesh)


def low_precision(wrap):
    opt = partial(torch.optim.SGD, momentum=0.9)
    reference = alone(build().float(), autocast=True, opt=opt)
    model = build().float()
    if wrap == "ddp":
        model.compile()
        wrapped = DistributedDataParallel(model)
    else:
        for block in model.blocks:
            block.compile()
        wrapped = sharded(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    optimizer, _ = training(wrapped, opt=opt)
    train(wrapped, optimizer, autocast=wrap == "ddp")
    assert next(model.parameters()).dtype == torch.float32
    assert_same(wrapped, reference, tolerance=1e-3)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_bfloat16_and_compile_train_close_to_one_process(wrap):
    in_processes(2, low_precision, wrap)


# --- checkpoints ------------------------------------------------------------------------------------------


def save_sharded(folder):
    model = sharded(build())
    optimizer, averaging = training(model)
    train(model, optimizer, steps=range(2))
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1], "averaging": averaging}, checkpoint_id=folder)


def resume_sharded(folder):
    model = build(apart=False)
    if dist.get_world_size() > 1:
        sharded(model)
    optimizer, averaging = training(model)
    states = get_state_dict(model, optimizer)
    dcp.load({"model": states[0], "optimizer": states[1], "averaging": averaging}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    assert averaging.steps_done == 2
    train(model, optimizer, steps=range(2, STEPS))
    assert_same(model, alone())


@pytest.mark.parametrize("worlds", [(4, 2), (2, 4), (2, 1)], ids=lambda pair: f"{pair[0]} to {pair[1]}")
def test_a_checkpoint_of_torch_resumes_in_another_number_of_processes(worlds, tmp_path):
    for world, check in zip(worlds, (save_sharded, resume_sharded), strict=True):
        in_processes(world, check, str(tmp_path / "checkpoint"))


# --- accelerate -------------------------------------------------------------------------------------------


def accelerated(fsdp2):
    accelerator, plain = Accelerator(cpu=True, gradient_accumulation_steps=2), build()
    if fsdp2:
        # accelerate takes its way of FSDP2 on accelerators only, so it is told on the CPU that it is on it.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        sharded(plain)  # accelerate leaves a model that is sharded already as it is
    optimizer, averaging = training(plain)
    model, optimizer = accelerator.prepare(plain, optimizer)
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(STEPS):
        x, y = batch(step, rank, world)
        for inputs, labels in zip(x.chunk(2), y.chunk(2), strict=True):
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(inputs), labels))
                optimizer.step()
                optimizer.zero_grad()
    assert averaging.steps_done == STEPS
    assert_same(model, alone())


@pytest.mark.parametrize("fsdp2", [False, True], ids=["ddp", "fsdp2"])
def test_accelerate_trains_as_one_process_does(fsdp2):
    in_processes(2, accelerated, fsdp2)


# --- misuse -----------------------------------------------------------------------------------------------


def misuse():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(ewa.EwavitError, match=r"no MoE layer: call ewavit\.expand"):
        expert_placement(tiny_vit(), mesh)
    odd = ewa.expand(tiny_vit(mlp_ratio=0.3125), 4)  # a hidden width of 5
    with pytest.raises(
        ewa.EwavitError,
        match=r"fc1.bias \(4, 5\) cannot be divided evenly over 2 processes",
    ):
        expert_placement(odd, mesh)

    model = build()
    fully_shard(model, mesh=mesh)  # torch's default: over the experts
    optimizer, _ = training(model)
    with pytest.raises(
        ewa.EwavitError,
        match=r"sharded over its experts: pass shard_placement_fn=ewavit\.dist",
    ):
        train(model, optimizer)
    with pytest.raises(ewa.EwavitError, match="wrapped in FSDPModule: call fully_shard after"):
        ewa.expand(model)


def test_misuse_of_sharding_is_told():
    in_processes(2, misuse)


# --- docs/distributed.md ----------------------------------------------------------------------------------

DOCUMENT = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()


def recipe(headings, folder):
    """Run the opening of the document, what stands below each heading, and between them two steps."""
    os.chdir(folder)
    opening, *sections = re.split(r"^## ", DOCUMENT, flags=re.MULTILINE)
    blocks = {
        section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        for section in sections
    }
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "init_process_group", lambda: None)  # there is one
        patch.setattr(timm, "create_model", partial(timm.create_model, depth=2))
        exec(*re.findall(r"```python\n(.*?)```", opening, re.DOTALL), names)
        for heading in headings:
            for code in blocks[heading]:
                exec(code, names)
            model = names.get("wrapped", names["model"])
            torch.manual_seed(dist.get_rank())
            for _ in range(2):
                F.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([0, 1])).backward()
                names["optimizer"].step()
                names["optimizer"].zero_grad()
    assert min(ewa.expert_spread(model).values()) > 0


@pytest.mark.parametrize(
    ("world", "headings"),
    [
        (2, ["DDP"]),
        (2, ["FSDP2", "Checkpoints and the plain model"]),
        (4, ["HSDP"]),
        (2, ["Replicas"]),
        (4, ["Replicas in HSDP"]),
    ],
    ids=lambda value: value if isinstance(value, int) else value[0],
)
def test_the_recipes_of_the_document_train(world, headings, tmp_path):
    in_processes(world, recipe, headings, str(tmp_path))
    if len(headings) > 1:
        plain = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10, depth=2)
        plain.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
