"""Relatives of EWA: lo-fi (copies of a whole model)."""

import copy
import csv
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models import VisionTransformer
from timm.optim import create_optimizer_v2

import ewavit as ewa
from comparisons import make_comparison
from ewavit.compare.arms import BUILT_IN
from ewavit.compare.two_axes import two_axes
from ewavit.core import Fusion, MoE, SeparateExperts, branch_shares, limit_branches_, moe_layers
from ewavit.data.options import DataOptions
from ewavit.tasks.block_diagonal import group_ffns
from ewavit.training.export import export, load_model
from ewavit.training.loop import resume, train
from ewavit.training.merging import interpolated, stock_share
from ewavit.training.opening import open_data
from ewavit.training.processes import Interrupted
from ewavit.training.recipe import Recipe
from ewavit.training.retention import neighbour_accuracy
from runs import assert_same_end, recipe, stop_after
from small_models import MlpNet, images, randomised, separated, tiny_vit


def lofi(num_experts: int = 3) -> VisionTransformer:
    return ewa.expand(randomised(tiny_vit(), 0.1), num_experts, select="model")


# ---------------------------------------------------------------- lo-fi: copies of the whole model


def test_a_whole_model_is_expanded_and_collapsed_in_place():
    model = tiny_vit()
    dense = copy.deepcopy(model)
    assert ewa.expand(model, 2, select="model") is model
    assert isinstance(model, MoE)
    assert isinstance(model.experts, SeparateExperts)
    assert model.unit == "image"
    assert list(moe_layers(model)) == [""]
    assert ewa.find_ffns(model) == []  # the copies are no candidates
    assert ewa.collapse(model) is model
    assert type(model) is VisionTransformer
    for (key, mine), (other, its) in zip(model.state_dict().items(), dense.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(mine, its)


def test_each_image_is_computed_by_one_copy_and_each_copy_has_its_share():
    model = separated(lofi()).train()
    x = images(7)
    state = model.dispatcher.draw(len(x))
    of_image = state.positions // (len(state.slots) // 3)
    assert torch.bincount(of_image).tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3])
    with torch.no_grad():
        each = torch.stack([expert(x) for expert in model.experts.copies])
        assert torch.allclose(model(x), each[of_image, torch.arange(7)], atol=1e-6)


def test_eval_and_collapse_of_copies_are_the_model_with_the_mean_weights():
    model = separated(lofi()).eval()
    mean = {
        key: torch.stack([expert.state_dict()[key] for expert in model.experts.copies]).mean(0)
        for key in model.experts.copies[0].state_dict()
    }
    plain = tiny_vit().eval()
    plain.load_state_dict(mean)
    x = images()
    expected = plain(x)
    assert torch.allclose(model(x), expected, atol=1e-5)
    dense = ewa.dense_state_dict(model)
    assert all(torch.allclose(dense[key], mean[key], atol=1e-7) for key in mean)
    assert isinstance(model, MoE)  # the context manager gave it back
    with ewa.collapsed(model):
        assert type(model) is VisionTransformer
        assert torch.allclose(model.forward_head(model.forward_features(x)), expected, atol=1e-5)
    assert torch.allclose(ewa.collapse(model)(x), expected, atol=1e-5)


def test_copies_never_averaged_train_as_by_themselves():
    """lo-fi: each copy follows the SGD of its own images, and the end is the mean of the workers."""
    model = lofi(2).double()
    workers = [copy.deepcopy(expert) for expert in model.experts.copies]
    ewa.ExpertAveraging(model, share_rate=0.0).attach(optimizer := torch.optim.SGD(model.parameters(), 0.1))
    optimizers = [torch.optim.SGD(worker.parameters(), 0.1) for worker in workers]
    for step in range(3):
        x, labels = images(4).double(), torch.tensor([0, 1, 2, 0])
        of_image = model.dispatcher.draw(4).positions // 2
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        for number, (worker, own) in enumerate(zip(workers, optimizers, strict=True)):
            mine = of_image == number
            loss = torch.nn.functional.cross_entropy(worker(x[mine]), labels[mine], reduction="sum") / 4
            loss.backward()
            own.step()
            own.zero_grad()
        assert int(model.dispatcher.key[2]) == step + 1
    ewa.collapse(model)
    for name, parameter in model.named_parameters():
        mean = torch.stack([worker.get_parameter(name) for worker in workers]).mean(0)
        assert torch.allclose(parameter, mean, atol=1e-12)
    torch.optim.SGD(model.parameters(), 0.1).step()  # a hook of the mixture would look for its experts


