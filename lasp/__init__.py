"""Linear and hybrid attention over sequences cut across a context-parallel group, exact against one device."""

from lasp import comm
from lasp.context import CPContext
from lasp.halo import short_convolution
from lasp.layout import SequenceLayout
from lasp.linear import linear_attention
from lasp.softmax import softmax_attention

__all__ = [
    "CPContext",
    "SequenceLayout",
    "comm",
    "linear_attention",
    "short_convolution",
    "softmax_attention",
]
