"""What all tests share."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums over one thread are the same everywhere, so results can be compared bit for bit."""
    torch.set_num_threads(1)
