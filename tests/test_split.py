"""Split FFNs: two layers of a block become mixtures with one draw, and compute what one mixture would."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import ewavit as ewa
from ewavit.core import SeparateExperts, moe_layers, set_step
from ewavit.study.theory import flatness_penalty
from processes import in_processes
from small_models import DIM, MlpNet, separated

HIDDEN = 12


class SplitBlock(nn.Module):
    """The block of `MlpNet` with the layers of its FFN as children of the block itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Sequential(nn.Identity())
        self.norm = nn.LayerNorm(DIM)
        self.fc1, self.fc2 = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.attn(self.norm(x)))))


def split_net(depth: int = 4) -> MlpNet:
    model = MlpNet(depth)
    model.blocks = nn.Sequential(*[SplitBlock() for _ in range(depth)])
    return model


def in_one_module(model: nn.Module) -> dict[str, Tensor]:
    """The state of a split model under the names of a model with an `Mlp` in each block."""
    return {key.replace(".fc", ".mlp.fc"): value for key, value in model.state_dict().items()}


def pair_of_models(**settings: Any) -> tuple[nn.Module, nn.Module]:
    """A split model and the same with FFN modules, expanded, with the same experts that differ."""
    split = split_net()
    whole = MlpNet()
    whole.load_state_dict(in_one_module(split))
    for model in (split, whole):
        ewa.expand(model, 3, select="all", **settings)
        separated_alike(model)
    return split.train(), whole.train()


@torch.no_grad()
def separated_alike(model: nn.Module) -> None:
    """Move each expert by a function of its values, so that equal models stay equal."""
    for moe in moe_layers(model).values():
        for _, values in moe.experts.values_by_parameter():
            for number, value in enumerate(values):
                value.mul_(1 + 0.2 * number).add_(0.01 * number)


def gradients(model: nn.Module) -> list[Tensor]:
    """The gradients of the experts, one tensor for each plain parameter, then the others."""
    experts = [moe.experts for moe in moe_layers(model).values()]
    stacks = [torch.stack(v) for each in experts for _, v in each.values_by_parameter(lambda p: p.grad)]
    return stacks + [p.grad for name, p in model.named_parameters() if ".experts." not in name]


