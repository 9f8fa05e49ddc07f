import pytest
import torch

from tests.harness import RankPool, poisoned_memory


@pytest.fixture(scope="session")
def ranks():
    """Four gloo ranks that serve every distributed test."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _poison_and_seed():
    torch.manual_seed(0)
    with poisoned_memory():
        yield
