"""The h-detach of a layer, or of all layers: its probability, and the masks that it draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from throughtime import masks


class HDetach:
    """Gives ``detach_prob``, checks every assignment to it, and draws masks."""

    detach_shared: bool

    @property
    def detach_prob(self) -> float:
        """Probability in [0, 1] of detaching a step in training; it may change at any time."""
        return self._detach_prob

    @detach_prob.setter
    def detach_prob(self, p: float) -> None:
        self._detach_prob = masks.check_probability(p, "detach_prob")

    def _masks(
        self,
        mask: Tensor | None,
        count: int,
        length: int,
        batch: int,
        *,
        training: bool,
        device: torch.device,
        generator: torch.Generator | None,
        batch_first: bool = False,
        order: Tensor | None = None,
    ) -> Sequence[Tensor | None]:
        """``count`` masks, ``[T]`` or ``[T, B]``: those of ``mask``, or drawn, or None.

        ``order`` is that of the samples in a packed sequence.
        """
        if mask is not None:
            found = masks.per_layer(mask, count, length, batch, batch_first)
            if order is None:
                return found
            return [x.index_select(1, order) if x.dim() == 2 else x for x in found]
        if not (training and self.detach_prob > 0 and torch.is_grad_enabled()):
            return [None] * count
        return masks.drawn(
            count,
            length,
            self.detach_prob,
            shared=self.detach_shared,
            device=device,
            generator=generator,
        )
