"""The Triton kernel of everything that is per token: o, dq, dk and dv are one kernel with its roles exchanged.

A program walks through the chunks of a superchunk with a state S in registers:

    out_i = scale * (sum_j D_ij (x_i . y_j) z_j  +  w_i x_i . S)        S <- A S + sum_j u_j y_j z_j^T

    out   x   y   z    state                sweep     j       w         u
    o     q   k   v    S            [K, V]  forward   <= i    begin_i   end_j
    dq    do  v   k    S^T          [V, K]  forward   <= i    begin_i   end_j
    dv    k   q   do   dS / scale   [K, V]  REV       >= i    end_i     begin_j
    dk    v   do  q    dS^T / scale [V, K]  REV       >= i    end_i     begin_j

with D, begin and end as in :mod:`lasp.kernels.triton_linear.gates`; SWAP marks the transposed states. Where key
channels decay on their own, the decays go with q and k: with x and y, or with SWAP with z and out. Both terms of
``out`` carry a factor of their own, so that the two products are not chained, which would cost a change of layout per
chunk. Without CAUSAL only the state's term is left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lasp.kernels.triton_linear.gates import (
    CHANNEL,
    FIXED,
    NONE,
    TOKEN,
    channel_decays,
    fixed_slope,
    row_decays,
    row_spans,
)


@triton.jit(do_not_specialize=["T", "N", "BH", "first", "count"])
def mix(
    p_x, p_y, p_z, p_out, p_states, p_entry, p_other, p_rows,
    p_g, p_coarse, p_fine, p_flags, p_entry_decay, p_pieces, scale, T, N, BH, first, count,
    H: tl.constexpr, HX: tl.constexpr, HY: tl.constexpr, HZ: tl.constexpr, HG: tl.constexpr,
    DX: tl.constexpr, DZ: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, EXACT: tl.constexpr, SAFE: tl.constexpr, CAUSAL: tl.constexpr, ENTERED: tl.constexpr,
    ROWS: tl.constexpr, HO: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """o or (SWAP) dq of ``count`` superchunks from ``first`` on; see :func:`walk`.

    Grid [count * B * H * cdiv(DZ, BZ)].
    """
    NZ: tl.constexpr = (DZ + BZ - 1) // BZ
    i_z, i_bh, i_n = tl.program_id(0) % NZ, (tl.program_id(0) // NZ) % BH, tl.program_id(0) // (NZ * BH)
    i_n = first + count - 1 - i_n  # the states read last by the pass before are the likeliest in the cache
    if DECAY == CHANNEL:  # noqa: SIM102 (decided when compiled, then on the device)
        if (tl.load(p_flags + (i_bh // H * HG + i_bh % H // (H // HG)) * N + i_n) != 0) != SAFE:
            return
    walk(
        i_z, i_bh, i_n, p_x, p_y, p_z, p_out, p_states, p_entry, p_other, p_rows,
        p_g, p_coarse, p_fine, p_entry_decay, p_pieces, scale, T, N, BH,
        H, HX, HY, HZ, HG, DX, DZ, BX, BZ, C, DECAY, EXACT, SAFE, CAUSAL, ENTERED, ROWS, HO, SWAP, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "N", "BH"])
def mix_grads(
    p_q, p_k, p_v, p_do, p_dv, p_dk, p_grads, p_d_exit, p_rows,
    p_g, p_coarse, p_fine, p_flags, p_exit_decay, p_pieces, scale, T, N, BH,
    H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, HG: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, PK: tl.constexpr, PV: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, EXACT: tl.constexpr, SAFE: tl.constexpr, CAUSAL: tl.constexpr,
    LEFT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dv and dk. Grid [N * B * H * (cdiv(V, BV) + cdiv(K, BK))]: programs that read the same tokens run side by side.

    PK, PV: powers of two that hold K and V. See :func:`walk`.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    NZ: tl.constexpr = NV + (K + BK - 1) // BK
    i_z, i_bh, i_n = tl.program_id(0) % NZ, (tl.program_id(0) // NZ) % BH, tl.program_id(0) // (NZ * BH)
    if DECAY == CHANNEL:  # noqa: SIM102 (decided when compiled, then on the device)
        if (tl.load(p_flags + (i_bh // H * HG + i_bh % H // (H // HG)) * N + i_n) != 0) != SAFE:
            return
    if i_z < NV:
        walk(
            i_z, i_bh, i_n, p_k, p_q, p_do, p_dv, p_grads, p_d_exit, p_k, p_rows,
            p_g, p_coarse, p_fine, p_exit_decay, p_pieces, scale, T, N, BH,
            H, HK, HQ, H, HG, K, V, PK, BV, C, DECAY, EXACT, SAFE, CAUSAL, LEFT, False, HK, False, True,
        )  # fmt: skip
    if i_z >= NV:  # no else: the two then share their shared memory
        walk(
            i_z - NV, i_bh, i_n, p_v, p_do, p_q, p_dk, p_grads, p_d_exit, p_k, p_rows,
            p_g, p_coarse, p_fine, p_exit_decay, p_pieces, scale, T, N, BH,
            H, HV, H, HQ, HG, V, K, PV, BK, C, DECAY, EXACT, SAFE, CAUSAL, LEFT, ROWS, HK, True, True,
        )  # fmt: skip


@triton.jit
def walk(
    i_z, i_bh, i_n, p_x, p_y, p_z, p_out, p_states, p_entry, p_other, p_rows,
    p_g, p_coarse, p_fine, p_entry_decay, p_pieces, scale, T, N, BH,
    H: tl.constexpr, HX: tl.constexpr, HY: tl.constexpr, HZ: tl.constexpr, HG: tl.constexpr,
    DX: tl.constexpr, DZ: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, EXACT: tl.constexpr, SAFE: tl.constexpr, CAUSAL: tl.constexpr, ENTERED: tl.constexpr,
    ROWS: tl.constexpr, HO: tl.constexpr, SWAP: tl.constexpr, REV: tl.constexpr,
):  # fmt: skip
    """Block i_z of out [B, T, H, DZ] in superchunk i_n, from x [B, T, HX, DX], y [B, T, HY, DX], z [B, T, HZ, DZ].

    states: carried into each superchunk, fp32 [B * H, N, K, V]; entry [S, B * H, K, V] if ENTERED, to be decayed by
    entry_decay [B, HG, N, a]. ROWS: also the gate's gradient needs out * other, other [B, T, HO, DZ], in fp32: the
    sum over channels in rows [slots, B * H, T], +1 (dq) or -1 (dk) times, in a slot for each block of DZ; for decays of
    channels, rows [B, T, H, K] is written by dq and then has dk's part subtracted.
    """
    i_b, i_h = i_bh // H, i_bh % H
    i_hg = i_h // (H // HG)
    start, n = tl.load(p_pieces + i_n), tl.load(p_pieces + N + i_n) - tl.load(p_pieces + i_n)
    token = (i_b * T + start).to(tl.int64)
    rows, cols_x, cols_z = tl.arange(0, C), tl.arange(0, BX), i_z * BZ + tl.arange(0, BZ)
    mask_x, mask_z = cols_x < DX, cols_z < DZ
    in_x, in_z = mask_x[None, :], mask_z[None, :]
    p_x += (token * HX + i_h // (H // HX)) * DX
    p_y += (token * HY + i_h // (H // HY)) * DX
    p_z += (token * HZ + i_h // (H // HZ)) * DZ
    p_out += (token * H + i_h) * DZ
    at_x = rows[:, None] * (HX * DX) + cols_x[None, :]
    at_y = rows[:, None] * (HY * DX) + cols_x[None, :]
    at_z = rows[:, None] * (HZ * DZ) + cols_z[None, :]
    at_out = rows[:, None] * (H * DZ) + cols_z[None, :]
    if ROWS:
        p_other += (token * HO + i_h // (H // HO)) * DZ
        at_other = rows[:, None] * (HO * DZ) + cols_z[None, :]
        if DECAY == CHANNEL:
            p_rows += (token * H + i_h) * DZ
        else:
            p_rows += (i_z * BH + i_bh).to(tl.int64) * T + start
    slope = fixed_slope(p_g, i_hg, DECAY)
    if DECAY == TOKEN:
        p_fine += (i_b * HG + i_hg).to(tl.int64) * T + start
        if EXACT:
            p_coarse += (i_b * HG + i_hg).to(tl.int64) * T + start
    if DECAY == CHANNEL:
        KEYS: tl.constexpr = DZ if SWAP else DX
        cols_k = cols_z if SWAP else cols_x
        p_fine += (token * HG + i_hg) * KEYS

    if SWAP:
        at_state = cols_x[:, None] + cols_z[None, :] * DX
    else:
        at_state = cols_x[:, None] * DZ + cols_z[None, :]
    in_state = (cols_x < DX)[:, None] & in_z
    b_state = tl.zeros([BX, BZ], tl.float32)
    if CAUSAL:
        b_state += tl.load(p_states + (i_bh * N + i_n).to(tl.int64) * (DX * DZ) + at_state, mask=in_state, other=0.0)
    if ENTERED:
        i_s = tl.load(p_pieces + 2 * N + i_n)
        b_entry = tl.load(p_entry + (i_s * BH + i_bh).to(tl.int64) * (DX * DZ) + at_state, mask=in_state, other=0.0)
        if DECAY == FIXED:
            if REV:
                tokens = tl.load(p_pieces + 4 * N + i_n) - start - n
            else:
                tokens = start - tl.load(p_pieces + 3 * N + i_n)
            b_entry *= tl.exp2(tokens.to(tl.float32) * slope)
        elif DECAY == TOKEN:
            b_entry *= tl.exp2(tl.load(p_entry_decay + (i_b * HG + i_hg) * N + i_n))
        elif DECAY == CHANNEL:
            p_decay = p_entry_decay + ((i_b * HG + i_hg) * N + i_n).to(tl.int64) * KEYS
            b_decay = tl.exp2(tl.load(p_decay + cols_k, mask=cols_k < KEYS, other=0.0))
            b_entry *= b_decay[None, :] if SWAP else b_decay[:, None]
        b_state += b_entry
    if REV:
        b_state *= 1.0 / scale  # a gradient holds the factor that ``out`` will get

    dtype: tl.constexpr = p_x.dtype.element_ty
    seen = (rows[:, None] <= rows[None, :]) if REV else (rows[:, None] >= rows[None, :])
    chunks = tl.cdiv(n, C)
    for i in range(0, chunks):
        t = (chunks - 1 - i if REV else i) * C
        left = n - t
        in_row = (rows < left)[:, None]
        b_x = tl.load(p_x + t * (HX * DX) + at_x, mask=in_row & in_x, other=0.0)
        if CAUSAL:
            b_y = tl.load(p_y + t * (HY * DX) + at_y, mask=in_row & in_x, other=0.0)
            b_z = tl.load(p_z + t * (HZ * DZ) + at_z, mask=in_row & in_z, other=0.0)

        if not CAUSAL:
            b_out = times(b_x, b_state) * scale
        elif DECAY != CHANNEL:
            b_scores = tl.dot(b_x, tl.trans(b_y), input_precision="ieee")
            if DECAY == NONE:
                b_scores = tl.where(seen, b_scores, 0.0)
                b_out = times(b_x, b_state) * scale
            else:
                b_span = row_spans(slope, p_coarse, p_fine, t, left, rows, C, DECAY, EXACT)
                b_scores *= tl.exp2(tl.where(seen, -b_span if REV else b_span, float("-inf")))
                b_begin, b_end, total = row_decays(slope, p_coarse, p_fine, t, left, rows, C, DECAY, EXACT)
                b_weight = tl.exp2(b_end if REV else b_begin) * scale
                b_out = times(b_x, b_state) * b_weight[:, None]
            b_out += times(b_scores, b_z) * scale
        elif SAFE:
            b_begin, b_end, b_total = channel_decays(p_fine, t, left, rows, cols_k, HG, KEYS, C, SAFE)
            b_near = tl.exp2(b_end if REV else b_begin)  # of x or out, towards the state
            b_far = tl.exp2(b_begin if REV else b_end)  # of y or z, into the state
            b_within = within_safe(
                b_x, p_y + t * (HY * DX) + cols_x, p_z + t * (HZ * DZ) + cols_z, p_fine + t * (HG * KEYS) + cols_k,
                left, rows, cols_k, mask_x, mask_z, HY * DX, HZ * DZ, HG * KEYS, KEYS, BX, BZ, C, SWAP, REV,
            )  # fmt: skip
            if SWAP:
                b_out = times(b_x, b_state) * b_near * scale
                b_z = (b_z.to(tl.float32) * b_far).to(dtype)
                b_state *= tl.exp2(b_total)[None, :]
            else:
                b_x = (b_x.to(tl.float32) * b_near).to(dtype)
                b_out = times(b_x, b_state) * scale
                b_y = (b_y.to(tl.float32) * b_far).to(dtype)
                b_state *= tl.exp2(b_total)[:, None]
            b_out += b_within * scale
        else:
            # everything relative to the middle of the chunk's decay; the state crosses each half on its own
            b_begin, b_end, b_total = channel_decays(p_fine, t, left, rows, cols_k, HG, KEYS, C, SAFE)
            b_shift = (b_begin - 0.5 * b_total[None, :]) if REV else (0.5 * b_total[None, :] - b_begin)
            b_half = tl.exp2(0.5 * b_total)[None, :] if SWAP else tl.exp2(0.5 * b_total)[:, None]
            if SWAP:
                b_z, into = narrow(b_z.to(tl.float32) * tl.exp2(b_shift), dtype)
                near, far = scale, scale * into
            else:
                b_x, near = narrow(b_x.to(tl.float32) * tl.exp2(-b_shift), dtype)
                b_y, into = narrow(b_y.to(tl.float32) * tl.exp2(b_shift), dtype)
                near *= scale
                far = near * into
            b_scores = tl.where(seen, tl.dot(b_x, tl.trans(b_y), input_precision="ieee"), 0.0)
            b_state *= b_half
            b_out = times(b_x, b_state) * near
            b_out += times(b_scores, b_z) * far
            if SWAP:
                b_out *= tl.exp2(-b_shift)

        mask = in_row & in_z
        tl.store(p_out + t * (H * DZ) + at_out, b_out.to(p_out.dtype.element_ty), mask=mask)
        if ROWS:
            b_rows = b_out * tl.load(p_other + t * (HO * DZ) + at_other, mask=mask, other=0.0).to(tl.float32)
            if DECAY == CHANNEL:
                if REV:
                    b_rows = tl.load(p_rows + t * (H * DZ) + at_out, mask=mask, other=0.0) - b_rows
                tl.store(p_rows + t * (H * DZ) + at_out, b_rows, mask=mask)
            else:
                b_sum = tl.sum(b_rows, 1)
                tl.store(p_rows + t + rows, -b_sum if REV else b_sum, mask=rows < left)
        if CAUSAL:  # last, when the output is out of the registers; decays are read again to stay out of them till now
            if DECAY != NONE and DECAY != CHANNEL:
                b_begin, b_end, total = row_decays(slope, p_coarse, p_fine, t, left, rows, C, DECAY, EXACT)
                b_z = (b_z.to(tl.float32) * tl.exp2(b_begin if REV else b_end)[:, None]).to(dtype)
                b_state *= tl.exp2(total)
            if DECAY == CHANNEL and not SAFE and dtype == tl.float16:
                b_state += tl.dot(tl.trans(b_y), b_z) * into
            else:
                b_state = tl.dot(tl.trans(b_y), b_z, b_state, input_precision="ieee")
            if DECAY == CHANNEL and not SAFE:
                b_state *= b_half


@triton.jit
def narrow(b, dtype: tl.constexpr):
    """``b`` in ``dtype``, and the factor that was taken out of it: fp16 ends at 65504."""
    factor = 1.0
    if dtype == tl.float16:
        factor = tl.maximum(tl.max(tl.abs(b)) / 16384.0, 1.0)
        b = b / factor
    return b.to(dtype), factor


@triton.jit
def times(b_a, b_b):
    """b_a b_b in fp32, where one is an fp32 sum that the product takes in the other's dtype."""
    if b_b.dtype == tl.float32:
        b_b, factor = narrow(b_b, b_a.dtype)
    else:
        b_a, factor = narrow(b_a, b_b.dtype)
    return tl.dot(b_a, b_b, input_precision="ieee") * factor


