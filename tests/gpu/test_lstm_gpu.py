"""The LSTM as GPUs run it (projection, recurrence, products), by both backends, on the CPU.

backend="cuda" runs the kernels' own sources (tests/cuda_on_cpu); only csrc/lstm/cuda/launch.cu and
the checks of operators.cpp need a GPU. backend="triton" runs in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import throughtime
from cases import NAMES, Shape, as_dtype, random, random_mask, results, tensors, with_gradients
from closeness import TOLERANCE, assert_all_close
from host_kernels import HostKernels
from throughtime import functional
from throughtime.backends.backend import OPERATIONS

SMALL = {"compute": 90, "multiprocessors": 6, "shared_bytes": 48 << 10, "cluster": 2}
SHAPE = Shape(4, 3, 2, 5)
LENGTHS = torch.tensor([3, 0, 4])
RESET = random_mask(4, 3, p=0.4, seed=1)
MASK = random_mask(4, 3, p=0.5, seed=2)
# Relative to the largest entry. The interpreter truncates to bfloat16 where a GPU rounds.
LOW_PRECISION = {
    "cuda": {torch.float16: 2e-3, torch.bfloat16: 2e-2},
    "triton": {torch.float16: 4e-3, torch.bfloat16: 6e-2},
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"detach_mask": MASK[:, 0], "reverse": True},
    {"detach_mask": MASK, "reset": RESET, "lengths": LENGTHS},
    {"detach_mask": MASK, "reset": RESET, "lengths": LENGTHS, "reverse": True},
]
# 5 units are padded to 8 by cuda; 40 take several blocks.
RUNS = [
    *(("cuda", dtype, H) for dtype in (torch.float32, *LOW_PRECISION["cuda"]) for H in (5, 16, 40)),
    *(("triton", dtype, 5) for dtype in (*TOLERANCE, *LOW_PRECISION["triton"])),
]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture
def host(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostKernels]:
    """backend="cuda" runs on the CPU."""
    made = HostKernels(kernels, partial(kernels.plan, **SMALL))
    anywhere = replace(OPERATIONS["lstm"]["cuda"], requirements=())
    monkeypatch.setitem(OPERATIONS["lstm"], "cuda", anywhere)
    library = torch.library.Library("throughtime", "IMPL")
    library.impl("lstm_recurrence_forward", made.forward, "CPU")
    library.impl("lstm_recurrence_backward", made.backward, "CPU")
    yield made
    library._destroy()


@pytest.fixture(params=["cuda", pytest.param("triton", marks=needs_triton)])
def backend(request: pytest.FixtureRequest, host: HostKernels) -> str:
    """Instead of conftest's: the backends for a GPU, on the CPU."""
    name: str = request.param
    return name


