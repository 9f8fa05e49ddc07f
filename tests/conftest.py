import pytest
import torch

from tests.harness import RankPool, poisoned_memory

torch.set_num_threads(1)  # tensors of tests are small, and threads that wait for each other burn a core each


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