def test_whole_blocks_are_dealt_by_image_if_named():
    model = ewa.expand(randomised(tiny_vit()), 2, select=["blocks.0", "blocks.1"], unit="image")
    assert list(moe_layers(model)) == ["blocks.0", "blocks.1"]
    assert len(model.train()(images(5))) == 5


def test_parameters_without_decay_have_none_in_the_copies():
    dense, model = tiny_vit(), lofi()
    for groups in (ewa.param_groups, timm_groups):
        undecayed = {p for group in groups(model) if group["weight_decay"] == 0 for p in group["params"]}
        plain = {p for group in groups(dense) if group["weight_decay"] == 0 for p in group["params"]}
        names = {name for name, p in dense.named_parameters() if p in plain}
        assert "pos_embed" in names
        assert {name for name, p in model.named_parameters() if p in undecayed} == {
            f"experts.copies.{number}.{name}" for number in range(3) for name in names
        }


def timm_groups(model):
    return create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.05).param_groups


def test_plain_weights_go_into_every_copy_and_out_again():
    model, other = lofi(), randomised(tiny_vit())
    ewa.load_dense_state_dict(model, other.state_dict())
    for key, value in ewa.dense_state_dict(model).items():
        assert torch.allclose(value, other.state_dict()[key], atol=1e-7)


def test_a_file_of_copies_is_collapsed_tensor_by_tensor(tmp_path):
    model = separated(lofi())
    for metadata in (ewa.expert_metadata(model), None):
        save_file(model.state_dict(), tmp_path / "whole.safetensors", metadata)
        ewa.collapse_checkpoint(tmp_path / "whole.safetensors", tmp_path / "plain.safetensors")
        found, expected = load_file(tmp_path / "plain.safetensors"), ewa.dense_state_dict(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


def test_what_copies_of_a_whole_model_cannot_be_is_refused():
    with pytest.raises(ewa.EwavitError, match=r"1 .BatchNorm1d. would have other statistics"):
        ewa.expand(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)), select="model")
    for options in ({"router": ewa.TopK()}, {"placement": "replicas"}, {"experts": "stacked"}):
        with pytest.raises(ewa.EwavitError):
            ewa.expand(MlpNet(), 2, select="model", **options)
    with pytest.raises(AttributeError, match="forward_features is a method of the plain model"):
        lofi().forward_features(images())
    for settings in ({"router": "topk"}, {"layer_decay": 0.7}, {"placement": "replicas"}):
        with pytest.raises(ewa.EwavitError, match="does not work with --select model"):
            Recipe(select="model", **settings)


# ---------------------------------------------------------------- towards the start


def test_model_stock_takes_its_closed_form():
    """Two moves of length 1 with cosine c lie at t = 2 c / (1 + c) of the mean; the result is orthogonal."""
    start = torch.randn(2, 3, dtype=torch.float64)
    for cosine in (0.0, 0.3, 0.8, 1.0):
        one, other = torch.zeros(2, 2, 3, dtype=torch.float64)
        one[0, 0], other[0, 0], other[1, 2] = 1, cosine, (1 - cosine**2) ** 0.5
        trained = [start + one, start + other]
        t = 2 * cosine / (1 + cosine)
        assert stock_share(trained, start) == pytest.approx(1 - t, abs=1e-12)
        (merged, _) = interpolated([{"w": each} for each in trained], {"w": start}, None)
        assert torch.allclose(merged["w"], start + t * (one + other) / 2, atol=1e-12)
    one[0, 0], other[0, 0] = 0, -1
    assert stock_share([start + one, start + other], start) == 1.0  # one did not move
    assert stock_share([start, start], start) == 0.0
    n, moves = 4, torch.eye(4, dtype=torch.float64) + 1  # cosine 6 / 7 between each two
    assert stock_share(list(moves), torch.zeros(4)) == pytest.approx(1 - n * (6 / 7) / (1 + 3 * 6 / 7))


