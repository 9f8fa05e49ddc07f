import os
from unittest import mock

import pytest
import torch

from tests.harness import RankPool, poisoned_memory


@pytest.fixture(scope="session")
def ranks():
    """Eight gloo ranks that serve every distributed test; where they import Triton, it interprets."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):  # read when it is imported, for the whole process
        pool = RankPool(8)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _poison_and_seed():
    torch.manual_seed(0)
    with poisoned_memory():
        yield
