"""From files of weights to a model: containers, prefixes, heads, sizes, and what is said about them."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import ewavit
from ewavit import EwavitError, collapse_checkpoint, expert_metadata
from ewavit.data.batches import ImageInputs
from ewavit.data.weight_files import read_weights
from ewavit.tasks.classification import Classification
from ewavit.training.export import evaluate, export
from ewavit.training.loop import train
from ewavit.training.processes import Interrupted
from runs import TINY, recipe, stop_after

VIT = "vit_tiny_patch16_224"
SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3}
CLASSES = 5


def source(name: str = VIT, classes: int = CLASSES, img_size: int | None = 32, **settings: Any) -> nn.Module:
    """A model in which no tensor has its fresh value."""
    size = {} if img_size is None else {"img_size": img_size}
    small = SMALL if name.startswith(("vit", "deit", "beit")) else {}
    model: nn.Module = timm.create_model(name, num_classes=classes, **size, **{**small, **settings})
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor).abs() + 0.5)
    return model


def built(
    file: Path,
    name: str = VIT,
    classes: int = CLASSES,
    img_size: int = 32,
    in_chans: int = 3,
    **settings: Any,
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a model with an initial checkpoint, and what is said about them, line by line."""
    said: list[str] = []
    small = SMALL if name.startswith(("vit", "deit", "beit")) else {}
    model, _ = Classification().build_model(
        name, ImageInputs(classes, in_chans, img_size), initial_checkpoint=str(file), say=said.append,
        **{**small, **settings},
    )  # fmt: skip
    (text,) = said
    lines = text.split("\n")
    assert len(lines) == 3
    return model.state_dict(), lines


