"""The gradient of a call of a RelLSTM in parts, and how attention carries it.

With Y_t the loss by h_t with the recurrence held fixed, ds_t the gradient of the state that enters
step t, do_t = ds_{t+1} / 2 that of what attention gave, alpha_tj its weights and m_t the mask, the
last hop into h_j is::

    dh_j = Y_j  +  (1 - m_{j+1}) ds_{j+1} / 2                    direct, recurrent
         + sum over t of alpha_tj do_t  +  U_a^T sum over t of du_tj    value, key
    du_tj = alpha_tj (do_t . (h_j - o_t)) w (1 - tanh^2(V_a s_t + U_a h_j))

All of it is computed on request, in plain PyTorch, from what went into the call, its output, and
for each key the last query that attended it: one walk forward for s and alpha, and one backward.
No key is screened again. Each takes T steps over at most window_size + top_k candidates.

Source: Kerg, Kanuparthi et al., NeurIPS 2020, arXiv 2006.09471.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from throughtime.diagnostics.call import norm_of
from throughtime.diagnostics.parts import Hops, Parts
from throughtime.reference.relevancy import additive, attend


class AttentionFlow(NamedTuple):
    """How attention carries the gradient of a call of a RelLSTM, by step.

    Where the call had ``reset``, an episode takes the place of a sample: its last step is where
    ``depth`` and ``best_path`` begin.

    Args:
        recurrent: the part of ``dh`` that comes through h_t in the next state ``[T, B, H]``.
        value: the part that comes through h_t as a value of later steps' attention ``[T, B, H]``.
        key: the part that comes through h_t as their key ``[T, B, H]``. ``direct``, ``recurrent``,
            ``value`` and ``key`` add up to ``dh``.
        share: ``|value + key|`` by the sum of the norms of the four parts ``[T, B]``; NaN where
            they are zero.
        kappa: number of states that step t attends, int64 ``[T, B]``.
        effective: exp of the entropy of its weights, in [1, kappa] ``[T, B]``.
        depth: fewest hops of attention from the last step back to step t, int64 ``[T, B]``; a hop
            leads from step k + 1 to a step that step k attends.
        best_path: log10 of the largest product of ``alpha / 2`` over such hops ``[T, B]``: of a
            gradient, what the strongest way through values alone leaves if the gates leave all.
        last: the last step that attends step t, int64 ``[T, B]``; the first is t itself. It was
            retained after step k if ``t + window_size <= k + 1 <= last``.

    Past the end of a sample ``depth`` and ``last`` are -1, ``kappa`` is 0 and numbers are NaN.

    Example:
        >>> import torch, throughtime
        >>> layer = throughtime.RelLSTM(3, 8, window_size=2, top_k=1)
        >>> with throughtime.gradient_flow(layer) as flow:
        ...     layer(torch.randn(20, 4, 3))[0][-1].sum().backward()
        >>> attention = flow.attention()
        >>> assert attention.kappa.max() == 3 and (attention.depth[-1] == 0).all()
    """

    recurrent: Tensor
    value: Tensor
    key: Tensor
    share: Tensor
    kappa: Tensor
    effective: Tensor
    depth: Tensor
    best_path: Tensor
    last: Tensor


class Walk(NamedTuple):
    """One way back through the steps: gradients ``[T, rows, ...]``."""

    dh: Tensor
    dc: Tensor
    recurrent: Tensor  # these three are parts of dh
    value: Tensor
    key: Tensor
    ds: Tensor
    dq: Tensor  # of V_a s_t
    du: Tensor  # of U_a h_j, [positions, rows, A]
    dw: Tensor  # of the score's weight, [A]


class RelParts(Parts):
    """The gates and the attention of a call of a RelLSTM.

    Args:
        call: one that was traced.
    """

    def _states(self) -> Tensor:
        """s_t, and on the way what each step attends, and how."""
        call = self.call
        memory, output = call.read("memory"), call.needed("output")
        hidden = output if memory is None else torch.cat([memory, output])
        last = call.needed("last")
        self._prefix = len(last) - len(output)
        self._hidden = torch.where((last >= 0).unsqueeze(2), hidden, 0.0)  # [P + T, rows, H]
        self._keys = F.linear(self._hidden, call.needed("weight_key"))
        self._candidates = candidates(last, len(output))
        query, score = call.needed("weight_query"), call.needed("weight_score")
        h, context = call.needed("h_0"), call.needed("context_0")
        states = torch.empty_like(output)
        self._alpha = output.new_empty(self._candidates.shape)  # [T, rows, candidates]
        with one_thread():
            for t, positions in enumerate(self._candidates):
                states[t] = s = torch.where(self._inside[t], 0.5 * (h + context), 0.0)
                scores = additive(F.linear(s, query), self._at(self._keys, positions), score)
                self._alpha[t] = alpha = attend(scores, positions >= 0)
                context = (alpha.unsqueeze(2) * self._at(self._hidden, positions)).sum(1)
                h = output[t]
        self._queries = F.linear(states, query)
        return states

    def _at(self, rows: Tensor, positions: Tensor) -> Tensor:
        """``[positions, rows, D]`` at ``[rows, candidates]``; zero where there is none."""
        index = torch.arange(len(positions), device=positions.device).unsqueeze(1)
        taken = rows[positions.clamp(min=0), index]
        return torch.where((positions >= 0).unsqueeze(2), taken, 0.0)

    def _gates(self, sums: Tensor) -> None:
        self._plain = sums.size(2) == self.call.needed("output").size(2)
        if not self._plain:
            super()._gates(sums)

    def _sums(self, dh: Tensor, dc: Tensor, at: int | slice = slice(None)) -> Tensor:
        if not self._plain:
            return super()._sums(dh, dc, at)
        h = self._hidden[self._prefix :][at]
        return torch.where(self._inside[at], dh * (1 - h * h), 0.0)

    def _walk(self, direct: Tensor, cells: Tensor, contexts: Tensor, mask: Tensor | None) -> Walk:
        """Walk back from what the loss asks of every h_t, c_t and o_t ``[T, rows, H]``."""
        call, (steps, rows, _) = self.call, direct.shape
        w_hh, w_query, w_key, w = (
            call.needed(f"weight_{name}") for name in ("hh", "query", "key", "score")
        )
        value_of, du = (w.new_zeros(x.shape) for x in (self._hidden, self._keys))
        whole, cell, ds, dq = (torch.empty_like(x) for x in (direct, direct, direct, self._queries))
        dw, row = torch.zeros_like(w), torch.arange(rows, device=w.device).unsqueeze(1)
        through, carry = torch.zeros_like(direct[0]), torch.zeros_like(direct[0])
        with one_thread():
            for t in range(steps - 1, -1, -1):
                later = through if mask is None or t + 1 == steps else _unless(mask[t + 1], through)
                positions, alpha = self._candidates[t], self._alpha[t]
                context = through + contexts[t]
                attended = self._at(self._hidden, positions)
                tanh = torch.tanh(self._queries[t].unsqueeze(1) + self._at(self._keys, positions))
                asked = (attended @ context.unsqueeze(2)).squeeze(2)
                scores = alpha * (asked - (alpha * asked).sum(1, keepdim=True))
                dw += torch.einsum("rc,rca->a", scores, tanh)
                own = scores.unsqueeze(2) * w * (1 - tanh * tanh)
                at = (positions.clamp(min=0) * rows + row).flatten()
                given = alpha.unsqueeze(2) * context.unsqueeze(1)
                value_of.view(-1, value_of.size(2)).index_add_(0, at, given.flatten(0, 1))
                du.view(-1, du.size(2)).index_add_(0, at, own.flatten(0, 1))
                now = self._prefix + t
                whole[t] = dh = direct[t] + later + value_of[now] + du[now] @ w_key
                dc = carry + cells[t]
                if not self._plain:
                    dc = dc + self._slope[t] * dh
                    carry = self._carry[t] * dc
                cell[t], dq[t] = dc, own.sum(1)
                ds[t] = self._sums(dh, dc, t) @ w_hh + dq[t] @ w_query
                through = 0.5 * ds[t]
        recurrent = self._to_before(0.5 * (ds if mask is None else _unless(mask, ds)))
        value, key = value_of[self._prefix :], du[self._prefix :] @ w_key
        return Walk(whole, cell, recurrent, value, key, ds, dq, du, dw)

    @cached_property
    def _whole(self) -> Walk:
        return self._walk(*self._asked(), self.call.read("detach_mask"))

    def _asked(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the loss asks of h_t, c_t and o_t themselves."""
        call, direct = self.call, self.call.rows_direct()
        return direct, call.rows_direct_of_cells(), call.rows_own(None, "grad_context_n", direct)

    def _detached(self) -> Tensor:
        return torch.ones_like(self._inside[..., 0])

    def _rows_cell_part(self) -> Tensor:
        return torch.zeros_like(self._entering) if self._plain else super()._rows_cell_part()

    def hops(self, count: int) -> Hops:
        """By passages through h_{t-1} in s_t; attention does not count as one.

        Raises:
            ValueError: if the cell has no c_t.
        """
        if self._plain:
            raise ValueError(
                f"hops: {self.call.name} has cell='tanh', and so no c_t to split the gradient of; "
                "take flow.attention(), which has the parts of dh, or a layer with cell='lstm'"
            )
        asked, found = self._asked(), []
        for _ in range(count + 1):
            walk = self._walk(*asked, self._detached())
            found.append(self.call.arranged(walk.dc))
            direct = self._to_before(0.5 * walk.ds)
            asked = direct, torch.zeros_like(direct), torch.zeros_like(direct)
        return Hops(torch.stack(found))

    def weights(self, cell_only: bool) -> Tensor:
        """The gradient of all weights in a row: whole, or with every step detached."""
        walk = self._walk(*self._asked(), self._detached()) if cell_only else self._whole
        products = (
            walk.dq.flatten(0, 1).t() @ self._entering.flatten(0, 1),
            walk.du.flatten(0, 1).t() @ self._hidden.flatten(0, 1),
        )
        da = self._sums(walk.dh, walk.dc)
        found = [*self._weights_of_gates(da), *products, walk.dw]
        return torch.cat([x.flatten() for x in found])

    def vectors(self) -> dict[str, Tensor]:
        walk, call = self._whole, self.call
        parts = {"recurrent": walk.recurrent, "value": walk.value, "key": walk.key}
        return super().vectors() | {name: call.kept(call.arranged(x)) for name, x in parts.items()}

    def shares(self) -> dict[str, Tensor]:
        attention, cut = self._shares()
        return {name: self.call.kept(x) for name, x in (("attention", attention), ("cut", cut))}

    def _shares(self) -> tuple[Tensor, Tensor]:
        """Of attention, NaN where nothing comes, and of what the mask takes away, ``[T, B]``."""
        walk, mask = self._whole, self.call.read("detach_mask")
        direct, value, key = self.call.rows_direct(), walk.value, walk.key
        others = sum(norm_of(x) for x in (direct, value, key))
        attention = norm_of(value + key) / (others + norm_of(walk.recurrent))
        came = norm_of(self._to_before(0.5 * walk.ds))
        cut = torch.zeros_like(came) if mask is None else self._to_before(mask.to(came)) * came
        cut = (cut / (came + others)).nan_to_num(0.0)
        attention = torch.where(self.call.inside(), self.call.arranged(attention), torch.nan)
        return attention, self.call.arranged(cut)

    def attended(self) -> Tensor | None:
        last = self.attention().last
        return last[:, 0] if last.size(1) else None

    def keeps_all(self) -> bool:
        """Whether no state is dropped."""
        inside, steps = self.call.rows_inside(), len(self._candidates)
        step = torch.arange(steps, device=inside.device).unsqueeze(1)
        ends = torch.where(inside, step, -1).amax(0)
        last = self.call.needed("last")[self._prefix :]
        return bool(((last == ends) | ~inside).all())

    def attention(self) -> AttentionFlow:
        """All that is said of attention."""
        walk, call = self._whole, self.call
        inside, last = call.rows_inside(), call.needed("last")[self._prefix :]
        if call.split is not None:
            last = torch.where(last < 0, last, last + call.split.begin)
        effective = spread(self._alpha)
        depth, best = self._ways()
        return AttentionFlow(
            recurrent=call.arranged(walk.recurrent),
            value=call.arranged(walk.value),
            key=call.arranged(walk.key),
            share=self._shares()[0].to(call.dtype),
            kappa=call.arranged((self._candidates >= 0).sum(2)),
            effective=torch.where(call.inside(), call.arranged(effective), torch.nan),
            depth=call.arranged(torch.where(inside, depth, -1) + 1) - 1,
            best_path=torch.where(call.inside(), call.arranged(best), torch.nan),
            last=call.arranged(torch.where(inside, last, -1) + 1) - 1,
        )

    def _ways(self) -> tuple[Tensor, Tensor]:
        """Depth and best path of every step ``[T, rows]``, from the last step of its row."""
        inside, size = self.call.rows_inside(), self._hidden.shape[:2]
        ends = self.call.rows_last()
        depth = torch.full(size, len(inside) + 1, device=inside.device)
        best = self._alpha.new_full(size, -torch.inf)
        depth[self._prefix :][ends], best[self._prefix :][ends] = 0, 0.0
        with one_thread():
            for t in range(len(inside) - 2, -1, -1):
                there = self._prefix + t + 1  # what attention at t gives enters this step
                positions = self._candidates[t].clamp(min=0)
                going_on = inside[t + 1].unsqueeze(1) & (self._candidates[t] >= 0)
                hops = torch.where(going_on, depth[there].unsqueeze(1) + 1, len(inside) + 1)
                logs = self._alpha[t].log10() - _LOG_2 + best[there].unsqueeze(1)
                logs = torch.where(going_on, logs, -torch.inf)
                depth.scatter_reduce_(0, positions.t(), hops.t(), "amin")
                best.scatter_reduce_(0, positions.t(), logs.t(), "amax")
        return depth[self._prefix :], best[self._prefix :]


