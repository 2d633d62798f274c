"""The training loop: one epoch at a time, with a state that can be saved between epochs."""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import throughtime
from bench.tasks.config import Config
from bench.tasks.data import Sequences, Task
from bench.tasks.model import SequenceClassifier
from bench.tasks.record import Epoch

EVALUATION_BATCH = 500

Progress = Callable[[float, float, float, float], None]
"""Called after every update with loss, accuracy, gradient norm and sequences per second."""


class NonFiniteLossError(Exception):
    """The loss became infinite or not a number."""


class Trainer:
    """Trains a model on a task.

    Two trainers with equal arguments do the same, and so does one that loads the other's state
    between epochs: weights, optimizer, order of the data and masks continue bit for bit.

    Args:
        model: on its device already.
        task: the data.
        config: learning rate, batch, clipping, seed, epochs, p and annealing.
    """

    def __init__(self, model: SequenceClassifier, task: Task, config: Config) -> None:
        self.model = model
        self.task = task
        self.config = config
        self.history: list[Epoch] = []
        self._schedule = self._make_schedule()
        self._optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
        self._order = torch.Generator().manual_seed(config.seed)
        torch.manual_seed(config.seed)  # masks are drawn from torch's default generator

    def run(
        self,
        on_epoch: Callable[[Epoch], None],
        progress: Progress | None = None,
        *,
        until: int | None = None,
    ) -> None:
        """Trains the epochs that are left.

        Args:
            on_epoch: called after each epoch, when the state may be saved.
            progress: called after each update.
            until: stop after this epoch; None trains all of them.

        Raises:
            KeyboardInterrupt: after Ctrl-C, between two updates and never within ``on_epoch``.
            NonFiniteLossError: if the loss stops being a number.
        """
        with _DelayedInterrupt() as interrupt:
            last = self.config.epochs if until is None else until
            while len(self.history) < last and not self.arrived():
                self.history.append(self._epoch(interrupt, progress))
                on_epoch(self.history[-1])
                interrupt.check()

    def arrived(self) -> bool:
        """Whether two epochs in a row have reached ``stop_at``."""
        wanted = self.config.stop_at
        accuracies = [epoch.validation_accuracy for epoch in self.history[-2:]]
        return wanted is not None and len(accuracies) == 2 and min(accuracies) >= wanted

    def _make_schedule(self) -> throughtime.DetachSchedule | None:
        if self.config.p == 0:
            return None
        epochs, anneal = self.config.epochs, self.config.anneal
        return throughtime.DetachSchedule(self.model, epochs, final_steps=anneal)

    def _epoch(self, interrupt: _DelayedInterrupt, progress: Progress | None) -> Epoch:
        config = self.config
        number = len(self.history) + 1
        updates_before = self.history[-1].updates if self.history else 0
        p = 0.0 if self._schedule is None else self._schedule.get_last_value()[0]
        self.model.train()
        losses, accuracies, norms, sizes = [], [], [], []
        start = time.perf_counter()
        for step, indices in enumerate(self.task.order(config.batch, self._order), start=1):
            loss, accuracy, norm = self._update(indices)
            if not math.isfinite(loss):
                raise NonFiniteLossError(
                    f"the loss is {loss} at update {updates_before + step} (epoch {number}); "
                    f"try a smaller --lr (now {config.lr:g}), a smaller --clip "
                    f"(now {config.clip:g}) or a larger --p (now {config.p:g})"
                )
            losses.append(loss)
            accuracies.append(accuracy)
            norms.append(norm)
            sizes.append(len(indices))
            if progress is not None:
                progress(loss, accuracy, norm, sum(sizes) / (time.perf_counter() - start))
            interrupt.check()
        seconds = time.perf_counter() - start
        if self._schedule is not None:
            self._schedule.step()
        return Epoch(
            epoch=number,
            updates=updates_before + len(losses),
            seconds=seconds,
            loss=_mean(losses, sizes),
            train_accuracy=_mean(accuracies, sizes),
            validation_accuracy=self.accuracy(self.task.validation),
            test_accuracy=self.accuracy(self.task.test),
            grad_norm_median=statistics.median(norms),
            grad_norm_max=max(norms),
            p=p,
            sequences_per_s=sum(sizes) / seconds,
        )

    def _update(self, indices: Tensor) -> tuple[float, float, float]:
        """One update; returns loss, accuracy and the norm of the gradient before clipping."""
        x, y = (part.to(self.config.device) for part in self.task.train.batch(indices))
        logits = self.model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self._optimizer.step()
        return loss.item(), self._hits(logits, y) / self._scored(len(indices)), norm.item()

    def accuracy(
        self, sequences: Sequences, *, count: int | None = None, batch: int = EVALUATION_BATCH
    ) -> float:
        """Fraction of right answers on the first ``count``, without training anything."""
        self.model.eval()
        hits = 0.0
        count = len(sequences) if count is None else count
        with torch.inference_mode():
            for indices in torch.split(torch.arange(count), batch):
                x, y = (part.to(self.config.device) for part in sequences.batch(indices))
                hits += self._hits(self.model(x), y)
        return hits / self._scored(count)

    def _hits(self, logits: Tensor, y: Tensor) -> float:
        scored = self.task.scored_steps
        return float((logits[-scored:].argmax(-1) == y[-scored:]).sum())

    def _scored(self, sequences: int) -> int:
        return sequences * self.task.scored_steps

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
            "order": self._order.get_state(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "history": [asdict(epoch) for epoch in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the epoch at which ``state_dict`` was called."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._schedule is not None:
            # The run may have been made longer since.
            stored = {**state["schedule"], "total_steps": self.config.epochs}
            self._schedule.load_state_dict(stored)
        self._order.set_state(state["order"])
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])
        self.history = [Epoch(**row) for row in state["history"]]


def _mean(values: list[float], weights: list[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


class _DelayedInterrupt:
    """Holds the first Ctrl-C back until ``check``; a second one stops at once.

    So a checkpoint that is being written gets finished.
    """

    def __enter__(self) -> _DelayedInterrupt:
        self._pending = False
        self._previous: Any = None
        # Python delivers signals to the main thread only, and only it may set a handler.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._hold)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._pending:
            raise KeyboardInterrupt
        self._pending = True

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C was pressed."""
        if self._pending:
            raise KeyboardInterrupt