@pytest.mark.parametrize("unit", ["token", "image"])
@pytest.mark.parametrize("experts", ["stacked", "separate"])
def test_a_split_ffn_equals_one_mixture_of_the_whole_ffn(unit: str, experts: str) -> None:
    split, whole = pair_of_models(unit=unit, experts=experts)
    assert len(moe_layers(split)) == 2 * len(moe_layers(whole)) == 8
    x = torch.randn(7, 5, DIM)
    for step in (0, 1, 5):
        for model in (split, whole):
            model.zero_grad()
            set_step(model, step)
        results = [model(x) for model in (split, whole)]
        torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)
        for result in results:
            result.square().sum().backward()
        for mine, expected in zip(gradients(split), gradients(whole), strict=True):
            assert expected.abs().sum() > 0
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(split.eval()(x), whole.eval()(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ewa.collapse(split)(x), ewa.collapse(whole)(x), atol=1e-6, rtol=1e-6)
    assert split.state_dict().keys() == split_net().state_dict().keys()


TEXT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
WHISPER = {
    **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
       {"layers": 2, "attention_heads": 2, "ffn_dim": 32}.items()},
    **{"d_model": 16, "vocab_size": 20, "num_mel_bins": 8, "max_source_positions": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}  # fmt: skip
SIDES = {"image_size": 16, "patch_size": 8}
IDS = torch.arange(6).view(2, 3)
# A transformers model, its inputs, and the blocks that hold its FFNs.
LIBRARY: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], int]] = {
    "bert": (
        lambda: transformers.BertModel(transformers.BertConfig(**TEXT, vocab_size=20)),
        {"input_ids": IDS},
        2,
    ),
    "albert, one block called twice": (
        lambda: transformers.AlbertModel(
            transformers.AlbertConfig(**TEXT, vocab_size=20, embedding_size=8, classifier_dropout_prob=0.0)
        ),
        {"input_ids": IDS},
        1,
    ),
    "videomae": (
        lambda: transformers.VideoMAEModel(
            transformers.VideoMAEConfig(**TEXT, **SIDES, num_frames=2, tubelet_size=2)
        ),
        {"pixel_values": torch.linspace(-1, 1, 2 * 2 * 3 * 256).view(2, 2, 3, 16, 16)},
        2,
    ),
    "timesformer": (
        lambda: transformers.TimesformerModel(transformers.TimesformerConfig(**TEXT, **SIDES, num_frames=2)),
        {"pixel_values": torch.linspace(-1, 1, 2 * 2 * 3 * 256).view(2, 2, 3, 16, 16)},
        2,
    ),
    "dpt": (
        lambda: transformers.DPTModel(transformers.DPTConfig(**TEXT, **SIDES)),
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 256).view(2, 3, 16, 16)},
        2,
    ),
    "layoutlmv3": (
        lambda: transformers.LayoutLMv3Model(
            transformers.LayoutLMv3Config(
                **TEXT, vocab_size=20, coordinate_size=2, shape_size=4, input_size=32
            )
        ),
        {"input_ids": IDS, "bbox": torch.zeros(2, 3, 4, dtype=torch.long)},
        2,
    ),
    "whisper": (
        lambda: transformers.WhisperModel(transformers.WhisperConfig(**WHISPER)),
        {"input_features": torch.linspace(-1, 1, 256).view(2, 8, 16), "decoder_input_ids": IDS},
        4,
    ),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_a_split_model_of_transformers_trains_and_is_saved_as_it_was(name: str, tmp_path: Path) -> None:
    build, inputs, blocks = LIBRARY[name]
    dense = build().eval()
    keys, kinds = list(dense.state_dict()), [type(module) for module in dense.modules()]
    model = ewa.expand(copy.deepcopy(dense), 3, select="all")
    assert len(moe_layers(model)) == 2 * blocks
    assert {layer.experts for layer in ewa.summary(model).layers} == {"stacked"}

    def output() -> Tensor:
        return model(**inputs).last_hidden_state

    torch.testing.assert_close(output(), dense(**inputs).last_hidden_state, atol=1e-5, rtol=1e-5)
    optimizer = torch.optim.AdamW(ewa.param_groups(model), lr=1e-2)
    ewa.ExpertAveraging(model, 0.1).attach(optimizer)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        output().square().mean().backward()
        assert all(p.grad is not None for moe in moe_layers(model).values() for p in moe.parameters())
        optimizer.step()
    assert min(ewa.expert_spread(model).values()) > 0
    model.eval()
    with torch.no_grad():
        expected = output()
    model.save_pretrained(tmp_path / "expanded")
    assert list(ewa.collapse(model).state_dict()) == keys
    assert [type(module) for module in model.modules()] == kinds
    with torch.no_grad():
        torch.testing.assert_close(output(), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "collapsed")
    for folder in ("expanded", "collapsed"):
        loaded, report = type(model).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
        for key, value in model.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[key], value, atol=1e-6, rtol=1e-6)


@pytest.fixture
def mask2former() -> nn.Module:
    backbone = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
        out_features=[f"stage{n}" for n in (1, 2, 3, 4)],
    )  # fmt: skip
    return transformers.Mask2FormerModel(
        transformers.Mask2FormerConfig(
            backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
            encoder_feedforward_dim=32, encoder_layers=2, decoder_layers=2, num_attention_heads=2,
            dim_feedforward=32, num_queries=5,
        )
    )  # fmt: skip


def test_the_pixel_decoder_of_mask2former_is_dealt_and_its_decoder_is_refused_by_name(
    mask2former: nn.Module,
) -> None:
    found = {ffn.name: ffn for ffn in ewa.find_ffns(mask2former)}
    decoder = found["transformer_module.decoder.layers.0"]
    assert decoder.unit is None
    assert "fc1 and fc2 are in a block that needs more than tokens" in decoder.reason
    ewa.expand(mask2former, 2, select=r"decoder\.encoder")
    layers = [f"pixel_level_module.decoder.encoder.layers.{n}.fc{m}" for n in (0, 1) for m in (1, 2)]
    assert list(moe_layers(mask2former)) == layers
    mask2former(torch.randn(2, 3, 32, 32)).pixel_decoder_last_hidden_state.sum().backward()
    assert all(p.grad is not None for moe in moe_layers(mask2former).values() for p in moe.parameters())


