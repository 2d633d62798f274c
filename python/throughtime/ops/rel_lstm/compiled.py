"""Backends "cpu" and "triton" of RelLSTM.

Implementations: ``csrc/rel_lstm/cpu``, and under names that end in ``_triton``
``triton_kernels/rel_lstm.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from throughtime.backends import requirements
from throughtime.backends.backend import Backend
from throughtime.ops import cpu_plan
from throughtime.ops.operation import Operation
from throughtime.ops.precision import in_float32, multiplies_bfloat16
from throughtime.ops.record import Real, Size, Sizes
from throughtime.ops.rel_lstm import reference
from throughtime.ops.rel_lstm.arguments import RelLstmArguments, RelLstmResults, dtype_of_sums
from throughtime.ops.relevancy.arguments import SCREENING
from throughtime.ops.trace import Trace
from throughtime.ops.triton import implementation

_UNITS = 16  # kRelLstmUnits of csrc/rel_lstm/cpu/params.h


def _saved_by_cpu(sizes: Sizes, args: Any) -> Size:
    """saved_numbers of csrc/rel_lstm/cpu/params.h."""
    units, attention = ((sizes[x] + _UNITS - 1) // _UNITS * _UNITS for x in "HA")
    keys = (sizes["P"] + sizes["T"]) * (units + attention + _UNITS)
    return sizes["B"] * (keys + sizes["T"] * (6 * units + attention))


def _saved_by_triton(sizes: Sizes, args: Any) -> Size:
    module = import_module("throughtime.triton_kernels.rel_lstm")
    return int(module.saved_numbers(*(sizes[x] for x in "TBPHA")))


def _operation(
    saved: Callable[[Sizes, Any], Size], **options: Any
) -> Operation[RelLstmArguments, RelLstmResults]:
    return Operation(
        "rel_lstm",
        "RelLSTM",
        RelLstmArguments,
        RelLstmResults,
        reference.run,
        saved={"saved": Real("saved", dtype=dtype_of_sums, differentiable=False)},
        needs=("input", "weights"),
        derived={**SCREENING, "saved": saved},
        **options,
    )


rel_lstm = _operation(_saved_by_cpu)
trace = Trace(rel_lstm, "rel_lstm")

cpu = Backend(
    "cpu",
    (
        requirements.cpu_tensors,
        requirements.lstm_cell,
        requirements.dtypes("compiled CPU kernels"),
        requirements.cpu_kernels,
    ),
    in_float32(rel_lstm, bfloat16=lambda args: True),
    describe=cpu_plan.rel_lstm,
    float32_weights=lambda dtype: dtype == torch.bfloat16 and multiplies_bfloat16(),
)

triton = Backend(
    "triton",
    (
        requirements.lstm_cell,
        requirements.dtypes("Triton kernels"),
        requirements.triton,
    ),
    in_float32(
        _operation(
            _saved_by_triton,
            suffix="_triton",
            forward=implementation("rel_lstm", "forward"),
            backward=implementation("rel_lstm", "backward"),
        )
    ),
)
