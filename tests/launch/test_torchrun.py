"""``launcher=torchrun``: the commands it prints, the Slurm script, what it refuses, how it ends."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from lasp.launch.cli import main
from lasp.launch.config.schema import load_config
from lasp.launch.launchers import torchrun
from lasp.launch.launchers.process_tree import children
from lasp.launch.run.failures import Interrupted, RankFailure
from lasp.launch.run.rendezvous import Job
from lasp.launch.run.report import read_metrics
from lasp.launch.soak import __main__ as soak
from tests.launch.helpers import run_main, tiny_yaml

ON = "launcher=torchrun"
TWO = [ON, "torchrun.nodes=2", "torchrun.endpoint=node1:29400"]

# What the test's cluster has in place of Slurm's commands: two nodes, which are this machine.
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
code=0
pids=()
for node in 0 1; do
    SLURM_NODEID=$node "$@" &
    pids+=($!)
done
echo "${pids[@]}" > "$CLUSTER/tasks"
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then echo localhost; echo other; else echo "scontrol $*" >> "$CLUSTER/log"; fi
"""
# As Slurm does, it signals every process of the step: agents and ranks too.
SCANCEL = """#!{python}
import os, signal, sys
sys.path.insert(0, "{root}")
from lasp.launch.launchers.process_tree import children
assert sys.argv[1] == "--signal=TERM", sys.argv
def tree(pid):
    return [pid, *(inner for child in children(pid) for inner in tree(child))]
for task in open(os.environ["CLUSTER"] + "/tasks").read().split():
    for pid in tree(int(task)):
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            pass
"""


def _shape(tmp_path, *overrides):
    return torchrun.job_shape(load_config(tiny_yaml(tmp_path), [ON, *overrides]))


def test_ranks_follow_from_the_sizes(tmp_path):
    assert _shape(tmp_path, "cp=4") == torchrun.JobShape(1, 1, 4)
    assert _shape(tmp_path, "cp=2", "dp=2", "torchrun.nodes=2") == torchrun.JobShape(2, 2, 2)
    assert _shape(tmp_path, "cp=2", "torchrun.nodes=1:2") == torchrun.JobShape(1, 2, 2)  # YAML 1.1 would read 62
    assert _shape(tmp_path, "cp=2", "torchrun.nodes=2", "torchrun.ranks_per_node=2").nodes == "2"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("launcher=local torchrun.nodes=2", "torchrun: nodes=2 has no effect with launcher=local: set launcher=torch"),
        ("torchrun.nodes=2:1", r"torchrun.nodes: must be a number of nodes, or the fewest .* as MIN:MAX, got '2:1'"),
        ("torchrun.nodes=0", "must be a number of nodes"),
        ("torchrun.endpoint=node1", "torchrun.endpoint: must be HOST:PORT of the first node, got 'node1'"),
        ("torchrun.interface=[a]", "torchrun.interface should be a valid string"),
        ("torchrun.nodes=1:2 dp=2", "dp_size = 2 fixes the number of ranks, and torchrun.nodes = 1:2 lets it change"),
        ("torchrun.nodes=2 cp=3", r"3 ranks \(dp_size = 1 times .* cannot be spread evenly over torchrun.nodes = 2"),
        ("torchrun.ranks_per_node=3 cp=2", r"1 node\(s\) with torchrun.ranks_per_node = 3 are 3 ranks, which must be"),
        ("torchrun.nodes=1:2 torchrun.ranks_per_node=1 cp=2", r"1 node\(s\) .* are 1 ranks"),
        ("torchrun.nodes=1:3 cp=1", r"data.batch_size = 2 .* multiple of dp_size, which is 3 with 3 node\(s\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        _shape(tmp_path, *overrides.split())


def test_print_gives_every_nodes_command(tmp_path, monkeypatch, capsys):
    path = str(tiny_yaml(tmp_path))
    monkeypatch.setattr(sys, "argv", ["lasp", "train", path, *TWO, "torchrun.interface=eth0", "--cp", "4", "--print"])
    main()
    first, second = (line for line in capsys.readouterr().out.splitlines() if not line.startswith("#"))
    assert first.replace("is_host=1", "is_host=0") == second
    words = shlex.split(first)
    assert words[0] == "env" and {"GLOO_SOCKET_IFNAME=eth0", "NCCL_SOCKET_IFNAME=eth0"} <= {*words}
    assert "LASP_STORE=node1:29400" in words and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in words
    run = words[words.index("torch.distributed.run") :]
    options = dict(zip(run[1:-9:2], run[2:-9:2]))
    assert options.pop("--rdzv-id").startswith("lasp-")
    assert options == {
        "--nnodes": "2",
        "--nproc-per-node": "2",
        "--max-restarts": "3",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "node1:29400",
        "--rdzv-conf": "is_host=1,join_timeout=60,read_timeout=60",
    }
    assert run[-9:] == ["-m", "lasp.launch.cli", "train", path, *TWO, "torchrun.interface=eth0", "cp_size=4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--print"], "--print has no effect with launcher=local. Add launcher=torchrun."),
        (["--slurm"], "--slurm has no effect with launcher=local. Add launcher=torchrun."),
        ([ON, "torchrun.nodes=2", "cp=2"], "torchrun.endpoint is required with torchrun.nodes = 2"),
        ([ON, "torchrun.is_host=true"], "torchrun.is_host = True has no effect without torchrun.endpoint"),
        ([*TWO, "cp=2", "torchrun.local_addr=node1", "--print"], "torchrun.local_addr = node1 belongs to one node"),
        ([*TWO, "cp=2", "--slurm"], "torchrun.endpoint = node1:29400 has no effect with --slurm"),
    ],
)
def test_options_that_contradict_the_command_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    assert run_main(monkeypatch, "train", tiny_yaml(tmp_path), *arguments) == 1
    assert message in capsys.readouterr().err


