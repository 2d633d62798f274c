"""The gradient of a call in parts: by paths through the cell alone, and by hops through W_hh.

With Y_t the loss by h_t with the recurrence held fixed, D_t = o_t (1 - tanh^2 c_t), and da_t the
gradient of the gate sums, hop by hop (k = 0 is the cell part)::

    dh^(0)_t = Y_t     dh^(k)_t = W_hh^T da^(k-1)_{t+1}
    dc^(k)_t = f_{t+1} dc^(k)_{t+1} + D_t dh^(k)_t
    dc_t = sum over k of dc^(k)_t     with h-detach, mean over masks: sum of (1 - p)^k dc^(k)_t

All of it is computed on request, in plain PyTorch, from the inputs, the weights and the output of
the call: one product of matrices and T steps without any for the gates, and again for each hop.
A :class:`Parts` holds 14 T B H numbers, whatever the stride.

Source: Kanuparthi et al., ICLR 2019, arXiv 1810.03023, equations 5 to 8 (A and B).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from throughtime.diagnostics.call import Call, norm_of


class StepGradients(NamedTuple):
    """The gradients of one call by step: of what it computed, not of its parameters.

    Args:
        dh: whole gradient by every h_t ``[T, B, H or P]``.
        dc: whole gradient by every c_t ``[T, B, H]``.
        direct: Y_t ``[T, B, H or P]``, what ``output.grad`` and h_n bring.
        dc_cell: the part of ``dc`` that no path through h brings ``[T, B, H]``; of a RelLSTM none
            through attention either. Of a plain cell (``cell="tanh"``), which has no c_t, ``dc``
            and ``dc_cell`` are zero.

    With a stride n there are ``ceil(T / n)`` steps in place of T.

    Example:
        >>> from throughtime.diagnostics import StepGradients
        >>> StepGradients._fields
        ('dh', 'dc', 'direct', 'dc_cell')
    """

    dh: Tensor
    dc: Tensor
    direct: Tensor
    dc_cell: Tensor


class Hops(NamedTuple):
    """The gradient by every c_t, by passages through W_hh; masks of the call do not count.

    Args:
        spectrum: dc^(k) ``[K + 1, T, B, H]``, k = 0 the cell part.

    Example:
        >>> import torch
        >>> from throughtime.diagnostics import Hops
        >>> hops = Hops(torch.ones(3, 1, 1, 1))
        >>> hops.expected(0.5).item()
        1.75
    """

    spectrum: Tensor

    def expected(self, p: float) -> Tensor:
        """The mean over the masks of h-detach with probability p: sum over k of (1 - p)^k dc^(k).

        It is exact where the spectrum has all T hops.

        Args:
            p: probability in [0, 1] of detaching a step.

        Returns:
            ``[T, B, H]``.

        Raises:
            ValueError: if p is out of range.
        """
        if not 0 <= p <= 1:
            raise ValueError(f"expected: p should be in range [0, 1], got {p}")
        powers = torch.arange(len(self.spectrum)).to(self.spectrum)
        return torch.einsum("k,ktbh->tbh", (1 - p) ** powers, self.spectrum)


class Parts:
    """The gates of a call of an LSTM, and what follows from them, for the rows of the call.

    Args:
        call: one that was traced.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self._inside = call.rows_inside().unsqueeze(2)
        reset = call.read("reset")
        self._reset = torch.zeros_like(self._inside) if reset is None else reset.unsqueeze(2)
        self._x = torch.where(self._inside, call.needed("input"), 0.0)
        self._entering = self._states()
        self._gates(self._gate_sums())

    def _states(self) -> Tensor:
        """What the gates of each step get beside the input, ``[T, rows, H or P]``."""
        return self._before(self.call.needed("output"), "h_0", "reset_h")

    def _gate_sums(self) -> Tensor:
        call = self.call
        sums = F.linear(self._x, call.needed("weight_ih")) + F.linear(
            self._entering, call.needed("weight_hh")
        )
        for bias in (call.read("bias_ih"), call.read("bias_hh")):
            sums = sums if bias is None else sums + bias
        return sums

    def _gates(self, sums: Tensor) -> None:
        """i, f, g, o, c and what belongs to them, ``[T, rows, H]``; zero past the end."""
        i, f, g, o = sums.chunk(4, dim=2)
        self.i, self.f, self.g, self.o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c, anew = self.call.needed("c_0"), self.call.read("reset_c")
        before, cells = [c] * len(sums), [c] * len(sums)
        for t in self._travel():
            c = torch.where(self._reset[t], 0.0 if anew is None else anew[t], c)
            before[t] = c
            c = torch.where(self._inside[t], self.f[t] * c + self.i[t] * self.g[t], c)
            cells[t] = c
        self.c, self._c_before = torch.stack(cells), torch.stack(before)
        self._tanh_c = self.c.tanh()
        self._slope = self.o * (1 - self._tanh_c * self._tanh_c)  # D_t
        # What dc_t leaves to the step before it.
        self._carry = torch.where(self._inside & ~self._reset, self.f, 0.0)

    def _travel(self) -> range:
        steps = len(self._inside)
        return range(steps - 1, -1, -1) if self.call.reverse else range(steps)

    def _before(self, states: Tensor, start: str, anew: str) -> Tensor:
        """The state that enters each step."""
        first, call = self.call.needed(start).unsqueeze(0), self.call
        if call.reverse:
            after = torch.cat([states[1:], torch.zeros_like(states[:1])])
            ends = torch.cat([self._inside[1:], torch.zeros_like(self._inside[:1])])
            found = torch.where(ends, after, first)
        else:
            found = torch.cat([first, states[:-1]])
        new = call.read(anew)
        found = torch.where(self._reset, 0.0 if new is None else new, found)
        return torch.where(self._inside, found, 0.0)

    def _to_before(self, x: Tensor) -> Tensor:
        """What each step gives to the one before it, at the latter's place."""
        nothing = torch.zeros_like(x[:1])
        return torch.cat([nothing, x[:-1]] if self.call.reverse else [x[1:], nothing])

    def _carried(self, own: Tensor) -> Tensor:
        """dc_t = own_t + f_{t+1} dc_{t+1}."""
        found = list(own.unbind(0))
        travel = list(self._travel())
        for t, after in zip(travel[-2::-1], travel[:0:-1], strict=True):
            found[t] = found[t] + self._carry[after] * found[after]
        return torch.where(self._inside, torch.stack(found), 0.0)

    def _of_units(self, dh: Tensor) -> Tensor:
        """The gradient of h_t before a projection."""
        weight = self.call.read("weight_hr")
        return dh if weight is None else dh @ weight

    def _sums(self, dh: Tensor, dc: Tensor, at: int | slice = slice(None)) -> Tensor:
        """Da ``[..., rows, 4H]`` from the gradients by h_t and c_t: of all steps, or of one."""
        i, f, g, o, c_before, tanh_c = (
            x[at] for x in (self.i, self.f, self.g, self.o, self._c_before, self._tanh_c)
        )
        found = (
            dc * g * i * (1 - i),
            dc * c_before * f * (1 - f),
            dc * i * (1 - g * g),
            self._of_units(dh) * tanh_c * o * (1 - o),
        )
        return torch.where(self._inside[at], torch.cat(found, dim=-1), 0.0)

    def _through_h(self, da: Tensor) -> Tensor:
        """What the gates of each step give to the h before it, if nothing is detached."""
        found = da @ self.call.needed("weight_hh")
        found = self._to_before(torch.where(self._reset, 0.0, found))
        return torch.where(self._inside, found, 0.0)

    def _cells(self, dh: Tensor, own: Tensor | float = 0.0) -> Tensor:
        """Dc of these gradients by h_t, by paths through the cell alone."""
        direct = self._of_units(dh) * self._slope
        return self._carried(torch.where(self._inside, direct, 0.0) + own)

    def _rows_cell_part(self) -> Tensor:
        return self._cells(self.call.rows_direct(), self.call.rows_direct_of_cells())

    def cell_part(self) -> Tensor:
        """dc^(0) ``[T, B, H]``."""
        return self.call.arranged(self._rows_cell_part())

    def gradients(self) -> StepGradients:
        """The whole gradients and their parts, of the steps that are kept."""
        call = self.call
        own = call.kept(call.direct()), call.kept(self.cell_part())
        return StepGradients(*call.whole(), *own)

    def hops(self, count: int) -> Hops:
        """dc^(0) to dc^(count)."""
        dh, dc = self.call.direct(), self.cell_part()
        found = [dc]
        for _ in range(count):
            dh = self._through_h(self._sums(dh, dc))
            dc = self._cells(dh)
            found.append(dc)
        return Hops(torch.stack(found))

    def vectors(self) -> dict[str, Tensor]:
        """What the table has norms of, ``[T, B, H or P]`` at the steps that are kept."""
        (dh, dc), cell = self.call.whole(), self.call.kept(self.cell_part())
        direct = self.call.kept(self.call.direct())
        return {"dh": dh, "dc": dc, "direct": direct, "cell": cell, "rest": dc - cell}

    def shares(self) -> dict[str, Tensor]:
        """What the table has of each sample, ``[T, B]`` at the steps that are kept."""
        return {"cut": self._cut()}

    def attended(self) -> Tensor | None:
        """The last step that attends each step of the first sample ``[T]``, if any attends."""
        return None

    def _cut(self) -> Tensor:
        """Share of the gradient by h_t that the mask of the step after takes away."""
        mask, size = self.call.read("detach_mask"), self.call.kept(self._inside).shape[:2]
        if mask is None:
            return self._x.new_zeros(size)
        if self.call.stride > 1:  # it takes the gradient of the step after
            return self._x.new_full(size, torch.nan)
        came = norm_of(self._through_h(self._sums(*self.call.whole())))
        taken = self._to_before(mask.to(came)) * came
        share: Tensor = taken / (came + norm_of(self.call.direct()))
        return share.nan_to_num(0.0)

    def transport(self) -> Tensor:
        """What the cell path alone leaves of a gradient of c of the last step: ``[steps, B]``.

        Root mean square over the units of the product of the forget gates after t.
        """
        last, left = self.call.rows_last().unsqueeze(2), torch.zeros_like(self.c[0]).double()
        found = left.new_zeros(self.c.shape[:2])
        for t in reversed(self._travel()):
            left = torch.where(last[t], 1.0, left)
            found[t] = norm_of(left)
            left = self._carry[t] * left
        return self.call.kept(found / math.sqrt(self.c.size(2)))

    def weights(self, cell_only: bool) -> Tensor:
        """The gradient of weight_ih, weight_hh and bias in a row: whole, or its cell part.

        Raises:
            RuntimeError: if not every step is kept.
        """
        if self.call.stride > 1:
            raise RuntimeError(
                f"parameters: the gradients of every step are needed, and of {self.call.name} one "
                f"step in {self.call.stride} was kept; record with stride=1"
            )
        if cell_only:
            da = self._sums(self.call.rows_direct(), self._rows_cell_part())
        else:
            da = self._sums(*self.call.whole())
        return torch.cat([x.flatten() for x in self._weights_of_gates(da)])

    def _weights_of_gates(self, da: Tensor) -> list[Tensor]:
        rows = da.flatten(0, 1)
        bias = [] if self.call.read("bias_ih") is None else [rows.sum(0)]
        return [*(rows.t() @ x.flatten(0, 1) for x in (self._x, self._entering)), *bias]