def encoder(**settings: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("experts", ["stacked", "separate"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_of_torch_computes_with_the_mean_experts(experts: str, padded: bool) -> None:
    model = separated(ewa.expand(encoder(), 3, select="all", experts=experts)).eval()
    x = torch.randn(4, 6, 16)
    mask = torch.arange(6) >= torch.tensor([6, 5, 4, 6])[:, None] if padded else None
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=mask)
    slow = model(x, src_key_padding_mask=mask)  # with gradients torch calls the layers
    assert slow.requires_grad
    kept = slice(None) if mask is None else ~mask
    torch.testing.assert_close(fast[kept], slow[kept], atol=1e-5, rtol=1e-5)
    plain = ewa.collapse(model)
    with torch.no_grad():
        torch.testing.assert_close(plain(x, src_key_padding_mask=mask), fast, atol=1e-5, rtol=1e-5)
    assert type(plain.layers[0].linear1) is nn.Linear


def test_a_layer_of_a_pair_answers_with_its_own_attributes_and_the_mean_weight() -> None:
    model = separated(ewa.expand(encoder(bias=False), 3)).eval()
    layer = model.layers[1].linear1
    assert (layer.in_features, layer.out_features, layer.bias) == (16, 32, None)
    assert torch.equal(layer.weight, layer.collapse().weight)


def test_a_router_is_refused_for_a_split_ffn_and_dealing_images_where_the_batch_is_second() -> None:
    model = encoder()
    with pytest.raises(
        ewa.EwavitError, match=r"layers.1 computes its FFN in two layers \(linear1 and linear2\)"
    ):
        ewa.expand(model, router=ewa.TopK())
    tokens_first = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2)
    with pytest.raises(
        ewa.EwavitError, match=r"layers.1 takes \(tokens, batch, channels\).*batch_first=True"
    ):
        ewa.expand(tokens_first, unit="image")
    assert not moe_layers(model)
    assert not moe_layers(tokens_first)
    assert len(moe_layers(ewa.expand(tokens_first))) == len(moe_layers(ewa.expand(model, unit="image"))) == 2


class Between(SplitBlock):
    """Something happens between the two layers."""

    def __init__(self, something: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.something = something

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.something(self.fc1(self.attn(self.norm(x)))))


@pytest.mark.parametrize(
    ("something", "unit", "reason"),
    [
        (torch.tanh, "token", ""),
        (lambda x: x / x.norm(dim=1, keepdim=True), "image", "mixes tokens between fc1 and fc2"),
        (lambda x: x.flip(1), "image", "mixes tokens between fc1 and fc2"),
        (lambda x: x - x.mean(0, keepdim=True), None, "do not compute one FFN"),
        (lambda x: x.flip(0), None, "do not compute one FFN"),
        (lambda x: x.new_ones(x.shape), None, "do not compute one FFN"),
        (lambda x: x[..., :3], None, "in a block that needs more than tokens"),
    ],
    ids=["nothing", "norm", "order", "mean over images", "order of images", "constant", "an error"],
)
def test_what_happens_between_the_layers_is_found_by_running_the_block(
    something: Callable[[Tensor], Tensor], unit: str | None, reason: str
) -> None:
    [ffn] = ewa.find_ffns(nn.ModuleDict({"block": Between(something)}))
    assert (ffn.name, ffn.unit, ffn.pair) == ("block", unit, ("fc1", "fc2") if unit else None)
    assert reason in ffn.reason


def test_blocks_that_use_the_weights_of_their_layers_themselves_are_refused() -> None:
    class Functional(SplitBlock):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc2(F.linear(x, self.fc1.weight, self.fc1.bias).relu())

    [ffn] = ewa.find_ffns(nn.ModuleDict({"block": Functional()}))
    assert ffn.unit is None


def test_blocks_with_a_number_of_their_own_are_examined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    examined = []
    examine = ewa.core.ffn.split.examine
    monkeypatch.setattr(ewa.core.ffn.split, "examine", lambda *args: examined.append(1) or examine(*args))
    model = transformers.BertModel(transformers.BertConfig(**{**TEXT, "num_hidden_layers": 3}, vocab_size=20))
    assert len({layer.attention.self.layer_idx for layer in model.encoder.layer}) == 3
    assert [ffn.unit for ffn in ewa.find_ffns(model)] == ["token"] * 3
    assert len(examined) == 1


def deals_alike(model: nn.Module) -> bool:
    """Whether both layers of each pair draw the same partition."""
    draws = [moe.dispatcher.draw(7).slots.tolist() for moe in moe_layers(model).values()]
    return draws[::2] == draws[1::2]


@pytest.mark.parametrize("averaged", [False, True])
def test_both_layers_draw_alike_when_one_is_frozen_or_in_another_optimizer(averaged: bool) -> None:
    model = split_net(2)
    model.blocks[0].fc2.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"blocks.0.fc2 is frozen"):
        ewa.expand(model, 3, select="all")
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizers = [torch.optim.SGD(learning[::2], lr=0.01), torch.optim.AdamW(learning[1::2], lr=0.01)]
    if averaged:
        ewa.ExpertAveraging(model, 0.1).attach(*optimizers)
    before = [moe.dispatcher.draw(7).slots.tolist() for moe in moe_layers(model).values()]
    for _ in range(3):
        model(torch.randn(7, 5, DIM)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        assert deals_alike(model)
    assert before != [moe.dispatcher.draw(7).slots.tolist() for moe in moe_layers(model).values()]


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_split_model_deal_alike(twin: Callable[[nn.Module], nn.Module]) -> None:
    model = twin(ewa.expand(split_net(2), 3, select="all"))
    for step in (0, 4):
        set_step(model, step)
        assert deals_alike(model)
    first, second, *_ = moe_layers(model).values()
    assert first.dispatcher is second.dispatcher


def test_recomputed_activations_of_a_split_ffn_have_the_same_gradients() -> None:
    model, _ = pair_of_models()
    x = torch.randn(7, 5, DIM)
    found = []
    for recompute in (False, True):
        model.zero_grad()
        y = x
        for block in model.blocks:
            y = checkpoint(block, y, use_reentrant=False, preserve_rng_state=False) if recompute else block(y)
        y.square().sum().backward()
        found.append(gradients(model.blocks))
    for mine, expected in zip(*found, strict=True):
        assert torch.equal(mine, expected)


def test_files_of_a_split_model_are_collapsed_without_the_model(tmp_path: Path) -> None:
    model, _ = pair_of_models()
    save_file(model.state_dict(), tmp_path / "expanded.safetensors", ewa.expert_metadata(model))
    ewa.collapse_checkpoint(tmp_path / "expanded.safetensors", tmp_path / "plain.safetensors")
    plain = load_file(tmp_path / "plain.safetensors")
    expected = ewa.collapse(model).state_dict()
    assert plain.keys() == expected.keys()
    for key, value in plain.items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-6)


