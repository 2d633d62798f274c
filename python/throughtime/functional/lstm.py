"""Recurrent layers as functions of their weights: checks, casts, and the choice of a backend."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from throughtime.backends.predicates import BackendName, Request
from throughtime.backends.selection import choose
from throughtime.functional.checks import (
    as_dtype,
    autocast_dtype,
    check_cast,
    check_flag,
    check_lengths,
    check_mask,
    check_pair,
    check_state_dtype,
    check_weight_dtype,
    wrong_shape,
)
from throughtime.functional.lstm_call import LstmCall, States, run, run_both


def lstm(
    input: Tensor,
    hx: States | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    detach_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    backend: BackendName = "auto",
) -> tuple[Tensor, States]:
    """Run one LSTM layer in one direction; only its gradient can differ from ``nn.LSTM``'s.

    T is the number of steps, B the batch, I the input size, H the hidden size, P the projection
    size. Where ``detach_mask`` is True at position t, the ``h`` that enters the gates of that step
    is detached; the cell path and the outputs are never cut, and ``weight_hh`` keeps its full
    gradient. With ``reverse`` the mask at position t cuts the ``h`` that arrives from t + 1.

    Under autocast everything but float64 is cast to the autocast dtype, as ``nn.LSTM`` does on
    CUDA; gate sums and c are float32 for float16 and bfloat16.

    Args:
        input: ``[T, B, I]``, T >= 1, any strides.
        hx: ``(h_0 [B, H or P], c_0 [B, H])``, zeros if None.
        weight_ih: ``[4H, I]``, gate rows i, f, g, o.
        weight_hh: ``[4H, H]``, or ``[4H, P]`` with a projection.
        bias_ih: ``[4H]`` or None.
        bias_hh: ``[4H]`` or None.
        weight_hr: projection ``[P, H]`` or None.
        detach_mask: bool ``[T]`` or ``[T, B]``.
        lengths: int64 ``[B]``, 0 <= length <= T, in any order, on the CPU or beside the input.
            Past its length the state of a sample is frozen, its output zero and its input unread.
            The range is checked when the lengths are on the CPU and nothing is being compiled.
        reset: bool ``[T, B]``; True sets h and c to zero before step t, in the direction of travel.
        reverse: travel from the last position (of each sample) to the first.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        ``(output [T, B, H or P], (h_n [B, H or P], c_n [B, H]))``.

    Raises:
        RuntimeError: if a shape or a device does not fit, or the chosen backend cannot run.
        TypeError: if an argument that should be a tensor is none.
        ValueError: if a dtype, a length or the name of the backend is wrong.

    Example:
        >>> import torch
        >>> from throughtime import functional
        >>> weight_ih, weight_hh = torch.randn(8, 3), torch.randn(8, 2, requires_grad=True)
        >>> h_0, c_0 = torch.zeros(4, 2, requires_grad=True), torch.zeros(4, 2)
        >>> mask = torch.ones(5, dtype=torch.bool)
        >>> output, (h_n, c_n) = functional.lstm(
        ...     torch.randn(5, 4, 3), (h_0, c_0), weight_ih, weight_hh, detach_mask=mask)
        >>> h_n.sum().backward()
        >>> assert output.shape == (5, 4, 2) and not h_0.grad.any() and weight_hh.grad.any()

    Source: arXiv 1810.03023, Algorithm 1.
    """
    call = _checked(
        LstmCall(
            input, hx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, detach_mask, lengths,
            reset, reverse,
        )
    )  # fmt: skip
    with _no_autocast(input):
        return run(_chosen(backend, call), call)


Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
PerDirection = tuple[Tensor | None, Tensor | None]


def bidirectional_lstm(
    input: Tensor,
    hx: States | None,
    weights: tuple[Weights, Weights],
    *,
    detach_mask: PerDirection = (None, None),
    lengths: Tensor | None = None,
    reset: PerDirection = (None, None),
    backend: BackendName = "auto",
) -> tuple[Tensor, States]:
    """Run both directions of one LSTM layer; side by side in one launch on backend ``"cuda"``.

    Args:
        input: ``[T, B, I]``, T >= 1, any strides.
        hx: ``(h_0 [2, B, H or P], c_0 [2, B, H])``, zeros if None.
        weights: per direction ``(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)``, as in
            :func:`lstm`; the second direction travels from the last position to the first.
        detach_mask: per direction, bool ``[T]`` or ``[T, B]``, or None.
        lengths: as in :func:`lstm`.
        reset: per direction, bool ``[T, B]``, or None.
        backend: as in :func:`lstm`.

    Returns:
        ``(output [T, B, 2 (H or P)], (h_n [2, B, H or P], c_n [2, B, H]))``.

    Raises:
        RuntimeError: if a shape or a device does not fit, or the chosen backend cannot run.
        TypeError: if an argument that should be a tensor is none.
        ValueError: if a dtype, a length or the name of the backend is wrong.

    Example:
        >>> import torch
        >>> from throughtime import functional
        >>> weights = [(torch.randn(8, 3), torch.randn(8, 2), None, None, None) for _ in range(2)]
        >>> output, (h_n, c_n) = functional.bidirectional_lstm(torch.randn(5, 4, 3), None, weights)
        >>> assert output.shape == (5, 4, 4) and torch.equal(h_n[1], output[0, :, 2:])

    Source: arXiv 1810.03023, Algorithm 1, once per direction.
    """
    _check_directions(hx, weights, detach_mask, reset)
    one, other = (
        _checked(
            LstmCall(
                input, None if hx is None else (hx[0][d], hx[1][d]), *weights[d], detach_mask[d],
                lengths, reset[d], d == 1,
            )
        )
        for d in range(2)
    )  # fmt: skip
    if one.weight_hh.shape != other.weight_hh.shape:
        wrong_shape(_BOTH, "weight_hh of the second direction", str(list(one.weight_hh.shape)),
                    other.weight_hh)  # fmt: skip
    if [x is None for x in one[2:7]] != [x is None for x in other[2:7]]:
        raise TypeError(
            f"{_BOTH}: both directions should have the same biases and projections, or none"
        )
    with _no_autocast(input):
        return run_both(_chosen(backend, one), one, other)


_BOTH = "bidirectional_lstm"


def _check_directions(
    hx: States | None,
    weights: tuple[Weights, Weights],
    detach_mask: PerDirection,
    reset: PerDirection,
) -> None:
    """Check that everything is there once per direction; what is there, :func:`_checked` checks.

    Raises:
        RuntimeError: if a state has another first size than 2.
        TypeError: if something is no pair.
    """
    per_direction = {"weights": weights, "detach_mask": detach_mask, "reset": reset}
    for name, pair in per_direction.items():
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise TypeError(
                f"{_BOTH}: {name} should be a pair, one per direction, got {_kind(pair)}"
            )
    for d, one in enumerate(weights):
        if not (isinstance(one, (tuple, list)) and len(one) == 5):
            raise TypeError(
                f"{_BOTH}: weights[{d}] should be (weight_ih, weight_hh, bias_ih, bias_hh, "
                f"weight_hr), with None for what is left out, got {_kind(one)}"
            )
    check_pair(_BOTH, hx)
    for k, x in enumerate(hx or ()):
        if x.dim() != 3 or x.size(0) != 2:
            wrong_shape(_BOTH, f"hx[{k}]", f"[2, B, {'H' if k else 'H or P'}]", x)


def _kind(value: object) -> str:
    """The type, and the number of parts, for a message."""
    kind = type(value).__name__
    return f"a {kind} of {len(value)}" if isinstance(value, (tuple, list)) else kind


def _checked(call: LstmCall) -> LstmCall:
    """The call in the dtype that it runs in, masks and lengths beside the input.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`lstm` says.
    """
    input, lengths = call.input, call.lengths
    named = _named(*call[:7])
    check_flag("lstm: reverse", call.reverse)
    _check_sizes(named)
    length, batch, _ = input.shape
    check_mask("lstm", "detach_mask", call.detach_mask, input, ((length,), (length, batch)))
    check_mask("lstm", "reset", call.reset, input, ((length, batch),))
    if lengths is not None:
        check_lengths("lstm", lengths, batch, length, input.device)
        call = call._replace(lengths=lengths.to(input.device))
    dtype = autocast_dtype(input)
    if dtype is None:
        _check_dtypes(named)
        return call
    check_cast("lstm", named)
    return call._replace(
        input=input.to(dtype),
        hx=None if call.hx is None else (call.hx[0].to(dtype), call.hx[1].to(dtype)),
        weight_ih=call.weight_ih.to(dtype),
        weight_hh=call.weight_hh.to(dtype),
        bias_ih=as_dtype(call.bias_ih, dtype),
        bias_hh=as_dtype(call.bias_hh, dtype),
        weight_hr=as_dtype(call.weight_hr, dtype),
    )


def _chosen(backend: BackendName, call: LstmCall) -> str:
    request = Request(
        op="lstm",
        hidden_size=call.weight_hh.size(0) // 4,
        proj_size=0 if call.weight_hr is None else call.weight_hr.size(0),
        device=call.input.device,
        dtype=call.input.dtype,
    )
    return choose(backend, request)


def _no_autocast(input: Tensor) -> AbstractContextManager[object]:
    """What autocast wants is done by :func:`_checked`, once."""
    if autocast_dtype(input) is None:
        return nullcontext()
    return torch.autocast(input.device.type, enabled=False)


def _named(
    input: Tensor,
    hx: States | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
) -> dict[str, Tensor]:
    """The given tensors by argument name.

    Raises:
        TypeError: if one of them is no tensor, or ``hx`` is no pair.
    """
    check_pair("lstm", hx)
    named = {"input": input}
    if hx is not None:
        named |= {"hx[0]": hx[0], "hx[1]": hx[1]}
    named |= {"weight_ih": weight_ih, "weight_hh": weight_hh}
    optional = {"bias_ih": bias_ih, "bias_hh": bias_hh, "weight_hr": weight_hr}
    named |= {name: x for name, x in optional.items() if x is not None}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"lstm: {name} should be a Tensor, got {type(x).__name__}")
    return named


def _check_sizes(named: dict[str, Tensor]) -> None:
    """Check number of dimensions, sizes and devices of everything but the masks."""
    input, weight_ih, weight_hh = named["input"], named["weight_ih"], named["weight_hh"]
    if input.dim() != 3:
        raise RuntimeError(f"input must have 3 dimensions, got {input.dim()}")
    length, batch, input_size = input.shape
    if length == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if weight_hh.dim() != 2 or weight_hh.size(0) % 4 or weight_hh.size(0) == 0:
        wrong_shape("lstm", "weight_hh", "[4H, H], gate rows i, f, g, o", weight_hh)
    gates = weight_hh.size(0)
    hidden_size = gates // 4
    output_size = hidden_size
    if "weight_hr" in named:
        weight_hr = named["weight_hr"]
        if weight_hr.dim() != 2 or weight_hr.size(1) != hidden_size:
            wrong_shape("lstm", "weight_hr", f"[P, {hidden_size}]", weight_hr)
        output_size = weight_hr.size(0)
    wanted = {
        "weight_hh": (gates, output_size),
        "weight_ih": (gates, input_size),
        "bias_ih": (gates,),
        "bias_hh": (gates,),
    }
    if weight_ih.dim() == 2 and weight_ih.size(1) != input_size:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {weight_ih.size(1)}, got {input_size}"
        )
    for name, shape in wanted.items():
        if name in named and tuple(named[name].shape) != shape:
            wrong_shape("lstm", name, str(list(shape)), named[name])
    for name, size in (("hx[0]", output_size), ("hx[1]", hidden_size)):
        if name in named and tuple(named[name].shape) != (batch, size):
            state = name.replace("hx", "hidden")
            raise RuntimeError(
                f"Expected {state} size {(batch, size)}, got {list(named[name].shape)}"
            )
    for name, x in named.items():
        if x.device != input.device:
            kind = "hidden" if name.startswith("hx") else "parameter"
            raise RuntimeError(
                f"Input and {kind} tensors are not at the same device, found input tensor at "
                f"{input.device} and {kind} tensor at {x.device} ({name})"
            )


def _check_dtypes(named: dict[str, Tensor]) -> None:
    for name, x in named.items():
        check = check_state_dtype if name.startswith("hx") else check_weight_dtype
        check(named["input"], x, name)
