"""The closed forms of many devices count what torch counts, and the page shows what they say."""

import importlib.util
import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import ewavit as ewa
from ewavit import EwavitError
from ewavit.cli import main
from ewavit.core import moe_layers
from ewavit.distributed import expert_placement
from ewavit.study.bench import activation_bytes
from ewavit.study.scaling import LAYOUTS, ViT, Work, cost, layouts
from processes import in_processes
from small_models import tiny_vit

ROOT = Path(__file__).parent.parent
SIZE = {"depth": 3, "dim": 16, "heads": 2, "patch": 4, "img_size": 16, "num_classes": 3}  # of tiny_vit(3)


def test_parameters_and_flops_are_those_of_the_model():
    model, work = tiny_vit(3).eval(), ViT(**SIZE).work()
    assert work.parameters == sum(p.numel() for p in model.parameters())
    assert work.block_parameters == sum(p.numel() for p in model.blocks[0].parameters())
    # As matrix products: torch 2.11 does not count the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 16, 16))
    assert work.forward_flops == counter.get_total_flops()
    ewa.expand(model, 5)
    assert work.mixtures == len(moe_layers(model)) == 2
    assert work.parameters + 4 * work.ffn_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(half, checkpointing):
    model, work = tiny_vit(3).train(), ViT(**SIZE).work(half=half)
    model.set_grad_checkpointing(checkpointing)

    def loss(model: nn.Module, batch: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(torch.randn(batch, 3, 16, 16)).float().sum()

    few, many = (activation_bytes(model, partial(loss, batch=batch)) for batch in (2, 10))
    expected = work.activation_bytes
    if checkpointing:  # the block that is computed again is not there yet after the forward pass
        inputs = 3 * 4 * 17 * 16  # of 3 blocks, float32, 17 tokens of 16
        expected = work.checkpointed_bytes - (work.activation_bytes - work.checkpointed_bytes + inputs) // 2
    assert (many - few) / 8 == expected


class Sent(TorchDispatchMode):
    """Adds up what a ring of two sends from each for the collectives within."""

    rounds = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func.name().split("::")
        if space == "c10d":
            largest = max(each.nbytes for each in tree_leaves(args) if isinstance(each, torch.Tensor))
            self.bytes += self.rounds[name] * largest / 2
        return func(*args, **(kwargs or {}))


def step_in(layout):
    """Bytes that a training step sends and bytes of state that it leaves, and their forms."""
    kind, wrapper = layout.split(", ")
    world = dist.get_world_size()
    torch.manual_seed(0)
    model = tiny_vit(class_token=False, global_pool="avg", pos_embed="none", num_classes=4)
    parameters, block = (sum(p.numel() for p in m.parameters()) for m in (model, model.blocks[0]))
    ffns = sum(p.numel() for block in model.blocks for p in block.mlp.parameters())
    work = Work(parameters, ffns, len(model.blocks), block, 0, 0, 0)
    if kind == "stacked":
        ewa.expand(model, 4, select="all")
    elif kind == "replicas":
        ewa.expand(model, select="all", placement="replicas")
    wrapped = model
    if wrapper == "DDP":
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, allreduce_hook)
    else:
        shape, names = ((world,), None) if wrapper == "FSDP2" else ((2, 2), ("replicate", "shard"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
        options |= {"shard_placement_fn": expert_placement(model, mesh)} if kind == "stacked" else {}
        for part in model.blocks:
            fully_shard(part, **options)
        fully_shard(model, reshard_after_forward=True, **options)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.manual_seed(dist.get_rank())
    averaging = None if kind == "dense" else ewa.ExpertAveraging(model, 0.1).attach(optimizer)
    for step in range(4):
        x, y = torch.randn(8, 3, 16, 16), torch.randint(4, (8,))
        with (
            Sent() if step == 3 else nullcontext() as sent
        ):  # in the first the processes also look at each other
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x).float(), y).backward()
            optimizer.step()
    assert averaging is None or averaging.steps_done == 4
    found = cost(work, layout, world, num_experts=4, shard=2)
    assert sent.bytes == found.sent_bytes, layout
    held = [tensor for p in model.parameters() for tensor in (p, p.grad)]
    held += [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in held]
    assert sum(t.nbytes for t in local) == found.state_bytes, layout


def each(*some):
    for layout in some:
        step_in(layout)


def test_bytes_sent_and_state_held_are_those_of_processes():
    in_processes(2, each, *(layout for layout in LAYOUTS if "HSDP" not in layout))
    in_processes(4, each, "dense, HSDP", "stacked, HSDP")


def test_replicas_send_and_hold_what_dense_training_does():
    work = ViT(**SIZE).work()
    for wrapper in ("DDP", "HSDP"):
        dense, ours = (cost(work, f"{kind}, {wrapper}", 64) for kind in ("dense", "replicas"))
        assert ours.sent_bytes == dense.sent_bytes
        assert ours.state_bytes == dense.state_bytes
        assert ours.flops == dense.flops


def test_hsdp_of_one_group_is_fsdp2():
    work = ViT(**SIZE).work()
    assert cost(work, "stacked, HSDP", 8) == cost(work, "stacked, FSDP2", 8)
    assert "dense, HSDP" not in layouts(8)
    assert set(layouts(64)) == set(LAYOUTS)


def test_what_cannot_be_laid_out_is_refused():
    work = ViT(**SIZE).work()
    for layout, devices, word in (("dense, TP", 8, "unknown"), ("dense, HSDP", 12, "multiple of 8")):
        with pytest.raises(EwavitError, match=word):
            cost(work, layout, devices)


def test_the_page_and_the_record_hold_what_the_forms_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("scaling_benchmark", ROOT / "benchmarks" / "scaling.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    sys.modules.pop("records", None)
    result = json.loads((ROOT / "records" / "scaling.json").read_text())["result"]
    assert {key: result[key] for key in benchmark.forms()} == benchmark.forms()
    page = (ROOT / "docs" / "scaling.md").read_text()
    for name, table in benchmark.page_tables(result).items():
        assert f"<!-- {name} -->\n{table}\n<!-- end -->" in page


def test_plan_shows_what_each_device_needs(capsys):
    arguments = ["plan", "--model", "vit_tiny_patch16_224", "--img-size", "32", "--select", "all"]
    small = [*arguments, "--model-kwargs", "embed_dim=16,depth=2,num_heads=2,patch_size=8", "--experts", "2"]
    assert main([*small, "--devices", "16", "--batch-size", "8", "--json"]) == 0
    titles, *rows = json.loads(capsys.readouterr().out)["layouts"]
    assert titles[0] == "layout"
    assert [row[0] for row in rows] == list(layouts(16))
    work = ViT(2, 16, 2, 8, img_size=32).work(every=1)
    found = cost(work, "stacked, HSDP", 16, num_experts=2, batch_size=8, checkpointing=False)
    (row,) = (row for row in rows if row[0] == "stacked, HSDP")
    parts = (found.activation_bytes / 2**30, found.flops / 1e12, found.sent_bytes / 1e9)
    assert row[4:] == [f"{parts[0]:,.2f}", f"{parts[1]:,.1f}", f"{parts[2]:,.2f}"]
    assert main([*small, "--devices", "16", "--grad-checkpointing"]) == 0
    assert "each of 16 devices" in capsys.readouterr().out
    assert main([*small, "--devices", "0"]) == 2
    assert main([*small, "--devices", "8", "--router", "topk"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
