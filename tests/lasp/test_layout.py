import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasp import CPContext, SequenceLayout
from lasp.context.chains import ChainPlan
from tests.lasp.layout_cases import any_layouts

EXAMPLE = (0, 5, 12)  # the worked example of the glossary


def test_the_worked_example():
    contiguous, zigzag = SequenceLayout.contiguous(EXAMPLE, 2), SequenceLayout.zigzag(EXAMPLE, 2)
    assert contiguous.fragments == (((0, 6),), ((6, 12),))
    assert zigzag.fragments == (((0, 3), (9, 12)), ((3, 6), (6, 9)))
    assert zigzag.position_ids(0).tolist() == [0, 1, 2, 4, 5, 6]
    assert zigzag.cu_seqlens(1).tolist() == [0, 2, 3, 6]
    assert zigzag.cu_seqlens(1).dtype == torch.int32 and zigzag.position_ids(1).dtype == torch.int64
    x = torch.arange(12).view(1, 12)
    assert zigzag.shard(x, 0).tolist() == [[0, 1, 2, 9, 10, 11]]
    assert [[s.cp_rank for s in chain] for chain in zigzag.chains] == [[0, 1], [1, 1, 0]]


@settings(max_examples=60, deadline=None)
@given(layout=any_layouts())
def test_shards_tile_the_sequence_and_positions_restart_in_each_document(layout):
    x = torch.randn(2, layout.total_tokens, 3)
    parts = [layout.shard(x, r) for r in range(layout.cp_size)]
    assert torch.equal(layout.unshard(parts), x)
    borders = torch.tensor(layout.cu_seqlens_global)
    token = torch.arange(layout.total_tokens)
    document = torch.bucketize(token, borders[1:], right=True)
    positions = layout.unshard([layout.position_ids(r)[None] for r in range(layout.cp_size)])[0]
    assert torch.equal(positions, token - borders[document])
    for rank in range(layout.cp_size):
        local = layout.shard(document[None], rank)[0]
        for segment in layout.segments(rank):
            assert (local[segment.start : segment.stop] == segment.document).all()
        assert layout.cu_seqlens(rank)[-1] == layout.num_tokens(rank) == len(local)
    for n, chain in enumerate(layout.chains):
        tokens = [t for s in chain for t in range(s.start_global, s.stop_global)]
        assert tokens == list(range(borders[n], borders[n + 1]))


@settings(max_examples=60, deadline=None)
@given(layout=any_layouts(), causal=st.booleans(), finals=st.booleans())
def test_slots_carry_everything_that_the_folds_read(layout, causal, finals):
    finals = finals and causal
    plans = [ChainPlan.make(layout, r, causal=causal, final_states=finals) for r in range(layout.cp_size)]
    assert len({(p.forward, p.backward, p.lengths) for p in plans}) == 1, "ranks must agree on messages"
    if causal and not finals:
        assert plans[0].forward.per_rank == plans[0].backward.per_rank == layout.max_fragments
    index = {slot: key for key, slot in plans[0].forward.index().items()}
    for rank, plan in enumerate(plans):
        for i, segment in enumerate(layout.segments(rank)):
            read = [layout.segments(index[slot][0])[index[slot][1]] for slot in plan.before[i]]
            chain = list(layout.chains[segment.document])
            if causal:
                assert read == chain[: chain.index(segment)]
            else:
                assert read == (chain if len(chain) > 1 else [])
            for place, (_, forward_slot) in enumerate(plan.after[i]):
                assert forward_slot is not None or (place == 0 and not finals), "only a chain's end may stay home"


def test_integers_of_other_libraries_are_integers():
    np = pytest.importorskip("numpy")
    assert SequenceLayout.contiguous(np.int64(10), 2) == SequenceLayout.contiguous(10, 2)
    assert SequenceLayout.zigzag(np.array([0, 4, 10]), 2) == SequenceLayout.zigzag(torch.tensor([0, 4, 10]), 2)


