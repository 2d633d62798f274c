"""``bench lstm``: one LSTM layer, one direction, zero initial state."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

import throughtime
from bench.operations.lstm_peers import PEERS
from bench.operations.operation import OURS, Case, Contestant, Operation, Work, layer_work

VERIFIED_STEPS, VERIFIED_GFLOP = 16, 10.0
# T, B, I, H: pixel by pixel MNIST and copying with T = 100, as in the h-detach paper, then wider.
DEFAULT = (
    *((784, 100, 1, 128), (120, 100, 1, 128), (100, 64, 256, 256)),
    *((100, 64, 512, 512), (100, 16, 1024, 1024), (300, 1, 128, 128)),
)
QUICK = ((120, 100, 1, 128), (50, 64, 256, 256), (300, 1, 128, 128))


def _case(T: int, B: int, I: int, H: int) -> Case:  # noqa: E741
    return Case(op="lstm", T=T, B=B, I=I, H=H)


def gflop(impl: str, case: Case) -> float:
    """10^9 operations of the matrix products.

    Not counted: the recurrent product at step 0 (the initial state is zero), that of a detached
    step in the backward pass, elementwise work.
    """
    per_step = 8e-9 * case.B * case.H
    recurrent, projection = per_step * case.H * (case.T - 1), per_step * case.I * case.T
    forward = recurrent + projection
    backward = forward + (1 - (case.p or 0)) * recurrent + case.input_grad * projection
    return forward + (backward if case.trains else 0.0)


def gbyte(impl: str, case: Case) -> float:
    """10^9 bytes: input and weights read, output written; backward these, and gradients."""
    rows = case.T * case.B
    input, output = rows * case.I, rows * case.H
    weights = 4 * case.H * (case.I + case.H + 2)
    elements = input + weights + output
    if case.trains:
        elements += input + 2 * weights + 2 * output + (input if case.input_grad else 0)
    return 1e-9 * case.itemsize * elements


def shortened(case: Case) -> Case:
    case = replace(case, T=min(case.T, VERIFIED_STEPS))
    while case.T > 2 and gflop(OURS, replace(case, p=0)) > VERIFIED_GFLOP:
        case = replace(case, T=case.T - 1)
    return case


def work(contestant: Contestant, case: Case, *, exact: bool = False) -> Work:
    def make() -> nn.Module:
        if not contestant.ours:
            return PEERS[contestant.impl].make(case)
        return throughtime.LSTM(case.I, case.H, backend=contestant.backend or "auto")

    return layer_work(make, case, exact=exact)


LSTM = Operation(
    name="lstm",
    kernel="lstm",
    sizes={"T": "steps", "B": "batch", "I": "features per step", "H": "units"},
    default=[_case(*sizes) for sizes in DEFAULT],
    quick=[_case(*sizes) for sizes in QUICK],
    typical=Case(op="lstm", T=100, B=64, H=256),  # I is H
    peers=PEERS,
    default_peers=("torch",),
    gflop=gflop,
    gbyte=gbyte,
    work=work,
    shortened=shortened,
    ps=(0.0, 0.5),
)
