"""Initialisations that decide how far an LSTM remembers before any training.

The forget gate f keeps a state for about 1 / (1 - f) steps. So its bias sets how long a gradient
through the cell lasts in a new layer.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["chrono_", "forget_bias_"]

_Layer = TypeVar("_Layer", bound=nn.Module)


def forget_bias_(layer: _Layer, value: float) -> _Layer:
    """Set the bias of every forget gate: ``value`` in ``bias_ih``, 0 in ``bias_hh``.

    A new unit keeps its state for about ``1 + exp(value)`` steps.

    Args:
        layer: an ``LSTM``, ``LSTMCell`` or ``RelLSTM`` of this package, or an ``nn.LSTM`` or
            ``nn.LSTMCell``; all layers and directions change.
        value: a finite number; 1 is a common choice.

    Returns:
        ``layer``.

    Raises:
        TypeError: if ``layer`` is no LSTM.
        ValueError: if ``layer`` has no biases of its own, or ``value`` is not finite.

    Example:
        >>> import torch, throughtime
        >>> lstm = throughtime.init.forget_bias_(torch.nn.LSTM(3, 4), 1.0)
        >>> lstm.bias_ih_l0[4:8].tolist(), lstm.bias_hh_l0[4:8].tolist()
        ([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0])

    Source: Gers, Schmidhuber, Cummins, *Learning to Forget*, Neural Computation 2000; Jozefowicz,
    Zaremba, Sutskever, ICML 2015.
    """
    if not math.isfinite(value):
        raise ValueError(f"forget_bias_: value should be a finite number, got {value}")
    pairs = _biases("forget_bias_", layer)
    with torch.no_grad():
        for bias_ih, bias_hh in pairs:
            _gate(bias_ih, 1).fill_(value)
            _gate(bias_hh, 1).zero_()
    return layer


def chrono_(layer: _Layer, T_max: float, generator: torch.Generator | None = None) -> _Layer:
    """Spread the memory of new units evenly over distances up to ``T_max`` steps.

    The bias of a forget gate is ``b_f = log u`` with u uniform in ``[1, T_max - 1]``, that of the
    input gate ``b_i = -b_f``. Both lie in ``bias_ih``; ``bias_hh`` of these gates is 0. The other
    gates keep what they have.

    Args:
        layer: an ``LSTM``, ``LSTMCell`` or ``RelLSTM`` of this package, or an ``nn.LSTM`` or
            ``nn.LSTMCell``; all layers and directions change.
        T_max: the longest dependency in steps, > 2.
        generator: random generator, on the device of the parameters.

    Returns:
        ``layer``.

    Raises:
        TypeError: if ``layer`` is no LSTM.
        ValueError: if ``layer`` has no biases of its own, or ``T_max`` is not above 2.

    Example:
        >>> import throughtime
        >>> lstm = throughtime.init.chrono_(throughtime.LSTM(3, 64), T_max=100)
        >>> i, f, _, _ = lstm.bias_ih_l0.chunk(4)
        >>> assert (i == -f).all() and f.min() >= 0 and f.exp().max() < 100

    Source: Tallec, Ollivier, *Can recurrent neural networks warp time?*, ICLR 2018,
    arXiv 1804.11188, section 2.
    """
    if not 2 < T_max < math.inf:
        raise ValueError(
            f"chrono_: T_max should be above 2, the longest dependency in steps, got {T_max}"
        )
    pairs = _biases("chrono_", layer)
    with torch.no_grad():
        for bias_ih, bias_hh in pairs:
            forget = _gate(bias_ih, 1).uniform_(1, T_max - 1, generator=generator).log_()
            _gate(bias_ih, 0).copy_(-forget)
            for gate in (0, 1):
                _gate(bias_hh, gate).zero_()
    return layer


def _gate(bias: Tensor, number: int) -> Tensor:
    """A view of one gate, in the order i, f, g, o."""
    return bias.chunk(4)[number]


def _biases(name: str, layer: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """``bias_ih`` and ``bias_hh`` of every layer and direction."""
    found = dict(layer.named_parameters()) if isinstance(layer, nn.Module) else {}
    names = dict.fromkeys(key.removeprefix("parametrizations.").split(".")[0] for key in found)
    units = getattr(layer, "hidden_size", None)
    four_gates = isinstance(units, int) and any(
        key.startswith("weight_hh") and getattr(layer, key).size(0) == 4 * units for key in names
    )
    if not four_gates:
        raise TypeError(
            f"{name}: layer should be an LSTM, LSTMCell or RelLSTM, got {type(layer).__name__}; "
            "call it on each such layer of a model"
        )
    biases = {key: found.get(key) for key in names if key.startswith("bias_")}
    if not biases:
        raise ValueError(f"{name}: layer should have biases, got one made with bias=False")
    plain = {key: value for key, value in biases.items() if value is not None}
    if len(plain) < len(biases):
        raise ValueError(
            f"{name}: layer should have biases of its own, got parametrized ones; call {name} "
            "before register_parametrization"
        )
    return [
        (value, plain[key.replace("bias_ih", "bias_hh")])
        for key, value in plain.items()
        if key.startswith("bias_ih")
    ]
