"""RelLSTM as a function of its weights: an LSTM that attends its own screened past."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from throughtime.backends.backend import BackendName, Request
from throughtime.backends.selection import chosen
from throughtime.functional.carried import check_state
from throughtime.functional.checks import (
    autocast_dtype,
    check_choice,
    check_mask,
    check_pair,
    check_size,
    checked_lengths,
    without_autocast,
    wrong_shape,
)
from throughtime.functional.recurrent import (
    check_devices,
    check_dtypes,
    check_input,
    check_states,
    check_tensors,
    check_weights,
    per_sample,
)
from throughtime.functional.relevancy_call import Retain
from throughtime.functional.split import Split
from throughtime.ops import watching
from throughtime.ops.precision import LOW_PRECISION, cast
from throughtime.ops.rel_lstm import RelLstmArguments, RelLstmResults
from throughtime.states import RelState

Cell = Literal["lstm", "tanh"]
States = tuple[Tensor, Tensor]

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
    reset: Tensor | None = None,
    backend: BackendName = "auto",
) -> tuple[Tensor, RelState]:
    """Run one RelLSTM layer, whose gates see the mean of h and of attention over the past.

    ::

        s_t = (h_{t-1} + o_{t-1}) / 2,   s_0 = h_0
        gates_t = W_ih x_t + b + W_hh s_t;   c_t, h_t as in an LSTM
        o_t = sum over j of softmax_j(w . tanh(V_a s_t + U_a h_j)) h_j

    Here j runs over the last ``window_size`` steps and the ``top_k`` most relevant ones before
    them, as in :func:`throughtime.functional.relevancy_attention`. If ``detach_mask`` is True at
    step t, ``h_{t-1}`` in ``s_t`` is detached; the attention never is.

    Args:
        input: ``[T, B, I]``, T >= 1, any strides.
        hx: None (zeros), ``(h_0, c_0)``, each ``[B, H]``, or the state of an earlier call with its
            window, retained set and relevance.
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
        reset: bool ``[T, B]``; True where an episode starts: before that step state, window and
            retained set are emptied. Each episode is run as a row of its own, in memory of their
            number times the longest. Inside ``torch.compile`` this breaks the graph.
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
    weights: dict[str, Any] = {
        "weight_ih": weight_ih,
        "weight_hh": weight_hh,
        "bias_ih": bias_ih,
        "bias_hh": bias_hh,
        "weight_query": weight_query,
        "weight_key": weight_key,
        "weight_score": weight_score,
    }
    _check(input, weights, 4 if cell == "lstm" else 1)
    autocast = autocast_dtype(input)
    check_dtypes(_OP, input, weights, {}, autocast)
    length, batch, _ = input.shape
    check_mask(_OP, "detach_mask", detach_mask, input, ((length,), (length, batch)))
    detach_mask = per_sample(detach_mask, length, batch)
    lengths = checked_lengths(_OP, lengths, batch, length, input.device)
    options = (window_size, top_k, retain)
    state = _initial(hx, input, weight_hh.size(1), detach_mask, options, autocast)
    check_mask(_OP, "reset", reset, input, ((length, batch),))
    split = None
    if reset is not None and batch > 0:  # each episode is a row of its own
        split = Split.at(reset, lengths)
        input, hx, lengths = split.rows(input), split.begun(hx), split.lengths
        detach_mask = None if detach_mask is None else split.rows(detach_mask)
        state = _initial(hx, input, weight_hh.size(1), detach_mask, options, autocast)
    has_memory = state.memory.size(0) > 0
    args = RelLstmArguments(
        input=input,
        h_0=state.h,
        c_0=state.c,
        context_0=state.context,
        memory=state.memory if has_memory else None,
        relevance=state.relevance if has_memory else None,
        **weights,
        lengths=lengths,
        detach_mask=detach_mask,
        retained=state.retained,
        window_size=window_size,
        top_k=EVERY_KEY if top_k is None else top_k,
        keep_first=retain == "first",
    )
    request = Request(
        op=_OP,
        hidden_size=weight_hh.size(1),
        device=input.device,
        dtype=autocast or input.dtype,
        cell=cell,
    )
    runs = chosen(backend, request)
    if autocast is not None:
        keeps = weight_ih.dtype == torch.float32 and runs.float32_weights(autocast)
        args = cast(args, autocast, torch.float32 if keeps else None)
    with without_autocast(input, autocast):
        watching.begin(args, split)
        results: RelLstmResults = runs.run(args)
        output, state = results.output, _next_state(state, args, results, options)
        if split is None:
            return output, state
        return split.together(output), split.ended(state)


