"""Relevancy screening written by hand: one sequence, one query and one key at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Rows = Sequence[Tensor] | Tensor
Score = Callable[[Tensor, Tensor], Tensor]


def additive(weight: Tensor) -> Score:
    return lambda query, key: weight @ torch.tanh(query + key)


class ByHand:
    """What one sequence attends, one query and one key at a time."""

    def __init__(
        self,
        window_size: int,
        top_k: int | None,
        retain: str,
        screen_every: int = 1,
        given: Tensor | None = None,
        normalize: bool = False,
    ) -> None:
        self.window_size, self.top_k, self.retain = window_size, top_k, retain
        self.screen_every, self.given, self.normalize = screen_every, given, normalize
        self.relevance: dict[int, float] = {}
        self.retained: list[int] = []
        self.pending: list[int] = []

    def attend(self, query: Tensor, keys: Rows, values: Rows, score: Score) -> Tensor:
        """The newest key is the last; all of them were attended one query after the other."""
        i = len(keys) - 1
        window = [j for j in range(i + 1) if j > i - self.window_size]
        attended = self.retained + self.pending + window
        alpha = torch.stack([score(query, keys[j]) for j in attended]).softmax(0)
        for a, j in zip(alpha, attended, strict=True):
            if j in window:
                received = a.item() if self.retain == "relevant" else 0.0
                received *= len(attended) if self.normalize else 1
                self.relevance[j] = self.relevance.get(j, 0.0) + received
                if self.given is not None:
                    self.relevance[j] = self.given[j].item()
        if i - self.window_size + 1 >= 0:
            self.pending.append(i - self.window_size + 1)
        if (i + 1) % self.screen_every == 0:
            for newcomer in self.pending:
                competing = [*self.retained, newcomer]
                competing.sort(key=lambda j: (-self.relevance[j], j))
                self.retained = competing[: self.top_k]
            self.pending = []
        return torch.stack([a * values[j] for a, j in zip(alpha, attended, strict=True)]).sum(0)
