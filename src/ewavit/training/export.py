"""From a run or a checkpoint to files that need no ewavit: safetensors with timm's keys, or a graph."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ewavit.core.checkpoint_files import EXPERTS, collapse_checkpoint, is_checkpoint_file
from ewavit.core.mixing import Mixer
from ewavit.core.moe import moe_layers
from ewavit.core.surgery import collapse, dense_state_dict
from ewavit.data.options import DataOptions
from ewavit.data.weight_files import check_finite
from ewavit.errors import MOST_CHARACTERS, EwavitError
from ewavit.files import is_torch_file, regular, remove, replacing
from ewavit.tasks.classification import ConfusionMeter
from ewavit.tasks.task import Metrics
from ewavit.tasks.timm_models import SMP
from ewavit.tasks.weights import fit
from ewavit.training.building import expand_by_recipe
from ewavit.training.card import ModelCard, RoutedMixture
from ewavit.training.checkpoint import load_checkpoint, save_tensors
from ewavit.training.evaluation import evaluate_batches, on_device
from ewavit.training.graph import read_onnx, write_graph
from ewavit.training.merging import interpolated
from ewavit.training.opening import open_for, recipe_of, splits
from ewavit.training.places import portable_spec
from ewavit.training.recipe import Recipe
from ewavit.training.report import Row
from ewavit.training.run_folder import RunFolder

LARGEST_DIFFERENCE = 1e-4  # of the logits, relative; beyond it an exported file is refused
LARGEST_CHANGE = 0.1  # of the judging metric, percentage points
GRAPHS = (".onnx", ".pt2")  # endings of files that hold the computation as well as the weights


def load_model(source: Path) -> tuple[nn.Module, ModelCard]:
    """What a run, a checkpoint folder or an exported safetensors file deploys, in eval mode.

    That is the plain model, or the mixture itself where a router was trained and its experts were kept.

    Raises:
        EwavitError: nothing there that ewavit wrote, or it is damaged.
    """
    if not source.exists():
        raise EwavitError(
            f"no run and no file {source}: give a run's folder, its checkpoint or an exported file"
        )
    if (source / "state.json").exists() or (source.is_dir() and not RunFolder(source).model.exists()):
        return _from_checkpoint(source)
    file = RunFolder(source).model if source.is_dir() else source
    run = RunFolder(file.parent)
    if file in (run.model, run.average, run.best) and (damage := run.damage(file)):
        if file != run.model or not run.has_checkpoint:
            raise EwavitError(f"{file} is damaged ({damage}): use another copy of it")
        warnings.warn(f"{file} is damaged ({damage}): used the run's checkpoint instead", stacklevel=2)
        return _from_checkpoint(run.path)
    if file.suffix == ".pt2":
        raise EwavitError(
            f"{file} can run code when it is loaded: give the run, or a .safetensors or .onnx file"
        )
    if is_torch_file(file):
        raise EwavitError(
            f"{file} is a file of torch.save, which does not say its model, data and preprocessing: give the "
            f"run or a file that ewavit wrote, or train from its weights with --initial-checkpoint {file}"
        )
    try:
        with safe_open(regular(file), "pt") as handle:
            metadata = handle.metadata() or {}
        weights = load_file(file)
    except (OSError, SafetensorError) as problem:
        raise EwavitError(f"{file} cannot be read as safetensors ({problem}): export it again") from None
    card = ModelCard.of_metadata(metadata, str(file))
    if card is None:
        raise EwavitError(f"{file} does not say which model it holds: give a file or run that ewavit wrote")
    if EXPERTS in metadata:
        raise EwavitError(
            f"{file} holds experts: give the folder that it is in, or export it to .safetensors first"
        )
    model = card.build_deployed(weights, str(file))
    _load(model, weights, file)
    return model.eval(), _recorded_places(card, RunFolder(file.parent))


def _load(model: nn.Module, weights: Mapping[str, Tensor], file: Path) -> None:
    """Load finite weights that are all there and no more."""
    check_finite(weights, model.state_dict(), str(file))
    try:
        model.load_state_dict(weights)
    except RuntimeError as problem:
        reason = " ".join(str(problem).split())[:MOST_CHARACTERS]
        raise EwavitError(f"{file} holds another model than it says ({reason}): export it again") from None


def _from_checkpoint(source: Path) -> tuple[nn.Module, ModelCard]:
    model, card, recipe = _in_training(source)
    if (recipe.experts > 1 and not recipe.keeps_experts) or recipe.branch:
        collapse(model)
    return model, card


def _in_training(source: Path) -> tuple[nn.Module, ModelCard, Recipe]:
    """The model of a checkpoint with all of its experts, in eval mode."""
    checkpoint = load_checkpoint(source)
    if checkpoint.warning:
        warnings.warn(checkpoint.warning, stacklevel=4)
    facts, progress = checkpoint.facts, checkpoint.facts["progress"]
    recipe = Recipe.from_dict(facts["recipe"], str(checkpoint.path))
    card = ModelCard.from_dict(facts["card"], str(checkpoint.path))
    if progress["rows"] and progress["batch"] == 0 and progress.get("pending") is None:
        card = replace(card, metric=progress["rows"][-1][f"eval_{card.task.judge.column}"])
    recipe = replace(recipe, placement="local")  # replicas are saved stacked
    dense = card.build(checkpoint.model, str(checkpoint.path), recipe.experts)
    model = expand_by_recipe(dense, recipe)
    _load(model, checkpoint.model, checkpoint.path)
    return model.eval(), card, recipe


def _each_trained(source: Path) -> list[dict[str, Tensor]]:
    """The plain weights of a dense run, or those with each expert of a run in turn."""
    folder = source.is_dir() and (RunFolder(source).has_checkpoint or (source / "state.json").exists())
    model = _in_training(source)[0] if folder else load_model(source)[0]
    if any(moe.routed for moe in moe_layers(model).values()):
        raise EwavitError(f"{source} is a routed mixture, and its experts are no models: give another run")
    dense = dense_state_dict(model)
    layers = moe_layers(model)
    models = [dict(dense) for _ in range(max([1, *(moe.num_experts for moe in layers.values())]))]
    for layer, moe in layers.items():
        if isinstance(moe.dispatcher, Mixer):  # fused: one model
            return models[:1]
        for name, values in moe.experts.values_by_parameter():
            for weights, value in zip(models, values, strict=True):
                weights[f"{layer}.{name}" if layer else name] = value.detach()
    return models


def _move_towards(model: nn.Module, sources: Sequence[Path], start: Path, by: str) -> str:
    """Merge runs and move them towards the first weights (`--toward`); returns what was done, in words."""
    try:
        share = None if by == "stock" else float(by)
    except ValueError:
        raise EwavitError(f"--by {by} is no share: give a number from 0 to 1, or stock") from None
    state = model.state_dict()
    weights = fit(str(start), state, (), 0).weights
    check_finite(weights, state, str(start))
    trained = [state] if share is not None and len(sources) == 1 else []
    if not trained:
        trained = [each for source in sources for each in _each_trained(source)]
    if any(each.keys() != state.keys() for each in trained):
        raise EwavitError(f"{', '.join(map(str, sources))} are not runs of one model: give such")
    try:
        merged, found = interpolated(trained, weights, share)
    except EwavitError as problem:
        hint = ": give runs of other seeds too, or --by 0.5" if len(trained) == 1 and share is None else ""
        raise EwavitError(f"--toward {start} --by {by}: {problem}{hint}") from None
    model.load_state_dict(merged)
    what = "Model Stock" if share is None else f"{share:g} of the way back"
    return f"{found} of {len(state)} tensors moved towards {start} ({what}), the others as trained"


def _recorded_places(card: ModelCard, run: RunFolder) -> ModelCard:
    """The card of a run's file, with the places of the data as a checkpoint of the run names them."""
    for folder in (run.checkpoint, run.previous_checkpoint):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            facts = json.loads((folder / "state.json").read_text())["facts"]["card"]
            found = ModelCard.from_dict(facts, str(folder))
            if portable_spec(found.data) == card.data:
                places = {name: getattr(found, name) for name in ("data", "absolute_data", "data_dir")}
                return replace(card, **places)
    return card