def _script(tmp_path, capsys, *arguments):
    """The job's script, as ``--slurm`` prints it."""
    path = tmp_path / "job.sbatch"
    with pytest.MonkeyPatch.context() as patch:
        capsys.readouterr()
        assert run_main(patch, "train", tiny_yaml(tmp_path), ON, *arguments, "--slurm") == 0
    path.write_text(capsys.readouterr().out)
    subprocess.run(["bash", "-n", str(path)], check=True)
    return path


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder of commands that stand in for Slurm's, first on the PATH, and the environment of a job."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    (folder / "log").touch()
    root = Path(__file__).resolve().parents[2]
    for name, text in {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "scancel": SCANCEL.format(python=sys.executable, root=root),
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"SLURM_JOB_ID": str(port % 20000), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    environment = {"CLUSTER": str(folder), "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
    for name, value in {**job, **environment}.items():
        monkeypatch.setenv(name, value)
    return folder


# In place of Python: it notes what a node's agent was given and that it was asked to save, and ends when the test says.
AGENT = """#!/bin/bash
trap 'touch "$CLUSTER/asked$SLURM_NODEID"' TERM
printf '%s ' "$@" > "$CLUSTER/agent$SLURM_NODEID"
while [ ! -e "$CLUSTER/code" ]; do sleep 0.05; done
exit "$(cat "$CLUSTER/code")"
"""


@pytest.fixture
def stub_script(tmp_path, cluster, capsys, monkeypatch):
    """A script whose agents are AGENT, and a function that starts it and gives what the agent of each node was told."""
    stub = cluster / "python"
    stub.write_text(AGENT)
    stub.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(stub))
        script = _script(tmp_path, capsys, "cp=2", "torchrun.nodes=2")

    def start():
        job = subprocess.Popen(["bash", str(script)])
        told = [cluster / "agent0", cluster / "agent1"]
        _wait_for(job, lambda: (cluster / "tasks").exists() and all(p.exists() and p.read_text() for p in told))
        return job, [path.read_text().split() for path in told]

    return script, start


def _wait_for(job, condition):
    deadline = time.monotonic() + 100
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_a_slurm_script_starts_an_agent_on_each_node_and_hands_on_its_exit_code(tmp_path, cluster, stub_script):
    script, start = stub_script
    text = script.read_text()
    assert "#SBATCH --nodes=2\n" in text and "#SBATCH --signal=B:TERM@120\n" in text and "{{" not in text
    assert "--gpus-per-node" not in text  # device: cpu
    job, (first, second) = start()
    number = int(os.environ["SLURM_JOB_ID"])
    own = ["torchrun.nodes=2", f"torchrun.endpoint=localhost:{20000 + number % 20000}", f"torchrun.job_id={number}"]
    assert first[:4] == ["-m", "lasp.launch.cli", "train", str(tiny_yaml(tmp_path))] and "cp=2" in first
    assert first[-5:] == ["torchrun.ranks_per_node=1", *own, "torchrun.is_host=true"]
    assert second == [*first[:-1], "torchrun.is_host=false"]
    (cluster / "code").write_text("3")
    assert job.wait(60) == 3 and not (cluster / "log").read_text()


@pytest.mark.parametrize(("code", "requeued"), [(0, True), (5, False)])
def test_a_slurm_job_asks_its_ranks_to_save_and_requeues_itself_where_they_could(cluster, stub_script, code, requeued):
    _, start = stub_script
    job, _ = start()
    job.send_signal(signal.SIGTERM)
    _wait_for(job, lambda: (cluster / "asked0").exists() and (cluster / "asked1").exists())
    for _ in range(3):  # until it has done with scancel and waits for srun again
        _wait_for(job, lambda: len(children(job.pid)) == 1)
        time.sleep(0.1)
    (cluster / "code").write_text(str(code))
    assert job.wait(60) == code
    number = os.environ["SLURM_JOB_ID"]
    assert (cluster / "log").read_text() == (f"scontrol requeue {number}\n" if requeued else "")


@pytest.mark.slow
def test_a_slurm_job_saves_before_its_end_requeues_itself_and_finishes(tmp_path, cluster, capsys):
    options = ["cp=2", "torchrun.nodes=2", "steps=40", "checkpoint.every=1000", "log.sample_tokens=0"]
    script = _script(tmp_path, capsys, *options)
    log = tmp_path / "first.log"
    with log.open("w") as file:
        job = subprocess.Popen(["bash", str(script)], stdout=file, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 90
    while len(read_metrics(tmp_path / "run")) < 2 and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(90) == 0, log.read_text()
    assert f"scontrol requeue {os.environ['SLURM_JOB_ID']}" in (cluster / "log").read_text()
    assert re.search(r"stopped at step \d+ of 40; saved", log.read_text()), log.read_text()
    stopped = len(read_metrics(tmp_path / "run"))

    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumed at step {stopped} of 40" in done.stdout and "dp 1 x cp 2 = 2" in done.stdout
    assert (cluster / "log").read_text().count("requeue") == 1
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, 41))


