"""TorchRL's ``LSTMModule``, with whole rows of episodes in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

try:
    from tensordict import TensorDictBase
    from tensordict.nn import dispatch
    from torchrl.modules import LSTMModule as _LSTMModule
except ModuleNotFoundError as error:
    raise ImportError(
        f"throughtime.integrations.torchrl needs {error.name}: pip install torchrl"
    ) from error

from throughtime.nn import LSTM
from throughtime.replacement import replace

States = tuple[Tensor, Tensor]


class LSTMModule(_LSTMModule):
    """``torchrl.modules.LSTMModule`` that neither splits nor pads a row at its episodes' borders.

    In recurrent mode a row of several episodes is one call of :class:`throughtime.LSTM` with
    ``reset`` where ``is_init`` is set. There the state starts from the stored one of that step, as
    in TorchRL: zeros from the primer, another one where a sampler has put slices side by side.
    A step of a rollout is TorchRL's own.

    Outputs, gradients and the states at a row's last step are TorchRL's. At the last step of an
    episode within a row it puts the final states of that episode, which nothing in TorchRL reads;
    here they are zeros, but for h of a single layer.

    Args:
        args, kwargs: as in ``torchrl.modules.LSTMModule``. ``lstm`` may be an
            :class:`throughtime.LSTM` or an ``nn.LSTM`` with ``batch_first=True``; the parameters of
            the latter go on in the new layer.

    Raises:
        ImportError: if TorchRL is not installed.
        ValueError: if the layer is bidirectional: one call cannot give the states of its episodes.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.modules import set_recurrent_mode
        >>> from throughtime.integrations.torchrl import LSTMModule
        >>> module = LSTMModule(input_size=3, hidden_size=4, in_key="obs", out_key="embed")
        >>> data = TensorDict({"obs": torch.randn(2, 5, 3),
        ...                    "is_init": torch.rand(2, 5, 1) < 0.3}, [2, 5])
        >>> with set_recurrent_mode(True):
        ...     assert module(data)["embed"].shape == (2, 5, 4)

    Source: https://docs.pytorch.org/rl (``LSTMModule``).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.lstm, nn.LSTM):
            replace(self)
        if not isinstance(self.lstm, LSTM):
            raise TypeError(
                "lstm should be a throughtime.LSTM or an nn.LSTM, got "
                f"{type(self.lstm).__name__}; leave python_based=False"
            )
        if self.lstm.bidirectional:
            raise ValueError(
                "throughtime's LSTMModule should not be bidirectional: one call cannot give the "
                "final states of every episode; use torchrl.modules.LSTMModule"
            )

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run a step, or in recurrent mode rows of steps; see ``torchrl.modules.LSTMModule``."""
        if not self.recurrent_mode or tensordict.ndim == 0:
            return super().forward(tensordict)
        rows = tensordict.unsqueeze(0) if tensordict.ndim == 1 else tensordict
        rows = rows.flatten(0, -2) if rows.ndim > 2 else rows  # [B, T]
        x, h, c = (rows.get(key, None) for key in self.in_keys[:3])
        inner = rows.get("is_init").reshape(rows.shape).clone()
        inner[:, 0] = False  # a row goes on from the stored state of its first step
        hx, reset_hx = _stored(h, c, inner)
        output, states = self.lstm(x, hx, reset=inner, reset_hx=reset_hx)
        ends = torch.zeros_like(inner)
        ends[:, :-1] = inner[:, 1:]
        found = [_at_ends(state, output.shape[:2]) for state in states]
        if self.lstm.num_layers == 1:
            found[0] = torch.where(ends[..., None, None], output.unsqueeze(2), found[0])
        for key, value in zip(self.out_keys, (output, *found), strict=True):
            rows.set(key, value)
        if rows is not tensordict:
            tensordict.update(rows.reshape(tensordict.shape))
        return tensordict


def _stored(
    h: Tensor | None, c: Tensor | None, inner: Tensor
) -> tuple[States | None, States | None]:
    """``hx`` and ``reset_hx`` of the states ``[B, T, L, *]`` that a tensordict holds."""
    if h is None or c is None:
        if h is not c:
            raise RuntimeError("a tensordict should hold both recurrent states, or none")
        return None, None
    layers = tuple(x.permute(2, 0, 1, 3) for x in (h, c))  # [L, B, T, *], the batch first
    hx = tuple(x[:, :, 0].contiguous() for x in layers)
    wanted = any(x.requires_grad or x[inner].any() for x in (h, c))
    return (hx[0], hx[1]), (layers[0], layers[1]) if wanted else None


def _at_ends(state: Tensor, steps: torch.Size) -> Tensor:
    """A final state ``[L, B, H]`` at the last step of ``[B, T, L, H]``, zeros elsewhere."""
    last = state.transpose(0, 1).unsqueeze(1)
    return nn.functional.pad(last, (0, 0, 0, 0, steps[1] - 1, 0))