def save_models(
    run: Path,
    card: ModelCard,
    recipe: Recipe,
    row: Row,
    model: nn.Module,
    averaged: nn.Module | None,
    *,
    write: bool,
) -> ModelCard:
    """Leave `model.safetensors` in a run's folder, and `model-average.safetensors` of an average.

    Args:
        run: the folder.
        card: of the plain model.
        recipe: it says whether the experts are kept.
        row: the last epoch's; the judging metrics of both are in it.
        model: with its experts, and so is `averaged`.
        averaged: the average of the weights.
        write: false in all processes but one, which only take part: replicas meet for it.

    Returns:
        The model's card.
    """
    column = card.task.judge.column
    state_of = nn.Module.state_dict if recipe.keeps_experts else dense_state_dict
    weights = state_of(model)
    average = None if averaged is None else state_of(averaged)
    if recipe.keeps_experts:
        card = replace(card, mixture=RoutedMixture.of(model))
    if write and average is not None:
        of_average = replace(card, metric=row[f"average_{column}"])
        save_tensors(average, RunFolder(run).average, of_average.metadata())
    card = replace(card, metric=row[f"eval_{column}"])
    if write:
        _write_config(card, run)
        with replacing(RunFolder(run).model) as partial:  # the last file: with it the run is finished
            save_tensors(weights, partial, card.metadata())
            RunFolder(run).seal(partial)
    return card


