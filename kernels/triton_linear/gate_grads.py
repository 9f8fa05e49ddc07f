"""The Triton kernel of the gates' gradients, from the products that the kernels of dq and dk leave."""

from __future__ import annotations

import triton
import triton.language as tl

from lasp.kernels.triton_linear.gates import CHANNEL, decay_over, fixed_slope


@triton.jit(do_not_specialize=["T", "N", "BH", "slots"])
def gate_grads(
    p_rows, p_dg, p_states, p_grads, p_entry, p_exits, p_d_exit, p_g, p_before, p_after, p_pieces, T, N, BH, slots,
    H: tl.constexpr, HG: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, ENTERED: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """dg_t = sum_{s >= t} (q_s dq_s - k_s dk_s) + <S, dS> at the superchunk's end (GLA, arXiv 2312.06635, appendix C).

    rows: the products, as :func:`lasp.kernels.triton_linear.output.walk` leaves them.
    dg: [B, T, H], or [B, T, H, K] for decays of channels; fp32.
    states, grads: what earlier superchunks carry into each superchunk, and the gradient that later ones carry into it.
    entry (if ENTERED), exits: the states before and after each segment; d_exit (if LEFT): the gradient of exits.
    Grid [N * B * H], times cdiv(K, BK) for decays of channels.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    BLOCKS: tl.constexpr = NK if DECAY == CHANNEL else 1
    i_k, i_bh, i_n = tl.program_id(0) % BLOCKS, (tl.program_id(0) // BLOCKS) % BH, tl.program_id(0) // (BLOCKS * BH)
    i_b, i_h = i_bh // H, i_bh % H
    i_bhg = i_b * HG + i_h // (H // HG)
    start, stop, i_s = tl.load(p_pieces + i_n), tl.load(p_pieces + N + i_n), tl.load(p_pieces + 2 * N + i_n)
    begin, end = tl.load(p_pieces + 3 * N + i_n), tl.load(p_pieces + 4 * N + i_n)
    ends_here = stop == end
    slope = fixed_slope(p_g, i_h // (H // HG), DECAY=DECAY)
    p_state = p_states + (i_bh * N + i_n + 1).to(tl.int64) * (K * V)
    p_grad = p_grads + (i_bh * N + i_n).to(tl.int64) * (K * V)
    segment = (i_s * BH + i_bh).to(tl.int64) * (K * V)
    rows, cols = tl.arange(0, C), i_k * BK + tl.arange(0, BK)
    b_anchor = tl.zeros([BK], tl.float32)
    for i in range(0, tl.cdiv(V, BV) * (1 if DECAY == CHANNEL else NK)):
        keys = cols + (0 if DECAY == CHANNEL else (i // tl.cdiv(V, BV)) * BK)
        values = (i % tl.cdiv(V, BV)) * BV + tl.arange(0, BV)
        at = keys[:, None] * V + values[None, :]
        mask = (keys < K)[:, None] & (values < V)[None, :]
        b_state = tl.load(p_exits + segment + at, mask=mask & ends_here, other=0.0)
        b_state += tl.load(p_state + at, mask=mask & (stop < end), other=0.0)
        b_grad = tl.load(p_grad + at, mask=mask, other=0.0)
        if ENTERED:
            b_entry = tl.load(p_entry + segment + at, mask=mask & (stop < end), other=0.0)
            b_state += b_entry * decay_over(
                slope=slope, tokens=stop - begin, p_sums=p_before, i_bhg=i_bhg, i_n=i_n + 1, N=N, keys=keys,
                there=stop < end, K=K, DECAY=DECAY, SWAP=False,
            )  # fmt: skip
        if LEFT:
            b_exit = tl.load(p_d_exit + segment + at, mask=mask, other=0.0)
            b_grad += b_exit * decay_over(
                slope=slope, tokens=end - stop, p_sums=p_after, i_bhg=i_bhg, i_n=i_n, N=N, keys=keys, there=None,
                K=K, DECAY=DECAY, SWAP=False,
            )  # fmt: skip
        b_anchor += tl.sum(b_state * b_grad, 1)

    n = stop - start
    chunks = tl.cdiv(n, C)
    if DECAY == CHANNEL:
        at_row = ((i_b * T + start).to(tl.int64) * H + i_h) * K + rows[:, None] * (H * K) + cols[None, :]
        for i in range(0, chunks):
            t = (chunks - 1 - i) * C
            mask = (rows < n - t)[:, None] & (cols < K)[None, :]
            b_rows = tl.load(p_rows + t * (H * K) + at_row, mask=mask, other=0.0)
            b_dg = tl.cumsum(b_rows, 0, reverse=True) + b_anchor[None, :]
            tl.store(p_dg + t * (H * K) + at_row, b_dg, mask=mask)
            b_anchor += tl.sum(b_rows, 0)
    else:
        b_later = tl.sum(b_anchor, 0)
        p_rows += i_bh.to(tl.int64) * T + start
        p_dg += (i_b * T + start).to(tl.int64) * H + i_h
        for i in range(0, chunks):
            t = (chunks - 1 - i) * C
            mask = rows < n - t
            b_rows = tl.zeros([C], tl.float32)
            for slot in range(0, slots):
                b_rows += tl.load(p_rows + slot * BH.to(tl.int64) * T + t + rows, mask=mask, other=0.0)
            tl.store(p_dg + (t + rows) * H, tl.cumsum(b_rows, 0, reverse=True) + b_later, mask=mask)
            b_later += tl.sum(b_rows, 0)
