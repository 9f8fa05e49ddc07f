"""The curve of a run, and how far another one may be from it."""

from lasp.launch.run.report import read_metrics
from tests.rounding import distance

KEYS = ("loss", "grad_norm", "eval_loss")


def curve(run_dir):
    """The records of a run by step."""
    return {record["step"]: record for record in read_metrics(run_dir)}


def numbers(records, others, steps):
    """What is compared of each step: what both curves have, the loss and the norm at least."""
    keys = {step: [key for key in KEYS if key in records[step] and key in others[step]] for step in steps}
    assert all(keys[step][:2] == ["loss", "grad_norm"] for step in steps)
    return [tuple(records[step][key] for key in keys[step]) for step in steps]


def apart(actual, expected):
    """Largest relative distance of two curves over the same steps, as :mod:`tests.rounding` has it."""
    assert sorted(actual) == sorted(expected)
    return distance(numbers(actual, expected, expected), numbers(expected, actual, expected))


def check(actual, expected, steps, limit, evaluations=3):
    """Compares step by step: the first that differs is the failure."""
    assert sorted(actual) == list(steps)
    for step in steps:
        found, wanted = numbers(actual, expected, [step]), numbers(expected, actual, [step])
        assert distance(found, wanted) <= limit, f"step {step}: {found} is not {wanted}, up to {limit}"
    assert sum("eval_loss" in expected[step] and "eval_loss" in actual[step] for step in steps) >= evaluations