def test_a_share_of_the_way_is_wise_ft_and_what_the_start_lacks_stays():
    trained = {"a": torch.randn(3), "head": torch.randn(5), "count": torch.tensor(3)}
    start = {"a": torch.randn(3), "head": torch.randn(7)}
    merged, found = interpolated([trained], start, 0.6)
    assert found == 1
    assert torch.allclose(merged["a"], 0.4 * trained["a"] + 0.6 * start["a"])
    assert torch.equal(merged["head"], trained["head"])
    for wrong in ({"by": 1.5}, {"by": None}, {"by": 0.5, "start": {}}):
        with pytest.raises(ewa.EwavitError):
            interpolated([trained], **{"start": start} | wrong)


@pytest.mark.parametrize("experts", [1, 2])
def test_a_run_is_exported_towards_its_start(tmp_path, experts):
    start = train(recipe(tmp_path, "start", limit=64, epochs=1, experts=1)).model_file
    more = {"initial_checkpoint": str(start), "limit": 256, "epochs": 2, "share_rate": 0.0}
    runs = [train(recipe(tmp_path, f"run{s}", experts=experts, seed=s, **more)).run for s in (1, 2)]
    plain, first = load_file(runs[0] / "model.safetensors"), load_file(start)
    to = tmp_path / "moved.safetensors"
    assert "before that move the run had" in export(runs[0], to, toward=start, by="0.6")
    for key, value in load_file(to).items():
        assert torch.allclose(value, 0.4 * plain[key] + 0.6 * first[key], atol=1e-6)
    if experts == 1:
        with pytest.raises(ewa.EwavitError, match="give runs of other seeds too"):
            export(runs[0], to, toward=start, by="stock")
    said = export(runs[0], to, toward=start, by="stock", more=runs[1:] if experts == 1 else ())
    assert "Model Stock" in said
    moved = load_file(to)
    key = "blocks.1.mlp.fc1.weight"
    if experts == 2:
        stacked = load_file(runs[0] / "checkpoint" / "model.safetensors")[
            "blocks.1.mlp.experts.ffn.fc1.weight"
        ]
        share = stock_share(list(stacked), first[key])
        assert 0 < share < 1
        assert torch.allclose(moved[key], stacked.mean(0).lerp(first[key], share), atol=1e-6)
        assert torch.allclose(moved["blocks.0.mlp.fc1.weight"], plain["blocks.0.mlp.fc1.weight"], atol=1e-6)
    else:
        both = [plain[key], load_file(runs[1] / "model.safetensors")[key]]
        expected = (both[0] + both[1]) / 2
        assert torch.allclose(moved[key], expected.lerp(first[key], stock_share(both, first[key])), atol=1e-6)


def test_the_arm_wise_ft_deploys_the_way_back(tmp_path):
    start = train(recipe(tmp_path, "start", limit=64, epochs=1, experts=1)).model_file
    settings = BUILT_IN["wise-ft"](Recipe()) | {"limit": 64, "epochs": 2, "initial_checkpoint": str(start)}
    run = train(recipe(tmp_path, "run", **settings)).run
    last, first = load_file(run / "model.safetensors"), load_file(start)
    for key, value in load_file(run / "model-average.safetensors").items():
        expected = last[key] if key.startswith("head.") else (last[key] + first[key]) / 2
        assert torch.allclose(value, expected, atol=1e-6)
    with pytest.raises(ewa.EwavitError, match="here they are random"):
        train(recipe(tmp_path, "random", toward_start=0.5))


# ---------------------------------------------------------------- a branch in training


