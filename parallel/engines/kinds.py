"""What there is to say of a kind of engine: what it needs, holds and sends, and how it is made. Plain data, no torch.

The kinds themselves are the entries of :mod:`lasp.parallel.engines.table`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol


class Master(Enum):
    """Where the copy of the parameters is that the optimizer updates, in fp32 (fp64 for float64 runs)."""

    IF_NARROW = "beside parameters in a narrower dtype; parameters in its own dtype are the master copy"
    ALWAYS = "beside the parameters, whatever their dtype"
    ALONE = "in place of the parameters, which are made from it when they are needed"


class Traffic(Enum):
    """What ranks that share states send to one another for their parameters."""

    ONE_SUM = "the gradients are summed once, after the last backward of a step"
    BY_BLOCK = "each micro batch gathers every block in forward and backward, and sums its gradient in the backward"


class ParameterCounts(Protocol):
    """Parameters of one rank, if it holds all of them: all, of the largest block, and of what is outside of blocks."""

    @property
    def all(self) -> float: ...
    @property
    def block(self) -> float: ...
    @property
    def root(self) -> float: ...


class Held(NamedTuple):
    """Bytes that a rank holds, and how they were counted."""

    name: str
    bytes: float
    formula: str


class Package(NamedTuple):
    """A package that an engine needs: as people call it, as Python imports it, the extra of ``lasp`` that has it."""

    name: str
    module: str
    extra: str


def _nothing(counts: ParameterCounts, width: int, wide: int) -> Iterable[Held]:
    return ()


@dataclass(frozen=True, kw_only=True)
class EngineKind:
    """One way to hold parameters, gradients and optimizer states over the ranks of dp x cp.

    Attributes:
        name: as ``engine=`` says it.
        use: when to choose it, in a few words for the documents.
        build: makes the engine from (kind, model, mesh, settings, dtype). None: the backend of this name makes it, from
            a model of its own that is cut over tp and pp too; ``engine=`` does not take it.
        cut_parameters, cut_gradients, cut_states: whether a rank holds its share of them, or all.
        master: where the master copy is.
        in_work: what a rank holds beside these while it computes, of parameters that take ``width`` bytes each and
            sums that take ``wide``.
        gathers_parameters: in a forward, so all ranks must do equally many.
        traffic: what crosses the wire for parameters and gradients.
        min_ranks: ranks to share states over.
        package: what must be installed.
        dtypes: that it can train in; ``dtype_reason``: why in no other.
        proposed: whether the planner considers it when no engine was asked for.
    """

    name: str
    use: str
    build: Callable[..., Any] | None
    cut_parameters: bool = False
    cut_gradients: bool = False
    cut_states: bool = False
    master: Master = Master.ALWAYS
    in_work: Callable[[ParameterCounts, int, int], Iterable[Held]] = _nothing
    gathers_parameters: bool = False
    traffic: Traffic = Traffic.ONE_SUM
    min_ranks: int = 1
    package: Package | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float64")
    dtype_reason: str = ""
    proposed: bool = False

    @property
    def native(self) -> bool:
        """Whether it trains our model with our loss, and not a backend's."""
        return self.build is not None

    def check_available(self, dtype: str) -> None:
        """Refuse what cannot be, before anything starts. ``dtype`` is a name, like ``float32``.

        Raises:
            ValueError: a package is not installed, or the engine does not train in the dtype.
        """
        if self.package is not None and importlib.util.find_spec(self.package.module) is None:
            raise ValueError(
                f"engine={self.name} needs {self.package.name}: pip install 'lasp[{self.package.extra}]', or use "
                "engine=fsdp2."
            )
        if dtype not in self.dtypes:
            raise ValueError(
                f"engine={self.name} computes in {' or '.join(self.dtypes)}, got dtype={dtype}: {self.dtype_reason}. "
                "Use engine=ddp or engine=fsdp2."
            )

    def check_ranks(self, ranks: int) -> None:
        """Refuse a job that has too few ranks.

        Raises:
            ValueError: it has.
        """
        if ranks < self.min_ranks:
            raise ValueError(
                f"engine={self.name} needs at least {self.min_ranks} ranks to share states over, got {ranks}. "
                "Use engine=ddp."
            )