@triton.jit
def within_safe(
    b_x, p_y, p_z, p_decay, left, rows, cols_k, mask_x, mask_z,
    step_y: tl.constexpr, step_z: tl.constexpr, step_decay: tl.constexpr, KEYS: tl.constexpr,
    BX: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr, SWAP: tl.constexpr, REV: tl.constexpr,
):  # fmt: skip
    """sum_j D_ij (x_i . y_j) z_j [C, BZ] token by token, with every span summed directly: right at any decay.

    p_decay: decays of single tokens. The columns are taken from the last to the first (REV: from the first to the
    last), so that b_span, the span between each row and the column at hand, grows by one token per step.
    """
    b_x = b_x.to(tl.float32)
    b_within = tl.zeros([C, BZ], tl.float32)
    b_span = tl.zeros([C, BZ if SWAP else BX], tl.float32)
    for i in range(0, C):
        j = i if REV else C - 1 - i
        in_j = j < left
        b_y = tl.load(p_y + j * step_y, mask=mask_x & in_j, other=0.0).to(tl.float32)
        b_z = tl.load(p_z + j * step_z, mask=mask_z & in_j, other=0.0).to(tl.float32)
        b_decay = tl.load(p_decay + j * step_decay, mask=(cols_k < KEYS) & in_j, other=0.0)
        if REV:
            seen = rows <= j
            b_span += tl.where((rows < j)[:, None], b_decay[None, :], 0.0)
        else:
            seen = rows >= j
        b_xy = b_x * b_y[None, :]
        if not SWAP:
            b_xy *= tl.exp2(b_span)
        b_column = tl.where(seen, tl.sum(b_xy, 1), 0.0)
        b_part = b_column[:, None] * b_z[None, :]
        if SWAP:
            b_part *= tl.exp2(b_span)
        b_within += b_part
        if not REV:
            b_span += tl.where(seen[:, None], b_decay[None, :], 0.0)
    return b_within


