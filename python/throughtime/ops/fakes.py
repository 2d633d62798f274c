"""What fake implementations check, as the real ones do.

A single tensor on ``meta`` is enough for torch to take the fake implementation, whose results would
then go on as if they were numbers.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor


def _refuse_none(op: str, name: str) -> NoReturn:
    """A schema's ``Tensor`` takes None too."""
    raise RuntimeError(f"throughtime::{op}: {name} should be a tensor, got None")


def check_dims(op: str, name: str, tensor: Tensor | None, letters: str) -> None:
    """Check that ``tensor`` has as many dimensions as ``letters`` names: ``"T, B, I"``.

    Raises:
        RuntimeError: if it has another number.
    """
    if tensor is None:
        _refuse_none(op, name)
    if tensor.dim() != len(letters.split(", ")):
        raise RuntimeError(
            f"throughtime::{op}: {name} should be [{letters}], got {tensor.dim()} dimensions"
        )


def check_sizes(
    op: str, first: Tensor, **named: tuple[Tensor | None, tuple[int | torch.SymInt, ...]]
) -> None:
    """Check that tensors are beside ``first`` and have the sizes given with each.

    Raises:
        RuntimeError: if one is elsewhere, has other sizes, or is None where the schema has none.
    """
    schema = getattr(torch.ops.throughtime, op).default._schema
    optional = {given.name for given in schema.arguments if given.type.kind() == "OptionalType"}
    for name, (tensor, sizes) in named.items():
        if tensor is None and name not in optional:
            _refuse_none(op, name)
        if tensor is None:
            continue
        if tensor.device != first.device:
            raise RuntimeError(
                f"throughtime::{op}: {name} should be on {first.device}, as the others are, got "
                f"{tensor.device}"
            )
        text = (
            f"throughtime::{op}: {name} should have shape {list(sizes)}, got {list(tensor.shape)}"
        )
        if tensor.dim() != len(sizes):
            raise RuntimeError(text)
        for size, wanted in zip(tensor.shape, sizes, strict=True):
            # Sizes that only a run will tell are compared there.
            torch._check(size == wanted, text.__str__)  # type: ignore[no-untyped-call]
