"""The Triton kernel of everything that is per token: o, dq, dk and dv are one kernel with its roles exchanged.

A program walks through the chunks of a superchunk with a state S in registers:

    out_i = scale * (sum_j D_ij (x_i . y_j) z_j  +  w_i x_i . S)        S <- A S + sum_j u_j y_j z_j^T

    out   x   y   z    state                sweep     j       w         u
    o     q   k   v    S            [K, V]  forward   <= i    begin_i   end_j
    dq    do  v   k    S^T          [V, K]  forward   <= i    begin_i   end_j
    dv    k   q   do   dS / scale   [K, V]  REV       >= i    end_i     begin_j
    dk    v   do  q    dS^T / scale [V, K]  REV       >= i    end_i     begin_j

D, begin and end are the decays of :mod:`lasp.kernels.triton_linear.gates`. SWAP marks the two rows whose state is
transposed. Where key channels decay on their own, the decays belong to q and k: so they go with x and y, or with SWAP
with z and out. Without CAUSAL only the term with the state is left.

:mod:`lasp.kernels.triton_linear.chunks` has what happens inside one chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lasp.kernels.triton_linear.chunks import (
    channel_chunk,
    channel_state,
    safe_chunk,
    shared_chunk,
    shared_state,
    times,
)
from lasp.kernels.triton_linear.gates import CHANNEL, FIXED, NONE, decay_over, fixed_slope, flagged, sums_at


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
    i_n = first + count - 1 - i_n  # the states that the pass before read last are the likeliest to be in the cache
    if DECAY == CHANNEL:  # noqa: SIM102 (decided when compiled, then on the device)
        if flagged(p_flags, i_bh, i_n, N, H=H, HG=HG) != SAFE:
            return
    walk(
        i_z, i_bh, i_n, p_x=p_x, p_y=p_y, p_z=p_z, p_out=p_out, p_states=p_states, p_entry=p_entry,
        p_other=p_other, p_rows=p_rows, p_g=p_g, p_coarse=p_coarse, p_fine=p_fine, p_entry_decay=p_entry_decay,
        p_pieces=p_pieces, scale=scale, T=T, N=N, BH=BH, H=H, HX=HX, HY=HY, HZ=HZ, HG=HG, DX=DX, DZ=DZ, BX=BX, BZ=BZ,
        C=C, DECAY=DECAY, EXACT=EXACT, SAFE=SAFE, CAUSAL=CAUSAL, ENTERED=ENTERED, ROWS=ROWS, HO=HO,
        SWAP=SWAP, REV=False,
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
    """dv and dk; see :func:`walk`. PK and PV are powers of two that hold K and V.

    Grid [N * B * H * (cdiv(V, BV) + cdiv(K, BK))]: programs that read the same tokens run side by side.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    NZ: tl.constexpr = NV + (K + BK - 1) // BK
    i_z, i_bh, i_n = tl.program_id(0) % NZ, (tl.program_id(0) // NZ) % BH, tl.program_id(0) // (NZ * BH)
    if DECAY == CHANNEL:  # noqa: SIM102 (decided when compiled, then on the device)
        if flagged(p_flags, i_bh, i_n, N, H=H, HG=HG) != SAFE:
            return
    if i_z < NV:
        walk(
            i_z, i_bh, i_n, p_x=p_k, p_y=p_q, p_z=p_do, p_out=p_dv, p_states=p_grads, p_entry=p_d_exit,
            p_other=p_k, p_rows=p_rows, p_g=p_g, p_coarse=p_coarse, p_fine=p_fine, p_entry_decay=p_exit_decay,
            p_pieces=p_pieces, scale=scale, T=T, N=N, BH=BH, H=H, HX=HK, HY=HQ, HZ=H, HG=HG, DX=K, DZ=V, BX=PK, BZ=BV,
            C=C, DECAY=DECAY, EXACT=EXACT, SAFE=SAFE, CAUSAL=CAUSAL, ENTERED=LEFT, ROWS=False, HO=HK,
            SWAP=False, REV=True,
        )  # fmt: skip
    if i_z >= NV:  # no else: the two then share their shared memory
        walk(
            i_z - NV, i_bh, i_n, p_x=p_v, p_y=p_do, p_z=p_q, p_out=p_dk, p_states=p_grads, p_entry=p_d_exit,
            p_other=p_k, p_rows=p_rows, p_g=p_g, p_coarse=p_coarse, p_fine=p_fine, p_entry_decay=p_exit_decay,
            p_pieces=p_pieces, scale=scale, T=T, N=N, BH=BH, H=H, HX=HV, HY=H, HZ=HQ, HG=HG, DX=V, DZ=K, BX=PV, BZ=BK,
            C=C, DECAY=DECAY, EXACT=EXACT, SAFE=SAFE, CAUSAL=CAUSAL, ENTERED=LEFT, ROWS=ROWS, HO=HK,
            SWAP=True, REV=True,
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

    states, entry, entry_decay: see :func:`entry_state`. other, rows (ROWS): see :func:`keep_products`.
    """
    i_b, i_h = i_bh // H, i_bh % H
    i_hg = i_h // (H // HG)
    start, n = tl.load(p_pieces + i_n), tl.load(p_pieces + N + i_n) - tl.load(p_pieces + i_n)
    token = (i_b * T + start).to(tl.int64)
    rows, cols_x, cols_z = tl.arange(0, C), tl.arange(0, BX), i_z * BZ + tl.arange(0, BZ)
    mask_x, mask_z = cols_x < DX, cols_z < DZ
    in_x, in_z = mask_x[None, :], mask_z[None, :]
    p_x, at_x = head_at(p_x, token, i_h, rows, cols_x, H=H, HEADS=HX, D=DX)
    p_y, at_y = head_at(p_y, token, i_h, rows, cols_x, H=H, HEADS=HY, D=DX)
    p_z, at_z = head_at(p_z, token, i_h, rows, cols_z, H=H, HEADS=HZ, D=DZ)
    p_out, at_out = head_at(p_out, token, i_h, rows, cols_z, H=H, HEADS=H, D=DZ)
    if ROWS:
        p_other, at_other = head_at(p_other, token, i_h, rows, cols_z, H=H, HEADS=HO, D=DZ)
        ROW: tl.constexpr = H * DZ if DECAY == CHANNEL else 1
        p_rows += (token * H + i_h) * DZ if DECAY == CHANNEL else (i_z * BH + i_bh).to(tl.int64) * T + start
    KEYS: tl.constexpr = DZ if SWAP else DX
    cols_k = cols_z if SWAP else cols_x
    slope = fixed_slope(p_g, i_hg, DECAY=DECAY)
    if p_fine is not None:
        p_fine = sums_at(p_fine, i_b, i_hg, start, T, HG=HG, K=KEYS, DECAY=DECAY)
    if p_coarse is not None:
        p_coarse = sums_at(p_coarse, i_b, i_hg, start, T, HG=HG, K=KEYS, DECAY=DECAY)

    b_state = entry_state(
        p_states=p_states, p_entry=p_entry, p_entry_decay=p_entry_decay, p_pieces=p_pieces, slope=slope,
        i_bh=i_bh, i_bhg=i_b * HG + i_hg, i_n=i_n, cols_x=cols_x, cols_z=cols_z, cols_k=cols_k, N=N, BH=BH,
        DX=DX, DZ=DZ, BX=BX, BZ=BZ, DECAY=DECAY, CAUSAL=CAUSAL, ENTERED=ENTERED, SWAP=SWAP, REV=REV,
    )  # fmt: skip
    if REV:
        b_state *= 1.0 / scale  # a gradient holds the factor that ``out`` will get

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
            b_out = shared_chunk(
                b_x, b_y, b_z, b_state, slope=slope, p_coarse=p_coarse, p_fine=p_fine, t=t, left=left, rows=rows,
                seen=seen, scale=scale, C=C, DECAY=DECAY, EXACT=EXACT, REV=REV,
            )  # fmt: skip
        elif SAFE:
            b_out, b_y, b_z, b_state = safe_chunk(
                b_x, b_y, b_z, b_state, p_y=p_y + t * (HY * DX) + cols_x, p_z=p_z + t * (HZ * DZ) + cols_z,
                p_fine=p_fine, t=t, left=left, rows=rows, cols_k=cols_k, mask_x=mask_x, mask_z=mask_z, scale=scale,
                STEP_Y=HY * DX, STEP_Z=HZ * DZ, HG=HG, KEYS=KEYS, BX=BX, BZ=BZ, C=C, SWAP=SWAP, REV=REV,
            )  # fmt: skip
        else:
            b_out, b_y, b_z, b_state, into, b_half = channel_chunk(
                b_x, b_y, b_z, b_state, p_fine=p_fine, t=t, left=left, rows=rows, cols_k=cols_k, seen=seen, scale=scale,
                HG=HG, KEYS=KEYS, C=C, SWAP=SWAP, REV=REV,
            )  # fmt: skip

        mask = in_row & in_z
        tl.store(p_out + t * (H * DZ) + at_out, b_out.to(p_out.dtype.element_ty), mask=mask)
        if ROWS:
            b_other = tl.load(p_other + t * (HO * DZ) + at_other, mask=mask, other=0.0)
            keep_products(
                b_out, b_other, p_rows=p_rows + t * ROW, at_out=at_out, rows=rows, left=left, mask=mask,
                DECAY=DECAY, REV=REV,
            )  # fmt: skip
        if CAUSAL:  # last, when the output is out of the registers
            if DECAY != CHANNEL:
                b_state = shared_state(
                    b_y, b_z, b_state, slope=slope, p_coarse=p_coarse, p_fine=p_fine, t=t, left=left, rows=rows,
                    C=C, DECAY=DECAY, EXACT=EXACT, REV=REV,
                )  # fmt: skip
            elif SAFE:
                b_state = tl.dot(tl.trans(b_y), b_z, b_state, input_precision="ieee")
            else:
                b_state = channel_state(b_y, b_z, b_state, into, b_half)


@triton.jit
def head_at(p, token, i_h, rows, cols, H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr):
    """Where head i_h of a tensor [B * T, HEADS, D] begins at ``token``, and offsets [rows, cols] from there."""
    return p + (token * HEADS + i_h // (H // HEADS)) * D, rows[:, None] * (HEADS * D) + cols[None, :]


@triton.jit
def entry_state(
    p_states, p_entry, p_entry_decay, p_pieces, slope, i_bh, i_bhg, i_n, cols_x, cols_z, cols_k, N, BH,
    DX: tl.constexpr, DZ: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, DECAY: tl.constexpr,
    CAUSAL: tl.constexpr, ENTERED: tl.constexpr, SWAP: tl.constexpr, REV: tl.constexpr,
):  # fmt: skip
    """The state [BX, BZ] that enters superchunk i_n: what its segment carries into it, and what enters the segment.

    states fp32 [B * H, N, K, V] (CAUSAL) holds the first. entry fp32 [S, B * H, K, V] (ENTERED) holds the second; it
    decays on its way through the segment, by entry_decay [B, HG, N, 1 or K] unless the decay is fixed.
    """
    if SWAP:
        at = cols_x[:, None] + cols_z[None, :] * DX
    else:
        at = cols_x[:, None] * DZ + cols_z[None, :]
    mask = (cols_x < DX)[:, None] & (cols_z < DZ)[None, :]
    b_state = tl.zeros([BX, BZ], tl.float32)
    if CAUSAL:
        b_state += tl.load(p_states + (i_bh * N + i_n).to(tl.int64) * (DX * DZ) + at, mask=mask, other=0.0)
    if ENTERED:
        i_s = tl.load(p_pieces + 2 * N + i_n)
        b_entry = tl.load(p_entry + (i_s * BH + i_bh).to(tl.int64) * (DX * DZ) + at, mask=mask, other=0.0)
        if DECAY != NONE:
            tokens = 0
            if DECAY == FIXED:
                if REV:
                    tokens = tl.load(p_pieces + 4 * N + i_n) - tl.load(p_pieces + N + i_n)
                else:
                    tokens = tl.load(p_pieces + i_n) - tl.load(p_pieces + 3 * N + i_n)
            KEYS: tl.constexpr = DZ if SWAP else DX
            b_entry *= decay_over(
                slope=slope, tokens=tokens, p_sums=p_entry_decay, i_bhg=i_bhg, i_n=i_n, N=N, keys=cols_k, there=None,
                K=KEYS, DECAY=DECAY, SWAP=SWAP,
            )  # fmt: skip
        b_state += b_entry
    return b_state


@triton.jit
def keep_products(b_out, b_other, p_rows, at_out, rows, left, mask, DECAY: tl.constexpr, REV: tl.constexpr):
    """What the gate's gradient needs of a chunk: out * other in fp32, where other [B, T, HO, DZ] is q or k.

    Sums over channels go into rows [slots, B * H, T]: each block of channels has a slot, and dk (REV) counts with -1.
    For decays of channels dq writes its products into rows [B, T, H, K], and dk then subtracts its own there.
    """
    b_rows = b_out * b_other.to(tl.float32)
    if DECAY == CHANNEL:
        if REV:
            b_rows = tl.load(p_rows + at_out, mask=mask, other=0.0) - b_rows
        tl.store(p_rows + at_out, b_rows, mask=mask)
    else:
        b_sum = tl.sum(b_rows, 1)
        tl.store(p_rows + rows, -b_sum if REV else b_sum, mask=rows < left)
