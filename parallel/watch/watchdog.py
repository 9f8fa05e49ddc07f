"""A thread in every rank that knows which collective the rank is in, and says why when one does not end.

It has a connection of its own to the job's store. Twice a second it writes down the newest collective that this rank
has entered, so that others can say where it was if it dies, and looks whether anybody has asked a question. The rank
whose wait fails asks: all ranks answer with what they have entered and the stacks of their Python threads, also for
ranks beside them that cannot answer any more (lasp.parallel.watch.recorder); who still is silent is dead or stuck. From
that follows one sentence (lasp.comm.hangs), the *verdict*. It is written once, and every rank reports the same. Where a
wait raises an error (gloo), the waiting thread asks. Where the host never waits (NCCL), and on the rank that is late,
this thread ends the process with the verdict.

What it costs the training thread is one write to memory per collective: benchmarks/watchdog.py.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from lasp import comm
from lasp.comm.hangs import Report, Wait, explain, missing_ranks
from lasp.parallel.watch.recorder import Neighbour, Recorder

_INTERVAL_S, _FIRST_S = 0.5, 0.05  # between two looks; until all neighbours are known
_SILENCE_S = 3.0  # a rank that has not answered by then is dead or stuck
_LINGER_S = 2.0  # after the limit, or a verdict, the main thread may raise its own error before this one ends it
_FRAMES = 12


@dataclass(eq=False)
class _Seen:
    """What is known of one group: the newest collective, and what torch has issued itself after it."""

    name: str
    covered: int = 0  # number of the newest collective that has a name
    place: str = ""  # and that name
    unnamed: Wait | None = None
    since: float = 0.0


class Watchdog(comm.Observer):
    """Watches the collectives of this rank while the ``with`` block runs.

    Args:
        store: the job's, for keys of this attempt alone; a connection that nobody else uses.
        rank: this one.
        world_size: ranks of the job; each has a watchdog.
        limit_s: how long a collective may take.
        neighbours: ranks on this machine, as far as they are known; when one dies, this rank speaks for it.
        end: gets the verdict on the watchdog's thread, where the main one cannot raise it. Must end the process.
        store_host: who serves the store, and takes it along when it dies.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        limit_s: float,
        neighbours: Iterable[int],
        end: Callable[[str], None],
        *,
        store_host: str = "the launcher",
    ):
        self._store, self._rank, self._world_size = store, rank, world_size
        self._limit_s, self._end, self._store_host = limit_s, end, store_host
        self._host = socket.gethostname()
        self._recorder, self._neighbours = Recorder(), {}
        self._unknown = set(neighbours) - {rank}
        self._open: dict[int, comm.Call] = {}
        self._seen: dict[dist.ProcessGroup, _Seen] = {}
        self._newest: comm.Call | None = None
        self._scope: tuple[str, ...] = ()
        self._published, self._answered, self._condemned = "", 0, float("inf")
        self._told = False  # the main thread has the verdict and will raise it
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lasp-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._store.set(f"recorder/{self._rank}", self._recorder.address)
        self._publish()
        self.attach()
        self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.detach()
        self._stop.set()
        self._thread.join(2 * _INTERVAL_S)
        what = "" if error is None else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        try:
            self._publish(ended=what)
        except RuntimeError:  # the store has gone first
            return

    # What the training thread calls: nothing here waits.

    def entered(self, call: comm.Call) -> None:
        """See :meth:`lasp.comm.Observer.entered`."""
        seen = self._seen.get(call.group)
        if seen is None:
            seen = self._seen[call.group] = _Seen(call.group.group_name)
        seen.covered, seen.place = call.number, call.place
        self._recorder.write(seen.name, call.number, call.place)
        self._open[id(call)] = self._newest = call

    def left(self, call: comm.Call) -> None:
        """See :meth:`lasp.comm.Observer.left`."""
        if call.num_bytes is None:  # it may have issued more than one
            self._seen[call.group].covered = comm.last_number(call.group)
        if call.done is None:
            self._open.pop(id(call), None)

    def moved(self, scope: tuple[str, ...]) -> None:
        """See :meth:`lasp.comm.Observer.moved`."""
        self._scope = scope

    def explain(self, call: comm.Call | None, error: str) -> str:
        """The verdict; takes a few seconds."""
        self._told = True
        return self._verdict(call, error)

    # What the watchdog's thread does.

    def _run(self) -> None:
        while not self._stop.wait(_FIRST_S if self._unknown else _INTERVAL_S):
            try:
                self._look()
            except RuntimeError:  # the store is gone: the ranks that wait will find out, and say so
                return

    def _look(self) -> None:
        self._settle()
        self._meet()
        self._publish()
        if self._answer() and self._condemned == float("inf") and self._store.check(["verdict"]):
            self._condemned = time.monotonic() + _LINGER_S
        if self._told:
            return
        overdue = {call.started + self._limit(call.group): call for call in tuple(self._open.values())}
        if overdue and time.monotonic() > min(overdue) + _LINGER_S:
            self._end(self._verdict(overdue[min(overdue)], ""))
        elif time.monotonic() > self._condemned:
            self._end(self._store.get("verdict").decode())

    def _limit(self, group: dist.ProcessGroup) -> float:
        """Seconds; gloo's waits raise at the timeout of their group, which may be longer: of those that write files."""
        if dist.get_backend(group) != "gloo":
            return self._limit_s
        options = group._get_backend(torch.device("cpu")).options
        return max(self._limit_s, options._timeout.total_seconds())

    def _meet(self) -> None:
        """Hold the recorders of the ranks on this machine."""
        for rank in tuple(self._unknown):
            if self._store.check([f"recorder/{rank}"]):
                self._unknown.remove(rank)
                with contextlib.suppress(OSError):  # it is elsewhere after all, or has ended
                    self._neighbours[rank] = Neighbour(self._store.get(f"recorder/{rank}").decode())

    def _settle(self) -> None:
        """Forget collectives that the device is through with; note those that torch has issued itself."""
        for key, call in tuple(self._open.items()):
            if call.done is not None and call.done.query():
                self._open.pop(key, None)
        busy = {call.group for call in tuple(self._open.values()) if call.num_bytes is None}
        for group in _groups():
            number, seen = _number(group), self._seen.setdefault(group, _Seen(group.group_name))
            if number > seen.covered and group not in busy and (seen.unnamed is None or seen.unnamed.number < number):
                after = (f"after {seen.place}",) if seen.place else ()
                what = ", ".join(("issued by torch", *self._scope, *after))
                seen.since = time.monotonic()
                seen.unnamed = Wait(group.group_name, (), number, what, 0.0)

    def _publish(self, ended: str | None = None) -> None:
        """Write down what others need to know if this rank cannot speak."""
        text = Report(self._host, self._reached(), self._newest_phrase(), ended=ended).to_json()
        if text != self._published:
            self._store.set(f"record/{self._rank}", text)
            self._published = text

    def _answer(self) -> int:
        """Answer what has been asked since the last look; the number of questions so far."""
        asked = self._store.add("asks", 0)
        if asked > self._answered:
            for question in range(self._answered + 1, asked + 1):
                self._tell(question)
            self._answered = asked
        return asked

    def _tell(self, question: int) -> None:
        self._store.set(f"answer/{question}/{self._rank}", self._report().to_json())
        self._tell_for_neighbours(question)

    def _tell_for_neighbours(self, question: int) -> None:
        """What the ranks on this machine that cannot speak had recorded."""
        for rank, neighbour in self._neighbours.items():
            if fate := neighbour.fate():
                report = _recorded(neighbour.history(), host=self._host, fate=fate)
                self._store.set(f"answer/{question}/{rank}", report.to_json())

    # The verdict.

    def _verdict(self, call: comm.Call | None, error: str) -> str:
        """What the first rank that asks finds out; the others wait for it."""
        try:
            composer = self._store.compare_set("composer", "", str(self._rank)).decode()
            deadline = time.monotonic() + 2 * _SILENCE_S
            while composer != str(self._rank) and time.monotonic() < deadline:
                if self._store.check(["verdict"]):
                    return self._store.get("verdict").decode()
                if threading.current_thread() is self._thread:
                    self._answer()
                time.sleep(0.05)
            text = self._compose(call, error)
            return self._store.compare_set("verdict", "", text).decode()
        except RuntimeError:
            wait = self._wait(call) if call is not None else None
            what = "" if wait is None else f"; rank {self._rank} waits in collective {wait.number} ({wait.what})"
            reason = f" ({error.partition(chr(10))[0]})" if error else ""
            return f"{self._store_host} died or cannot be reached, and with it the job's store{what}{reason}"

    def _compose(self, call: comm.Call | None, error: str) -> str:
        question = self._store.add("asks", 1)
        answers = [f"answer/{question}/{rank}" for rank in range(self._world_size)]
        deadline = time.monotonic() + _SILENCE_S
        self._tell(question)
        while not self._store.check(answers) and time.monotonic() < deadline:
            time.sleep(0.05)
            self._tell_for_neighbours(question)  # one may have died just now
        reports = {}
        for rank, answer in enumerate(answers):
            record = f"record/{rank}"
            if self._store.check([record]):
                reports[rank] = Report.from_json(self._store.get(record))
            if (rank not in reports or reports[rank].ended is None) and self._store.check([answer]):
                reports[rank] = Report.from_json(self._store.get(answer))
        if call is not None:
            return explain(self._wait(call), reports, error)
        candidates = [wait for group in _groups() if (wait := self._newest_wait(group)) is not None]
        blocked = [wait for wait in candidates if missing_ranks(wait, reports)]
        wait = next(iter(blocked or candidates))
        own = replace(reports[self._rank], waits=(wait, *reports[self._rank].waits))
        return explain(wait, {**reports, self._rank: own}, error)

    def _report(self) -> Report:
        """All that this rank knows of itself."""
        waits: dict[str, Wait] = {}
        for call in sorted(self._open.values(), key=lambda call: call.started):
            wait = self._wait(call)
            waits.setdefault(wait.group, wait)
        return replace(
            _recorded(self._recorder.history(), host=self._host),
            reached=self._reached(),
            newest=self._newest_phrase(),
            waits=tuple(waits.values()),
            stack=_stacks(self._thread.ident),
            answered=True,
        )

    def _wait(self, call: comm.Call) -> Wait:
        number = call.number if call.num_bytes is not None else max(call.number, _number(call.group))
        ranks = tuple(dist.get_process_group_ranks(call.group))
        return Wait(call.group.group_name, ranks, number, call.place, time.monotonic() - call.started)

    def _newest_wait(self, group: dist.ProcessGroup) -> Wait | None:
        """The newest collective of the group, as far as it is known; None where there was none."""
        self._settle()
        number, seen, ranks = _number(group), self._seen[group], tuple(dist.get_process_group_ranks(group))
        if seen.unnamed is not None and seen.unnamed.number == number:
            return replace(seen.unnamed, ranks=ranks, age_s=time.monotonic() - seen.since)
        return Wait(group.group_name, ranks, number, seen.place, 0.0) if seen.place else None

    def _reached(self) -> dict[str, int]:
        return {group.group_name: _number(group) for group in _groups()}

    def _newest_phrase(self) -> str:
        call = self._newest
        unnamed = [seen.unnamed for seen in tuple(self._seen.values()) if seen.unnamed is not None]
        newer = [w for w in unnamed if call is None or (w.group == call.group.group_name and w.number > call.number)]
        if newer:
            return f"collective {newer[-1].number} ({newer[-1].what})"
        return Report.newest if call is None else f"collective {call.number} ({call.place})"


