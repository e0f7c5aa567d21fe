"""Controls that average a run's weights: EMA, switch EMA, SWA and TWA, behind one seam of the loop.

Each keeps `module`, an averaged copy of the model. It may be an expanded model: averages are linear in the
weights, so to collapse the average and to average the collapsed models is the same.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from ewavit.core.moe import MoE
from ewavit.data.batches import Batch
from ewavit.training.recipe import Recipe

Batches = Callable[
    [int], Iterator[Batch]
]  # an extra epoch (0, 1, ...) -> the same training batches each time
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]  # model, images, targets -> mean loss of the batch

LEARNING_RATE = 0.1  # of TWA's coefficients, in units of the checkpoints' spread


def weight_average(recipe: Recipe, model: nn.Module) -> WeightAverage | None:
    """The average that a recipe asks for, or None.

    Args:
        recipe: its `model_ema...`, `swa` and `twa` settings, of which it allows one kind.
        model: the trained model, on its device, neither wrapped nor compiled; it is copied.
    """
    if recipe.model_ema:
        return MovingAverage(
            model, recipe.model_ema_decay, warmup=recipe.model_ema_warmup, switch=recipe.model_ema_switch
        )
    if recipe.swa:
        return StochasticWeightAverage(model, recipe.epochs, recipe.swa)
    if recipe.twa:
        return TrainableWeightAverage(model, recipe.twa)
    if recipe.toward_start:
        return TowardStart(model, recipe.toward_start)
    return None


class WeightAverage:
    """What the loop calls; the base class averages nothing.

    Attributes:
        module: the averaged model, of the trained model's structure, in eval mode.
    """

    def __init__(self, model: nn.Module, module: nn.Module) -> None:
        self.model, self.module = model, module.eval()

    @property
    def ready(self) -> bool:
        """Whether `module` holds an average yet; before, the model itself counts."""
        return True

    def after_step(self, step: int) -> None:
        """Follow an optimizer step; `step` counts those done (1, 2, ...)."""

    def after_epoch(self, epoch: int) -> None:
        """Follow an epoch, before it is evaluated; `epoch` counts those done (1, 2, ...)."""

    def holds_learning_rate(self, epoch: int) -> bool:
        """Whether the learning rate stays as it is in the epoch after `epoch` epochs done (0, 1, ...)."""
        return False

    def finish(self, batches: Batches, loss: Loss) -> int:
        """Complete the average after the last epoch.

        Args:
            batches: training batches of an extra epoch, counted from 0; it seeds the draws of every batch.
            loss: what the model is trained on.

        Returns:
            The training images that it took, over all processes.
        """
        return 0

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resumption needs, as a tree of tensors and numbers."""
        return {"module": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.module.load_state_dict(state["module"])


class MovingAverage(WeightAverage):
    """Exponential moving average over the optimizer steps, as timm keeps it.

    Args:
        model: the trained model.
        decay: share of the average that a step keeps.
        warmup: let the decay grow from 0.
        switch: Switch EMA (arXiv 2402.09240): after every epoch the model takes the averaged weights; the
            optimizer's state stays.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = False, switch: bool = False) -> None:
        self.ema = ModelEmaV3(model, decay, use_warmup=warmup)
        self.switch = switch
        super().__init__(model, self.ema.module)

    def after_step(self, step: int) -> None:
        self.ema.update(self.model, step=step)

    def after_epoch(self, epoch: int) -> None:
        if self.switch:
            self.model.load_state_dict(self.module.state_dict())


class StochasticWeightAverage(WeightAverage):
    """SWA (arXiv 1803.05407): the plain mean of the weights at the last epochs' ends, learning rate held.

    Args:
        model: the trained model.
        epochs: of the whole training.
        share: of the training, at its end, whose epoch ends are averaged; at least one epoch.
    """

    def __init__(self, model: nn.Module, epochs: int, share: float) -> None:
        self.average = AveragedModel(model)
        self.first_epoch = epochs - max(1, round(share * epochs))  # epochs done before it
        super().__init__(model, self.average.module)

    @property
    def ready(self) -> bool:
        return int(self.average.n_averaged) > 0

    def after_epoch(self, epoch: int) -> None:
        if epoch > self.first_epoch:
            self.average.update_parameters(self.model)

    def holds_learning_rate(self, epoch: int) -> bool:
        return epoch >= self.first_epoch

    def finish(self, batches: Batches, loss: Loss) -> int:
        return _refresh_batch_norm(self.module, batches)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"n_averaged": int(self.average.n_averaged)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.average.n_averaged.fill_(state["n_averaged"])


class TrainableWeightAverage(WeightAverage):
    """TWA (arXiv 2205.13104): the coefficients of the last checkpoints are learned on training data.

    Until `finish`, `module` is the mean of the checkpoints. From there `finish` learns within their span,
    w = mean + s P z: P is an orthonormal basis, s the checkpoints' root mean square distance from their mean,
    z the few numbers learned, with the model in training mode. The mean is kept if the learned point's loss
    on the first epoch's batches is not lower.

    The optimizer is Adam with a cosine to 0 and no weight decay, which the authors' code takes for ViTs.
    What it takes for CNNs, SGD with momentum and learning rate 2, ruins a ViT: along the mean itself, a
    direction of the span, the loss is far too sharp. The authors' rate of 1e-3 hardly moves in a short run;
    0.1 of the spread s follows the scale of the weights. A ViT 64 wide and 4 deep on 1,000 images of
    fashion-mnist-mini had a training loss of 1.208 at the last checkpoint, 1.238 at the mean, and in 5 epochs
    from there 2.069 with SGD at 2, 1.233 with Adam at 1e-3, 1.198 as it is done here.

    Memory: a float32 copy of the trainable weights per checkpoint, in the saved state too, and three times
    that while the coefficients are learned. A `finish` that was cut short starts again, with the same result.

    Args:
        model: the trained model.
        epochs: in which coefficients are learned; two more passes, without gradients, compare the losses.
        checkpoints: how many epoch ends are kept.
    """

    def __init__(self, model: nn.Module, epochs: int, checkpoints: int = 10) -> None:
        self.epochs = epochs
        self.checkpoints: deque[Tensor] = deque(maxlen=checkpoints)  # (trainable weights,) each
        super().__init__(model, copy.deepcopy(model))

    @property
    def ready(self) -> bool:
        return bool(self.checkpoints)

    def after_epoch(self, epoch: int) -> None:
        self.checkpoints.append(_flat(_trainable(self.model)))
        for buffer, current in zip(self.module.buffers(), self.model.buffers(), strict=True):
            buffer.copy_(current)
        self._write(self._mean())

    def finish(self, batches: Batches, loss: Loss) -> int:
        if len(self.checkpoints) < 2:
            return _refresh_batch_norm(self.module, batches)
        start = self._mean()
        self._write(start)
        basis = _basis(torch.stack(tuple(self.checkpoints))) * self._spread(start)
        self.module.train()
        loss_before, steps, images = self._measure(batches(0), loss)
        coordinates = torch.zeros(basis.shape[1], device=basis.device)
        optimizer = torch.optim.Adam([coordinates], LEARNING_RATE)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * steps)
        for epoch in range(self.epochs):
            for inputs, targets in batches(epoch):
                weights = _trainable(self.module)
                gradient = torch.autograd.grad(
                    loss(self.module, inputs, targets), weights, materialize_grads=True
                )
                coordinates.grad = _mean_over_processes(basis.T @ _flat(gradient))
                optimizer.step()
                scheduler.step()
                self._write(start + basis @ coordinates)
        if not self._measure(batches(0), loss)[0] < loss_before:
            self._write(start)
        self.module.eval()
        return (self.epochs + 2) * images + _refresh_batch_norm(self.module, batches)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"checkpoints": list(self.checkpoints)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        device = next(self.module.parameters()).device
        self.checkpoints.clear()
        self.checkpoints.extend(checkpoint.to(device) for checkpoint in state["checkpoints"])

    def _mean(self) -> Tensor:
        return torch.stack(tuple(self.checkpoints)).mean(0)

    def _spread(self, mean: Tensor) -> Tensor:
        squares = [(checkpoint - mean).square().sum() for checkpoint in self.checkpoints]
        return torch.stack(squares).mean().sqrt()

    @torch.no_grad()
    def _write(self, weights: Tensor) -> None:
        parameters = _trainable(self.module)
        parts = torch.split(weights, [parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.copy_(part.view_as(parameter))

    @torch.no_grad()
    def _measure(self, batches: Iterator[Batch], loss: Loss) -> tuple[float, int, int]:
        """Mean training loss over an epoch, its batches, and its images over all processes."""
        losses, images = [], 0
        for inputs, targets in batches:
            losses.append(loss(self.module, inputs, targets).float())
            images += len(inputs)
        mean = _mean_over_processes(torch.stack(losses).mean())
        return float(mean), len(losses), images * _processes()


class TowardStart(WeightAverage):
    """WiSE-FT (arXiv 2109.01903): the last weights moved towards the first ones, `(1 - by) last + by first`.

    Until `finish`, `module` holds the first weights. The head stays as trained: it may have been made new.

    Args:
        model: the trained model, with its first weights.
        by: share of the way back.
    """

    def __init__(self, model: nn.Module, by: float) -> None:
        self.by, self.done = by, False
        super().__init__(model, copy.deepcopy(model))

    @property
    def ready(self) -> bool:
        return self.done

    @torch.no_grad()
    def finish(self, batches: Batches, loss: Loss) -> int:
        copies = self.model.experts.ffns() if isinstance(self.model, MoE) else [self.model]
        heads = [cast(Any, each).get_classifier() for each in copies if hasattr(each, "get_classifier")]
        kept = {parameter for head in heads for parameter in head.parameters()}
        mine = self.module.state_dict()
        for key, last in self.model.state_dict(keep_vars=True).items():
            moves = last.is_floating_point() and last not in kept
            mine[key].copy_(last.lerp(mine[key], self.by) if moves else last)
        self.done = True
        return 0

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.done = state["done"]


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().float() for tensor in tensors])


def _basis(vectors: Tensor) -> Tensor:
    """An orthonormal basis (size, rank) of the span of vectors (count, size), less what is rounding."""
    q, r = torch.linalg.qr(vectors.T)
    u, singular, _ = torch.linalg.svd(r)
    rank = int((singular > singular[0] * len(vectors) * torch.finfo(r.dtype).eps).sum())
    basis: Tensor = q @ u[:, :rank]
    return basis


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _mean_over_processes(tensor: Tensor) -> Tensor:
    if _processes() > 1:
        dist.all_reduce(tensor)
        tensor /= _processes()
    return tensor


def _refresh_batch_norm(module: nn.Module, batches: Batches) -> int:
    """Make BatchNorm's statistics those of the averaged weights; returns the images that it took."""
    images = 0

    def counted() -> Iterator[Batch]:
        nonlocal images
        for inputs, targets in batches(0):
            images += len(inputs)
            yield inputs, targets

    update_bn(counted(), module)  # reads nothing where there is no BatchNorm
    for buffer in module.buffers():
        if buffer.is_floating_point():
            _mean_over_processes(buffer)
    return images * _processes()
