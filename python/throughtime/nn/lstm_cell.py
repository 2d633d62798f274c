"""``throughtime.LSTMCell``: one step of an LSTM, for rollouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from throughtime import functional
from throughtime.backends.backend import BackendName, Request
from throughtime.backends.selection import check_name
from throughtime.functional import thin
from throughtime.functional.checks import check_pair, wrong_shape
from throughtime.nn.backend import BackendChoice
from throughtime.nn.episodes import Sizes, episodes
from throughtime.ops.autograd import recording

States = tuple[Tensor, Tensor]


class LSTMCell(BackendChoice, nn.RNNCellBase):
    r"""One step of an LSTM; parameters and calls are those of :class:`torch.nn.LSTMCell`.

    An :class:`throughtime.LSTM` of one layer computes the same in a loop of such steps, and may
    share its parameters: ``lstm.weight_hh_l0 = cell.weight_hh``, and so on.

    There is no h-detach here. Of one step the only thing to detach is the state that goes in: call
    the cell with ``h.detach()``.

    Under autocast the state that comes out is of its 16 bits, whatever dtype went in, and a rollout
    rounds c at every step. ``torch.nn.LSTMCell`` gives float32 there on a CPU. To keep float32,
    call the cell in ``with torch.autocast(device, enabled=False)``, with float32 input.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state, > 0.
        bias: False leaves out both bias vectors.
        device: device of the parameters.
        dtype: floating point type of the parameters.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``. Any name but
            ``"auto"`` runs or raises.

    Raises:
        RuntimeError: if the chosen backend can never run this layer.
        ValueError: if ``backend`` is no backend.

    Example:
        >>> import torch, throughtime
        >>> cell, lstm = throughtime.LSTMCell(10, 20), throughtime.LSTM(10, 20)
        >>> for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        ...     setattr(lstm, f"{name}_l0", getattr(cell, name))
        >>> x, done = torch.randn(6, 3, 10), torch.rand(6, 3) < 0.3
        >>> state = None
        >>> for x_t, done_t in zip(x, done):
        ...     state = cell(x_t, state, reset=done_t)
        >>> assert torch.allclose(state[0], lstm(x, reset=done)[0][-1], atol=1e-6)

    Source: ``torch.nn.LSTMCell``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: BackendName = "auto",
    ) -> None:
        check_name(backend)
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        self.backend = backend

    def backend_request(self) -> Request:
        weight = self.weight_hh
        return Request("lstm", self.hidden_size, device=weight.device, dtype=weight.dtype)

    def forward(
        self, input: Tensor, hx: States | None = None, *, reset: Tensor | None = None
    ) -> States:
        """Take one step.

        Args:
            input: ``[B, I]`` or ``[I]``.
            hx: ``(h, c)``, each ``[B, H]``, or ``[H]`` if the input has no batch; zeros if None.
            reset: ``[B]`` or ``[B, 1]``, or ``[]`` if the input has no batch: True, or 1 in any
                other dtype, where an episode starts. The state is zeroed before the step.

        Returns:
            ``(h, c)``, shaped like ``hx``.

        Raises:
            RuntimeError: if a size or a device does not fit, or the chosen backend cannot run.
            TypeError: if something should be a tensor and is none.
            ValueError: if a dtype or a number of dimensions is wrong.
        """
        if hx is not None and thin.applies(input, self.backend) and not recording():
            found = self._thin(input, hx, reset)
            if found is not None:
                return found
        if not isinstance(input, Tensor):
            raise TypeError(f"LSTMCell: input should be a Tensor, got {type(input).__name__}")
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        batched = input.dim() == 2
        check_pair("LSTMCell", hx)
        for k, x in enumerate(hx or ()):
            if x.dim() != input.dim():
                raise ValueError(
                    f"LSTMCell: Expected hx[{k}] to be {input.dim()}D, got {x.dim()}D instead"
                )
        if not batched:
            input = input.unsqueeze(0)
            hx = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        batch = input.size(0)
        if isinstance(reset, Tensor):
            if tuple(reset.shape) not in ((batch,), (batch, 1), *(() if batched else ((),))):
                wanted = f"[{batch}] or [{batch}, 1] ([B] or [B, 1])" if batched else "[]"
                wrong_shape("LSTMCell", "reset", wanted, reset)
            reset = reset.reshape(batch, 1)  # one step, the batch first
        sizes = Sizes("LSTMCell", 1, 1, batch, (self.hidden_size,) * 2)
        starts = episodes(reset, None, sizes, batch_first=True)
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        _, (h, c) = functional.lstm(
            input.unsqueeze(0), hx, *weights, reset=starts.reset, backend=self.backend
        )
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))

    if TYPE_CHECKING:  # a call has forward's types; nn.Module declares Any
        __call__ = forward

    def _thin(self, input: Tensor, hx: States, reset: Tensor | None) -> States | None:
        """The thin way, if everything is plain."""
        if input.dim() != 2 or not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            return None
        if reset is not None:
            if type(reset) is not Tensor or reset.dim() != 1:
                return None
            reset = reset.unsqueeze(0)
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, None
        found = thin.run(input.unsqueeze(0), (hx[0], hx[1]), weights, reset=reset)
        return None if found is None else (found.h_n, found.c_n)
