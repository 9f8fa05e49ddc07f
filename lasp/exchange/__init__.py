"""How ranks turn their state maps into the state that enters each segment. All give the same numbers.

They differ in bytes, messages and latency: docs/exchanges.md. ``auto`` asks :mod:`lasp.cost` for each kind of layer.
"""

from lasp.exchange.base import StateExchange
from lasp.exchange.choice import AUTO, EXCHANGES, Setting, new_exchange, setting

__all__ = ["AUTO", "EXCHANGES", "Setting", "StateExchange", "new_exchange", "setting"]
