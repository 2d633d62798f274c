"""The GPU backends and CUDA itself: graphs, streams, repeats, synchronisation, memory.

These tests are for kernels whose blocks wait for each other: they show a barrier that is not reset
between launches, and blocks of two launches that keep each other from running.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import throughtime
from cases import Shape, call, options_for, random, random_mask
from cases_gpu import (
    DEVICE,
    ON_GPU,
    Tiered,
    assert_equal,
    gpu,
    leaves,
    may_hang,
    needs_cuda,
    on_device,
    results,
    runs,
    tiers,
    with_gradients,
)
from throughtime import functional

pytestmark = [*gpu, may_hang]

REPEATS = int(os.environ.get("GPU_REPEATS", 1000)) if ON_GPU else 2
only_float32 = runs(torch.float32)


@tiers()
@pytest.mark.parametrize("option", ["plain", "all"])
def test_a_thousand_repeats_are_bit_equal(tiered: Tiered, option: str) -> None:
    """Both passes. A race that shows once in some hundred steps shows here."""
    backend, _, dtype, shape = tiered
    shape = Shape(12, shape.B, 2, shape.H)
    named, options = leaves(shape, dtype), on_device(options_for(shape)[option])
    first = results(functional.lstm, named, backend=backend, **options)
    before = {name: x.detach().clone() for name, x in named.items()}
    # Compared on the GPU and read once: a comparison that waits would keep launches apart.
    equal = {name: torch.ones((), dtype=torch.bool, device=DEVICE) for name in first}
    for _ in range(REPEATS):
        again = results(functional.lstm, named, backend=backend, **options)
        for name, x in first.items():
            equal[name] &= (again[name] == x).all()
    assert [name for name, same in equal.items() if not same] == []
    assert_equal({name: x.detach() for name, x in named.items()}, before)


def capture(work: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of work(), which has been run some times on a stream of its own before.

    Work() returns no history: the next call, on another stream, would be tied to this one.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    return graph, found


@needs_cuda
@tiers()
def test_a_captured_graph_gives_the_same_at_every_replay(tiered: Tiered) -> None:
    backend, _, dtype, shape = tiered
    named = leaves(shape, dtype)
    mask = random_mask(shape.T, shape.B, p=0.5, seed=1).to(DEVICE)
    with torch.no_grad():  # a graph that lives would tie the leaves to this stream
        output, (h_n, c_n) = call(functional.lstm, named, backend=backend)
    incoming = [
        random(*x.shape, seed=k, dtype=dtype).to(DEVICE) for k, x in enumerate((output, h_n, c_n))
    ]

    def work() -> dict[str, Tensor]:
        output, (h_n, c_n) = call(functional.lstm, named, detach_mask=mask, backend=backend)
        grads = torch.autograd.grad((output, h_n, c_n), list(named.values()), incoming)
        found = {"output": output.detach(), "h_n": h_n.detach(), "c_n": c_n.detach()}
        return found | {f"grad {n}": g for n, g in zip(named, grads, strict=True)}

    graph, captured = capture(work)
    for seed in (20, 21, 22):
        with torch.no_grad():
            named["input"].copy_(random(*named["input"].shape, seed=seed, dtype=dtype))
            mask.copy_(random_mask(*mask.shape, p=0.5, seed=seed))
        graph.replay()
        replayed = {name: x.clone() for name, x in captured.items()}
        assert_equal(replayed, work())


@needs_cuda
@only_float32
def test_a_captured_training_step_is_the_eager_one(backend: Any, dtype: torch.dtype) -> None:
    """Forward, backward and the optimizer; and every replay draws another mask."""
    torch.manual_seed(1)
    layer = throughtime.LSTM(6, 64, num_layers=2, backend=backend).to(DEVICE)
    eager = copy.deepcopy(layer)
    x, target = (random(12, 16, n, seed=n, dtype=dtype).to(DEVICE) for n in (6, 64))

    def step_of(model: throughtime.LSTM) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss: Tensor = (model(x)[0] - target).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return loss.detach()

        return step

    graph, loss = capture(step_of(layer))  # three steps; the capture itself takes none
    eager_step = step_of(eager)
    for _ in range(3):
        eager_step()
    losses = []
    for _ in range(3):
        graph.replay()
        losses.append((loss.item(), eager_step().item()))
    assert losses[0][0] > losses[1][0] > losses[2][0]
    assert [a for a, _ in losses] == [b for _, b in losses]
    assert_equal(dict(layer.state_dict()), dict(eager.state_dict()))

    layer.detach_prob = 0.5
    parameters = list(layer.parameters())

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x)[0].square().mean(), parameters)

    graph, grads = capture(gradients)
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(grads[1].clone())
    assert not torch.equal(*seen)


@needs_cuda
@tiers()
def test_two_streams_at_once(tiered: Tiered) -> None:
    """Launches that do not fit beside each other have to wait, not hang."""
    backend, _, dtype, shape = tiered
    shape = Shape(30, shape.B, 2, shape.H)
    streams = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]
    inputs = [leaves(shape, dtype) for _ in streams]
    with torch.no_grad():
        inputs[1]["input"].mul_(0.5)
    ones = torch.ones(shape.T, shape.B, shape.H, device=DEVICE, dtype=dtype)

    def run(named: dict[str, Tensor]) -> dict[str, Tensor]:
        output, _ = call(functional.lstm, named, backend=backend)
        (grad,) = torch.autograd.grad(output, named["input"], ones)
        return {"output": output.detach(), "grad": grad}

    wanted = [run(named) for named in inputs]
    torch.cuda.synchronize()
    found: list[list[dict[str, Tensor]]] = [[], []]
    for _ in range(20):
        for k, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[k].append(run(inputs[k]))
    torch.cuda.synchronize()
    for k in range(2):
        for each in found[k]:
            assert_equal(each, wanted[k])


@contextmanager
def without_waiting() -> Iterator[None]:
    """What waits for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@tiers()
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_gpu(tiered: Tiered) -> None:
    """With all masks on the GPU, where only the kernels can read them."""
    backend, _, dtype, shape = tiered
    named, options = leaves(shape, dtype), on_device(options_for(shape)["all"])
    results(functional.lstm, named, backend=backend, **options)  # compiles, loads, allocates
    output, (h_n, c_n) = call(functional.lstm, named, backend=backend)
    incoming = [torch.ones_like(x) for x in (output, h_n, c_n)]
    with without_waiting():
        for given in ({}, options):
            output, (h_n, c_n) = call(functional.lstm, named, backend=backend, **given)
            grads = torch.autograd.grad((output, h_n, c_n), list(named.values()), incoming)
    assert all(grad.isfinite().all() for grad in grads)


