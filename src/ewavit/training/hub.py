"""A model folder for a hub: stock weights and config, and a model card as README.md."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCardData, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from ewavit.core.checkpoint_files import is_checkpoint_file
from ewavit.errors import EwavitError, first_line
from ewavit.files import sync
from ewavit.training.card import ModelCard
from ewavit.training.export import export
from ewavit.training.hub_transformers import Written, is_transformers_folder, write_transformers
from ewavit.training.opening import recipe_of
from ewavit.training.places import portable_spec
from ewavit.training.recipe import Recipe
from ewavit.training.run_folder import RunFolder

# What a recipe says of the machine and of the folder, not of the model.
_OF_THE_MACHINE = ("output", "name", "data_dir", "workers", "log")
_EWA = ("experts", "share_rate", "ramp", "ramp_shape", "select", "unit", "placement", "average_every")
PAPER = "https://arxiv.org/abs/2308.06093"


def publish(
    source: Path,
    repo: str,
    to: Path | None = None,
    *,
    mean_expert: bool = False,
    licence: str | None = None,
    verdict: str | None = None,
) -> str:
    """Push the plain model of a run to a hub with a model card, or write the folder that would be pushed.

    Args:
        source: a run's folder, its checkpoint, or a folder that a Trainer of transformers wrote.
        repo: ORG/NAME on the hub; it is made if it does not exist.
        to: a new folder; then nothing is pushed. In the offline mode of huggingface_hub it is NAME in the
            working directory unless given.
        mean_expert: collapse a routed mixture.
        licence: an identifier of the hub, such as "apache-2.0".
        verdict: what a comparison says of the run.

    Returns:
        What was written or pushed, in words.

    Raises:
        EwavitError: wrong source or name, an existing folder, no token, or a hub that cannot be reached.
    """
    try:
        validate_repo_id(repo)
        _, name = repo.split("/")
    except (HFValidationError, ValueError):
        raise EwavitError(f"--hub {repo!r} does not work: give ORG/NAME") from None
    if is_checkpoint_file(source):
        raise EwavitError(f"{source} does not say its recipe and data: give the folder of a run to --hub")
    if to is None and constants.HF_HUB_OFFLINE:
        to = Path(name)
    if to is not None and (to.exists() or not to.parent.is_dir()):
        raise EwavitError(f"--to {to} does not work: give a new folder in an existing one")
    if to is None and get_token() is None:
        raise EwavitError(f"no token to push {repo}: run `hf auth login`, or write a folder with --to FOLDER")
    with tempfile.TemporaryDirectory(prefix=".ewavit-", dir=None if to is None else to.parent) as parent:
        folder = Path(parent) / "model"
        _write(source, folder, repo, mean_expert, licence, verdict)
        if to is None:
            return _push(folder, repo)
        sync(folder)
        os.replace(folder, to)
    return f"wrote {to}, the folder of {repo}; nothing was pushed"


def _push(folder: Path, repo: str) -> str:
    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload model by ewavit")
    except Exception as problem:  # of the hub, of its HTTP client, or of the network: no common class
        raise EwavitError(
            f"{repo} could not be pushed ({first_line(problem)}): write a folder with --to FOLDER"
        ) from None
    return f"pushed {repo}"


def _write(
    source: Path, folder: Path, repo: str, mean_expert: bool, licence: str | None, verdict: str | None
) -> None:
    """Write weights, config and README.md into a new folder."""
    if is_transformers_folder(source):
        found = write_transformers(source, folder)
        facts, sections = found.facts, _of_trainer(found, repo)
    else:
        export(source, folder, mean_expert=mean_expert)
        card = ModelCard.of_file(folder)
        assert card is not None
        recipe = recipe_of(source)
        row = {} if mean_expert else RunFolder(source).last_row() or {}
        facts, sections = _facts(card, recipe, row), _sections(card, recipe, row, repo)
    if verdict is not None:
        sections["Comparison"] = verdict
    base = facts.pop("base_licence", None)
    of_base = f" The weights that the training started from: {base}." if base else ""
    sections["Licence"] = (licence or "Not stated.") + of_base
    facts |= {"license": licence, "model_name": repo.partition("/")[2]}
    text = "".join(f"\n## {title}\n\n{body}\n" for title, body in sections.items() if body)
    head = f"---\n{ModelCardData(**facts).to_yaml()}\n---\n\n# {facts['model_name']}\n"
    (folder / "README.md").write_text(head + text, encoding="utf-8", errors="backslashreplace")


def _facts(card: ModelCard, recipe: Recipe | None, row: Mapping[str, str]) -> dict[str, Any]:
    """The metadata of the model card, under the names of the hub."""
    images, judge, data = bool(card.timm_config()), card.task.judge, card.data
    facts: dict[str, Any] = {
        "library_name": "timm" if images else "ewavit",
        "pipeline_tag": "image-classification" if images else None,
        "tags": ["ewavit", "experts-weights-averaging", *(["timm", "transformers"] if images else [])],
    }
    if row:
        task = "image-classification" if images else "point-clouds"
        value = round(float(row[f"eval_{judge.column}"]), 4)
        facts["eval_results"] = [EvalResult(task, data, data, judge.column, value, metric_name=judge.name)]
    if recipe is not None and recipe.pretrained:
        known = timm.get_pretrained_cfg(card.model)
        if known is not None:
            facts["base_licence"] = known.license
            facts["base_model"] = f"timm/{known.architecture}.{known.tag}".rstrip(".")
    return facts


def _sections(card: ModelCard, recipe: Recipe | None, row: Mapping[str, str], repo: str) -> dict[str, str]:
    """The sections of the model card by their titles."""
    settings = {} if recipe is None else _portable(recipe)
    ewa = {name: settings[name] for name in _EWA if name in settings}
    dense = not ewa or ewa["experts"] == 1
    results = {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")}
    sections = {
        "Model": _model(card.model, len(card.classes), dense),
        "Use": f"```python\n{_use(card, repo)}\n```\n\nInput: {card.input_text()}.",
        "Results": table(results),
        "Data": f"`{card.data}`. Classes: {_some(card.classes)}.",
        "Experts": "" if dense else table(ewa),
        "Preprocessing": table(card.pretrained_cfg),
    }
    if settings:
        text = yaml.safe_dump(settings, sort_keys=False).rstrip()
        sections["Recipe"] = f"`ewavit train --config FILE.yaml` with\n\n```yaml\n{text}\n```"
    return sections


def _of_trainer(found: Written, repo: str) -> dict[str, str]:
    """As `_sections`, for a folder of transformers' Trainer."""
    return {
        "Model": _model(found.architecture, len(found.classes), dense=not found.ewa),
        "Use": f"```python\n{found.use(repo)}\n```",
        "Results": table(found.results),
        "Data": f"Not recorded by the Trainer. Classes: {_some(found.classes)}.",
        "Experts": table(found.ewa),
        "Preprocessing": table(found.preparation) or "Not recorded: the Trainer had no `processing_class`.",
    }


