"""One global batch, trained by two processes of which each has half; for test_distributed.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import throughtime

WORLD = 2
B, T, I, H = 6, 5, 3, 4  # noqa: E741
WRAPS = ("DDP", "DDP, unused parameters", "FSDP2", "FSDP2, bfloat16")
WAYS = ("LSTM", "replace", "replace what is wrapped", "accelerate")
_LOW = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Case:
    """How the layer gets our kernels, how the model is distributed, and whether steps detach."""

    way: str
    wrap: str
    masked: bool

    @property
    def low(self) -> bool:
        return "bfloat16" in self.wrap


CASES = [Case(way, wrap, masked) for wrap in WRAPS for way in WAYS for masked in (False, True)]


class Model(nn.Module):
    """``[B, T, I]`` to ``[B, T, 1]``; the second LSTM is in no result."""

    def __init__(self, kind: Callable[..., nn.Module], unused: bool) -> None:
        super().__init__()
        self.rnn = kind(I, H, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * H, 1)
        self.unused = kind(I, H) if unused else None

    def forward(self, x: Tensor, **given: Tensor) -> Tensor:
        output: Tensor = self.head(self.rnn(x, **given)[0])
        return output


def _wrapped(model: nn.Module, wrap: str) -> nn.Module:
    if wrap.startswith("DDP"):
        return DistributedDataParallel(model, find_unused_parameters="unused" in wrap)
    options: dict[str, Any] = {"mp_policy": _LOW} if "bfloat16" in wrap else {}
    options["mesh"] = init_device_mesh("cpu", (WORLD,))
    fully_shard(model.rnn, **options)
    return fully_shard(model, **options)


def train(case: Case, share: slice = slice(None), *, alone: bool = True) -> dict[str, Tensor]:
    """Outputs ``[B, T, 1]`` of two steps, and the gradients of the last, by name.

    Args:
        case: what trains; its ``wrap`` counts if not ``alone``.
        share: the samples of this process.
        alone: whether this is the only process.
    """
    torch.manual_seed(1)
    kind = throughtime.LSTM if case.way == "LSTM" else nn.LSTM
    model: nn.Module = Model(kind, "unused" in case.wrap)
    model = model.float() if case.low else model.double()
    if case.way == "replace":
        throughtime.replace(model)
    x = torch.randn(B, T, I, dtype=torch.float32 if case.low else torch.float64)[share]
    mask = (torch.rand(B, T) < 0.5)[share]
    if alone and case.low:
        model, x = model.bfloat16(), x.bfloat16()
    wrapped = model if alone else _wrapped(model, case.wrap)
    if case.way == "replace what is wrapped":
        throughtime.replace(wrapped)
    given = {"detach_mask": mask} if case.masked and case.way != "accelerate" else {}
    drawing = {"detach_prob": 0.5, "generator": torch.Generator().manual_seed(2)}
    accelerated = throughtime.accelerate(**drawing if case.masked else {})
    found: dict[str, Tensor] = {}
    with accelerated if case.way == "accelerate" else nullcontext():
        for step in range(1 if case.low else 2):
            wrapped.zero_grad()
            output = wrapped(x, **given).float() if case.low else wrapped(x, **given)
            output.square().mean().backward()
            found[f"output {step}"] = output.detach()
            with torch.no_grad():
                for p in wrapped.parameters():
                    p -= 0 if p.grad is None else 0.1 * p.grad
    accelerated.remove()
    assert case.low or set(accelerated.calls) <= {"cpu kernels"}, accelerated
    for name, p in model.named_parameters():
        if p.grad is not None:
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            found[f"grad {name}"] = grad.float() if case.low else grad
    return found


def share_of(rank: int) -> slice:
    return slice(rank * B // WORLD, (rank + 1) * B // WORLD)


def run(rank: int, folder: str) -> None:
    """What one process does: every case, one after the other; saves what it found."""
    torch.set_num_threads(1)
    group = f"file://{folder}/group"
    distributed.init_process_group("gloo", init_method=group, rank=rank, world_size=WORLD)
    try:
        found = {str(case): train(case, share_of(rank), alone=False) for case in CASES}
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()
