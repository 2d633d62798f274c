"""``bench rel-lstm``: one RelLSTM layer beside its authors' loop, and beside nn.LSTM in speed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

import throughtime
from bench.operations.authors_rel_lstm import AuthorsRelLSTM
from bench.operations.lstm import LSTM
from bench.operations.operation import Case, Operation, Peer

LOOP_ROWS = 20_000  # B * T beyond which a call of a Python loop takes many seconds
SIZES: dict[str, Any] = {"H": 128, "window_size": 10, "top_k": 15, "score": "additive"}


def _case(T: int, B: int, I: int) -> Case:  # noqa: E741
    return Case(op="rel-lstm", T=T, B=B, I=I, **SIZES)


def pairs(steps: int, window_size: int, top_k: int, screen_every: int = 1) -> int:
    """(query, key) pairs of a sequence of ``steps`` queries, each of which has its own key too."""
    total = 0
    for k in range(1, steps + 1):  # keys so far
        left = max(k - window_size, 0)
        pending = min(left, (k - 1) % screen_every)
        total += min(k, window_size) + pending + min(left - pending, top_k)
    return total


def too_long(case: Case) -> str | None:
    if case.queries > LOOP_ROWS:
        return "not measured: a Python loop, one call would take many seconds"
    return None


def authors(case: Case) -> nn.Module:
    return AuthorsRelLSTM(case.I, case.H, window_size=case.window_size, top_k=case.top_k)


class RelLSTM(LSTM):
    name, kernel = "rel-lstm", "rel_lstm"
    sizes: ClassVar = LSTM.sizes | {
        "window_size": "latest states attended",
        "top_k": "retained states attended",
    }
    # Copying with T = 300 and 100 (one-hot), pixel by pixel MNIST.
    default = (_case(320, 10, 10), _case(120, 64, 10), _case(784, 100, 1))
    quick = (_case(120, 10, 10),)
    typical = default[0]
    peers: ClassVar = {
        "loop": Peer("authors' loop", authors, detaches=True, why_not=too_long),
        "torch": replace(LSTM.peers["torch"], same_function=False),
    }
    default_peers = ("loop", "torch")
    ps = (0.0,)
    shortened = Operation.shortened
    reference_why_not = staticmethod(too_long)

    def gflop(self, impl: str, case: Case) -> float:
        """An LSTM's; queries and keys; scores (the sum over w . tanh) and contexts.

        h-detach spares nothing: a detached step passes its gradient to the attention, which needs
        the product.
        """
        own = super().gflop(impl, replace(case, p=0))
        projections = 2 * 2 * case.H**2 * case.B * (case.T - 1)
        attention = 4 * case.H * case.B * pairs(case.T - 1, case.window_size, case.top_k)
        more = 1e-9 * (projections + attention) * (3 if case.trains else 1)
        return own if impl == "torch" else own + more

    def gbyte(self, impl: str, case: Case) -> float:
        """An LSTM's, and the weights of the attention: read, with a backward pass also written."""
        elements = 0 if impl == "torch" else (2 * case.H**2 + case.H) * (3 if case.trains else 1)
        return super().gbyte(impl, case) + 1e-9 * case.itemsize * elements

    def ours(self, case: Case, backend: str) -> nn.Module:
        options: Any = {"window_size": case.window_size, "top_k": case.top_k, "backend": backend}
        return throughtime.RelLSTM(case.I, case.H, **options)
