"""State maps as messages: the transition in the dtype of the states, then the state, narrower where the user asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.exchange.line import Parcel
from lasp.kernels.state import StateMap, Transition


def pack(tensors: Sequence[Tensor], unit: int) -> Tensor:
    """Tensors one behind the other as bytes, uint8 [n]; each begins at a multiple of ``unit`` bytes."""
    parts = []
    for x in tensors:
        part = x.contiguous().view(-1).view(torch.uint8)
        parts.append(part)
        if len(part) % unit:
            parts.append(part.new_zeros(unit - len(part) % unit))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unpack(message: Tensor, shapes: Sequence[tuple[torch.Size, torch.dtype]], unit: int) -> list[Tensor]:
    """The tensors of messages [..., n], each [..., *shape]: views."""
    out, at = [], 0
    for shape, dtype in shapes:
        size = shape.numel() * dtype.itemsize
        out.append(message[..., at : at + size].view(dtype).unflatten(-1, shape))
        at += -(-size // unit) * unit
    return out


@dataclass(frozen=True)
class Wire:
    """How the maps of one exchange travel.

    Attributes:
        lead: [B, H, K] of the states.
        dtype, wire_dtype: of states here, and under way.
        device: of both.
        kind: of the transitions.
        decay: shape of a log-decay or matrix.
        fixed: a log-decay per token [H], equal for all tokens: then transitions follow from lengths.
    """

    lead: torch.Size
    dtype: torch.dtype
    wire_dtype: torch.dtype
    device: torch.device
    kind: Transition
    decay: torch.Size
    fixed: Tensor | None

    @classmethod
    def of(cls, maps: StateMap, fixed: Tensor | None, wire_dtype: torch.dtype | None) -> Wire:
        """For these maps, stacked along dim 0."""
        state = maps.state
        transition = maps.log_decay if maps.matrix is None else maps.matrix
        decay = torch.Size() if transition is None else transition.shape[1:]
        return cls(state.shape[1:-1], state.dtype, wire_dtype or state.dtype, state.device, maps.kind, decay, fixed)

    def shapes(self, parcel: Parcel) -> list[tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of the tensors of a parcel."""
        state = (torch.Size((*self.lead, parcel.columns)), self.wire_dtype)
        return [(self.decay, self.dtype), state] if self._has_transition(parcel) else [state]

    def num_bytes(self, parcels: Sequence[Parcel]) -> int:
        """Size of a message that holds these parcels."""
        unit = self.dtype.itemsize
        sizes = [shape.numel() * dtype.itemsize for p in parcels for shape, dtype in self.shapes(p)]
        return sum(-(-size // unit) * unit for size in sizes)

    def pack(self, maps: Sequence[StateMap], parcels: Sequence[Parcel]) -> Tensor:
        """One message, uint8 [num_bytes]."""
        tensors = []
        for map_, parcel in zip(maps, parcels, strict=True):
            if self._has_transition(parcel):
                tensors.append((map_.log_decay if map_.matrix is None else map_.matrix).expand(self.decay))
            tensors.append(map_.state.to(self.wire_dtype))
        return pack(tensors, self.dtype.itemsize)

    def unpack(self, message: Tensor, parcels: Sequence[Parcel]) -> list[StateMap]:
        """The maps of a message; a parcel without tokens is a state alone."""
        shapes = [shape for parcel in parcels for shape in self.shapes(parcel)]
        tensors = iter(unpack(message, shapes, self.dtype.itemsize))
        maps = []
        for parcel in parcels:
            transition = next(tensors) if self._has_transition(parcel) else None
            state = next(tensors).to(self.dtype)
            if self.fixed is not None and parcel.tokens is not None:
                transition = (parcel.tokens * self.fixed.double()).to(self.dtype)[:, None]
            dense = self.kind is Transition.DENSE
            maps.append(StateMap(state, None if dense else transition, transition if dense else None))
        return maps

    def _has_transition(self, parcel: Parcel) -> bool:
        return parcel.tokens is not None and self.kind is not Transition.IDENTITY and self.fixed is None
