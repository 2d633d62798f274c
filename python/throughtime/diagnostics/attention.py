"""What reaches the queries, keys and values of relevancy attention, and what it attends.

There is no recurrence in time: a step gets its gradient from the queries that attend it, in one
hop, and nothing grows or falls on a way. So there are no h, c, hops or horizon.

Source: Kerg, Kanuparthi et al., NeurIPS 2020, arXiv 2006.09471.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from throughtime.diagnostics.call import Call, detached
from throughtime.diagnostics.rel_parts import candidates, one_thread, spread
from throughtime.ops import watching
from throughtime.ops.relevancy import RelevancyArguments
from throughtime.reference.relevancy import SCORES, attend

_NAMES = ("query", "key", "value")


class KeyFlow(NamedTuple):
    """What a call of a RelevancyAttention gets back, and what it attends.

    Args:
        query: gradient by every query ``[B, heads, T, D]``.
        key: gradient by every key, from the queries of this call that attend it
            ``[B, key heads, T, D]``; what later calls with the same cache attend is left out.
        value: the same by every value ``[B, key heads, T, D]``.
        kappa: number of keys that query t attends, int64 ``[B, heads, T]``.
        effective: exp of the entropy of its weights, in [1, kappa] ``[B, heads, T]``.
        last: the last query of this call that attends key t, int64 ``[B, key heads, T]``; the
            first is t itself. :func:`throughtime.functional.retained_positions` lists from it what
            is retained, where there is no cache.
        by_distance: share of the weights that goes to the key d steps before its query, the mean
            over the queries ``[T]``. What is missing to 1 goes to keys of earlier calls.

    Past the end of a sample ``last`` is -1, ``kappa`` is 0 and ``effective`` NaN. With a stride n
    ``query``, ``key`` and ``value`` have ``ceil(T / n)`` steps in place of T.

    Example:
        >>> import torch, throughtime
        >>> layer = throughtime.RelevancyAttention(8, 2, window_size=3, top_k=2)
        >>> with throughtime.gradient_flow(layer) as flow:
        ...     layer(torch.randn(4, 20, 8))[:, -1].sum().backward()
        >>> keys = flow.keys()
        >>> assert keys.key.shape == (4, 2, 20, 4) and keys.kappa.max() == 5
    """

    query: Tensor
    key: Tensor
    value: Tensor
    kappa: Tensor
    effective: Tensor
    last: Tensor
    by_distance: Tensor


class AttentionCall(Call):
    """One call of relevancy attention."""

    recurrent = False

    def begin(self, given: dict[str, Any]) -> None:
        super().begin(given)
        self.score_scale = given["scale"]

    @property
    def traced(self) -> bool:
        """Whether a backward pass has come through; a call without steps counts as none."""
        return bool(self._grads) and self.length > 0

    @property
    def length(self) -> int:
        return self.needed("query").size(2)

    def rows_inside(self) -> Tensor:
        query, lengths = self.needed("query"), self.read("lengths")
        steps = torch.arange(self.length, device=query.device).unsqueeze(1)
        ends = self.length if lengths is None else lengths
        return (steps < ends).expand(self.length, len(query))

    def keep(self, grads: dict[str, Tensor]) -> None:
        """Keep the gradients by query, key and value: of this call's steps, by the stride."""
        found = {f"grad_{name}": grads[f"grad_{name}"][:, :, -self.length :] for name in _NAMES}
        if self.stride > 1:
            found = {n: self.kept(x.movedim(2, 0)).movedim(0, 2).clone() for n, x in found.items()}
        self.grads(found)


