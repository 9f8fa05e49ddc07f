"""Device functions for one chunk of :func:`lasp.kernels.triton_linear.output.walk`, which explains x, y, z, out and w.

Each kind of decay has a function that makes the chunk's rows of ``out`` from the chunk's x, y and z and from the state
that enters the chunk:

    shared_chunk    all channels decay alike, or nothing decays: the factors go with scores and rows
    safe_chunk      single channels decay strongly: every span is summed directly, column by column
    channel_chunk   single channels decay little: the factors go with x and y, or with z and out (SWAP)
"""

from __future__ import annotations

import triton
import triton.language as tl

from lasp.kernels.triton_linear.gates import NONE, channel_decays, row_decays, row_spans


@triton.jit
def shared_chunk(
    b_x, b_y, b_z, b_state, slope, p_coarse, p_fine, t, left, rows, seen, scale,
    C: tl.constexpr, DECAY: tl.constexpr, EXACT: tl.constexpr, REV: tl.constexpr,
):  # fmt: skip
    """out [C, BZ]. The two products get a factor each and are then added; chained, they would change layouts."""
    b_scores = tl.dot(b_x, tl.trans(b_y), input_precision="ieee")
    if DECAY == NONE:
        b_scores = tl.where(seen, b_scores, 0.0)
        b_out = times(b_x, b_state) * scale
    else:
        b_span = row_spans(slope, p_coarse, p_fine, t, left, rows, C=C, DECAY=DECAY, EXACT=EXACT)
        b_scores *= tl.exp2(tl.where(seen, -b_span if REV else b_span, float("-inf")))
        b_begin, b_end, _ = row_decays(slope, p_coarse, p_fine, t, left, rows, C=C, DECAY=DECAY, EXACT=EXACT)
        b_weight = tl.exp2(b_end if REV else b_begin) * scale
        b_out = times(b_x, b_state) * b_weight[:, None]
    b_out += times(b_scores, b_z) * scale
    return b_out


@triton.jit
def safe_chunk(
    b_x, b_y, b_z, b_state, p_y, p_z, p_fine, t, left, rows, cols_k, mask_x, mask_z, scale,
    STEP_Y: tl.constexpr, STEP_Z: tl.constexpr, HG: tl.constexpr, KEYS: tl.constexpr,
    BX: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr, SWAP: tl.constexpr, REV: tl.constexpr,
):  # fmt: skip
    """out [C, BZ]; y and z, of which one is weighted for the state; and the state, decayed over the chunk.

    p_y and p_z: the columns of y and z at the chunk's first token, whose next tokens lie STEP_Y and STEP_Z behind.
    """
    b_begin, b_end, b_total = channel_decays(p_fine, t, left, rows, cols_k, HG=HG, K=KEYS, C=C, SAFE=True)
    b_near = tl.exp2(b_end if REV else b_begin)  # of x or out, towards the state
    b_far = tl.exp2(b_begin if REV else b_end)  # of y or z, into the state
    b_within = safe_within(
        b_x, p_y=p_y, p_z=p_z, p_decay=p_fine + t * (HG * KEYS) + cols_k, left=left, rows=rows, cols_k=cols_k,
        mask_x=mask_x, mask_z=mask_z,
        STEP_Y=STEP_Y, STEP_Z=STEP_Z, STEP_DECAY=HG * KEYS, KEYS=KEYS, BX=BX, BZ=BZ, C=C, SWAP=SWAP, REV=REV,
    )  # fmt: skip
    if SWAP:
        b_out = times(b_x, b_state) * b_near * scale
        b_z = (b_z.to(tl.float32) * b_far).to(b_z.dtype)
        b_state *= tl.exp2(b_total)[None, :]
    else:
        b_x = (b_x.to(tl.float32) * b_near).to(b_x.dtype)
        b_out = times(b_x, b_state) * scale
        b_y = (b_y.to(tl.float32) * b_far).to(b_y.dtype)
        b_state *= tl.exp2(b_total)[:, None]
    b_out += b_within * scale
    return b_out, b_y, b_z, b_state


