"""RelLSTM: an LSTM whose state is mixed with attention over its own screened past.

    s_t = (h_{t-1} + o_{t-1}) / 2                       o_{-1} = context_0 (h_0 at a fresh start)
    gates_t = W_ih x_t + b + W_hh s_t;   c_t, h_t as in an LSTM
    o_t = relevancy attention of the query V_a s_t over the keys U_a h_j and values h_j, j <= t,
          with the additive score w . tanh(V_a s_t + U_a h_j)

With ``detach_mask[t]`` the direct term h_{t-1} in s_t is detached; the attention term never is.
With ``cell="tanh"`` the cell is a plain one, h_t = tanh(W_ih x_t + b + W_hh s_t).

Source: Kerg, Kanuparthi et al., NeurIPS 2020, arXiv 2006.09471; the attention at step t is the one
that their code computes at the start of step t + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from throughtime.reference.relevancy import additive, attend
from throughtime.reference.screening import Memory, Screening

_LOW_PRECISION = (torch.float16, torch.bfloat16)


class RelLstmResult(NamedTuple):
    """What :func:`rel_lstm` returns; S = P + T positions.

    Attributes:
        output: ``[T, B, H]``.
        h_n, c_n, context_n: ``[B, H]``, the last h, c and o of each sample.
        last: int64 ``[S, B]``: the last step that attends each position, -1 if none does.
        memory: what the next call needs, its tensors ``[P', B]``.
        attention: ``[B, T, S]`` weights, zero where nothing is attended; only if asked for.
    """

    output: Tensor
    h_n: Tensor
    c_n: Tensor
    context_n: Tensor
    last: Tensor
    memory: Memory
    attention: Tensor | None = None


def rel_lstm(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    context_0: Tensor,
    memory: Tensor | None,
    relevance: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_query: Tensor,
    weight_key: Tensor,
    weight_score: Tensor,
    *,
    lengths: Tensor | None = None,
    detach_mask: Tensor | None = None,
    retained: int = 0,
    window_size: int,
    top_k: int | None,
    keep_first: bool = False,
    cell: str = "lstm",
    need_weights: bool = False,
    observe: Callable[[int, Tensor, Tensor], object] | None = None,
) -> RelLstmResult:
    """Run one RelLSTM layer step by step, in plain PyTorch.

    :func:`throughtime.functional.rel_lstm` checks the arguments and makes them; nothing is checked
    here. float16 and bfloat16 are computed in float32 and rounded once, at the end; relevance stays
    float32.

    Args:
        input: ``[T, B, I]``.
        h_0, c_0, context_0: ``[B, H]``; c_0 is handed through by ``cell="tanh"``.
        memory: ``[P, B, H]``, hidden states that an earlier call's memory points at, or None.
        relevance: ``[P, B]`` of an earlier call, negative where a slot is empty, or None.
        weight_ih, weight_hh: ``[4H, I]``, ``[4H, H]``, gate rows i, f, g, o; ``[H, I]``, ``[H, H]``
            for ``cell="tanh"``.
        bias_ih, bias_hh: as many rows, or None.
        weight_query, weight_key: V_a and U_a ``[A, H]``.
        weight_score: w ``[A]``.
        lengths: int64 ``[B]``, 0 <= length <= T; past it the output is zero, the state frozen.
        detach_mask: bool ``[T]`` or ``[T, B]``.
        retained: how many of the P are the retained set.
        window_size: >= 1.
        top_k: >= 0; None keeps every key.
        keep_first: retain the first ``top_k`` keys, whatever their relevance.
        cell: ``"lstm"`` or ``"tanh"``.
        need_weights: True also returns the attention weights, in O(T^2) memory.
        observe: called with ``t, h_t [B, H], c_t [B, H]`` at every step, of which nothing is used
            past the length of a sample; a hook on them sees their whole gradients.

    Returns:
        A named tuple of ``output [T, B, H]``; the last ``h_n``, ``c_n`` and ``context_n``, each
        ``[B, H]``; ``last``, int64 ``[P + T, B]``, the last step that attends each position or -1;
        ``memory`` for the next call; and ``attention [B, T, P + T]`` or None.

    Example:
        >>> import torch
        >>> from throughtime import reference
        >>> zeros = torch.zeros(2, 4)
        >>> weights = [torch.randn(16, 3), torch.randn(16, 4), None, None]
        >>> weights += [torch.randn(5, 4), torch.randn(5, 4), torch.randn(5)]
        >>> result = reference.rel_lstm(torch.randn(9, 2, 3), zeros, zeros, zeros, None, None,
        ...                             *weights, window_size=3, top_k=2)
        >>> assert torch.equal(result.output[-1], result.h_n)
    """
    out_dtype = input.dtype
    if out_dtype in _LOW_PRECISION:
        input, h_0, c_0, context_0 = (x.float() for x in (input, h_0, c_0, context_0))
        memory, relevance = (None if x is None else x.float() for x in (memory, relevance))
        weight_ih, weight_hh = weight_ih.float(), weight_hh.float()
        weight_query, weight_key = weight_query.float(), weight_key.float()
        weight_score = weight_score.float()
    length, batch, _ = input.shape
    ends = torch.full((batch,), length, device=input.device) if lengths is None else lengths
    alive = torch.arange(length, device=input.device).unsqueeze(1) < ends  # [T, B]
    if lengths is not None:
        input = torch.where(alive.unsqueeze(2), input, 0.0)  # padding may be NaN
    if relevance is None:
        relevance = input.new_zeros(0, batch)
    screening = Screening(relevance.T, retained, length, window_size, top_k, keep_first)
    prefix = relevance.size(0)
    if memory is not None:  # of what is never attended, infinities neither
        memory = torch.where(((relevance < 0) | (ends == 0)).unsqueeze(2), 0.0, memory)

    # Hidden states and keys of the window by position, of the retained set by slot.
    hidden = [] if memory is None else list(memory.unbind(0))
    keys = [F.linear(h, weight_key) for h in hidden]
    kept_h = _stack(hidden[:retained], h_0)
    kept_u = _stack(keys[:retained], weight_key.new_zeros(batch, weight_key.size(0)))

    x_gates = F.linear(input, weight_ih, _sum(bias_ih, bias_hh, input.dtype)).unbind(0)
    h, c, context = h_0, c_0, context_0
    outputs, weights = [], []
    for t in range(length):
        direct = h
        if detach_mask is not None:
            detached = detach_mask[t].unsqueeze(-1) if detach_mask.dim() == 2 else detach_mask[t]
            direct = torch.where(detached, h.detach(), h)
        # Zero gradients of an infinite state are NaN: that of an ended sample stays out.
        keep = alive[t].unsqueeze(1)
        s = torch.where(keep, 0.5 * (direct + context), 0.0)
        h_t, c_t = _CELLS[cell](x_gates[t] + F.linear(s, weight_hh), torch.where(keep, c, 0.0))
        if observe is not None:
            observe(t, h_t, c_t)
        hidden.append(h_t)
        keys.append(F.linear(h_t, weight_key))

        positions = screening.candidates(t, alive[t])
        count = positions.size(1) - kept_h.size(1)
        own = slice(prefix + t + 1 - count, prefix + t + 1)
        candidates_u = torch.cat([kept_u, torch.stack(keys[own], 1)], 1)
        candidates_h = torch.cat([kept_h, torch.stack(hidden[own], 1)], 1)
        valid = positions >= 0
        attended_u, attended_h = (
            torch.where(valid.unsqueeze(2), x, 0.0) for x in (candidates_u, candidates_h)
        )
        attention = attend(additive(F.linear(s, weight_query), attended_u, weight_score), valid)
        o_t = (attention.unsqueeze(-1) * attended_h).sum(1)
        if need_weights:
            row = attention.new_zeros(batch, prefix + length)
            weights.append(row.scatter_add(1, positions.clamp(min=0), attention))

        with torch.no_grad():
            order = screening.advance(t, alive[t], attention.detach())
        if order is not None:
            oldest = slice(kept_h.size(1) + 1)  # the retained set and the key that leaves
            kept_u = _pick(candidates_u[:, oldest], order)
            kept_h = _pick(candidates_h[:, oldest], order)

        h, c = torch.where(keep, h_t, h), torch.where(keep, c_t, c)
        context = torch.where(keep, o_t, context)
        outputs.append(torch.where(keep, h_t, 0.0))

    left = screening.memory(ends)
    return RelLstmResult(
        torch.stack(outputs).to(out_dtype),
        h.to(out_dtype),
        c.to(out_dtype),
        context.to(out_dtype),
        screening.last.T,
        Memory(left.positions.T, left.relevance.T, left.retained),
        torch.stack(weights, 1).to(out_dtype) if need_weights else None,
    )


def _lstm_cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = gates.chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _tanh_cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return gates.tanh(), c


_CELLS = {"lstm": _lstm_cell, "tanh": _tanh_cell}


def _stack(rows: list[Tensor], like: Tensor) -> Tensor:
    """Rows ``[B, D]`` -> ``[B, count, D]``."""
    return torch.stack(rows, 1) if rows else like.new_zeros(len(like), 0, like.size(1))


def _pick(rows: Tensor, order: Tensor) -> Tensor:
    """``rows [B, C, D]`` at ``order [B, M]``."""
    return rows.gather(1, order.unsqueeze(-1).expand(-1, -1, rows.size(-1)))


def _sum(bias_ih: Tensor | None, bias_hh: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if bias_ih is None or bias_hh is None:
        only = bias_hh if bias_ih is None else bias_ih
        return None if only is None else only.to(dtype)
    return bias_ih.to(dtype) + bias_hh.to(dtype)
