"""Replica experts: each process holds one expert, and averaging is an all-reduce of the FFNs."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

import ewavit as ewa
from ewavit.core import full_share_rate, moe_layers
from ewavit.distributed import clip_grad_norm_, expert_placement, load_stacked_state_dict, stacked_state_dict
from ewavit.training.prediction import SpreadPrediction
from processes import in_processes
from small_models import MlpNet, tiny_vit
from steps import STEPS, batch

worlds = pytest.mark.parametrize("world", [2, 4])
SGD = partial(torch.optim.SGD, momentum=0.9, nesterov=True)


def vit(seed=1):
    torch.manual_seed(seed)
    return tiny_vit().double()


def replicas(seed=1):
    """A model whose FFNs are replica experts, in DDP."""
    return DistributedDataParallel(ewa.expand(vit(seed), select="all", placement="replicas"))


def train(model, optimizer, steps=range(STEPS), micro_batches=1, max_norm=None):
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in steps:
        x, y = batch(step, rank, world)
        parts = list(zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True))
        for i, (inputs, labels) in enumerate(parts):
            with model.no_sync() if i < len(parts) - 1 else nullcontext():
                (F.cross_entropy(model(inputs), labels) / micro_batches).backward()
        if max_norm is not None:
            clip_grad_norm_(model, max_norm)
        optimizer.step()
        optimizer.zero_grad()


def trained(share_rate=0.2, opt=torch.optim.AdamW, **kwargs):
    model = replicas()
    optimizer = opt(ewa.param_groups(model), lr=1e-2)
    averaging = ewa.ExpertAveraging(model, share_rate).attach(optimizer)
    train(model, optimizer, **kwargs)
    return model, optimizer, averaging


def gathered(model):
    """Every process's weights of every parameter, (processes, *shape)."""
    world, found = dist.get_world_size(), {}
    for name, parameter in model.named_parameters():
        parts = [torch.empty_like(parameter) for _ in range(world)]
        dist.all_gather(parts, parameter.detach())
        found[name] = torch.stack(parts)
    return found


def full_averaging(micro_batches):
    world = dist.get_world_size()
    model, _, _ = trained(full_share_rate(world), SGD, micro_batches=micro_batches)
    dense = DistributedDataParallel(vit())
    optimizer = SGD(ewa.param_groups(dense), lr=1e-2)
    train(dense, optimizer, micro_batches=micro_batches)
    expected = dense.module.state_dict()
    found = ewa.dense_state_dict(model)
    assert list(found) == list(expected)
    assert all(torch.allclose(found[key], expected[key], rtol=0, atol=1e-10) for key in expected)
    for name, values in gathered(model).items():
        assert torch.allclose(values, values[:1], rtol=0, atol=1e-10), name


@worlds
def test_full_averaging_with_sgd_is_dense_ddp_step_for_step(world):
    in_processes(world, full_averaging, 1)
    in_processes(world, full_averaging, 2)


def only_experts_differ():
    world = dist.get_world_size()
    dense_size = sum(parameter.numel() for parameter in vit().parameters())
    model, _, averaging = trained()
    assert sum(parameter.numel() for parameter in model.parameters()) == dense_size
    assert ewa.summary(model).dense_parameters == ewa.summary(model).parameters == dense_size

    before = gathered(model)
    averaging.step()
    weight = averaging.share_rate * world / (world - 1)
    squares = {}
    for name, values in gathered(model).items():
        old = before[name]
        if "experts" not in name:
            assert torch.equal(values, old[:1].expand_as(old)), name
            continue
        assert not torch.equal(old[0], old[1]), name
        mean = old.mean(0)
        assert torch.allclose(values, old + weight * (mean - old), rtol=0, atol=1e-12), name
        layer = name.partition(".experts")[0]
        apart, norm = squares.get(layer, (0, 0))
        squares[layer] = apart + (values - mean).square().sum() / world, norm + mean.square().sum()
    spread = ewa.expert_spread(model)
    assert spread == pytest.approx({k: float(a / n) ** 0.5 for k, (a, n) in squares.items()}, rel=1e-5)


@worlds
def test_only_the_experts_differ_and_eq_6_pulls_them_together(world):
    in_processes(world, only_experts_differ)


