"""Random draws that are a function of (seed, layer, step), not of a generator's position.

The step is the number of optimizer steps. Until the next one, a layer draws the same again: activation
checkpointing recomputes what it computed, with or without the generator's state, and a resumed run goes on
exactly, whether or not its trainer saves generators. The key is a tensor on the CPU, so that reading it waits
for no device and `torch.compile` sees an input, not a constant.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

from ewavit.errors import EwavitError

LAYER, STEP = 1, 2  # places in a key; the seed is at 0


def new_key() -> Tensor:
    """The key of layer 0 at step 0: (3,) int64 on the CPU, with the seed of `torch.manual_seed`."""
    seed = torch.initial_seed() % 2**63
    return torch.tensor([seed, 0, 0], dtype=torch.int64, device="cpu")


def _generator(key: Tensor, purpose: int, device: torch.device) -> torch.Generator:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise EwavitError(
            "a captured CUDA graph would repeat one partition at every replay: use torch.compile instead of "
            "torch.cuda.graph"
        )
    digest = blake2b(repr((key.tolist(), purpose)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


# Operators of their own, because a compiled graph can hold no generator. No CUDA graph may capture them: it
# would replay the step at which it was captured.
@torch.library.custom_op("ewavit::permutation", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def permutation(key: Tensor, purpose: int, length: int, device: torch.device) -> Tensor:
    """A random permutation of 0, ..., `length` - 1.

    Args:
        key: (3,) int64, seed, layer and step.
        purpose: tells apart draws of one layer and step.
        length: the number of elements.
        device: where the result is.

    Returns:
        (length,) int64.
    """
    if device.type == "meta":
        return torch.empty(length, dtype=torch.int64, device=device)
    generator = _generator(key, purpose, device)
    return torch.randperm(length, generator=generator, device=device)


@permutation.register_fake
def _(key: Tensor, purpose: int, length: int, device: torch.device) -> Tensor:
    return torch.empty(length, dtype=torch.int64, device=device)


@torch.library.custom_op("ewavit::normal", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def normal(key: Tensor, like: Tensor) -> Tensor:
    """Standard normal numbers in the shape, dtype and on the device of `like`; `key` as in `permutation`."""
    return torch.empty_like(like).normal_(generator=_generator(key, 0, like.device))


@normal.register_fake
def _(key: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like)
