"""LASP-2 and LASP-2H as modules of Megatron-Core: name a spec, and keep its TP, PP, DP, recompute and checkpoints.

Importing this package imports megatron-core; nothing else of lasp does.
"""

from lasp.parallel.megatron.attention import LinearSelfAttention
from lasp.parallel.megatron.contexts import CPContexts
from lasp.parallel.megatron.core import LinearCoreAttention, SoftmaxCoreAttention
from lasp.parallel.megatron.layouts import LayoutOrder, LayoutParams
from lasp.parallel.megatron.order import ContiguousOrder
from lasp.parallel.megatron.specs import hybrid_layer_spec

__all__ = [
    "CPContexts",
    "ContiguousOrder",
    "LayoutOrder",
    "LayoutParams",
    "LinearCoreAttention",
    "LinearSelfAttention",
    "SoftmaxCoreAttention",
    "hybrid_layer_spec",
]
