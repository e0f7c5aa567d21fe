"""A folder that transformers' Trainer wrote, for a hub: the plain model, its processor, the logs."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ewavit.core.checkpoint_files import is_expert_key
from ewavit.errors import EwavitError, first_line
from ewavit.files import regular

CONFIG, PROCESSOR, STATE = "config.json", "preprocessor_config.json", "trainer_state.json"


@dataclass(frozen=True)
class Written:
    """What was written, and what the Trainer says of it."""

    architecture: str
    classes: tuple[str, ...]
    preparation: dict[str, Any]  # of images; empty without a file of a processor
    results: dict[str, Any]  # the last evaluation
    ewa: dict[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """The metadata of the model card, under the names of the hub."""
        images = self.architecture.endswith("ForImageClassification")
        return {
            "library_name": "transformers",
            "pipeline_tag": "image-classification" if images else None,
            "tags": ["ewavit", "experts-weights-averaging"],
        }

    def use(self, repo: str) -> str:
        """Python code that loads the model."""
        images = self.architecture.endswith("ForImageClassification")
        name = "AutoModelForImageClassification" if images else self.architecture
        lines = [f"from transformers import AutoImageProcessor, {name}\n"]
        lines += [f'processor = AutoImageProcessor.from_pretrained("{repo}")'] if self.preparation else []
        return "\n".join([*lines, f'model = {name}.from_pretrained("{repo}")'])


def is_transformers_folder(folder: Path) -> bool:
    """Whether transformers wrote a folder: its `config.json` names a class of transformers."""
    return "architectures" in _json(folder / CONFIG)


def write_transformers(source: Path, folder: Path) -> Written:
    """Write the plain model of a Trainer's folder, with the configuration of its processor.

    Args:
        source: written by `save_model`, or a checkpoint of a model with experts.
        folder: new.

    Raises:
        EwavitError: transformers is missing or has no such class, or the weights are not those of the model.
    """
    try:
        import transformers
    except ImportError:
        raise EwavitError(f"{source} needs transformers: pip install 'ewavit[hf]'") from None
    config = _json(source / CONFIG)
    name = str((config["architectures"] or [""])[0])
    architecture: Any = getattr(transformers, name, None)
    if transformers.PreTrainedModel not in getattr(architecture, "__mro__", ()):
        raise EwavitError(
            f"{source} holds a {name[:100]!r}, no class of transformers: push it with its own code"
        )
    try:
        model, report = architecture.from_pretrained(
            source, output_loading_info=True, local_files_only=True, use_safetensors=True
        )
    except Exception as problem:  # of transformers, of safetensors or of a file: no common class
        raise EwavitError(f"{source} cannot be loaded by transformers ({first_line(problem)})") from None
    wrong = [*report["missing_keys"], *(key for key in report["unexpected_keys"] if not is_expert_key(key))]
    if wrong:
        raise EwavitError(f"{source} does not hold a plain {name} ({sorted(wrong)[0]}): save it again")
    model.config._name_or_path = ""  # else a path of this machine
    model.save_pretrained(folder)
    written, problems = architecture.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    state, found = model.state_dict(), written.state_dict()
    if problems["missing_keys"] or any(not torch.equal(value, found[key]) for key, value in state.items()):
        raise EwavitError(f"{source} was not written as it is: it was removed")
    preparation = _json(source / PROCESSOR)
    if preparation:
        transformers.AutoImageProcessor.from_pretrained(source, local_files_only=True).save_pretrained(folder)
    classes = tuple(str(value) for value in model.config.id2label.values())
    return Written(name, classes, preparation, *_logged(_json(source / STATE)))


def _logged(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last evaluation and the settings of EWA in the state of a Trainer; empty where it has none."""
    rows = [row for row in state.get("log_history", []) if isinstance(row, dict)]
    results = next((row for row in reversed(rows) if any(key.startswith("eval_") for key in row)), {})
    shown = {key.removeprefix("eval_"): value for key, value in results.items() if key.startswith("eval_")}
    saved = [
        each.get("args", {})
        for each in state.get("stateful_callbacks", {}).values()
        if isinstance(each, dict)
    ]
    ewa: dict[str, Any] = next((args for args in saved if "share_rate" in args), {})
    return shown, ewa


def _json(file: Path) -> dict[str, Any]:
    """A JSON object in a file; empty where there is none."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(regular(file).read_text())
        return found if isinstance(found, dict) else {}
    return {}