@triton.jit
def safe_within(
    b_x, p_y, p_z, p_decay, left, rows, cols_k, mask_x, mask_z,
    STEP_Y: tl.constexpr, STEP_Z: tl.constexpr, STEP_DECAY: tl.constexpr, KEYS: tl.constexpr,
    BX: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr, SWAP: tl.constexpr, REV: tl.constexpr,
):  # fmt: skip
    """sum_j D_ij (x_i . y_j) z_j [C, BZ], exact at any decay.

    p_decay: decays of single tokens. The loop takes one column j at a time, from the last to the first (REV: from the
    first to the last). So b_span, the span between each row and the column, grows by one token per step.
    """
    b_x = b_x.to(tl.float32)
    b_within = tl.zeros([C, BZ], tl.float32)
    b_span = tl.zeros([C, BZ if SWAP else BX], tl.float32)
    for i in range(0, C):
        j = i if REV else C - 1 - i
        in_j = j < left
        b_y = tl.load(p_y + j * STEP_Y, mask=mask_x & in_j, other=0.0).to(tl.float32)
        b_z = tl.load(p_z + j * STEP_Z, mask=mask_z & in_j, other=0.0).to(tl.float32)
        b_decay = tl.load(p_decay + j * STEP_DECAY, mask=(cols_k < KEYS) & in_j, other=0.0)
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


@triton.jit
def channel_chunk(
    b_x, b_y, b_z, b_state, p_fine, t, left, rows, cols_k, seen, scale,
    HG: tl.constexpr, KEYS: tl.constexpr, C: tl.constexpr, SWAP: tl.constexpr, REV: tl.constexpr,
):  # fmt: skip
    """out [C, BZ], then what :func:`channel_state` takes: y and z, the state halfway, two factors.

    Every factor is relative to the middle of the chunk's decay, so the state decays by one half before it is read and
    by the other half afterwards. ``into`` was taken out of y (SWAP: z), see :func:`narrow`; ``b_half`` is the decay of
    a half.
    """
    b_begin, _, b_total = channel_decays(p_fine, t, left, rows, cols_k, HG=HG, K=KEYS, C=C, SAFE=False)
    b_shift = (b_begin - 0.5 * b_total[None, :]) if REV else (0.5 * b_total[None, :] - b_begin)
    b_half = tl.exp2(0.5 * b_total)[None, :] if SWAP else tl.exp2(0.5 * b_total)[:, None]
    if SWAP:
        b_z, into = narrow(b_z.to(tl.float32) * tl.exp2(b_shift), b_x.dtype)
        near, far = scale, scale * into
    else:
        b_x, near = narrow(b_x.to(tl.float32) * tl.exp2(-b_shift), b_x.dtype)
        b_y, into = narrow(b_y.to(tl.float32) * tl.exp2(b_shift), b_x.dtype)
        near *= scale
        far = near * into
    b_scores = tl.where(seen, tl.dot(b_x, tl.trans(b_y), input_precision="ieee"), 0.0)
    b_state *= b_half
    b_out = times(b_x, b_state) * near
    b_out += times(b_scores, b_z) * far
    if SWAP:
        b_out *= tl.exp2(-b_shift)
    return b_out, b_y, b_z, b_state, into, b_half


@triton.jit
def shared_state(
    b_y, b_z, b_state, slope, p_coarse, p_fine, t, left, rows,
    C: tl.constexpr, DECAY: tl.constexpr, EXACT: tl.constexpr, REV: tl.constexpr,
):  # fmt: skip
    """The state behind a chunk whose channels decay alike. It reads the decays again, so as not to hold registers."""
    if DECAY != NONE:
        b_begin, b_end, total = row_decays(slope, p_coarse, p_fine, t, left, rows, C=C, DECAY=DECAY, EXACT=EXACT)
        b_z = (b_z.to(tl.float32) * tl.exp2(b_begin if REV else b_end)[:, None]).to(b_z.dtype)
        b_state *= tl.exp2(total)
    return tl.dot(tl.trans(b_y), b_z, b_state, input_precision="ieee")


@triton.jit
def channel_state(b_y, b_z, b_state, into, b_half):
    """The state behind a chunk, from what :func:`channel_chunk` returns."""
    if b_y.dtype == tl.float16:
        b_state += tl.dot(tl.trans(b_y), b_z) * into
    else:
        b_state = tl.dot(tl.trans(b_y), b_z, b_state, input_precision="ieee")
    return b_state * b_half


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
    """b_a b_b in fp32; the one that is an fp32 sum enters the product in the other's dtype."""
    if b_b.dtype == tl.float32:
        b_b, factor = narrow(b_b, b_a.dtype)
    else:
        b_a, factor = narrow(b_a, b_b.dtype)
    return tl.dot(b_a, b_b, input_precision="ieee") * factor
