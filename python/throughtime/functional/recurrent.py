"""What recurrent layers check of their tensors, in the words of ``nn.LSTM`` where it has them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from throughtime.functional.checks import (
    check_cast,
    check_state_dtype,
    check_weight_dtype,
    wrong_shape,
)

Named = Mapping[str, Tensor | None]
Shapes = Mapping[str, tuple[int, ...]]


def check_tensors(op: str, named: Named, optional: tuple[str, ...]) -> None:
    """Check that everything is a tensor, or None where it may be left out.

    Raises:
        TypeError: if something is neither.
    """
    for name, x in named.items():
        if not (isinstance(x, Tensor) or (x is None and name in optional)):
            raise TypeError(f"{op}: {name} should be a Tensor, got {type(x).__name__}")


def check_input(input: Tensor, weight_ih: Tensor) -> None:
    """Check the sizes of the input.

    Raises:
        RuntimeError: if one is wrong.
    """
    if input.dim() != 3:
        raise RuntimeError(f"input must have 3 dimensions, got {input.dim()}")
    if input.size(0) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if weight_ih.dim() == 2 and weight_ih.size(1) != input.size(2):
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {weight_ih.size(1)}, got {input.size(2)}"
        )


def check_weights(op: str, weights: Named, shapes: Shapes) -> None:
    """Check sizes of weights and biases.

    Raises:
        RuntimeError: if one is wrong.
    """
    for name, x in weights.items():
        if x is not None and tuple(x.shape) != shapes[name]:
            wrong_shape(op, name, str(list(shapes[name])), x)


def check_states(input: Tensor, hx: tuple[Tensor, Tensor] | None, *sizes: int) -> None:
    """Check sizes of ``(h_0, c_0)``; ``sizes`` are their numbers of features.

    Raises:
        RuntimeError: if one is wrong.
    """
    for k, x in enumerate(hx or ()):
        shape = (input.size(1), sizes[k])
        if tuple(x.shape) != shape:
            raise RuntimeError(f"Expected hidden[{k}] size {shape}, got {list(x.shape)}")


def check_devices(input: Tensor, kind: str, named: Named) -> None:
    """Check that everything is beside the input; ``kind`` is "parameter" or "hidden".

    Raises:
        RuntimeError: if something is not.
    """
    for name, x in named.items():
        if x is not None and x.device != input.device:
            raise RuntimeError(
                f"Input and {kind} tensors are not at the same device, found input tensor at "
                f"{input.device} and {kind} tensor at {x.device} ({name})"
            )


def check_dtypes(
    op: str, input: Tensor, weights: Named, states: Named, autocast: torch.dtype | None
) -> None:
    """Check that everything has the dtype of the input, or that autocast casts it.

    Raises:
        RuntimeError, ValueError: if something has not, under autocast and without.
    """
    if autocast is not None:
        check_cast(op, {name: x for name, x in {**weights, **states}.items() if x is not None})
        return
    for name, x in states.items():
        if x is not None:
            check_state_dtype(input, x, name)
    for name, x in weights.items():
        if x is not None:
            check_weight_dtype(input, x, name)


def per_sample(mask: Tensor | None, length: int, batch: int) -> Tensor | None:
    """A mask ``[T]`` or ``[T, B]`` as ``[T, B]``, without a copy."""
    if mask is None or mask.dim() == 2:
        return mask
    return mask.unsqueeze(1).expand(length, batch)
