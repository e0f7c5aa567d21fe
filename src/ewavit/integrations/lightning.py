"""`EWACallback` for the `Trainer` of Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging

from ewavit.core.averaging import ExpertAveraging, Schedule
from ewavit.core.diagnostics import expert_spread
from ewavit.core.moe import moe_layers
from ewavit.core.surgery import collapse, expand
from ewavit.errors import EwavitError


class EWACallback(Callback):  # type: ignore[misc]
    """Trains a `LightningModule` with averaged experts, and leaves the plain model.

    At the start of `fit` the module is expanded, before its optimizers are built. After every optimizer step
    the experts are averaged. At the end of `fit` the module is collapsed in place, so what is saved or tested
    then is plain. Checkpoints written during `fit` hold the experts and the count of steps, so that
    `fit(ckpt_path=...)` resumes exactly if the seed is set by `seed_everything` before. After `fit` the plain
    module loads them too, as in `test(ckpt_path="best")`: it takes the mean of the experts.

    Args:
        num_experts: N, 4 by default; ignored if the module is expanded already.
        share_rate: beta at the end of the ramp, or a schedule `step -> beta`.
        ramp_steps: optimizer steps of a linear rise from 0 to a share rate given as a number.
        every: average only after every k-th step, as strongly as k averagings together.
        options: further arguments of `ewavit.expand`, such as `select`, `unit` or `placement`.

    Examples:
        >>> Trainer(callbacks=[EWACallback(ramp_steps=1000)]).fit(module, loader)
    """

    def __init__(
        self,
        num_experts: int | None = None,
        share_rate: float | Schedule = 0.3,
        ramp_steps: int = 0,
        every: int = 1,
        **options: Any,
    ) -> None:
        self.num_experts, self.options = num_experts, options
        self.share_rate, self.ramp_steps, self.every = share_rate, ramp_steps, every
        self.averaging: ExpertAveraging | None = None
        self._layers: set[str] = set()  # that were expanded here
        self._loading = False  # experts into a plain module

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Expand the module.

        Raises:
            EwavitError: a `WeightAveraging` stands before this callback, so its copy of the module is dense,
                or no FFN can be expanded.
        """
        if stage != "fit":
            return
        before = trainer.callbacks[: trainer.callbacks.index(self)]
        if any(isinstance(each, WeightAveraging) for each in before):
            raise EwavitError("weight averaging copies the expanded module: put EWACallback before it")
        if not moe_layers(pl_module):
            expand(pl_module, self.num_experts, **self.options)
            # A module that is fitted again has them twice: the second finds nothing to do.
            pl_module.register_load_state_dict_pre_hook(self._before_load)
            pl_module.register_load_state_dict_post_hook(self._after_load)
            self._layers = set(moe_layers(pl_module))

    def _before_load(self, pl_module: LightningModule, state: Mapping[str, Any], *_: Any) -> None:
        """Expand a plain module that is about to load experts."""
        holds = any(key.startswith(f"{name}.experts.") for name in self._layers for key in state)
        if holds and not moe_layers(pl_module):
            expand(pl_module, self.num_experts, **self.options)
            self._loading = True

    def _after_load(self, pl_module: LightningModule, _: Any) -> None:
        """Collapse it again."""
        if self._loading:
            self._loading = False
            collapse(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average after the steps of the optimizers that hold the experts."""
        averaging = ExpertAveraging(pl_module, self.share_rate, self.ramp_steps, self.every)
        self.averaging = averaging.attach(*trainer.optimizers)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log `ewa/share_rate` and `ewa/spread`, the mean over layers."""
        if self.averaging is None or (batch_idx + 1) % trainer.log_every_n_steps:
            return
        spread = expert_spread(pl_module).values()
        pl_module.log("ewa/share_rate", self.averaging.share_rate)
        pl_module.log("ewa/spread", sum(spread) / len(spread))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collapse the module in place."""
        if self.averaging is not None:
            self.averaging.detach()
            self.averaging = None
            collapse(pl_module)
