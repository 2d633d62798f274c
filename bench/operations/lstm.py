"""``bench lstm``: one LSTM layer, one direction, zero initial state."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

import torch

from bench.operations import lstm_peers
from bench.operations.operation import Case, Contestant, Operation, Work, layer_work

VERIFIED_STEPS, VERIFIED_GFLOP = 16, 10.0
SWEEP = {"T": (10, 100, 500, 2000), "B": (1, 8, 64, 256), "H": (8, 32, 128, 512, 2048)}
SWEEP_GFLOP = 120.0  # the largest corner alone would take an hour


def _cases(*sizes: tuple[int, int, int, int]) -> Sequence[Case]:
    return tuple(Case(op="lstm", T=t, B=b, I=i, H=h) for t, b, i, h in sizes)


def gflop(case: Case, p: float = 0.0) -> float:
    """10^9 operations of the matrix products.

    Not counted: the recurrent product at step 0 (the initial state is zero), that of a detached
    step in the backward pass, elementwise work.
    """
    assert case.I and case.H
    per_step = 8e-9 * case.B * case.H
    recurrent, projection = per_step * case.H * (case.T - 1), per_step * case.I * case.T
    forward = recurrent + projection
    backward = forward + (1 - p) * recurrent + (projection if case.input_grad else 0.0)
    return forward + (backward if case.trains else 0.0)


def gbyte(case: Case) -> float:
    """10^9 bytes: input and weights read, output written; backward these, and gradients."""
    assert case.I and case.H
    rows = case.T * case.B
    input, output = rows * case.I, rows * case.H
    weights = 4 * case.H * (case.I + case.H + 2)
    elements = input + weights + output
    if case.trains:
        elements += input + 2 * weights + 2 * output + (input if case.input_grad else 0)
    return 1e-9 * case.itemsize * elements


class Lstm(Operation):
    """LSTM with h-detach."""

    name = "lstm"
    kernel = "lstm"
    sizes = MappingProxyType({"T": "steps", "B": "batch", "I": "features per step", "H": "units"})
    typical = Case(op="lstm", T=100, B=64, H=256)  # I is H
    # Pixel by pixel MNIST and copying with T = 100, as in the h-detach paper, then wider layers.
    default = _cases(
        *((784, 100, 1, 128), (120, 100, 1, 128), (100, 64, 256, 256)),
        *((100, 64, 512, 512), (100, 16, 1024, 1024), (300, 1, 128, 128)),
    )
    quick = _cases((120, 100, 1, 128), (50, 64, 256, 256), (300, 1, 128, 128))
    peers = MappingProxyType(lstm_peers.PEERS)
    default_peers = ("torch",)
    ps = (0.0, 0.5)

    def sweep(self) -> Sequence[Case]:
        """A grid without the shapes beyond ``SWEEP_GFLOP``."""
        grid = [self.case(T=t, B=b, H=h) for t, b, h in itertools.product(*SWEEP.values())]
        return [case for case in grid if gflop(case) <= SWEEP_GFLOP]

    def shortened(self, case: Case) -> Case:
        """At most ``VERIFIED_STEPS`` steps and ``VERIFIED_GFLOP``."""
        case = replace(case, T=min(case.T, VERIFIED_STEPS))
        while case.T > 2 and gflop(case) > VERIFIED_GFLOP:
            case = replace(case, T=case.T - 1)
        return case

    def gflop(self, impl: str, case: Case) -> float:
        """See ``gflop``."""
        return gflop(case, case.p or 0.0)

    def gbyte(self, impl: str, case: Case) -> float:
        """See ``gbyte``."""
        return gbyte(case)

    def work(self, contestant: Contestant, case: Case, *, exact: bool = False) -> Work:
        """Weights from seed 0."""
        assert case.I and case.H
        torch.manual_seed(0)
        layer = lstm_peers.build(contestant.impl, case.I, case.H, backend=contestant.backend)
        return layer_work(layer, case, masked=self.detaches(contestant.impl), exact=exact)