def leaves(shape: Shape, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return as_dtype({name: x for name, x in tensors(shape).items() if name in NAMES[:7]}, dtype)


def assert_matches(
    found: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype, backend: str
) -> None:
    """Against results in float64."""
    if dtype in TOLERANCE:
        return assert_all_close(found, {n: x.to(dtype) for n, x in exact.items()})
    for name, wanted in exact.items():
        assert found[name].dtype == dtype, name
        error = (found[name].double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)
        assert error <= LOW_PRECISION[backend][dtype], f"{name}: {error:.2e}"
    return None


@pytest.mark.parametrize(("name", "dtype", "hidden"), RUNS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_layer_matches_the_reference(
    options: dict[str, Any], name: Any, dtype: torch.dtype, hidden: int, host: HostKernels
) -> None:
    if name == "triton":
        pytest.importorskip("triton")
    given = leaves(Shape(4, 3, 2, hidden), dtype)
    exact = results(functional.lstm, as_dtype(given, torch.float64), backend="reference", **options)
    if "lengths" in options:
        with torch.no_grad():
            given["input"][torch.arange(4).unsqueeze(1) >= LENGTHS] = torch.nan
    found = results(functional.lstm, given, backend=name, **options)
    assert name == "triton" or (host.tiers and 0 not in host.tiers)
    assert_matches(found, exact, dtype, name)


def both_directions(
    given: dict[str, Tensor], backend: Any, hidden: int, **options: Any
) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    weights = [(*(leaves[f"{name} {d}"] for name in NAMES[3:7]), None) for d in range(2)]
    output, (h_n, c_n) = functional.bidirectional_lstm(
        leaves["input"], (leaves["h_0"], leaves["c_0"]), (weights[0], weights[1]),
        backend=backend, **options,
    )  # fmt: skip
    assert output.shape == (4, 3, 2 * hidden)
    return with_gradients((output, (h_n, c_n)), leaves)


@pytest.mark.parametrize("hidden", [5, 24])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"detach_mask": (MASK, None), "lengths": LENGTHS},
        {"detach_mask": (MASK[:, 0], MASK), "reset": (RESET, RESET.flip(0)), "lengths": LENGTHS},
        {"detach_mask": (MASK[:, 0], MASK[:, 1]), "reset": (None, RESET)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_both_directions_match_the_reference(
    options: dict[str, Any], hidden: int, host: HostKernels
) -> None:
    given = {"input": random(4, 3, 2, seed=1), "h_0": random(2, 3, hidden, seed=2)}
    given["c_0"] = random(2, 3, hidden, seed=3)
    for d in range(2):
        drawn = tensors(Shape(4, 3, 2, hidden))
        given |= {f"{n} {d}": drawn[n] * (1 + d) for n in NAMES[3:7]}
    exact = both_directions(given, "reference", hidden, **options)
    single = {name: x.float() for name, x in given.items()}
    found = both_directions(single, "cuda", hidden, **options)
    assert len(host.tiers) == 2  # one launch for both directions, in each pass
    assert_matches(found, exact, torch.float32, "cuda")


@pytest.mark.parametrize(
    "left_out", [("bias_ih",), ("bias_hh",), ("bias_ih", "bias_hh"), ("h_0", "c_0")]
)
def test_what_may_be_missing(left_out: tuple[str, ...], backend: Any) -> None:
    given = {n: x for n, x in leaves(SHAPE).items() if n not in left_out}
    found, wanted = (
        results(functional.lstm, as_dtype(given, torch.float32), backend=name)
        for name in (backend, "reference")
    )
    assert_all_close(found, wanted)


def test_only_what_needs_a_gradient_gets_one(backend: Any) -> None:
    given = {name: x.detach() for name, x in leaves(SHAPE).items()}
    for name in NAMES[:7]:
        leaf = given[name].clone().requires_grad_()
        args = {**given, name: leaf}
        got = []
        for run in (backend, "reference"):
            output, _ = functional.lstm(
                args["input"], (args["h_0"], args["c_0"]), *(args[n] for n in NAMES[3:7]),
                backend=run, reset=RESET,
            )  # fmt: skip
            got.append(torch.autograd.grad(output.sum(), leaf)[0])
        assert_all_close({name: got[0]}, {name: got[1]})


def test_strides_one_state_for_both_and_no_grad(backend: Any) -> None:
    given = leaves(Shape(4, 3, 2, 2))
    input = given["input"].transpose(0, 1).contiguous().transpose(0, 1)
    weights = [given[name] for name in NAMES[3:7]]
    hx = (given["h_0"], given["h_0"])
    wanted, _ = functional.lstm(input, hx, *weights, backend="reference")
    found, _ = functional.lstm(input, hx, *weights, backend=backend)
    assert_all_close({"output": found.detach()}, {"output": wanted.detach()})
    with torch.no_grad():
        found, _ = functional.lstm(input, hx, *weights, backend=backend)
    assert not found.requires_grad
    assert_all_close({"output": found}, {"output": wanted.detach()})


def test_empty_batch(backend: Any) -> None:
    layer = throughtime.LSTM(2, 5, backend=backend)
    output, (h_n, c_n) = layer(torch.zeros(4, 0, 2))
    assert output.shape == (4, 0, 5) and h_n.shape == c_n.shape == (1, 0, 5)


def test_a_second_derivative_is_refused(backend: Any) -> None:
    given = leaves(SHAPE)
    weights = [given[name] for name in NAMES[3:7]]
    output, _ = functional.lstm(given["input"], None, *weights, backend=backend)
    (grad,) = torch.autograd.grad(output.sum(), given["input"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"LSTM kernels can be differentiated once.*reference"):
        grad.sum().backward()


def test_module_in_both_directions(backend: Any) -> None:
    layer = throughtime.LSTM(2, 5, num_layers=2, bidirectional=True, detach_prob=0.5)
    x, hx = random(4, 3, 2, seed=1).float(), (random(4, 3, 5, seed=2).float(),) * 2
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        x, torch.tensor([4, 2, 3]), enforce_sorted=False
    )
    for input in (x, packed):
        mask = random_mask(4, 4, 1, p=0.5, seed=3)
        found = []
        for name in (backend, "reference"):
            layer.backend = name
            layer.zero_grad()
            output, states = layer(input, hx, detach_mask=mask)
            data = output if isinstance(output, Tensor) else output.data
            (data.square().sum() + states[0].sum() + states[1].square().sum()).backward()
            grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
            found.append({"output": data.detach(), "h_n": states[0].detach(), **grads})
        assert len(found[0]) == 18
        assert_all_close(*found)


def spread(x: Tensor) -> Tensor:
    """The same values, each between two others."""
    if x.dtype == torch.bool:
        return torch.stack((~x, x, ~x), -1)[..., 1]
    return torch.stack((torch.full_like(x, 9), x, torch.full_like(x, 9)), -1)[..., 1]


@needs_triton
@pytest.mark.parametrize("reverse", [False, True])
def test_triton_operators_take_any_strides(reverse: bool) -> None:
    T, B, H = 4, 3, 5
    forward = torch.ops.throughtime.lstm_recurrence_forward_triton
    backward = torch.ops.throughtime.lstm_recurrence_backward_triton
    bias, h_0, c_0, weight_hh = (
        random(1, *shape, seed=k) for k, shape in enumerate(((4 * H,), (B, H), (B, H), (4 * H, H)))
    )
    whole = random(T, 1, 1, 4 * H, seed=5).expand(T, B, 1, -1)
    mask = MASK[:, :1].expand(1, T, B)
    given = (whole, bias, h_0, c_0, weight_hh, LENGTHS, mask)
    assert not (whole.is_contiguous() or mask.is_contiguous())
    dense = forward(*(x.contiguous() for x in given), reverse, True)
    strided = forward(*given[:1], *map(spread, given[1:]), reverse, True)
    valid = torch.arange(T).unsqueeze(1) < LENGTHS
    for one, other in zip(dense, strided, strict=True):
        assert torch.equal(*((x[valid] if x.dim() == 4 else x) for x in (one, other)))
    states = (random(1, B, H, seed=seed) for seed in (7, 8))
    grads = (random(B, T, 1, H, seed=6).transpose(0, 1), *states)
    after = (*grads, c_0, weight_hh, *(x.nan_to_num() for x in dense[3:]), LENGTHS, mask, mask)
    found = backward(*after[:1], *map(spread, after[1:]), reverse)
    for one, other in zip(backward(*(x.contiguous() for x in after), reverse), found, strict=True):
        assert torch.equal(one, other) and one.any()


@needs_triton
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_triton_operators_pass_opcheck(lengths: Tensor | None) -> None:
    forward = torch.ops.throughtime.lstm_recurrence_forward_triton.default
    backward = torch.ops.throughtime.lstm_recurrence_backward_triton.default
    T, B, H = 4, 3, 5
    states = (random(1, B, H, seed=2), random(1, B, H, seed=3), random(1, 4 * H, H, seed=4))
    projected, bias = random(T, B, 1, 4 * H, seed=1), random(1, 4 * H, seed=5)
    reset, mask = RESET.unsqueeze(0), MASK.unsqueeze(0)
    # Fakes and schemas; gradients are lstm_gpu_forward's.
    checks = ("test_schema", "test_faketensor")
    args = (projected, bias, *states, lengths, reset, True, True)
    torch.library.opcheck(forward, args, test_utils=checks)
    output, h_n, c_n, gates, cells = forward(*args)
    # Past the end they are unset; opcheck compares all elements.
    gates, cells = gates.nan_to_num(), cells.nan_to_num()
    grads = (output, h_n, c_n, *states[1:], gates, cells, lengths, reset, mask, True)
    torch.library.opcheck(backward, grads, test_utils=checks)
