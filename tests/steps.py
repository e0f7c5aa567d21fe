"""Single training steps for tests: labels, gradients, their comparison, and batches of many processes."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGES, STEPS = 8, 3  # images in the global batch


def labels(batch: int) -> Tensor:
    return torch.arange(batch) % 3


def gradients(model: nn.Module, x: Tensor, seed: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    F.cross_entropy(model(x), labels(len(x))).backward()
    assert all(p.grad is not None for p in model.parameters())
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=tolerance, rtol=tolerance, msg=name)


@contextmanager
def fresh_compiler():
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


def batch(step, rank=0, world=1):
    """This process's share of a step's images and labels."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(IMAGES, 3, 16, 16, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (IMAGES,), generator=generator)
    return x.chunk(world)[rank], y.chunk(world)[rank]
