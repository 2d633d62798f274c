"""``bench lstm``: one LSTM layer, one direction, zero initial state."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn

import throughtime
from bench.operations.lstm_peers import PEERS
from bench.operations.operation import (
    OURS,
    Case,
    Contestant,
    Operation,
    Work,
    computed,
    fixed_mask,
    placed,
    random,
)

VERIFIED_STEPS, VERIFIED_GFLOP = 16, 10.0


def _case(T: int, B: int, I: int, H: int) -> Case:  # noqa: E741
    return Case(op="lstm", T=T, B=B, I=I, H=H)


class LSTM(Operation):
    name = kernel = "lstm"
    sizes: ClassVar = {"T": "steps", "B": "batch", "I": "features per step", "H": "units"}
    # Pixel by pixel MNIST and copying with T = 100, as in the h-detach paper, then wider.
    default = (
        *(_case(784, 100, 1, 128), _case(120, 100, 1, 128), _case(100, 64, 256, 256)),
        *(_case(100, 64, 512, 512), _case(100, 16, 1024, 1024), _case(300, 1, 128, 128)),
    )
    quick = (_case(120, 100, 1, 128), _case(50, 64, 256, 256), _case(300, 1, 128, 128))
    typical = Case(op="lstm", T=100, B=64, H=256)  # I is H
    peers = PEERS
    default_peers: tuple[str, ...] = ("torch",)
    ps: tuple[float, ...] = (0.0, 0.5)

    def gflop(self, impl: str, case: Case) -> float:
        """Those of the matrix products.

        Not counted: the recurrent product at step 0 (the initial state is zero), that of a detached
        step in the backward pass, elementwise work.
        """
        per_step = 8e-9 * case.B * case.H
        recurrent, projection = per_step * case.H * (case.T - 1), per_step * case.I * case.T
        forward = recurrent + projection
        backward = forward + (1 - (case.p or 0)) * recurrent + case.input_grad * projection
        return forward + (backward if case.trains else 0.0)

    def gbyte(self, impl: str, case: Case) -> float:
        """Input and weights read, output written; backward these, and gradients."""
        rows = case.T * case.B
        input, output = rows * case.I, rows * case.H
        weights = 4 * case.H * (case.I + case.H + 2)
        elements = input + weights + output
        if case.trains:
            elements += input + 2 * weights + 2 * output + (input if case.input_grad else 0)
        return 1e-9 * case.itemsize * elements

    def shortened(self, case: Case) -> Case:
        case = replace(case, T=min(case.T, VERIFIED_STEPS))
        while case.T > 2 and self.gflop(OURS, replace(case, p=0)) > VERIFIED_GFLOP:
            case = replace(case, T=case.T - 1)
        return case

    def ours(self, case: Case, backend: str) -> nn.Module:
        return throughtime.LSTM(case.I, case.H, backend=backend)

    def work(self, contestant: Contestant, case: Case, *, exact: bool = False) -> Work:
        """Weights, input and gradient of the output come from fixed seeds."""
        torch.manual_seed(0)
        if contestant.ours:
            layer = self.ours(case, contestant.backend or "auto")
        else:
            layer = self.peers[contestant.impl].make(case)
        layer = placed(layer, case, exact=exact)
        x = placed(random(case.T, case.B, case.I, seed=2), case, exact=exact)
        x.requires_grad_(case.input_grad)
        mask = fixed_mask(case.T, case.p) if hasattr(layer, "detach_prob") else None
        options = {} if mask is None else {"detach_mask": mask.to(case.device)}

        def call() -> dict[str, torch.Tensor]:
            output, state = layer(x, **options)
            states = dict(zip(("h_n", "c_n"), state, strict=True)) if case.op == "lstm" else {}
            return {"output": output, **states}

        weights = {name.removesuffix("_l0"): w for name, w in layer.named_parameters()}
        grad = placed(random(case.T, case.B, case.H, seed=3), case, exact=exact)
        leaves = ({"input": x} if case.input_grad else {}) | weights
        return Work(computed(call, case, exact=exact), leaves, grad)
