"""What exchanges cost on a fabric: the links, what travels over them, and the time that it takes."""

from lasp.cost.estimates import (
    EXCHANGES,
    SOFTMAX_EXCHANGES,
    Choice,
    Estimate,
    choose,
    choose_softmax,
    estimate,
    estimate_softmax,
)
from lasp.cost.traffic import Case, check_nodes

__all__ = [
    "EXCHANGES",
    "SOFTMAX_EXCHANGES",
    "Case",
    "Choice",
    "Estimate",
    "check_nodes",
    "choose",
    "choose_softmax",
    "estimate",
    "estimate_softmax",
]
