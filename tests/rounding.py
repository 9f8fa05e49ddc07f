"""How far apart two runs may end that compute the same thing in another order.

How much a model and its optimizer amplify a rounding over the steps is not known beforehand, so it is measured, by the
machine and with the instructions that the test runs on: one process trains in float32 and in float64, and the distance
of the two is what the roundings of float32 become. More ranks, another engine or another kernel make as many roundings
of the same size in another order, so their distance from the float64 run is another draw of the same quantity. A
distance is the largest of many values (two or three of each step), so that two draws are a factor of 1 to 3 apart:
``ROOM`` is beyond that. In float64 every rounding is 2**-29 of one in float32, and so is the bound.

That holds while what comes out is proportional to the rounding. Adam with a small eps breaks it: where a gradient
is rounding and nothing else its sign decides, and the parameter moves by a whole learning rate. Runs that are compared
by these bounds set eps to about the size of their gradients: a change of a gradient then reaches the update times
lr / eps at most.
"""

import torch

ROOM = 8.0
LINEAR = 1e-3  # a larger distance is no longer proportional to the rounding


def distance(actual, expected):
    """Largest relative distance of two curves, which are lists of steps and these tuples of numbers."""
    assert len(actual) == len(expected)
    pairs = [(x, y) for step, wanted in zip(actual, expected) for x, y in zip(step, wanted, strict=True)]
    return max(float("inf") if x != x else abs(x - y) / abs(y) for x, y in pairs)


def bound(own_error, dtype=torch.float32):
    """What a run in ``dtype`` may differ by, where one process in float32 differs by ``own_error`` from float64."""
    assert 0 < own_error < LINEAR, f"float32 alone is off by {own_error}: these settings amplify rounding too much"
    return ROOM * own_error * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
