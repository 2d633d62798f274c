"""Relevancy screening: which past keys a query may attend to.

Positions are counted on one axis that begins with what an earlier call left behind (``Memory``):
first the slots of its retained set, then its window, then the keys of this call. A key is attended
by ``window_size`` queries, its own the first; meanwhile its relevance, the attention it receives,
adds up. When it leaves the window its relevance is frozen and it competes for the retained set, the
``top_k`` most relevant of all keys that have left the window, the earlier key first among equals.

Keys compete at borders only: after every ``screen_every``-th query, counted from the first one of
the sequence. Until then a key that has left the window is pending, and still attended. The paper
has a border after every query.

Source: Kerg, Kanuparthi et al., NeurIPS 2020, arXiv 2006.09471.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Memory(NamedTuple):
    """What one call leaves for the next; N is any batch.

    Attributes:
        positions: int64 ``[N, R + V]``, on this call's axis, -1 where a slot is empty: the
            retained set, oldest first, its empty slots last, then the pending keys and the window,
            whose last slot holds the newest key, its empty slots first. Every backend lists them
            so.
        relevance: ``[N, R + V]``, negative where a slot is empty.
        retained: R.
    """

    positions: Tensor
    relevance: Tensor
    retained: int


class Screening:
    """The window and the retained set of N sequences, advanced one query at a time.

    Args:
        relevance: ``[N, R + V]`` of an earlier call, negative where empty; ``[N, 0]`` to begin.
        retained: R.
        length: queries of this call, T.
        window_size: queries that attend a key before it leaves the window, >= 1.
        top_k: size of the retained set; None keeps every key.
        keep_first: relevance stays zero, so that the first ``top_k`` keys are retained.
        screen_every: queries from one border to the next, >= 1.
        seen: int64 ``[N]``, queries of earlier calls; None for none.
        given: relevance ``[N, T]`` of this call's keys, >= 0, in place of attention, or None.
        normalize: what a query pays to a key counts as often as the query has candidates.
    """

    def __init__(
        self,
        relevance: Tensor,
        retained: int,
        length: int,
        window_size: int,
        top_k: int | None,
        keep_first: bool = False,
        screen_every: int = 1,
        seen: Tensor | None = None,
        given: Tensor | None = None,
        normalize: bool = False,
    ) -> None:
        device = relevance.device
        prefix = relevance.size(1)
        self.window_size, self.top_k, self.normalize = window_size, top_k, normalize
        self.adds_up = not keep_first and given is None
        self.retained, self.prefix = retained, prefix
        begun = torch.zeros(len(relevance), dtype=torch.int64, device=device)
        self.screen_every, self.seen = screen_every, begun if seen is None else seen
        new = relevance.new_zeros(len(relevance), length) if given is None else given
        self.relevance = torch.cat([relevance, new], 1)
        self.last = torch.full_like(self.relevance, -1, dtype=torch.int64)
        slots = torch.arange(retained, device=device).expand(len(relevance), retained)
        self.kept = torch.where(relevance[:, :retained] < 0, -1, slots)  # [N, <= top_k]

    def since_border(self, step: int | Tensor) -> Tensor:
        """How many queries before ``step`` come after the latest border, int64 ``[N]``."""
        return (self.seen + step) % self.screen_every

    def window(self, step: int) -> Tensor:
        """Positions int64 ``[N, C]``: pending keys and the window of query ``step``, -1 if empty.

        C is at most ``window_size + screen_every - 1``.
        """
        end = self.prefix + step + 1
        begin = max(self.retained, end - self.window_size - (self.screen_every - 1))
        positions = torch.arange(begin, end, device=self.kept.device)
        first = end - self.window_size - self.since_border(step).unsqueeze(1)
        empty = (self.relevance[:, begin:end] < 0) | (positions < first)
        return torch.where(empty, -1, positions)

    def candidates(self, step: int, alive: Tensor) -> Tensor:
        """Positions int64 ``[N, C]`` that query ``step`` attends, -1 where none.

        ``alive`` is bool ``[N]``: False where a sequence has ended, which then attends nothing.
        """
        positions = torch.cat([self.kept, self.window(step)], 1)
        return torch.where(alive.unsqueeze(1), positions, -1)

    def advance(self, step: int, alive: Tensor, attention: Tensor) -> Tensor | None:
        """Take the attention ``[N, C]`` paid to ``candidates(step, alive)``.

        Returns:
            None while no key has left the window, otherwise int64 ``[N, M]``: which of the slots
            ``[retained set, pending keys, oldest of the window]`` make the next retained set.
        """
        kept_before = self.kept
        positions = self.candidates(step, alive)
        valid = positions >= 0
        self.last.scatter_reduce_(
            1, positions.clamp(min=0), torch.where(valid, step, -1), "amax", include_self=True
        )
        if self.adds_up:
            received = torch.where(valid, attention, 0.0)
            if self.normalize:
                received = received * valid.sum(1, keepdim=True)
            frozen = max(0, positions.size(1) - self.window_size)  # retained or pending
            received[:, : max(frozen, kept_before.size(1))] = 0.0
            self.relevance.scatter_add_(1, positions.clamp(min=0), received)
        leaving = self.prefix + step - self.window_size + 1
        if leaving < self.retained:
            return None
        begin = max(self.retained, leaving - (self.screen_every - 1))
        newcomers = torch.arange(begin, leaving + 1, device=valid.device)
        compete = alive & (self.since_border(step + 1) == 0)
        compete = compete.unsqueeze(1) & (self.relevance[:, begin : leaving + 1] >= 0)
        competing = torch.cat([kept_before, torch.where(compete, newcomers, -1)], 1)
        order = torch.arange(competing.size(1), device=valid.device).expand_as(competing)
        if self.top_k is not None and competing.size(1) > self.top_k:
            relevance = self.relevance.gather(1, competing.clamp(min=0))
            relevance = torch.where(competing < 0, -1.0, relevance)
            # The earlier of equals, and a set as it was where nothing competes.
            order = relevance.argsort(dim=1, descending=True, stable=True)
            order = order[:, : self.top_k].sort(1).values
        self.kept = competing.gather(1, order)
        return order

    def memory(self, lengths: Tensor) -> Memory:
        """What is left after ``lengths`` int64 ``[N]`` queries of each sequence."""
        total = self.relevance.size(1)
        later = total - self.retained
        size = min(self.window_size - 1 + self.screen_every - 1, later)
        offsets = torch.arange(-size, 0, device=lengths.device)
        end = self.prefix + lengths.unsqueeze(1)
        first = end - (self.window_size - 1) - self.since_border(lengths).unsqueeze(1)
        window = end + offsets
        window = torch.where((window < self.retained) | (window < first), -1, window)
        retained = torch.where(self.kept < 0, total, self.kept).sort(1).values
        retained = retained[:, : self.retained + max(0, later - (self.window_size - 1))]
        index = torch.cat([torch.where(retained == total, -1, retained), window], 1)
        relevance = self.relevance.gather(1, index.clamp(min=0))
        index = torch.where(relevance < 0, -1, index)
        return Memory(index, torch.where(index < 0, -1.0, relevance), retained.size(1))
