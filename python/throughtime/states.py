"""The states of relevancy screening between calls, in O(window_size + top_k) memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor


@dataclass(eq=False)  # tensors have no truth value, so states are equal to themselves only
class RelevancyCache:
    """State of :func:`throughtime.functional.relevancy_attention` between calls on a sequence.

    A new cache is empty. Each call replaces its tensors and never writes into them. A sequence
    gives the same result in any number of calls as in one. A model has one cache for each layer:
    :class:`throughtime.RelevancyAttention` refuses the cache of another layer.

    There are P = R + V slots. The first R hold the retained set: oldest key first, empty slots
    last. The other V hold the window without its oldest key, and before it the keys that have left
    it since the retained set last changed: empty slots first, newest key last.

    Attributes:
        key: ``[B, key heads, P, D]``, zeros in an empty slot; None before the first call.
        value: ``[B, key heads, P, Dv]``, like ``key``.
        relevance: ``[B, key heads, P]``, attention received in the window, or what was given; -1 in
            an empty slot.
        position: int64 ``[B, key heads, P]``, counted from the sequence's first key; -1 in an empty
            slot.
        length: int64 ``[B]``, number of keys seen so far.
        retained: R, slots of the retained set.
        options: (window_size, top_k, screen_every, score, scale, retain, normalize, whether
            relevance is given) of the first call; later calls must have the same.

    Example:
        >>> import torch
        >>> from throughtime import RelevancyCache, functional
        >>> q, k, v = torch.randn(3, 1, 2, 6, 4).unbind(0)
        >>> cache = RelevancyCache()
        >>> steps = [functional.relevancy_attention(q[:, :, t:t + 1], k[:, :, t:t + 1],
        ...          v[:, :, t:t + 1], 2, 2, cache=cache) for t in range(6)]
        >>> whole = functional.relevancy_attention(q, k, v, 2, 2)
        >>> assert torch.allclose(torch.cat(steps, 2), whole, atol=1e-6)
    """

    key: Tensor | None = None
    value: Tensor | None = None
    relevance: Tensor | None = None
    position: Tensor | None = None
    length: Tensor | None = None
    retained: int = 0
    options: tuple[object, ...] | None = None

    def detach(self) -> RelevancyCache:
        """The same cache without its autograd graph, for truncated backpropagation through time."""
        return dataclasses.replace(
            self,
            key=None if self.key is None else self.key.detach(),
            value=None if self.value is None else self.value.detach(),
        )

    def index_select(self, order: Tensor) -> RelevancyCache:
        """Select samples, as beam search does.

        Args:
            order: int64 ``[B']``, indices of samples.

        Returns:
            A cache of B' samples.
        """
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        taken = {name: x.index_select(0, order) for name, x in tensors.items()}
        return dataclasses.replace(self, **taken)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        if self.key is None:
            return "RelevancyCache(empty)"
        batch, heads, slots, size = self.key.shape
        return (
            f"RelevancyCache(batch={batch}, heads={heads}, features={size}, "
            f"retained={self.retained}, window={slots - self.retained}, "
            f"dtype={self.key.dtype}, device={self.key.device})"
        )


@dataclass(frozen=True, eq=False)
class RelState:
    """State of a :class:`throughtime.RelLSTM`, from which the next call goes on.

    There are L layers, and P = R + V slots as in :class:`throughtime.RelevancyCache`. The state of
    :func:`throughtime.functional.rel_lstm`, which is one layer, has no dimension L.

    Attributes:
        h: ``[L, B, H]``, the last hidden state.
        c: ``[L, B, H]``, the last cell state.
        context: ``[L, B, H]``, the last result of attention.
        memory: ``[L, P, B, H]``, hidden states that a later step may attend; zeros in an empty
            slot.
        relevance: ``[L, P, B]``, attention received in the window; -1 in an empty slot.
        position: int64 ``[L, P, B]``, step of the hidden state, counted from the sequence's first;
            -1 in an empty slot.
        length: int64 ``[B]``, number of steps seen so far.
        retained: R, slots of the retained set.
        options: (window_size, top_k, retain) of the call that made it; later calls must have the
            same. None is not checked.

    Example:
        >>> import torch, throughtime
        >>> layer = throughtime.RelLSTM(3, 4, window_size=2, top_k=2)
        >>> x = torch.randn(6, 1, 3)
        >>> first, state = layer(x[:4])
        >>> second, _ = layer(x[4:], state.detach())
        >>> assert torch.allclose(torch.cat([first, second]), layer(x)[0], atol=1e-6)
    """

    h: Tensor
    c: Tensor
    context: Tensor
    memory: Tensor
    relevance: Tensor
    position: Tensor
    length: Tensor
    retained: int
    options: tuple[object, ...] | None = None

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "RelState: a state is no pair to unpack: output, state = layer(x), then state.h and "
            "state.c"
        )

    def detach(self) -> RelState:
        """The same state without its autograd graph, for truncated backpropagation through time."""
        return dataclasses.replace(
            self,
            h=self.h.detach(),
            c=self.c.detach(),
            context=self.context.detach(),
            memory=self.memory.detach(),
        )

    def unstack(self) -> list[RelState]:
        """The states of the single layers, without the dimension L."""
        fields = zip(
            self.h, self.c, self.context, self.memory, self.relevance, self.position, strict=True
        )
        return [
            dataclasses.replace(
                self, h=h, c=c, context=o, memory=memory, relevance=relevance, position=position
            )
            for h, c, o, memory, relevance, position in fields
        ]

    @staticmethod
    def stack(layers: list[RelState]) -> RelState:
        """Join the states of several layers.

        Args:
            layers: one state per layer, without the dimension L.

        Returns:
            One state with the dimension L.
        """
        names = ("h", "c", "context", "memory", "relevance", "position")
        stacked = {name: torch.stack([getattr(layer, name) for layer in layers]) for name in names}
        return dataclasses.replace(layers[0], **stacked)  # type: ignore[arg-type]

    def index_select(self, order: Tensor) -> RelState:
        """Select samples, with or without the dimension L.

        Args:
            order: int64 ``[B']``, indices of samples.

        Returns:
            A state of B' samples.
        """
        names = ("h", "c", "context", "memory", "relevance", "position")
        dims = (-2, -2, -2, -2, -1, -1)
        taken = {
            name: getattr(self, name).index_select(dim, order)
            for name, dim in zip(names, dims, strict=True)
        }
        return dataclasses.replace(self, **taken, length=self.length.index_select(0, order))