def test_a_script_for_gpus_asks_for_one_per_rank(tmp_path):
    config = load_config(tiny_yaml(tmp_path), [ON, "device=auto", "cp=8", "torchrun.nodes=1:2"])
    text = torchrun.sbatch_script(config, ["c.yaml", ON, "torchrun.nodes=1:2", "cp_size=8"])
    assert "#SBATCH --gpus-per-node=8\n" in text and "#SBATCH --nodes=1-2\n" in text
    command = re.search(r"' agent (.*) \\\n", text)[1]
    assert command.endswith(f"train c.yaml {ON} cp_size=8 torchrun.ranks_per_node=8")


def test_ranks_whose_nodes_count_restarts_differently_meet_under_one_name():
    """A replaced node has no restart behind it, the others one."""
    job = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "b", "MASTER_PORT": "4711", "LASP_STORE": "node1:29400"}
    old, new = (Job.from_environment({**job, "TORCHELASTIC_RESTART_COUNT": count}) for count in "10")
    assert (old.attempt, new.attempt) == (1, 0) and old.meeting == new.meeting == "b:4711"
    assert (new.address, new.port, new.agent_store) == ("node1", 29400, True)
    later = Job.from_environment({**job, "MASTER_PORT": "4712"})
    assert later.meeting != new.meeting
    with pytest.raises(ValueError, match="LASP_STORE must be HOST:PORT of the job's store, got 'node1'"):
        Job.from_environment(job | {"LASP_STORE": "node1"})


