"""What `tools/families.py` knows of a family: how to build a small model, and the arguments of one call."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn


class Family(NamedTuple):
    """One family: its library, its name there, and how to build a small model and its inputs."""

    library: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]


def images(size: int = 32, batch: int = 4, key: str = "", channels: int = 3, **more: Any) -> Any:
    """Images as the first argument, or by the name `key`."""
    x = torch.randn(batch, channels, size, size)
    return ((), {key: x, **more}) if key else ((x,), more)


def floats(key: str, *shape: int, **more: Any) -> Any:
    """Random numbers of a shape under a name, with further arguments."""
    return (), {key: torch.randn(*shape), **more}


def text(*keys: str, batch: int = 2, length: int = 8, **more: Any) -> Any:
    """Numbers of words under these names, `input_ids` by default."""
    ids = torch.arange(batch * length).view(batch, length) % 13 + 3
    return (), {**dict.fromkeys(keys or ("input_ids",), ids), **more}


def made(module: str, name: str, *args: Any, **settings: Any) -> nn.Module:
    """A model by the name of its class or function."""
    model: nn.Module = getattr(import_module(module), name)(*args, **settings)
    return model
