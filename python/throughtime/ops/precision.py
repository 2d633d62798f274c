"""Backends that compute in float32 what is given in float16 or bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from throughtime import _ext
from throughtime.constant import constant_result
from throughtime.ops.record import DIFFERENTIABLE

Record = TypeVar("Record", bound=tuple[Any, ...])
Arguments = TypeVar("Arguments", bound=tuple[Any, ...])
Results = TypeVar("Results", bound=tuple[Any, ...])

LOW_PRECISION = (torch.float16, torch.bfloat16)


def cast(record: Record, dtype: torch.dtype, weights: torch.dtype | None = None) -> Record:
    """A record with its differentiable tensors in another dtype, weights in one of their own."""
    given = {name: getattr(record, name) for name in DIFFERENTIABLE[type(record)]}
    return record._replace(  # type: ignore[attr-defined, no-any-return]
        **{
            name: x.to(weights if weights and name.startswith(("weight", "bias")) else dtype)
            for name, x in given.items()
            if x is not None
        }
    )


@constant_result
def multiplies_bfloat16() -> bool:
    """Whether the CPU kernels that run here multiply bfloat16 faster than float32."""
    return _ext.extension is not None and _ext.extension.isa() in ("amx", "avx512_bf16")


def sums(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels that multiply bfloat16 add its numbers up."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def in_float32(
    run: Callable[[Arguments], Results],
    bfloat16: Callable[[Any], bool] = lambda args: False,
) -> Callable[[Arguments], Results]:
    """Make ``run``, which knows float32 and float64, take and give 16-bit numbers too.

    Args:
        run: a backend.
        bfloat16: whether it knows bfloat16 for a call, where the instruction set does.
    """

    def wrapped(args: Arguments) -> Results:
        dtype: torch.dtype = args[0].dtype
        if dtype not in LOW_PRECISION:
            return run(args)
        if dtype == torch.bfloat16 and multiplies_bfloat16() and bfloat16(args):
            return run(args)
        return cast(run(cast(args, torch.float32)), dtype)

    return wrapped
