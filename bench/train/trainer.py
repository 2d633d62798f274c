"""The trainer: one epoch at a time, with a state that can be saved between epochs."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import throughtime
from bench.arguments import UsageError
from bench.train import pixels, recall, series, text
from bench.train.config import OPTIMIZERS, Config
from bench.train.model import LAYERS, SequenceClassifier
from bench.train.ranks import Ranks, alone
from bench.train.task import Data, Task

EVALUATION_BATCH = 500
LOST = (
    "Connection",
    "peer",
    "Gloo",
    "NCCL",
    "Broken pipe",
)  # torch's words for a process that ended
MAKERS: Mapping[str, Callable[[Config], Task]] = {
    "pixels": pixels.make,
    "copying": recall.make,
    "denoise": recall.make,
    "text": text.make,
    "series": series.make,
}


class TrainingError(Exception):
    """Training cannot continue; the message says why and what to do."""


@dataclass(frozen=True)
class Epoch:
    """One row of log.csv.

    ``updates`` counts from the start of the run; ``seconds``, ``cpu_seconds`` (of all threads) and
    ``sequences_per_s`` are those of training alone, without evaluation; accuracies are fractions,
    the training one the mean over the epoch; losses are in nats; gradient norms are taken before
    clipping.
    """

    epoch: int
    updates: int
    seconds: float
    cpu_seconds: float
    loss: float
    train_accuracy: float
    validation_accuracy: float
    test_accuracy: float
    validation_loss: float
    test_loss: float
    grad_norm_median: float
    grad_norm_max: float
    p: float
    sequences_per_s: float

    def line(self, epochs: int) -> str:
        """The summary that is printed after the epoch."""
        name, *words = (f"{name.replace('_', ' ')} {x:.4g}" for name, x in asdict(self).items())
        return f"{name}/{epochs}  {'  '.join(words)}"


def best(history: Iterable[Epoch]) -> Epoch:
    """The epoch with the best validation accuracy, the first of equals."""
    return max(history, key=lambda epoch: (epoch.validation_accuracy, -epoch.epoch))


class Evaluation(NamedTuple):
    """Mean cross entropy in nats, of all targets, and the fraction of right answers."""

    loss: float
    accuracy: float


class Trainer:
    """Trains a model on a task, both made from the configuration.

    Trainers with equal configurations do the same to the bit, and so does one that loads the
    other's state between epochs, with the same number of processes. One seed gives the same weights
    to every layer. With ``bar`` each epoch shows its progress, if stderr is a terminal.
    """

    def __init__(self, config: Config, *, bar: bool = False, ranks: Ranks | None = None) -> None:
        torch.set_num_threads(config.threads)
        self.config, self._bar = config, bar
        self.ranks = ranks or alone(config.device)
        self.task: Task = MAKERS[config.task](config)
        self.history: list[Epoch] = []
        torch.manual_seed(config.seed)
        try:
            layer = LAYERS[config.layer].make(self.task.features, config)
            if config.chrono:
                throughtime.init.chrono_(layer, config.chrono)
            self.model = SequenceClassifier(layer, config.hidden, self.task).to(self.ranks.device)
            self._parallel = self.ranks.parallel(self.model)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # torch asserts CUDA
            raise UsageError(
                f"--hidden {config.hidden}, --device {config.device}, --backend {config.backend}, "
                f"--chrono {config.chrono}: {str(error).splitlines()[0]}"
            ) from error
        self._optimizer = OPTIMIZERS[config.optimizer](self.model.parameters(), lr=config.lr)
        self._schedule: throughtime.DetachSchedule | None = None
        if config.p > 0:
            self._schedule = throughtime.DetachSchedule(
                self.model, config.epochs, final_steps=config.anneal
            )
        self._order = torch.Generator().manual_seed(config.seed)

    def run(self, on_epoch: Callable[[Epoch], object], *, until: int | None = None) -> None:
        """Trains the epochs that are left, or those up to ``until``.

        After each epoch it calls ``on_epoch``, which may save the state.
        """
        last = self.config.epochs if until is None else until
        while len(self.history) < last:
            try:
                epoch = self._epoch()
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                number = len(self.history) + 1
                if self.ranks.world > 1 and any(word in reason for word in LOST):
                    raise TrainingError(
                        f"another process of this run ended in epoch {number}; its own message "
                        f"says why ({reason}); go on with --resume and any number of processes"
                    ) from error
                if "allocate" not in reason:  # in torch's words for CPU and GPU
                    raise
                raise TrainingError(
                    f"out of memory in epoch {number}: make --hidden, "
                    f"--batch or the sequences smaller ({reason})"
                ) from error
            self.history.append(epoch)
            on_epoch(epoch)

    def _epoch(self) -> Epoch:
        before = self.history[-1].updates if self.history else 0
        p = 0.0 if self._schedule is None else self._schedule.get_last_value()[0]
        order = self.task.order(self.config.batch, self._order)
        results: Any = []
        self.model.train()
        # Masks are drawn from torch's default generator.
        torch.manual_seed(self.ranks.seed(self.config.seed, len(self.history)))
        start, cpu_start = time.perf_counter(), time.process_time()
        bar = tqdm(
            order, desc=f"epoch {len(self.history) + 1}/{self.config.epochs}", file=sys.stderr,
            leave=False, disable=None if self._bar else True,  # None: unless stderr is a terminal
        )  # fmt: skip
        for indices in bar:
            results.append(self._update(indices, before + len(results) + 1))
            shown = "loss {:.3f}, accuracy {:.3f}, gradient {:.3g}".format(*results[-1])
            bar.set_postfix_str(shown, refresh=False)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        if self._schedule is not None:
            self._schedule.step()
        norms = np.array(results)[:, 2]
        sizes = [len(range(len(indices))[self.ranks.share(len(indices))]) for indices in order]
        weighted = np.array(results)[:, :2].T @ np.array(sizes)
        loss, accuracy = (x / sum(map(len, order)) for x in self.ranks.sum(weighted.tolist()))
        validation, test = map(self.evaluate, (self.task.validation, self.task.test))
        return Epoch(
            epoch=len(self.history) + 1,
            updates=before + len(order),
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            loss=loss,
            train_accuracy=accuracy,
            validation_accuracy=validation.accuracy,
            test_accuracy=test.accuracy,
            validation_loss=validation.loss,
            test_loss=test.loss,
            grad_norm_median=float(np.median(norms)),
            grad_norm_max=float(norms.max()),
            p=p,
            sequences_per_s=sum(map(len, order)) / seconds,
        )

    def _update(self, indices: Tensor, number: int) -> tuple[float, float, float]:
        """One update; returns loss and accuracy of the own share, and the norm of the gradient.

        That is the norm before clipping, of the whole batch, the same in each process.
        """
        config, share = self.config, self.ranks.share(len(indices))
        x, y = (part.to(self.ranks.device) for part in self.task.train.batch(indices, share))
        count = y.size(1)
        logits = self._parallel(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        self._optimizer.zero_grad(set_to_none=True)
        # Gradients are averaged over the processes, whose shares may differ by one sample.
        torch.autograd.backward(loss * (count * self.ranks.world / len(indices)))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
        values = loss.item(), self._hits(logits, y) / (count * self.task.scored_steps), norm.item()
        if not all(map(math.isfinite, values)):
            raise TrainingError(
                f"the loss is {values[0]:g} and the norm of its gradient {values[2]:g} at update "
                f"{number} (epoch {len(self.history) + 1}); try a smaller --lr (now "
                f"{config.lr:g}), a smaller --clip (now {config.clip or 'none'}) or a larger --p "
                f"(now {config.p:g})"
            )
        self._optimizer.step()
        return values

    def evaluate(
        self, data: Data, *, count: int | None = None, batch: int = EVALUATION_BATCH
    ) -> Evaluation:
        """Loss and accuracy on the first ``count`` sequences, without training anything."""
        self.model.eval()
        hits = loss = 0.0
        count = count or len(data)
        batches = torch.split(torch.arange(count), batch)
        with torch.inference_mode():
            for indices in batches[self.ranks.rank :: self.ranks.world]:
                x, y = (part.to(self.ranks.device) for part in data.batch(indices))
                logits = self.model(x)
                # At another T than the trained one the last answers are compared.
                part = F.cross_entropy(logits.flatten(0, 1), y[-len(logits) :].flatten())
                loss += part.item() * len(indices)
                hits += self._hits(logits, y)
        loss, hits = self.ranks.sum([loss, hits])
        return Evaluation(loss / count, hits / (count * self.task.scored_steps))

    def _hits(self, logits: Tensor, y: Tensor) -> float:
        scored = self.task.scored_steps
        return float((logits[-scored:].argmax(-1) == y[-scored:]).sum())

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on."""
        return {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "order": self._order.get_state(),
            "history": [asdict(epoch) for epoch in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the epoch at which ``state_dict`` was called."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._order.set_state(state["order"])
        self.history = [Epoch(**row) for row in state["history"]]
        if self._schedule is not None:
            for _ in self.history:
                self._schedule.step()
