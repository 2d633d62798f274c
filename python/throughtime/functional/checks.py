"""What the functions of all layers check and cast alike."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

import torch
from torch import Tensor

from throughtime.constant import constant_result
from throughtime.ops.precision import LOW_PRECISION

_CAST = (torch.float32, *LOW_PRECISION)  # what autocast casts: not float64, integers, complex


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype in which autocast runs a layer.

    Args:
        input: the input of the layer.

    Returns:
        The autocast dtype of the input's device. None if autocast is off there, or leaves the
        input's dtype alone (float64, for one).

    Example:
        >>> import torch
        >>> from throughtime.functional import autocast_dtype
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     assert autocast_dtype(torch.zeros(1)) == torch.bfloat16
        >>> assert autocast_dtype(torch.zeros(1)) is None
    """
    if input.dtype not in _CAST or not _autocast_enabled(input.device.type):
        return None
    return torch.get_autocast_dtype(input.device.type)


def without_autocast(input: Tensor, autocast: torch.dtype | None) -> AbstractContextManager[object]:
    """Turn autocast off where the arguments are in its dtype already."""
    if autocast is None:
        return nullcontext()
    return torch.autocast(input.device.type, enabled=False)


def _autocast_enabled(device_type: str) -> bool:
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def _wrong_dtype(input: Tensor, words: str) -> NoReturn:
    """Raise what ``nn.LSTM`` raises where dtypes do not fit: a RuntimeError under autocast."""
    raise (RuntimeError if _autocast_enabled(input.device.type) else ValueError)(words)


def check_weight_dtype(input: Tensor, weight: Tensor, name: str = "") -> None:
    """Check that the input has the dtype of a weight.

    Raises:
        RuntimeError, ValueError: if not, under autocast and without.
    """
    if input.dtype != weight.dtype:
        _wrong_dtype(
            input,
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype})"
            f"{name and f' of {name}'}. Convert input: input.to({weight.dtype}), or convert "
            f"model: model.to({input.dtype})",
        )


def check_state_dtype(input: Tensor, state: Tensor, name: str) -> None:
    """Check that a state has the dtype of the input.

    Raises:
        RuntimeError, ValueError: if not, under autocast and without.
    """
    if input.dtype != state.dtype:
        _wrong_dtype(
            input,
            f"Input and hidden tensors are not the same dtype, found input tensor with "
            f"{input.dtype} and {name} with {state.dtype}. Convert the state: "
            f"{name}.to({input.dtype})",
        )


def check_cast(op: str, named: dict[str, Tensor]) -> None:
    """Check that autocast casts all of these, as it does the input.

    Raises:
        RuntimeError: if it does not.
    """
    for name, x in named.items():
        if x.dtype not in _CAST:
            raise RuntimeError(
                f"{op}: {name} should be float32, float16 or bfloat16 under autocast, which casts "
                f"nothing else, got {x.dtype}; convert it: {name}.float()"
            )


