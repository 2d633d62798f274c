"""One call of one layer in one direction: what went in, what came back."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
_READ = (
    "input", "h_0", "c_0", *WEIGHTS, "lengths", "reset", "reset_h", "reset_c", "detach_mask",
    "output",
)  # fmt: skip
_GRADS = ("grad_output", "grad_h_n", "grad_c_n", "grad_cells")


class Call:
    """What the kernels or the definition left of one call.

    Args:
        layer: the name of the layer.
        number: of the call of this layer, from 0.
        direction: 0, or 1 for the one that travels backward.
    """

    def __init__(self, layer: str, number: int, direction: int) -> None:
        self.layer, self.number, self.direction = layer, number, direction
        self.scale = 1.0  # of the loss
        self.dh: Tensor | None = None  # [T, B, H or P], whole gradient by h_t
        self.dc: Tensor | None = None  # [T, B, H]
        self.reverse = False
        self._read: dict[str, Tensor | None] = {}
        self._grads: dict[str, Tensor | None] = {}
        self._input_version = 0

    @property
    def name(self) -> str:
        """The call in messages."""
        return f"call {self.number} of layer {self.layer!r}, direction {self.direction}"

    def begin(self, given: dict[str, Any]) -> None:
        """Keep what later questions read: no copy but of the weights, which an optimizer changes.

        Raises:
            RuntimeError: if the call has been traced already.
        """
        if self._read:
            self.refuse()
        self.reverse = given["reverse"]
        read = {name: given.get(name) for name in _READ}
        self._input_version = _version(read["input"])
        self._read = {
            name: None if x is None else x.detach().clone() if name in WEIGHTS else x.detach()
            for name, x in read.items()
        }

    def refuse(self) -> NoReturn:
        """Refuse a second backward pass.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"gradient_flow: a second backward pass through {self.name}, of which the first is "
            "kept; add the losses up and call backward() once, or use a gradient_flow for each"
        )

    def grads(self, given: dict[str, Tensor | None]) -> None:
        """Keep the gradients that came to the results."""
        self._grads |= {n: x.detach() for n, x in given.items() if n in _GRADS and x is not None}

    @property
    def traced(self) -> bool:
        """Whether a backward pass came through."""
        return self.dc is not None

    def read(self, name: str) -> Tensor | None:
        """An argument, or the output, in the dtype of the trace.

        Raises:
            RuntimeError: if the input was changed since.
        """
        if name == "input" and _version(self._read["input"]) != self._input_version:
            raise RuntimeError(
                f"gradient_flow: the input of {self.name} was changed in place since the backward "
                "pass, and this needs it; ask before that, or give the layer a copy"
            )
        x = self._read[name]
        assert self.dc is not None
        return x if x is None or not x.is_floating_point() else x.to(self.dc.dtype)

    def needed(self, name: str) -> Tensor:
        """The same where it is always there."""
        x = self.read(name)
        assert x is not None
        return x

    def gradient(self, name: str) -> Tensor | None:
        """A gradient that came to a result, unscaled; None: zero."""
        x = self._grads.get(name)
        assert self.dc is not None
        return None if x is None else x.to(self.dc.dtype) / self.scale

    def whole(self) -> tuple[Tensor, Tensor]:
        """The gradients by every h_t and c_t, unscaled."""
        assert self.dh is not None and self.dc is not None
        if self.scale == 1.0:
            return self.dh, self.dc
        return self.dh / self.scale, self.dc / self.scale

    def inside(self) -> Tensor:
        """True within a sample, ``[T, B]``."""
        assert self.dc is not None
        steps = torch.arange(len(self.dc), device=self.dc.device).unsqueeze(1)
        lengths = self._read["lengths"]
        ends = len(self.dc) if lengths is None else lengths
        return (steps < ends).expand(self.dc.shape[:2])

    def last(self) -> Tensor:
        """True at the last step of each sample in the direction of travel, ``[T, B]``."""
        inside = self.inside()
        if self.reverse:
            return inside & torch.cat([torch.ones_like(inside[:1]), torch.zeros_like(inside[1:])])
        after = torch.cat([inside[1:], torch.zeros_like(inside[:1])])
        return inside & ~after

    def direct(self) -> Tensor:
        """Y_t ``[T, B, H or P]``: the loss by h_t with the recurrence held fixed."""
        assert self.dh is not None
        return self._own("grad_output", "grad_h_n", self.dh)

    def direct_of_cells(self) -> Tensor:
        """The same by c_t ``[T, B, H]``: what c_n and ``cells`` get."""
        assert self.dc is not None
        return self._own("grad_cells", "grad_c_n", self.dc)

    def _own(self, every: str, last: str, like: Tensor) -> Tensor:
        found = self.gradient(every)
        found = torch.zeros_like(like) if found is None else found
        found = torch.where(self.inside().unsqueeze(2), found, 0.0)
        end = self.gradient(last)
        return found if end is None else found + self.last().unsqueeze(2) * end


def _version(x: Tensor | None) -> int:
    return 0 if x is None or x.is_inference() else x._version
