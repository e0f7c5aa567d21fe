"""`Recipe`: every setting of a training run, typed, with timm's names; the command line and YAML fill it.

A setting's default, help text, range and group stand where it is declared; a `Literal` type has its choices.
Nothing here needs torch before a model is built, so `--help` and wrong flags answer at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import yaml

from ewavit.errors import EwavitError
from ewavit.files import replacing
from ewavit.training.kwargs import KWARGS, kwargs_text, parsed_kwargs
from ewavit.training.setting import check_value, converted, flag, option, without_none

if TYPE_CHECKING:
    from ewavit.core.routing import TopK
    from ewavit.core.surgery import Router

# The default data of each task.
BUNDLED = {
    "classification": "fashion-mnist-mini", "segmentation": "shapes", "retrieval": "fashion-mnist-mini",
}  # fmt: skip
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
GROUPS = (
    "data", "model", "experts", "optimisation", "augmentation", "precision and speed", "averages", "output",
)  # fmt: skip
_data, _model, _experts, _optimisation, _augmentation, _speed, _averages, _output = (
    partial(option, group=name) for name in GROUPS
)


@dataclass(frozen=True)
class Recipe:
    """The settings of one run.

    Names and defaults are those of timm's train.py where timm has the setting. Four defaults suit a ViT
    rather than a ResNet: opt, lr, weight_decay and amp_dtype.

    Raises:
        EwavitError: a value is out of range, or two settings exclude each other.
    """

    task: Literal["classification", "segmentation", "retrieval"] | None = _data(
        None, "what the model learns (default: follows from the data; a folder of images and masks needs it)"
    )
    data: str = _data(
        "bundled",
        "bundled set (fashion-mnist-mini, shapes, solids, solid-parts; by default that of the task), folder "
        "of images, of CIFAR or of Tiny-ImageNet, folder of images and masks with --task segmentation, timm "
        "spec (torch/..., hfds/..., wds/...) or point clouds such as modelnet10:PATH",
    )
    limit: int | None = _data(None, "use only the first N training images", least=1)
    shots: int | None = _data(None, "use only the first N training images of each class (few-shot)", least=1)
    resample: bool = _data(
        False, "draw the images of --limit or --shots at random with --seed instead of taking the first ones"
    )
    test_on_rest: bool = _data(
        False, "evaluate on the training images that --limit or --shots leaves out instead of the test images"
    )
    img_size: int | None = _data(None, "image side in pixels (default: that of the data)", least=1, most=4096)
    workers: int = _data(4, "processes that read images from files; ignored for data in memory", least=0)
    holdout: float = _data(
        0.0,
        "hold out this share of the training images and evaluate on it instead of the test images",
        least=0,
        below=1,
    )
    fold: int = _data(
        0, "which share of that size --holdout holds out, counted from 0 (for cross-validation)", least=0
    )
    train_split: str = _data("train", "training split of a timm data set or folder")
    val_split: str = _data("validation", "evaluation split of a timm data set or folder")
    data_dir: str | None = _data(None, "root folder of timm data sets (torch/..., hfds/..., wds/...)")
    mean: tuple[float, ...] | None = _data(
        None,
        "mean of each channel, values in 0 to 1 (default: of the first weights with --pretrained or "
        "--initial-checkpoint, else of the images in memory, or ImageNet's)",
        least=0,
        most=1,
    )
    std: tuple[float, ...] | None = _data(
        None, "standard deviation of each channel; --mean and --std go together", above=0
    )
    interpolation: Literal["bilinear", "bicubic", "nearest", "box", "hamming", "lanczos"] | None = _data(
        None, "resize filter of evaluation images from files (default: of the first weights, or bicubic)"
    )
    crop_pct: float | None = _data(
        None,
        "share of the side that evaluation keeps of images from files (default: of the first weights, or "
        "0.875, or 1 if all images have the right size)",
        above=0,
        most=1,
    )
    skip_bad_images: bool = _data(False, "skip images that cannot be read, and count them")
    num_points: int | None = _data(
        None, "points per cloud (default: 1024, or 2048 for part segmentation)", least=1, most=100_000
    )
    point_features: Literal["normals", "colours", "normals,colours"] | None = _data(
        None, "what the model gets of each point beside its place"
    )
    retain: str | None = _data(
        None,
        "data of an old task: each evaluation also reports the nearest-neighbour accuracy of the model's "
        "features on its evaluation images",
    )
    votes: int = _data(
        1, "passes over each cloud in evaluation, averaged; all but one are augmented", least=1
    )

    model: str | None = _model(
        None, "timm model or point transformer (default: a small one that fits the data)"
    )
    pretrained: bool = _model(False, "start from timm's pretrained weights; timm downloads them")
    initial_checkpoint: str | None = _model(
        None, "start from this checkpoint or run of the same model; a head that does not fit is made new"
    )
    model_kwargs: str | Mapping[str, Any] = _model(  # kept as text
        "", "arguments of the model: key=value,key=value, e.g. patch_size=4,depth=6"
    )

    ffn_groups: int = _model(
        1,
        "make the FFNs block-diagonal with so many groups, and as many times wider, at equal FLOPs (SCHEME); "
        "from scratch only",
        least=1,
    )

    experts: int = _experts(
        4, "experts per mixture; 1 trains the dense baseline and ignores all other expert settings", least=1
    )
    share_rate: float = _experts(
        0.3, "beta of Eq. 6 after the ramp, from 0 to (N-1)/N for N experts", least=0
    )
    ramp: float = _experts(
        0.5, "share of the training in which beta rises from 0 to --share-rate", least=0, most=1
    )
    ramp_shape: Literal["linear", "cosine"] = _experts("linear", "shape of the ramp")
    select: str = _experts(
        "alternate",
        "FFNs to expand: alternate, all, last_half, a name or a regular expression; model: copies of the "
        "whole model, each for its own images (lo-fi)",
    )
    unit: Literal["token", "image"] = _experts(
        "token", "unit of the random partition: each expert gets single tokens or whole images"
    )
    placement: Literal["local", "replicas"] = _experts(
        "local",
        "where experts live: local (all N in every process) or replicas (one per torchrun process; N is the "
        "number of processes)",
    )
    expert_lr: float = _experts(1.0, "factor on the learning rate of the experts", above=0, most=1e6)
    average_every: int = _experts(
        1, "average after every N-th optimizer step only, as strongly as N averagings together", least=1
    )
    early: float | None = _experts(
        None,
        "average only in this first share of the training (Early EWA); --ramp is then a share of that",
        least=0,
        most=1,
    )
    router: Literal["random", "topk", "fused", "hybrid"] = _experts(
        "random",
        "how tokens reach experts: random partition; topk: a learned router (a naive MoE); fused: all "
        "experts become one FFN by learned weights before each pass; hybrid: the first FFN, frozen, and "
        "trained experts, mixed for each token by a gate (fine-tuning only)",
    )
    k: int = _experts(1, "experts per token with --router topk", least=1)
    capacity_ratio: float = _experts(
        1.25,
        "capacity of an expert with --router topk, in multiples of an equal share of the tokens",
        least=0.001,
        most=1000,
    )
    branch: Literal["cca"] | None = _experts(
        None,
        "train with a branch beside every FFN that is dropped at the end: cca, channel-covariance attention "
        "(SCHEME); its learned weight has a limit that falls to 0",
    )
    collapse: bool = _experts(
        False,
        "with --router topk or hybrid, deploy the plain model with the mean expert instead of the mixture",
    )

    epochs: int = _optimisation(300, "passes over the training data", least=1)
    batch_size: int = _optimisation(128, "images per batch and process", least=1)
    lr: float = _optimisation(1e-3, "peak learning rate", above=0)
    opt: str = _optimisation("adamw", "optimizer, by its name in timm")
    weight_decay: float = _optimisation(0.05, "weight decay; vectors and biases have none", least=0)
    warmup_epochs: int = _optimisation(5, "epochs of linear warm-up, at most half of all epochs", least=0)
    sched: Literal["cosine", "tanh", "step", "poly", "none"] = _optimisation(
        "cosine", "learning-rate schedule"
    )
    min_lr: float = _optimisation(0.0, "learning rate at the end", least=0)
    warmup_lr: float = _optimisation(1e-5, "learning rate at the start of the warm-up", least=0)
    clip_grad: float | None = _optimisation(
        None, "largest norm of the gradient; a larger one is scaled down", above=0
    )
    grad_accum_steps: int = _optimisation(1, "batches per optimizer step", least=1)
    layer_decay: float | None = _optimisation(
        None, "factor on the learning rate from each layer to the one below, for fine-tuning", above=0, most=1
    )
    momentum: float = _optimisation(0.9, "momentum of SGD-like optimizers", least=0, most=1)
    decay_epochs: float = _optimisation(90.0, "epochs between two decays with --sched step", above=0)
    decay_rate: float = _optimisation(0.1, "factor of each decay with --sched step", least=0, most=1)
    opt_kwargs: str | Mapping[str, Any] = _optimisation(
        "", "further arguments of the optimizer: key=value,key=value, e.g. betas=(0.9,0.95)"
    )
    sched_kwargs: str | Mapping[str, Any] = _optimisation(
        "", "further arguments of timm's schedule: key=value,key=value, e.g. k_decay=1.5"
    )
    bce_loss: bool = _optimisation(False, "binary cross-entropy for each class instead of cross-entropy")
    class_weights: Literal["none", "balanced"] = _optimisation(
        "none", "balanced: weigh each class in the loss by the inverse of its share of the training inputs"
    )
    freeze: str | None = _optimisation(
        None, "do not train parameters whose name begins with this regular expression, e.g. patch_embed"
    )
    distill_from: str | None = _optimisation(
        None, "teacher to distill from: a run's folder, a file that ewavit wrote, or a timm model's name"
    )
    distillation_type: Literal["soft", "hard"] = _optimisation(
        "hard", "learn the teacher's class (hard) or its softened probabilities (soft), as DeiT does"
    )
    distillation_alpha: float = _optimisation(0.5, "share of the distillation in the loss", above=0, most=1)
    distillation_tau: float = _optimisation(
        1.0, "temperature of --distillation-type soft", above=0, most=1000
    )
    per_class: int = _optimisation(
        4, "with --task retrieval: images of a class that stand together in a batch", least=2
    )
    margin: float = _optimisation(
        0.5,
        "with --task retrieval: similarity from which images of two classes count in the loss",
        least=-1,
        below=1,
    )
    koleo: float = _optimisation(0.7, "with --task retrieval: weight of the KoLeo regulariser", least=0)
    memory: int = _optimisation(
        0,
        "with --task retrieval: descriptors of earlier batches in the loss; 0 for none",
        least=0,
        most=10**7,
    )
    seed: int = _optimisation(
        42, "seed of initial weights, data order, augmentation and partitions", least=0, most=2**63 - 1
    )

    aa: str | None = _augmentation(
        None,
        "AutoAugment or RandAugment policy, e.g. rand-m9-mstd0.5-inc1; for clouds e.g. "
        "scale1.5-shift0.2-rotz180",
    )
    mixup: float = _augmentation(0.0, "mixup alpha; each image has its own draw", least=0, most=1000)
    cutmix: float = _augmentation(0.0, "cutmix alpha; each image has its own draw", least=0, most=1000)
    smoothing: float = _augmentation(0.1, "label smoothing", least=0, most=1)
    drop_path: float | None = _augmentation(None, "stochastic depth rate", least=0, below=1)
    scale: tuple[float, ...] = _augmentation(
        (0.08, 1.0),
        "smallest and largest share of the area in the random resized crop of images from files",
        above=0,
        most=1,
    )
    ratio: tuple[float, ...] = _augmentation(
        (3 / 4, 4 / 3), "smallest and largest width over height of that crop", above=0
    )
    color_jitter: float = _augmentation(
        0.4, "strength of the colour jitter of images from files; ignored with --aa", least=0
    )
    hflip: float = _augmentation(0.5, "probability of a horizontal flip", least=0, most=1)
    reprob: float = _augmentation(0.0, "probability of random erasing", least=0, most=1)
    crop_padding: int = _augmentation(
        -1,
        "pixels of padding before the random crop, for data in memory; -1 is an eighth of the side",
        least=-1,
    )

    amp: bool = _speed(False, "train in mixed precision")
    amp_dtype: Literal["bfloat16", "float16"] = _speed("bfloat16", "dtype of --amp")
    compile: bool = _speed(False, "compile the model with torch.compile")
    grad_checkpointing: bool = _speed(
        False, "save memory: recompute the blocks' activations in the backward pass"
    )

    model_ema: bool = _averages(False, "also keep and evaluate a moving average (EMA) of the weights")
    model_ema_decay: float = _averages(0.9998, "decay of the EMA", least=0, most=1)
    model_ema_warmup: bool = _averages(False, "let the decay of the EMA grow from 0")
    model_ema_switch: bool = _averages(
        False, "copy the EMA into the model after every epoch (Switch EMA); needs --model-ema"
    )
    swa: float = _averages(
        0.0,
        "average the weights of the epochs in this last share of the training, at a constant lr (SWA)",
        least=0,
        most=1,
    )
    toward_start: float = _averages(
        0.0,
        "deploy the last weights moved by this share of the way back to the first ones (WiSE-FT); the head "
        "stays; needs --pretrained or --initial-checkpoint",
        least=0,
        most=1,
    )
    twa: int = _averages(
        0, "extra epochs after the training that learn how to weight the last checkpoints (TWA)", least=0
    )

    output: str = _output("runs", "folder of all runs")
    name: str | None = _output(None, "folder of this run in --output (default: made from date and model)")
    val_interval: int = _output(1, "epochs between two evaluations; each also writes a checkpoint", least=1)
    recovery_interval: int = _output(
        0, "also write a checkpoint every N optimizer steps; 0 never does", least=0
    )
    checkpoint_hist: int = _output(
        0, "also keep the checkpoints of the last N evaluated epochs, in checkpoint-hist/", least=0
    )
    keep_best: str | None = _output(
        None,
        "also keep the model of the epoch with the best METRIC on held-out images, e.g. top1 or loss, in "
        "model-best.safetensors; needs --holdout",
    )
    early_stop: int = _output(
        0,
        "end the training after N evaluations without a better --keep-best (default: the task's metric); "
        "needs --holdout; 0 never does",
        least=0,
    )
    log: str | None = _output(
        None,
        "also log to experiment trackers, one or several of tensorboard,wandb,trackio,mlflow; tensorboard "
        "writes into the run's folder",
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            name, value = setting.name, getattr(self, setting.name)
            if isinstance(value, Mapping) and name in KWARGS:
                value = kwargs_text(name, value)
            value = converted(setting, kinds()[name], value)
            check_value(setting, kinds()[name], choices(name), value)
            object.__setattr__(self, setting.name, value)
        if self.data == "bundled":
            object.__setattr__(self, "data", BUNDLED[self.task or "classification"])
        for name in ("scale", "ratio"):
            pair = getattr(self, name)
            if len(pair) != 2 or pair[0] > pair[1]:
                said = " ".join(map(str, pair))
                raise EwavitError(f"--{name} {said} is not a range: give the smallest and the largest value")
        if (self.mean is None) != (self.std is None):
            raise EwavitError("--mean and --std belong together: give both or neither")
        if self.name is not None and (self.name != Path(self.name).name or self.name == ".."):
            raise EwavitError(f"--name {self.name!r} is not one folder's name: give its place with --output")
        if self.ffn_groups > 1:
            first = {"pretrained": self.pretrained, "initial_checkpoint": bool(self.initial_checkpoint)}
            self._refuse(f"--ffn-groups {self.ffn_groups}", **first)
        if self.branch:
            self._refuse(f"--branch {self.branch}", router=self.is_routed)
            self._refuse(f"--branch {self.branch}", select=self.select == "model" and self.experts > 1)
        if unknown := [name for name in self.trackers if name not in TRACKERS]:
            raise EwavitError(
                f"--log {unknown[0]!r} is unknown: give one or several of {', '.join(TRACKERS)}, with commas"
            )
        self._check_subset()
        self._check_experts()
        self._check_averages()
        if self.pretrained and self.initial_checkpoint:
            raise EwavitError("--pretrained and --initial-checkpoint both give the first weights: choose one")
        for name in KWARGS:
            self.parsed(name)
        if self.sched == "none" and self.sched_kwargs:
            raise EwavitError(
                f"--sched-kwargs {self.sched_kwargs} has no schedule with --sched none: leave it out"
            )
        for name in ("keep_best", "early_stop"):
            if getattr(self, name) and not self.holdout:
                given = f"--{flag(name)} {getattr(self, name)}"
                raise EwavitError(f"{given} would choose by the test images: also give --holdout")
        if self.early_stop and (self.swa or self.twa):
            other = "swa" if self.swa else "twa"
            raise EwavitError(f"--early-stop has no last epochs to average: leave out --{other}")
        if self.bce_loss and self.class_weights != "none":
            raise EwavitError("--bce-loss has no class weights: leave out one of them")
        if self.freeze is not None:
            try:
                re.compile(self.freeze)
            except re.error as problem:
                raise EwavitError(
                    f"--freeze {self.freeze!r} is no regular expression ({problem}): repair it"
                ) from None

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in `log`, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.log.split(","))) if self.log else ()

    @property
    def folds(self) -> int:
        """How many times `holdout` can hold out other training images."""
        return math.floor(1 / self.holdout + 1e-9) if self.holdout else 1

    @property
    def is_routed(self) -> bool:
        """Whether a learned router sends the tokens to two or more experts."""
        return self.router in ("topk", "hybrid") and self.experts > 1

    @property
    def top_k(self) -> TopK | None:
        """The settings of the learned router; None without one."""
        if self.router != "topk" or self.experts == 1:
            return None
        from ewavit.core.routing import TopK

        return TopK(k=self.k, capacity_ratio=self.capacity_ratio)

    @property
    def routing(self) -> Router | None:
        """What `expand` takes as its router."""
        from ewavit.core.mixing import Fusion, Hybrid

        if self.router == "hybrid":
            return Hybrid(self.experts - 1)
        return Fusion() if self.router == "fused" else self.top_k

    @property
    def keeps_experts(self) -> bool:
        """Whether the result is the mixture itself, not the plain model with the mean expert."""
        return self.is_routed and not self.collapse

    def _check_subset(self) -> None:
        """Refuse settings of the training images that exclude each other or have nothing to work on."""
        if self.limit is not None and self.shots is not None:
            raise EwavitError("--limit and --shots both choose the training images: leave out one")
        for name in ("resample", "test_on_rest"):
            if getattr(self, name) and self.limit is None and self.shots is None:
                raise EwavitError(
                    f"--{flag(name)} needs a subset of the training images: give --limit or --shots"
                )
        if self.test_on_rest and self.holdout:
            raise EwavitError("--test-on-rest and --holdout both choose the test images: leave out one")
        if self.fold >= self.folds:
            raise EwavitError(
                f"--fold {self.fold} is out of range: --holdout {self.holdout:g} has {self.folds} of them, "
                "counted from 0"
            )

    def _check_experts(self) -> None:
        """Refuse settings of experts that exclude each other."""
        full = (self.experts - 1) / self.experts
        if self.experts > 1 and self.share_rate > full * (1 + 1e-12):
            raise EwavitError(
                f"--share-rate {self.share_rate} is out of range for {self.experts} experts: "
                f"choose at most {full:.4g} (full averaging)"
            )
        if self.router == "hybrid" and self.experts > 1 and self.share_rate:
            raise EwavitError(
                f"--share-rate {self.share_rate} would move the frozen expert of --router hybrid: give "
                "--share-rate 0"
            )
        if self.router != "random" and self.experts > 1:
            if self.router == "topk" and self.k > self.experts:
                raise EwavitError(
                    f"--k {self.k} is more than --experts {self.experts}: choose at most {self.experts}"
                )
            if self.unit != "token":
                raise EwavitError(f"--router {self.router} routes tokens: leave out --unit {self.unit}")
        router = self.router != "random"
        float16 = self.amp and self.amp_dtype == "float16"  # one process may skip a step alone
        if self.placement == "replicas":
            self._refuse("--placement replicas", router=router, twa=self.twa > 0, amp_dtype=float16)
        if self.select == "model" and self.experts > 1:
            replicas, decay = self.placement != "local", self.layer_decay is not None
            self._refuse("--select model", router=router, placement=replicas, layer_decay=decay)

    def _refuse(self, where: str, **unfit: bool) -> None:
        """Raise for the first of these settings that is given and does not work."""
        if names := [name for name, given in unfit.items() if given]:
            name, value = f"--{flag(names[0])}", getattr(self, names[0])
            raise EwavitError(f"{name} {value} does not work with {where}: leave out {name}")

    def _check_averages(self) -> None:
        """Refuse settings of weight averages that exclude each other."""
        names = ("model_ema", "swa", "twa", "toward_start")
        averages = {name: getattr(self, name) for name in names}
        if len(chosen := [f"--{flag(name)}" for name, value in averages.items() if value]) > 1:
            raise EwavitError(f"{' and '.join(chosen)} each keep an average of the weights: choose one")
        warmup = min(self.warmup_epochs, self.epochs // 2)
        if self.swa and self.epochs - round(self.swa * self.epochs) < warmup:
            raise EwavitError(f"--swa {self.swa} begins within the {warmup} epochs of warm-up: choose less")
        if self.twa and self.memory:
            raise EwavitError(f"--memory {self.memory} changes the losses that --twa compares: leave out one")
        if self.model_ema_switch and not self.model_ema:
            raise EwavitError("--model-ema-switch copies the EMA into the model: also give --model-ema")

    def parsed(self, name: str) -> dict[str, Any]:
        """The arguments in a setting that holds them as text; values are Python literals or else strings.

        Args:
            name: "model_kwargs", "opt_kwargs" or "sched_kwargs".

        Raises:
            EwavitError: a part is not of the form key=value, or has a flag of its own.
        """
        return parsed_kwargs(name, str(getattr(self, name)))

    def save(self, path: Path) -> None:
        """Write the settings as YAML that `--config` reads."""
        with replacing(path) as partial:
            partial.write_text(yaml.safe_dump(asdict(self), sort_keys=False))

    @classmethod
    def from_dict(cls, settings: dict[str, Any], source: str) -> Recipe:
        """A recipe from saved settings.

        Raises:
            EwavitError: a setting is unknown; `source` is named.
        """
        known, settings = {setting.name for setting in fields(cls)}, renamed(settings)
        if unknown := sorted(set(settings) - known):
            raise EwavitError(f"{source} has unknown settings {', '.join(unknown)}: remove them")
        return cls(**settings)


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from a file, where an earlier version may have written other names."""
    found = dict(settings)
    if found.pop("tensorboard", False):
        found.setdefault("log", "tensorboard")
    return found


def settings() -> tuple[Field[Any], ...]:
    """The settings of a recipe with their defaults, help texts, groups and ranges, the most used first."""
    return fields(Recipe)


@cache
def kinds() -> dict[str, type]:
    """The type of each setting's value, where it has one: `int` for `int | None`, `str` for choices."""
    plain = {name: without_none(hint) for name, hint in get_type_hints(Recipe).items()}
    return {
        name: str if get_origin(hint) is Literal else get_origin(hint) or hint for name, hint in plain.items()
    }


@cache
def choices(name: str) -> tuple[str, ...]:
    """The values that a setting may have; empty where any may."""
    hint = without_none(get_type_hints(Recipe)[name])
    return get_args(hint) if get_origin(hint) is Literal else ()