@constant_result  # Dynamo of torch 2.10 cannot trace the builtin in it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def check_mask(
    op: str, name: str, mask: Tensor | None, input: Tensor, shapes: tuple[tuple[int, ...], ...]
) -> None:
    """Check that ``mask`` is None or a bool tensor of one of ``shapes`` on the input's device.

    Raises:
        RuntimeError: if its shape or device does not fit.
        TypeError: if it is no tensor.
        ValueError: if its dtype is not bool.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: {name} should be a bool Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise ValueError(
            f"{op}: {name} should have dtype torch.bool, got {mask.dtype}; "
            f"convert it: {name}.bool()"
        )
    if tuple(mask.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        letters = "[T] or [T, B]" if len(shapes) == 2 else "[T, B]"
        wrong_shape(op, name, f"{wanted} ({letters}, time first)", mask)
    if mask.device != input.device:
        raise RuntimeError(
            f"{op}: {name} should be on the input's device {input.device}, got {mask.device}; "
            f"move it: {name}.to({str(input.device)!r})"
        )


def checked_lengths(
    op: str, lengths: Tensor | None, batch: int, length: int, device: torch.device
) -> Tensor | None:
    """Check that ``lengths`` is int64 ``[batch]`` with values from 0 to ``length``, or None.

    Returns:
        The lengths on ``device``.

    Raises:
        RuntimeError: if its shape or device does not fit.
        TypeError: if it is no tensor.
        ValueError: if its dtype or a value is wrong.
    """
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        raise TypeError(
            f"{op}: lengths should be an int64 Tensor, got {type(lengths).__name__}; "
            "convert it: torch.tensor(lengths)"
        )
    if lengths.dtype != torch.int64:
        raise ValueError(
            f"{op}: lengths should have dtype torch.int64, got {lengths.dtype}; "
            "convert it: lengths.long()"
        )
    if tuple(lengths.shape) != (batch,):
        wrong_shape(op, "lengths", f"[{batch}], one per sample", lengths)
    if lengths.device.type != "cpu" and lengths.device != device:
        raise RuntimeError(
            f"{op}: lengths should be on the CPU or on the input's device {device}, got "
            f"{lengths.device}"
        )
    if batch > 0 and readable(lengths):
        low, high = (int(bound) for bound in lengths.aminmax())
        if low < 0 or high > length:
            raise ValueError(
                f"{op}: lengths should be between 0 and the number of steps {length}, got values "
                f"from {low} to {high}; pad the input or clamp the lengths"
            )
    return lengths.to(device)


def readable(tensor: Tensor) -> bool:
    """Whether values may be looked at: it would stall a GPU, break a graph, and stop a vmap."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def wrong_shape(op: str, name: str, wanted: str, got: Tensor) -> NoReturn:
    """Raise the error for a tensor of another shape."""
    raise RuntimeError(f"{op}: {name} should have shape {wanted}, got {list(got.shape)}")


def check_size(op: str, name: str, value: int, *, least: int) -> None:
    """Check that ``value`` is a whole number of at least ``least`` that 64 bits hold.

    Raises:
        TypeError: if it is no int.
        ValueError: if it is smaller, or larger than 2^63 - 1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} should be of type int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{op}: {name} should be {least} or more, got {value}")
    if value > sys.maxsize:
        raise ValueError(
            f"{op}: {name} should be at most 2^63 - 1, got {value}; no limit is needed: "
            "sys.maxsize is more than any sequence has"
        )


def check_flag(name: str, value: bool) -> None:
    """Check that ``value`` is a bool.

    Raises:
        TypeError: if it is not, in the words of ``nn.LSTM``.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


def check_sequence(op: str, input: object) -> None:
    """Check that a layer's input, which is not packed, is a tensor.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(input, Tensor):
        raise TypeError(
            f"{op}: input should be a Tensor or a PackedSequence, got {type(input).__name__}"
        )


def broadcasts(x: Tensor, wanted: Sequence[int]) -> bool:
    """Whether a tensor can be expanded to a shape."""
    sizes = zip(x.shape[::-1], wanted[::-1], strict=False)
    return x.dim() <= len(wanted) and all(size in (1, want) for size, want in sizes)


def check_pair(op: str, hx: object, kinds: str = "", name: str = "hx") -> None:
    """Check that ``hx`` is None or two tensors; ``kinds`` names what else it may be.

    Raises:
        RuntimeError: if it is another number of them.
        TypeError: if it is something else.
    """
    if hx is None:
        return
    parts = "(h_0, c_0)" if name == "hx" else "(h, c)"
    wanted = f"{op}: {name} should be {kinds}a pair {parts} of tensors or None"
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"{wanted}, got {type(hx).__name__}")
    if len(hx) != 2:
        raise RuntimeError(f"{wanted}, got a {type(hx).__name__} of {len(hx)}")
    if not all(isinstance(x, Tensor) for x in hx):
        got = " and ".join(type(x).__name__ for x in hx)
        raise TypeError(f"{wanted}, got a pair of {got}")


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that ``value`` is one of ``choices``.

    Raises:
        ValueError: if it is not.
    """
    if value not in choices:
        raise ValueError(
            f"{op}: {name} should be one of {', '.join(map(repr, choices))}, got {value!r}"
        )
