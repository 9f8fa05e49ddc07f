"""Decays in the Triton kernels: preparation from ``g``, sums over superchunks, and the factors of one chunk.

All decays are kept as base-2 logarithms, and every exponent that is used is <= 0. The sums run within a chunk of C
tokens:

    begin_i = g_first + ... + g_i        end_i = g_{i+1} + ... + g_last        span_ij = g_{j+1} + ... + g_i, j <= i

DECAY says which kind of decay a kernel is compiled for: one of NONE, FIXED, TOKEN and CHANNEL.

FIXED: the sums are products of a head's slope and a number of tokens, so nothing is stored.

TOKEN: ``fine`` [B, HG, T] holds begin. Where decays are strong, differences of it lose digits. For fp32 inputs (EXACT)
``coarse`` therefore holds sums of the decays rounded to whole numbers, whose differences are exact, and ``fine`` holds
the sums of what is left.

CHANNEL: ``fine`` [B, T, HG, K] holds begin where every chunk of a superchunk decays so little that one reference point
serves a chunk. In the other superchunks, which ``flags`` [B, HG, N] marks, ``fine`` holds the decays of single tokens:
the SAFE kernels sum every span of them directly. The device decides which kernel serves; the host never asks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lasp.kernels.triton_linear.decays import Decay

NONE, FIXED, TOKEN, CHANNEL = (tl.constexpr(int(kind)) for kind in Decay)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-100.0)  # natural logarithm: its exp is 0 in fp32, and it keeps -inf (a reset) out of differences
CHUNK_SAFE = 16  # C of the SAFE kernels


@triton.jit(do_not_specialize=["T", "N"])
def token_gates(
    p_g, p_coarse, p_fine, p_total, p_illegal, p_pieces, T, N,
    HG: tl.constexpr, C: tl.constexpr, R: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Decays per token: g [B, T, HG] -> coarse, fine [B, HG, T] and total [B, HG, N], all fp32 base 2.

    illegal int32 [B, HG, N] counts the values of g that are > 0. Grid [N * B * HG].
    """
    i_n, i_bh = tl.program_id(0) % N, tl.program_id(0) // N
    start, n = tl.load(p_pieces + i_n), tl.load(p_pieces + N + i_n) - tl.load(p_pieces + i_n)
    i_b, i_h = i_bh // HG, i_bh % HG
    p_g += (i_b * T + start).to(tl.int64) * HG + i_h
    p_fine += i_bh.to(tl.int64) * T + start
    at_chunk = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]  # [R, C]
    b_total = tl.zeros([R], tl.float32)
    b_illegal = tl.zeros([R], tl.int32)
    for i in range(0, tl.cdiv(n, R * C)):
        at = i * (R * C) + at_chunk
        b_g = tl.load(p_g + at * HG, mask=at < n, other=0.0).to(tl.float32)
        b_illegal += tl.sum((b_g > 0.0).to(tl.int32), 1)
        b_g = floored(b_g) * LOG2E
        b_total += tl.sum(b_g, 1)
        if EXACT:
            b_whole = tl.floor(b_g + 0.5)
            tl.store(p_coarse + i_bh.to(tl.int64) * T + start + at, tl.cumsum(b_whole, 1), mask=at < n)
            b_g -= b_whole
        tl.store(p_fine + at, tl.cumsum(b_g, 1), mask=at < n)
    tl.store(p_total + i_bh * N + i_n, tl.sum(b_total, 0))
    tl.store(p_illegal + i_bh * N + i_n, tl.sum(b_illegal, 0))


