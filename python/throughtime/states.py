"""What relevancy screening carries from one call to the next: O(window_size + top_k) memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)  # tensors have no truth value, so states are equal to themselves only
class RelevancyCache:
    """Window, retained set and relevance of :func:`throughtime.functional.relevancy_attention`.

    Begins empty; every call that is given it replaces its tensors (and never writes into them), so
    that any cutting of a sequence into calls gives the result of one call. P = R + V slots: the
    retained set, oldest key first, empty slots last, then the window but for its oldest key, newest
    key last, empty slots first.

    Attributes:
        key: ``[B, heads, P, D]``, zeros where a slot is empty; None before the first call.
        value: ``[B, heads, P, Dv]``.
        relevance: ``[B, heads, P]``, attention received while in the window; -1 where empty.
        position: int64 ``[B, heads, P]``, counted from the sequence's first key; -1 where empty.
        length: int64 ``[B]``, keys seen so far.
        retained: R.
        options: (window_size, top_k, score, scale, retain) of the first call, which must stay.

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
        """The same cache without its graph, for truncated backpropagation through time."""
        return dataclasses.replace(
            self,
            key=None if self.key is None else self.key.detach(),
            value=None if self.value is None else self.value.detach(),
        )

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
    """What a :class:`throughtime.RelLSTM` needs to go on where an earlier call ended.

    L layers, P = R + V slots as in :class:`RelevancyCache`.
    :func:`throughtime.functional.rel_lstm`, which is one layer, leaves the dimension L out.

    Attributes:
        h: ``[L, B, H]``, the last hidden state.
        c: ``[L, B, H]``, the last cell state.
        context: ``[L, B, H]``, the last result of attention.
        memory: ``[L, P, B, H]``, hidden states that may still be attended; zeros where empty.
        relevance: ``[L, P, B]``, attention received while in the window; -1 where empty.
        position: int64 ``[L, P, B]``, step at which the state arose, counted from the sequence's
            first; -1 where empty.
        length: int64 ``[B]``, steps seen so far.
        retained: R.

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

    def detach(self) -> RelState:
        """The same state without its graph, for truncated backpropagation through time."""
        return dataclasses.replace(
            self,
            h=self.h.detach(),
            c=self.c.detach(),
            context=self.context.detach(),
            memory=self.memory.detach(),
        )

    def unstack(self) -> list[RelState]:
        """One state per layer, without the dimension L."""
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
        """The states of several layers as one."""
        names = ("h", "c", "context", "memory", "relevance", "position")
        stacked = {name: torch.stack([getattr(layer, name) for layer in layers]) for name in names}
        return dataclasses.replace(layers[0], **stacked)  # type: ignore[arg-type]

    def index_select(self, order: Tensor) -> RelState:
        """The samples ``order`` int64 ``[B']``; with or without the dimension L."""
        names = ("h", "c", "context", "memory", "relevance", "position")
        dims = (-2, -2, -2, -2, -1, -1)
        taken = {
            name: getattr(self, name).index_select(dim, order)
            for name, dim in zip(names, dims, strict=True)
        }
        return dataclasses.replace(self, **taken, length=self.length.index_select(0, order))
