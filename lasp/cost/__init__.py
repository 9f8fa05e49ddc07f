"""What exchanges cost on a fabric: the links, what travels over them, and the time that it takes."""

from lasp.cost.estimates import (
    Choice,
    Estimate,
    Modelled,
    ModelledSoftmax,
    choose,
    choose_softmax,
    estimate,
    estimate_softmax,
)
from lasp.cost.traffic import Case, check_nodes

__all__ = [
    "Case",
    "Choice",
    "Estimate",
    "Modelled",
    "ModelledSoftmax",
    "check_nodes",
    "choose",
    "choose_softmax",
    "estimate",
    "estimate_softmax",
]