def cca_slowly(x: torch.Tensor, temperature: float) -> torch.Tensor:
    """Channel-covariance attention as loops over images and channels, x: (batch, tokens, dim)."""
    result = torch.empty_like(x)
    for image, tokens in enumerate(x):
        count, dim = tokens.shape
        means = [sum(tokens[t, c] for t in range(count)) / count for c in range(dim)]
        for i in range(dim):
            covariances = [
                sum((tokens[t, i] - means[i]) * (tokens[t, j] - means[j]) for t in range(count)) / count
                for j in range(dim)
            ]
            weights = torch.stack(covariances).div(temperature).softmax(0)
            result[image, :, i] = sum(weights[j] * tokens[:, j] for j in range(dim))
    return result


def test_channel_covariance_attention_equals_its_slow_twin():
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    attention = ewa.ChannelCovariance(temperature=0.7)
    expected = cca_slowly(x, 0.7)
    assert torch.allclose(attention(x), expected, atol=1e-12)
    assert torch.allclose(attention(x[0]), expected[0], atol=1e-12)
    grid = x.mT.reshape(2, 4, 5, 1)
    assert torch.allclose(attention(grid, channels_first=True), expected.mT.reshape(grid.shape), atol=1e-12)
    assert torch.autograd.gradcheck(attention, x.requires_grad_())


@pytest.mark.parametrize("first", ["expand", "branch", "no experts"])
def test_a_branch_mixes_in_training_and_is_gone_in_eval_and_collapse(first):
    model = randomised(tiny_vit())
    dense = copy.deepcopy(model)
    steps = {
        "expand": lambda: ewa.expand(model, 2, select="all"),
        "branch": lambda: ewa.add_branch(model, ewa.ChannelCovariance(share=0.3)),
    }
    for step in {"expand": ["expand", "branch"], "branch": ["branch", "expand"]}.get(first, ["branch"]):
        steps[step]()
    x = images()
    tokens = torch.randn(2, 5, 16)
    place = model.blocks[1].mlp
    plain = dense.blocks[1].mlp(tokens)
    assert torch.allclose(model.eval()(x), dense.eval()(x), atol=1e-5)
    expected = plain.lerp(cca_slowly(tokens, 1.0), 0.3)
    assert torch.allclose(model.train().blocks[1].mlp(tokens), expected, atol=1e-5)
    assert torch.allclose(place(tokens), expected, atol=1e-5)
    assert ewa.dense_state_dict(model).keys() == dense.state_dict().keys()
    assert branch_shares(model) == pytest.approx({"blocks.0.mlp": 0.3, "blocks.1.mlp": 0.3})
    copied = copy.deepcopy(model)  # an EMA has gates of its own
    limit_branches_(copied, 0.0)
    assert torch.allclose(copied.blocks[1].mlp(tokens), plain, atol=1e-5)
    assert torch.allclose(model.blocks[1].mlp(tokens), expected, atol=1e-5)
    assert ewa.collapse_gap(copied, x).output < 1e-5 < 1e-2 < ewa.collapse_gap(model, x).output
    with pytest.warns(UserWarning, match=r"2 of 2 branches still had weight, blocks\.\d\.mlp 0\.3"):
        ewa.collapse(model)
    assert torch.allclose(model.blocks[1].mlp(tokens), plain, atol=1e-5)
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]


def test_the_gate_of_a_branch_learns_and_stays_below_its_limit():
    model = ewa.add_branch(randomised(tiny_vit()).double(), ewa.ChannelCovariance(), ["blocks.1.mlp"])
    share = model.ewavit_branches["0"].share
    ffn, tokens = model.blocks[1].mlp, torch.randn(1, 4, 16, dtype=torch.float64)

    def loss(value: torch.Tensor) -> torch.Tensor:
        output = torch.func.functional_call(model, {"ewavit_branches.0.share": value}, (images(2).double(),))
        return output.square().sum()

    assert torch.autograd.gradcheck(
        lambda value: loss_at(loss, value), share.detach().clone().requires_grad_()
    )
    ffn(tokens).sum().backward()
    assert float(share.grad.abs()) > 0
    limit_branches_(model, 0.25)
    assert branch_shares(model) == {"blocks.1.mlp": 0.25}
    for wrong in ({"names": ["blocks.7.mlp"]}, {}):
        with pytest.raises(ewa.EwavitError):
            ewa.add_branch(tiny_vit() if wrong else model, ewa.ChannelCovariance(), **wrong)
    with pytest.raises(ewa.EwavitError, match="has branches"):
        ewa.expand(model, 2, select="model")
    with pytest.raises(ewa.EwavitError, match="out of range"):
        ewa.ChannelCovariance(temperature=0)


