"""``bench lstm``: one LSTM layer beside nn.LSTM, Python loops and the nearest neighbours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench import cases, outside, peers
from bench.cases import Case
from bench.cell import DTYPES, OURS, Cell, Contestant, Work, fixed_mask, placed
from bench.operation import Operation

GATE_STEPS = 16
GATE_GFLOP = 10.0


class Lstm(Operation):
    """One layer, one direction, zero initial state."""

    name = "lstm"
    kernel = "lstm"
    heading = "T, B, I, H"
    labels: ClassVar[Mapping[str, str]] = {
        **{name: peer.label for name, peer in peers.PEERS.items() if name != OURS},
        **{name: peer.label for name, peer in outside.PEERS.items()},
    }
    default_peers = ("torch",)
    detaching_peers = ("loop", "compiled-loop")
    default_ps = (0.0, 0.5)
    sizes: ClassVar[Mapping[str, str]] = {
        "T": "steps",
        "B": "batch",
        "I": "features per step",
        "H": "units",
    }
    typical: ClassVar[Mapping[str, Sequence[int]]] = {"T": [100], "B": [64], "H": [256]}

    def default(self) -> Sequence[Case]:
        """``cases.DEFAULT``."""
        return cases.DEFAULT

    def quick(self) -> Sequence[Case]:
        """``cases.QUICK``."""
        return cases.QUICK

    def sweep(self) -> tuple[Sequence[Case], Sequence[Case]]:
        """``cases.sweep``."""
        return cases.sweep()

    def case(self, sizes: Mapping[str, Any]) -> Case:
        """A case from its fields."""
        return Case(**sizes)

    def from_columns(self, columns: Mapping[str, Any]) -> Case:
        """Without ``I`` the input is as wide as the state."""
        hidden = columns["H"]
        return Case(columns["T"], columns["B"], columns.get("I", hidden), hidden)

    def hidden_size(self, case: Case) -> int:
        """H."""
        return case.hidden_size

    def why_not(self, contestant: Contestant, cell: Cell) -> str | None:
        """What an outside peer needs."""
        if contestant.impl in outside.PEERS:
            return outside.PEERS[contestant.impl].why_not(cell.dtype, cell.device)
        return None

    def shortened(self, case: Case) -> Case:
        """At most ``GATE_STEPS`` steps and ``GATE_GFLOP``."""
        steps = min(case.steps, GATE_STEPS)
        while steps > 2 and _training_gflop(case, steps) > GATE_GFLOP:
            steps -= 1
        return dataclasses.replace(case, steps=steps)

    def gflop(self, impl: str, cell: Cell) -> float:
        """``cases.gflop``."""
        return cases.gflop(cell.case, cell.mode, cell.p, input_grad=cell.input_grad)

    def gbyte(self, impl: str, cell: Cell) -> float:
        """``cases.gbyte``."""
        size = DTYPES[cell.dtype].itemsize
        return cases.gbyte(cell.case, cell.mode, size, input_grad=cell.input_grad)

    def work(self, contestant: Contestant, cell: Cell, *, exact: bool = False) -> Work:
        """Weights from seed 0, input and output gradient from seed 2."""
        case: Case = cell.case
        layer = _layer(contestant, case)
        generator = torch.Generator().manual_seed(2)
        rows = (case.steps, case.batch)
        x = torch.randn(*rows, case.input_size, generator=generator)
        output_grad = torch.randn(*rows, case.hidden_size, generator=generator)
        x, output_grad = (placed(t, cell, exact=exact) for t in (x, output_grad))
        x.requires_grad_(cell.input_grad)
        layer = placed(layer, cell, exact=exact)
        mask = fixed_mask(case.steps, cell.p) if self.detaches(contestant.impl) else None
        options = {} if mask is None else {"detach_mask": mask.to(cell.device)}

        def call() -> dict[str, Tensor]:
            output, (h_n, c_n) = layer(x, **options)
            return {"output": output, "h_n": h_n, "c_n": c_n}

        leaves = {"input": x} if cell.input_grad else {}
        named = {name.removesuffix("_l0"): w for name, w in layer.named_parameters()}
        return Work(call, {**leaves, **named}, output_grad)


def _training_gflop(case: Case, steps: int) -> float:
    return cases.gflop(dataclasses.replace(case, steps=steps), "forward+backward")


def _layer(contestant: Contestant, case: Case) -> nn.Module:
    if contestant.impl in outside.PEERS:
        torch.manual_seed(0)
        return outside.PEERS[contestant.impl].make(case.input_size, case.hidden_size)
    return peers.build(
        contestant.impl,
        case.input_size,
        case.hidden_size,
        backend=contestant.backend or "auto",
        seed=0,
    )
