"""The walk through stacked layers: of an LSTM, or of a call of torch's own operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from throughtime import functional
from throughtime.backends.backend import BackendName
from throughtime.functional import thin
from throughtime.functional.lstm import Weights
from throughtime.nn.episodes import Episodes
from throughtime.ops.autograd import recording
from throughtime.packed import dropout

if TYPE_CHECKING:
    from throughtime.nn.lstm import LSTM

States = tuple[Tensor, Tensor]


class Layers(Protocol):
    """What the walk reads."""

    num_layers: int
    bidirectional: bool
    dropout: float
    training: bool
    recompute: bool

    @property
    def backend(self) -> BackendName: ...

    def _weights(self, layer: int, direction: int) -> Weights: ...


def run(
    layers: Layers,
    x: Tensor,
    hx: States | None,
    detach_masks: Sequence[Tensor | None],
    starts: Episodes,
    lengths: Tensor | None,
    cells: list[Tensor] | None = None,
) -> tuple[Tensor, States]:
    """Run all layers on ``x [T, B, I]`` with one mask per layer and direction.

    ``lengths`` are on the CPU. ``cells`` gets the cell states of each layer and direction.
    """
    ends = None if lengths is None else lengths.to(x.device)
    h_n, c_n = [], []
    one_layer = _both if layers.bidirectional else _one
    for layer in range(layers.num_layers):
        x, (h, c) = one_layer(layers, layer, x, hx, detach_masks, starts, ends, cells)
        h_n.append(h)
        c_n.append(c)
        if layers.training and layers.dropout > 0 and layer < layers.num_layers - 1:
            x = dropout(x, layers.dropout, lengths)
    # A copy also for one layer: detach_() does not work on a view.
    join = torch.cat if layers.bidirectional else torch.stack
    return x, (join(h_n), join(c_n))


def run_thin(
    layers: LSTM, input: Tensor | PackedSequence, hx: States, reset: Tensor | None
) -> tuple[Tensor, States] | None:
    """A call without a gradient, where masks mean nothing, if everything is plain."""
    if not isinstance(input, Tensor) or not thin.applies(input, layers.backend) or recording():
        return None
    count = layers.num_layers
    drops = layers.training and layers.dropout > 0 and count > 1
    if input.dim() != 3 or layers.bidirectional or drops:
        return None
    pair = isinstance(hx, (tuple, list)) and len(hx) == 2
    if not pair or not all(type(x) is Tensor and x.dim() == 3 and x.size(0) == count for x in hx):
        return None
    if reset is not None:
        if type(reset) is not Tensor or reset.dim() != 2:
            return None
        reset = reset.t() if layers.batch_first else reset
    x = input.transpose(0, 1) if layers.batch_first else input
    states = []
    for layer, state in enumerate(zip(*hx, strict=True)):
        found = thin.run(x, state, layers._weights(layer, 0), reset=reset)
        if found is None:
            return None
        x = found.output
        states.append((found.h_n, found.c_n))
    h_n, c_n = (torch.stack(each) for each in zip(*states, strict=True))
    return x.transpose(0, 1) if layers.batch_first else x, (h_n, c_n)


def _one(
    layers: Layers,
    k: int,
    x: Tensor,
    hx: States | None,
    detach_masks: Sequence[Tensor | None],
    starts: Episodes,
    lengths: Tensor | None,
    cells: list[Tensor] | None,
) -> tuple[Tensor, States]:
    """The k-th layer and direction: output ``[T, B, H]``, states ``[B, H]``."""
    layer, direction = divmod(k, 2 if layers.bidirectional else 1)
    reset, reset_hx = starts.of(k, reverse=direction == 1)
    options: dict[str, Any] = {"return_cells": cells is not None}
    found: tuple[Any, ...] = functional.lstm(
        x,
        None if hx is None else (hx[0][k], hx[1][k]),
        *layers._weights(layer, direction),
        detach_mask=detach_masks[k],
        lengths=lengths,
        reset=reset,
        reset_hx=reset_hx,
        reverse=direction == 1,
        recompute=layers.recompute,
        backend=layers.backend,
        **options,
    )
    if cells is not None:
        cells.append(found[2])
    return found[0], found[1]


def _both(
    layers: Layers,
    layer: int,
    x: Tensor,
    hx: States | None,
    detach_masks: Sequence[Tensor | None],
    starts: Episodes,
    lengths: Tensor | None,
    cells: list[Tensor] | None,
) -> tuple[Tensor, States]:
    """Both directions of a layer: output ``[T, B, 2H]``, states ``[2, B, H]``."""
    k = 2 * layer
    if cells is not None:  # backends that give them run one direction after the other
        given = (x, hx, detach_masks, starts, lengths, cells)
        outputs, states = zip(*[_one(layers, k + d, *given) for d in range(2)], strict=True)
        h, c = (torch.stack(pair) for pair in zip(*states, strict=True))
        return torch.cat(outputs, dim=2), (h, c)
    one, other = starts.of(k), starts.of(k + 1, reverse=True)
    return functional.bidirectional_lstm(
        x,
        None if hx is None else (hx[0][k : k + 2], hx[1][k : k + 2]),
        (layers._weights(layer, 0), layers._weights(layer, 1)),
        detach_mask=(detach_masks[k], detach_masks[k + 1]),
        lengths=lengths,
        reset=(one[0], other[0]),
        reset_hx=(one[1], other[1]),
        recompute=layers.recompute,
        backend=layers.backend,
    )
