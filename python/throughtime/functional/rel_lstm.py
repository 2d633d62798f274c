"""RelLSTM as a function of its weights: an LSTM that attends its own screened past."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from throughtime import reference
from throughtime.backends.predicates import BackendName, Request
from throughtime.backends.selection import choose
from throughtime.functional.carried import check_initial, check_state
from throughtime.functional.checks import (
    LOW_PRECISION,
    as_dtype,
    autocast_dtype,
    check_cast,
    check_choice,
    check_lengths,
    check_mask,
    check_pair,
    check_size,
    check_weight_dtype,
    wrong_shape,
)
from throughtime.functional.relevancy import Retain
from throughtime.ops.rel_lstm import RelLstmLayer, rel_lstm_layer
from throughtime.states import RelState

Cell = Literal["lstm", "tanh"]
States = tuple[Tensor, Tensor]


class Weights(NamedTuple):
    """The weights of one layer."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_query: Tensor
    weight_key: Tensor
    weight_score: Tensor

    def to(self, dtype: torch.dtype) -> Weights:
        """All of them in another dtype."""
        return Weights(*(as_dtype(x, dtype) for x in self))  # type: ignore[arg-type]


# Where the number of retained keys is not bounded: more than any sequence has.
EVERY_KEY = 2**62

_OP = "rel_lstm"


def rel_lstm(
    input: Tensor,
    hx: RelState | States | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_query: Tensor,
    weight_key: Tensor,
    weight_score: Tensor,
    window_size: int,
    top_k: int | None,
    *,
    cell: Cell = "lstm",
    retain: Retain = "relevant",
    detach_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: BackendName = "auto",
) -> tuple[Tensor, RelState]:
    """Run one RelLSTM layer: the state that enters the gates is mixed with attention over the past.

    ::

        s_t = (h_{t-1} + o_{t-1}) / 2,   s_0 = h_0
        gates_t = W_ih x_t + b + W_hh s_t;   c_t, h_t as in an LSTM
        o_t = sum over j of softmax_j(w . tanh(V_a s_t + U_a h_j)) h_j

    where j runs over the last ``window_size`` steps and the ``top_k`` most relevant before them, as
    in :func:`throughtime.functional.relevancy_attention`. Where ``detach_mask`` is True at step t
    the h_{t-1} in s_t is detached, the attention never is.

    Args:
        input: ``[T, B, I]``, T >= 1, any strides.
        hx: None (zeros), ``(h_0, c_0)``, each ``[B, H]``, or the state of an earlier call, which
            goes on with its window, retained set and relevance.
        weight_ih: ``[4H, I]``, gate rows i, f, g, o; ``[H, I]`` for ``cell="tanh"``.
        weight_hh: ``[4H, H]``, or ``[H, H]``.
        bias_ih, bias_hh: ``[4H]``, or ``[H]``; or None.
        weight_query: V_a ``[A, H]``.
        weight_key: U_a ``[A, H]``.
        weight_score: w ``[A]``.
        window_size: >= 1, may exceed T.
        top_k: size of the retained set, >= 0; None keeps every key (MemLSTM; O(T^2) time).
        cell: ``"lstm"``, or ``"tanh"`` for a plain cell h_t = tanh(gates_t), reference only.
        retain: ``"relevant"``, or ``"first"``: the first ``top_k`` keys, a baseline.
        detach_mask: bool ``[T]`` or ``[T, B]``.
        lengths: int64 ``[B]``, 0 <= length <= T. Past its length the state of a sample is frozen,
            its output zero and its input unread.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        ``(output [T, B, H], state)``, the state of one layer.

    Raises:
        RuntimeError: if a shape or a device does not fit, or the chosen backend cannot run.
        TypeError: if an argument has the wrong type.
        ValueError: if a size, a dtype, a length or a name is wrong.

    Example:
        >>> import torch
        >>> from throughtime.functional import rel_lstm
        >>> weights = [torch.randn(16, 3), torch.randn(16, 4), None, None]
        >>> weights += [torch.randn(5, 4), torch.randn(5, 4), torch.randn(5)]
        >>> output, state = rel_lstm(torch.randn(9, 2, 3), None, *weights, 3, 2)
        >>> assert output.shape == (9, 2, 4) and state.memory.shape == (4, 2, 4)

    Source: Kerg, Kanuparthi et al., NeurIPS 2020, arXiv 2006.09471.
    """
    check_size(_OP, "window_size", window_size, least=1)
    if top_k is not None:
        check_size(_OP, "top_k", top_k, least=0)
    check_choice(_OP, "cell", cell, ("lstm", "tanh"))
    check_choice(_OP, "retain", retain, ("relevant", "first"))
    weights = Weights(
        weight_ih, weight_hh, bias_ih, bias_hh, weight_query, weight_key, weight_score
    )
    _check_tensors(input, weights._asdict(), 4 if cell == "lstm" else 1)
    length, batch, _ = input.shape
    check_mask(_OP, "detach_mask", detach_mask, input, ((length,), (length, batch)))
    if lengths is not None:
        check_lengths(_OP, lengths, batch, length, input.device)
        lengths = lengths.to(input.device)
    dtype = autocast_dtype(input)
    given = {name: x for name, x in weights._asdict().items() if x is not None}
    if dtype is None:
        for name, x in given.items():
            check_weight_dtype(input, x, name)
    else:
        check_cast(_OP, given)
        input = input.to(dtype)
        weights = weights.to(dtype)
    state = _initial(hx, input, weight_hh.size(1), detach_mask, (window_size, top_k), dtype)

    request = Request(
        op=_OP,
        hidden_size=weight_hh.size(1),
        device=input.device,
        dtype=input.dtype,
        cell=cell,
    )
    chosen = choose(backend, request)
    with nullcontext() if dtype is None else torch.autocast(input.device.type, enabled=False):
        result = _run(
            chosen,
            input,
            state,
            weights,
            lengths,
            detach_mask,
            window_size,
            top_k,
            retain == "first",
            cell,
        )
        return result.output, _next_state(state, result, lengths, window_size)


