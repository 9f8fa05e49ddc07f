"""CPContext: what may take the place of a layout."""

import pytest
import torch

from lasp import CPContext, linear_attention, softmax_attention


def used(replaceable=True, softmax=False, torch_path=False):
    cp = CPContext.local((0, 4, 10), replaceable=replaceable)
    x = torch.zeros(1, 10, 1, 2)
    if softmax:
        softmax_attention(x, x, x, cp=cp)
    if torch_path:
        linear_attention(x, x, x, cp=cp, impl="torch")
    return cp


@pytest.mark.parametrize(
    ("options", "borders", "message"),
    [
        ({"replaceable": False}, (0, 5, 10), "replaceable=False"),
        ({}, (0, 5), r"\(documents, tokens\) \(2, 10\) and \(1, 5\)"),
        ({}, (0, 5, 7, 10), r"\(2, 10\) and \(3, 10\)"),
        ({}, (0, 5, 11), r"\(2, 10\) and \(2, 11\)"),
        ({}, (0, 10, 10), "must have no empty document: 2 documents, 1 of them with tokens"),
        ({"softmax": True}, (0, 5, 10), r"plans of \['softmax'\]"),
        ({"torch_path": True}, (0, 5, 10), "impl='torch' used this table"),
    ],
)
def test_a_layout_that_cannot_be_replaced_stays(options, borders, message):
    cp = used(**options)
    with pytest.raises(ValueError, match=message):
        cp.replace_layout(borders)
    assert cp.layout.cu_seqlens_global == (0, 4, 10)


def test_a_replaceable_context_has_no_empty_document():
    with pytest.raises(ValueError, match="no empty document"):
        CPContext.local((0, 4, 4, 10), replaceable=True)


def test_positions_follow_the_layout():
    cp = used()
    assert cp.position_ids.tolist() == [*range(4), *range(6)]
    cp.replace_layout((0, 7, 10))
    assert cp.position_ids.tolist() == [*range(7), *range(3)]
