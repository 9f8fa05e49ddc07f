"""Linear attention over a sequence that is cut across a cp_group: LASP-2 (arXiv 2502.07563).

One forward: the operator's state maps -> exchange starts -> local work -> entry states -> outputs. One backward, its
mirror: entry-state gradients -> exchange -> local work -> exit-state gradients -> input gradients. Each direction has
one exchange. What an operator is stands in :mod:`lasp.kernels.operator`, one of them in
:mod:`lasp.kernels.torch_linear.operator`; the exchange is :mod:`lasp.exchange`, the algebra :mod:`lasp.kernels.state`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp.checks import check_not_empty, check_scale, check_tensors
from lasp.context.chains import ChainPlan
from lasp.cp_context import CPContext
from lasp.exchange import new_exchange
from lasp.kernels.operator import Operator, num_heads
from lasp.kernels.reference import recurrence
from lasp.kernels.state import StateMap, in_ieee, state_dtype
from lasp.operators import IMPLS, check_triton, choose_impl, operator_of


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    cp: CPContext | None = None,
    causal: bool = True,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """``S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T``, ``o_t = scale * S_t^T q_t``, over the whole cut sequence.

    Args:
        q, k: [B, T, Hq, K] and [B, T, Hk, K], T the tokens of this rank. H is the largest head count among the
            arguments; each head count divides H, and head h reads head ``h // (H // Hx)``.
        v: [B, T, Hv, V], the same dtype as q and k.
        g: natural log-decay, <= 0: None, [Hg] (fixed), [B, T, Hg] (per token) or [B, T, Hg, K] (per channel).
        beta: delta-rule step; refused until the dense operators exist.
        cp: layout and group; None is one device with one document per row.
        causal: False lets every token read its whole document (no g, no states).
        scale: default ``K ** -0.5``.
        initial_state: [B, H, K, V], or [N, H, K, V] for N packed documents; equal on all ranks. Its gradient is this
            rank's share: the sum over the cp_group is the gradient.
        output_final_state: also return the state after each document, equal on all ranks. An upstream gradient on it
            is this rank's share likewise.
        impl: ``torch`` (chunked), ``triton`` (GPU kernels; bf16, fp16, fp32, head dims up to 256), ``reference`` (token
            by token, one device), ``auto`` (triton where it is installed and serves, else torch; logs once which).

    Returns:
        ``o`` [B, T, H, V] in v's dtype, and the final states in fp32 (fp64 for fp64 inputs) or None.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; ``g > 0`` (on CUDA: an asynchronous assert).
    """
    _check_tensors(q, k, v, g, initial_state)
    cp = CPContext.of(cp, q.shape[1])
    impl = choose_impl(q, v) if impl == "auto" else impl
    _check(q, k, v, g, beta, cp, causal, scale, initial_state, output_final_state, impl)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if impl == "reference":
        wide = [None if x is None else x.to(state_dtype(q.dtype)) for x in (q, k, v, g, initial_state)]
        borders = cp.layout.cu_seqlens_global
        o, final = recurrence(*wide[:4], cu_seqlens=borders, causal=causal, scale=scale, initial_state=wide[4])
        return o.to(v.dtype), final if output_final_state else None
    return run_stages(operator_of(impl), q, k, v, g, beta, initial_state, cp, causal, scale, output_final_state)


def run_stages(
    operator: Operator,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cp: CPContext,
    causal: bool,
    scale: float,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """:func:`linear_attention` by this operator, with arguments that have been checked."""
    return _LinearAttention.apply(q, k, v, g, beta, initial_state, cp, causal, scale, output_final_state, operator)


class _LinearAttention(torch.autograd.Function):
    """The stages of the operator with the exchange between them."""

    @staticmethod
    @in_ieee
    def forward(ctx, q, k, v, g, beta, initial_state, cp, causal, scale, output_final_state, operator):
        plan, heads = cp.chain_plan(causal, output_final_state), num_heads(q, k, v, g, beta)
        inputs = k, v, g, beta, cp.segment_table(q.device), heads, causal, scale
        op = operator.Forward(*inputs)
        initial = None if initial_state is None else _by_document(initial_state, cp, op.dtype)  # [N, B, H, K, V]

        replaying = cp.tape is not None and cp.tape.replaying  # activations made again: the states are at hand
        alone = cp.cp_size == 1 or replaying  # no message to overlap: fewer passes
        maps = op.state_maps(_by_segment(initial, plan), q=q if alone else None)
        if replaying:
            exchange, entry, finals = cp.tape.read()
        else:
            fixed = _fixed_decay(g, heads, maps)
            exchange = new_exchange(cp, plan, maps, fixed)
            exchange.start(maps, fixed)
        entered = _marked(plan.before, (), causal)
        if not alone:
            op.local(q, entered)
        if not replaying:
            entry, finals = exchange.wait(initial)
            if cp.tape is not None:
                cp.tape.record(exchange, entry, finals)
        if not causal:
            entry = _document_totals(entry, maps.state, plan.before, cp)
        o, exits = op.finish(entry, entered)

        ctx.exchange, ctx.options, ctx.kept_gates = exchange, (heads, causal, scale), op.kept_gates
        ctx.operator, ctx.layout = operator, cp.layout
        ctx.save_for_backward(q, k, v, g, beta, exits, maps.log_decay, maps.matrix, entry, *op.saved)
        ctx.initial_dtype = None if initial is None else initial_state.dtype
        return o, None if finals is None else _public_state(finals, cp)

    @staticmethod
    @once_differentiable
    @in_ieee
    def backward(ctx, do, d_final):
        q, k, v, g, beta, state, log_decay, matrix, entry, *saved = ctx.saved_tensors
        exits, (heads, causal, scale) = StateMap(state, log_decay, matrix), ctx.options
        exchange, cp, plan = ctx.exchange, ctx.exchange.cp, ctx.exchange.plan
        if cp.layout is not ctx.layout:
            raise ValueError(
                "the layout of cp was replaced between forward and backward: replace_layout must follow the backward."
            )
        d_final = None if d_final is None else _by_document(d_final, cp, exits.state.dtype)
        known = {"q": q, "do": do, "saved": saved, "kept_gates": ctx.kept_gates, "entry": entry, "exits": exits}
        known |= {"needs_dg": any(ctx.needs_input_grad[3:5]), "needs_d_entry": ctx.needs_input_grad[5]}
        op = ctx.operator.Backward(k, v, g, beta, cp.segment_table(q.device), heads, causal, scale, **known)

        grads = op.state_maps(local=cp.cp_size == 1)
        exchange.start_backward(grads, d_final)
        if cp.cp_size > 1:
            op.local()
        d_exit = exchange.wait_backward()
        if not causal:
            d_exit = _document_totals(d_exit, grads, plan.after, cp)
        reached = _marked(plan.after, plan.ends if d_final is not None else (), causal)
        *d_inputs, d_entry = op.finish(d_exit, reached)

        d_initial = None
        if d_entry is not None:
            d_initial = _initial_grad(d_entry, plan, cp, d_final).to(ctx.initial_dtype)
        return *d_inputs, d_initial, None, None, None, None, None


def _fixed_decay(g: Tensor | None, heads: int, maps: StateMap) -> Tensor | None:
    """The log-decay [H] that is equal for all tokens and makes up the whole transition; None where there is none."""
    if g is None or g.dim() > 1 or maps.matrix is not None:
        return None
    return g.repeat_interleave(heads // g.shape[0])


def _marked(slots: tuple[tuple, ...], edges: tuple[bool, ...], causal: bool) -> list[bool] | None:
    """Which own segments something arrives at: from other segments, or from outside at the document's edge."""
    if not causal:
        return None  # every segment reads its whole document
    return [bool(s) or edge for s, edge in zip(slots, edges or (False,) * len(slots), strict=True)]


