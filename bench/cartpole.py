"""PPO with a memory learns CartPole without velocities: ``python -m bench.cartpole``.

The agent sees position and angle only; it has to remember the last ones to know where they go.
Rollouts take single steps with an ``LSTMCell``; training runs whole rows of episodes in one call of
an ``LSTM`` that shares the cell's parameters, with ``reset`` where an episode starts.
Sources: Barto, Sutton, Anderson 1983 (CartPole-v1's constants); Schulman et al., arXiv 1707.06347.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import throughtime

STEPS, HIDDEN, EPOCHS, MINIBATCHES = 128, 64, 4, 4
DISCOUNT, TRACE, CLIP, ENTROPY, LEARNING_RATE = 0.99, 0.95, 0.2, 0.005, 4e-3
SOLVED, MOST_STEPS = 400.0, 500


class CartPole:
    """Games of CartPole-v1 at once: ``state [games, 4]`` is position, velocity, angle and angular
    velocity; ``finished`` has the lengths of the games that have ended.
    """

    def __init__(self, games: int) -> None:
        self.state = torch.rand(games, 4) * 0.1 - 0.05
        self.age = torch.zeros(games)
        self.finished: list[float] = []

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Push left (0) or right (1): which games are lost, and which begin anew after it."""
        x, v, angle, w = self.state.unbind(1)
        sin, cos = angle.sin(), angle.cos()
        push = (20.0 * action - 10.0 + 0.05 * w.square() * sin) / 1.1
        turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos.square() / 1.1))
        speed = push - 0.05 * turn * cos / 1.1
        moved = (x + 0.02 * v, v + 0.02 * speed, angle + 0.02 * w, w + 0.02 * turn)
        self.state = torch.stack(moved, 1)
        self.age += 1
        terminated = (moved[0].abs() > 2.4) | (moved[2].abs() > 12 * math.pi / 180)
        started = terminated | (self.age >= MOST_STEPS)
        self.finished += self.age[started].tolist()
        fresh = torch.rand_like(self.state) * 0.1 - 0.05
        self.state = torch.where(started.unsqueeze(1), fresh, self.state)
        self.age = torch.where(started, 0.0, self.age)
        return terminated, started


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, HIDDEN), nn.Tanh())
        self.lstm = throughtime.LSTM(HIDDEN, HIDDEN)
        self.cell = throughtime.LSTMCell(HIDDEN, HIDDEN)
        for name, _ in list(self.cell.named_parameters()):
            setattr(self.cell, name, getattr(self.lstm, f"{name}_l0"))  # one set of parameters
        self.policy, self.value = nn.Linear(HIDDEN, 2), nn.Linear(HIDDEN, 1)
        nn.init.normal_(self.policy.weight, std=0.01)  # begins undecided

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of actions, and values."""
        return self.policy(h).log_softmax(-1), self.value(h).squeeze(-1)

    def observe(self, state: Tensor) -> Tensor:
        return self.encoder(state[..., [0, 2]] * torch.tensor([4.0, 20.0]))


@torch.no_grad()
def play(
    agent: Agent, game: CartPole, memory: tuple[Tensor, Tensor], started: Tensor
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor], Tensor]:
    """``STEPS`` steps of all games, ``[T, games, ...]``; the memory after them, and new games."""
    steps = []
    for _ in range(STEPS):
        state = game.state
        memory = agent.cell(agent.observe(state), memory, reset=started)
        log_p, value = agent(memory[0])
        action = log_p.exp().multinomial(1).squeeze(1)
        chosen = log_p.gather(1, action.unsqueeze(1)).squeeze(1)
        terminated, after = game.step(action)
        steps.append((state, started, action, chosen, value, terminated, after))
        started = after
    names = ("state", "started", "action", "log_p", "value", "terminated", "after")
    found = dict(zip(names, map(torch.stack, zip(*steps, strict=True)), strict=True))
    _, last = agent(agent.cell(agent.observe(game.state), memory, reset=started)[0])
    advantage, ahead = torch.zeros_like(last), []
    for t in reversed(range(STEPS)):
        # The next value of a game that was stopped is not known: its own stands in.
        following = torch.where(found["after"][t], found["value"][t], last)
        following = torch.where(found["terminated"][t], 0.0, following)
        error = 1.0 + DISCOUNT * following - found["value"][t]
        advantage = error + torch.where(found["after"][t], 0.0, DISCOUNT * TRACE * advantage)
        ahead.append(advantage)
        last = found["value"][t]
    found["advantage"] = torch.stack(ahead[::-1])
    return found, memory, started


def loss(agent: Agent, data: dict[str, Tensor], memory: tuple[Tensor, Tensor]) -> Tensor:
    h, _ = agent.lstm(agent.observe(data["state"]), memory, reset=data["started"])
    log_p, value = agent(h)
    chosen = log_p.gather(2, data["action"].unsqueeze(2)).squeeze(2)
    ratio = (chosen - data["log_p"]).exp()
    target = data["advantage"] + data["value"]
    gain = (data["advantage"] - data["advantage"].mean()) / (data["advantage"].std() + 1e-8)
    policy = torch.min(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean()
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    return 0.5 * (value - target).square().mean() / 100 - policy - ENTROPY * entropy


def train(updates: int, games: int, report: Callable[[int, float], None]) -> float:
    """The mean length of the last 100 games; ends early once it exceeds ``SOLVED``."""
    agent, game = Agent(), CartPole(games)
    optimizer = torch.optim.Adam(agent.parameters(), lr=LEARNING_RATE, eps=1e-5)
    memory = torch.zeros(games, HIDDEN), torch.zeros(games, HIDDEN)
    started, mean = torch.ones(games, dtype=torch.bool), 0.0
    for update in range(updates):
        before = memory
        data, memory, started = play(agent, game, memory, started)
        for _ in range(EPOCHS):
            for part in torch.randperm(games).chunk(MINIBATCHES):
                rows = {name: x[:, part] for name, x in data.items()}
                begin = before[0][part].unsqueeze(0), before[1][part].unsqueeze(0)
                optimizer.zero_grad()
                loss(agent, rows, begin).backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        recent = game.finished[-100:]
        mean = sum(recent) / max(1, len(recent))
        report(update, mean)
        if len(game.finished) >= 100 and mean > SOLVED:
            break
    return mean


def show(update: int, mean: float) -> None:
    print(
        f"{update + 1:4} {time.process_time():5.0f} s of processor time  return {mean:.0f}",
        flush=True,
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    train(200, 64, show)
