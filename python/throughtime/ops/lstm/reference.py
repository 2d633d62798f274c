"""Backend "reference" of the LSTM."""

from __future__ import annotations

from throughtime import reference
from throughtime.backends import requirements
from throughtime.backends.backend import Backend
from throughtime.ops.lstm.arguments import LstmArguments, LstmResults


def run(args: LstmArguments) -> LstmResults:
    """The definition in plain PyTorch."""
    given = args._asdict()
    del given["recompute"]
    starts = given.pop("reset_h"), given.pop("reset_c")
    given["reset_hx"] = None if args.reset_h is None else starts
    output, (h_n, c_n) = reference.lstm(hx=(given.pop("h_0"), given.pop("c_0")), **given)
    return LstmResults(output, h_n, c_n)


backend = Backend("reference", (requirements.floating_point,), run)