def _document_totals(arrived: Tensor | None, own: Tensor, slots: tuple[tuple, ...], cp: CPContext) -> Tensor:
    """Per own segment, the total of its document: what arrived, or the segment's own part where it is the whole."""
    if arrived is None:
        return own
    shared = cp.on_device(tuple(bool(s) for s in slots), torch.bool, own.device)
    return torch.where(shared.view(-1, 1, 1, 1, 1), arrived, own)


def _by_segment(initial: Tensor | None, plan: ChainPlan) -> Tensor | None:
    """The initial state [N, B, H, K, V] of the document that a segment begins, else zero: [segments, B, H, K, V]."""
    if initial is None or not any(plan.begins):
        return None
    states = [initial[n] for n in plan.documents]
    return torch.stack([s if begins else torch.zeros_like(s) for s, begins in zip(states, plan.begins, strict=True)])


def _initial_grad(d_entry: Tensor, plan: ChainPlan, cp: CPContext, d_final: Tensor | None) -> Tensor:
    """This rank's share of the initial states' gradient: of the documents that begin here, and of empty ones."""
    out = d_entry.new_zeros(cp.layout.num_documents, *d_entry.shape[1:])
    for i, begins in enumerate(plan.begins):
        if begins:
            out[plan.documents[i]] = d_entry[i]
    if d_final is not None:
        for n, chain in enumerate(cp.layout.chains):
            if not chain:
                out[n] = d_final[n]
    return _public_state(out, cp)


