"""Backends that compute in float32 what is given in float16 or bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from throughtime.ops.record import DIFFERENTIABLE

Record = TypeVar("Record", bound=tuple[Any, ...])
Arguments = TypeVar("Arguments", bound=tuple[Any, ...])
Results = TypeVar("Results", bound=tuple[Any, ...])

LOW_PRECISION = (torch.float16, torch.bfloat16)


def cast(record: Record, dtype: torch.dtype) -> Record:
    """A record with its differentiable tensors in another dtype."""
    given = {name: getattr(record, name) for name in DIFFERENTIABLE[type(record)]}
    return record._replace(  # type: ignore[attr-defined, no-any-return]
        **{name: x.to(dtype) for name, x in given.items() if x is not None}
    )


def in_float32(run: Callable[[Arguments], Results]) -> Callable[[Arguments], Results]:
    """Make ``run``, which knows float32 and float64, take and give 16-bit numbers too."""

    def wrapped(args: Arguments) -> Results:
        dtype: torch.dtype = args[0].dtype
        if dtype not in LOW_PRECISION:
            return run(args)
        return cast(run(cast(args, torch.float32)), dtype)

    return wrapped
