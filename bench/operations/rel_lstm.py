"""``bench rel-lstm``: one RelLSTM layer beside its authors' loop, and beside nn.LSTM in speed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

import throughtime
from bench.operations import lstm
from bench.operations.authors_rel_lstm import AuthorsRelLSTM
from bench.operations.operation import Case, Contestant, Operation, Peer, Work, layer_work

LOOP_ROWS = 20_000  # B * T beyond which a call of a Python loop takes many seconds
REPLACED_STEPS, MOST_STEPS = 32, 1024
SIZES: dict[str, Any] = {"H": 128, "window_size": 10, "top_k": 15, "score": "additive"}
# T, B, I: copying with T = 300 and 100 (one-hot), pixel by pixel MNIST.
DEFAULT, QUICK = ((320, 10, 10), (120, 64, 10), (784, 100, 1)), ((120, 10, 10),)


def _case(T: int, B: int, I: int) -> Case:  # noqa: E741
    return Case(op="rel-lstm", T=T, B=B, I=I, **SIZES)


def pairs(steps: int, window_size: int, top_k: int) -> int:
    """(query, key) pairs of a sequence of ``steps`` queries, each of which has its own key too."""
    return sum(min(k, window_size) + min(max(k - window_size, 0), top_k) for k in range(steps + 1))


def screened(case: Case) -> Case:
    """The case at a T at which retained states are replaced: more than window plus top_k."""
    window_size, top_k = case.window_size or 0, case.top_k or 0
    return replace(case, T=min(case.T, window_size + top_k + REPLACED_STEPS, MOST_STEPS))


def too_long(case: Case) -> str | None:
    if case.queries > LOOP_ROWS:
        return "not measured: a Python loop, one call would take many seconds"
    return None


def gflop(impl: str, case: Case) -> float:
    """An LSTM's; queries and keys; scores (the sum over w . tanh) and contexts.

    h-detach spares nothing: a detached step passes its gradient to the attention, which needs the
    product.
    """
    own = lstm.gflop(impl, replace(case, p=0))
    projections = 2 * 2 * case.H**2 * case.B * (case.T - 1)
    attention = 4 * case.H * case.B * pairs(case.T - 1, case.window_size, case.top_k)
    more = 1e-9 * (projections + attention) * (3 if case.trains else 1)
    return own if impl == "torch" else own + more


def gbyte(impl: str, case: Case) -> float:
    """An LSTM's, and the weights of the attention: read, with a backward pass also written."""
    elements = 0 if impl == "torch" else (2 * case.H**2 + case.H) * (3 if case.trains else 1)
    return lstm.gbyte(impl, case) + 1e-9 * case.itemsize * elements


def work(contestant: Contestant, case: Case, *, exact: bool = False) -> Work:
    def make() -> nn.Module:
        if contestant.impl == "torch":
            return nn.LSTM(case.I, case.H)
        kind = throughtime.RelLSTM if contestant.ours else AuthorsRelLSTM
        options: Any = {"window_size": case.window_size, "top_k": case.top_k}
        return kind(case.I, case.H, **options, backend=contestant.backend or "auto")

    return layer_work(make, case, exact=exact)


REL_LSTM = Operation(
    name="rel-lstm",
    kernel="rel_lstm",
    sizes=lstm.LSTM.sizes
    | {"window_size": "latest states attended", "top_k": "retained states attended"},
    default=[_case(*sizes) for sizes in DEFAULT],
    quick=[_case(*sizes) for sizes in QUICK],
    typical=_case(*DEFAULT[0]),
    peers={
        "loop": Peer("authors' loop", detaches=True, why_not=too_long),
        "torch": Peer("nn.LSTM", same_function=False),
    },
    default_peers=("loop", "torch"),
    gflop=gflop,
    gbyte=gbyte,
    work=work,
    shortened=screened,
    reference_why_not=too_long,
    ps=(0.0,),
)
