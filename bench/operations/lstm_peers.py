"""The implementations of an LSTM that are compared, all with the parameters of ``torch.nn.LSTM``.

``loop`` is what people write by hand for h-detach.
"""

from __future__ import annotations

import functools
import shutil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import throughtime
from bench.operations.operation import Case, Peer
from throughtime import masks


def lstm_step(gates_x: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor) -> tuple[Tensor, Tensor]:
    """One step: projected input ``[B, 4H]`` and states ``[B, H]`` to the next states."""
    i, f, g, o = (gates_x + F.linear(h, weight_hh)).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


class LoopLSTM(throughtime.LSTM):
    """``throughtime.LSTM`` computed by a Python loop: one layer, one direction, zero initial state.

    Source: Kanuparthi et al., ICLR 2019 (arXiv 1810.03023), Algorithm 1.
    """

    step = staticmethod(lstm_step)

    def forward(
        self, input: Tensor, *, detach_mask: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Input ``[T, B, I]``, mask bool ``[T]`` -> output ``[T, B, H]``, states ``[1, B, H]``."""
        steps, batch, _ = input.shape
        draws = self.training and self.detach_prob > 0 and torch.is_grad_enabled()
        if detach_mask is None and draws:
            detach_mask = masks.detach_mask(steps, self.detach_prob, device=input.device)
        detached = [False] * steps if detach_mask is None else detach_mask.tolist()
        h = c = input.new_zeros(batch, self.hidden_size)
        gates_x = F.linear(input, self.weight_ih_l0, self.bias_ih_l0 + self.bias_hh_l0)
        outputs = []
        for gates_x_t, detach in zip(gates_x.unbind(0), detached, strict=True):
            h, c = self.step(gates_x_t, h.detach() if detach else h, c, self.weight_hh_l0)
            outputs.append(h)
        return torch.stack(outputs), (h.unsqueeze(0), c.unsqueeze(0))


@functools.cache
def _compiled_step() -> Any:
    return torch.compile(lstm_step, dynamic=False)


class CompiledLoopLSTM(LoopLSTM):
    """``LoopLSTM`` with a compiled step; a compiled loop would take minutes for every new T."""

    @staticmethod
    def step(gates_x: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor) -> tuple[Tensor, Tensor]:
        new: tuple[Tensor, Tensor] = _compiled_step()(gates_x, h, c, weight_hh)
        return new


class AcceleratedLSTM(nn.LSTM):
    """``nn.LSTM`` on our kernels, by a handle of its own at every call (35 us)."""

    def forward(self, input: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # type: ignore[override]
        with throughtime.accelerate():
            result: tuple[Tensor, tuple[Tensor, Tensor]] = super().forward(input)
            return result


def _needs_compiler(case: Case) -> str | None:
    if case.device == "cpu" and not shutil.which("c++"):
        return "torch.compile needs a C++ compiler, and there is no c++ here"
    return None


PEERS = {
    "torch": Peer("nn.LSTM", lambda case: nn.LSTM(case.I, case.H)),
    "accelerated": Peer(
        "nn.LSTM, accelerated", lambda case: AcceleratedLSTM(case.I, case.H)
    ),
    "loop": Peer("Python loop", lambda case: LoopLSTM(case.I, case.H), detaches=True),
    "compiled-loop": Peer(
        "Python loop, step compiled", lambda case: CompiledLoopLSTM(case.I, case.H), detaches=True,
        why_not=_needs_compiler,
    ),
}  # fmt: skip
