"""The shipped scripts run as they are, and --lasp on eight ranks is the model of one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "megatron_gpt.py"
SMALL = "--layers 4 --hidden 32 --heads 4 --groups 2 --vocab 64 --seq-length 32 --global-batch 4 --lr 0.003"
DOCSTRING, SOURCE = re.match(r'"""(.*?)"""(.*)', SCRIPT.read_text(), re.DOTALL).groups()
ADDED = re.findall(r"^    \+(.*)\n", DOCSTRING, re.MULTILINE)


def run(*arguments, timeout=200, **environment):
    """A Python process in the repository's root, on one thread per rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each job printed, and its exit codes. One process loads Megatron for all of them."""
    folder = tmp_path_factory.mktemp("megatron")
    stock = folder / "stock.py"
    stock.write_text("\n".join(line for line in SOURCE.splitlines() if line not in ADDED))
    start, load = f"{SMALL} --dtype fp32 --lasp LLS", f"--steps 4 --load {folder / 'weights'}"
    jobs = {
        "start": (1, SCRIPT, f"{start} --steps 16 --save {folder / 'weights'}"),
        "alone": (1, SCRIPT, f"{start} {load}"),
        "tp2 pp2 cp2": (8, SCRIPT, f"{start} {load} --tp 2 --pp 2 --cp 2"),
        "cp2 dp2": (4, SCRIPT, f"{start} {load} --cp 2"),
        "bf16": (2, SCRIPT, f"{SMALL} --lasp LLS {load} --cp 2"),
        "stock": (1, stock, f"{SMALL} --steps 2"),
        "uneven": (1, SCRIPT, f"{start} --micro-batch 3"),
    }
    listed = [(size, [str(path), *arguments.split()]) for size, path, arguments in jobs.values()]
    done = run("-m", "tests.examples.on_cpu", json.dumps(listed))
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^exit codes \[(.*)\]\n", done.stdout, flags=re.MULTILINE)
    assert all(code == "0" for codes in parts[1:-2:2] for code in codes.split(", ")), done.stderr
    return dict(zip(jobs, zip(parts[::2], parts[1::2], strict=False), strict=True))


def steps(job):
    """(losses, gradient norms) of a job."""
    found = re.findall(r"^step \d+ loss (\S+) grad norm (\S+)$", job[0], re.MULTILINE)
    return [float(loss) for loss, _ in found], [float(norm) for _, norm in found]


@pytest.mark.parametrize("mesh", ["tp2 pp2 cp2", "cp2 dp2"])
def test_a_mesh_trains_as_one_rank_does(outputs, mesh):
    (losses, norms), (expected, expected_norms) = steps(outputs[mesh]), steps(outputs["alone"])
    assert len(expected) == 4 and losses == pytest.approx(expected, rel=1e-6)
    assert norms == pytest.approx(expected_norms, rel=1e-4)


def test_it_goes_on_from_saved_weights(outputs):
    start, again = steps(outputs["start"])[0], steps(outputs["alone"])[0]
    assert again[0] < start[0] - 0.01  # the same first batch, 16 steps later


def test_bf16_is_near_fp32(outputs):
    assert steps(outputs["bf16"])[0] == pytest.approx(steps(outputs["alone"])[0], rel=1e-3)


def test_the_lines_that_the_script_shows_are_the_whole_change(outputs):
    """Without them it is a Megatron script that runs."""
    assert 5 <= len(ADDED) <= 10 and all(f"\n{line}\n" in SOURCE for line in ADDED)
    assert len(steps(outputs["stock"])[0]) == 2


def test_a_batch_that_cannot_be_cut_is_refused(outputs):
    sentence = "--global-batch 4 must be a multiple of --micro-batch 3 times 1 data-parallel ranks.\n"
    assert outputs["uneven"] == (sentence, "1")


def test_without_a_gpu_it_says_so_in_one_sentence():
    done = run("-W", "ignore", str(SCRIPT), LOCAL_RANK="9", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "Local rank 9 needs a CUDA device of its own, and this machine has 0 of them."
    )
    assert "Traceback" not in done.stderr


@pytest.fixture
def command(tmp_path):
    """The arguments that examples/pretrain_gpt.sh gives to torchrun, by name."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(f'#!{sys.executable}\nimport os, sys\nprint(os.environ["PYTHONPATH"], *sys.argv, sep="\\n")\n')
    torchrun.chmod(0o755)
    place = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MEGATRON": "Megatron-LM", "DATA": "text", "TOKENIZER": "own"}
    script = [str(ROOT / "examples" / "pretrain_gpt.sh"), "--seed", "7"]
    done = subprocess.run(script, env={**os.environ, **place}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, _, *words = done.stdout.splitlines()
    assert path.split(":")[0] == str(ROOT / "examples") and "Megatron-LM/pretrain_gpt.py" in words
    starts = [i for i, word in enumerate(words) if word.startswith("--")] + [len(words)]
    return {words[a]: words[a + 1 : b] for a, b in zip(starts, starts[1:], strict=False)}


def group(size):
    """A process group that nothing is sent on."""
    return SimpleNamespace(size=lambda: size, rank=lambda: 0)


def test_layers_accept_the_options_of_the_command_line(command, monkeypatch):
    """With heads of 8 channels and on one rank; every layer of the model is built."""
    from megatron.core.transformer.spec_utils import import_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    assert command["--seed"] == ["7"] and command["--data-path"] == ["text"]
    assert "--no-create-attention-mask-in-dataloader" in command
    names = "num-layers num-attention-heads num-query-groups attention-dropout hidden-dropout context-parallel-size"
    given = {name.replace("-", "_"): int(command[f"--{name}"][0]) for name in names.split()}
    monkeypatch.syspath_prepend(ROOT / "examples")
    groups = SimpleNamespace(tp=group(1), cp=group(given["context_parallel_size"]), pp=group(1))
    own = {"hidden_size": 8 * given["num_attention_heads"], "cp_comm_type": command["--cp-comm-type"][0]}
    settings = TransformerConfig(**given, **own, use_cpu_initialization=True)
    spec, layers = import_module(command["--spec"]), range(1, settings.num_layers + 1)
    cores = [spec(config=settings, layer_number=n, pg_collection=groups).self_attention.core_attention for n in layers]
    assert "".join(type(core).__name__[0] for core in cores) == "LLLS" * (len(cores) // 4)
    assert int(command["--seq-length"][0]) % (2 * given["context_parallel_size"]) == 0


def test_the_command_line_says_what_it_lacks():
    environment = {name: value for name, value in os.environ.items() if name != "MEGATRON"}
    script = [str(ROOT / "examples" / "pretrain_gpt.sh")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode and "MEGATRON: must be a checkout of Megatron-LM at core 0.16" in done.stderr