def save_best(run: Path, card: ModelCard, recipe: Recipe, row: Row, model: nn.Module, *, write: bool) -> None:
    """Write the weights of the epoch of `row` to `model-best.safetensors`; arguments as of `save_models`."""
    average = f"average_{card.task.judge.column}" in row
    weights = nn.Module.state_dict(model) if recipe.keeps_experts else dense_state_dict(model)
    if recipe.keeps_experts:
        card = replace(card, mixture=RoutedMixture.of(model))
    if write:
        metric = row[f"{'average' if average else 'eval'}_{card.task.judge.column}"]
        save_tensors(weights, RunFolder(run).best, replace(card, metric=metric).metadata())


def _write_config(card: ModelCard, folder: Path) -> None:
    """Write the `config.json` of a folder with `model.safetensors`, if timm can load the model."""
    if config := card.timm_config():
        with replacing(RunFolder(folder).config) as partial:
            partial.write_text(json.dumps(config, indent=2) + "\n")


def predictor(source: Path) -> tuple[Callable[[Tensor], Tensor], ModelCard]:
    """What maps normalised images (batch, channels, height, width) to logits, and its card."""
    if source.suffix != ".onnx":
        model, card = load_model(source)
        return model, card
    predict, metadata = read_onnx(source)
    of_file = ModelCard.of_metadata(metadata, str(source))
    if of_file is None:
        raise EwavitError(f"{source} does not say which model it holds: give a file that ewavit wrote")
    return predict, of_file


