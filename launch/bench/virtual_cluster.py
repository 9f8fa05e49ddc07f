"""Several hosts on one machine: network namespaces joined by a bridge, every link limited in both directions.

    host 0: lo, eth0 10.77.0.1 --- h0 \
    host 1: lo, eth0 10.77.0.2 --- h1  bridge, in a namespace of its own      every eth0 and every hN: tc tbf
    ...                                                                       (a token bucket) at the link's rate

Processes of one host talk over its loopback, without a limit, as ranks of a node do; processes of two hosts share the
links, which carry real TCP. A host has a name of its own. Nothing of this is visible outside the namespaces, and it
all goes when the block ends, by an error or a signal too; what a killed process left is removed by the next cluster.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable, Sequence
from types import TracebackType

from lasp.launch.launchers.process_tree import send
from lasp.launch.run.signals import interrupting

PORT = 29400  # of rank 0's store: no other program shares the namespace
MAX_HOSTS = 64
INTERRUPTED = "interrupted: the ranks were ended, and nothing more is measured."
_PREFIX = "laspvc"
_SUBNET = "10.77.0"
_PIECE_S, _PIECES = 1e-3, (16_384, 65_536)  # a host hands its link so many seconds in one piece, within these bytes
_QUEUE = 8 * 2**20  # bytes that wait for a link: more than the windows of its senders, so that nothing is dropped
_TIMEOUT_S = 20
_counter = itertools.count()


class VirtualCluster:
    """Hosts of this machine's own making, while the block runs.

    Args:
        hosts: how many.
        bits_per_s: rate of each host's link, in each direction.

    Raises:
        ValueError: numbers out of range; on entry: this machine does not allow it, with the system's reason.
    """

    def __init__(self, hosts: int, bits_per_s: float):
        if not 1 <= hosts <= MAX_HOSTS:
            raise ValueError(f"a virtual cluster has 1 to {MAX_HOSTS} hosts, got {hosts}. Choose a number between.")
        self.bits_per_s = _checked(bits_per_s)
        tag = f"{_PREFIX}{os.getpid()}x{next(_counter)}"
        self.names = tuple(f"{tag}h{n}" for n in range(hosts))
        self.addresses = tuple(f"{_SUBNET}.{n + 1}" for n in range(hosts))
        self._switch = f"{tag}sw"
        self._signals = contextlib.ExitStack()

    def __enter__(self) -> VirtualCluster:
        self._signals.enter_context(interrupting(INTERRUPTED))
        try:
            _remove(owner for owner in _namespaces() if not _alive(owner))
            self._build()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        own = {*self.names, self._switch}
        with self._signals:
            _remove(name for name in _namespaces() if name in own)

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """``command`` as it runs on ``host``: in its namespace, under its name; the process stays the same one."""
        rename = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"host{host}"]
        return ["ip", "netns", "exec", self.names[host], *rename, *command]

    def environment(self, host: int) -> dict[str, str]:
        """What processes of ``host`` need in order to find host 0 and to use its network."""
        return {"MASTER_ADDR": self.addresses[0], "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": "eth0"}

    def set_rate(self, bits_per_s: float) -> None:
        """Change the rate of all links; connections stay."""
        self.bits_per_s = _checked(bits_per_s)
        self._limit("change")

    def _build(self) -> None:
        for name in (self._switch, *self.names):
            _run("ip", "netns", "add", name)
        lines = ["link add br0 type bridge", "link set br0 up"]
        for n, name in enumerate(self.names):
            lines += [f"link add h{n} type veth peer name eth0 netns {name}"]
            lines += [f"link set h{n} master br0", f"link set h{n} up"]
        _batch("ip", "-n", self._switch, lines=lines)
        for name, address in zip(self.names, self.addresses, strict=True):
            _batch("ip", "-n", name, lines=["link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up"])
            # an idle connection of a training job does not forget how fast the link is
            keep = "echo 0 > /proc/sys/net/ipv4/tcp_slow_start_after_idle"
            _run("ip", "netns", "exec", name, "sh", "-c", keep)
        self._limit("add")

    def _limit(self, verb: str) -> None:
        """Token buckets that hold little more than one piece: an idle link saves up no more than about a millisecond.

        Pieces as large as that, since a smaller one costs the machine's processors what the links should cost alone.
        """
        piece = int(min(max(self.bits_per_s / 8 * _PIECE_S, _PIECES[0]), _PIECES[1]))
        rule = f"root tbf rate {int(self.bits_per_s)}bit burst {int(1.1 * piece)} limit {_QUEUE}"
        ports = [f"qdisc {verb} dev h{n} {rule}" for n in range(len(self.names))]
        _batch("ip", "netns", "exec", self._switch, "tc", lines=ports)
        for name in self.names:
            _batch("ip", "netns", "exec", name, "tc", lines=[f"qdisc {verb} dev eth0 {rule}"])
            # open connections learn the new size of a piece when they look up their route again
            _batch("ip", "-n", name, lines=[f"link set eth0 gso_max_size {piece}", "route flush cache"])


def why_not() -> str | None:
    """Why this machine has no virtual cluster; None where it has."""
    try:
        with VirtualCluster(2, 1e9):
            return None
    except ValueError as error:
        return str(error)


def _checked(bits_per_s: float) -> float:
    if not 1e6 <= bits_per_s <= 1e11:
        raise ValueError(
            f"a link's rate must be 1e6 to 1e11 bits per second, got {bits_per_s:g}. 400 Mbit/s is 4e8, or 400M."
        )
    return bits_per_s


def _batch(*command: str, lines: Sequence[str]) -> None:
    """Several commands of ``ip`` or ``tc`` in one process."""
    _run(*command, "-batch", "-", text="".join(f"{line}\n" for line in lines))


def _run(*command: str, text: str = "") -> str:
    if missing := [name for name in ("ip", "tc", "unshare") if shutil.which(name) is None]:
        raise ValueError(
            f"a virtual cluster needs the command {missing[0]}: install "
            f"{'util-linux' if missing[0] == 'unshare' else 'iproute2'}, or measure on real hosts with torchrun."
        )
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise ValueError(
            f"a virtual cluster needs network namespaces and tc tbf, which this machine does not allow: "
            f"{' '.join(command)}: {said}. Run as root (in a container: with --privileged), or measure on real hosts "
            "with torchrun."
        )
    return done.stdout


def _namespaces() -> list[str]:
    """Names of all virtual clusters' namespaces on this machine."""
    if shutil.which("ip") is None:
        return []
    return [line.split()[0] for line in _netns("list").splitlines() if line.startswith(_PREFIX)]


def _alive(name: str) -> bool:
    """Whether the process that made the namespace still runs; one that another program named is let alone."""
    owner = re.match(rf"{_PREFIX}(\d+)x", name)
    return owner is None or os.path.exists(f"/proc/{owner[1]}")


def _remove(names: Iterable[str]) -> None:
    """End what runs in the namespaces and delete them. A signal waits until all are gone."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        for name in names:
            for pid in _netns("pids", name).split():
                send(int(pid), signal.SIGKILL)
            _netns("del", name)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _netns(*arguments: str) -> str:
    """What ``ip netns`` prints, whether or not it succeeds."""
    command = ["ip", "netns", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False).stdout
