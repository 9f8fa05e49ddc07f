"""Softmax attention of one rank's query segments on the keys that each can see, forward and backward, in O(T) memory.

A *piece* ``(q_start, q_stop, k_start, k_stop)`` lets queries [q_start, q_stop) read keys [k_start, k_stop). A causal
piece is aligned at its end: the last query reads the last key. So a piece is a segment of queries, with the segment's
own keys behind all earlier keys of its document.

``lse_i`` is the log of the sum of exponentials of row i. With it, attention on two parts of a row's keys merges:

    lse = log(exp(lse_1) + exp(lse_2)),     o = o_1 exp(lse_1 - lse) + o_2 exp(lse_2 - lse)

(FlashAttention, arXiv 2205.14135, section 3.1; Ring Attention, arXiv 2310.01889, section 3). The gradient is a sum of
one share per part. The backward of a part computes its share from the *merged* o and lse, because it needs only
P_ij = exp(s_ij - lse_i) and D_i = sum(do_i * o_i) with lse and o of the whole row:

    dV = P^T dO,  dS = P * (dO V^T - D),  dQ = dS K,  dK = dS^T Q.

There are three implementations:

    flash_cpu    PyTorch's CPU op, on a prefix without a causal mask and on a causal square, merged as above
    flash_cuda   PyTorch's FlashAttention-2 op, over many pieces in one call; 16-bit dtypes
    blocks       plain PyTorch with an online softmax: any device and dtype, windows, value dims other than the key's
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lasp.kernels.state import in_ieee, state_dtype

Piece = tuple[int, int, int, int]
IMPLS = ("auto", "blocks", "flash_cpu", "flash_cuda")


@in_ieee
def softmax_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Sequence[Piece],
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    impl: str = "auto",
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of ``q`` on ``k`` and ``v``, piece by piece.

    Args:
        q: [B, Tq, H, D].
        k, v: [B, Tk, Hkv, D] and [B, Tk, Hkv, Dv]; query head h reads kv head ``h // (H // Hkv)``.
        pieces: ``(q_start, q_stop, k_start, k_stop)``; together they cover each query once.
        causal: hide the n newest keys of a piece from the query that n queries of the piece follow.
        window: how many keys a query sees at most: the newest of the visible ones (needs ``causal``).
        scale: factor of the scores; default ``D ** -0.5``.
        impl: ``auto``, or one of ``blocks``, ``flash_cpu``, ``flash_cuda``.
        out_dtype: of ``o``; default q's.

    Returns:
        ``o`` [B, Tq, H, Dv] in ``out_dtype`` and ``lse`` [B, H, Tq] in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: ``impl`` is unknown or cannot serve these arguments.
    """
    impl = _choose(impl, q, k, v, window)
    q, k, v = _dense_rows(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o = q.new_empty(*q.shape[:3], v.shape[-1], dtype=out_dtype)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=state_dtype(q.dtype))
    forward = {"blocks": _blocks_forward, "flash_cpu": _cpu_forward, "flash_cuda": _cuda_forward}[impl]
    forward(q, k, v, o, lse, pieces, causal, window, scale)
    return o, lse


@in_ieee
def softmax_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    pieces: Sequence[Piece],
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    impl: str = "auto",
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for the arguments of :func:`softmax_forward`, from its ``o``, its ``lse`` and ``do`` [B, Tq, H, Dv].

    ``o`` and ``lse`` may also come from more keys than ``k`` holds. The result is then the share of the keys in ``k``.

    Returns:
        ``dq`` in ``out_dtype`` (default q's); ``dk`` and ``dv`` in fp32 (fp64 for fp64 inputs), zero for keys that no
        piece reads.
    """
    impl = _choose(impl, q, k, v, window)
    q, k, v = _dense_rows(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dq = q.new_empty(q.shape, dtype=out_dtype)
    dk, dv = (x.new_zeros(x.shape, dtype=state_dtype(x.dtype)) for x in (k, v))
    backward = {"blocks": _blocks_backward, "flash_cpu": _cpu_backward, "flash_cuda": _cuda_backward}[impl]
    backward(do.contiguous(), q, k, v, o, lse, dq, dk, dv, pieces, causal, window, scale)
    return dq, dk, dv


def _dense_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with a dense last dim, which the flash ops need and do not check."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _choose(impl: str, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> str:
    """The implementation to use; an explicit ``impl`` that cannot serve these arguments is refused."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}.")
    serves = {"blocks": True, "flash_cpu": _cpu_serves(q, v, window), "flash_cuda": _cuda_serves(q, v)}
    if impl == "auto":
        return next(name for name in ("flash_cuda", "flash_cpu", "blocks") if serves[name])
    if not serves[impl]:
        raise ValueError(
            f"impl={impl!r} cannot serve q {tuple(q.shape)} {q.dtype} on {q.device} with v's head dim {v.shape[-1]} "
            f"and window={window}: flash_cpu needs the CPU, no window and equal head dims; flash_cuda a GPU of compute "
            "capability 8.0, 16-bit dtypes and equal head dims that are multiples of 8 up to 256. Use 'auto'."
        )
    return impl


