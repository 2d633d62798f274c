"""One call of one layer in one direction: what went in, what came back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from throughtime.functional.split import Split

WEIGHTS = (
    "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "weight_query", "weight_key",
    "weight_score", "score_weight",
)  # fmt: skip
_READ = (
    "input", "h_0", "c_0", "context_0", "memory", *WEIGHTS, "lengths", "reset", "reset_h",
    "reset_c", "detach_mask", "output", "last", "query", "key",
)  # fmt: skip
_GRADS = (
    "grad_output", "grad_h_n", "grad_c_n", "grad_context_n", "grad_cells", "grad_query",
    "grad_key", "grad_value",
)  # fmt: skip


class Call:
    """What the kernels or the definition left of one call.

    Its rows are the samples of the batch, or their episodes, where a layer's kernels take each
    episode as a row of its own. Names with ``rows`` are of these; all else is of the batch.

    Args:
        layer: the name of the layer.
        number: of the call of this layer, from 0.
        direction: 0, or 1 for the one that travels backward.
        stride: of the steps whose gradients are kept.
        split: where the episodes of the batch lie, or None.
    """

    recurrent = True  # has h_t

    def __init__(
        self,
        layer: str,
        number: int,
        direction: int,
        stride: int = 1,
        split: Split | None = None,
    ) -> None:
        self.layer, self.number, self.direction = layer, number, direction
        self.stride, self.split = stride, split
        self.module = ""  # of the layer, in the model
        self.of_cell = False  # and so one step of a loop
        self.before: Call | None = None  # the call that gave the state, if it is of a cell
        self.entering: dict[int, Tensor] = {}  # the gradients that this call gave to h and c
        self.scale = 1.0  # of the loss
        # Whole gradients by h_t and c_t, [steps, rows, H or P] and [steps, rows, H]: of the steps
        # that are kept, or of all steps of the rows of a split.
        self.dh: Tensor | None = None
        self.dc: Tensor | None = None
        self.reverse = False
        self.window_size: int | None = None  # of a RelLSTM
        self._read: dict[str, Tensor | None] = {}
        self._held: dict[str, tuple[Tensor | None, int]] = {}
        self._versions: dict[str, int] = {}
        self._grads: dict[str, Tensor | None] = {}

    @property
    def name(self) -> str:
        """The call in messages."""
        return f"call {self.number} of layer {self.layer!r}, direction {self.direction}"

    @property
    def trace_stride(self) -> int:
        """Of the steps of the rows that a trace keeps."""
        return 1 if self.split is not None else self.stride

    def hold(self, given: dict[str, Tensor | None]) -> None:
        """Keep from the forward pass on what the backward pass does not bring."""
        self._held = {
            name: (None if x is None else x.detach(), _version(x)) for name, x in given.items()
        }

    def begin(self, given: dict[str, Any]) -> None:
        """Keep what later questions read: no copy but of the weights, which an optimizer changes.

        Raises:
            RuntimeError: if the call has been traced already.
        """
        if self._read:
            self.refuse()
        self.reverse = given.get("reverse", False)
        self.window_size = given.get("window_size")
        first = given["input"] if self.recurrent else given["query"]
        self.dtype = torch.promote_types(first.dtype, torch.float32)  # of what is shown
        read = {name: (given.get(name), _version(given.get(name))) for name in _READ} | self._held
        self._held = {}
        self._versions = {name: version for name, (_, version) in read.items()}
        self._read = {
            name: None if x is None else x.detach().clone() if name in WEIGHTS else x.detach()
            for name, (x, _) in read.items()
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

    def grads(self, given: Mapping[str, Tensor | None]) -> None:
        """Keep the gradients that came to the results."""
        self._grads |= {n: x.detach() for n, x in given.items() if n in _GRADS and x is not None}

    @property
    def traced(self) -> bool:
        """Whether a backward pass has come through."""
        return self.dc is not None

    def read(self, name: str) -> Tensor | None:
        """An argument, or a result, in the dtype of what is shown.

        Raises:
            RuntimeError: if it was changed since.
        """
        x = self._read[name]
        if name not in WEIGHTS and _version(x) != self._versions[name]:
            raise RuntimeError(
                f"gradient_flow: the {name} of {self.name} was changed in place since the backward "
                "pass, and this needs it; ask before that, or give the layer a copy"
            )
        return x if x is None or not x.is_floating_point() else x.to(self.dtype)

    def needed(self, name: str) -> Tensor:
        """The same where it is always there."""
        x = self.read(name)
        assert x is not None
        return x

    def gradient(self, name: str) -> Tensor | None:
        """A gradient that came to a result, unscaled; None: zero."""
        x = self._grads.get(name)
        return None if x is None else x.to(self.dtype) / self.scale

    def arranged(self, rows: Tensor) -> Tensor:
        """``[steps, rows, ...]`` as ``[T, B, ...]``."""
        return rows if self.split is None else self.split.together(rows)

    @property
    def length(self) -> int:
        """T."""
        x = self.split.row if self.split is not None else self._read["input"]
        assert x is not None
        return len(x)

    @property
    def steps(self) -> range:
        """The steps whose gradients are kept: the last in the direction of travel is."""
        first = 0 if self.reverse else (self.length - 1) % self.stride
        return range(first, self.length, self.stride)

    def kept(self, x: Tensor) -> Tensor:
        """``[T, ...]`` at the steps that are kept."""
        every = min(self.stride, max(1, self.length))  # torch multiplies it by sizes
        return x[self.steps.start :: every]

    def whole(self) -> tuple[Tensor, Tensor]:
        """The gradients by h_t and c_t of the steps that are kept, unscaled."""
        dh, dc = self.dh, self.dc
        assert dh is not None and dc is not None
        if self.split is not None:
            dh, dc = (self.kept(self.arranged(x)) for x in (dh, dc))
        return (dh, dc) if self.scale == 1.0 else (dh / self.scale, dc / self.scale)

    def rows_inside(self) -> Tensor:
        """True within a row, ``[steps, rows]``."""
        x, lengths = self._read["input"], self._read["lengths"]
        assert x is not None
        steps = torch.arange(len(x), device=x.device).unsqueeze(1)
        ends = len(x) if lengths is None else lengths
        return (steps < ends).expand(x.shape[:2])

    def inside(self) -> Tensor:
        """True within a sample, ``[T, B]``."""
        return self.arranged(self.rows_inside())

    def rows_last(self) -> Tensor:
        """True at the last step of each row in the direction of travel, ``[steps, rows]``."""
        inside = self.rows_inside()
        if self.reverse:
            return inside & torch.cat([torch.ones_like(inside[:1]), torch.zeros_like(inside[1:])])
        after = torch.cat([inside[1:], torch.zeros_like(inside[:1])])
        return inside & ~after

    def rows_direct(self) -> Tensor:
        """Y_t ``[steps, rows, H or P]``: the loss by h_t with the recurrence held fixed."""
        assert self.dh is not None
        return self.rows_own("grad_output", "grad_h_n", self.dh)

    def direct(self) -> Tensor:
        """Y_t ``[T, B, H or P]``."""
        return self.arranged(self.rows_direct())

    def rows_direct_of_cells(self) -> Tensor:
        """The same by c_t ``[steps, rows, H]``: what c_n and ``cells`` get."""
        assert self.dc is not None
        return self.rows_own("grad_cells", "grad_c_n", self.dc)

    def rows_own(self, every: str | None, last: str, like: Tensor) -> Tensor:
        """A gradient that came to every step, if any does, and one that came to the last."""
        inside, found = self.rows_inside(), None if every is None else self.gradient(every)
        found = like.new_zeros(*inside.shape, like.size(2)) if found is None else found
        found = torch.where(inside.unsqueeze(2), found, 0.0)
        end = self.gradient(last)
        return found if end is None else found + self.rows_last().unsqueeze(2) * end


def detached(given: dict[str, Any]) -> dict[str, Any]:
    """The same without a graph: what a hook holds would keep it for ever."""
    return {name: x.detach() if isinstance(x, Tensor) else x for name, x in given.items()}


def norm_of(x: Tensor) -> Tensor:
    """Norms over the last dimension, in float64: no square is too small or too large."""
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1)
    largest = torch.where(largest.isfinite() & (largest > 0), largest, 1.0)
    found: Tensor = torch.linalg.vector_norm(x / largest.unsqueeze(-1), dim=-1).double()
    return found * largest


AnyCall = TypeVar("AnyCall", bound=Call)


def _version(x: Tensor | None) -> int:
    return 0 if x is None or x.is_inference() else x._version
