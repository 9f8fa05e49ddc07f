"""Chains: the segments of one document, spread over the ranks, and which of their maps must travel.

A map can matter to another rank only if it belongs to the last segment of a fragment, and a gradient only if it
belongs to the first, so a message has one slot per fragment, whatever the length of the sequence. Plain ints, made
from the layout alone and therefore equal on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from lasp.layout import Segment, SequenceLayout


@dataclass(frozen=True)
class Slots:
    """Which segments' values travel. Slot ``r * per_rank + i`` holds segment ``sent[r][i]`` of rank r.

    Attributes:
        sent: per rank, local segment indices.
        per_rank: slots of every rank's message; shorter lists are padded.
    """

    sent: tuple[tuple[int, ...], ...]
    per_rank: int

    def index(self) -> dict[tuple[int, int], int]:
        """Slot of ``(cp_rank, local segment index)``."""
        return {(r, s): r * self.per_rank + i for r, owned in enumerate(self.sent) for i, s in enumerate(owned)}


@dataclass(frozen=True)
class ChainPlan:
    """One rank's part in the chains of all documents. Slots are indices into the gathered messages of all ranks.

    Attributes:
        forward, backward: which maps travel forward, which gradients backward.
        lengths: tokens of the segment in each forward slot (0 for padding).
        before: per own segment, the forward slots of its chain before it, first to last; not causal: the whole chain.
        after: per own segment, ``(backward slot, forward slot)`` of its chain after it, last to next; not causal: the
            whole chain. The forward slot is None where that map did not travel; then nothing arrives behind it.
        documents: document of each own segment.
        begins, ends: whether each own segment begins / ends its document.
        finals: per document, the forward slots of its whole chain; empty when final states are not asked for.
        causal: whether a document is read in order.
        ending: own segments that end a document, in the order of the documents.
        ends_per_rank: how many documents end on each rank.
        ends_in_order: the documents with tokens, by the rank where they end, then in their order.
    """

    forward: Slots
    backward: Slots
    lengths: tuple[int, ...]
    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[tuple[int, int | None], ...], ...]
    documents: tuple[int, ...]
    begins: tuple[bool, ...]
    ends: tuple[bool, ...]
    finals: tuple[tuple[int, ...], ...]
    causal: bool
    ending: tuple[int, ...]
    ends_per_rank: tuple[int, ...]
    ends_in_order: tuple[int, ...]

    @classmethod
    def make(cls, layout: SequenceLayout, cp_rank: int, *, causal: bool, final_states: bool) -> ChainPlan:
        """The plan of ``cp_rank``; which slots travel is the same on every rank."""
        ranks = [layout.segments(r) for r in range(layout.cp_size)]
        if causal:
            exits = [_edge_segments(segments, last=True) for segments in ranks]
            if final_states:  # documents that end inside a fragment
                for segments, sent in zip(ranks, exits, strict=True):
                    edges = set(sent)
                    sent += [i for i, s in enumerate(segments) if s.ends_document and i not in edges]
            entries = [_edge_segments(segments, last=False) for segments in ranks]
        else:  # every part of a document that lies on several fragments
            exits = [
                [i for i, s in enumerate(segments) if not (s.begins_document and s.ends_document)] for segments in ranks
            ]
            entries = exits
        least = layout.max_fragments
        forward, backward = _slots(exits, least), _slots(entries, least)
        slot_of, grad_slot_of = forward.index(), backward.index()
        place = {(s.cp_rank, s.start): i for segments in ranks for i, s in enumerate(segments)}

        def key(segment: Segment) -> tuple[int, int]:
            return segment.cp_rank, place[segment.cp_rank, segment.start]

        lengths = [0] * (layout.cp_size * forward.per_rank)
        for (rank, i), slot in slot_of.items():
            lengths[slot] = len(ranks[rank][i])
        before, after = [], []
        for segment in ranks[cp_rank]:
            chain = layout.chains[segment.document]
            at = next(i for i, s in enumerate(chain) if s.start_global == segment.start_global)
            earlier, later = (chain[:at], chain[:at:-1]) if causal else (chain, chain) if len(chain) > 1 else ((), ())
            before.append(tuple(slot_of[key(s)] for s in earlier))
            after.append(tuple((grad_slot_of[key(s)], slot_of.get(key(s))) for s in later))
        own = ranks[cp_rank]
        ends = [sorted((s.document, i) for i, s in enumerate(segments) if s.ends_document) for segments in ranks]
        chains = layout.chains if final_states else ()
        return cls(
            forward=forward,
            backward=backward,
            lengths=tuple(lengths),
            before=tuple(before),
            after=tuple(after),
            documents=tuple(s.document for s in own),
            begins=tuple(s.begins_document for s in own),
            ends=tuple(s.ends_document for s in own),
            finals=tuple(tuple(slot_of[key(s)] for s in chain) for chain in chains),
            causal=causal,
            ending=tuple(i for _, i in ends[cp_rank]),
            ends_per_rank=tuple(map(len, ends)),
            ends_in_order=tuple(document for found in ends for document, _ in found),
        )


def _edge_segments(segments: tuple[Segment, ...], *, last: bool) -> list[int]:
    """Index of the first or the last segment of each fragment, in local order."""
    edges = {s.fragment: i for i, s in (enumerate(segments) if last else reversed(list(enumerate(segments))))}
    return [edges[fragment] for fragment in sorted(edges)]


def _slots(sent: list[list[int]], least: int) -> Slots:
    return Slots(tuple(tuple(s) for s in sent), max(least, *(len(s) for s in sent)))
