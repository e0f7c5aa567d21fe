"""Retrieval after IRT (arXiv 2102.05644): an l2-normalised descriptor, judged by Recall@1 on new classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewavit.data.batches import Data, ImageInputs, Inputs
from ewavit.data.input_files import InputFiles
from ewavit.data.options import DataOptions
from ewavit.data.retrieval import GALLERY, open_retrieval
from ewavit.errors import EwavitError, first_line
from ewavit.tasks.classification import Classification
from ewavit.tasks.contrastive import MARGIN, ContrastiveLoss, contrastive
from ewavit.tasks.inference import Inference, InferenceOptions
from ewavit.tasks.judge import RECALL1
from ewavit.tasks.neighbours import (
    Gallery,
    NeighbourInference,
    NeighbourMeter,
    images_of,
    in_gallery,
    similarities,
)
from ewavit.tasks.sheet import draw_sheet, short
from ewavit.tasks.task import Cell, Listed, LossOptions, Meter, Mixing, Table
from ewavit.tasks.timm_models import as_arguments, check_timm_model, create, start

POOLS = {"token": "token", "mean": "avg", "gem": ""}  # what `pool` takes -> timm's global_pool
SHOWN, NEIGHBOURS = 8, 5  # queries in a run's picture, and neighbours of each
LEAST = 1e-6  # of a feature under GeM's power


class Descriptor(nn.Module):
    """The last layer of a timm model: GeM over the tokens if asked for, a projection, l2 normalisation.

    Args:
        width: features of the model.
        dim: length of the descriptor; 0 keeps the features themselves.
        skipped: tokens that stand before the patches for GeM (arXiv 1711.02512); None where timm pools.
    """

    def __init__(self, width: int, dim: int, skipped: int | None) -> None:
        super().__init__()
        self.skipped = skipped
        self.power = None if skipped is None else nn.Parameter(torch.tensor([3.0]))
        self.projection = nn.Linear(width, dim) if dim else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Descriptors (batch, dim) of features (batch, width), or (batch, tokens, width) under GeM."""
        if self.power is not None:
            powers = features[:, self.skipped :].clamp(min=LEAST).pow(self.power)
            features = powers.mean(1).pow(1 / self.power)
        return F.normalize(self.projection(features), dim=-1)


