import os
from unittest import mock

import pytest
import torch

from tests.harness import RankPool, poisoned_memory


@pytest.fixture(scope="session")
def ranks():
    """Four gloo ranks that serve every distributed test."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def interpreters():
    """Four ranks where Triton interprets: that is decided when it is imported, for the whole process."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _poison_and_seed():
    torch.manual_seed(0)
    with poisoned_memory():
        yield
