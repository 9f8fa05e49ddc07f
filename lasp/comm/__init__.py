"""The only collectives and messages of the attention operators, and those who count and watch them."""

from lasp.comm.calls import Call, CommError, Ledger, Observer, explained, last_number, place, record, scope
from lasp.comm.collectives import Messages, Pending, all_gather, all_to_all, reduce_scatter

__all__ = [
    "Call",
    "CommError",
    "Ledger",
    "Messages",
    "Observer",
    "Pending",
    "all_gather",
    "all_to_all",
    "explained",
    "last_number",
    "place",
    "record",
    "reduce_scatter",
    "scope",
]
