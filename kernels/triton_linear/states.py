"""Triton kernels of the states: what each superchunk adds to the memory, and the scan over a segment's superchunks.

States are fp32 [B * H, N, K, V] in memory. The forward adds products of keys and values, weighted by the decay from
their token to the superchunk's end. The backward (REV) adds products of queries and output gradients, weighted by the
decay from the superchunk's begin to their token. A program visits the chunks from large weights to small ones and
keeps the logarithm of the decay over the chunks that it has passed, so it never rescales what it has summed.

The decays are those of :mod:`lasp.kernels.triton_linear.gates`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lasp.kernels.triton_linear.gates import (
    CHANNEL,
    NONE,
    channel_decays,
    decay_over,
    fixed_slope,
    flagged,
    row_decays,
    sums_at,
)


@triton.jit(do_not_specialize=["T", "N", "BH"])
def local_states(
    p_x, p_z, p_states, p_g, p_coarse, p_fine, p_flags, p_pieces, scale, T, N, BH,
    H: tl.constexpr, HX: tl.constexpr, HZ: tl.constexpr, HG: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, EXACT: tl.constexpr, SAFE: tl.constexpr, REV: tl.constexpr,
):  # fmt: skip
    """states[n] = sum_t w_t x_t z_t^T over the tokens t of superchunk n. Grid [N * B * H * cdiv(V, BV)].

    x [B, T, HX, K] and z [B, T, HZ, V] are k and v. With REV they are q and do, and the sum is multiplied by ``scale``.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v, i_bh, i_n = tl.program_id(0) % NV, (tl.program_id(0) // NV) % BH, tl.program_id(0) // (NV * BH)
    i_b, i_h = i_bh // H, i_bh % H
    i_hg = i_h // (H // HG)
    if DECAY == CHANNEL:  # noqa: SIM102 (decided when compiled, then on the device)
        if flagged(p_flags, i_bh, i_n, N, H=H, HG=HG) != SAFE:
            return
    start, n = tl.load(p_pieces + i_n), tl.load(p_pieces + N + i_n) - tl.load(p_pieces + i_n)
    token = (i_b * T + start).to(tl.int64)
    p_x += (token * HX + i_h // (H // HX)) * K
    p_z += (token * HZ + i_h // (H // HZ)) * V
    slope = fixed_slope(p_g, i_hg, DECAY=DECAY)
    if p_fine is not None:
        p_fine = sums_at(p_fine, i_b, i_hg, start, T, HG=HG, K=K, DECAY=DECAY)
    if p_coarse is not None:
        p_coarse = sums_at(p_coarse, i_b, i_hg, start, T, HG=HG, K=K, DECAY=DECAY)
    rows, cols_k, cols_v = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    at_x = rows[:, None] * (HX * K) + cols_k[None, :]
    at_z = rows[:, None] * (HZ * V) + cols_v[None, :]
    b_state = tl.zeros([BK, BV], tl.float32)
    if DECAY == CHANNEL:
        b_run = tl.zeros([BK], tl.float32)
    else:
        b_run = 0.0
    chunks = tl.cdiv(n, C)
    for i in range(0, chunks):
        t = (i if REV else chunks - 1 - i) * C
        left = n - t
        in_row = (rows < left)[:, None]
        b_x = tl.load(p_x + t * (HX * K) + at_x, mask=in_row & (cols_k < K)[None, :], other=0.0)
        b_z = tl.load(p_z + t * (HZ * V) + at_z, mask=in_row & (cols_v < V)[None, :], other=0.0)
        if DECAY == CHANNEL:
            b_begin, b_end, b_total = channel_decays(p_fine, t, left, rows, cols_k, HG=HG, K=K, C=C, SAFE=SAFE)
            b_weight = tl.exp2(b_run[None, :] + (b_begin if REV else b_end))
            b_x = (b_x.to(tl.float32) * b_weight).to(p_x.dtype.element_ty)
            b_run += b_total
        elif DECAY != NONE:
            b_begin, b_end, total = row_decays(slope, p_coarse, p_fine, t, left, rows, C=C, DECAY=DECAY, EXACT=EXACT)
            b_weight = tl.exp2(b_run + (b_begin if REV else b_end))
            b_z = (b_z.to(tl.float32) * b_weight[:, None]).to(p_z.dtype.element_ty)
            b_run += total
        b_state = tl.dot(tl.trans(b_x), b_z, b_state, input_precision="ieee")
    if REV:
        b_state *= scale
    at_state = cols_k[:, None] * V + cols_v[None, :]
    mask = (cols_k < K)[:, None] & (cols_v < V)[None, :]
    tl.store(p_states + (i_bh * N + i_n).to(tl.int64) * (K * V) + at_state, b_state, mask=mask)


@triton.jit(do_not_specialize=["N", "S", "BH"])
def scan_states(
    p_states, p_exits, p_g, p_total, p_pieces, p_segments, N, S, BH,
    H: tl.constexpr, HG: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, REV: tl.constexpr,
):  # fmt: skip
    """Replace each superchunk's state by what the segment's earlier superchunks carry into it (REV: its later ones).

    exits [S, B * H, K, V] receives what is carried out of each segment. Grid [S * B * H * cdiv(K, BK)].
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    i_k, i_bh, i_s = tl.program_id(0) % NK, (tl.program_id(0) // NK) % BH, tl.program_id(0) // (NK * BH)
    i_b, i_h = i_bh // H, i_bh % H
    i_bhg = i_b * HG + i_h // (H // HG)
    first, last = tl.load(p_segments + i_s), tl.load(p_segments + S + i_s)
    slope = fixed_slope(p_g, i_h // (H // HG), DECAY=DECAY)
    rows, cols = i_k * BK + tl.arange(0, BK), tl.arange(0, BV)
    mask = (rows < K)[:, None] & (cols < V)[None, :]
    at = rows[:, None] * V + cols[None, :]
    p_states += (i_bh * N).to(tl.int64) * (K * V)
    b_carried = tl.zeros([BK, BV], tl.float32)
    for i in range(first, last):
        j = first + last - 1 - i if REV else i
        p_state = p_states + j.to(tl.int64) * (K * V) + at
        b_own = tl.load(p_state, mask=mask, other=0.0)
        tl.store(p_state, b_carried, mask=mask)
        if DECAY != NONE:
            n = tl.load(p_pieces + N + j) - tl.load(p_pieces + j)
            b_carried *= decay_over(
                slope=slope, tokens=n, p_sums=p_total, i_bhg=i_bhg, i_n=j, N=N, keys=rows, there=None,
                K=K, DECAY=DECAY, SWAP=False,
            )  # fmt: skip
        b_carried += b_own
    tl.store(p_exits + (i_s * BH + i_bh).to(tl.int64) * (K * V) + at, b_carried, mask=mask)
