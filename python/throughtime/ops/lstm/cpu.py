"""Backend "cpu" of the LSTM, implemented in ``csrc/lstm/cpu``."""

from __future__ import annotations

import torch

from throughtime.backends import requirements
from throughtime.backends.backend import Backend
from throughtime.ops.lstm import reference
from throughtime.ops.lstm.arguments import LstmArguments, LstmResults
from throughtime.ops.operation import Operation
from throughtime.ops.precision import in_float32
from throughtime.ops.record import Real, Size, Sizes


def _saved(sizes: Sizes, args: LstmArguments) -> Size:
    """saved_numbers of csrc/lstm/cpu/params.h: i, f, g, o and c in padded units, and a mark."""
    units = (sizes["H"] + 15) // 16 * 16
    return 5 * sizes["T"] * sizes["B"] * units + 1


lstm = Operation(
    "lstm",
    "LSTM",
    LstmArguments,
    LstmResults,
    reference.run,
    saved={"saved": Real("saved", differentiable=False)},
    needs=("input", "weights"),
    derived={"saved": _saved},
)


@in_float32
def run(args: LstmArguments) -> LstmResults:
    """The compiled kernels."""
    results = lstm(args)
    output = results.output
    if output.requires_grad and (args.weight_hr is not None or output.dtype == torch.float64):
        # The backward reads the output, and nn.LSTM lets its user overwrite it in these cases.
        return results._replace(output=output.clone())
    return results


backend = Backend(
    "cpu",
    (
        requirements.cpu_tensors,
        requirements.lstm_cell,
        requirements.dtypes("compiled CPU kernels"),
        requirements.cpu_kernels,
    ),
    run,
)