def evaluate(
    source: Path,
    data: str | None = None,
    batch_size: int = 128,
    *,
    confusion: bool = False,
    **data_options: Any,
) -> Metrics:
    """Loss and accuracy of a run, a checkpoint or an exported file on the evaluation images of a data set.

    Args:
        source: a run's folder, a checkpoint folder, a safetensors or an ONNX file that ewavit wrote.
        data: data spec; the one it was trained on unless given. Its classes are matched by name.
        batch_size: images per batch.
        confusion: also return the confusion matrix.
        data_options: further fields of `DataOptions`.

    Raises:
        EwavitError: the source or the data cannot be read, the names of their classes differ, or the task has
            no confusion matrix.
    """
    predict, card = predictor(source)
    if confusion and not card.task.names_classes:
        raise EwavitError(
            f"{source} classifies the parts of {card.task.kind}: --per-class and --confusion need one class "
            "for each input, leave them out"
        )
    opened = open_for(card, data, DataOptions(batch_size=batch_size, **data_options))
    predict, device = on_device(predict)
    for note in opened.notes:
        print(f"note: {note}", file=sys.stderr)
    meter = card.task.meter(opened, device)
    if confusion:
        meter = ConfusionMeter(meter, opened.classes, device)
    return evaluate_batches(opened.voting(predict), opened.eval_batches(), meter)


def export(
    source: Path,
    to: Path,
    data: str | None = None,
    mean_expert: bool = False,
    toward: Path | None = None,
    by: str | None = None,
    more: Sequence[Path] = (),
) -> str:
    """Write the plain model of a run or checkpoint as one file, and check the file against it.

    Safetensors of an expanded model, one file or shards, are collapsed tensor by tensor instead, whatever
    model that is and however large (`collapse_checkpoint`); nothing is run then.

    The logits of the file on random images must be the model's, and, where the run's data can be opened, its
    accuracy the run's. A file that fails is not left behind.

    Args:
        source: a run's folder, a checkpoint folder, or safetensors of an expanded model.
        to: a path ending in .safetensors (loaded by stock timm), .onnx or .pt2 (`torch.export.load`). Or a
            new folder, for shards, or for `model.safetensors` with the `config.json` that timm loads it by.
        data: data spec; the one it was trained on unless given.
        mean_expert: collapse a routed mixture; its accuracy is said, and not compared with the run's.
        toward: the weights that the training started from; the model is moved towards them.
        by: the share of that way, 0 to 1 (WiSE-FT), or "stock" (Model Stock, of experts or of runs).
        more: runs of the same model to merge with the source, for `toward` only.

    Returns:
        What was written and checked, in words.

    Raises:
        EwavitError: wrong source or ending, an unwritable path, a file that does not compute the same, or a
            routed mixture without `mean_expert`.
    """
    if (toward is None) != (by is None):
        raise EwavitError("--toward FILE and --by 0.5 (or stock) belong together: give both or neither")
    if more and toward is None:
        raise EwavitError(f"{more[0]} is a second run: merge runs with --toward FILE --by 0 or stock")
    to_run = data is not None or mean_expert or toward is not None
    if is_checkpoint_file(source) and to.suffix in (".safetensors", "") and not to_run:
        return f"{collapse_checkpoint(source, to)}; no logits or accuracy compared: nothing was run"
    _check_target(to)
    model, card, of_file, before = _plain(source, mean_expert)
    moved = ""
    if toward is not None and by is not None:
        moved = "; " + _move_towards(model, (source, *more), toward, by)
        of_file, before = replace(of_file, metric=None), "before that move the run had"
    partial = to.with_name(f".ewavit-unchecked-{to.name}")
    remove(partial)  # what a killed process left
    try:
        _write(model, of_file, partial)
        checked = _check(partial, model, card, data, before, source)
        os.replace(partial, to)
    finally:
        remove(partial)
    file = to if to.suffix else RunFolder(to).model
    said = f"wrote {to} ({file.stat().st_size / 1e6:.1f} MB): {checked}{moved}"
    if to.suffix in GRAPHS:
        return said
    return f"{said}\nload it with\n\n{of_file.loading_code(file)}\n\nand give it {of_file.input_text()}"


