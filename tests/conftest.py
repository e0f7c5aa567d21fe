"""Every test starts from the same seed, on one thread."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_seed() -> None:
    torch.manual_seed(0)