def test_a_run_says_which_weight_a_branch_has_at_the_end_and_what_it_changes(tmp_path, capsys):
    settings = {"limit": 64, "epochs": 1, "experts": 1, "branch": "cca"}
    run = train(recipe(tmp_path, "falls", **settings)).run
    assert "still has weight" not in capsys.readouterr().out
    row = list(csv.DictReader((run / "summary.csv").open()))[-1]
    assert float(row["branch/blocks.0.mlp"]) == 0.0
    train(recipe(tmp_path, "lags", model_ema=True, **settings))
    assert re.search(r"weight 0\.\d+: without it the output differs by \d", capsys.readouterr().out)


def loss_at(loss, value):
    torch.manual_seed(1)
    return loss(value)


def test_a_block_diagonal_ffn_is_a_dense_one_with_zeros_at_equal_flops():
    from torch.utils.flop_counter import FlopCounterMode

    dense, grouped = tiny_vit(), group_ffns(tiny_vit(), 2)
    tokens = torch.randn(3, 5, 16)
    mlp = grouped.blocks[0].mlp
    layers = [torch.block_diag(*layer.weight.chunk(2)) for layer in (mlp.fc1, mlp.fc2)]
    hidden = torch.nn.functional.linear(tokens, layers[0], mlp.fc1.bias)
    expected = torch.nn.functional.linear(mlp.act(hidden), layers[1], mlp.fc2.bias)
    assert layers[0].shape == (128, 16)
    assert torch.allclose(mlp(tokens), expected, atol=1e-5)
    counts = []
    for model in (dense, grouped):
        with FlopCounterMode(display=False) as counter:
            model.blocks[0].mlp(tokens)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert [ffn.unit for ffn in ewa.find_ffns(grouped)] == ["token", "token"]
    for wrong in (3, 5):
        with pytest.raises(ewa.EwavitError, match="does not divide the 16 channels"):
            group_ffns(tiny_vit(), wrong)
    with pytest.raises(ewa.EwavitError, match="--pretrained True does not work with --ffn-groups 2"):
        Recipe(pretrained=True, ffn_groups=2)


# ---------------------------------------------------------------- fused and hybrid experts


def test_fused_experts_compute_one_ffn_with_weighted_weights_in_both_modes():
    model = ewa.expand(randomised(tiny_vit()), 3, select="all", router=Fusion())
    moe = separated(model).blocks[1].mlp
    with torch.no_grad():
        moe.dispatcher.fusion.copy_(torch.tensor([0.3, -1.0, 2.0]))
    shares = torch.tensor([0.3, -1.0, 2.0]).softmax(0)
    plain = copy.deepcopy(moe.experts.copies[0])
    for name, parameter in plain.named_parameters():
        each = [expert.get_parameter(name) for expert in moe.experts.copies]
        parameter.data = sum(share * value for share, value in zip(shares, each, strict=True)).detach()
    tokens = torch.randn(2, 5, 16)
    for mode in (True, False):
        assert torch.allclose(moe.train(mode)(tokens), plain(tokens), atol=1e-5)
    moe(tokens).square().sum().backward()
    assert float(moe.dispatcher.fusion.grad.abs().sum()) > 0
    model.eval()
    x = images()
    expected = model(x)
    dense = tiny_vit().eval()
    dense.load_state_dict(ewa.dense_state_dict(model))
    assert torch.allclose(dense(x), expected, atol=1e-5)
    assert torch.allclose(ewa.collapse(model)(x), expected, atol=1e-5)