@needs_cuda
@only_float32
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_training_step_of_a_module_does_not_wait(backend: Any, dtype: torch.dtype) -> None:
    layer = throughtime.LSTM(
        6, 64, num_layers=2, bidirectional=True, detach_prob=0.5, backend=backend
    ).to(DEVICE)
    x = random(12, 16, 6, seed=1, dtype=dtype).to(DEVICE)
    layer(x)[0].square().mean().backward()
    before = layer.weight_hh_l0.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with without_waiting():
        optimizer.zero_grad()
        layer(x)[0].square().mean().backward()
        optimizer.step()
    assert not torch.equal(layer.weight_hh_l0, before)


@needs_cuda
@runs(torch.float32, torch.bfloat16)
def test_memory_does_not_grow(backend: Any, dtype: torch.dtype) -> None:
    layer = throughtime.LSTM(8, 256, detach_prob=0.5, backend=backend, dtype=dtype).to(DEVICE)

    def iterate(steps: int) -> None:
        x = random(steps, 16, 8, seed=1, dtype=dtype).to(DEVICE)
        layer.zero_grad()
        layer(x)[0].square().mean().backward()

    seen = []
    for k in range(50):
        iterate(20 + k % 5)  # lengths vary, as those of data do
        seen.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert set(seen[25:]) == {seen[24]}


@needs_cuda
@only_float32
def test_the_second_gpu(backend: Any, dtype: torch.dtype) -> None:
    """While the first is the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    layer = throughtime.LSTM(6, 256, num_layers=2, backend=backend)
    x = random(12, 16, 6, seed=1, dtype=dtype)
    found = []
    for device in ("cuda:0", "cuda:1"):
        here, given = copy.deepcopy(layer).to(device), x.to(device).requires_grad_()
        values = with_gradients(here(given), {"input": given, **dict(here.named_parameters())})
        assert values["output"].device == torch.device(device)
        found.append({name: value.cpu() for name, value in values.items()})
    assert torch.cuda.current_device() == 0
    names = {torch.cuda.get_device_name(k) for k in range(2)}
    if len(names) == 1:
        assert_equal(*found)
    else:  # another GPU may have another plan, and sums in another order
        for name, value in found[0].items():
            assert torch.allclose(value, found[1][name], rtol=1e-4, atol=1e-5), name