_LOG_2 = 0.3010299956639812  # log10 of 2


@contextmanager
def one_thread() -> Iterator[None]:
    """Steps are too small for more: threads would wait for each other at every operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _unless(mask: Tensor, x: Tensor) -> Tensor:
    """Zero where the mask is set."""
    return torch.where(mask.unsqueeze(-1), 0.0, x)


def spread(alpha: Tensor) -> Tensor:
    """Exp of the entropy of the weights ``[..., candidates]``."""
    return torch.exp(-torch.where(alpha > 0, alpha * alpha.log(), 0.0).sum(-1))


def candidates(last: Tensor, steps: int) -> Tensor:
    """What each step attends, int64 ``[T, rows, most]``, -1 where a place is empty.

    Args:
        last: the last step that attends a position ``[P + T, rows]``, -1 if none does.
        steps: T.
    """
    attended, prefix = last >= 0, len(last) - steps
    first = (torch.arange(len(last), device=last.device) - prefix).clamp(min=0)
    change = last.new_zeros(steps + 1, last.size(1))
    change.index_add_(0, first, attended.to(last.dtype))
    change.scatter_add_(0, torch.where(attended, last + 1, 0), -attended.to(last.dtype))
    most = max(1, int(change.cumsum(0).max())) if last.numel() else 1
    order = attended[:prefix].t().to(last.dtype).argsort(dim=1, descending=True, stable=True)
    order = order[:, :most]
    places = last.new_full((last.size(1), most), -1)
    ends = torch.full_like(places, -1)
    places[:, : order.size(1)] = order
    ends[:, : order.size(1)] = last[:prefix].t().gather(1, order)
    found = []
    for t in range(steps):
        place = (ends < t).to(last.dtype).argmax(1, keepdim=True)  # one that is free
        own = last[prefix + t].unsqueeze(1)
        places = places.scatter(1, place, torch.where(own < 0, places.gather(1, place), prefix + t))
        ends = ends.scatter(1, place, torch.where(own < 0, ends.gather(1, place), own))
        found.append(torch.where(ends >= t, places, -1))
    return torch.stack(found)
