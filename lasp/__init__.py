"""Linear and hybrid attention over sequences cut across a context-parallel group, exact against one device.

The names below are imported when they are first used: ``import lasp.launch.cli`` passes through here, and the command
must be up, and able to take a Ctrl-C, before it has loaded torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lasp import comm
    from lasp.attention import softmax_attention
    from lasp.convolution import short_convolution
    from lasp.cp_context import CPContext, ExchangeOptions
    from lasp.layout import SequenceLayout
    from lasp.linear import linear_attention

__version__ = "0.1.0"

__all__ = [
    "CPContext",
    "ExchangeOptions",
    "SequenceLayout",
    "__version__",
    "comm",
    "linear_attention",
    "short_convolution",
    "softmax_attention",
]

_HOMES = {
    "CPContext": "cp_context",
    "ExchangeOptions": "cp_context",
    "SequenceLayout": "layout",
    "linear_attention": "linear",
    "short_convolution": "convolution",
    "softmax_attention": "attention",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES.get(name, name)}")
    return getattr(module, name) if name in _HOMES else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