def _recorded(entries: list[tuple[str, int, str]], host: str, fate: str = "") -> Report:
    """What follows from a recorder alone."""
    history: dict[str, dict[int, str]] = {}
    for group, number, place in entries:
        history.setdefault(group, {})[number] = place
    reached = {group: max(names) for group, names in history.items()}
    newest = "collective {1} ({2})".format(*entries[-1]) if entries else Report.newest
    return Report(host, reached, newest, history=history, fate=fate)


def verdict(store: dist.Store) -> str | None:
    """What the watchdogs of a job have found, from the keys that they were given; None where nobody asked."""
    return store.get("verdict").decode() if store.check(["verdict"]) else None


def last_entered(store: dist.Store, rank: int) -> str | None:
    """The collective that a rank had entered when it last wrote that down; None where it never did."""
    key = f"record/{rank}"
    return Report.from_json(store.get(key)).newest if store.check([key]) else None


def _groups() -> list[dist.ProcessGroup]:
    """Every process group of this process that has a counter."""
    return [group for group in tuple(dist.distributed_c10d._world.pg_map) if _number(group) >= 0]


def _number(group: dist.ProcessGroup) -> int:
    try:
        return comm.last_number(group)
    except RuntimeError:  # a backend that does not count
        return -1


def _stacks(skipped: int | None) -> str:
    """Where the main thread is, and every thread that runs a backward."""
    main, parts = threading.main_thread().ident, []
    for thread, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != main):
        lines = traceback.format_stack(frame)
        if thread == main or (thread != skipped and any(", in backward" in line for line in lines)):
            parts.extend(lines[-_FRAMES:])
    return "".join(parts).rstrip()