def refused(file: Path, name: str = VIT, **settings: Any) -> str:
    with pytest.raises(EwavitError) as caught:
        built(file, name, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(state: Any, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    return file


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def same(found: dict[str, Tensor], state: dict[str, Tensor], but: tuple[str, ...] = ()) -> bool:
    """Whether all of the state is found, up to some prefixes."""
    keys = [key for key in state if not key.startswith(but)]
    return bool(keys) and all(torch.equal(found[key], state[key]) for key in keys)


# --- what is around the weights ---

OTHER = {"blocks.0.mlp.fc1.weight": torch.zeros(3), "head.weight": torch.zeros(3, 3)}


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value * 0 for key, value in state.items()}


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    model = source()
    model.load_state_dict(state)
    return AveragedModel(model).state_dict()


WRAPPED = {
    "alone": lambda state: state,
    "model": lambda state: {
        "model": state, "epoch": 3, "args": Namespace(lr=0.1), "optimizer": {"state": {0: OTHER}},
    },
    "state_dict": lambda state: {"state_dict": state, "arch": "vit", "metric": 7.5},
    "ema": lambda state: {"state_dict": zeros(state), "state_dict_ema": state},
    "model_ema": lambda state: {"model": zeros(state), "model_ema": state},
    "DDP": lambda state: prefixed(state, "module."),
    "compile": lambda state: prefixed(state, "_orig_mod."),
    "DDP and compile": lambda state: {"model": prefixed(state, "module._orig_mod.")},
    "blocks compiled": lambda state: {k.replace("mlp.", "_orig_mod.mlp."): v for k, v in state.items()},
    "Lightning": lambda state: {
        "state_dict": {**prefixed(state, "model."), "criterion.weight": torch.ones(5)},
        "optimizer_states": [{"state": {0: OTHER}}], "hyper_parameters": {"lr": 0.1}, "loops": {"a": 1},
        "pytorch-lightning_version": "2.5", "callbacks": {"EarlyStopping": {"best": torch.ones(())}},
    },
    "backbone": lambda state: prefixed(state, "backbone."),
    "net.encoder": lambda state: {"state_dict": prefixed(state, "net.encoder.")},
    "teacher and student": lambda state: {
        "student": prefixed(zeros(state), "module.backbone."),
        "teacher": {**prefixed(state, "backbone."), "head.mlp.0.weight": torch.ones(4, 4)},
        "dino_loss": {"center": torch.ones(1, 4)},
    },
    "target": lambda state: {
        "encoder": prefixed(zeros(state), "module."), "predictor": OTHER,
        "target_encoder": prefixed(state, "module."),
    },
    "decoder with blocks": lambda state: {
        **prefixed(state, "encoder."),
        **prefixed({key: value[:1] for key, value in state.items() if "blocks" in key}, "semantic_decoder."),
    },
    "momentum": lambda state: {
        "state_dict": {
            **prefixed(zeros(state), "module.momentum_encoder."),
            **prefixed(state, "module.base_encoder."),
        }
    },
    "averaged": averaged,
    "chunks": lambda state: {
        "teacher": {
            f"backbone.{key.replace('blocks.', 'blocks.0.', 1) if key.startswith('blocks.') else key}": value
            for key, value in state.items()
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("classes", [CLASSES, 3])
def test_weights_are_found_in_whatever_is_around_them(tmp_path, wrapped, classes):
    state = source().state_dict()
    found, lines = built(written(WRAPPED[wrapped](state), tmp_path / "file.pth"), classes=classes)
    assert same(found, state, () if classes == CLASSES else ("head.",))
    assert found["head.weight"].shape == (classes, 48)
    loaded = len(state) if classes == CLASSES else len(state) - 2
    assert lines[0].startswith(
        f"loaded {loaded} of the model's {len(state)} tensors from {tmp_path / 'file.pth'}"
    )
    assert ("new: none" in lines[1]) == (classes == CLASSES)


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.pth.tar", "a.ckpt", "a.bin", "a.safetensors", "a"])
@pytest.mark.parametrize("old", [False, True])
def test_files_of_every_kind_are_read(tmp_path, name, old):
    state, file = source().state_dict(), tmp_path / name
    if old and file.suffix != ".safetensors":
        torch.save(state, file, _use_new_zipfile_serialization=False)
    else:
        written(state, file)
    assert same(built(file)[0], state)


def test_shards_are_read_by_their_index_or_folder(tmp_path):
    state = source().state_dict()
    shards = {"model-1.safetensors": list(state)[:9], "model-2.safetensors": list(state)[9:]}
    for name, keys in shards.items():
        save_file({key: state[key] for key in keys}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    index.write_text(str({"weight_map": weight_map}).replace("'", '"'))
    assert same(built(index)[0], state)
    assert same(built(tmp_path)[0], state)


# --- heads ---

FAMILIES = (
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224",
    "beit_base_patch16_224", "convnext_atto", "levit_128s", "efficientformer_l1",
    "swin_tiny_patch4_window7_224",
)  # fmt: skip


def heads_of(name: str) -> tuple[str, ...]:
    classifier = timm.get_pretrained_cfg(name).classifier
    return tuple(f"{head}." for head in ((classifier,) if isinstance(classifier, str) else classifier))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_without_a_head_gets_a_new_one(tmp_path, name):
    size = 32 if name.startswith(("vit", "deit", "beit")) else None
    model = source(name, img_size=size)
    model.reset_classifier(0)
    state = model.state_dict()
    found, lines = built(written(state, tmp_path / "file.pth"), name, classes=7, img_size=size or 224)
    assert same(found, state)
    new = [key for key in found if key not in state]
    assert new
    assert f"loaded {len(state)} of the model's {len(found)} tensors" in lines[0]
    assert new[0] in lines[1]
    assert lines[2] == "left over: none"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("classes", [CLASSES, 7])
def test_usual_files_load_bitwise_as_timm_loads_them(tmp_path, name, classes):
    size = 32 if name.startswith(("vit", "deit", "beit")) else None
    state = source(name, img_size=size).state_dict()
    file = written(state, tmp_path / "file.pth")
    torch.manual_seed(5)
    found, _ = built(file, name, classes=classes, img_size=size or 224)
    after = torch.rand(1)
    torch.manual_seed(5)
    small = {"img_size": 32, **SMALL} if size else {}
    overlay = {"state_dict": torch.load(file), "num_classes": CLASSES}
    twin = timm.create_model(
        name, pretrained=True, num_classes=CLASSES, pretrained_cfg_overlay=overlay, **small
    )
    if classes != CLASSES:
        twin.reset_classifier(classes)
    assert same(found, twin.state_dict())
    assert torch.equal(after, torch.rand(1))
    assert same(found, state, () if classes == CLASSES else (*heads_of(name), "head.bn", "head_dist.bn"))


def test_one_head_of_two_makes_both_new(tmp_path):
    name = "deit_tiny_distilled_patch16_224"
    state = source(name).state_dict()
    body = {key: value for key, value in state.items() if not key.startswith("head_dist")}
    found, lines = built(written(body, tmp_path / "file.pth"), name)
    assert same(found, state, ("head",))
    assert not torch.equal(found["head.weight"], state["head.weight"])
    assert lines[1].endswith("new: head.weight, head.bias, head_dist.weight, head_dist.bias")
    assert lines[2] == "left over: head 2"


@pytest.mark.parametrize("shape", [(5, 96), (4, 7), (65,)])
def test_a_head_of_another_width_is_left_over(tmp_path, shape):
    state = source().state_dict() | {"head.weight": torch.ones(shape)}
    found, lines = built(written(state, tmp_path / "file.pth"))
    assert same(found, state, ("head.",))
    assert lines[1:] == ["resized: none; new: head.weight, head.bias", "left over: head 2"]


# --- bodies ---


def test_an_mae_dump_leaves_its_decoder_over(tmp_path):
    state = source(classes=0).state_dict()
    rest = {
        "mask_token": torch.ones(1, 1, 48), "decoder_pos_embed": torch.ones(1, 5, 32),
        "decoder_embed.weight": torch.ones(32, 48), "decoder_blocks.0.norm1.weight": torch.ones(32),
        "decoder_blocks.0.norm1.bias": torch.ones(32), "decoder_norm.weight": torch.ones(32),
        "decoder_pred.weight": torch.ones(8, 32),
    }  # fmt: skip
    found, lines = built(written({"model": state | rest}, tmp_path / "mae.pth"))
    assert same(found, state)
    assert lines == [
        f"loaded 30 of the model's 32 tensors from {tmp_path / 'mae.pth'} (its keys under model)",
        "resized: none; new: head.weight, head.bias",
        "left over: decoder_blocks 2, mask_token, decoder_pos_embed, decoder_embed and 2 more",
    ]


@pytest.mark.parametrize("pools", [("token", "avg"), ("avg", "token")])
def test_the_last_norm_is_loaded_by_whatever_name(tmp_path, pools):
    state = source(global_pool=pools[0]).state_dict()
    found, lines = built(written(state, tmp_path / "file.pth"), global_pool=pools[1])
    names = ("norm.", "fc_norm.") if pools[0] == "token" else ("fc_norm.", "norm.")
    assert same(found, state, (names[0],))
    assert torch.equal(found[f"{names[1]}weight"], state[f"{names[0]}weight"])
    assert f"({names[0][:-1]} as {names[1][:-1]})" in lines[0]


@pytest.mark.parametrize("prefix", ["", "model.backbone."])
def test_sizes_and_channels_change_as_in_timm_and_are_said(tmp_path, prefix):
    state = source(img_size=64).state_dict()
    file = written(prefixed(state, prefix), tmp_path / "file.pth")
    found, lines = built(file, img_size=48, in_chans=1, patch_size=8)
    twin = timm.create_model(
        VIT, pretrained=True, num_classes=CLASSES, img_size=48, in_chans=1, patch_size=8, **SMALL,
        pretrained_cfg_overlay={"state_dict": dict(state), "num_classes": CLASSES},
    )  # fmt: skip
    assert same(found, twin.state_dict())
    assert lines[1] == (
        "resized: pos_embed (1, 17, 48) -> (1, 37, 48), "
        "patch_embed.proj.weight (48, 3, 16, 16) -> (48, 1, 8, 8); new: none"
    )


def test_names_that_timm_knows_are_converted(tmp_path):
    name = "vit_small_patch14_reg4_dinov2"
    model = source(name, classes=0, img_size=28, init_values=1.0)
    state = model.state_dict()
    stored = {key: value for key, value in state.items() if key != "reg_token"}
    stored["register_tokens"] = state["reg_token"]
    stored["pos_embed"] = torch.cat([torch.zeros(1, 1, 48), state["pos_embed"]], 1)
    stored["mask_token"] = torch.ones(1, 48)
    file = written({"teacher": prefixed(stored, "backbone.")}, tmp_path / "dino.pth")
    found, lines = built(file, name, img_size=28, init_values=1.0)
    assert same(found, state)
    assert "names converted by timm" in lines[0]


# --- what is refused ---


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: source(depth=3).state_dict(), ["the model lacks blocks.2.norm1.weight", "and 8 more"]),
        (lambda: source(depth=1).state_dict(), ["it lacks blocks.1.norm1.weight", "and 8 more"]),
        (lambda: source(embed_dim=24).state_dict(), ["cls_token is (1, 1, 24), the model's (1, 1, 48)"]),
        (lambda: source("deit_tiny_distilled_patch16_224").state_dict(), ["the model lacks dist_token"]),
        (lambda: source(global_pool="avg", class_token=False).state_dict(), ["it lacks cls_token"]),
        (lambda: source(init_values=1.0).state_dict(), ["the model lacks blocks.0.ls1.gamma"]),
        (lambda: nn.Linear(3, 3).state_dict(), ["none of the model's names is in it", "it has weight, bias"]),
        (lambda: {}, ["none of the model's names is in it"]),
    ],
)
def test_another_models_weights_are_refused_with_the_keys_names(tmp_path, made, words):
    message = refused(written({"state_dict": made()}, tmp_path / "other.pth"))
    for word in [*words, "other.pth", "--model-kwargs"]:
        assert word in message


@pytest.mark.parametrize("model", ["vit", "deit"])
def test_files_with_the_names_of_transformers_are_refused_with_what_helps(tmp_path, model):
    state = {f"{model}.embeddings.cls_token": torch.zeros(1, 1, 48), "classifier.bias": torch.zeros(3)}
    assert "these are transformers' names" in refused(written(state, tmp_path / "other.pth"))


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 no zip"])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_damaged_files_are_named(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    assert f"{tmp_path / name} cannot be read as weights" in refused(tmp_path / name)
    assert "no file" in refused(tmp_path / "nowhere" / name)
    assert "holds no model.safetensors" in refused(tmp_path)


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("this must not be printed",)


def test_a_file_that_could_run_code_is_refused_with_the_reason(tmp_path, capsys):
    file = written({"model": source().state_dict(), "extra": Harmful()}, tmp_path / "file.pth")
    assert "beside tensors it holds builtins.print, which could run code" in refused(file)
    assert "printed" not in capsys.readouterr().out


# --- experts, runs, other commands ---


def expanded(unit: str = "token") -> tuple[nn.Module, dict[str, Tensor]]:
    model = ewavit.expand(source(), 3, select="all", unit=unit)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return model, state


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_experts_become_their_mean(tmp_path, name):
    model, state = expanded()
    file = written(state, tmp_path / name)
    assert same(built(file)[0], ewavit.collapse(model).state_dict())


def test_a_routed_mixture_is_refused_with_the_reason(tmp_path):
    model = ewavit.expand(source(), 3, select="all", router=ewavit.TopK())
    save_file(model.state_dict(), tmp_path / "a.safetensors", expert_metadata(model))
    assert "is a routed mixture" in refused(tmp_path / "a.safetensors")


def test_a_runs_folder_gives_its_plain_model_finished_or_not(tmp_path, monkeypatch, capsys):
    done = train(recipe(tmp_path, "done", epochs=1))
    capsys.readouterr()
    train(recipe(tmp_path, "next", epochs=1, lr=1e-12, initial_checkpoint=str(done.run)))
    weights = load_file(tmp_path / "done" / "model.safetensors")
    said = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(said) if line.startswith("loaded"))
    assert said[first : first + 3] == [
        f"loaded {len(weights)} of the model's {len(weights)} tensors from {done.run}",
        "resized: none; new: none",
        "left over: none",
    ]
    found = load_file(tmp_path / "next" / "model.safetensors")
    assert all(torch.allclose(found[key], weights[key], atol=1e-6) for key in weights)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, "stopped"))
    stopped = tmp_path / "stopped" / "checkpoint" / "model.safetensors"
    collapse_checkpoint(stopped, tmp_path / "plain.safetensors")
    assert same(dict(read_weights(tmp_path / "stopped")), load_file(tmp_path / "plain.safetensors"))
    assert same(dict(read_weights(stopped.parent)), load_file(tmp_path / "plain.safetensors"))