def _run(
    backend: str,
    input: Tensor,
    state: RelState,
    weights: Weights,
    lengths: Tensor | None,
    detach_mask: Tensor | None,
    window_size: int,
    top_k: int | None,
    keep_first: bool,
    cell: str,
) -> RelLstmLayer:
    memory, relevance = (state.memory, state.relevance) if state.memory.size(0) else (None, None)
    initial = (state.h, state.c, state.context)
    if backend == "reference":
        full = reference.rel_lstm(
            input,
            *initial,
            memory,
            relevance,
            **weights._asdict(),
            lengths=lengths,
            detach_mask=detach_mask,
            retained=state.retained,
            window_size=window_size,
            top_k=top_k,
            keep_first=keep_first,
            cell=cell,
        )
        return RelLstmLayer(
            full.output,
            full.h_n,
            full.c_n,
            full.context_n,
            full.last,
            full.memory.positions,
            full.memory.relevance,
        )
    dtype = input.dtype
    h, c, context = initial
    if dtype in LOW_PRECISION:
        input, h, c, context = input.float(), h.float(), c.float(), context.float()
        memory, weights = as_dtype(memory, torch.float32), weights.to(torch.float32)
    layer = rel_lstm_layer(
        backend,
        input,
        h,
        c,
        context,
        memory,
        relevance,
        weights.weight_ih,
        weights.weight_hh,
        weights.bias_ih,
        weights.bias_hh,
        weights.weight_query,
        weights.weight_key,
        weights.weight_score,
        lengths=lengths,
        detach_mask=detach_mask,
        retained=state.retained,
        window_size=window_size,
        top_k=EVERY_KEY if top_k is None else top_k,
        keep_first=keep_first,
    )
    if dtype not in LOW_PRECISION:
        return layer
    return layer._replace(
        output=layer.output.to(dtype),
        h_n=layer.h_n.to(dtype),
        c_n=layer.c_n.to(dtype),
        context_n=layer.context_n.to(dtype),
    )


def _next_state(
    before: RelState, result: RelLstmLayer, lengths: Tensor | None, window_size: int
) -> RelState:
    """What the next call needs: rows of ``[before.memory, output]``, gathered from apart."""
    index = result.memory_index
    prefix, (length, _, hidden) = before.memory.size(0), result.output.shape
    at = (index - prefix).clamp(0, length - 1).unsqueeze(2).expand(-1, -1, hidden)
    memory = result.output.gather(0, at)
    if prefix:
        old = index.clamp(0, prefix - 1).unsqueeze(2).expand(-1, -1, hidden)
        memory = torch.where((index < prefix).unsqueeze(2), before.memory.gather(0, old), memory)
    empty = index < 0
    steps = torch.arange(length, device=index.device).unsqueeze(1) + before.length  # [T, B]
    position = torch.cat([before.position, steps]).gather(0, index.clamp(min=0))
    window = min(window_size - 1, prefix - before.retained + length)
    return RelState(
        result.h_n,
        result.c_n,
        result.context_n,
        torch.where(empty.unsqueeze(2), 0.0, memory),
        result.memory_relevance,
        position.masked_fill(empty, -1),
        before.length + (length if lengths is None else lengths),
        index.size(0) - window,
    )