@pytest.mark.parametrize(
    ("stand_in", "error", "message"),
    [
        ("import time; time.sleep(0.3)", RankFailure, None),
        ("import sys; sys.exit(3)", RankFailure, r"did not meet at 127\.0\.0\.1:\d+ within timeout_s = 60 s"),
        ("import os; os.kill(os.getppid(), 15); import time; time.sleep(60)", Interrupted, "not every rank could save"),
    ],
)
def test_how_an_agent_ends_is_told_apart(tmp_path, monkeypatch, stand_in, error, message):
    make = torchrun.node_command

    def command(*arguments, **options):
        return torchrun.NodeCommand((sys.executable, "-c", stand_in), make(*arguments, **options).environment)

    monkeypatch.setattr(torchrun, "node_command", command)
    config = load_config(tiny_yaml(tmp_path), [ON])
    if message is None:
        torchrun.run_node(config, [])
        return
    with pytest.raises(error, match=message):
        torchrun.run_node(config, [])


@pytest.mark.parametrize("saved", [True, False])
def test_a_job_that_was_asked_to_save_succeeds_where_every_step_is_saved(tmp_path, monkeypatch, saved):
    """The stand-in ends by the signal, as an agent does whose ranks were gone before it looked."""
    make, code = torchrun.node_command, "import os, time; os.kill(os.getppid(), 15); time.sleep(60)"

    def command(*arguments, **options):
        return torchrun.NodeCommand((sys.executable, "-c", code), make(*arguments, **options).environment)

    monkeypatch.setattr(torchrun, "node_command", command)
    config = load_config(tiny_yaml(tmp_path), [ON])
    (config.run_dir / "checkpoints" / "step-00000002").mkdir(parents=True)
    (config.run_dir / "metrics.jsonl").write_text(f'{{"step": {2 if saved else 3}, "loss": 1.0}}\n')
    if saved:
        torchrun.run_node(config, [])
        return
    with pytest.raises(Interrupted, match="not every rank could save"):
        torchrun.run_node(config, [])


SOAK = ["checkpoint.every=5", "dtype=float64"]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_whose_rank_is_killed_has_the_curve_of_one_that_was_not(tmp_path, ranks):
    arguments = [*SOAK, "steps=40", f"cp_size={ranks}", "--kills", "1"]
    done = CliRunner().invoke(soak.main, [str(tiny_yaml(tmp_path)), *arguments])
    assert done.exit_code == 0, done.output + (tmp_path / "run" / "killed.log").read_text()
    assert re.search(r"ranks killed +1\b", done.output) and re.search(r"equal to the last bit +40\b", done.output)
    assert "resumed at step" in (tmp_path / "run" / "killed.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_node_is_done_without_and_taken_back(tmp_path):
    arguments = [*SOAK, "steps=200", "cp_size=1", "dp_size=2", "--kills", "3", "--nodes", "2"]
    done = CliRunner().invoke(soak.main, [str(tiny_yaml(tmp_path)), *arguments])
    assert done.exit_code == 0, done.output + (tmp_path / "run" / "killed.log").read_text()
    assert re.search(r"nodes killed +[1-3]\b", done.output), done.output
    assert {record["ranks"] for record in read_metrics(tmp_path / "run" / "killed")} == {1, 2}


def test_a_soak_fails_where_curves_differ():
    calm = {step: {"loss": 1.0, "grad_norm": 2.0, "ranks": 2} for step in (1, 2, 3)}
    tally = soak.Tally()
    soak.compare(calm, {**calm, 3: calm[3] | {"ranks": 1, "loss": 1.0 + 9e-6}}, 2, tally)
    assert not tally.failures and (tally.equal_bits, tally.within_tolerance) == (2, 1) and soak.report(tally) == 0
    for change, message in (
        ({2: calm[2] | {"loss": 1.0 + 1e-15}}, "step 2: loss 1.000000000000001, uninterrupted 1.0; must be equal to"),
        ({2: calm[2] | {"grad_norm": float("nan")}}, "step 2: grad_norm nan"),
        ({2: calm[2] | {"ranks": 1}, 3: calm[3] | {"loss": 1.0001}}, "step 3: loss 1.0001, .* must be within 1e-05"),
        ({4: calm[3]}, r"different steps: \[4\]"),
    ):
        tally = soak.Tally()
        soak.compare(calm, {**calm, **change}, 2, tally)
        assert len(tally.failures) == 1 and re.search(message, tally.failures[0]) and soak.report(tally) == 1
