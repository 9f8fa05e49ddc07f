"""Which ranks share a machine: a node id per rank of a group, asked once."""

from __future__ import annotations

import functools
import hashlib
import socket
from pathlib import Path

import torch
import torch.distributed as dist

from lasp.comm.calls import group_of
from lasp.comm.collectives import all_gather


def node_ids(group: dist.ProcessGroup | None) -> tuple[int, ...]:
    """The node of each rank of the group, numbered in the order of their first ranks. One all-gather, the first time.

    A node is a machine that has booted once and has one host name, so containers with names of their own are nodes.
    """
    return _asked(group_of(group))  # None may come to stand for another group


@functools.lru_cache(maxsize=16)
def _asked(group: dist.ProcessGroup) -> tuple[int, ...]:
    seen: dict[int, int] = {}
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    name = torch.tensor([_fingerprint()], dtype=torch.int64, device=device)
    names = all_gather(name, group, "which ranks share a machine").wait().flatten().tolist()
    return tuple(seen.setdefault(name, len(seen)) for name in names)


def _fingerprint() -> int:
    """A number that is this machine's alone."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    text = socket.gethostname() + (boot.read_text() if boot.exists() else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