def test_the_flatness_penalty_of_a_split_ffn_is_that_of_the_whole_one() -> None:
    x = torch.randn(7, 5, DIM, dtype=torch.float64)
    penalties = [flatness_penalty(m.double(), m.eval()(x).square().mean()) for m in pair_of_models()]
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-9)


def test_a_hook_on_a_layer_survives_in_separate_experts_and_fires_once_a_call() -> None:
    model = split_net(2)
    calls: list[int] = []
    model.blocks[1].fc1.register_forward_hook(lambda *args: calls.append(1))
    ewa.expand(model, 3, select="all")
    kinds = [isinstance(moe.experts, SeparateExperts) for moe in moe_layers(model).values()]
    assert kinds == [False, False, True, True]
    model(torch.randn(7, 5, DIM))
    assert len(calls) == 1
    ewa.collapse(model)(torch.randn(7, 5, DIM))
    assert len(calls) == 2


def _replicas() -> None:
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = ewa.expand(split_net(2), select="all", placement="replicas")
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ewa.param_groups(model), lr=0.1)
    ewa.ExpertAveraging(model, 0.5).attach(optimizer)  # full averaging of two: equal after each step
    torch.manual_seed(rank)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(torch.randn(7, 5, DIM)).square().sum().backward()
        optimizer.step()
    assert max(ewa.expert_spread(model).values()) < 1e-6
    wrapped.eval()
    with torch.no_grad():
        expected = wrapped(torch.ones(2, 5, DIM))
        torch.testing.assert_close(ewa.collapse(model)(torch.ones(2, 5, DIM)), expected)


def _local_experts() -> None:
    torch.manual_seed(0)
    model = ewa.expand(split_net(2), 3, select="all")
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ewa.param_groups(model), lr=0.1)
    ewa.ExpertAveraging(model, 0.1).attach(optimizer)
    torch.manual_seed(torch.distributed.get_rank())
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(torch.randn(7, 5, DIM)).square().sum().backward()
        optimizer.step()
        assert deals_alike(model)
    for value in model.state_dict().values():
        other = value.clone()
        torch.distributed.broadcast(other, 0)
        assert torch.equal(other, value)


@pytest.mark.parametrize("check", [_replicas, _local_experts])
def test_split_ffns_train_in_two_processes(check: Callable[[], None]) -> None:
    in_processes(2, check)


def test_a_split_model_compiles_to_one_graph() -> None:
    model, _ = pair_of_models()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 5, DIM)
    for step in (0, 1):
        set_step(model, step)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-6, rtol=1e-6)
