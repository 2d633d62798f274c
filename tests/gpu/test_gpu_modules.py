"""Modules on the GPU backends: layers, directions, packed input, autocast, compile, nn.LSTM."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

import throughtime
from cases import LOW_PRECISION, NAMES, Shape, as_dtype, random, random_mask
from cases_gpu import (
    DEVICE,
    ON_GPU,
    against_reference,
    assert_as_close_as_plain,
    assert_equal,
    gpu,
    leaves,
    may_hang,
    needs_cuda,
    on_device,
    runs,
    with_gradients,
)
from closeness import rms
from host_kernels import HostKernels
from throughtime import functional

pytestmark = [*gpu, may_hang]

T, B, I, H = (9, 10, 6, 40) if ON_GPU else (4, 3, 2, 5)  # noqa: E741

only_float32 = runs(torch.float32)


def module(dtype: torch.dtype, **options: Any) -> throughtime.LSTM:
    torch.manual_seed(3)
    return throughtime.LSTM(I, H, dtype=dtype, **options).to(DEVICE)


def run(layer: nn.Module, *args: Any, **options: Any) -> dict[str, Tensor]:
    """Results, and the gradients of the parameters and the input, which is the first argument."""
    named = {"input": args[0], **dict(layer.named_parameters())}
    return with_gradients(layer(*args, **options), named)


def input_of(dtype: torch.dtype, *shape: int) -> Tensor:
    return random(*(shape or (T, B, I)), seed=1, dtype=dtype).to(DEVICE).requires_grad_()


@runs()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"bias": False, "batch_first": True, "bidirectional": True},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_layers_and_directions(backend: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """With states, a mask of each layer and direction, and resets."""
    ours = module(dtype, backend=backend, **options)
    count = ours.num_layers * (2 if ours.bidirectional else 1)
    states = [random(count, B, H, seed=k, dtype=dtype).to(DEVICE) for k in (7, 8)]
    masks = {
        "detach_mask": random_mask(count, T, B, p=0.5, seed=2),
        "reset": random_mask(T, B, p=0.2, seed=3),
    }
    if ours.batch_first:
        masks = {name: mask.transpose(-1, -2) for name, mask in masks.items()}
    given = on_device(masks)
    x = input_of(dtype, *((B, T, I) if ours.batch_first else (T, B, I)))
    plain = copy.deepcopy(ours)
    plain.backend = "reference"
    exact = copy.deepcopy(plain).double()
    assert_as_close_as_plain(
        run(ours, x, states, **given),
        run(plain, x, states, **given),
        run(exact, as_dtype({"x": x}, torch.float64)["x"], [s.double() for s in states], **given),
        backend,
    )


@pytest.mark.parametrize("hidden", [5, 24])
@pytest.mark.parametrize(
    ("masks", "resets"),
    [((1, None), (None, None)), ((1, 2), (2, 2)), ((1, 1), (None, 2)), ((None, None),) * 2],
    ids=str,
)
def test_one_launch_for_both_directions(
    masks: Any, resets: Any, hidden: int, stand_in: HostKernels | None
) -> None:
    """Masks and resets by their number of axes, of each direction its own."""

    def drawn(axes: tuple[int | None, ...], p: float) -> Any:
        return tuple(
            n and random_mask(*(T, B)[:n], p=p, seed=d + n).to(DEVICE) for d, n in enumerate(axes)
        )

    given = leaves(Shape(T, B, I, hidden), torch.float32)
    given |= {n: torch.stack([x.detach(), -x.detach()]).requires_grad_()
              for n, x in given.items() if n != "input"}  # fmt: skip
    options = {"detach_mask": drawn(masks, 0.5), "reset": drawn(resets, 0.3)}
    options["lengths"] = torch.arange(B, device=DEVICE) * 2 % (T + 1)

    def run(backend: Any, named: dict[str, Tensor]) -> dict[str, Tensor]:
        one, other = zip(*(named[name].unbind() for name in NAMES[3:7]), strict=True)
        result = functional.bidirectional_lstm(
            named["input"],
            (named["h_0"], named["c_0"]),
            ((*one, None), (*other, None)),
            backend=backend,
            **options,
        )
        return with_gradients(result, named)

    against_reference("cuda", run, given)
    assert stand_in is None or len(stand_in.tiers) == 2  # in each pass


@runs(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_packed_sequence_is_each_sequence_alone(
    backend: Any, dtype: torch.dtype, bidirectional: bool
) -> None:
    layer = module(dtype, backend=backend, num_layers=2, bidirectional=bidirectional)
    parts = [random(n, I, seed=n, dtype=dtype).to(DEVICE) for n in (4, T, 1, T - 1)]
    output, (h_n, c_n) = layer(pack_sequence(parts, enforce_sorted=False))
    plain = copy.deepcopy(layer)
    plain.backend = "reference"
    exact = copy.deepcopy(plain).double()
    for b, x in enumerate(unpack_sequence(output)):
        found = {"output": x, "h_n": h_n[:, b], "c_n": c_n[:, b]}
        alone = []
        for other, part in ((plain, parts[b]), (exact, parts[b].double())):
            one, (h, c) = other(part)
            alone.append({"output": one, "h_n": h, "c_n": c})
        assert_as_close_as_plain(found, *alone, backend)


@only_float32
@pytest.mark.parametrize("low", LOW_PRECISION, ids=str)
def test_autocast_is_the_same_as_casting(
    backend: Any, dtype: torch.dtype, low: torch.dtype
) -> None:
    layer, x = module(dtype, backend=backend), input_of(dtype)
    with torch.autocast(DEVICE.type, low):
        result = layer(x)
    found = with_gradients(result, {"input": x, **dict(layer.named_parameters())})
    assert found["output"].dtype == found["h_n"].dtype == found["c_n"].dtype == low
    assert found["grad weight_hh_l0"].dtype == dtype
    cast = copy.deepcopy(layer).to(low)
    wanted = run(cast, as_dtype({"x": x}, low)["x"])
    assert_equal({n: v.to(low) for n, v in found.items()}, wanted)


@only_float32
def test_a_mask_that_is_drawn(backend: Any, dtype: torch.dtype) -> None:
    """The same seed detaches the same steps, another seed others, and eval() none."""
    layer, x = module(dtype, backend=backend, detach_prob=0.5), input_of(dtype)

    def gradients(seed: int) -> dict[str, Tensor]:
        return run(layer, x, generator=torch.Generator(DEVICE).manual_seed(seed))

    one, other = gradients(1), gradients(2)
    assert_equal(gradients(1), one)
    assert torch.equal(one["output"], other["output"])
    assert not torch.equal(one["grad weight_hh_l0"], other["grad weight_hh_l0"])
    plain = run(layer.eval(), x)
    layer.detach_prob = 0.0
    assert_equal(run(layer.train(), x), plain)
    assert not torch.equal(one["grad weight_hh_l0"], plain["grad weight_hh_l0"])


def test_torchs_switch_for_rnns_decides_on_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """And an exported program keeps what it was traced with."""
    layer, x = module(torch.float32, backend="cuda"), input_of(torch.float32)
    plain = copy.deepcopy(layer).double()
    plain.backend = "reference"
    exact = run(plain, x.detach().double().requires_grad_())
    found, programs = {}, {}
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        found[allowed] = run(layer, x)
        programs[allowed] = torch.export.export(layer, (x.detach(),)).module()
    for name, wanted in exact.items():
        rounded, close = (rms(found[allowed][name], wanted) for allowed in (True, False))
        assert close < 1e-6 and 1e-5 < rounded < 1e-3, (name, close, rounded)
    for allowed, program in programs.items():
        assert torch.equal(program(x.detach())[0], found[allowed]["output"]), allowed


@needs_cuda
@pytest.mark.slow
@only_float32
def test_compile_of_the_whole_graph(backend: Any, dtype: torch.dtype) -> None:
    layer, x = module(dtype, backend=backend, num_layers=2, bidirectional=True), input_of(dtype)
    mask = random_mask(T, B, p=0.5, seed=2).to(DEVICE)

    def scaled(x: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, states = layer(2 * x, detach_mask=mask)
        return output.tanh(), states

    named = {"input": x, **dict(layer.named_parameters())}
    wanted = with_gradients(scaled(x, mask), named)
    with warnings.catch_warnings():
        # Inductor's own: TF32 is there and off, or it names its other deprecations.
        warnings.simplefilter("ignore")
        found = with_gradients(torch.compile(scaled, fullgraph=True)(x, mask), named)
    assert_as_close_as_plain(found, wanted, {n: v.double() for n, v in wanted.items()}, backend)


@needs_cuda
def test_inputs_on_two_devices_are_refused() -> None:
    layer = module(torch.float32)
    with pytest.raises(RuntimeError, match="not at the same device"):
        functional.lstm(torch.zeros(2, 3, I), None, layer.weight_ih_l0, layer.weight_hh_l0)


@needs_cuda
@pytest.mark.parametrize("way", ["bfloat16", "autocast", "packed", "inference", "h-detach"])
def test_accelerated_nn_lstm(way: str) -> None:
    """torch's own layer on the CUDA kernels: its dtypes, and about its error."""
    dtype = torch.float32 if way == "autocast" else torch.bfloat16
    torch.manual_seed(3)
    lstm = nn.LSTM(I, H, 2, bidirectional=True).to(DEVICE, dtype)
    exact = copy.deepcopy(lstm).double()

    def results(layer: nn.LSTM) -> dict[str, Tensor]:
        x = input_of(dtype).detach().to(layer.weight_ih_l0.dtype)
        given = pack_sequence([x[:, 0], x[:-3, 1]]) if way == "packed" else x
        with (
            torch.autocast("cuda", torch.bfloat16, enabled=way == "autocast"),
            torch.inference_mode(way == "inference"),
        ):
            output, (h_n, c_n) = layer(given)
        output = output.data if way == "packed" else output
        found = {"output": output, "h_n": h_n, "c_n": c_n}
        if way != "inference":
            grads = torch.autograd.grad(output.float().square().sum(), list(layer.parameters()))
            found |= {str(k): grad for k, grad in enumerate(grads)}
        return {name: x.detach() for name, x in found.items()}

    plain = results(lstm)
    with throughtime.accelerate(detach_prob=0.5 if way == "h-detach" else 0.0) as handle:
        found = results(lstm)
    assert set(handle.calls) == {"cuda kernels"}
    if way == "h-detach":
        assert torch.allclose(found["output"], plain["output"], atol=0.02)
        assert any((found[key] - plain[key]).abs().max() > 0.01 for key in ("0", "1"))
        return
    assert_as_close_as_plain(found, plain, results(exact), "cuda")


@needs_cuda
def test_float32_on_a_gpu_is_cudnns() -> None:
    lstm, x = nn.LSTM(I, H).to(DEVICE), input_of(torch.float32)
    with throughtime.accelerate() as handle:
        lstm(x)
    reason = "it has not been measured beside cuDNN with TF32, which torch allows it"
    assert list(handle.calls) == [f"original: torch.float32 on cuda: {reason}"]
    assert throughtime.explain(lstm).chosen is None