def evaluation():
    model, _, averaging = trained()
    x, _ = batch(99)
    with pytest.raises(ewa.EwavitError, match=r"call model\.eval\(\) in every process"):
        model.module.blocks[0].mlp.experts.merged(torch.zeros(1, 17, 16).double())
    model.eval()
    with torch.inference_mode(), CommDebugMode() as counted:
        found = model(x) if dist.get_rank() == 0 else None  # one may evaluate alone
    assert counted.get_total_counts() == 0
    averaging.step()
    with pytest.raises(ewa.EwavitError, match="again after the weights have changed"), torch.no_grad():
        model(x)
    model.eval()
    mean = model(x)
    plain = ewa.collapse(model.module).eval()
    assert torch.allclose(plain(x), mean, atol=1e-12)
    assert found is None or torch.allclose(found, mean, atol=1e-12)
    vit().load_state_dict(plain.state_dict())
    memory = [parameter.untyped_storage().data_ptr() for parameter in plain.parameters()]
    assert len(set(memory)) == len(memory)  # as safetensors asks
    assert [type(m) for m in plain.modules()] == [type(m) for m in vit().modules()]


@worlds
def test_eval_computes_what_will_be_deployed(world):
    in_processes(world, evaluation)


def bytes_sent():
    def by_ddp(model):
        return model._get_ddp_logging_data()["total_parameter_size_bytes"]

    model, _, averaging = trained()
    by_averaging, all_reduce = [], dist.all_reduce

    def counted(tensor, **kwargs):
        by_averaging.append(tensor.nbytes)
        return all_reduce(tensor, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        averaging.step()
    assert len(by_averaging) == len(moe_layers(model)) == 2
    assert by_ddp(model) + sum(by_averaging) == by_ddp(DistributedDataParallel(vit()))


def test_a_step_sends_the_bytes_of_dense_ddp():
    in_processes(2, bytes_sent)


def clipping():
    model, _, _ = trained(max_norm=0.05)
    for name, values in gathered(model).items():
        assert "experts" in name or torch.equal(values, values[:1].expand_as(values)), name
    optimizer = torch.optim.SGD(ewa.param_groups(model), lr=1.0)
    x, y = batch(5, dist.get_rank(), dist.get_world_size())
    F.cross_entropy(model(x), y).backward()
    gradients = [p.grad for p in model.parameters()]
    norm = clip_grad_norm_(model, 1e9)
    own = torch.stack([p.grad.square().sum() for n, p in model.named_parameters() if "experts" in n]).sum()
    shared = torch.stack([g.square().sum() for g in gradients]).sum() - own
    dist.all_reduce(own)
    assert float(norm) == pytest.approx(float(shared + own / dist.get_world_size()) ** 0.5, rel=1e-9)
    # torch's own clips by another factor in each process
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
    with pytest.raises(ewa.EwavitError, match=r"clip gradients with ewavit\.distributed\.clip_grad_norm_"):
        ewa.ExpertAveraging(model, 0.1).step()


def test_clipping_keeps_the_shared_weights_together():
    in_processes(2, clipping)


def test_clipping_without_replicas_is_torchs():
    norms, gradients = [], []
    for clip in (
        clip_grad_norm_,
        lambda model, norm: torch.nn.utils.clip_grad_norm_(model.parameters(), norm),
    ):
        torch.manual_seed(0)
        model = MlpNet()
        model(torch.randn(3, 5, 8)).sum().backward()
        norms.append(clip(model, 0.1))
        gradients.append([p.grad for p in model.parameters()])
    assert torch.equal(*norms)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- checkpoints ------------------------------------------------------------------------------------------


def save(file):
    model, optimizer, averaging = trained(steps=range(2))
    state = stacked_state_dict(model.module, optimizer)
    assert bool(state) == (dist.get_rank() == 0)
    if state:
        torch.save(state | {"averaging": averaging.state_dict()}, file)
    train(model, optimizer, steps=range(2, STEPS))
    torch.save(model.module.state_dict(), f"{file}.{dist.get_rank()}")


def resume(file):
    state = torch.load(file)
    model = replicas(seed=2)
    optimizer = torch.optim.AdamW(ewa.param_groups(model), lr=1e-2)
    averaging = ewa.ExpertAveraging(model, 0.2).attach(optimizer)
    load_stacked_state_dict(model.module, state, optimizer)
    averaging.load_state_dict(state["averaging"])
    train(model, optimizer, steps=range(2, STEPS))
    expected = torch.load(f"{file}.{dist.get_rank()}")
    for key, value in model.module.state_dict().items():
        assert torch.allclose(value, expected[key], rtol=0, atol=1e-12), key


@worlds
def test_the_checkpoint_holds_the_expert_of_every_process_and_resumes(world, tmp_path):
    file = str(tmp_path / "state.pt")
    in_processes(world, save, file)
    in_processes(world, resume, file)

    # It is the checkpoint of stacked experts, on one device.
    stacked = ewa.expand(vit(), world, select="all")
    optimizer = torch.optim.AdamW(ewa.param_groups(stacked), lr=1e-2)
    state = torch.load(file)
    stacked.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert min(ewa.expert_spread(stacked).values()) > 1e-3


def resume_elsewhere(file):
    world, rank = dist.get_world_size(), dist.get_rank()
    state = torch.load(file)
    model = replicas(seed=2)
    optimizer = torch.optim.AdamW(ewa.param_groups(model), lr=1e-2)
    load_stacked_state_dict(model.module, state, optimizer)
    saved = ewa.expand(vit(), 4 if world == 2 else 2, select="all")
    saved.load_state_dict(state["model"])
    expected = ewa.dense_state_dict(saved)
    for key, value in ewa.dense_state_dict(model).items():
        assert torch.allclose(value, expected[key], rtol=0, atol=1e-12), key
    for name, parameter in model.module.named_parameters():
        if "experts" in name:
            experts = state["model"][name]
            mine = experts[rank] if rank < len(experts) else experts.mean(0)
            assert torch.equal(parameter, mine) == (world > len(experts)), name
    train(model, optimizer)
    assert min(ewa.expert_spread(model).values()) > 0


@pytest.mark.parametrize("worlds", [(2, 4), (4, 2)], ids=lambda pair: f"{pair[0]} to {pair[1]}")
def test_in_another_number_of_processes_the_mean_is_kept_and_the_missing_start_from_it(worlds, tmp_path):
    for world, check in zip(worlds, (save, resume_elsewhere), strict=True):
        in_processes(world, check, str(tmp_path / "state.pt"))


# --- HSDP -------------------------------------------------------------------------------------------------


def sharded_replicas(seed=1):
    """Two replicas of two processes each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    group = mesh.get_group("replicate")
    model = ewa.expand(vit(seed), select="all", placement="replicas", process_group=group)
    for moe in moe_layers(model).values():
        fully_shard(moe, mesh=mesh["shard"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def hsdp_is_dense():
    model, dense = sharded_replicas(), vit()
    for each in (model, dense):
        optimizer = SGD(ewa.param_groups(each), lr=1e-2, foreach=True)
        if each is model:
            ewa.ExpertAveraging(model, full_share_rate(2)).attach(optimizer)
            train(model, optimizer)
            continue
        for x, y in map(batch, range(STEPS)):
            F.cross_entropy(dense(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = dense.state_dict()
    for key, value in ewa.dense_state_dict(model).items():
        assert torch.allclose(value, expected[key], rtol=0, atol=1e-10), key


def hsdp(file):
    def new(seed):
        model = sharded_replicas(seed)
        optimizer = torch.optim.AdamW(ewa.param_groups(model), lr=1e-2, foreach=True)
        return model, optimizer, ewa.ExpertAveraging(model, 0.2).attach(optimizer)

    model, optimizer, averaging = new(1)
    train(model, optimizer, max_norm=0.5)
    assert min(ewa.expert_spread(model).values()) > 1e-3
    with CommDebugMode() as counted:
        averaging.step()
    assert counted.get_total_counts() == len(moe_layers(model))  # of the local shards
    state, dense = stacked_state_dict(model, optimizer), ewa.dense_state_dict(model)
    found = model.eval()(batch(99)[0])
    if dist.get_rank() == 0:
        torch.save(state, file)
        plain = vit().eval()
        plain.load_state_dict(dense)
        assert torch.allclose(plain(batch(99)[0]), found, atol=1e-12)
    dist.barrier()

    other, other_optimizer, _ = new(2)
    load_stacked_state_dict(other, torch.load(file), other_optimizer)
    for each, its_optimizer in ((model.train(), optimizer), (other, other_optimizer)):
        train(each, its_optimizer)
    assert ewa.expert_spread(other) == pytest.approx(ewa.expert_spread(model), rel=1e-6)
    for one, same in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one.to_local(), same.to_local(), rtol=0, atol=1e-12)


def test_replicas_of_several_processes_hsdp(tmp_path):
    in_processes(4, hsdp_is_dense)
    in_processes(4, hsdp, str(tmp_path / "state.pt"))


# --- around it --------------------------------------------------------------------------------------------


def in_other_hands():
    accelerator, plain = Accelerator(cpu=True), ewa.expand(vit(), placement="replicas")
    average = ModelEmaV3(plain, decay=0.5)
    plain.compile(backend="eager")
    optimizer = torch.optim.AdamW(ewa.param_groups(plain), lr=1e-2)
    ewa.ExpertAveraging(plain, 0.2).attach(optimizer)
    model, optimizer = accelerator.prepare(plain, optimizer)
    for step in range(STEPS):
        x, y = batch(step, dist.get_rank(), dist.get_world_size())
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        average.update(plain)
    layers = ("blocks.1.mlp",)
    assert tuple(ewa.expert_spread(plain)) == tuple(ewa.expert_spread(average.module)) == layers
    assert ewa.expert_spread(plain)[layers[0]] > ewa.expert_spread(average.module)[layers[0]] > 0
    x, _ = batch(99)
    for expanded in (plain, average.module):
        found = expanded.eval()(x)
        dense = vit().eval()
        dense.load_state_dict(ewa.dense_state_dict(expanded))
        assert torch.allclose(dense(x), found, atol=1e-10)


def test_accelerate_compile_and_a_moving_average_take_replicas():
    in_processes(2, in_other_hands)


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def misuse():
    for wrong, told in (
        ({"num_experts": 3}, "num_experts=3, but 2 processes hold one replica each: leave it out"),
        ({"experts": "stacked"}, 'replicas are copies of the FFN: leave out experts="stacked"'),
    ):
        with pytest.raises(ewa.EwavitError, match=told):
            ewa.expand(vit(), placement="replicas", **wrong)
    model = ewa.expand(vit(), placement="replicas")
    with pytest.raises(ewa.EwavitError, match="replica experts are not stacked: leave out expert_placement"):
        expert_placement(model)
    with pytest.raises(ewa.EwavitError, match=r"share rate 0\.6 is out of range for 2 experts"):
        ewa.ExpertAveraging(model, 0.6)
    averaging = ewa.ExpertAveraging(model, 0.1)
    with pytest.raises(ewa.EwavitError, match="the spread of replica experts cannot be predicted"):
        SpreadPrediction(model, torch.optim.SGD(model.parameters(), lr=0.1), averaging)

    wrapped = DistributedDataParallel(Outer(model))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    ewa.ExpertAveraging(wrapped, 0.1).attach(optimizer)
    with pytest.raises(ewa.EwavitError, match="expand the same module that DistributedDataParallel wraps"):
        train(wrapped, optimizer)


def test_misuse_of_replicas_is_told():
    with pytest.raises(ewa.EwavitError, match="start with torchrun"):
        ewa.expand(vit(), placement="replicas")
    with pytest.raises(ewa.EwavitError, match="placement='everywhere' is unknown"):
        ewa.expand(vit(), placement="everywhere")
    in_processes(2, misuse)


def one():
    dense, model = vit(), ewa.expand(vit(), placement="replicas")
    x, y = batch(0)
    for each in (dense, model):
        optimizer = torch.optim.AdamW(ewa.param_groups(each), lr=1e-2)
        if each is model:
            ewa.ExpertAveraging(model, 0.3).attach(optimizer)
        F.cross_entropy(each(x), y).backward()
        optimizer.step()
    assert torch.equal(dense(x), model(x))
    assert torch.equal(dense.eval()(x), model.eval()(x))


def test_one_process_trains_the_dense_model_bit_for_bit():
    in_processes(1, one)


def shared_and_pruned():
    world = dist.get_world_size()
    dense = vit()
    dense.blocks[1].mlp.fc2.weight = dense.blocks[0].mlp.fc2.weight
    size = sum(parameter.numel() for parameter in dense.parameters())
    plain = ewa.expand(dense, select="all", placement="replicas")
    for moe in moe_layers(plain).values():
        prune.random_unstructured(moe.experts.ffn.fc1, "weight", 0.5)  # its own mask in each process
    model = DistributedDataParallel(plain)
    optimizer = SGD(model.parameters(), lr=1e-2)
    averaging = ewa.ExpertAveraging(plain, 0.2).attach(optimizer)
    train(model, optimizer)
    before = gathered(plain)["blocks.0.mlp.experts.ffn.fc2.weight"]
    assert not torch.allclose(before[0], before[1])  # DDP leaves its gradients alone under either name
    averaging.step()
    after = gathered(plain)["blocks.0.mlp.experts.ffn.fc2.weight"]
    pull = 0.2 * world / (world - 1)  # once, although two layers hold the weight
    assert torch.allclose(after, before + pull * (before.mean(0) - before), rtol=0, atol=1e-12)
    x, _ = batch(0, 0, 1)
    with torch.no_grad():
        output = plain.eval()(x)
        effective = plain.blocks[1].mlp.experts.ffn.fc1
        effective = effective.weight_orig * effective.weight_mask
        dist.all_reduce(effective)
        ewa.collapse(plain)
        assert torch.allclose(plain.blocks[1].mlp.fc1.weight, effective / world, rtol=0, atol=1e-12)
        assert torch.allclose(plain(x), output, rtol=0, atol=1e-10)
    assert plain.blocks[1].mlp.fc2.weight is plain.blocks[0].mlp.fc2.weight
    assert sum(parameter.numel() for parameter in plain.parameters()) == size


def test_replicas_keep_shared_weights_and_deploy_the_mean_of_effective_ones():
    in_processes(2, shared_and_pruned)
