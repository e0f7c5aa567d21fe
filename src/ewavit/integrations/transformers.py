"""`EWACallback` for the `Trainer` of transformers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ewavit.core.averaging import ExpertAveraging, Schedule
from ewavit.core.diagnostics import expert_spread
from ewavit.core.moe import moe_layers
from ewavit.core.surgery import collapse, expand
from ewavit.errors import EwavitError


class EWACallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Trains the model of a `Trainer` with averaged experts, and leaves the plain model.

    When the Trainer is made, the model is expanded. After every optimizer step the experts are averaged. When
    training ends, the model is collapsed in place: `trainer.save_model`, `save_pretrained` and `push_to_hub`
    then write a stock model. The Trainer's checkpoints hold the experts as well, so that training resumes
    exactly, and `load_best_model_at_end` loads them before the collapse.

    Args:
        num_experts: N, 4 by default; ignored if the model is expanded already.
        share_rate: beta at the end of the ramp, or a schedule `step -> beta`.
        ramp_steps: optimizer steps of a linear rise from 0 to a share rate given as a number.
        every: average only after every k-th step, as strongly as k averagings together.
        options: further arguments of `ewavit.expand`, such as `select` or `unit`.

    Raises:
        EwavitError: the Trainer shards the model (FSDP); or from `expand` or `ExpertAveraging`, for example
            if the model has no FFN that can be expanded.

    Examples:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[EWACallback(ramp_steps=1000)])
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

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Expand the model, before the Trainer builds its optimizer."""
        if args.fsdp:
            raise EwavitError(
                "EWACallback collapses the model in place, and a sharded model cannot be: leave out fsdp, or "
                "shard the model in your own loop (docs/distributed.md)"
            )
        model: nn.Module = kwargs["model"]
        if not moe_layers(model):
            expand(model, self.num_experts, **self.options)
        self.num_experts = next(iter(moe_layers(model).values())).num_experts

    def state(self) -> dict[str, Any]:
        """The settings, for `trainer_state.json`."""
        rate = self.share_rate if isinstance(self.share_rate, int | float) else repr(self.share_rate)
        numbers = {"num_experts": self.num_experts, "ramp_steps": self.ramp_steps, "every": self.every}
        return {"args": {"share_rate": rate, **numbers}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average after the steps of the optimizer; a resumed one counts on from its checkpoint."""
        averaging = ExpertAveraging(kwargs["model"], self.share_rate, self.ramp_steps, self.every)
        self.averaging = averaging.attach(kwargs["optimizer"])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add `ewa/share_rate` and `ewa/spread`, the mean over layers, to the logs of training."""
        logs = kwargs["logs"]
        if self.averaging is None or "loss" not in logs:
            return
        spread = expert_spread(self.averaging.model).values()
        mine = {"ewa/share_rate": self.averaging.share_rate, "ewa/spread": sum(spread) / len(spread)}
        logs.update(mine)
        state.log_history[-1].update(mine)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Collapse the model in place."""
        if self.averaging is not None:
            self.averaging.detach()
            self.averaging = None
            collapse(kwargs["model"])
