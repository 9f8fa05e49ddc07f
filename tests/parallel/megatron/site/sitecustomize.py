"""With this folder on PYTHONPATH each rank of a command finds the CPU in the place of CUDA devices; see ../shim.py.

MEGATRON_TEST_FAULT plants a fault, as JSON: the arguments of plant.
"""

import contextlib
import json
import os
import warnings


def plant(layer_number, cp_rank, factor):
    """Scale what one linear layer's attention returns on one cp rank."""
    from lasp.parallel.megatron import LinearCoreAttention

    original = LinearCoreAttention._attend

    def attend(self, q, k, v, cp):
        guilty = self.layer_number == layer_number and cp.cp_rank == cp_rank
        return original(self, q, k, v, cp) * (factor if guilty else 1.0)

    LinearCoreAttention._attend = attend


if "RANK" in os.environ:
    warnings.simplefilter("ignore")
    from tests.parallel.megatron.shim import megatron_on_cpu

    until_the_process_ends = contextlib.ExitStack()
    until_the_process_ends.enter_context(megatron_on_cpu())
    if "MEGATRON_TEST_FAULT" in os.environ:
        plant(**json.loads(os.environ["MEGATRON_TEST_FAULT"]))
