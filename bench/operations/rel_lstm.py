"""``bench rel-lstm``: one RelLSTM layer beside its authors' loop, and beside nn.LSTM in speed."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

import throughtime
from bench.operations import lstm
from bench.operations.authors_rel_lstm import AuthorsRelLSTM
from bench.operations.operation import (
    OURS,
    REFERENCE,
    Case,
    Contestant,
    Operation,
    Peer,
    Work,
    layer_work,
)

LOOP_ROWS = 20_000  # B * T beyond which a call of a Python loop takes many seconds
REPLACED_STEPS, MOST_STEPS = 32, 1024


def _case(T: int, B: int, I: int) -> Case:  # noqa: E741
    sizes: dict[str, Any] = {"H": 128, "window_size": 10, "top_k": 15}
    return Case(op="rel-lstm", T=T, B=B, I=I, score="additive", **sizes)


def pairs(steps: int, window_size: int, top_k: int) -> int:
    """(query, key) pairs of a sequence of ``steps`` queries, each of which has its own key too."""
    return sum(min(k, window_size) + min(max(k - window_size, 0), top_k) for k in range(steps + 1))


def screened(case: Case) -> Case:
    """The case at a T at which retained states are replaced: more than window plus top_k."""
    window_size, top_k = case.window_size or 0, case.top_k or 0
    return replace(case, T=min(case.T, window_size + top_k + REPLACED_STEPS, MOST_STEPS))


class RelLstm(Operation):
    """RelLSTM with an attention of H units."""

    name = "rel-lstm"
    kernel = "rel_lstm"
    sizes = MappingProxyType({
        "T": "steps", "B": "batch", "I": "features per step", "H": "units",
        "window_size": "latest states that a step attends",
        "top_k": "retained states that it attends",
    })  # fmt: skip
    # Copying with T = 300 and 100 (one-hot), pixel by pixel MNIST.
    default = (_case(320, 10, 10), _case(120, 64, 10), _case(784, 100, 1))
    quick = (_case(120, 10, 10),)
    typical = default[0]
    peers = MappingProxyType({
        "loop": Peer("authors' loop", detaches=True),
        "torch": Peer("nn.LSTM", same_function=False),
    })  # fmt: skip
    default_peers = ("loop", "torch")
    ps = (0.0,)

    def case(self, **columns: Any) -> Case:
        """The score is always additive."""
        return super().case(**{**columns, "score": "additive"})

    def why_not(self, contestant: Contestant, case: Case) -> str | None:
        """The Python loops take long."""
        if (contestant.impl == "loop" or contestant == REFERENCE) and case.queries > LOOP_ROWS:
            return "not measured: a Python loop, one call would take many seconds"
        return None

    def shortened(self, case: Case) -> Case:
        """See ``screened``."""
        return screened(case)

    def gflop(self, impl: str, case: Case) -> float:
        """An LSTM's; queries and keys; scores (the sum over w . tanh) and contexts.

        h-detach spares nothing: a detached step passes its gradient to the attention, which needs
        the product.
        """
        assert case.H and case.window_size and case.top_k is not None
        if impl == "torch":
            return lstm.gflop(case)
        projections = 2 * 2 * case.H**2 * case.B * (case.T - 1)
        attention = 4 * case.H * case.B * pairs(case.T - 1, case.window_size, case.top_k)
        return lstm.gflop(case) + 1e-9 * (projections + attention) * (3 if case.trains else 1)

    def gbyte(self, impl: str, case: Case) -> float:
        """An LSTM's, and the weights of the attention: read, with a backward pass also written."""
        assert case.H
        elements = 0 if impl == "torch" else (2 * case.H**2 + case.H) * (3 if case.trains else 1)
        return lstm.gbyte(case) + 1e-9 * case.itemsize * elements

    def work(self, contestant: Contestant, case: Case, *, exact: bool = False) -> Work:
        """Weights from seed 0."""
        assert case.I and case.H and case.window_size
        torch.manual_seed(0)
        layer: nn.Module
        if contestant.impl == "torch":
            layer = nn.LSTM(case.I, case.H)
        else:
            kind = throughtime.RelLSTM if contestant.impl == OURS else AuthorsRelLSTM
            backend: Any = contestant.backend or "auto"
            sizes: Any = {"window_size": case.window_size, "top_k": case.top_k}
            layer = kind(case.I, case.H, **sizes, backend=backend)
        return layer_work(layer, case, masked=self.detaches(contestant.impl), exact=exact)
