"""Backend "reference" of the LSTM."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from throughtime import reference
from throughtime.backends import requirements
from throughtime.backends.backend import Backend
from throughtime.ops import watching
from throughtime.ops.lstm.arguments import LstmArguments, LstmCellsResults, LstmResults


def run(args: LstmArguments, observe: watching.Observe | None = None) -> LstmResults:
    """The definition in plain PyTorch, which calls ``observe(t, h_t, c_t)`` at every step."""
    given = args._asdict()
    del given["recompute"]
    starts = given.pop("reset_h"), given.pop("reset_c")
    given["reset_hx"] = None if args.reset_h is None else starts
    hx = given.pop("h_0"), given.pop("c_0")
    output, (h_n, c_n) = reference.lstm(hx=hx, observe=observe, **given)
    return LstmResults(output, h_n, c_n)


def run_cells(args: LstmArguments, observe: watching.Observe | None = None) -> LstmCellsResults:
    """The same with every c_t."""
    steps: dict[int, Tensor] = {}

    def keep(t: int, h_t: Tensor, c_t: Tensor) -> None:
        steps[t] = c_t
        if observe is not None:
            observe(t, h_t, c_t)

    results = run(args, keep)
    cells = torch.stack([steps[t] for t in range(len(steps))])
    if args.lengths is not None:
        position = torch.arange(len(steps), device=cells.device).view(-1, 1, 1)
        cells = torch.where(position < args.lengths.view(-1, 1), cells, 0.0)
    return LstmCellsResults(*results, cells.to(results.output.dtype))


backend = Backend(
    "reference",
    (requirements.floating_point,),
    partial(watching.watched, run),
    run_cells=partial(watching.watched, run_cells),
)
