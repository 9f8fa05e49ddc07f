"""How ranks turn their state maps into the state that enters each segment. All give the same numbers.

They differ in bytes, messages and latency: docs/exchanges.md. :mod:`lasp.exchange.table` lists them; ``auto`` asks
:mod:`lasp.cost` for each kind of layer.
"""

from lasp.exchange.base import StateExchange
from lasp.exchange.choice import Setting, new_exchange, setting
from lasp.exchange.table import AUTO, EXCHANGES, Buffers, Exchange, choose, estimate, names

__all__ = [
    "AUTO",
    "EXCHANGES",
    "Buffers",
    "Exchange",
    "Setting",
    "StateExchange",
    "choose",
    "estimate",
    "names",
    "new_exchange",
    "setting",
]
