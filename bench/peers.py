"""The implementations that are compared, all built on the same weights.

``throughtime`` is this package, ``torch`` is ``torch.nn.LSTM``, ``loop`` is what people write by
hand when they want h-detach: a Python loop over LSTM cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import throughtime
from throughtime import masks


def lstm_step(gates_x: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor) -> tuple[Tensor, Tensor]:
    """One step by hand: what the input gives to the gates ``[B, 4H]``, states ``[B, H]``."""
    gates = gates_x + F.linear(h, weight_hh)
    i, f, g, o = gates.chunk(4, dim=1)  # each [B, H]
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


class LoopLSTM(throughtime.LSTM):
    """``throughtime.LSTM`` with the forward pass that people write by hand.

    One layer, one direction, zero initial state. Weights, ``detach_prob`` and the mask that a
    seed draws are those of ``throughtime.LSTM``; only the computation is a Python loop.

    Source: Kanuparthi et al., ICLR 2019 (arXiv 1810.03023), Algorithm 1.

    Example:
        >>> layer = LoopLSTM(3, 4, detach_prob=0.5)
        >>> output, (h_n, c_n) = layer(torch.zeros(5, 2, 3))
        >>> output.shape, h_n.shape
        (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
    """

    bias_ih_l0: Tensor
    bias_hh_l0: Tensor
    step = staticmethod(lstm_step)

    def _draws(self) -> bool:
        return self.training and self.detach_prob > 0 and torch.is_grad_enabled()

    def forward(  # type: ignore[override]
        self, input: Tensor, *, detach_mask: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Input ``[T, B, I]``, mask bool ``[T]`` -> output ``[T, B, H]``, states ``[1, B, H]``."""
        steps, batch, _ = input.shape
        if detach_mask is None and self._draws():
            detach_mask = masks.detach_mask(steps, self.detach_prob, device=input.device)
        detached = [False] * steps if detach_mask is None else detach_mask.tolist()

        h = c = input.new_zeros(batch, self.hidden_size)
        gates_x = F.linear(input, self.weight_ih_l0, self.bias_ih_l0 + self.bias_hh_l0)
        outputs = []
        for gates_x_t, detach in zip(gates_x.unbind(0), detached, strict=True):
            h_previous = h.detach() if detach else h
            h, c = self.step(gates_x_t, h_previous, c, self.weight_hh_l0)
            outputs.append(h)
        return torch.stack(outputs), (h.unsqueeze(0), c.unsqueeze(0))


@dataclass(frozen=True)
class Peer:
    """One implementation: how to build it, and whether it knows h-detach.

    ``make(input_size, hidden_size, detach_prob, backend)`` returns a module that maps
    ``[T, B, I]`` to ``(output, (h_n, c_n))`` and has the parameter names of ``torch.nn.LSTM``.
    """

    name: str
    label: str
    make: Callable[[int, int, float, str], nn.Module]
    detaches: bool


def _make_throughtime(
    input_size: int, hidden_size: int, detach_prob: float, backend: str
) -> nn.Module:
    return throughtime.LSTM(
        input_size,
        hidden_size,
        detach_prob=detach_prob,
        backend=backend,  # type: ignore[arg-type]
    )


def _make_torch(input_size: int, hidden_size: int, detach_prob: float, backend: str) -> nn.Module:
    return nn.LSTM(input_size, hidden_size)


def _make_loop(input_size: int, hidden_size: int, detach_prob: float, backend: str) -> nn.Module:
    return LoopLSTM(input_size, hidden_size, detach_prob=detach_prob)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("throughtime", "throughtime", _make_throughtime, detaches=True),
        Peer("torch", "nn.LSTM", _make_torch, detaches=False),
        Peer("loop", "Python loop", _make_loop, detaches=True),
    )
}


def build(
    name: str,
    input_size: int,
    hidden_size: int,
    *,
    detach_prob: float = 0.0,
    backend: str = "auto",
    seed: int | None = None,
) -> nn.Module:
    """One layer of the named implementation; the weights depend on the random state alone.

    Args:
        name: a key of ``PEERS``.
        input_size: features per step.
        hidden_size: units H.
        detach_prob: probability 0 to 1 of detaching a step; an implementation without h-detach
            takes only 0.
        backend: which kernels ``throughtime`` uses; the others have no choice.
        seed: start from this seed; None continues torch's default generator.

    Raises:
        ValueError: if the implementation has no h-detach and ``detach_prob`` is not 0.

    Example:
        >>> one, two = (build(name, 3, 4, seed=0) for name in ("torch", "loop"))
        >>> bool((one.weight_hh_l0 == two.weight_hh_l0).all())
        True
    """
    peer = PEERS[name]
    if detach_prob and not peer.detaches:
        raise ValueError(f"{peer.label} has no h-detach: detach_prob must be 0, got {detach_prob}")
    if seed is not None:
        torch.manual_seed(seed)
    return peer.make(input_size, hidden_size, detach_prob, backend)
