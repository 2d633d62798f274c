"""Backend "cpu" of the LSTM, implemented in ``csrc/lstm/cpu``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from throughtime.backends import requirements
from throughtime.backends.backend import Backend
from throughtime.ops import cpu_plan
from throughtime.ops.lstm import reference
from throughtime.ops.lstm.arguments import LstmArguments, LstmCellsResults, LstmResults
from throughtime.ops.operation import Operation
from throughtime.ops.precision import in_float32, multiplies_bfloat16
from throughtime.ops.record import Real, Size, Sizes
from throughtime.ops.trace import Trace


def _saved(sizes: Sizes, args: LstmArguments) -> Size:
    """saved_size of csrc/lstm/cpu/operators.cpp: i, f, g, o, c in padded units, and a mark.

    bfloat16 kernels save float32 numbers too: three of each unit, or c alone.
    """
    units = sizes["T"] * sizes["B"] * ((sizes["H"] + 15) // 16 * 16)
    narrow = args.input.dtype == torch.bfloat16
    per_unit = 1 if args.recompute else 3 if narrow else 5
    return (2 if narrow else 1) * (per_unit * units + 1)


_OPTIONS: dict[str, Any] = {
    "saved": {"saved": Real("saved", differentiable=False)},
    "needs": ("input", "weights", "reset"),
    "derived": {"saved": _saved},
}
lstm = Operation("lstm", "LSTM", LstmArguments, LstmResults, reference.run, **_OPTIONS)
lstm_cells = Operation(
    "lstm_cells", "LSTM", LstmArguments, LstmCellsResults, reference.run_cells, **_OPTIONS
)


trace = Trace(lstm_cells, "lstm")


def _kept(results: Any, args: LstmArguments) -> Any:
    """The results of a call whose user may overwrite its output."""
    output: Tensor = results.output
    if output.requires_grad and (args.weight_hr is not None or output.dtype == torch.float64):
        # The backward reads the output, and nn.LSTM lets its user overwrite it in these cases.
        return results._replace(output=output.clone())
    return results


@partial(in_float32, bfloat16=lambda args: True)
def run(args: LstmArguments) -> LstmResults:
    """The compiled kernels."""
    found: LstmResults = _kept(lstm(args), args)
    return found


@partial(in_float32, bfloat16=lambda args: True)
def run_cells(args: LstmArguments) -> LstmCellsResults:
    """The compiled kernels, with every c_t."""
    found: LstmCellsResults = _kept(lstm_cells(args), args)
    return found


backend = Backend(
    "cpu",
    (
        requirements.cpu_tensors,
        requirements.lstm_cell,
        requirements.dtypes("compiled CPU kernels"),
        requirements.cpu_kernels,
    ),
    run,
    run_cells=run_cells,
    describe=cpu_plan.lstm,
    recomputes=True,
    float32_weights=lambda dtype: dtype == torch.bfloat16 and multiplies_bfloat16(),
)
