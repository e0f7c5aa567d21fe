"""Experts Weights Averaging: train a Vision Transformer as averaged experts, deploy the plain model it was.

>>> import ewavit as ewa
>>> ewa.expand(model, num_experts=4)
>>> optimizer = torch.optim.AdamW(ewa.param_groups(model, weight_decay=0.05), lr=1e-3)
>>> ewa.ExpertAveraging(model, share_rate=0.3, ramp_steps=10_000).attach(optimizer)
>>> ...  # any training loop
>>> model = ewa.collapse(model)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ewavit.errors import EwavitError

if TYPE_CHECKING:  # the names are imported when they are first used: the command line starts without torch
    from collections.abc import Sequence
    from os import PathLike
    from pathlib import Path

    from torch.nn import Module

    from ewavit import distributed as distributed
    from ewavit.core.averaging import (
        Constant,
        CosineRamp,
        Early,
        ExpertAveraging,
        LinearRamp,
        average_experts_,
    )
    from ewavit.core.branches import ChannelCovariance, add_branch
    from ewavit.core.checkpoint_files import collapse_checkpoint, expert_metadata
    from ewavit.core.diagnostics import collapse_gap, expert_spread, routing_statistics
    from ewavit.core.ffn import find_ffns
    from ewavit.core.routing import TopK, auxiliary_loss, scale_auxiliary_loss
    from ewavit.core.surgery import (
        collapse,
        collapsed,
        dense_state_dict,
        expand,
        load_dense_state_dict,
        param_groups,
        summary,
    )

__version__ = "0.1.0"


def load(run: str | PathLike[str]) -> Module:
    """Load a trained model in eval mode.

    Args:
        run: the folder of a run of `ewavit train`, its checkpoint, or an exported file.

    Returns:
        The plain model. A routed run trained without `--collapse` gives its mixture instead.

    Raises:
        EwavitError: ewavit wrote no model there, or `ewavit[train]` is not installed.
    """
    from pathlib import Path

    try:
        from ewavit.training.export import load_model
    except ModuleNotFoundError as missing:
        raise EwavitError(f"ewavit.load needs {missing.name}: pip install 'ewavit[train]'") from None
    return load_model(Path(run))[0]


def predict(
    run: str | PathLike[str],
    inputs: str | Path | Sequence[str | Path],
    topk: int = 5,
    skip_bad_images: bool = False,
) -> list[dict[str, Any]]:
    """Predict for files without labels, prepared as in the evaluation of the training.

    Args:
        run: the folder of a run of `ewavit train`, its checkpoint, or an exported file.
        inputs: one or several files, folders and patterns such as "photos/*.jpg".
        topk: number of classes to give of each input.
        skip_bad_images: leave out files that cannot be read instead of raising an error.

    Returns:
        One dict for each file, in the order of the inputs. A classification gives "input", "prediction" (the
        class's number), "predicted_class", "probability", and the names and probabilities of `topk`
        classes.

    Raises:
        EwavitError: ewavit wrote no model there, a file cannot be read, or `ewavit[train]` is not installed.
    """
    from pathlib import Path

    try:
        from ewavit.training.inference import predict as of_files
    except ModuleNotFoundError as missing:
        raise EwavitError(f"ewavit.predict needs {missing.name}: pip install 'ewavit[train]'") from None
    places = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    return of_files(Path(run), places, topk=topk, skip_bad_images=skip_bad_images)[0].rows()


__all__ = [
    "ChannelCovariance",
    "Constant",
    "CosineRamp",
    "Early",
    "EwavitError",
    "ExpertAveraging",
    "LinearRamp",
    "TopK",
    "add_branch",
    "auxiliary_loss",
    "average_experts_",
    "collapse",
    "collapse_checkpoint",
    "collapse_gap",
    "collapsed",
    "dense_state_dict",
    "expand",
    "expert_metadata",
    "expert_spread",
    "find_ffns",
    "load",
    "load_dense_state_dict",
    "param_groups",
    "predict",
    "routing_statistics",
    "scale_auxiliary_loss",
    "summary",
]

if not TYPE_CHECKING:  # else type checkers would accept any name
    _ROOMS = (
        "averaging", "branches", "checkpoint_files", "diagnostics", "ffn", "routing", "surgery",
    )  # fmt: skip

    def __getattr__(name: str) -> Any:
        """Import a public name on its first use."""
        if name in ("core", "distributed"):
            return import_module(f"ewavit.{name}")
        for room in _ROOMS if name in __all__ else ():
            if hasattr(module := import_module(f"ewavit.core.{room}"), name):
                globals()[name] = value = getattr(module, name)
                return value
        raise AttributeError(f"module 'ewavit' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names and the dunders; not the rooms and imports of this file."""
    return sorted({*__all__, "distributed", *(name for name in globals() if name.startswith("__"))})
