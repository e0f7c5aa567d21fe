"""`Recipe`: every setting of a training run, typed, with timm's names; the command line and YAML fill it."""

from __future__ import annotations

import ast
import math
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ewavit.core.averaging import check_share_rate
from ewavit.core.moe import Unit
from ewavit.core.routing import TopK
from ewavit.core.surgery import Placement
from ewavit.errors import EwavitError


def _option(default: Any, help_text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True)
class Recipe:
    """The settings of one run. Names and defaults are those of timm's train.py where timm has the thing,
    but for the four that suit a ViT rather than a ResNet: opt, lr, weight_decay and amp_dtype.
    """

    model: str | None = _option(
        None, "any timm model, or a point transformer; without it a small one that fits the data"
    )
    model_kwargs: str = _option("", "key=value,key=value for the model, e.g. patch_size=4,depth=6")
    pretrained: bool = _option(False, "start from timm's pretrained weights (fetched by timm)")
    initial_checkpoint: str | None = _option(
        None, "start from this file of the same model; a new head if needed"
    )

    data: str = _option(
        "fashion-mnist-mini",
        "bundled set (also solids), folder, CIFAR or Tiny-ImageNet path, timm spec, modelnet10:PATH, ...",
    )
    data_dir: str | None = _option(None, "root folder for timm's data specs (torch/..., hfds/..., wds/...)")
    train_split: str = _option("train", "name of the training split of a timm data spec or folder")
    val_split: str = _option("validation", "name of the evaluation split of a timm data spec or folder")
    img_size: int | None = _option(None, "image side in pixels; follows the data")
    num_points: int | None = _option(None, "points per cloud; 1024, or 2048 for parts")
    limit: int | None = _option(None, "use the first N training images")
    holdout: float = _option(
        0.0, "hold out this share of the training images and evaluate on it, not on the test images"
    )
    workers: int = _option(4, "processes that read images; data kept in memory needs none")
    skip_bad_images: bool = _option(False, "go on without images that cannot be read, and count them")

    experts: int = _option(
        4, "experts per mixture; 1 trains the dense baseline, which heeds no other setting of experts"
    )
    share_rate: float = _option(0.3, "beta of Eq. 6 at the end of the ramp, 0 to (N-1)/N")
    ramp: float = _option(0.5, "share of the training over which beta rises linearly from 0")
    ramp_shape: str = _option("linear", "how beta rises", ("linear", "cosine"))
    average_every: int = _option(1, "average after every so many optimizer steps only")
    expert_lr: float = _option(1.0, "factor on the experts' learning rate")
    placement: Placement = _option(
        "local",
        "all experts in every process, or replicas: one in each process of torchrun, whose number N is",
        ("local", "replicas"),
    )
    select: str = _option(
        "alternate", "which FFNs: alternate, all, last_half, a name or a regular expression"
    )
    unit: Unit = _option("token", "what is dealt to the experts", ("token", "image"))
    router: str = _option(
        "random", "who deals: chance, or a learned top-k router (naive MoE)", ("random", "topk")
    )
    k: int = _option(1, "experts that a router sends each token to")
    capacity_ratio: float = _option(1.25, "room of a routed expert, in equal shares of the tokens")
    early: float | None = _option(
        None, "average in this first share of the training only (Early EWA); --ramp is then a share of it"
    )
    collapse: bool = _option(False, "make a routed run's result the plain model too, with the mean expert")

    epochs: int = _option(300, "passes over the training images")
    batch_size: int = _option(128, "images per batch and process")
    grad_accum_steps: int = _option(1, "batches per optimizer step")
    opt: str = _option("adamw", "any timm optimizer")
    lr: float = _option(1e-3, "peak learning rate")
    weight_decay: float = _option(0.05, "weight decay; vectors and biases have none")
    momentum: float = _option(0.9, "momentum of SGD-like optimizers")
    sched: str = _option("cosine", "learning-rate schedule", ("cosine", "tanh", "step", "poly", "none"))
    warmup_epochs: int = _option(5, "epochs of linear warm-up, at most half of all epochs")
    warmup_lr: float = _option(1e-5, "learning rate at the start of the warm-up")
    min_lr: float = _option(0.0, "learning rate at the end")
    decay_epochs: float = _option(90.0, "epochs between decays of the step schedule")
    decay_rate: float = _option(0.1, "factor of a decay of the step schedule")
    layer_decay: float | None = _option(None, "learning-rate factor from layer to layer, for fine-tuning")
    clip_grad: float | None = _option(None, "largest norm of the whole gradient")

    drop_path: float | None = _option(None, "stochastic depth rate")
    smoothing: float = _option(0.1, "label smoothing")
    mixup: float = _option(0.0, "mixup alpha; each image has its own draw")
    cutmix: float = _option(0.0, "cutmix alpha; each image has its own draw")
    aa: str | None = _option(
        None,
        "AutoAugment or RandAugment policy, e.g. rand-m9-mstd0.5-inc1; clouds: scale1.5-shift0.2-rotz180",
    )
    hflip: float = _option(0.5, "probability of a horizontal flip")
    reprob: float = _option(0.0, "probability of random erasing")
    crop_padding: int = _option(
        -1, "random crop after padding by so many pixels (data in memory); -1: size/8"
    )

    amp: bool = _option(False, "mixed precision")
    amp_dtype: str = _option("bfloat16", "precision under --amp", ("bfloat16", "float16"))
    compile: bool = _option(False, "torch.compile the model")
    grad_checkpointing: bool = _option(False, "recompute the blocks' activations in the backward pass")
    model_ema: bool = _option(False, "keep and evaluate an exponential moving average of the weights too")
    model_ema_decay: float = _option(0.9998, "decay of the moving average")
    model_ema_warmup: bool = _option(False, "let the decay grow from 0")
    model_ema_switch: bool = _option(False, "copy the moving average into the model after every epoch")
    swa: float = _option(
        0.0, "average the weights of the epochs in this last share of the training, at a constant lr"
    )
    twa: int = _option(0, "epochs after the training in which weights of the last checkpoints are learned")

    votes: int = _option(1, "passes over each cloud in evaluation, all but one augmented, that are averaged")
    val_interval: int = _option(1, "epochs between evaluations, each with a checkpoint")
    seed: int = _option(42, "fixes initial weights, data order, augmentation and partitions")
    output: str = _option("runs", "folder of all runs")
    name: str | None = _option(None, "folder of this run; made from date and model if not given")
    recovery_interval: int = _option(0, "also write a checkpoint after every so many optimizer steps")
    tensorboard: bool = _option(False, "write TensorBoard events into the run's folder")

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise EwavitError(f"--{flag(setting.name)} {value} does not work: choose a finite number")
        for name, lowest in _LOWEST.items():
            value = getattr(self, name)
            if value is not None and not value >= lowest:
                raise EwavitError(f"--{flag(name)} {value} is too small: choose {lowest} or more")
        shares = ("ramp", "hflip", "reprob", "smoothing", "momentum", "model_ema_decay", "decay_rate", "swa")
        for name in (*shares, "early"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise EwavitError(f"--{flag(name)} {value} is out of range: choose 0 to 1")
        for name in ("drop_path", "holdout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise EwavitError(f"--{flag(name)} {value} is out of range: choose 0 or more and less than 1")
        for name in ("lr", "clip_grad", "decay_epochs", "expert_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise EwavitError(f"--{flag(name)} {value} does not work: choose a positive number")
        if self.name is not None and self.name != Path(self.name).name:
            raise EwavitError(
                f"--name {self.name!r} is not the name of one folder: give its place with --output"
            )
        for setting in fields(self):
            choices, value = setting.metadata["choices"], getattr(self, setting.name)
            if choices and value not in choices:
                raise EwavitError(
                    f"--{flag(setting.name)} {value!r} is unknown: choose one of {', '.join(choices)}"
                )
        if self.experts > 1:
            check_share_rate(self.share_rate, self.experts)
        if self.top_k is not None:
            if self.k > self.experts:
                raise EwavitError(f"--k {self.k} is more than --experts {self.experts}: choose less")
            if self.unit != "token":
                raise EwavitError(f"--router {self.router} sends tokens: leave out --unit {self.unit}")
        if self.placement == "replicas":
            self._check_replicas()
        if self.pretrained and self.initial_checkpoint:
            raise EwavitError("--pretrained and --initial-checkpoint both give the first weights: choose one")
        averages = {"model_ema": self.model_ema, "swa": self.swa, "twa": self.twa}
        if len(chosen := [f"--{flag(name)}" for name, value in averages.items() if value]) > 1:
            raise EwavitError(f"{' and '.join(chosen)} each keep an average of the weights: choose one")
        warmup = min(self.warmup_epochs, self.epochs // 2)
        if self.swa and self.epochs - round(self.swa * self.epochs) < warmup:
            raise EwavitError(f"--swa {self.swa} begins within the {warmup} epochs of warm-up: choose less")
        if self.model_ema_switch and not self.model_ema:
            raise EwavitError("--model-ema-switch copies the moving average back: give --model-ema too")
        self.parsed_model_kwargs()

    @property
    def top_k(self) -> TopK | None:
        """The router's settings; None where chance deals, or nothing is dealt."""
        routed = self.router == "topk" and self.experts > 1
        return TopK(k=self.k, capacity_ratio=self.capacity_ratio) if routed else None

    @property
    def keeps_experts(self) -> bool:
        """Whether the result is the mixture itself, not the plain model with the mean expert."""
        return self.top_k is not None and not self.collapse

    def _check_replicas(self) -> None:
        """Refuse what one expert in each process cannot do."""
        unfit = {
            "router": self.router != "random",
            "twa": self.twa > 0,
            "amp-dtype": self.amp and self.amp_dtype == "float16",  # one process may skip a step, others not
        }
        if names := [f"--{name}" for name, given in unfit.items() if given]:
            raise EwavitError(f"--placement replicas does not go with this {names[0]}: leave {names[0]} out")

    def parsed_model_kwargs(self) -> dict[str, Any]:
        """`model_kwargs` as a dict; values are Python literals or else strings.

        Raises:
            EwavitError: a part is not of the form key=value.
        """
        result: dict[str, Any] = {}
        part = ""
        for piece in self.model_kwargs.split(",") if self.model_kwargs else ():
            part = f"{part},{piece}" if part else piece
            if part.count("(") + part.count("[") > part.count(")") + part.count("]"):
                continue  # a comma inside a tuple or list
            key, equals, value = part.partition("=")
            if not equals or not key.strip().isidentifier():
                raise EwavitError(f"--model-kwargs {part!r} is not key=value: write patch_size=4,depth=6")
            try:
                result[key.strip()] = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError):
                result[key.strip()] = value.strip()
            part = ""
        if part:
            raise EwavitError(f"--model-kwargs {part!r} has an open bracket: close it")
        return result

    def save(self, path: Path) -> None:
        """Write the settings as YAML that `--config` reads."""
        path.write_text(yaml.safe_dump(asdict(self), sort_keys=False))

    @classmethod
    def from_dict(cls, settings: dict[str, Any], source: str) -> Recipe:
        """A recipe from saved settings.

        Raises:
            EwavitError: a setting is unknown; `source` is named.
        """
        known = {setting.name for setting in fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise EwavitError(f"{source} has unknown settings {', '.join(unknown)}: remove them")
        return cls(**settings)


_LOWEST = {
    "limit": 1, "workers": 0, "experts": 1, "share_rate": 0.0, "epochs": 1, "batch_size": 1, "img_size": 1,
    "grad_accum_steps": 1, "weight_decay": 0.0, "warmup_epochs": 0, "mixup": 0.0, "cutmix": 0.0,
    "min_lr": 0.0, "warmup_lr": 0.0, "crop_padding": -1, "average_every": 1, "val_interval": 1, "twa": 0,
    "recovery_interval": 0, "seed": 0, "layer_decay": 0.0, "k": 1, "capacity_ratio": 0.001,
    "num_points": 1, "votes": 1,
}  # fmt: skip


def flag(name: str) -> str:
    """A setting's name as it is written on the command line."""
    return name.replace("_", "-")


def settings() -> tuple[Field[Any], ...]:
    """The settings of a recipe with their defaults, help texts and choices."""
    return fields(Recipe)
