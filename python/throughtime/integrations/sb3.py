"""Policies of sb3-contrib's recurrent algorithms, without its loop over steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

try:
    from sb3_contrib.common.recurrent.policies import (
        RecurrentActorCriticCnnPolicy,
        RecurrentActorCriticPolicy,
        RecurrentMultiInputActorCriticPolicy,
    )
except ModuleNotFoundError as error:
    raise ImportError(
        f"throughtime.integrations.sb3 needs {error.name}: pip install sb3-contrib"
    ) from error

from throughtime.nn import LSTM
from throughtime.replacement import replace

States = tuple[Tensor, Tensor]


class _OneCall(nn.Module):
    """Makes every LSTM of a policy ours, and each sequence one call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        replace(self)

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: States, episode_starts: Tensor, lstm: LSTM
    ) -> tuple[Tensor, States]:
        """Run sequences; ``features [sequences * T, I]``, ``episode_starts [sequences * T]``."""
        sequences = lstm_states[0].shape[1]
        x = features.reshape(sequences, -1, lstm.input_size).transpose(0, 1)
        starts = (episode_starts != 0).reshape(sequences, -1).transpose(0, 1)
        output, states = lstm(x, lstm_states, reset=starts)
        return output.transpose(0, 1).flatten(0, 1), states


class RecurrentPolicy(_OneCall, RecurrentActorCriticPolicy):
    """sb3-contrib's ``MlpLstmPolicy`` with :class:`throughtime.LSTM` and one call per sequence.

    sb3-contrib loops over single steps wherever an episode starts within a sequence. Here ``reset``
    says so. Parameters, outputs, states and gradients are the same, and so are saved models:
    ``RecurrentPPO.load`` of a model that was saved with this policy needs throughtime.

    Args:
        args, kwargs: as in ``sb3_contrib``'s ``RecurrentActorCriticPolicy``.

    Raises:
        ImportError: if sb3-contrib is not installed.

    Example:
        >>> from sb3_contrib import RecurrentPPO
        >>> from throughtime.integrations.sb3 import RecurrentPolicy
        >>> model = RecurrentPPO(RecurrentPolicy, "CartPole-v1", n_steps=8, batch_size=8)
        >>> model = model.learn(8)

    Source: https://sb3-contrib.readthedocs.io/en/master/modules/ppo_recurrent.html
    """


class RecurrentCnnPolicy(_OneCall, RecurrentActorCriticCnnPolicy):
    """The same for sb3-contrib's ``CnnLstmPolicy``."""


class RecurrentMultiInputPolicy(_OneCall, RecurrentMultiInputActorCriticPolicy):
    """The same for sb3-contrib's ``MultiInputLstmPolicy``."""
