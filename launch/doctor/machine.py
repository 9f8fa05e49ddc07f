"""What one machine has: versions, devices, network, shared memory, disk, limits; and what of it will be in the way.

Each function returns rows for a table, name to text, and adds sentences to ``problems``: what is wrong, and its remedy.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import sys
from pathlib import Path

import torch

from lasp import __version__
from lasp.launch.launchers.interfaces import address_of
from lasp.launch.run.preflight import source_digest
from lasp.launch.versions import installed, printed, untested

GIB = 2**30
_PACKAGES = ("torch", "triton", "numpy", "deepspeed", "ray", "megatron-core", "tokenizers")
_MIN_SHM, _MIN_FREE = 256 * 2**20, GIB

Rows = dict[str, str]


def versions() -> Rows:
    """Of Python, this package and what it may use; a package outside of the tested range with a sentence."""
    own = f"{__version__}, source code {source_digest()}"
    rows = {"python": f"{platform.python_version()} ({sys.executable})", "lasp": own}
    rows |= {name: installed(name) or "not installed" for name in _PACKAGES}
    rows |= untested()
    rows["CUDA of torch"] = torch.version.cuda or "none: a CPU build"
    if torch.cuda.is_available():
        rows["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        rows["driver"] = printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    return rows


def devices(wanted: str, local_ranks: int, problems: list[str]) -> Rows:
    """Processors and CUDA devices, with their links.

    Args:
        wanted: ``device`` of the run.
        local_ranks: ranks on this machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rows = {"CPU": f"{cores} core(s) for this process of {os.cpu_count()}, {_memory()}"}
    count = torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        rows[f"cuda:{index}"] = (
            f"{properties.name}, capability {properties.major}.{properties.minor}, {free / GIB:.1f} of "
            f"{total / GIB:.1f} GiB free"
        )
        if free < 0.5 * total:
            problems.append(f"cuda:{index} has less than half of its memory free. End what uses it: see nvidia-smi.")
    if count > 1 and (links := printed("nvidia-smi", "topo", "-m")):
        rows["links"] = links
    if wanted == "cuda" and count < local_ranks:
        problems.append(
            f"device=cuda, and {socket.gethostname()} has {count} device(s) for {local_ranks} rank(s). Start fewer "
            "ranks on it, or use device=cpu."
        )
    if wanted == "auto" and 0 < count < local_ranks:
        problems.append(
            f"device=auto falls back to the CPU: {count} CUDA device(s) for {local_ranks} ranks. Start {count}, or set "
            "device=cpu to say that it is meant."
        )
    return rows


def network(hosts: int, problems: list[str]) -> Rows:
    """Interfaces with their addresses, and what Gloo and NCCL are told of them.

    Args:
        hosts: machines of the job.
    """
    names = [name for _, name in socket.if_nameindex()]
    rows = {name: address_of(name) or "no IPv4 address" for name in names}
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        chosen = os.environ.get(variable)
        rows[variable] = chosen or "not set: chosen by itself"
        exact = [part for part in (chosen or "").lstrip("=").split(",") if part and not (chosen or "").startswith("^")]
        prefix = variable.startswith("NCCL")
        for part in exact:
            if not any(name == part or (prefix and name.startswith(part)) for name in names):
                problems.append(
                    f"{variable}={part}, and {socket.gethostname()} has only {', '.join(names)}. Set "
                    "torchrun.interface, or the variable, to one of them."
                )
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = "unknown"
    rows["host name"] = f"{socket.gethostname()}, address {own}"
    if hosts > 1 and own.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ:
        problems.append(
            f"the host name {socket.gethostname()} means {own}, which other machines cannot reach, and Gloo would use "
            "it. Set torchrun.interface to the network's interface, or mend /etc/hosts."
        )
    return rows


def ports(endpoint: str | None, problems: list[str]) -> Rows:
    """Whether the port at which nodes meet is free here, and which ports the system hands out.

    Args:
        endpoint: HOST:PORT; None: that of torchrun.
    """
    port = int(endpoint.rpartition(":")[2]) if endpoint else 29400
    rows = {}
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            rows[f"port {port}"] = "free"
        except OSError as error:
            rows[f"port {port}"] = f"cannot be used here: {error.strerror}"
            if endpoint:
                problems.append(f"the port of torchrun.endpoint={endpoint} is in use on this machine. Choose another.")
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if given.exists():
        low, high = given.read_text().split()
        rows["ports for connections"] = f"{low} to {high}; a firewall between nodes must let them pass"
    return rows


def shared_memory(local_ranks: int, cuda: bool, problems: list[str]) -> Rows:
    """/dev/shm, through which NCCL's ranks on one machine talk; containers often have 64 MiB."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return {"/dev/shm": "none"}
    usage = shutil.disk_usage(path)
    if cuda and local_ranks > 1 and usage.free < _MIN_SHM:
        problems.append(
            f"/dev/shm has {usage.free / 2**20:.0f} MiB free, and NCCL's {local_ranks} ranks here want "
            f"{_MIN_SHM // 2**20}. Start the container with --shm-size=8g."
        )
    return {"/dev/shm": f"{usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free"}


def disk(folder: Path, needed: int, problems: list[str]) -> Rows:
    """The file system of ``folder``.

    Args:
        needed: bytes that the run's checkpoints will take.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    usage, kind = shutil.disk_usage(existing), _mount(existing)
    if usage.free < max(needed, _MIN_FREE):
        problems.append(
            f"{existing} has {usage.free / GIB:.2f} GiB free, and the checkpoints of this run take "
            f"{needed / GIB:.2f} GiB. Free the disk, lower checkpoint.keep, or choose another run_dir."
        )
    if not os.access(existing, os.W_OK):
        problems.append(f"{existing} cannot be written by this user. Choose another run_dir.")
    return {
        str(folder): f"{kind}, {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free, this run keeps "
        f"{needed / GIB:.2f} GiB of checkpoints"
    }


def limits(world_size: int, cuda: bool, problems: list[str]) -> Rows:
    """What the system allows a process: ``ulimit``."""
    names = {"open files": "RLIMIT_NOFILE", "processes": "RLIMIT_NPROC", "locked memory": "RLIMIT_MEMLOCK"}
    values = {
        name: resource.getrlimit(getattr(resource, key))[0] for name, key in names.items() if hasattr(resource, key)
    }
    files, wanted = values["open files"], 64 + 8 * world_size
    if files != resource.RLIM_INFINITY and files < wanted:
        problems.append(f"ulimit -n is {files}, and {world_size} ranks want {wanted} per process. Raise it.")
    locked = values.get("locked memory", resource.RLIM_INFINITY)
    if cuda and Path("/dev/infiniband").exists() and locked != resource.RLIM_INFINITY:
        problems.append(f"ulimit -l is {locked} bytes, and InfiniBand needs it unlimited. Set it so for the job.")
    return {name: "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}" for name, value in values.items()}


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{pages / GIB:.0f} GiB of memory"


def _mount(path: Path) -> str:
    """The kind of file system that holds ``path``."""
    table = Path("/proc/mounts")
    if not table.exists():
        return "a file system"
    mounts = [line.split()[1:3] for line in table.read_text().splitlines()]
    fitting = [(point, kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(fitting, key=lambda mount: len(mount[0]), default=("", "unknown"))[1]