class Retrieval(Classification):
    """Images of a new class are found by their nearest neighbours."""

    name = "retrieval"
    judge = RECALL1
    names_classes = False
    fixed_classes = False
    no_mixing = "--mixup and --cutmix mix classes, and retrieval compares images: leave them out"
    own_settings = ("per_class", "margin", "koleo", "memory")

    def open_data(self, spec: str, options: DataOptions) -> Data:
        return open_retrieval(spec, options)

    def build_model(
        self,
        name: str,
        inputs: Inputs,
        *,
        pretrained: bool = False,
        initial_checkpoint: str | None = None,
        say: Callable[[str], None] | None = None,
        **kwargs: Any,
    ) -> tuple[nn.Module, dict[str, Any]]:
        assert isinstance(inputs, ImageInputs)
        side = inputs.img_size
        settings = {"in_chans": inputs.in_chans, "img_size": side, "pool": "token", "dim": 0, **kwargs}
        check_timm_model(name, kwargs)
        of_timm, pool, dim = _of_timm(settings)
        model = start(name, of_timm, side, pretrained, initial_checkpoint, say)
        return _with_descriptor(model, name, pool, dim, inputs.sample(2)), settings

    def create_model(self, name: str, settings: Mapping[str, Any]) -> nn.Module:
        check_timm_model(name, settings)
        of_timm, pool, dim = _of_timm(settings)
        side = settings.get("img_size", 224)
        sample = ImageInputs(0, settings.get("in_chans", 3), side).sample(2)
        return _with_descriptor(create(name, of_timm), name, pool, dim, sample)

    def loading_code(
        self, name: str, settings: Mapping[str, Any], file: Path, pretrained_cfg: Mapping[str, Any]
    ) -> str:
        return (
            "from safetensors.torch import load_file\n"
            "from ewavit.tasks.retrieval import Retrieval\n"
            f"model = Retrieval().create_model({name!r}, dict({as_arguments(settings)})).eval()\n"
            f"model.load_state_dict(load_file({str(file)!r}))\n"
            "# all keys but those of head. are timm's own; the outputs are l2-normalised descriptors"
        )

    def timm_config(self, *_: Any) -> None:
        return None

    def input_text(self, inputs: Inputs) -> str:
        mode = "L" if inputs.in_chans == 1 else "RGB"
        return f"transform(ImageOps.exif_transpose(image).convert({mode!r})) of PIL images"

    def inference(self, files: InputFiles, options: InferenceOptions) -> Inference:
        return NeighbourInference(files, options)

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The contrastive loss of a batch alone."""
        return contrastive(outputs, targets, outputs, targets, MARGIN)

    def criterion(self, options: LossOptions) -> nn.Module:
        return ContrastiveLoss(options.margin, options.koleo, options.memory)

    def mixing(self, mixup: float, cutmix: float, num_classes: int) -> Mixing | None:
        return None

    def meter(self, data: Data, device: torch.device | str = "cpu") -> Meter:
        return NeighbourMeter(self.kind, device)

    def predictions(self, data: Data, inputs: Tensor, outputs: Tensor, targets: Tensor) -> list[Listed]:
        return [
            Described(data.eval_classes[label], label, role, descriptor)
            for descriptor, (label, role) in zip(outputs.cpu(), targets.tolist(), strict=True)
        ]

    def table(self, predictions: Sequence[Listed], classes: Sequence[str], names: Sequence[Cell]) -> Table:
        descriptors = torch.stack([row.descriptor for row in predictions])
        roles = torch.tensor([row.role for row in predictions])
        gallery, rows = in_gallery(roles), []
        for block, similarity in similarities(descriptors, roles, gallery):
            value, nearest = similarity.max(1)
            for number, other, by in zip(
                block.tolist(), gallery[nearest].tolist(), value.tolist(), strict=True
            ):
                mine, its = predictions[number], predictions[other]
                rows.append((names[number], mine.of_class, names[other], its.of_class, f"{by:.4f}"))
        return ("input", "class", "nearest", "nearest_class", "similarity"), rows

    def picture(
        self, data: Data, predictions: Sequence[Listed], predict: Callable[[Tensor], Tensor], path: Path
    ) -> None:
        found = Gallery.of(data, predict)
        labels, roles = found.targets.T
        gallery = in_gallery(roles)
        queries = (roles != GALLERY).nonzero().squeeze(1)
        queries = queries[:: max(1, len(queries) // SHOWN)][:SHOWN]
        if len(queries) == 0 or len(gallery) < 2:
            return
        rows: list[list[int]] = []
        for block, similarity in similarities(found.descriptors, roles, gallery, queries):
            nearest = gallery[similarity.topk(min(NEIGHBOURS, len(gallery) - 1)).indices]
            rows += [[query, *near] for query, near in zip(block.tolist(), nearest.tolist(), strict=True)]
        images = images_of(data, (number for row in rows for number in row))
        numbers = [number for row in rows for number in row]
        wrong = [bool(labels[number] != labels[row[0]]) for row in rows for number in row]
        captions = [short(data.eval_classes[int(labels[number])]) for number in numbers]
        draw_sheet([images[number] for number in numbers], captions, path, wrong, columns=len(rows[0]))


class Described(NamedTuple):
    """The descriptor of one evaluation image.

    Attributes:
        of_class: name of its class.
        label: number of its class among those of the evaluation.
        role: whether it is a query, in the gallery, or both.
        descriptor: (dim,).
        name: of the image; None if it has none.
    """

    of_class: str
    label: int
    role: int
    descriptor: Tensor
    name: str | None = None


def _of_timm(settings: Mapping[str, Any]) -> tuple[dict[str, Any], str, int]:
    """The arguments of `timm.create_model`, the pooling and the length of the descriptor.

    Raises:
        EwavitError: one of the latter does not work.
    """
    rest = {key: value for key, value in settings.items() if key not in ("pool", "dim")}
    pool, dim = settings.get("pool", "token"), settings.get("dim", 0)
    if pool not in POOLS:
        raise EwavitError(f"--model-kwargs pool={pool} is unknown: choose one of {', '.join(POOLS)}")
    if not isinstance(dim, int) or isinstance(dim, bool) or not 0 <= dim <= 65_536:
        raise EwavitError(f"--model-kwargs dim={dim} is out of range: give 0 (no projection) to 65,536")
    return {"num_classes": 0, "global_pool": POOLS[pool], **rest}, pool, dim


def _with_descriptor(model: nn.Module, name: str, pool: str, dim: int, sample: Tensor) -> nn.Module:
    """Put the descriptor in the place of a model's classifier, and check it with one forward pass.

    Raises:
        EwavitError: the model has no place for it, or cannot take the images.
    """
    config = timm.get_pretrained_cfg(name.split(".")[0])
    place = getattr(config, "classifier", None) or "head"
    try:
        if not isinstance(place, str) or not isinstance(model.get_submodule(place), nn.Identity):
            raise EwavitError(f"{name} has no single classifier: choose a ViT, e.g. vit_tiny_patch16_224")
        skipped = int(getattr(model, "num_prefix_tokens", 0)) if pool == "gem" else None
        model.set_submodule(place, Descriptor(int(model.num_features), dim, skipped))  # type: ignore[arg-type]
        with torch.no_grad():
            was_training = model.training
            output = model.eval()(sample.to(next(model.parameters()).device))
            model.train(was_training)
    except EwavitError:
        raise
    except Exception as problem:  # models raise what they like
        raise EwavitError(
            f"{name} gives no descriptor with pool={pool} of {tuple(sample.shape[2:])} images "
            f"({first_line(problem)}): choose another pool, --img-size or --model"
        ) from None
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise EwavitError(f"{name} gives no tokens to pool by {pool}: choose pool=mean or a ViT")
    return model
