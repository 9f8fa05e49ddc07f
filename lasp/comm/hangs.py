"""Why a collective does not end: what each rank reports of itself, and the one sentence that follows from it.

A rank counts the collectives of each of its groups, as torch does; two ranks that do the same have the same numbers.
So one that is behind has never reached the number where the others wait. A rank that left one out has the same numbers
as the others and other names: the first number whose names differ is where it left the common path. A rank that is
behind because it waits in another group itself is a victim: the search goes on in that group.

    rank 3 (host b) never reached collective 41 (layer 7, linear, forward); ranks 0-2 wait there since 62 s
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Wait:
    """A collective that has been entered and has not ended.

    Attributes:
        group: name of the process group.
        ranks: the ranks of the group.
        number: of the collective in the group, counted from 1.
        what: its place, as ``layer 7, linear, forward``.
        age_s: seconds since it was entered.
    """

    group: str
    ranks: tuple[int, ...]
    number: int
    what: str
    age_s: float


@dataclass(frozen=True)
class Report:
    """What a rank says of itself.

    Attributes:
        host: its machine.
        reached: number of the newest collective it entered, per group.
        newest: the collective that it entered last, in any group, as a phrase.
        history: the newest collectives it entered, per group: number to place; empty where it did not answer.
        waits: collectives that have not ended, at most one per group, the oldest first.
        stack: where its Python threads are, as text.
        ended: how the process left the job: an error, or nothing to say; None while it runs.
        answered: whether it spoke when it was asked; otherwise this is what it wrote down before.
        fate: what a neighbour knows of its process: ``died``, ``is stopped``, or nothing.
    """

    host: str = "?"
    reached: Mapping[str, int] = field(default_factory=dict)
    newest: str = "that it had begun"
    history: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    waits: tuple[Wait, ...] = ()
    stack: str = ""
    ended: str | None = None
    answered: bool = False
    fate: str = ""

    def to_json(self) -> str:
        """As text; see :meth:`from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """The report that :meth:`to_json` wrote."""
        values = json.loads(text)
        values["history"] = {g: {int(n): what for n, what in names.items()} for g, names in values["history"].items()}
        values["waits"] = tuple(Wait(**{**wait, "ranks": tuple(wait["ranks"])}) for wait in values["waits"])
        return cls(**values)


def explain(wait: Wait, reports: Mapping[int, Report], error: str, *, watched: bool = True) -> str:
    """The sentence, and below it the stack of the rank that the others wait for, where it is known.

    Args:
        wait: the collective that failed or took too long.
        reports: of all ranks that could be had; a rank without one has never said anything.
        error: what torch said; empty where nothing was raised.
        watched: whether every rank has a watchdog that answers while it runs. Without, silence means nothing.
    """
    followed = {wait.group}
    while True:
        parted = _parted(wait, reports)
        if parted is not None:
            ranks, text = parted
            return f"{text}{_waiting(wait, reports, ranks, inside=True)}{_stacks(ranks, reports)}"
        late = missing_ranks(wait, reports, watched=watched)
        onward = [other for rank in late for other in _report(rank, reports).waits if other.group not in followed]
        if not onward or any(_is_gone(rank, reports) for rank in late):
            break
        wait = onward[0]
        followed.add(wait.group)
    if not late and (entered := _unnamed_beside_named(wait, reports)):
        return f"the ranks part at collective {wait.number}: {entered}{_stacks(list(wait.ranks), reports)}"
    if not late:
        reason = error.partition("\n")[0] or "a device, or a link between ranks, does not go on"
        return f"{_names(wait.ranks, reports)} all entered {_phrase(wait)} and it did not end: {reason}"
    first, names = _report(late[0], reports), _names(late, reports)
    missing = f"{names} never reached {_first_missing(wait, late, reports)}"
    if not watched and not first.answered:
        return f"{missing}, or died{_waiting(wait, reports, late)}"
    if first.ended is not None:
        left = f"failed ({first.ended})" if first.ended else "left the job, its work done,"
        return f"{names} {left} and never reached {_phrase(wait)}{_waiting(wait, reports, late)}"
    if not first.answered:
        fate = first.fate or ("died or is stuck outside Python" if not error or is_timeout(error) else "died")
        last = " or ".join(sorted({_report(rank, reports).newest for rank in late}))
        return f"{names} {fate}, the last it entered was {last}{_waiting(wait, reports, late, inside=True)}"
    return f"{missing}{_waiting(wait, reports, late)}{_stacks(late, reports)}"


def is_timeout(error: str) -> bool:
    """Whether torch gave up waiting, rather than lost a connection."""
    return "timed out" in error.lower() or "timeout" in error.lower()


def _report(rank: int, reports: Mapping[int, Report]) -> Report:
    return reports.get(rank) or Report()


def _is_gone(rank: int, reports: Mapping[int, Report]) -> bool:
    report = _report(rank, reports)
    return not report.answered or report.ended is not None


def missing_ranks(wait: Wait, reports: Mapping[int, Report], *, watched: bool = True) -> list[int]:
    """The ranks that keep the others of the group waiting: those that are gone, else those that are behind.

    Where silence means nothing, those that are known to be behind come first.
    """
    gone = [rank for rank in wait.ranks if _is_gone(rank, reports)]
    behind = [r for r in wait.ranks if r not in gone and _report(r, reports).reached.get(wait.group, 0) < wait.number]
    free = [rank for rank in behind if all(other.group == wait.group for other in _report(rank, reports).waits)]
    return gone or free or behind if watched else free or behind or gone


def _first_missing(wait: Wait, late: list[int], reports: Mapping[int, Report]) -> str:
    """The first collective that no late rank has entered: where devices run behind their hosts, one before ``wait``."""
    known = [
        _report(rank, reports).reached[wait.group] for rank in late if wait.group in _report(rank, reports).reached
    ]
    number = min(wait.number, 1 + max(known, default=wait.number))
    if number == wait.number:
        return _phrase(wait)
    names = [_report(rank, reports).history.get(wait.group, {}).get(number) for rank in wait.ranks]
    return f"collective {number} ({next((name for name in names if name), 'issued by torch')})"


def _parted(wait: Wait, reports: Mapping[int, Report]) -> tuple[list[int], str] | None:
    """The rank that left the common path, and the sentence about it; None where all names agree."""
    histories = {rank: _report(rank, reports).history.get(wait.group, {}) for rank in wait.ranks}
    for number in sorted(set().union(*histories.values())):
        names = {rank: history[number] for rank, history in histories.items() if number in history}
        votes = Counter(names.values()).most_common()
        if len(votes) < 2:
            continue
        usual = votes[0][0] if votes[0][1] > votes[1][1] else _usual(number, histories)
        lost = next((rank for rank, name in names.items() if name != usual), None)
        if usual not in names.values() or lost is None:
            entered = ", ".join(f"{_names([rank], reports)} as ({name})" for rank, name in names.items())
            return list(names), f"the ranks part at collective {number}: {entered}"
        return [lost], (
            f"{_names([lost], reports)} never reached collective {number} ({usual}): it entered another one there "
            f"({names[lost]})"
        )
    return None


def _unnamed_beside_named(wait: Wait, reports: Mapping[int, Report]) -> str:
    """What each rank entered, where torch has issued it on some and on others it has a name; else nothing."""
    histories = {rank: _report(rank, reports).history.get(wait.group) for rank in wait.ranks}
    names = {rank: history.get(wait.number, "issued by torch") for rank, history in histories.items() if history}
    if len(names) < len(histories) or len(set(names.values())) < 2:
        return ""
    return ", ".join(f"{_names([rank], reports)} as ({name})" for rank, name in names.items())


def _usual(number: int, histories: Mapping[int, Mapping[int, str]]) -> str | None:
    """What followed the last time that a rank entered the same few collectives as before ``number``."""
    for length in (8, 4, 2, 1):
        for history in histories.values():
            before = [history.get(number - i) for i in range(1, length + 1)]
            for n in range(number - 1, min(history, default=number), -1):
                if None not in before and [history.get(n - i) for i in range(1, length + 1)] == before:
                    return history.get(n)
    return None


def _phrase(wait: Wait) -> str:
    return f"collective {wait.number} ({wait.what})"


def _waiting(wait: Wait, reports: Mapping[int, Report], late: list[int], *, inside: bool = False) -> str:
    """``; ranks 0-2 wait there since 62 s``, or nothing where nobody is left to wait.

    ``inside``: say in which collective, for sentences that have not named it.
    """
    others = [rank for rank in wait.ranks if rank not in late and not _is_gone(rank, reports)]
    ages = {rank: other.age_s for rank in others for other in _report(rank, reports).waits if other.group == wait.group}
    verb = "waits" if len(ages or others) == 1 else "wait"
    where = f"in {_phrase(wait)}" if inside else "there"
    age = max([*ages.values(), wait.age_s])
    if not others:
        return ""
    return f"; {name_ranks(ages or others)} {verb} {where} since {age:.{0 if age >= 10 else 1}f} s"


def _stacks(ranks: list[int], reports: Mapping[int, Report]) -> str:
    found = [(rank, _report(rank, reports).stack) for rank in ranks[:1] if _report(rank, reports).stack]
    return "".join(f"\nrank {rank} is here (raise timeout_s if it is only slow):\n{stack}" for rank, stack in found)


def _names(ranks: Iterable[int], reports: Mapping[int, Report]) -> str:
    """``rank 3 (host b)``, ``ranks 0-2, 5 (hosts a, b)``."""
    ranks = list(ranks)
    hosts = sorted({_report(rank, reports).host for rank in ranks} - {"?"})
    where = f" (host{'s' * (len(hosts) > 1)} {', '.join(hosts)})" if hosts else ""
    return f"{name_ranks(ranks)}{where}"


def name_ranks(ranks: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0-2, 5``."""
    text = ranges(ranks)
    return f"rank {text}" if text.isdecimal() else f"ranks {text}"


def ranges(numbers: Iterable[int]) -> str:
    """``0-2, 5`` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
