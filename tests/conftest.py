"""Every test starts from the same seed, on one thread."""

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its precision for the life of a process; a test may need another."""
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()
