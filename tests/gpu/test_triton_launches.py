"""Where Triton's kernels are launched, and with how many programs: without a GPU, nothing runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from throughtime.triton_kernels import lstm, rel_lstm, relevancy
from triton.runtime.jit import KernelInterface

T, B, H = 5, 3, 4
META = torch.device("meta")  # tensors without numbers, for a GPU that is not there


class Current:
    """Stands for ``torch.cuda.device``, which wants a GPU."""

    device: ClassVar[torch.device] = torch.device("cuda", 0)

    def __init__(self, device: torch.device) -> None:
        self.wanted = device

    def __enter__(self) -> None:
        self.before, Current.device = Current.device, self.wanted

    def __exit__(self, *error: object) -> None:
        Current.device = self.before


@pytest.fixture
def launched_on(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[torch.device]]:
    """By kernel: the GPUs that were the current one when it was launched, which does nothing."""
    found: dict[str, set[torch.device]] = {}

    def stub(name: str) -> Any:
        class Kernel:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                return lambda *args, **options: found.setdefault(name, set()).add(Current.device)

        return Kernel()

    for module in (lstm, rel_lstm, relevancy):
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, KernelInterface):
                monkeypatch.setattr(module, name, stub(f"{module.__name__}.{name}"))
    # The one thing whose size the host waits for: python/README.md, limits.
    monkeypatch.setattr(
        rel_lstm, "retained_positions", lambda last, ends, T, *_: last.new_empty(len(last), T, 2)
    )
    monkeypatch.setattr(lstm, "_shared_bytes", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "device", Current)
    return found


def run_lstm(made: Callable[..., Tensor], units: int) -> None:
    states, weight = (made(B, units), made(B, units)), made(4 * units, units)
    output, h_n, c_n, gates, cells = lstm.recurrence_forward(
        made(T, B, 4 * units), None, *states, weight, None, None, False, True
    )
    lstm.recurrence_backward(
        output, h_n, c_n, states[1], weight, gates, cells, None, None, None, False
    )


def run_relevancy(made: Callable[..., Tensor]) -> None:
    given = tuple(made(B, 2, T, H) for _ in range(3))
    output, lse, last, *_ = relevancy.forward(*given, None, None, None, 0, 2, 2, 1.0, False)
    relevancy.backward(output, *given, None, None, output, lse, last, 0, 2, 1.0)


def run_rel_lstm(made: Callable[..., Tensor]) -> None:
    x, state = made(T, B, 2), made(B, H)
    gates, attention = (made(4 * H, 2), made(4 * H, H)), (made(H, H), made(H, H), made(H))
    *_, last, _, _, saved = rel_lstm.forward(
        x, state, state, state, None, None, *gates, None, None, *attention, None, None, 0, 2, 2,
        False, True,
    )  # fmt: skip
    rel_lstm.backward(
        made(T, B, H), None, None, None, x, state, *gates, *attention, None, None, last, saved, 0,
        2, True, True,
    )  # fmt: skip


def test_every_kernel_is_launched_on_the_gpu_of_its_tensors(
    launched_on: dict[str, set[torch.device]],
) -> None:
    """Triton launches on the current GPU, here cuda:0, whatever its arguments are on, here meta.

    These have no numbers: nothing but RelLSTM's backward waits for some, which no CUDA graph could.
    """

    def made(*shape: int) -> Tensor:
        return torch.empty(shape, device=META)

    run_lstm(made, H)
    run_lstm(made, 200)  # too many units for a walk
    run_relevancy(made)
    run_rel_lstm(made)
    assert len(launched_on) == 11 and Current.device.type == "cuda"
    assert {name: gpus for name, gpus in launched_on.items() if gpus != {META}} == {}


@pytest.mark.parametrize(
    ("sequences", "length"), [(1, 1), (8, 2**20), (1, 2**27), (2**17, 16), (2**17, 2**10)]
)
def test_a_grid_holds_any_length_and_batch(sequences: int, length: int) -> None:
    grid = (*relevancy.programs(sequences, length), 1, 1)[:3]
    assert grid[0] <= 2**31 - 1 and max(grid[1:]) <= 65_535  # CUDA's limits
    assert grid[0] * grid[1] * relevancy.QUERIES >= sequences * length
