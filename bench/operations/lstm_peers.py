"""The implementations of an LSTM that are compared, all with the parameters of ``torch.nn.LSTM``.

``loop`` is what people write by hand for h-detach. FlashRNN and Haste do not come with this
package. Where a peer orders its weights otherwise, they are reordered at every call, which is part
of its time.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import throughtime
from bench.operations.operation import Peer
from throughtime import masks

States = tuple[Tensor, tuple[Tensor, Tensor]]


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

    def forward(self, input: Tensor, *, detach_mask: Tensor | None = None) -> States:
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


class FlashLSTM(nn.LSTM):
    """FlashRNN's fused LSTM (Poeppel, Beck, Hochreiter, ICLR 2025, arXiv 2412.07752)."""

    def forward(self, input: Tensor) -> States:
        """Input ``[T, B, I]`` -> output ``[T, B, H]``, states ``[1, B, H]``."""
        steps, batch, _ = input.shape
        units = self.hidden_size
        gates_x = F.linear(input, self.weight_ih_l0).view(steps, batch, 4, 1, units)
        states, _ = importlib.import_module("flashrnn.flashrnn").flashrnn(
            gates_x.transpose(0, 1),  # [B, T, gates, heads, H]
            self.weight_hh_l0.view(4, 1, units, units),
            (self.bias_ih_l0 + self.bias_hh_l0).view(4, 1, units),
            function="lstm",
            backend="cuda_fused",
            dtype=str(input.dtype).removeprefix("torch."),
        )
        h, c = states.squeeze(3).transpose(1, 2)  # [h or c, B, T, heads, H] -> [T, B, H] each
        return h, (h[-1:], c[-1:])


class HasteLSTM(nn.LSTM):
    """Haste's LSTM (github.com/lmnt-com/haste), whose gates stand in the order i, g, f, o."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size)
        # In a list, so that its parameters, which every call replaces, are not ours.
        self._haste = [importlib.import_module("haste_pytorch").LSTM(input_size, hidden_size)]

    def forward(self, input: Tensor) -> States:
        """Input ``[T, B, I]`` -> output ``[T, B, H]``, states ``[1, B, H]``."""
        reordered = {}
        for name, weight in self.named_parameters():
            i, f, g, o = weight.chunk(4)
            reordered[name] = torch.cat([i, g, f, o])
        weights = {
            "kernel": reordered["weight_ih_l0"].t(),
            "recurrent_kernel": reordered["weight_hh_l0"].t(),
            "bias": reordered["bias_ih_l0"] + reordered["bias_hh_l0"],
        }
        result: States = torch.func.functional_call(self._haste[0], weights, (input,))
        return result


def _needs(module: str, *dtypes: str) -> Callable[[str, str], str | None]:
    """Why a peer for GPUs, in some dtypes, cannot run."""

    def why_not(dtype: str, device: str) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"not installed: there is no module {module}"
        if device != "cuda":
            return f"runs on cuda only, not on {device}"
        return None if dtype in dtypes else f"computes in {' and '.join(dtypes)} only, not {dtype}"

    return why_not


def _needs_compiler(dtype: str, device: str) -> str | None:
    if device == "cpu" and not shutil.which("c++"):
        return "torch.compile needs a C++ compiler, and there is no c++ here"
    return None


PEERS = {
    "torch": Peer("nn.LSTM", make=nn.LSTM),
    "loop": Peer("Python loop", detaches=True, make=LoopLSTM),
    "compiled-loop": Peer(
        "Python loop, step compiled", detaches=True, make=CompiledLoopLSTM, why_not=_needs_compiler
    ),
    "flashrnn": Peer(
        "FlashRNN", make=FlashLSTM, why_not=_needs("flashrnn", "float32", "bfloat16", "float16")
    ),
    "haste": Peer("Haste", make=HasteLSTM, why_not=_needs("haste_pytorch", "float32", "float64")),
}
