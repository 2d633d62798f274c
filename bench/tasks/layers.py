"""The layers that can be trained, by the names of ``train --layer``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

import throughtime
from bench.operations import lstm_peers


@dataclass(frozen=True)
class Layer:
    """One kind of layer.

    ``make(input_size, hidden_size, *, detach_prob, window_size, top_k, backend)`` returns a module
    that maps ``[T, B, features]`` to ``(output [T, B, H], states)``. ``options`` names what of
    ``window_size`` and ``top_k`` makes a difference.
    """

    label: str
    make: Callable[..., nn.Module]
    detaches: bool
    screens: bool = False
    options: tuple[str, ...] = ()


def _peer(
    name: str,
    input_size: int,
    hidden_size: int,
    *,
    detach_prob: float,
    window_size: int,
    top_k: int,
    backend: str,
) -> nn.Module:
    return lstm_peers.build(name, input_size, hidden_size, detach_prob=detach_prob, backend=backend)


def _rel(
    options: dict[str, Any], input_size: int, hidden_size: int, *, top_k: int, **given: Any
) -> nn.Module:
    return throughtime.RelLSTM(input_size, hidden_size, **{"top_k": top_k, **given, **options})


def _screening(label: str, **options: Any) -> Layer:
    everything = "top_k" in options  # is None: what leaves the window is kept all the same
    return Layer(
        label,
        functools.partial(_rel, options),
        detaches=True,
        screens=True,
        options=() if everything else ("window_size", "top_k"),
    )


LAYERS = {
    **{
        name: Layer(label, functools.partial(_peer, name), detaches)
        for name, label, detaches in (
            ("throughtime", "throughtime", True),
            ("torch", "nn.LSTM", False),
            ("loop", "Python loop", True),
        )
    },
    "rel-lstm": _screening("RelLSTM"),
    "mem-lstm": _screening("MemLSTM", top_k=None),
    "rel-first": _screening("RelLSTM, first states kept", retain="first"),
    "rel-rnn": _screening("RelRNN", cell="tanh"),
    "mem-rnn": _screening("MemRNN", cell="tanh", top_k=None),
}