def _next_state(
    before: RelState,
    args: RelLstmArguments,
    results: RelLstmResults,
    options: tuple[object, ...],
) -> RelState:
    """What the next call needs: rows of ``[before.memory, output]``, each gathered by itself."""
    index = results.memory_index
    prefix, (length, _, hidden) = before.memory.size(0), results.output.shape
    at = (index - prefix).clamp(0, length - 1).unsqueeze(2).expand(-1, -1, hidden)
    memory = results.output.gather(0, at)
    if args.memory is not None:
        old = index.clamp(0, prefix - 1).unsqueeze(2).expand(-1, -1, hidden)
        memory = torch.where((index < prefix).unsqueeze(2), args.memory.gather(0, old), memory)
    empty = index < 0
    steps = torch.arange(length, device=index.device).unsqueeze(1) + before.length  # [T, B]
    position = torch.cat([before.position, steps]).gather(0, index.clamp(min=0))
    window = min(args.window_size - 1, prefix - before.retained + length)
    return RelState(
        results.h_n,
        results.c_n,
        results.context_n,
        torch.where(empty.unsqueeze(2), 0.0, memory),
        results.memory_relevance,
        position.masked_fill(empty, -1),
        before.length + (length if args.lengths is None else args.lengths),
        index.size(0) - window,
        options,
    )


def _initial(
    hx: RelState | States | None,
    input: Tensor,
    hidden: int,
    detach_mask: Tensor | None,
    options: tuple[int, int | None, str],
    autocast: torch.dtype | None,
) -> RelState:
    """The state to begin with, checked; a fresh one has no memory and h_0 as its context."""
    batch = input.size(1)
    if isinstance(hx, RelState):
        check_state(_OP, hx, input, hidden, options, autocast)
        return hx
    check_pair(_OP, hx, "a RelState, ")
    check_states(input, hx, hidden, hidden)
    given = {} if hx is None else {"hx[0]": hx[0], "hx[1]": hx[1]}
    check_devices(input, "hidden", given)
    check_dtypes(_OP, input, {}, given, autocast)
    h, c = (input.new_zeros(batch, hidden),) * 2 if hx is None else hx
    context = h
    if detach_mask is not None:
        # s_0 is h_0, not half of it: detaching the first step detaches all of it.
        context = torch.where(detach_mask[0].unsqueeze(-1), h.detach(), h)
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


def _check(input: Tensor, weights: dict[str, Tensor | None], gates: int) -> None:
    """Check types, sizes and devices of the input and the weights."""
    check_tensors(_OP, {"input": input, **weights}, ("bias_ih", "bias_hh"))
    weight_ih, weight_hh, weight_score = (
        weights[name] for name in ("weight_ih", "weight_hh", "weight_score")
    )
    assert weight_ih is not None and weight_hh is not None and weight_score is not None
    check_devices(input, "parameter", weights)
    check_input(input, weight_ih)
    if not input.is_floating_point():
        raise ValueError(
            f"{_OP}: input should have a floating point dtype, got {input.dtype}; "
            "convert it: input.float()"
        )
    rows = f"{gates}H" if gates > 1 else "H"
    if (
        weight_hh.dim() != 2
        or weight_hh.size(1) == 0
        or weight_hh.size(0) != gates * weight_hh.size(1)
    ):
        wrong_shape(_OP, "weight_hh", f"[{rows}, H]", weight_hh)
    if weight_score.dim() != 1 or weight_score.size(0) == 0:
        wrong_shape(_OP, "weight_score", "[A]", weight_score)
    hidden, attention = weight_hh.size(1), weight_score.size(0)
    shapes = {
        "weight_ih": (gates * hidden, input.size(2)),
        "weight_hh": (gates * hidden, hidden),
        "bias_ih": (gates * hidden,),
        "bias_hh": (gates * hidden,),
        "weight_query": (attention, hidden),
        "weight_key": (attention, hidden),
        "weight_score": (attention,),
    }
    check_weights(_OP, weights, shapes)
