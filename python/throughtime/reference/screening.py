"""Relevancy screening: which past keys a query may attend to.

Positions are counted on one axis that begins with what an earlier call left behind (``Memory``):
first the slots of its retained set, then its window, then the keys of this call. A key is attended
by ``window_size`` queries, its own the first; meanwhile its relevance, the attention it receives,
adds up. When it leaves the window its relevance is frozen and it competes for the retained set, the
``top_k`` most relevant of all keys that have left the window, the earlier key first among equals.

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
            retained set, oldest first, its empty slots last, then the window, whose last slot holds
            the newest key, its empty slots first. Every backend lists them so.
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
    """

    def __init__(
        self,
        relevance: Tensor,
        retained: int,
        length: int,
        window_size: int,
        top_k: int | None,
        keep_first: bool = False,
    ) -> None:
        device = relevance.device
        prefix = relevance.size(1)
        self.window_size, self.top_k, self.keep_first = window_size, top_k, keep_first
        self.retained, self.prefix = retained, prefix
        self.relevance = torch.cat([relevance, relevance.new_zeros(len(relevance), length)], 1)
        self.last = torch.full_like(self.relevance, -1, dtype=torch.int64)
        slots = torch.arange(retained, device=device).expand(len(relevance), retained)
        self.kept = torch.where(relevance[:, :retained] < 0, -1, slots)  # [N, <= top_k]

    def window(self, step: int) -> Tensor:
        """Positions int64 ``[N, <= window_size]`` in the window of query ``step``, -1 if empty."""
        end = self.prefix + step + 1
        begin = max(self.retained, end - self.window_size)
        positions = torch.arange(begin, end, device=self.kept.device)
        return torch.where(self.relevance[:, begin:end] < 0, -1, positions)

    def candidates(self, step: int, alive: Tensor) -> Tensor:
        """Positions int64 ``[N, C]`` that query ``step`` attends, -1 where none.

        ``alive`` is bool ``[N]``: False where a sequence has ended, which then attends nothing.
        """
        positions = torch.cat([self.kept, self.window(step)], 1)
        return torch.where(alive.unsqueeze(1), positions, -1)

    def advance(self, step: int, alive: Tensor, attention: Tensor) -> Tensor | None:
        """Take the attention ``[N, C]`` paid to ``candidates(step, alive)``.

        Returns:
            None while no key leaves the window, otherwise int64 ``[N, M]``: which of the slots
            ``[retained set, oldest of the window]`` make the next retained set.
        """
        kept_before = self.kept
        positions = self.candidates(step, alive)
        valid = positions >= 0
        self.last.scatter_reduce_(
            1, positions.clamp(min=0), torch.where(valid, step, -1), "amax", include_self=True
        )
        if not self.keep_first:
            received = torch.where(valid, attention, 0.0)
            received[:, : kept_before.size(1)] = 0.0  # frozen
            self.relevance.scatter_add_(1, positions.clamp(min=0), received)
        leaving = self.prefix + step - self.window_size + 1
        if leaving < self.retained:
            return None
        newcomer = torch.where(alive & (self.relevance[:, leaving] >= 0), leaving, -1)
        competing = torch.cat([kept_before, newcomer.unsqueeze(1)], 1)
        order = torch.arange(competing.size(1), device=valid.device).expand_as(competing)
        if self.top_k is not None and competing.size(1) > self.top_k:
            order = self._without_least(competing, order)
        self.kept = competing.gather(1, order)
        return order

    def _without_least(self, competing: Tensor, order: Tensor) -> Tensor:
        """``order`` without the least relevant, of equals the newest; empty slots go first."""
        relevance = self.relevance.gather(1, competing.clamp(min=0))
        relevance = torch.where(competing < 0, -1.0, relevance)
        is_least = relevance <= relevance.min(1, keepdim=True).values
        least = torch.where(is_least, order, 0).amax(1, keepdim=True)
        # A newcomer that is empty for a sequence (it has ended) leaves its set as it was.
        absent = competing[:, -1:] < 0
        least = torch.where(absent, order[:, -1:], least)
        return order[:, :-1] + (order[:, :-1] >= least)

    def memory(self, lengths: Tensor) -> Memory:
        """What is left after ``lengths`` int64 ``[N]`` queries of each sequence."""
        total = self.relevance.size(1)
        size = min(self.window_size - 1, total - self.retained)
        offsets = torch.arange(-size, 0, device=lengths.device)
        window = self.prefix + lengths.unsqueeze(1) + offsets
        window = torch.where(window < self.retained, -1, window)
        retained = torch.where(self.kept < 0, total, self.kept).sort(1).values
        index = torch.cat([torch.where(retained == total, -1, retained), window], 1)
        relevance = self.relevance.gather(1, index.clamp(min=0))
        index = torch.where(relevance < 0, -1, index)
        return Memory(index, torch.where(index < 0, -1.0, relevance), self.kept.size(1))