# ---- flash_cpu: [prefix, not causal] + [square, causal], merged by lse


def _cpu_serves(q: Tensor, v: Tensor, window: int | None) -> bool:
    has_op = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    return has_op and q.device.type == "cpu" and window is None and q.shape[-1] == v.shape[-1]


def _cpu_parts(piece: Piece, causal: bool) -> list[tuple[int, int, bool]]:
    """``(k_start, k_stop, is_causal)`` of each call; the op aligns causal masks at the start, so only squares are."""
    q_start, q_stop, k_start, k_stop = piece
    if not causal:
        return [(k_start, k_stop, False)]
    square = k_stop - (q_stop - q_start)
    assert square >= k_start, f"a causal piece needs as many keys as queries: {piece}"
    return [(k_start, square, False)] * (square > k_start) + [(square, k_stop, True)]


def _share(x: Tensor, start: int, stop: int, kv_heads: int, g: int) -> Tensor:
    """Tokens [start, stop) of x [B, T, H, D], of the g-th query head of each kv head: a view [B, Hkv, n, D]."""
    return x[:, start:stop].unflatten(2, (kv_heads, -1))[:, :, :, g].transpose(1, 2)


def _cpu_forward(q, k, v, o, lse, pieces, causal, window, scale):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    kv_heads = k.shape[2]
    for piece in pieces:
        for g in range(q.shape[2] // kv_heads):
            q_g = _share(q, *piece[:2], kv_heads, g)
            merged = None
            for start, stop, is_causal in _cpu_parts(piece, causal):
                k_part, v_part = (x[:, start:stop].transpose(1, 2) for x in (k, v))
                o_part, lse_part = flash(q_g, k_part, v_part, 0.0, is_causal, scale=scale)
                part = o_part.to(lse.dtype), lse_part
                merged = part if merged is None else merge(*merged, *part)
            _share(o, *piece[:2], kv_heads, g).copy_(merged[0])
            lse[:, g :: q.shape[2] // kv_heads, piece[0] : piece[1]] = merged[1]


def merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention on two sets of keys at once, from attention on each: o [B, H, T, Dv] and lse [B, H, T]."""
    lse = torch.logaddexp(lse1, lse2)
    return o1 * (lse1 - lse).exp().unsqueeze(-1) + o2 * (lse2 - lse).exp().unsqueeze(-1), lse


def _cpu_backward(do, q, k, v, o, lse, dq, dk, dv, pieces, causal, window, scale):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    kv_heads = k.shape[2]
    for piece in pieces:
        for g in range(q.shape[2] // kv_heads):
            do_g, q_g, o_g, dq_g = (_share(x, *piece[:2], kv_heads, g) for x in (do, q, o, dq))
            lse_g = lse[:, g :: q.shape[2] // kv_heads, piece[0] : piece[1]]
            lse_g = lse_g.transpose(1, 2).contiguous().transpose(1, 2)  # with the strides that the op makes itself
            total = 0
            for start, stop, is_causal in _cpu_parts(piece, causal):
                k_part, v_part = (x[:, start:stop].transpose(1, 2) for x in (k, v))
                dq_part, dk_part, dv_part = flash(do_g, q_g, k_part, v_part, o_g, lse_g, 0.0, is_causal, scale=scale)
                total = total + dq_part.to(lse.dtype)
                dk[:, start:stop] += dk_part.transpose(1, 2)
                dv[:, start:stop] += dv_part.transpose(1, 2)
            dq_g.copy_(total)


# ---- flash_cuda: neighbouring pieces as one packed batch; the op aligns causal masks and windows at the end


def _cuda_serves(q: Tensor, v: Tensor) -> bool:
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    fits = q.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    available = getattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    return fits and available() and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _cuda_batches(pieces: Sequence[Piece], batch: int) -> Iterator[list[Piece]]:
    """Runs of pieces to pack: the queries of a run adjoin, and so do its keys. With B > 1 a run is one piece."""
    run: list[Piece] = []
    for piece in pieces:
        if run and (batch > 1 or run[-1][1] != piece[0] or run[-1][3] != piece[2]):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _cuda_borders(lengths: list[int], batch: int, device: torch.device) -> Tensor:
    """Borders of the packed sequences, int32, made without waiting for the device."""
    if len(lengths) == 1:
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * lengths[0]
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    borders = borders.pin_memory() if device.type == "cuda" else borders
    return borders.to(device, non_blocking=True)


def _cuda_setup(run: list[Piece], batch: int, device: torch.device) -> tuple[slice, slice, tuple]:
    """Range of queries, range of keys, and what the op wants to know: borders of both, and the longest of each."""
    queries, keys = [b - a for a, b, _, _ in run], [b - a for _, _, a, b in run]
    borders = _cuda_borders(queries, batch, device), _cuda_borders(keys, batch, device)
    packing = (*borders, max(queries), max(keys))
    return slice(run[0][0], run[-1][1]), slice(run[0][2], run[-1][3]), packing


def _cuda_window(window: int | None) -> dict:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _cuda_forward(q, k, v, o, lse, pieces, causal, window, scale):
    for run in _cuda_batches(pieces, q.shape[0]):
        queries, keys, packing = _cuda_setup(run, q.shape[0], q.device)
        packed = (q[:, queries].flatten(0, 1), k[:, keys].flatten(0, 1), v[:, keys].flatten(0, 1))
        o_run, lse_run, *_ = torch.ops.aten._flash_attention_forward(
            *packed, *packing, 0.0, causal, False, scale=scale, **_cuda_window(window)
        )
        assert lse_run.shape == (q.shape[2], packed[0].shape[0]), f"lse of shape {tuple(lse_run.shape)}"
        o[:, queries] = o_run.unflatten(0, (q.shape[0], -1))
        lse[:, :, queries] = lse_run.unflatten(1, (q.shape[0], -1)).transpose(0, 1)  # [H, B * n] -> [B, H, n]


def _cuda_backward(do, q, k, v, o, lse, dq, dk, dv, pieces, causal, window, scale):
    batch = q.shape[0]
    unused = (torch.zeros(n, dtype=torch.uint64, device=q.device) for n in ((2,), ()))  # random state of the dropout
    no_dropout = tuple(unused)
    for run in _cuda_batches(pieces, batch):
        queries, keys, packing = _cuda_setup(run, batch, q.device)
        do_run, q_run, o_run = (x[:, queries].flatten(0, 1) for x in (do, q, o))
        k_run, v_run = (x[:, keys].flatten(0, 1) for x in (k, v))
        lse_run = lse[:, :, queries].transpose(0, 1).flatten(1).contiguous()  # [H, B * n]
        gradients = torch.ops.aten._flash_attention_backward(
            *(do_run, q_run, k_run, v_run, o_run, lse_run),
            *(*packing, 0.0, causal, *no_dropout),
            scale=scale,
            **_cuda_window(window),
        )
        dq[:, queries] = gradients[0].unflatten(0, (batch, -1))
        dk[:, keys] += gradients[1].unflatten(0, (batch, -1))
        dv[:, keys] += gradients[2].unflatten(0, (batch, -1))


# ---- blocks: online softmax over key blocks


def _block_size(q: Tensor, window: int | None) -> int:
    """Rows and columns of a block of scores: at most 512, with at most 2**24 scores over B and H.

    With a window, at most half the window (but up to 128): a block reads ``window + size`` keys, of which each query
    sees ``window``.
    """
    widest = 512 if window is None else min(512, max(128, window // 2))
    return max(16, min(widest, math.isqrt(2**24 // max(1, q.shape[0] * q.shape[2]))))


def _block_pairs(
    piece: Piece, size: int, causal: bool, window: int | None, device: torch.device
) -> Iterator[tuple[slice, list[tuple[slice, Tensor | None]]]]:
    """Blocks of queries, each with the blocks of keys that it sees and their masks; None where all is visible."""
    q_start, q_stop, k_start, k_stop = piece
    shift = k_stop - q_stop  # query i belongs to the token of key i + shift
    for i in range(q_start, q_stop, size):
        i_stop = min(i + size, q_stop)
        first = k_start if window is None else max(k_start, i + shift - window + 1)
        last = i_stop + shift if causal else k_stop
        keys = []
        for j in range(first, last, size):
            j_stop = min(j + size, last)
            beyond = causal and j_stop - 1 > i + shift  # the first query does not see the last key yet
            too_old = window is not None and j <= i_stop - 1 + shift - window  # the last no longer sees the first key
            mask = None
            if beyond or too_old:
                behind = torch.arange(i + shift, i_stop + shift, device=device)[:, None]
                behind = behind - torch.arange(j, j_stop, device=device)  # age of the key, [n, m]
                mask = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            keys.append((slice(j, j_stop), mask))
        yield slice(i, i_stop), keys


def _rows(x: Tensor, rows: slice, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Tokens ``rows`` of x [B, T, H, D], with its G query heads beside each kv head: [B, Hkv, G, n, D]."""
    return x[:, rows].to(dtype).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _columns(x: Tensor, columns: slice, dtype: torch.dtype) -> Tensor:
    """Tokens ``columns`` of x [B, T, Hkv, D]: [B, Hkv, m, D]."""
    return x[:, columns].to(dtype).transpose(1, 2)


def _scores(q_block: Tensor, k_block: Tensor, mask: Tensor | None) -> Tensor:
    """[B, Hkv, G, n, D] and [B, Hkv, m, D] -> [B, Hkv, G, n, m], -inf where masked."""
    scores = (q_block.flatten(2, 3) @ k_block.transpose(-1, -2)).unflatten(2, q_block.shape[2:4])
    return scores if mask is None else scores.masked_fill_(~mask, float("-inf"))


def _blocks_forward(q, k, v, o, lse, pieces, causal, window, scale):
    kv_heads, dtype, size = k.shape[2], lse.dtype, _block_size(q, window)
    groups = q.shape[2] // kv_heads
    for piece in pieces:
        for rows, keys in _block_pairs(piece, size, causal, window, q.device):
            q_block = _rows(q, rows, kv_heads, dtype) * scale
            top = q_block.new_full(q_block.shape[:-1], float("-inf"))  # running maximum [B, Hkv, G, n]
            total = torch.zeros_like(top)
            out = q_block.new_zeros(*q_block.shape[:-1], v.shape[-1])
            for columns, mask in keys:
                scores = _scores(q_block, _columns(k, columns, dtype), mask)
                new_top = torch.maximum(top, scores.amax(-1))
                finite = new_top.masked_fill(new_top == float("-inf"), 0.0)  # 0 in rows that saw no key yet
                p = scores.sub_(finite.unsqueeze(-1)).exp_()
                keep = (top - finite).exp()
                total = total * keep + p.sum(-1)
                update = (p.flatten(2, 3) @ _columns(v, columns, dtype)).unflatten(2, (groups, -1))
                out = out * keep.unsqueeze(-1) + update
                top = new_top
            out = (out / total.unsqueeze(-1)).permute(0, 3, 1, 2, 4)  # [B, n, Hkv, G, Dv]
            o[:, rows] = out.flatten(2, 3).to(o.dtype)
            lse[:, :, rows] = (top + total.log()).flatten(1, 2)


def _blocks_backward(do, q, k, v, o, lse, dq, dk, dv, pieces, causal, window, scale):
    kv_heads, dtype, size = k.shape[2], lse.dtype, _block_size(q, window)
    for piece in pieces:
        for rows, keys in _block_pairs(piece, size, causal, window, q.device):
            q_block = _rows(q, rows, kv_heads, dtype) * scale
            do_block, o_block = _rows(do, rows, kv_heads, dtype), _rows(o, rows, kv_heads, dtype)
            delta = (do_block * o_block).sum(-1, keepdim=True)
            lse_block = lse[:, :, rows].unflatten(1, (kv_heads, -1)).unsqueeze(-1)
            flat_q, flat_do = q_block.flatten(2, 3), do_block.flatten(2, 3)  # [B, Hkv, G * n, D]
            dq_block = torch.zeros_like(flat_q)
            for columns, mask in keys:
                k_block, v_block = _columns(k, columns, dtype), _columns(v, columns, dtype)
                p = _scores(q_block, k_block, mask).sub_(lse_block).exp_()
                dp = (flat_do @ v_block.transpose(-1, -2)).unflatten(2, q_block.shape[2:4])
                ds = dp.sub_(delta).mul_(p).flatten(2, 3)
                dq_block += ds @ k_block
                dk[:, columns] += (ds.transpose(-1, -2) @ flat_q).transpose(1, 2)
                dv[:, columns] += (p.flatten(2, 3).transpose(-1, -2) @ flat_do).transpose(1, 2)
            dq_block = dq_block.mul_(scale).unflatten(2, q_block.shape[2:4]).permute(0, 3, 1, 2, 4)
            dq[:, rows] = dq_block.flatten(2, 3).to(dq.dtype)