def _initial(
    hx: RelState | States | None,
    input: Tensor,
    hidden: int,
    detach_mask: Tensor | None,
    sizes: tuple[int, int | None],
    dtype: torch.dtype | None,
) -> RelState:
    """The state to begin with, checked; a fresh one has no memory and h_0 as its context."""
    batch = input.size(1)
    if isinstance(hx, RelState):
        check_state(_OP, hx, input, hidden, sizes, dtype)
        if dtype is None:
            return hx
        return dataclasses.replace(
            hx,
            h=hx.h.to(dtype),
            c=hx.c.to(dtype),
            context=hx.context.to(dtype),
            memory=hx.memory.to(dtype),
        )
    if hx is None:
        h = c = input.new_zeros(batch, hidden)
    else:
        check_pair(_OP, hx, "a RelState, ")
        check_initial(_OP, hx, (batch, hidden), input, dtype)
        h, c = hx if dtype is None else (hx[0].to(dtype), hx[1].to(dtype))
    context = h
    if detach_mask is not None:
        # s_0 is h_0, not half of it: a cut at the first step cuts all of it.
        cut = detach_mask[0].unsqueeze(-1) if detach_mask.dim() == 2 else detach_mask[0]
        context = torch.where(cut, h.detach(), h)
    relevance = input.new_zeros(
        0, batch, dtype=torch.float32 if input.dtype in LOW_PRECISION else input.dtype
    )
    return RelState(
        h,
        c,
        context,
        input.new_zeros(0, batch, hidden),
        relevance,
        torch.zeros(0, batch, dtype=torch.int64, device=input.device),
        torch.zeros(batch, dtype=torch.int64, device=input.device),
        0,
    )


def _check_tensors(input: Tensor, weights: dict[str, Tensor | None], gates: int) -> None:
    """Check types, sizes and devices of the input and the weights."""
    named = {"input": input} | {name: x for name, x in weights.items() if x is not None}
    needed = ("weight_ih", "weight_hh", "weight_query", "weight_key", "weight_score")
    for name in ("input", *needed):
        if not isinstance(named.get(name), Tensor):
            got = type(named.get(name)).__name__
            raise TypeError(f"{_OP}: {name} should be a Tensor, got {got}")
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{_OP}: {name} should be a Tensor, got {type(x).__name__}")
        if x.device != input.device:
            raise RuntimeError(
                f"Input and parameter tensors are not at the same device, found input tensor at "
                f"{input.device} and parameter tensor at {x.device} ({name})"
            )
    if input.dim() != 3:
        raise RuntimeError(f"input must have 3 dimensions, got {input.dim()}")
    if not input.is_floating_point():
        raise ValueError(
            f"{_OP}: input should have a floating point dtype, got {input.dtype}; "
            "convert it: input.float()"
        )
    if input.size(0) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    weight_hh, weight_ih, weight_score = (
        named[name] for name in ("weight_hh", "weight_ih", "weight_score")
    )
    rows = f"{gates}H" if gates > 1 else "H"
    if (
        weight_hh.dim() != 2
        or weight_hh.size(1) == 0
        or weight_hh.size(0) != gates * weight_hh.size(1)
    ):
        wrong_shape(_OP, "weight_hh", f"[{rows}, H]", weight_hh)
    if weight_ih.dim() == 2 and weight_ih.size(1) != input.size(2):
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {weight_ih.size(1)}, got {input.size(2)}"
        )
    if weight_score.dim() != 1 or weight_score.size(0) == 0:
        wrong_shape(_OP, "weight_score", "[A]", weight_score)
    hidden, attention = weight_hh.size(1), weight_score.size(0)
    wanted = {
        "weight_ih": (gates * hidden, input.size(2)),
        "bias_ih": (gates * hidden,),
        "bias_hh": (gates * hidden,),
        "weight_query": (attention, hidden),
        "weight_key": (attention, hidden),
    }
    for name, shape in wanted.items():
        if name in named and tuple(named[name].shape) != shape:
            wrong_shape(_OP, name, str(list(shape)), named[name])
