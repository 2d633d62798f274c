"""A batch of sequences, divided where episodes start: each episode is a row of its own.

For layers whose kernels know lengths but no resets. Rows are as long as the longest episode.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from throughtime.states import RelState

States = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Split:
    """Where the N episodes of a batch lie.

    Attributes:
        sample: int64 ``[N]``, the sample of each episode.
        begin: int64 ``[N]``, its first step.
        lengths: int64 ``[N]``.
        row: int64 ``[T, B]``, the episode of each step.
        goes_on: bool ``[N]``: it goes on with the state that the call was given.
    """

    sample: Tensor
    begin: Tensor
    lengths: Tensor
    row: Tensor
    goes_on: Tensor

    @staticmethod
    def at(reset: Tensor, lengths: Tensor | None) -> Split:
        """Divide at ``reset [T, B]``, which is not read past ``lengths [B]``.

        Example:
            >>> import torch
            >>> split = Split.at(torch.tensor([[False], [False], [True], [False]]), None)
            >>> split.lengths.tolist(), split.row.flatten().tolist(), split.goes_on.tolist()
            ([2, 2], [0, 0, 1, 1], [True, False])
        """
        length, batch = reset.shape
        inside = torch.ones_like(reset)
        if lengths is not None:
            inside = torch.arange(length, device=reset.device).unsqueeze(1) < lengths
        starts = reset & inside
        first = starts.clone()
        first[0] = True
        found = first.t().nonzero()  # sample by sample
        row = (first.t().flatten().cumsum(0) - 1).view(batch, length).t()
        count = torch.zeros(len(found), dtype=torch.int64, device=reset.device)
        count.index_add_(0, row.flatten(), inside.flatten().long())
        sample, begin = found.unbind(1)
        return Split(sample, begin, count, row, (begin == 0) & ~starts[0, sample])

    def rows(self, x: Tensor) -> Tensor:
        """``[T, B, ...]`` as ``[longest, N, ...]``; past its length a row holds anything."""
        steps = torch.arange(int(self.lengths.max().clamp(min=1)), device=x.device).unsqueeze(1)
        return x[(self.begin + steps).clamp(max=x.size(0) - 1), self.sample]

    def together(self, rows: Tensor) -> Tensor:
        """``[longest, N, ...]``, zero past the lengths, as ``[T, B, ...]``."""
        steps = torch.arange(self.row.size(0), device=rows.device).unsqueeze(1)
        step = steps - self.begin[self.row]
        within = step < self.lengths[self.row]
        found = rows[step.clamp(max=rows.size(0) - 1), self.row]
        within = within.view(*within.shape, *[1] * (found.dim() - 2))
        return torch.where(within, found, torch.zeros_like(found))

    def begun(self, hx: RelState | States | None) -> RelState | States | None:
        """The state that each row starts from: fresh but where it goes on."""
        if hx is None:
            return None

        def pick(x: Tensor, fresh: float, before: int) -> Tensor:
            """``before``: how many dimensions stand before the batch."""
            taken = x.index_select(before, self.sample)
            keep = self.goes_on.view(-1, *[1] * (x.dim() - before - 1))
            return torch.where(keep, taken, torch.full_like(taken, fresh))

        if not isinstance(hx, RelState):
            return pick(hx[0], 0, 0), pick(hx[1], 0, 0)
        return dataclasses.replace(
            hx,
            h=pick(hx.h, 0, 0),
            c=pick(hx.c, 0, 0),
            context=pick(hx.context, 0, 0),
            memory=pick(hx.memory, 0, 1),
            relevance=pick(hx.relevance, -1, 1),
            position=pick(hx.position, -1, 1),
            length=pick(hx.length, 0, 0),
        )

    def ended(self, state: RelState) -> RelState:
        """The state of each sample's last episode."""
        return state.index_select(self.row[-1])
