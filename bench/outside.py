"""Peers of ``bench lstm`` that a machine may lack: a compiled loop, FlashRNN, Haste.

None of them comes with this package and none is needed by it. All have the parameters of
``torch.nn.LSTM``, so that their gradients can be checked; where a peer orders its weights
otherwise, they are reordered at every call, which is part of its time.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers import LoopLSTM, lstm_step

States = tuple[Tensor, tuple[Tensor, Tensor]]


@functools.cache
def _compiled_step() -> Any:
    return torch.compile(lstm_step, dynamic=False)


class CompiledLoopLSTM(LoopLSTM):
    """``LoopLSTM`` with a compiled step.

    Not the whole loop: ``torch.compile`` unrolls that, and compiles for minutes at a few hundred
    steps, anew for every T.
    """

    @staticmethod
    def step(gates_x: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor) -> tuple[Tensor, Tensor]:
        """``peers.lstm_step``, compiled."""
        new: tuple[Tensor, Tensor] = _compiled_step()(gates_x, h, c, weight_hh)
        return new


class FlashLSTM(nn.LSTM):
    """FlashRNN's fused LSTM (Poeppel, Beck, Hochreiter, ICLR 2025, arXiv 2412.07752).

    It takes what the input gives to the gates, which a matrix product computes here.
    """

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor

    def forward(self, input: Tensor) -> States:  # type: ignore[override]
        """Input ``[T, B, I]`` -> output ``[T, B, H]``, states ``[1, B, H]``."""
        steps, batch, _ = input.shape
        units = self.hidden_size
        gates_x = F.linear(input, self.weight_ih_l0).view(steps, batch, 4, 1, units)
        bias = (self.bias_ih_l0 + self.bias_hh_l0).view(4, 1, units)
        states, _ = importlib.import_module("flashrnn.flashrnn").flashrnn(
            gates_x.transpose(0, 1),  # [B, T, gates, heads, H]
            self.weight_hh_l0.view(4, 1, units, units),
            bias,
            function="lstm",
            backend="cuda_fused",
            dtype=str(input.dtype).removeprefix("torch."),
        )
        h, c = states.squeeze(3).transpose(1, 2)  # [h or c, B, T, heads, H] -> [T, B, H] each
        return h, (h[-1:], c[-1:])


class HasteLSTM(nn.LSTM):
    """Haste's LSTM (github.com/lmnt-com/haste), whose gates stand in the order i, g, f, o."""

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        # In a list, for its parameters are not ours: they are replaced at every call.
        self._haste = [importlib.import_module("haste_pytorch").LSTM(input_size, hidden_size)]

    def forward(self, input: Tensor) -> States:  # type: ignore[override]
        """Input ``[T, B, I]`` -> output ``[T, B, H]``, states ``[1, B, H]``."""
        bias = self.bias_ih_l0 + self.bias_hh_l0
        weights = {
            "kernel": _haste_order(self.weight_ih_l0).t(),
            "recurrent_kernel": _haste_order(self.weight_hh_l0).t(),
            "bias": _haste_order(bias),
        }
        result: States = torch.func.functional_call(self._haste[0], weights, (input,))
        return result


def _haste_order(weight: Tensor) -> Tensor:
    i, f, g, o = weight.chunk(4)
    return torch.cat([i, g, f, o])


@dataclass(frozen=True)
class OutsidePeer:
    """How to build a peer, and what it needs."""

    label: str
    make: Callable[[int, int], nn.Module]
    module: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "float64", "bfloat16", "float16")
    detaches: bool = False

    def why_not(self, dtype: str, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"not installed: there is no module {self.module}"
        if self.make is CompiledLoopLSTM and device == "cpu" and not shutil.which("c++"):
            return "torch.compile needs a C++ compiler, and there is no c++ here"
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only, not on {device}"
        if dtype not in self.dtypes:
            return f"computes in {' and '.join(self.dtypes)} only, not in {dtype}"
        return None


PEERS = {
    "compiled-loop": OutsidePeer("Python loop, step compiled", CompiledLoopLSTM, detaches=True),
    "flashrnn": OutsidePeer(
        "FlashRNN", FlashLSTM, "flashrnn", ("cuda",), ("float32", "bfloat16", "float16")
    ),
    "haste": OutsidePeer("Haste", HasteLSTM, "haste_pytorch", ("cuda",), ("float32", "float64")),
}
