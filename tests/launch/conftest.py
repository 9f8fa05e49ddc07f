import os
from unittest import mock

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Models of these tests are so small that a second thread only waits, at full speed; children inherit it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        yield
    torch.set_num_threads(before)