def _model(name: str, classes: int, dense: bool) -> str:
    method = "" if dense else f", trained with [Experts Weights Averaging]({PAPER})"
    return f"A plain `{name}` with {classes:,} classes{method}. Written by ewavit."


def _some(names: Sequence[str], most: int = 20) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _portable(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe that another machine can use: no path of this one."""
    settings = {name: value for name, value in asdict(recipe).items() if name not in _OF_THE_MACHINE}
    settings["data"] = portable_spec(recipe.data)
    if recipe.initial_checkpoint is not None:
        settings["initial_checkpoint"] = Path(recipe.initial_checkpoint).name
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def _use(card: ModelCard, repo: str) -> str:
    if not card.timm_config():
        return card.loading_code(Path("model.safetensors"))
    return (
        "import timm\n"
        "from timm.data import create_transform, resolve_model_data_config\n\n"
        f'model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()\n'
        "transform = create_transform(**resolve_model_data_config(model))\n\n"
        "# or, in transformers:\n"
        "from transformers import AutoImageProcessor, AutoModelForImageClassification\n\n"
        f'processor = AutoImageProcessor.from_pretrained("{repo}")\n'
        f'model = AutoModelForImageClassification.from_pretrained("{repo}")'
    )


def table(values: Mapping[str, Any]) -> str:
    """Names and values as a Markdown table; empty without values."""
    rows = "".join(f"\n| {name} | {value} |" for name, value in values.items())
    return f"| | |\n|---|---|{rows}" if rows else ""
