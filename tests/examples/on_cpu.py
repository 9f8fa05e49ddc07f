"""Runs a script as it is, as torchrun would, but on CPU: in ranks forked from one process that has loaded Megatron.

    python -m tests.examples.on_cpu JOBS      JOBS is JSON: [[world_size, [script, argument, ...]], ...]

One after the other; a line "exit codes [...]" with one code per rank ends each.
"""

import json
import logging
import os
import runpy
import sys
import tempfile
import traceback
import warnings

import torch
import torch.distributed as dist

from tests.parallel.megatron.shim import megatron_on_cpu


def run_rank(rank, world_size, argv, store):
    """One rank: the script's NCCL is gloo, its GPUs are the CPU."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    init, place = dist.init_process_group, {"rank": rank, "world_size": world_size}
    dist.init_process_group = lambda backend: init("gloo", init_method=f"file://{store}", **place)
    torch.cuda.device_count = lambda: world_size
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def run_job(world_size, argv):
    """Exit codes of the ranks, each forked from here."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    run_rank(rank, world_size, argv, f"{folder}/store")
                    code = 0
                except SystemExit as end:
                    print(end.code)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            ranks.append(pid)
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]


def main():
    """All jobs."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with megatron_on_cpu():
        import lasp.parallel.megatron  # noqa: F401

        for world_size, argv in json.loads(sys.argv[1]):
            print(f"exit codes {run_job(world_size, argv)}", flush=True)


if __name__ == "__main__":
    main()