class AttentionDefinition:
    """A call of the definition of attention: hooks on what it attends with."""

    def __init__(
        self,
        call: AttentionCall,
        args: RelevancyArguments,
        arrive: Callable[[Call, dict[str, Any]], None],
    ) -> None:
        # A key may have other users: what comes through this call alone is kept.
        query, key, value = (x.view_as(x) for x in (args.query, args.key, args.value))
        self.args = args._replace(query=query, key=key, value=value)
        self._call, self._arrive = call, arrive
        self._given: dict[str, Any] = {}

    def observe(self, t: int, h_t: Tensor, c_t: Tensor) -> None:
        """Nothing: there is no recurrence."""

    def finish(self, results: watching.Results) -> watching.Results:
        found: Any = results
        wanted = {name: getattr(self.args, name) for name in _NAMES}
        wanted = {name: x for name, x in wanted.items() if x.requires_grad}
        self._given = detached(self.args._asdict() | {"last": found.last})
        del self.args
        if wanted:
            take = partial(self._take, list(wanted))
            torch.autograd.graph.register_multi_grad_hook(list(wanted.values()), take)
        return results

    def _take(self, names: list[str], grads: Sequence[Tensor | None]) -> None:
        self._arrive(self._call, self._given)
        came = dict(zip(names, grads, strict=True))
        by_name = {}
        for name in _NAMES:
            grad = came.get(name)
            by_name[f"grad_{name}"] = torch.zeros_like(self._given[name]) if grad is None else grad
        self._call.keep(by_name)


class KeyParts:
    """What follows from a call of relevancy attention.

    Args:
        call: one that was traced.
    """

    def __init__(self, call: AttentionCall) -> None:
        self.call = call
        query, key, last = (call.needed(name) for name in ("query", "key", "last"))
        batch, heads, length, _ = query.shape
        group = heads // max(1, key.size(1))
        w = call.read("score_weight")
        score = SCORES["dot" if w is None else "additive"]
        w = None if w is None else w.repeat(batch, 1)
        last = last.flatten(0, 1).t()
        own = len(last) - length
        attended = candidates(last, length).repeat_interleave(group, 1)
        keys = key.repeat_interleave(group, 1).flatten(0, 1)
        rows = torch.arange(batch * heads, device=query.device).unsqueeze(1)
        by_distance, effective = query.new_zeros(length), []
        with one_thread():
            for t, (positions, q) in enumerate(
                zip(attended, query.flatten(0, 1).unbind(1), strict=True)
            ):
                valid = positions >= 0
                taken = torch.where(valid.unsqueeze(2), keys[rows, positions.clamp(min=0)], 0.0)
                q = torch.where(valid.any(1, keepdim=True), q, 0.0)
                alpha = attend(score(q, taken, w, call.score_scale), valid)
                effective.append(spread(alpha))
                distance = own + t - positions
                ours = valid & (distance <= t)
                by_distance.index_add_(
                    0,
                    torch.where(ours, distance, 0).flatten(),
                    torch.where(ours, alpha, 0).flatten(),
                )
        queries = (attended >= 0).any(2).sum().clamp(min=1)
        self.by_distance = by_distance / queries
        self._last = last[own:]
        self._kappa = (attended >= 0).sum(2)
        self._effective = torch.where(self._kappa > 0, torch.stack(effective), torch.nan)

    def keys(self) -> KeyFlow:
        """All that is said of the call."""
        grads = [self.call.gradient(f"grad_{name}") for name in _NAMES]
        query, key = (self.call.needed(name).shape[:2] for name in ("query", "key"))
        rows = ((self._kappa, query), (self._effective, query), (self._last, key))
        by_row = (x.t().reshape(*sizes, len(x)) for x, sizes in rows)
        return KeyFlow._make((*grads, *by_row, self.by_distance))

    def vectors(self) -> dict[str, Tensor]:
        """What the table has norms of, ``[T, B, heads * D]`` at the steps that are kept."""
        flow = self.keys()
        return {name: getattr(flow, name).permute(2, 0, 1, 3).flatten(2) for name in _NAMES}

    def shares(self) -> dict[str, Tensor]:
        """What the table has of each sample, ``[T, B]`` at the steps that are kept."""
        flow = self.keys()
        means = {"kappa": flow.kappa.to(self.call.dtype), "effective": flow.effective}
        return {name: self.call.kept(x.mean(1).t()) for name, x in means.items()}

    def attended(self) -> Tensor | None:
        """The last step that attends each of the first sample and head ``[T]``, if there is one."""
        last = self.keys().last
        return last[0, 0] if last[..., 0].numel() else None