@triton.jit(do_not_specialize=["T", "N", "BH", "slots"])
def gate_grads(
    p_rows, p_dg, p_states, p_grads, p_entry, p_exits, p_d_exit, p_g, p_before, p_after, p_pieces, T, N, BH, slots,
    H: tl.constexpr, HG: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, ENTERED: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """dg_t = sum_{s >= t} (q_s dq_s - k_s dk_s) + <S, dS> at the superchunk's end (GLA, arXiv 2312.06635, appendix C).

    rows: as :func:`mix` leaves them; dg [B, T, H] or [B, T, H, K] fp32; states and grads: carried into each
    superchunk from before and from behind; entry and exits: states at the segment's ends; d_exit: gradient of exits
    (if LEFT). Grid [N * B * H], times cdiv(K, BK) for decays of channels.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    BLOCKS: tl.constexpr = NK if DECAY == CHANNEL else 1
    i_k, i_bh, i_n = tl.program_id(0) % BLOCKS, (tl.program_id(0) // BLOCKS) % BH, tl.program_id(0) // (BLOCKS * BH)
    i_b, i_h = i_bh // H, i_bh % H
    i_bhg = i_b * HG + i_h // (H // HG)
    start, stop, i_s = tl.load(p_pieces + i_n), tl.load(p_pieces + N + i_n), tl.load(p_pieces + 2 * N + i_n)
    begin, end = tl.load(p_pieces + 3 * N + i_n), tl.load(p_pieces + 4 * N + i_n)
    ends_here = stop == end
    slope = fixed_slope(p_g, i_h // (H // HG), DECAY)
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
            if DECAY == FIXED:
                b_entry *= tl.exp2((stop - begin).to(tl.float32) * slope)
            elif DECAY == TOKEN:
                b_entry *= tl.exp2(tl.load(p_before + i_bhg * N + i_n + 1, mask=stop < end, other=0.0))
            else:
                p_decay = p_before + (i_bhg * N + i_n + 1).to(tl.int64) * K + keys
                b_entry *= tl.exp2(tl.load(p_decay, mask=(keys < K) & (stop < end), other=0.0))[:, None]
            b_state += b_entry
        if LEFT:
            b_exit = tl.load(p_d_exit + segment + at, mask=mask, other=0.0)
            if DECAY == FIXED:
                b_exit *= tl.exp2((end - stop).to(tl.float32) * slope)
            elif DECAY == TOKEN:
                b_exit *= tl.exp2(tl.load(p_after + i_bhg * N + i_n))
            else:
                p_decay = p_after + (i_bhg * N + i_n).to(tl.int64) * K + keys
                b_exit *= tl.exp2(tl.load(p_decay, mask=keys < K, other=0.0))[:, None]
            b_grad += b_exit
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
