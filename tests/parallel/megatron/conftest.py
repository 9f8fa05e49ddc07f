import pytest

from tests.harness import RankPool


@pytest.fixture(scope="package")
def gpt_ranks():
    """Eight gloo ranks that serve every Megatron mesh, and end with this folder: each has loaded Megatron."""
    pool = RankPool(8)
    yield pool
    pool.close()
