"""The algebra of state maps: what a run of tokens does to a memory state, ``S_out = A . S_in + b``.

A map is a transition ``A`` and a state ``b`` [..., H, K, V]. The transition has one of four kinds:

    identity   A = I                    nothing stored
    scalar     A = exp(log_decay) I     log_decay [..., H, 1]
    diagonal   A = diag(exp(log_decay)) log_decay [..., H, K]
    dense      A = matrix               matrix    [..., H, K, K]

Maps compose, ``(A2, b2) o (A1, b1) = (A2 A1, A2 b1 + b2)``, and the composition is associative (LASP-2, arXiv
2502.07563, section 3.2; the parallel form of a linear recurrence, Blelloch 1990, section 1.4). Decays multiply by
adding their logarithms, so nothing here multiplies decays. Everything runs in the dtype of the states (fp32, or fp64)
with IEEE matrix products, whatever TF32 or autocast setting the caller has.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Transition(str, Enum):
    """The kinds of transition, by the names that options and reports use."""

    IDENTITY = "identity"
    SCALAR = "scalar"
    DIAGONAL = "diagonal"
    DENSE = "dense"

    __str__ = str.__str__

    def numbers(self, key_dim: int) -> int:
        """Numbers in the transition of one head with keys of this width."""
        return {"identity": 0, "scalar": 1, "diagonal": key_dim, "dense": key_dim * key_dim}[self.value]


@contextlib.contextmanager
def ieee():
    """Matrix products inside have full precision; the caller's autocast and TF32 / bf16 settings do not reach them."""
    # Torch refuses to read its older, global switch once a caller has used these newer ones, so only these are used.
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def in_ieee(fn):
    """Let a function run inside :func:`ieee`."""

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        with ieee():
            return fn(*args, **kwargs)

    return wrapper


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, folds and decay sums for inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class StateMap:
    """``S -> A . S + state``. ``log_decay`` and ``matrix`` exclude each other; both None is the identity.

    Attributes:
        state: ``b``, [..., H, K, V].
        log_decay: natural logarithm of the decay, <= 0, [..., H, 1] (scalar) or [..., H, K] (diagonal).
        matrix: dense ``A``, [..., H, K, K].
    """

    state: Tensor
    log_decay: Tensor | None = None
    matrix: Tensor | None = None

    def __post_init__(self):
        assert self.log_decay is None or self.matrix is None, "a map has a log_decay or a matrix, not both"

    @property
    def kind(self) -> Transition:
        """Of the transition."""
        if self.matrix is not None:
            return Transition.DENSE
        if self.log_decay is None:
            return Transition.IDENTITY
        return Transition.SCALAR if self.log_decay.shape[-1] == 1 else Transition.DIAGONAL

    def transpose(self) -> StateMap:
        """The map with ``A`` transposed: how gradients of states travel, ``dS_in = A^T dS_out + C``."""
        matrix = None if self.matrix is None else self.matrix.transpose(-1, -2)
        return StateMap(self.state, self.log_decay, matrix)


def transition(map_: StateMap, state: Tensor) -> Tensor:
    """``A . state`` for a state [..., H, K, V]."""
    if map_.matrix is not None:
        with ieee():
            return map_.matrix @ state
    if map_.log_decay is not None:
        return map_.log_decay.exp().unsqueeze(-1) * state
    return state


def apply(map_: StateMap, state: Tensor) -> Tensor:
    """``A . state + b``: the state after the run of tokens, given the state before it."""
    return transition(map_, state) + map_.state


def compose(later: StateMap, earlier: StateMap) -> StateMap:
    """The map of the run ``earlier`` followed by the run ``later``: both of one kind, or one of them the identity."""
    state = apply(later, earlier.state)
    if later.matrix is not None or earlier.matrix is not None:
        with ieee():
            return StateMap(state, matrix=_dense(later) @ _dense(earlier))
    if later.log_decay is None or earlier.log_decay is None:
        return StateMap(state, later.log_decay if earlier.log_decay is None else earlier.log_decay)
    return StateMap(state, later.log_decay + earlier.log_decay)


@in_ieee
def fold(maps: StateMap, initial: Tensor | None = None) -> Tensor:
    """The state after ``n`` maps, stacked along dim 0 in the order of the tokens.

    ``S = sum_i (prod_{m > i} A_m) b_i + (prod_m A_m) initial``. Of scalar and diagonal maps the products are
    exponentials of suffix sums of log-decays, and every exponent is <= 0. Dense maps are applied one after the other.

    Args:
        maps: ``state`` [n, ..., H, K, V], n >= 0; the transition is stacked in the same way.
        initial: the state before the first map [..., H, K, V], or None for zero.

    Returns:
        [..., H, K, V].
    """
    if maps.matrix is not None:
        state = torch.zeros_like(maps.state[0]) if initial is None else initial
        for matrix, b in zip(maps.matrix.unbind(0), maps.state.unbind(0), strict=True):
            state = apply(StateMap(b, matrix=matrix), state)
        return state
    if maps.log_decay is None:
        total = maps.state.sum(0)
        return total if initial is None else total + initial
    after = suffix_sum(maps.log_decay, 0, inclusive=False)  # [n, ..., H, a]
    total = torch.einsum("n...,n...v->...v", after.exp().expand(maps.state.shape[:-1]), maps.state)
    if initial is None:
        return total
    return total + maps.log_decay.sum(0).exp().unsqueeze(-1) * initial


def suffix_sum(x: Tensor, dim: int, inclusive: bool = True) -> Tensor:
    """``y_i = sum_{j >= i} x_j``, or over j > i; each is summed directly, never as a difference of prefix sums."""
    reverse = x.flip(dim)
    if not inclusive:
        reverse = reverse.roll(1, dim)
        reverse.narrow(dim, 0, min(1, x.shape[dim])).zero_()
    return reverse.cumsum(dim).flip(dim)


def _dense(map_: StateMap) -> Tensor:
    """The transition of ``map_`` as a matrix [..., H, K, K]."""
    if map_.matrix is not None:
        return map_.matrix
    eye = torch.eye(map_.state.shape[-2], dtype=map_.state.dtype, device=map_.state.device)
    if map_.log_decay is None:
        return eye.expand(*map_.state.shape[:-1], -1)
    return map_.log_decay.exp().expand(map_.state.shape[:-1]).unsqueeze(-1) * eye
