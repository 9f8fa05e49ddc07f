import os
from unittest import mock

import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Of the ranks that these tests start: their models are so small that a second thread only waits, at full speed."""
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        yield