def _by_document(state: Tensor, cp: CPContext, dtype: torch.dtype) -> Tensor:
    """Public states [B, H, K, V] or [N, H, K, V] as [N, B, H, K, V]."""
    return state.to(dtype).unsqueeze(1 if cp.layout.num_documents > 1 else 0)


def _public_state(state: Tensor, cp: CPContext) -> Tensor:
    """[N, B, H, K, V] as the public [B, H, K, V] or [N, H, K, V].

    Detached, since autograd refuses to let a caller change in place what a function returns as a view. No copy.
    """
    return state.squeeze(1 if cp.layout.num_documents > 1 else 0).detach()


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None) -> None:
    """Refuse what is no tensor of the right kind, or is empty."""
    check_tensors(optional=("g", "initial_state"), q=q, k=k, v=v, g=g, initial_state=initial_state)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [B, T, H, D], got shape {tuple(x.shape)}. Add or merge dims.")
    check_not_empty(q=q, k=k, v=v, **({} if g is None else {"g": g}))


def _check(q, k, v, g, beta, cp, causal, scale, initial_state, output_final_state, impl) -> None:
    """Refuse what cannot be computed, before anything is sent."""
    check_scale(scale, "K ** -0.5")
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}.")
    if beta is not None:
        raise ValueError("beta (the delta rule) has no operator yet; use kernels.reference.recurrence on one device.")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must have q's dtype and device: q is {q.dtype} on {q.device}, {name} is {x.dtype} on "
                f"{x.device}. Convert it first."
            )
        cp.check_tokens(name, x)
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must have q's batch size {q.shape[0]}, got {x.shape[0]}.")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same head dim K: {q.shape[-1]} and {k.shape[-1]}.")
    if g is not None:
        _check_gate(g, q, causal, impl)
    heads = num_heads(q, k, v, g)
    for name, x in (("q", q), ("k", k), ("v", v), ("g", g)):
        if x is not None and heads % num_heads(x):
            raise ValueError(
                f"the head count of {name} must divide the largest one: {num_heads(x)} does not divide {heads}. "
                "Repeat or merge its heads."
            )
    if not causal and (initial_state is not None or output_final_state):
        raise ValueError("causal=False has no running state: leave initial_state None and output_final_state False.")
    if initial_state is not None:
        documents = cp.layout.num_documents
        rows = documents if documents > 1 else q.shape[0]
        expected = (rows, heads, q.shape[-1], v.shape[-1])
        if tuple(initial_state.shape) != expected or initial_state.device != q.device:
            raise ValueError(
                f"initial_state must be {expected} on {q.device} ([B, H, K, V], or one row per packed document), got "
                f"{tuple(initial_state.shape)} on {initial_state.device}."
            )
    if impl == "triton":
        check_triton(q, v)
    if impl == "reference" and cp.cp_size > 1:
        raise ValueError(f"impl='reference' runs on one device, got cp_size = {cp.cp_size}; use impl='torch'.")


def _check_gate(g: Tensor, q: Tensor, causal: bool, impl: str) -> None:
    batch, length, _, key_dim = q.shape
    if not causal:
        raise ValueError("causal=False takes no g: a decay has a direction. Leave g None, or use causal=True.")
    fits = g.dim() == 1 or (g.dim() in (3, 4) and g.shape[:2] == (batch, length))
    if not fits or (g.dim() == 4 and g.shape[3] != key_dim):
        raise ValueError(
            f"g must be [H], [B, T, H] or [B, T, H, K] = {(batch, length, 'H', key_dim)}, got shape {tuple(g.shape)}."
        )
    if g.device != q.device:
        raise ValueError(f"g must be on q's device {q.device}, got {g.device}. Move it first.")
    if g.is_cuda:  # no host sync; the kernels look at g of tokens as they read it
        if impl != "triton" or g.dim() == 1:
            torch._assert_async(~(g > 0).any(), "g must be a log-decay <= 0")
    elif (g > 0).any():
        raise ValueError(
            f"g must be a log-decay, <= 0 everywhere, got a maximum of {g.max():.4g}. Pass log(decay), as in "
            "torch.nn.functional.logsigmoid."
        )
