"""Expert spread and collapse gap."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ewavit as ewa
from ewavit.core import MoE, StackedExperts
from small_models import MlpNet, images, separated, tiny_vit, tokens

both_kinds = pytest.mark.parametrize("kind", ["stacked", "separate"])


@both_kinds
def test_spread_of_copies_is_zero(kind):
    # Four copies: their mean is exact.
    spread = ewa.expert_spread(ewa.expand(MlpNet(), 4, experts=kind))
    assert spread == {"blocks.1.mlp": 0.0, "blocks.3.mlp": 0.0}


@both_kinds
def test_spread_equals_a_computation_by_hand(kind):
    model = ewa.expand(MlpNet(), 3, experts=kind)
    separated(model.blocks[3])
    spread = ewa.expert_spread(model)
    flat = torch.stack(
        [
            torch.cat(
                [values[e].flatten() for _, values in model.blocks[3].mlp.experts.values_by_parameter()]
            )
            for e in range(3)
        ]
    )
    mean = flat.mean(0)
    expected = ((flat - mean).norm(dim=1) ** 2).mean().sqrt() / mean.norm()
    assert spread["blocks.3.mlp"] == pytest.approx(expected.item(), rel=1e-5)
    assert spread["blocks.1.mlp"] < 1e-6


def test_spread_of_two_opposite_experts_by_numbers():
    layer = nn.Linear(2, 1, bias=False)
    experts = StackedExperts(layer, 2)
    with torch.no_grad():
        experts.ffn.weight.copy_(torch.tensor([[[3.0, 5.0]], [[3.0, 3.0]]]))  # mean (3, 4), 1 away from it
    assert ewa.expert_spread(nn.Sequential(MoE(experts))) == {"0": pytest.approx(1 / 5)}


@pytest.mark.parametrize("share_rate", [0.1, 0.5])
def test_averaging_shrinks_the_spread_by_its_pull(share_rate):
    model = separated(ewa.expand(MlpNet(), 4).double())
    before = ewa.expert_spread(model)
    ewa.average_experts_(model, share_rate)
    for layer, spread in ewa.expert_spread(model).items():
        assert spread == pytest.approx((1 - share_rate * 4 / 3) * before[layer], rel=1e-5)


@both_kinds
def test_collapse_gap_of_copies_is_zero(kind):
    model = ewa.expand(tiny_vit(drop_rate=0.5, proj_drop_rate=0.5), 4, experts=kind)
    gap = ewa.collapse_gap(model, images(3), torch.tensor([0, 1, 2]))
    assert gap.output < 1e-5
    assert abs(gap.loss) < 1e-5


@both_kinds
def test_collapse_gap_compares_the_mixture_with_the_collapsed_model_without_dropout(kind):
    model = separated(ewa.expand(tiny_vit(proj_drop_rate=0.5), 4, experts=kind))
    x, y = images(3), torch.tensor([0, 1, 2])
    torch.manual_seed(1)
    gap = ewa.collapse_gap(model, x, y)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    torch.manual_seed(1)
    mixture = model.train()(x)
    collapsed = ewa.collapse(model).eval()(x)
    assert gap.output == pytest.approx(((mixture - collapsed).norm() / collapsed.norm()).item(), rel=1e-4)
    assert gap.output > 1e-3
    assert gap.loss_mixture == pytest.approx(F.cross_entropy(mixture, y).item(), rel=1e-4)
    assert gap.loss_collapsed == pytest.approx(F.cross_entropy(collapsed, y).item(), rel=1e-4)


def test_the_loss_gap_is_negative_when_collapsing_helps():
    # Experts at 3 and -1, mean 1, which is what the targets ask for.
    experts = StackedExperts(nn.Linear(1, 1, bias=False), 2)
    with torch.no_grad():
        experts.ffn.weight.copy_(torch.tensor([[[3.0]], [[-1.0]]]))
    model = nn.Sequential(MoE(experts))
    x = torch.ones(4, 1)
    gap = ewa.collapse_gap(model, x, x, criterion=F.mse_loss)
    assert gap.loss_collapsed == 0
    assert gap.loss_mixture == 4
    assert gap.loss == -4
    concave = ewa.collapse_gap(model, x, x, criterion=lambda output, target: -F.mse_loss(output, target))
    assert concave.loss == 4


def test_without_targets_only_outputs_are_compared():
    gap = ewa.collapse_gap(separated(ewa.expand(MlpNet(), 4)), tokens())
    assert gap.output > 0
    assert gap.loss_mixture is gap.loss_collapsed is gap.loss is None


@pytest.mark.parametrize("fails", [False, True])
def test_collapse_gap_restores_every_mode_and_leaves_no_gradient(fails):
    model = separated(ewa.expand(MlpNet(), 4, select="all"))
    model.blocks[0].eval()
    model.blocks[2].mlp.eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if fails:
        with pytest.raises(RuntimeError):
            ewa.collapse_gap(model, torch.randn(2, 5, 3))
    else:
        ewa.collapse_gap(model, tokens(), torch.tensor([0, 1, 2]))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert len(set(before.values())) == 2
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_collapse_gap_understands_outputs_of_transformers():
    class Wrapped(nn.Module):
        def __init__(self, wrap) -> None:
            super().__init__()
            self.model, self.wrap = ewa.expand(MlpNet(), 4), wrap

        def forward(self, x):
            return self.wrap(self.model(x))

    class Output:
        def __init__(self, logits) -> None:
            self.logits = logits

    x = tokens()
    for wrap in (Output, lambda logits: (logits, None)):
        assert ewa.collapse_gap(separated(Wrapped(wrap)), x).output > 0


def test_collapse_gap_of_a_dense_model_is_refused():
    with pytest.raises(ewa.EwavitError, match="expand"):
        ewa.collapse_gap(MlpNet(), tokens())
