"""What a process imports when it starts, and what it does not: seconds of every command and every rank.

``benchmarks/startup.py`` measures them.
"""

import subprocess
import sys

from tests.launch.helpers import tiny_yaml

# What takes long, or is of use to few: an engine that cuts, a save, a plot, a table, a tokenizer imports it.
LATE = (
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "tensorboard",
    "matplotlib",
    "rich",
    "sympy",
    "triton",
    "deepspeed",
    "ray",
    "tokenizers",
    "lasp.parallel.engines.fsdp",
    "lasp.parallel.engines.zero",
)
CODE = """
import sys
from click.testing import CliRunner
from lasp.launch.cli import cli

def found(names):
    return [name for name in names if name in sys.modules]

def show(stage, *names):
    print(stage, *found(names))

assert CliRunner().invoke(cli, ["--help"]).exit_code == 0
assert "fsdp2" in CliRunner().invoke(cli, ["plan", "--help"]).output
show("help", "torch", "numpy", "pydantic", "yaml")
late = sys.argv[2:]
import torch
own = found(late)  # some versions of torch import some of it by themselves
late = [name for name in late if name not in own]
from lasp.launch.config.schema import load_config
from lasp.parallel.engines.table import ENGINES

for name, kind in ENGINES.items():
    if kind.native and kind.package is None:
        load_config(sys.argv[1], [f"engine={name}"])
show("config", *late)
import lasp.launch.train, lasp.parallel.engines.ddp
show("rank", *late)
import lasp.parallel.engines.fsdp
show("fsdp2", "torch.distributed.checkpoint", "deepspeed", "matplotlib", "rich")
"""


def test_a_process_imports_late_what_takes_long(tmp_path):
    command = [sys.executable, "-c", CODE, str(tiny_yaml(tmp_path)), *LATE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["help", "config", "rank", "fsdp2", ""], done.stdout