@pytest.mark.parametrize("name", ["a.pth.tar", "a.ckpt", "a.safetensors"])
@pytest.mark.parametrize("old", [False, True])
def test_commands_for_safetensors_say_that_a_torch_file_is_none(tmp_path, name, old):
    torch.save({"state_dict": expanded()[1]}, tmp_path / name, _use_new_zipfile_serialization=not old)
    for call in (
        lambda: collapse_checkpoint(tmp_path / name, tmp_path / "plain.safetensors"),
        lambda: evaluate(tmp_path / name),
        lambda: export(tmp_path / name, tmp_path / "plain.safetensors"),
        lambda: export(tmp_path / name, tmp_path / "plain.onnx"),
    ):
        with pytest.raises(EwavitError, match=f"{name} is a file of torch.save"):
            call()
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_file_of_the_tiny_recipe_is_said_once(tmp_path, capsys):
    kwargs = dict(part.split("=") for part in TINY["model_kwargs"].split(","))  # type: ignore[attr-defined]
    settings = {key: int(value) for key, value in kwargs.items()}
    model = timm.create_model(VIT, img_size=28, in_chans=1, num_classes=7, **settings)
    file = written({"teacher": prefixed(model.state_dict(), "backbone.")}, tmp_path / "file.ckpt")
    train(recipe(tmp_path, "tuned", initial_checkpoint=str(file), epochs=1))
    said = capsys.readouterr().out
    assert said.count("its keys under teacher.backbone") == 1
    assert "new: head.weight, head.bias\nleft over: head 2\n" in said
