"""Where episodes start within a sequence, and from which state.

What a module is given has the layout of its input; everything here puts the time first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from throughtime import masks
from throughtime.functional.checks import broadcasts, check_pair, readable

States = tuple[Tensor, Tensor]


class Sizes(NamedTuple):
    """Sizes of a module's call."""

    op: str  # for messages
    layers: int  # layers times directions
    length: int
    batch: int
    features: tuple[int, ...]  # of h, and of c if it may have a start of its own


class Episodes(NamedTuple):
    """Starts of episodes.

    Attributes:
        reset: bool ``[T, B]``, or None.
        states: what layers start anew from, each ``[layers * directions, T or 1, B or 1, *]``;
            None: zeros.
    """

    reset: Tensor | None
    states: States | None

    def of(self, k: int, *, reverse: bool = False) -> tuple[Tensor | None, States | None]:
        """``reset`` and ``reset_hx`` of one layer and direction, as :mod:`functional` takes them.

        The reverse direction leaves an episode that starts at t after step t, so it starts anew
        before step t - 1.

        Example:
            >>> import torch
            >>> marks = torch.tensor([[False], [True], [False]])
            >>> reset, _ = Episodes(marks, None).of(0, reverse=True)
            >>> reset.flatten().tolist()
            [True, False, False]
        """
        states = None if self.states is None else (self.states[0][k], self.states[1][k])
        if self.reset is None or not reverse:
            return self.reset, states
        earlier = torch.cat([self.reset[1:], torch.zeros_like(self.reset[:1])])
        if states is not None:
            h, c = (x if x.size(0) == 1 else x.roll(-1, 0) for x in states)
            states = h, c
        return earlier, states

    def index_select(self, order: Tensor) -> Episodes:
        """Select samples."""
        if self.reset is None:
            return self
        states = self.states
        if states is not None:
            h, c = (x if x.size(2) == 1 else x.index_select(2, order) for x in states)
            states = h, c
        return Episodes(self.reset.index_select(1, order), states)

    def within(self, lengths: Tensor) -> Episodes:
        """None past the ends of samples, where a reverse direction would begin with one.

        Args:
            lengths: int64 ``[B]``.
        """
        if self.reset is None:
            return self
        position = torch.arange(self.reset.size(0), device=self.reset.device).unsqueeze(1)
        return self._replace(reset=self.reset & (position < lengths.to(self.reset.device)))


def episodes(
    reset: Tensor | None,
    reset_hx: States | None,
    sizes: Sizes,
    *,
    batch_first: bool = False,
    batched: bool = True,
) -> Episodes:
    """Check a module's ``reset`` and ``reset_hx`` and put the time first.

    Args:
        reset: bool, or any real dtype with 0 and 1, ``[T, B]`` or ``[T, B, 1]``; with
            ``batch_first`` ``[B, T]`` or ``[B, T, 1]``; ``[T]`` if not batched.
        reset_hx: a pair, each broadcastable to ``[count, T, B, features]``; with ``batch_first`` to
            ``[count, B, T, features]``, and to ``[count, T, features]`` if not batched.
        sizes: of the call.
        batch_first: whether the batch comes before the steps.
        batched: whether the input has a batch.

    Returns:
        The starts of episodes. Each layer checks devices, and the dtypes of states.

    Raises:
        RuntimeError: if a shape is another.
        TypeError: if something is no tensor, or no pair of tensors.
        ValueError: if ``reset`` holds other numbers than 0 and 1, as far as a CPU can see it, or
            states come without it.

    Example:
        >>> import torch
        >>> done = torch.tensor([[0.0, 1.0, 0.0]])
        >>> found = episodes(done, None, Sizes("LSTM", 1, 3, 1, (4, 4)), batch_first=True)
        >>> found.reset.flatten().tolist()
        [False, True, False]
    """
    if reset is None:
        if reset_hx is not None:
            raise ValueError(
                f"{sizes.op}: reset_hx should come with reset, which says where episodes start; "
                "a state for the first step alone is hx"
            )
        return Episodes(None, None)
    marks = _marks(reset, sizes, batch_first, batched)
    check_pair(sizes.op, reset_hx, name="reset_hx")
    if reset_hx is None:
        return Episodes(marks, None)
    h, c = (_starts(k, x, sizes, batch_first, batched) for k, x in enumerate(reset_hx))
    return Episodes(marks, (h, c))


def _marks(reset: Tensor, sizes: Sizes, batch_first: bool, batched: bool) -> Tensor:
    op, _, length, batch, _ = sizes
    if not isinstance(reset, Tensor):
        raise TypeError(
            f"{op}: reset should be a Tensor of bool, or of 0 and 1, got {type(reset).__name__}; "
            "convert it: torch.as_tensor(reset)"
        )
    marks = reset
    if marks.dim() == 3 and marks.size(2) == 1:
        marks = marks.squeeze(2)
    elif marks.dim() == 1 and not batched:
        marks = marks.unsqueeze(1)
    wanted = (batch, length) if batch_first else (length, batch)
    if tuple(marks.shape) != wanted:
        letters = masks.layout("T", "B", batch_first)
        raise RuntimeError(
            f"{op}: reset should have shape {list(wanted)} ({letters}, the layout of the input), "
            f"got {list(reset.shape)}{masks.if_transposed(marks, length, batch, batch_first)}"
        )
    if marks.dtype != torch.bool:
        if marks.is_complex() or (readable(marks) and not ((marks == 0) | (marks == 1)).all()):
            raise ValueError(
                f"{op}: reset should be of dtype torch.bool or hold 0 and 1 alone, got "
                f"{marks.dtype} with other numbers; convert it: reset != 0"
            )
        marks = marks != 0
    return marks.transpose(0, 1) if batch_first else marks


def _starts(k: int, x: Tensor, sizes: Sizes, batch_first: bool, batched: bool) -> Tensor:
    """One of ``reset_hx`` as ``[count, T or 1, B or 1, features]``."""
    op, count, length, batch, features = sizes
    steps = (batch, length) if batch_first else (length, batch)
    wanted = (count, *steps, features[k]) if batched else (count, length, features[k])
    if not broadcasts(x, wanted):
        letters = masks.layout("T", "B", batch_first) if batched else "[T]"
        raise RuntimeError(
            f"{op}: reset_hx[{k}] should be broadcastable to {list(wanted)} "
            f"([num_layers * num_directions, {letters[1:-1]}, features]), got {list(x.shape)}"
        )
    x = x.view((1,) * (len(wanted) - x.dim()) + tuple(x.shape))
    if not batched:
        x = x.unsqueeze(2)
    elif batch_first:
        x = x.transpose(1, 2)
    return x.expand(count, -1, -1, features[k])
