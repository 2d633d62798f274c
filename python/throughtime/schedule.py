"""``DetachSchedule`` changes ``detach_prob`` during training, like a learning rate scheduler."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn

from throughtime.acceleration import Acceleration
from throughtime.masks import check_probability
from throughtime.nn import LSTM, RelLSTM

Kind = Literal["constant", "linear"]


class DetachSchedule:
    """Sets ``detach_prob`` on every LSTM and RelLSTM of a model, or on a handle, step by step.

    ``"constant"`` holds the probability, and sets it to 0 for the last ``final_steps`` steps. (The
    paper trains 600 epochs, about the last 40 of them with 0.) ``"linear"`` falls from the
    probability at step 0 to 0 at step ``total_steps - final_steps``. From ``total_steps`` on both
    stay at 0. A step is an epoch or an update: whatever lies between two calls of :meth:`step`.

    Args:
        model: a model that holds at least one such layer of this package, or the layer itself, or
            the handle of :func:`throughtime.accelerate`.
        total_steps: length of training in steps, > 0.
        final_steps: number of steps at the end without detaching, 0 to ``total_steps``.
        kind: ``"constant"`` or ``"linear"``.
        detach_prob: probability in [0, 1] at the start, for all layers. None: each layer's present
            value.

    Raises:
        ValueError: if the model has no such layer, or a number is out of range.

    Example:
        >>> import throughtime
        >>> lstm = throughtime.LSTM(3, 4, detach_prob=0.5)
        >>> schedule = throughtime.DetachSchedule(lstm, total_steps=5, final_steps=2)
        >>> seen = []
        >>> for epoch in range(5):
        ...     seen.append(lstm.detach_prob)  # train one epoch here
        ...     schedule.step()
        >>> assert seen == [0.5, 0.5, 0.5, 0.0, 0.0]

    Source: arXiv 1810.03023; the number of final epochs is that of the authors' code.
    """

    def __init__(
        self,
        model: nn.Module | Acceleration,
        total_steps: int,
        *,
        final_steps: int = 0,
        kind: Kind = "constant",
        detach_prob: float | None = None,
    ) -> None:
        layers: list[LSTM | RelLSTM | Acceleration]
        if isinstance(model, Acceleration):
            layers = [model]
        else:
            layers = [module for module in model.modules() if isinstance(module, (LSTM, RelLSTM))]
        if not layers:
            raise ValueError(
                f"DetachSchedule: {type(model).__name__} has no throughtime.LSTM or RelLSTM; "
                "throughtime.replace(model) converts each nn.LSTM, and throughtime.accelerate() "
                "gives a handle to pass here"
            )
        if total_steps <= 0:
            raise ValueError(
                f"DetachSchedule: total_steps should be greater than 0, got {total_steps}"
            )
        if not 0 <= final_steps <= total_steps:
            raise ValueError(
                f"DetachSchedule: final_steps should be in range [0, {total_steps}], the total, "
                f"got {final_steps}"
            )
        if kind not in get_args(Kind):
            raise ValueError(f"DetachSchedule: kind should be 'constant' or 'linear', got {kind!r}")
        if detach_prob is not None:
            check_probability(detach_prob, "detach_prob")
        self._layers = layers
        self.total_steps = total_steps
        self.final_steps = final_steps
        self.kind = kind
        self.base_values = [x.detach_prob if detach_prob is None else detach_prob for x in layers]
        self.last_step = 0
        self._apply()

    def step(self) -> None:
        """Go to the next step and set its probabilities on the layers."""
        self.last_step += 1
        self._apply()

    def get_last_value(self) -> list[float]:
        """The present probability of each layer, in the order of ``model.modules()``."""
        return [base * self._factor() for base in self.base_values]

    def state_dict(self) -> dict[str, Any]:
        """The state, for :meth:`load_state_dict` to go on from here."""
        return {
            "total_steps": self.total_steps,
            "final_steps": self.final_steps,
            "kind": self.kind,
            "base_values": list(self.base_values),
            "last_step": self.last_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state and set its probabilities on the layers.

        Args:
            state_dict: the result of :meth:`state_dict`.

        Raises:
            ValueError: if the state belongs to another number of layers.
        """
        saved, own = len(state_dict["base_values"]), len(self._layers)
        if saved != own:
            raise ValueError(
                f"DetachSchedule: the state should hold the {own} layers of the model, got {saved}"
            )
        self.total_steps = state_dict["total_steps"]
        self.final_steps = state_dict["final_steps"]
        self.kind = state_dict["kind"]
        self.base_values = list(state_dict["base_values"])
        self.last_step = state_dict["last_step"]
        self._apply()

    def _factor(self) -> float:
        falling = self.total_steps - self.final_steps
        if self.last_step >= falling:
            return 0.0
        return 1.0 if self.kind == "constant" else 1.0 - self.last_step / falling

    def _apply(self) -> None:
        for layer, value in zip(self._layers, self.get_last_value(), strict=True):
            layer.detach_prob = value
