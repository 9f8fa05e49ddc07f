"""Network interfaces of this machine and their addresses."""

from __future__ import annotations

import socket
import struct
import sys


def address_of(interface: str) -> str | None:
    """The IPv4 address of a network interface; None where it has none, or the system does not say."""
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe.fileno(), get_address, struct.pack("256s", interface[:15].encode()))
        except OSError:
            return None
    return socket.inet_ntoa(found[20:24])


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address; None where the system does not say."""
    return next((name for _, name in socket.if_nameindex() if address_of(name) == address), None)
