"""Every test starts from the same seed, on one thread; `--device cuda` makes new tensors on a GPU."""

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tensors are made, for the invariants on a GPU")


def pytest_configure(config):
    if (device := config.getoption("--device")) != "cpu":
        torch.set_default_device(device)


@pytest.fixture(autouse=True)
def same_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its precision for the life of a process; a test may need another."""
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()
