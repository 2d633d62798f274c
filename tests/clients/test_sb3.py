"""``throughtime.integrations.sb3`` beside sb3-contrib's own policies."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed: pip install sb3-contrib")

from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy as Theirs
from sb3_contrib.common.recurrent.type_aliases import RNNStates

from closeness import assert_close
from throughtime import LSTM
from throughtime.integrations import sb3
from throughtime.integrations.sb3 import RecurrentPolicy as Ours

SEQUENCES, T, H = 4, 7, 8
CRITICS: tuple[dict[str, Any], ...] = (
    {"enable_critic_lstm": True, "n_lstm_layers": 2},
    {"enable_critic_lstm": False, "shared_lstm": True},
)


def policies(**options: Any) -> list[Any]:
    made = []
    for kind in (Ours, Theirs):
        torch.manual_seed(1)
        observation = spaces.Box(-1.0, 1.0, (3,))
        policy = kind(
            observation, spaces.Discrete(2), lambda _: 0.01, lstm_hidden_size=H, **options
        )
        made.append(policy)
    return made


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("starts", [0.0, 0.3, 1.0])
def test_sequences_in_one_call(layers: int, starts: float) -> None:
    """Outputs, states and gradients, in float64, to which policies convert nothing."""
    found = []
    for policy in policies(n_lstm_layers=layers):
        torch.manual_seed(2)
        lstm = policy.lstm_actor.double()
        x, h, c = (
            torch.randn(*sizes, dtype=torch.float64, requires_grad=True)
            for sizes in ((SEQUENCES * T, 3), (layers, SEQUENCES, H), (layers, SEQUENCES, H))
        )
        episode_starts = (torch.rand(SEQUENCES * T) < starts).float()
        output, states = policy._process_sequence(x, (h, c), episode_starts, lstm)
        loss = output.square().sum() + states[0].sum() + states[1].square().sum()
        grads = torch.autograd.grad(loss, [x, h, c, *lstm.parameters()])
        found.append([output, *states, *grads])
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("options", CRITICS, ids=str)
def test_a_training_step(options: dict[str, Any]) -> None:
    found = []
    layers = options.get("n_lstm_layers", 1)
    for policy in policies(**options):
        torch.manual_seed(2)
        rows = SEQUENCES * T
        observation = torch.randn(rows, 3)
        episode_starts = (torch.rand(rows) < 0.3).float()
        states = [torch.randn(layers, SEQUENCES, H) for _ in range(4)]
        values, log_prob, _ = policy.evaluate_actions(
            observation,
            torch.randint(0, 2, (rows,)),
            RNNStates((states[0], states[1]), (states[2], states[3])),
            episode_starts,
        )
        found.append([values, log_prob])
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


def test_steps_of_a_rollout() -> None:
    found = []
    for policy in policies():
        torch.manual_seed(2)
        observation = torch.randn(SEQUENCES, 3)
        states = [torch.randn(1, SEQUENCES, H) for _ in range(4)]
        with torch.no_grad():
            _, values, _, (pi, vf) = policy(
                observation,
                RNNStates((states[0], states[1]), (states[2], states[3])),
                torch.tensor([0.0, 1.0, 0.0, 1.0]),
                deterministic=True,
            )
        found.append([values, *pi, *vf])
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


def test_it_learns_saves_and_loads_what_theirs_does(tmp_path: Path) -> None:
    """The same weights after training; a loaded model has our layers again."""
    weights = []
    for kind in (Ours, "MlpLstmPolicy"):
        options: dict[str, Any] = {"policy_kwargs": {"lstm_hidden_size": H}, "seed": 3}
        model = RecurrentPPO(kind, "CartPole-v1", n_steps=64, batch_size=32, **options)
        model.learn(128)
        model.save(tmp_path / "model")
        loaded = RecurrentPPO.load(tmp_path / "model")
        assert (type(loaded.policy.lstm_actor) is LSTM) == (kind is Ours)
        weights.append(torch.cat([w.detach().flatten() for w in loaded.policy.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_the_example() -> None:
    failed, tried = doctest.testmod(sb3)
    assert tried and not failed