def test_zigzag_of_few_tokens_leaves_empty_blocks_out():
    layout = SequenceLayout.zigzag(5, 4)
    assert layout.fragments == (((0, 1),), ((1, 2),), ((2, 3),), ((3, 4), (4, 5)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SequenceLayout.contiguous(3, 4), r"3 tokens cannot be cut over cp_size = 4"),
        (lambda: SequenceLayout.contiguous((1, 5), 1), r"must start at 0 and never decrease"),
        (lambda: SequenceLayout.contiguous((0, 5, 4), 1), r"must start at 0 and never decrease"),
        (lambda: SequenceLayout.contiguous((0, 0), 1), r"at least one token"),
        (lambda: SequenceLayout.contiguous(8, 0), r"cp_size must be at least 1"),
        (lambda: SequenceLayout.contiguous((0, 2.5), 1), r"must hold integers"),
        (lambda: SequenceLayout(8, [((0, 4),), ((5, 8),)]), r"tile \[0, 8\) exactly once.*starts at 4, got \(5, 8\)"),
        (lambda: SequenceLayout(8, [((0, 5),), ((4, 8),)]), r"tile \[0, 8\) exactly once.*rank 1"),
        (lambda: SequenceLayout(8, [((0, 4),), ()]), r"fragments\[1\] is empty"),
        (lambda: SequenceLayout(8, [((0, 4),), ((4, 7),)]), r"they end at 7"),
        (lambda: SequenceLayout.contiguous(8, 2).shard(torch.zeros(1, 7), 0), r"all 8 tokens.*got shape \(1, 7\)"),
        (lambda: SequenceLayout.contiguous(8, 2).shard(torch.zeros(8), 0), r"all 8 tokens.*along dim 1"),
        (lambda: SequenceLayout.contiguous(10.0, 2), r"must hold integers, or be one, got 10\.0"),
        (lambda: SequenceLayout.contiguous(True, 1), r"must hold integers, or be one, got True"),
        (lambda: SequenceLayout.contiguous(8, True), r"cp_size must be at least 1 and an int, got True"),
        (lambda: SequenceLayout(10, [((0, 4.7),), ((4.2, 10),)]), r"pairs of integers \(start, stop\)"),
        (lambda: SequenceLayout(10, [(0, 10)]), r"pairs of integers \(start, stop\)"),
        (lambda: SequenceLayout.contiguous(8, 2).position_ids(0.5), r"cp_rank must be in \[0, 2\).*got 0\.5"),
        (lambda: SequenceLayout.contiguous(8, 2).shard(torch.zeros(1, 8), 2), r"cp_rank must be in \[0, 2\)"),
        (lambda: SequenceLayout.contiguous(8, 2).unshard([torch.zeros(1, 4)]), r"one tensor per rank: 2 ranks, got 1"),
        (lambda: SequenceLayout.contiguous(8, 2).unshard([torch.zeros(1, 3)] * 2), r"parts\[0\] must hold the 4"),
        (lambda: SequenceLayout.contiguous(8, 2).shard([1] * 8, 0), r"all 8 tokens.*along dim 1, got list"),
        (
            lambda: SequenceLayout.contiguous(8, 2).unshard([torch.zeros(1, 4)] * 2, 9),
            r"along dim 9, got shape \(1, 4\)",
        ),
        (lambda: SequenceLayout.contiguous(8, 2).unshard([[1], [2]]), r"parts\[0\] must hold the 4 .* got list"),
        (lambda: SequenceLayout.contiguous(8, 2).unshard(None), r"one tensor per rank: 2 ranks, got NoneType"),
        (lambda: CPContext(4), r"layout must be a SequenceLayout, got 4\. Make one: SequenceLayout\.contiguous"),
        (lambda: CPContext.local(SequenceLayout.contiguous(8, 2)), r"cp_size = 2"),
        (lambda: CPContext(SequenceLayout.contiguous(8, 2)), r"not initialised"),
    ],
)
def test_bad_layouts_name_the_rule_and_the_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