def test_fused_experts_start_as_the_ffn_and_apart():
    dense = randomised(tiny_vit()).eval()
    model = ewa.expand(copy.deepcopy(dense), 4, router=Fusion(spread=0.2))
    x = images()
    assert torch.allclose(model(x), dense(x), atol=1e-5)
    assert all(0.05 < spread < 0.4 for spread in ewa.expert_spread(model).values())


def test_hybrid_experts_are_mixed_per_token_and_the_general_one_is_frozen():
    dense = randomised(tiny_vit()).eval()
    model = ewa.expand(copy.deepcopy(dense), select="all", router=ewa.core.Hybrid(specialists=2))
    x, tokens = images(), torch.randn(2, 5, 16)
    assert torch.allclose(model(x), dense(x), atol=1e-5)  # at the start all experts are the FFN
    moe = model.blocks[1].mlp
    assert moe.num_experts == 3
    general = copy.deepcopy(moe.experts.copies[0].state_dict())
    averaging = ewa.ExpertAveraging(model, 0.0)
    optimizer = torch.optim.AdamW(ewa.param_groups(model), 0.01)
    averaging.attach(optimizer)
    for _ in range(2):
        model.train()(x).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(general[key], value) for key, value in moe.experts.copies[0].state_dict().items())
    assert float(moe.dispatcher.weight.detach().abs().sum()) > 0
    gates = (tokens @ moe.dispatcher.weight.T).softmax(-1)
    expected = sum(gates[..., i, None] * expert(tokens) for i, expert in enumerate(moe.experts.copies))
    for mode in (False, True):
        assert torch.allclose(moe.train(mode)(tokens), expected, atol=1e-5)
    shares = moe.dispatcher.weights
    assert float(shares.sum()) == pytest.approx(1)
    key = "blocks.1.mlp.fc1.weight"
    mean = sum(share * expert.fc1.weight for share, expert in zip(shares, moe.experts.copies, strict=True))
    assert torch.allclose(ewa.dense_state_dict(model)[key], mean, atol=1e-6)
    assert ewa.collapse_gap(model, x).output > 0
    with pytest.raises(ewa.EwavitError, match="share_rate=0"):
        ewa.average_experts_(model, 0.1)


def test_what_fused_and_hybrid_experts_cannot_be_is_refused():
    for options in (
        {"num_experts": 4, "router": ewa.core.Hybrid()},
        {"router": Fusion(), "experts": "stacked"},
        {"router": Fusion(), "unit": "image"},
    ):
        with pytest.raises(ewa.EwavitError):
            ewa.expand(tiny_vit(), **options)
    with pytest.raises(ewa.EwavitError, match="would move the frozen expert"):
        Recipe(router="hybrid")


def test_a_hybrid_run_keeps_its_mixture_and_collapses_if_asked(tmp_path):
    start = train(recipe(tmp_path, "start", limit=64, epochs=1, experts=1)).model_file
    settings = BUILT_IN["hybrid"](Recipe()) | {"limit": 128, "initial_checkpoint": str(start)}
    run = train(recipe(tmp_path, "run", **settings)).run
    model = ewa.load(run)
    assert [type(moe.dispatcher).__name__ for moe in moe_layers(model).values()] == ["Gate"]
    first = load_file(start)
    frozen = model.blocks[1].mlp.experts.copies[0].fc1.weight
    assert torch.equal(frozen, first["blocks.1.mlp.fc1.weight"])
    with pytest.raises(ewa.EwavitError, match="--collapse"):
        export(run, tmp_path / "plain.safetensors")
    assert "with its router" in export(run, tmp_path / "plain.safetensors", mean_expert=True)
    with pytest.raises(ewa.EwavitError, match="here they are random"):
        train(recipe(tmp_path, "random", **settings | {"initial_checkpoint": None}))


# ---------------------------------------------------------------- the old task