def _check_target(to: Path) -> None:
    """Refuse a place where no file can be written."""
    if to.suffix not in (".safetensors", *GRAPHS, ""):
        raise EwavitError(
            f"{to} ends in {to.suffix}: choose a name ending in .safetensors, .onnx or .pt2, or a new folder"
        )
    if not to.suffix and to.exists():
        raise EwavitError(f"{to} exists already: choose a new folder")
    if to.exists() and to.suffix and not to.is_file():
        raise EwavitError(f"{to} is there already, and is no file: choose another name")
    if not to.parent.is_dir():
        raise EwavitError(f"no folder {to.parent}: make it first")


def _plain(source: Path, mean_expert: bool) -> tuple[nn.Module, ModelCard, ModelCard, str]:
    """The plain model of a source, its card, the card of its file, and what the run had before."""
    model, card = load_model(source)
    if not moe_layers(model):
        return model, card, card, ""
    if not mean_expert:
        raise EwavitError(
            f"{source} keeps the experts of its router, which no plain model equals: use "
            f"ewavit.load({str(source)!r}), or --collapse to export the mean expert, another model"
        )
    collapse(model)
    of_file = replace(card, metric=None, mixture=None)
    return model, card, of_file, "with its router and all experts the run had"


def _write(model: nn.Module, card: ModelCard, to: Path) -> None:
    if to.suffix in GRAPHS:
        resizable = _of_other_size(model, card) is not None
        write_graph(model, card.sample(2), card.metadata(), to, resizable)
        return
    if not to.suffix:
        to.mkdir()
        _write_config(card, to)
    save_tensors(model.state_dict(), to if to.suffix else RunFolder(to).model, card.metadata())


@torch.no_grad()
def _of_other_size(model: nn.Module, card: ModelCard) -> Tensor | None:
    """Images of another size, if the model takes such images."""
    if not card.img_size or card.model.startswith(SMP):  # a graph of those fixes their sizes
        return None
    images = replace(card, img_size=2 * card.img_size).sample(2)
    try:
        fits = model(images).shape[:2] == (2, len(card.classes))
    except Exception:  # models raise what they like for images that do not fit
        return None
    return images if fits else None


@torch.no_grad()
def _check(file: Path, model: nn.Module, card: ModelCard, data: str | None, before: str, source: Path) -> str:
    # Only this file, just written, is loaded as .pt2: such a file of a stranger may run code.
    predict = torch.export.load(file).module() if file.suffix == ".pt2" else predictor(file)[0]
    other = _of_other_size(model, card) if file.suffix in GRAPHS else None
    compared = [card.sample(4)] if other is None else [card.sample(4), other]
    logits = [(predict(images), model(images)) for images in compared]
    difference = max(float((found - expected).norm() / expected.norm()) for found, expected in logits)
    if not difference <= LARGEST_DIFFERENCE:
        raise EwavitError(
            f"the written file's logits differ from the model's by {difference:.1e}: it was removed"
        )
    said = f"logits equal the model's (relative difference {difference:.0e})"
    if card.metric is None and data is None:
        return f"{said}, accuracy not compared: the checkpoint was written within an epoch"
    try:
        recipe = None if data is not None else recipe_of(source)
        of_run = {} if recipe is None else splits(recipe)
        opened = open_for(card, data, DataOptions(batch_size=128, **of_run))
    except EwavitError as problem:
        if data is not None:
            raise
        return f"{said}, accuracy not compared: {problem}"
    task, judge = card.task, card.task.judge
    metrics = evaluate_batches(predict, opened.eval_batches(), task.meter(opened))
    found_metric = metrics[judge.column]
    said += f", {judge.name} {judge.text(found_metric)} on {metrics.count:,} {task.kind}"
    if card.metric is None or data is not None:
        return said
    if before:
        return f"{said} ({before} {judge.text(card.metric)})"
    if abs(found_metric - card.metric) > LARGEST_CHANGE:
        raise EwavitError(f"{said}, but the run had {judge.text(card.metric)}: the file was removed")
    return f"{said} (the run: {judge.text(card.metric)})"