@triton.jit(do_not_specialize=["T", "N", "limit"])
def channel_gates(
    p_g, p_fine, p_total, p_flags, p_illegal, p_pieces, T, N, limit,
    HG: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Decays per channel: g [B, T, HG, K] -> fine [B, T, HG, K] and total [B, HG, N, K], fp32 base 2.

    flags int32 [B, HG, N] marks the superchunks where a channel decays by more than 2 ** ``limit`` within a chunk.
    illegal int32 [B, HG, N] counts the values of g that are > 0. Grid [N * B * HG].
    """
    i_n, i_bh = tl.program_id(0) % N, tl.program_id(0) // N
    start, n = tl.load(p_pieces + i_n), tl.load(p_pieces + N + i_n) - tl.load(p_pieces + i_n)
    i_b, i_h = i_bh // HG, i_bh % HG
    base = ((i_b * T + start).to(tl.int64) * HG + i_h) * K
    rows, cols = tl.arange(0, C), tl.arange(0, BK)
    at_chunk = rows[:, None] * (HG * K) + cols[None, :]
    in_key = cols < K
    b_total = tl.zeros([BK], tl.float32)
    b_least = tl.zeros([BK], tl.float32)
    b_illegal = tl.zeros([BK], tl.int32)
    for i in range(0, tl.cdiv(n, C)):
        mask = (i * C + rows < n)[:, None] & in_key[None, :]
        b_g = tl.load(p_g + base + i * (C * HG * K) + at_chunk, mask=mask, other=0.0).to(tl.float32)
        b_illegal += tl.sum((b_g > 0.0).to(tl.int32), 0)
        b_sum = tl.sum(floored(b_g) * LOG2E, 0)
        b_total += b_sum
        b_least = tl.minimum(b_least, b_sum)
    flag = tl.min(b_least, 0) < -limit
    tl.store(p_total + (i_bh * N + i_n).to(tl.int64) * K + cols, b_total, mask=in_key)
    tl.store(p_flags + i_bh * N + i_n, flag.to(tl.int32))
    tl.store(p_illegal + i_bh * N + i_n, tl.sum(b_illegal, 0))
    for i in range(0, tl.cdiv(n, C)):
        mask = (i * C + rows < n)[:, None] & in_key[None, :]
        b_g = tl.load(p_g + base + i * (C * HG * K) + at_chunk, mask=mask, other=0.0).to(tl.float32)
        b_g = floored(b_g) * LOG2E
        b_g = tl.where(flag, b_g, tl.cumsum(b_g, 0))
        tl.store(p_fine + base + i * (C * HG * K) + at_chunk, b_g, mask=mask)


@triton.jit(do_not_specialize=["N", "S", "BHG"])
def sum_gates(
    p_total, p_before, p_after, p_whole, p_segments, N, S, BHG,
    A: tl.constexpr, BA: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """How much each segment decays: before and after each of its superchunks [B, HG, N, A], and whole [S, B, HG, A].

    Each is a sum of ``total`` [B, HG, N, A], never a difference of two sums. Grid [S * B * HG].
    """
    i_s, i_bh = tl.program_id(0) % S, tl.program_id(0) // S
    first, last = tl.load(p_segments + i_s), tl.load(p_segments + S + i_s)
    base = i_bh.to(tl.int64) * N * A
    rows, cols = tl.arange(0, R), tl.arange(0, BA)
    in_gate = (cols < A)[None, :]
    b_sum = tl.zeros([BA], tl.float32)
    for i in range(0, tl.cdiv(last - first, R)):
        at = first + i * R + rows
        p_row = base + at[:, None] * A + cols[None, :]
        b_own = tl.load(p_total + p_row, mask=(at < last)[:, None] & in_gate, other=0.0)
        b_earlier = tl.load(p_total + p_row - A, mask=((rows > 0) & (at < last))[:, None] & in_gate, other=0.0)
        tl.store(p_before + p_row, b_sum[None, :] + tl.cumsum(b_earlier, 0), mask=(at < last)[:, None] & in_gate)
        b_sum += tl.sum(b_own, 0)
    tl.store(p_whole + (i_s * BHG + i_bh).to(tl.int64) * A + cols, b_sum, mask=cols < A)
    b_sum = tl.zeros([BA], tl.float32)
    for i in range(0, tl.cdiv(last - first, R)):
        at = last - (i + 1) * R + rows
        p_row = base + at[:, None] * A + cols[None, :]
        b_own = tl.load(p_total + p_row, mask=(at >= first)[:, None] & in_gate, other=0.0)
        later = ((rows < R - 1) & (at + 1 >= first))[:, None] & in_gate
        b_later = tl.load(p_total + p_row + A, mask=later, other=0.0)
        b_after = b_sum[None, :] + tl.cumsum(b_later, 0, reverse=True)
        tl.store(p_after + p_row, b_after, mask=(at >= first)[:, None] & in_gate)
        b_sum += tl.sum(b_own, 0)


@triton.jit
def floored(g):
    """g, raised to LOWEST where it is smaller; NaN stays NaN."""
    return tl.where(g < LOWEST, LOWEST, g)


@triton.jit
def fixed_slope(p_g, i_hg, DECAY: tl.constexpr):
    """Base-2 log-decay per token of a head; 0 unless the decay is fixed."""
    slope = 0.0
    if DECAY == FIXED:
        slope = floored(tl.load(p_g + i_hg).to(tl.float32)) * LOG2E
    return slope


@triton.jit
def flagged(p_flags, i_bh, i_n, N, H: tl.constexpr, HG: tl.constexpr):
    """Whether superchunk i_n of head i_bh is for the SAFE kernels."""
    return tl.load(p_flags + (i_bh // H * HG + i_bh % H // (H // HG)) * N + i_n) != 0


@triton.jit
def sums_at(p, i_b, i_hg, start, T, HG: tl.constexpr, K: tl.constexpr, DECAY: tl.constexpr):
    """Where ``coarse`` or ``fine`` (TOKEN, CHANNEL) holds token ``start`` of gate head i_hg."""
    if DECAY == CHANNEL:
        p += ((i_b * T + start).to(tl.int64) * HG + i_hg) * K
    else:
        p += (i_b * HG + i_hg).to(tl.int64) * T + start
    return p


@triton.jit
def decay_over(
    slope, tokens, p_sums, i_bhg, i_n, N, keys, there, K: tl.constexpr, DECAY: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """The factor by which a state [keys, values] decays over a run of tokens; SWAP: a state [values, keys].

    A fixed decay needs the number of ``tokens``. The others read the logarithm at gate head i_bhg and superchunk i_n
    of p_sums [B * HG, N, 1 or K], unless it is not ``there`` (None: it is): then nothing decays.
    """
    if DECAY == FIXED:
        b_decay = tl.exp2(tokens.to(tl.float32) * slope)
    elif DECAY == TOKEN:
        p_sum = p_sums + i_bhg * N + i_n
        b_decay = tl.exp2(tl.load(p_sum) if there is None else tl.load(p_sum, mask=there, other=0.0))
    else:
        p_sum = p_sums + (i_bhg * N + i_n).to(tl.int64) * K + keys
        mask = keys < K if there is None else (keys < K) & there
        b_decay = tl.exp2(tl.load(p_sum, mask=mask, other=0.0))
        b_decay = b_decay[None, :] if SWAP else b_decay[:, None]
    return b_decay


@triton.jit
def row_decays(slope, p_coarse, p_fine, t, left, rows, C: tl.constexpr, DECAY: tl.constexpr, EXACT: tl.constexpr):
    """begin and end [C], total [] of the chunk at token t, for decays that all channels share (FIXED, TOKEN).

    Where fewer than C tokens are ``left``, the rows behind them repeat the last token, so that exponents stay <= 0.
    """
    last = tl.minimum(left, C) - 1
    row = tl.minimum(rows, last)
    if DECAY == FIXED:
        b_begin = (row + 1).to(tl.float32) * slope
        b_end = (last - row).to(tl.float32) * slope
        total = (last + 1).to(tl.float32) * slope
    else:
        b_begin, total = tl.load(p_fine + t + row), tl.load(p_fine + t + last)
        b_end = total - b_begin
        if EXACT:
            b_coarse, coarse = tl.load(p_coarse + t + row), tl.load(p_coarse + t + last)
            b_end += coarse - b_coarse
            b_begin += b_coarse
            total += coarse
    return b_begin, b_end, total


@triton.jit
def row_spans(slope, p_coarse, p_fine, t, left, rows, C: tl.constexpr, DECAY: tl.constexpr, EXACT: tl.constexpr):
    """span [C, C] from column to row (FIXED, TOKEN); above the diagonal, minus the span from row to column."""
    if DECAY == FIXED:
        b_span = (rows[:, None] - rows[None, :]).to(tl.float32) * slope
    else:
        row = tl.minimum(rows, tl.minimum(left, C) - 1)
        b_fine = tl.load(p_fine + t + row)
        b_span = b_fine[:, None] - b_fine[None, :]
        if EXACT:
            b_coarse = tl.load(p_coarse + t + row)
            b_span += b_coarse[:, None] - b_coarse[None, :]
    return b_span


@triton.jit
def channel_decays(p_fine, t, left, rows, cols, HG: tl.constexpr, K: tl.constexpr, C: tl.constexpr, SAFE: tl.constexpr):
    """begin and end [C, BK], total [BK] of the chunk at token t, for decays of single channels (CHANNEL)."""
    p_chunk = p_fine + t * (HG * K)
    in_key = (cols < K)[None, :]
    last = tl.minimum(left, C) - 1
    if SAFE:
        at = rows[:, None] * (HG * K) + cols[None, :]
        b_g = tl.load(p_chunk + at, mask=(rows <= last)[:, None] & in_key, other=0.0)
        b_later = tl.load(p_chunk + HG * K + at, mask=(rows < last)[:, None] & in_key, other=0.0)
        b_begin, b_end, b_total = tl.cumsum(b_g, 0), tl.cumsum(b_later, 0, reverse=True), tl.sum(b_g, 0)
    else:
        row = tl.minimum(rows, last)
        b_begin = tl.load(p_chunk + row[:, None] * (HG * K) + cols[None, :], mask=in_key, other=0.0)
        b_total = tl.load(p_chunk + last * (HG * K) + cols, mask=cols < K, other=0.0)
        b_end = b_total[None, :] - b_begin
    return b_begin, b_end, b_total
