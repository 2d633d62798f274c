"""LSTM layers as functions of their weights: checks, casts, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from throughtime.backends.backend import Backend, BackendName, Request, Results
from throughtime.backends.selection import chosen
from throughtime.functional import thin
from throughtime.functional.checks import (
    autocast_dtype,
    broadcasts,
    check_flag,
    check_mask,
    check_pair,
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
from throughtime.ops import watching
from throughtime.ops.lstm import LstmArguments, LstmResults
from throughtime.ops.precision import cast

if TYPE_CHECKING:
    from typing_extensions import Unpack

States = tuple[Tensor, Tensor]

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
PerDirection = tuple[Tensor | None, Tensor | None]
WithCells = tuple[Tensor, States, Tensor]


class Options(TypedDict, total=False):
    """What :func:`lstm` takes by keyword, as its overloads say it."""

    detach_mask: Tensor | None
    lengths: Tensor | None
    reset: Tensor | None
    reset_hx: States | None
    reverse: bool
    recompute: bool
    backend: BackendName


@overload
def lstm(
    input: Tensor, hx: States | None, weight_ih: Tensor, weight_hh: Tensor,
    bias_ih: Tensor | None = None, bias_hh: Tensor | None = None, weight_hr: Tensor | None = None,
    *, return_cells: Literal[False] = False, **options: Unpack[Options],
) -> tuple[Tensor, States]: ...  # fmt: skip


@overload
def lstm(
    input: Tensor, hx: States | None, weight_ih: Tensor, weight_hh: Tensor,
    bias_ih: Tensor | None = None, bias_hh: Tensor | None = None, weight_hr: Tensor | None = None,
    *, return_cells: Literal[True], **options: Unpack[Options],
) -> WithCells: ...  # fmt: skip


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
    reset_hx: States | None = None,
    reverse: bool = False,
    recompute: bool = False,
    return_cells: bool = False,
    backend: BackendName = "auto",
) -> tuple[Tensor, States] | WithCells:
    """Run one LSTM layer in one direction; only its gradient can differ from ``nn.LSTM``'s.

    T is the number of time steps, B the batch size, I the input size, H the hidden size, P the
    projection size. If ``detach_mask`` is True at position t, the ``h`` that enters the gates of
    that step is detached: ``h_{t-1}``, or ``h_{t+1}`` with ``reverse``. Gradients through the cell
    state and the outputs always pass, and ``weight_hh`` keeps its full gradient.

    Autocast casts everything but float64 to its dtype, as it does for ``nn.LSTM`` on CUDA. For
    float16 and bfloat16, gate sums and c are float32. The CUDA kernels round float32 h, weight_hh
    and gradients of gates to TF32 where they meet in a product, if torch allows that to
    ``nn.LSTM`` on CUDA. It does by default; ``torch.backends.cudnn.allow_tf32 = False`` asks for
    float32. All other sums are float32.

    Args:
        input: ``[T, B, I]``, T >= 1, any strides.
        hx: ``(h_0 [B, H or P], c_0 [B, H])``, zeros if None.
        weight_ih: ``[4H, I]``, gate rows i, f, g, o.
        weight_hh: ``[4H, H]``, or ``[4H, P]`` with a projection.
        bias_ih: ``[4H]`` or None.
        bias_hh: ``[4H]`` or None.
        weight_hr: projection ``[P, H]`` or None.
        detach_mask: bool ``[T]`` or ``[T, B]``.
        lengths: int64 ``[B]``, 0 <= length <= T, in any order, on the CPU or the input's device.
            Past a sample's length its state stays, its output is zero, and its input is not read.
            The range is checked if the lengths are on the CPU, and not inside ``torch.compile``.
        reset: bool ``[T, B]``; True lets h and c start anew before step t, in the direction of
            travel.
        reset_hx: ``(h, c)``, from which they start anew, broadcastable to ``[T, B, H or P]`` and
            ``[T, B, H]``; zeros if None. Entry t is read where ``reset`` is set at t. Backends
            ``"cpu"`` and ``"reference"`` take it.
        reverse: True travels from each sample's last position to its first.
        recompute: True computes the gates again in the backward pass, for less memory. Backend
            ``"cpu"`` saves c alone then, a fifth of the numbers, and its gradients keep their bits
            (in bfloat16 they are a little more exact, for a third of the bytes). Other backends
            save the arguments alone and run their forward again.
        return_cells: True gives the cell state of every step too, with its gradient. Backends
            ``"cpu"`` and ``"reference"`` do.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        ``(output [T, B, H or P], (h_n [B, H or P], c_n [B, H]))``, and with ``return_cells`` a
        third, ``cells [T, B, H]``, zero past a sample's length.

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
    check_flag("return_cells", return_cells)
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    if lengths is None and reset_hx is None and not return_cells and thin.applies(input, backend):
        found = thin.run(
            input, hx, weights, detach_mask=detach_mask, reset=reset, reverse=reverse,
            recompute=recompute,
        )  # fmt: skip
        if found is not None:
            return found.output, (found.h_n, found.c_n)
    args, autocast = _arguments(
        input, hx, weights, lengths, reset, reset_hx, detach_mask, reverse, recompute
    )
    runs = _backend(backend, args, autocast, return_cells)
    run = runs.run_cells if return_cells else runs.run
    assert run is not None  # a requirement refuses a backend without it
    with without_autocast(input, autocast):
        output, h_n, c_n, *cells = _run(runs, run, _cast(args, autocast, runs))
    return (output, (h_n, c_n), cells[0]) if return_cells else (output, (h_n, c_n))