def test_neighbour_accuracy_is_a_vote_of_the_others():
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 2.0], [0.1, 5.0], [0.02, -1.0]])
    assert neighbour_accuracy(features, torch.tensor([0, 0, 1, 1, 1]), k=1) == 80.0
    assert neighbour_accuracy(features[:4], torch.tensor([0, 1, 0, 1]), k=1) == 0.0
    # With all others as neighbours the nearer two outweigh the farther three.
    assert neighbour_accuracy(features[:4], torch.tensor([0, 0, 1, 1]), k=50) == 100.0


@pytest.mark.parametrize("more", [{"experts": 1, "swa": 0.5}, {"select": "model", "experts": 2}])
def test_a_run_reports_what_its_features_retain(tmp_path, more):
    settings = {"limit": 64, "epochs": 2, "retain": "fashion-mnist-mini", "share_rate": 0.0} | more
    run = train(recipe(tmp_path, "run", **settings)).run
    row = list(csv.DictReader((run / "summary.csv").open()))[-1]
    deployed = {"eval_retained": "model.safetensors"}
    if "swa" in more:
        deployed["average_retained"] = "model-average.safetensors"
    for column, file in deployed.items():
        model, card = load_model(run / file)
        data = open_data("fashion-mnist-mini", DataOptions(batch_size=128, **card.preparation))
        inputs, labels = (torch.cat(parts) for parts in zip(*data.eval_batches(), strict=True))
        with torch.no_grad():
            features = model.forward_head(model.forward_features(inputs), pre_logits=True)
        assert float(row[column]) == pytest.approx(neighbour_accuracy(features, labels), abs=0.2)
        assert float(row[column]) > 30


def test_a_comparison_draws_the_new_task_against_the_old_one():
    comparison = make_comparison(arms=("dense", "ewa"), seeds=2, epochs=2)
    assert two_axes(comparison) is None
    arms = tuple(
        replace(
            runs,
            runs=tuple(replace(run, curve=(replace(run.curve[-1], retained=50.0),)) for run in runs.runs),
        )
        for runs in comparison.arms
    )
    assert "old task" in str(two_axes(replace(comparison, arms=arms)))


def test_an_old_task_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ewa.EwavitError, match="--retain solids: img_size is for images"):
        train(recipe(tmp_path, "clouds", retain="solids"))


# ---------------------------------------------------------------- arms


ARMS = ["lofi", "cca", "ewa+cca", "scheme", "fused"]
FROM_A_START = ["hybrid", "wise-ft"]  # they need first weights


@pytest.mark.parametrize("arm", ARMS + FROM_A_START)
def test_an_arm_stopped_within_an_epoch_resumes_exactly(tmp_path, monkeypatch, arm):
    base = {"limit": 128, "experts": 2}
    if arm in FROM_A_START:
        start = train(recipe(tmp_path, "start", limit=64, epochs=1, experts=1)).model_file
        base["initial_checkpoint"] = str(start)
    settings = base | BUILT_IN[arm](Recipe(**base))
    train(recipe(tmp_path, "whole", **settings))
    with monkeypatch.context() as patched:
        stop_after(patched, 6)
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, "stopped", **settings))
    if arm in FROM_A_START:
        start.unlink()  # a checkpoint holds all that is left of it
    resume(tmp_path / "stopped")
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")
    averages = [tmp_path / name / "model-average.safetensors" for name in ("whole", "stopped")]
    assert averages[0].exists() == (arm == "wise-ft")
    if averages[0].exists():
        first, second = map(load_file, averages)
        assert all(torch.equal(first[key], second[key]) for key in first)
    model, _ = load_model(tmp_path / "whole" / "checkpoint")
    deployed, _ = load_model(tmp_path / "whole")
    x = torch.randn(2, 1, 28, 28)
    assert torch.allclose(model(x), deployed(x), atol=1e-5)
    checkpoint, file = tmp_path / "whole" / "checkpoint", tmp_path / "out.safetensors"
    routed = arm == "hybrid"  # deployed as it is
    assert "logits equal" in export(checkpoint, file, mean_expert=routed)
