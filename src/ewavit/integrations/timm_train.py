"""timm's `train.py`, unmodified, with averaged experts.

    python -m ewavit.integrations.timm_train PATH/train.py --ewa --ewa-share-rate 0.3 ... its own flags

The flags mirror those of `--model-ema`. The first model that the script creates is expanded, its optimizer's
steps are followed by the averaging, and `--resume` goes on exactly: the count of steps is in the optimizer's
state. At the end a plain copy is written beside each checkpoint that timm keeps as best and last.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm.models
import timm.optim
import timm.utils
import torch
from torch import nn

from ewavit.core.averaging import ExpertAveraging
from ewavit.core.moe import moe_layers
from ewavit.core.surgery import dense_state_dict, expand
from ewavit.errors import EwavitError, first_line

KEPT = ("model_best", "last")  # checkpoints of timm's saver
STATES = ("state_dict", "state_dict_ema")


def flags() -> argparse.ArgumentParser:
    """The parser of the flags that are not timm's."""
    parser = argparse.ArgumentParser(
        prog="python -m ewavit.integrations.timm_train", allow_abbrev=False,
        usage="%(prog)s PATH/train.py [--ewa ...] [the script's own flags]",
    )  # fmt: skip
    parser.add_argument("script", type=Path, help="timm's train.py")
    parser.add_argument("--ewa", action="store_true", help="turn FFNs into averaged experts")
    parser.add_argument("--ewa-experts", type=int, default=4, help="number of experts (default: 4)")
    parser.add_argument("--ewa-share-rate", type=float, default=0.3, help="share rate (default: 0.3)")
    parser.add_argument("--ewa-ramp-steps", type=int, default=0, help="steps of its linear rise from 0")
    parser.add_argument("--ewa-every", type=int, default=1, help="average every k-th step (default: 1)")
    parser.add_argument("--ewa-select", default="alternate", help="which FFNs, as in ewavit.expand")
    parser.add_argument("--ewa-unit", choices=("token", "image"), default="token", help="what is dealt")
    return parser


class Patched:
    """What the script gets from timm instead: it creates an expanded model, and averages it.

    Args:
        options: of `flags`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model: nn.Module | None = None
        self.savers: list[Any] = []
        self._create, self._optimizer = timm.models.create_model, timm.optim.create_optimizer_v2
        self._saver = timm.utils.CheckpointSaver

    def create_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        """`timm.create_model`; the first model is expanded, a later one is a teacher."""
        model: nn.Module = self._create(*args, **kwargs)
        if self.model is None:
            self.model = expand(
                model, self.options.ewa_experts, select=self.options.ewa_select, unit=self.options.ewa_unit
            )
        return model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """`timm.optim.create_optimizer_v2`, with the averaging attached."""
        optimizer = self._optimizer(*args, **kwargs)
        if self.model is not None:
            options = self.options
            averaging = ExpertAveraging(
                self.model, options.ewa_share_rate, options.ewa_ramp_steps, options.ewa_every
            )
            averaging.attach(optimizer)
        return optimizer

    def make_saver(self, *args: Any, **kwargs: Any) -> Any:
        """`timm.utils.CheckpointSaver`, remembered."""
        self.savers.append(self._saver(*args, **kwargs))
        return self.savers[-1]

    def write_plain(self) -> list[Path]:
        """Write a plain copy of each checkpoint in `KEPT`, without the optimizer; returns the files."""
        model = self.model
        written: list[Path] = []
        if model is None or not moe_layers(model):
            return written
        model.cpu()
        for saver in self.savers:
            for name in KEPT:
                source = Path(saver.checkpoint_dir, f"{name}{saver.extension}")
                if not source.is_file():
                    continue
                with torch.serialization.safe_globals([argparse.Namespace]):
                    state = torch.load(source, map_location="cpu", weights_only=True)
                state.pop("optimizer", None)
                for key in STATES:
                    if key in state:
                        model.load_state_dict(state[key])
                        state[key] = {n: value.clone() for n, value in dense_state_dict(model).items()}
                target = source.with_name(f"{name}-plain{saver.extension}")
                torch.save(state, target)
                written.append(target)
        return written


def main(words: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    options, own = flags().parse_known_args(words)
    if not options.script.is_file():
        print(f"ewavit: {options.script} is no file: give the path of timm's train.py", file=sys.stderr)
        return 2
    patched = Patched(options)
    replaced: dict[tuple[Any, str], Callable[..., Any]] = {
        (timm.models, "create_model"): patched.create_model,
        (timm.optim, "create_optimizer_v2"): patched.create_optimizer,
        (timm.utils, "CheckpointSaver"): patched.make_saver,
    }
    before = {place: getattr(*place) for place in replaced}
    argv = sys.argv
    try:
        if options.ewa:
            for (module, name), value in replaced.items():
                setattr(module, name, value)
        sys.argv = [str(options.script), *own]
        runpy.run_path(str(options.script), run_name="__main__")
        for file in patched.write_plain():
            print(f"the plain model is {file}")
    except EwavitError as problem:
        print(f"ewavit: {first_line(problem)}", file=sys.stderr)
        return 2
    finally:
        sys.argv = argv
        for (module, name), value in before.items():
            setattr(module, name, value)
    return 0


if __name__ == "__main__":
    sys.exit(main())