def bidirectional_lstm(
    input: Tensor,
    hx: States | None,
    weights: tuple[Weights, Weights],
    *,
    detach_mask: PerDirection = (None, None),
    lengths: Tensor | None = None,
    reset: PerDirection = (None, None),
    reset_hx: tuple[States | None, States | None] = (None, None),
    recompute: bool = False,
    backend: BackendName = "auto",
) -> tuple[Tensor, States]:
    """Run both directions of one LSTM layer; backend ``"cuda"`` runs them in one launch.

    Args:
        input: ``[T, B, I]``, T >= 1, any strides.
        hx: ``(h_0 [2, B, H or P], c_0 [2, B, H])``, zeros if None.
        weights: for each direction ``(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)``, as in
            :func:`lstm`. The second direction travels from the last position to the first.
        detach_mask: per direction, bool ``[T]`` or ``[T, B]``, or None.
        lengths: as in :func:`lstm`.
        reset: per direction, bool ``[T, B]``, or None.
        reset_hx: per direction, as in :func:`lstm`.
        recompute: as in :func:`lstm`.
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
    _check_directions(hx, weights, detach_mask=detach_mask, reset=reset, reset_hx=reset_hx)
    (one, autocast), (other, _) = (
        _arguments(
            input, None if hx is None else (hx[0][d], hx[1][d]), weights[d], lengths, reset[d],
            reset_hx[d], detach_mask[d], d == 1, recompute,
        )
        for d in range(2)
    )  # fmt: skip
    if one.weight_hh.shape != other.weight_hh.shape:
        wrong_shape(_BOTH, "weight_hh of the second direction", str(list(one.weight_hh.shape)),
                    other.weight_hh)  # fmt: skip
    for name in ("bias_ih", "bias_hh", "weight_hr"):
        if (getattr(one, name) is None) != (getattr(other, name) is None):
            raise TypeError(
                f"{_BOTH}: both directions should have the same biases and projections, or none"
            )
    runs = _backend(backend, one, autocast)
    one, other = (_cast(args, autocast, runs) for args in (one, other))
    with without_autocast(input, autocast):
        if runs.run_both is not None:
            output, h_n, c_n = _run(runs, runs.run_both, one, other)
            return output, (h_n, c_n)
        first, second = (_run(runs, runs.run, args) for args in (one, other))
        output = torch.cat((first.output, second.output), dim=2)
        return output, (torch.stack((first.h_n, second.h_n)), torch.stack((first.c_n, second.c_n)))


_BOTH = "bidirectional_lstm"


def _check_directions(
    hx: States | None,
    weights: tuple[Weights, Weights],
    **per_direction: object,
) -> None:
    """Check that everything is there once per direction; what is there, :func:`_arguments` checks.

    Raises:
        RuntimeError: if a state has another first size than 2.
        TypeError: if something is no pair.
    """
    for name, pair in {"weights": weights, **per_direction}.items():
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


_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def _arguments(
    input: Tensor,
    hx: States | None,
    weights: Weights,
    lengths: Tensor | None,
    reset: Tensor | None,
    reset_hx: States | None,
    detach_mask: Tensor | None,
    reverse: bool,
    recompute: bool,
) -> tuple[LstmArguments, torch.dtype | None]:
    """The record of one direction: checked, masks ``[T, B]``.

    Returns:
        The record, and autocast's dtype if it is to run in that.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`lstm` says.
    """
    check_pair("lstm", hx)
    named = dict(zip(_WEIGHTS, weights, strict=True))
    check_tensors("lstm", {"input": input, **named}, _WEIGHTS[2:])
    check_flag("lstm: reverse", reverse)
    check_flag("lstm: recompute", recompute)
    check_input(input, weights[0])
    length, batch, input_size = input.shape
    hidden_size, output_size = _sizes(weights[1], weights[4])
    gates = 4 * hidden_size
    shapes = {
        "weight_ih": (gates, input_size),
        "weight_hh": (gates, output_size),
        "bias_ih": (gates,),
        "bias_hh": (gates,),
        "weight_hr": (output_size, hidden_size),
    }
    check_weights("lstm", named, shapes)
    check_states(input, hx, output_size, hidden_size)
    states = {} if hx is None else {"hx[0]": hx[0], "hx[1]": hx[1]}
    if reset_hx is not None:
        reset_hx = _starts(reset, reset_hx, (length, batch), (output_size, hidden_size))
        states |= {"reset_hx[0]": reset_hx[0], "reset_hx[1]": reset_hx[1]}
    check_devices(input, "hidden", states)
    check_devices(input, "parameter", named)
    check_mask("lstm", "detach_mask", detach_mask, input, ((length,), (length, batch)))
    check_mask("lstm", "reset", reset, input, ((length, batch),))
    lengths = checked_lengths("lstm", lengths, batch, length, input.device)
    autocast = autocast_dtype(input)
    check_dtypes("lstm", input, named, states, autocast)
    if hx is None:
        h_0, c_0 = input.new_zeros(batch, output_size), input.new_zeros(batch, hidden_size)
    else:
        h_0, c_0 = hx
    mask = per_sample(detach_mask, length, batch)
    new_h, new_c = (None, None) if reset_hx is None else reset_hx
    args = LstmArguments(
        input, h_0, c_0, *weights, lengths, reset, new_h, new_c, mask, reverse, recompute
    )
    return args, autocast


def _starts(
    reset: Tensor | None, reset_hx: States, steps: tuple[int, int], features: tuple[int, int]
) -> States:
    """``reset_hx`` as ``[T, B, *]``, without a copy."""
    check_pair("lstm", reset_hx, name="reset_hx")
    if reset is None:
        raise ValueError("lstm: reset_hx should come with reset, which says where episodes start")
    for k, x in enumerate(reset_hx):
        wanted = (*steps, features[k])
        if not broadcasts(x, wanted):
            letters = "[T, B, H]" if k else "[T, B, H or P]"
            raise RuntimeError(
                f"lstm: reset_hx[{k}] should be broadcastable to {list(wanted)} ({letters}), got "
                f"{list(x.shape)}"
            )
    return reset_hx[0].expand(*steps, features[0]), reset_hx[1].expand(*steps, features[1])


def _sizes(weight_hh: Tensor, weight_hr: Tensor | None) -> tuple[int, int]:
    """H, and H or P."""
    if weight_hh.dim() != 2 or weight_hh.size(0) % 4 or weight_hh.size(0) == 0:
        wrong_shape("lstm", "weight_hh", "[4H, H], gate rows i, f, g, o", weight_hh)
    hidden_size = weight_hh.size(0) // 4
    if weight_hr is None:
        return hidden_size, hidden_size
    if weight_hr.dim() != 2 or weight_hr.size(1) != hidden_size:
        wrong_shape("lstm", "weight_hr", f"[P, {hidden_size}]", weight_hr)
    return hidden_size, weight_hr.size(0)


_Backend = Backend[LstmArguments, LstmResults]


def _run(runs: _Backend, run: Callable[..., Results], *args: LstmArguments) -> Results:
    """One way of a backend to run; with its forward again in the backward if that is wanted."""
    watching.begin(args[0])
    if not args[0].recompute or runs.recomputes:
        return run(*args)
    found: Results = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
    return found


def _cast(args: LstmArguments, autocast: torch.dtype | None, runs: _Backend) -> LstmArguments:
    """The record as autocast has it: weights may stay what they are."""
    if autocast is None:
        return args
    keeps = args.weight_ih.dtype == torch.float32 and runs.float32_weights(autocast)
    return cast(args, autocast, torch.float32 if keeps else None)


def _backend(
    name: BackendName,
    args: LstmArguments,
    autocast: torch.dtype | None,
    return_cells: bool = False,
) -> _Backend:
    request = Request(
        op="lstm",
        hidden_size=args.weight_hh.size(0) // 4,
        proj_size=0 if args.weight_hr is None else args.weight_hr.size(0),
        device=args.input.device,
        dtype=autocast or args.input.dtype,
        reset_hx=args.reset_h is not None,
        return_cells=return_cells,
    )
    return chosen(name, request)
