"""Trial runs of modules with random weights: what they mix, and whether experts compute the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ewavit.core.copying import duplicate
from ewavit.core.experts import ExpertLeaf, Experts, SeparateExperts, StackedExperts


def channels(first: nn.Linear | nn.Conv2d) -> int:
    """Channels of a layer's input; a block-diagonal layer's weight does not have them all."""
    return first.in_features if isinstance(first, nn.Linear) else first.weight.shape[1]


def first_layer(module: nn.Module) -> nn.Linear | nn.Conv2d | None:
    """The first linear layer or convolution of a module."""
    return next((m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)), None)


def probe_inputs(first: nn.Linear | nn.Conv2d) -> Iterator[tuple[Tensor, int]]:
    """Random inputs that may fit a module, two images of four tokens, with their channel dimension.

    Args:
        first: the layer of the module that takes them.
    """
    generator = torch.Generator().manual_seed(0)
    dim = channels(first)
    shapes = [((2, 4, dim), -1), ((2, 2, 2, dim), -1), ((2, dim, 2, 2), 1)]
    if isinstance(first, nn.Conv2d):
        shapes.reverse()
    for shape, channel_dim in shapes:
        x = torch.randn(shape, generator=generator)
        yield x.to(first.weight.device, first.weight.dtype), channel_dim


def with_random_weights(module: nn.Module) -> nn.Module:
    """A copy in eval mode with random weights: layers with zero weights would hide what they mix."""
    generator = torch.Generator().manual_seed(1)
    trial = duplicate(module, hooks=False).eval()  # a trial run calls no hook of the user's
    with torch.no_grad():
        for name, parameter in trial.named_parameters():
            if "parametrizations" in name.split("."):
                continue  # its values may have to fit together
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return trial


def moved_tokens(trial: nn.Module, x: Tensor, channel_dim: int) -> Tensor | None:
    """Which output tokens (images, tokens) change when the tokens of the first image change.

    They are reversed and the first one is replaced; in a token-wise FFN only that one changes. None if the
    output does not have one token per input token.
    """

    def run(rows: Tensor) -> Tensor:
        output: Tensor = trial(rows.view_as(last).movedim(-1, channel_dim)).movedim(channel_dim, -1)
        return output.flatten(1, -2)

    last = x.movedim(channel_dim, -1).contiguous()
    rows = last.flatten(1, -2)
    changed = torch.cat([rows[:1].flip(1), rows[1:]])
    changed[0, -1] = torch.randn(rows.shape[-1], generator=torch.Generator().manual_seed(2))
    before, after = run(rows), run(changed)
    if before.shape[:2] != rows.shape[:2]:
        return None
    after = torch.cat([after[:1].flip(1), after[1:]])
    return ~((after - before).abs().amax(-1) <= 1e-3 * before.abs().amax())  # so that NaN counts as moved


@torch.no_grad()
def width(trial: nn.Module, x: Tensor, channel_dim: int) -> int:
    """Channels of a module's output."""
    output: Tensor = trial(x)
    return output.shape[channel_dim]


@torch.no_grad()
def different(experts: SeparateExperts) -> SeparateExperts:
    """Two equal experts made unequal, in place."""
    for parameter in experts.copies[1].parameters():
        parameter.mul_(0.5)
    return experts


@torch.no_grad()
def deploys(experts: Experts, x: Tensor) -> bool:
    """Whether experts in eval mode compute what their collapse does, also when called again."""
    try:
        outputs = [experts.eval().merged(x) for _ in range(2)]
        plain = experts.collapse().eval()(x)
    except Exception:
        # Any error in someone else's forward means the same here: it needs weights of its own.
        return False
    return all(close(output, plain) for output in outputs)


@torch.no_grad()
def same_in_training(trial: nn.Module, x: Tensor) -> bool:
    """Whether a module computes the same in training mode, apart from its layers of dropout."""
    expected = trial(x)
    for part in trial.modules():
        part.training = not isinstance(part, nn.Dropout)
    try:
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            return close(trial(x), expected)
    except Exception:
        return False  # its forward fails in training; separate copies fail as the plain FFN does
    finally:
        trial.eval()


def close(output: Tensor, expected: Tensor) -> bool:
    """Whether two results are the same but for rounding."""
    return bool((output - expected).norm() <= _tolerance(expected) * expected.norm())


def _tolerance(expected: Tensor) -> float:
    return 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2


def rows_close(output: Tensor, expected: Tensor) -> Tensor:
    """For each entry of dimension 0 whether the results are the same but for rounding."""
    apart = torch.linalg.vector_norm((output - expected).flatten(1), dim=1)
    size = torch.linalg.vector_norm(expected.flatten(1), dim=1)
    return torch.le(apart, _tolerance(expected) * size)


@torch.no_grad()
def stacks(trial: nn.Module, separate: SeparateExperts, x: Tensor) -> bool:
    """Whether stacked experts compute the same as two different separate copies on (E, ...) inputs."""
    try:
        stacked = stacked_like(trial, separate)
        if not deploys(stacked, x):
            return False
        for part in stacked.modules():
            part.training = isinstance(part, ExpertLeaf)
        inputs = torch.stack([x, -x])
        return close(stacked(inputs), separate(inputs))
    except Exception:
        # Separate copies accept what the stacked layers or the FFN's forward do not.
        return False


@torch.no_grad()
def stacked_like(module: nn.Module, separate: SeparateExperts) -> StackedExperts:
    """Stacked experts of a module with the weights of separate ones.

    Raises:
        TypeError: a layer has no stacked version.
    """
    stacked = StackedExperts(module, separate.num_experts)
    pairs = zip(stacked.values_by_parameter(), separate.values_by_parameter(), strict=True)
    for (_, into), (_, values) in pairs:
        for target, value in zip(into, values, strict=True):
            target.copy_(value)
    return stacked
