"""One LSTM layer in one direction on the GPU backends, against float64 and plain PyTorch.

``pytest -m gpu`` runs it on a GPU (bench/gpu.sh test), other machines on the CPU: cases_gpu.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import throughtime
from cases import (
    NAMES,
    OPTIONS,
    PROJECTED,
    SHAPES,
    SMALL,
    Shape,
    as_dtype,
    call,
    options_for,
    random,
    random_mask,
)
from cases_gpu import (
    DEVICE,
    DTYPES,
    ON_GPU,
    Tiered,
    against_reference,
    assert_as_close_as_plain,
    assert_equal,
    check,
    each_backend,
    expected,
    gpu,
    leaves,
    may_hang,
    needs_cuda,
    on_device,
    plan_of,
    results,
    runs,
    tiers,
    why_not,
    with_gradients,
)
from cases_recurrence import LONG_MEMORY
from closeness import TOLERANCE
from throughtime import functional

pytestmark = [
    *gpu,
    may_hang,
    pytest.mark.usefixtures("gpu_poison"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),
]

MIDDLE = Shape(7, 11, 5, 40) if ON_GPU else Shape(4, 3, 2, 5)
# Tiles of 8 samples, 8 units and 32 of the inner dimension, none of them full; then large ones.
ODD = (
    Shape(9, 33, 5, 200),
    Shape(5, 17, 1, 100),
    Shape(6, 16, 32, 128),
    Shape(3, 130, 9, 31),
    Shape(40, 2, 3, 64),
    Shape(3, 5, 8, 272),  # 9 tiles of the inner dimension, which 4 warps cannot share
)
LARGE = (Shape(4, 9, 16, 512), Shape(3, 5, 16, 777), Shape(3, 3, 8, 1024), Shape(2, 2, 8, 2048))
ON_CPU = (Shape(3, 2, 1, 1), Shape(4, 3, 2, 16), Shape(4, 3, 2, 40))  # the last in several blocks
SIZES = (
    [*SHAPES, *ODD, *(pytest.param(shape, marks=pytest.mark.slow) for shape in LARGE)]
    if ON_GPU
    else ON_CPU
)

only_float32 = runs(torch.float32)


@each_backend
def test_the_backend_can_run(backend: str) -> None:
    """The one test that fails where a backend is not built: the others do not exist there."""
    assert why_not(backend, torch.float32) is None


@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_backend
def test_a_call_runs_or_raises_as_explain_says(
    backend: Any, dtype: torch.dtype, proj_size: int
) -> None:
    shape = PROJECTED[0] if proj_size else SMALL
    named = leaves(shape, dtype)
    table = throughtime.explain(
        "lstm", hidden_size=shape.H, proj_size=shape.P, dtype=dtype, device=DEVICE, backend=backend
    )
    if table.chosen == backend:
        assert call(functional.lstm, named, backend=backend)[0].shape[2] == (shape.P or shape.H)
        return
    with pytest.raises(RuntimeError) as error:
        call(functional.lstm, named, backend=backend)
    assert str(table.reasons[backend]) in str(error.value)


@runs()
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(backend: str, dtype: torch.dtype, option: str) -> None:
    check(backend, dtype, MIDDLE, option)


@runs()
@pytest.mark.parametrize("option", ["all", "all-reverse"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_every_size(backend: str, dtype: torch.dtype, shape: Shape, option: str) -> None:
    check(backend, dtype, shape, option)


@tiers()
@pytest.mark.parametrize("option", ["plain", "mask-T", "all-reverse"])
def test_every_tier(tiered: Tiered, option: str) -> None:
    check(tiered.backend, tiered.dtype, tiered.shape, option)


@needs_cuda
@tiers()
def test_a_forced_tier_is_what_runs(tiered: Tiered) -> None:
    """As far as ``explain`` knows, which asks the same function as the launch."""
    if tiered.backend != "cuda":
        pytest.skip("tiers are backend cuda's")
    assert plan_of(tiered.shape, tiered.dtype, device=DEVICE) == [tiered.tier] * 2


@pytest.mark.parametrize("option", ["plain", "all"])
@tiers()
def test_small_for_the_sanitizer(tiered: Tiered, option: str) -> None:
    """Few steps, for compute-sanitizer (bench/gpu.sh sanitize).

    In 6 steps each of two mbarriers and buffers takes more than two rounds, in both parities.
    """
    shape = Shape(6, tiered.shape.B, 2, tiered.shape.H)
    check(tiered.backend, tiered.dtype, shape, option)


@only_float32
@pytest.mark.parametrize("used", ["output", "h_n", "c_n"])
@pytest.mark.parametrize("option", ["plain", "all", "all-reverse"])
def test_gradient_through_one_result_alone(
    backend: str, dtype: torch.dtype, used: str, option: str
) -> None:
    options = on_device(options_for(MIDDLE)[option])

    def run(name: Any, named: dict[str, Tensor]) -> dict[str, Tensor]:
        result = call(functional.lstm, named, backend=name, **options)
        return with_gradients(result, named, (used,))

    against_reference(backend, run, leaves(MIDDLE, dtype))


def strange(x: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides, in a larger tensor full of what must not be read."""
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x
    if layout == "offset":  # not on a boundary that wide loads want
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    poison = 1e4 if x.is_floating_point() else 1
    wide = torch.full([2 * size + 1 for size in x.shape], poison, dtype=x.dtype, device=x.device)
    index = tuple(slice(1, None, 2) for _ in x.shape)
    wide[index] = x
    return wide[index]


@runs()
@pytest.mark.parametrize("layout", ["transposed", "offset", "sliced"])
def test_any_strides(backend: str, dtype: torch.dtype, layout: str) -> None:
    named, options = leaves(MIDDLE, dtype), on_device(options_for(MIDDLE)["all"])
    laid = {name: strange(x.detach(), layout).requires_grad_() for name, x in named.items()}
    masks = {name: strange(x, layout) for name, x in options.items()}
    assert layout == "offset" or not laid["input"].is_contiguous()
    found = results(functional.lstm, laid, backend=backend, **masks)
    assert_as_close_as_plain(found, *expected(MIDDLE, dtype, "all"), backend)


@runs()
def test_gradients_that_arrive_with_strange_strides(backend: str, dtype: torch.dtype) -> None:
    named = leaves(MIDDLE, dtype)
    output, (h_n, c_n) = call(functional.lstm, named, backend=backend)
    given = list(named.values())
    ones = [torch.ones_like(x) for x in (output, h_n, c_n)]
    wanted = torch.autograd.grad((output, h_n, c_n), given, ones, retain_graph=True)
    for layout in ("expanded", "sliced", "transposed"):
        grads = [
            x[..., :1].expand(x.shape) if layout == "expanded" else strange(x, layout) for x in ones
        ]
        found = torch.autograd.grad((output, h_n, c_n), given, grads, retain_graph=True)
        assert_equal(dict(zip(named, found, strict=True)), dict(zip(named, wanted, strict=True)))


@runs()
def test_masks_of_all_kinds_mean_the_same(backend: str, dtype: torch.dtype) -> None:
    named = leaves(MIDDLE, dtype)

    def run(mask: Tensor | None) -> dict[str, Tensor]:
        return results(functional.lstm, named, detach_mask=mask, backend=backend)

    mask = random_mask(MIDDLE.T, p=0.5, seed=1).to(DEVICE)
    by_sample = mask.unsqueeze(1).expand(MIDDLE.T, MIDDLE.B)
    masked, plain = run(mask), run(None)
    assert_equal(run(by_sample), masked)
    assert_equal(run(by_sample.contiguous()), masked)
    assert_equal(run(mask & False), plain)
    assert_equal({n: masked[n] for n in ("output", "h_n", "c_n")}, dict(list(plain.items())[:3]))
    assert not torch.equal(masked["grad weight_hh"], plain["grad weight_hh"])


@runs()
@pytest.mark.parametrize("reverse", [False, True])
def test_nan_in_the_padding_reaches_nothing(
    backend: str, dtype: torch.dtype, reverse: bool
) -> None:
    named = leaves(MIDDLE, dtype)
    lengths = torch.arange(MIDDLE.B, device=DEVICE) % (MIDDLE.T + 1)
    mask = random_mask(MIDDLE.T, MIDDLE.B, p=0.5, seed=3).to(DEVICE)
    options = {"lengths": lengths, "detach_mask": mask, "reverse": reverse, "backend": backend}
    clean = results(functional.lstm, named, **options)
    past = torch.arange(MIDDLE.T, device=DEVICE).unsqueeze(1) >= lengths
    dirty = named["input"].detach().masked_fill(past.unsqueeze(2), torch.nan).requires_grad_()
    found = results(functional.lstm, named | {"input": dirty}, **options)
    assert_equal(found, clean)
    assert not found["output"][past].any() and not found["grad input"][past].any()


@runs()
def test_nan_stays_in_its_sample(backend: str, dtype: torch.dtype) -> None:
    """Samples share the tiles of a matrix unit, and nothing else."""
    named = leaves(MIDDLE, dtype)
    dirty = named["input"].detach().clone()
    dirty[2, 1] = torch.nan
    found = []
    for x in (dirty, named["input"].detach()):
        given = named | {"input": x.requires_grad_()}
        result = call(functional.lstm, given, backend=backend)
        found.append(with_gradients(result, {"input": given["input"]}))
    others = torch.arange(MIDDLE.B, device=DEVICE) != 1
    assert found[0]["output"][2:, 1].isnan().all() and found[0]["h_n"][1].isnan().all()
    for name in ("output", "grad input"):
        assert torch.equal(found[0][name][:, others], found[1][name][:, others]), name
    assert torch.equal(found[0]["c_n"][others], found[1]["c_n"][others])


@only_float32
@pytest.mark.parametrize(
    "left_out", [("bias_ih",), ("bias_hh",), ("bias_ih", "bias_hh"), ("h_0", "c_0")], ids="-".join
)
def test_what_may_be_missing(backend: str, dtype: torch.dtype, left_out: tuple[str, ...]) -> None:
    given = {name: x for name, x in leaves(MIDDLE, dtype).items() if name not in left_out}
    against_reference(backend, lambda name, x: results(functional.lstm, x, backend=name), given)


@only_float32
@pytest.mark.parametrize("leaf", NAMES[:7])
def test_only_what_needs_a_gradient_gets_one(backend: str, dtype: torch.dtype, leaf: str) -> None:
    reset = random_mask(MIDDLE.T, MIDDLE.B, p=0.4, seed=1).to(DEVICE)

    def run(name: Any, named: dict[str, Tensor]) -> dict[str, Tensor]:
        only = {n: x.detach().requires_grad_(n == leaf) for n, x in named.items()}
        result = call(functional.lstm, only, backend=name, reset=reset)
        return with_gradients(result, {leaf: only[leaf]}, ("output",))

    against_reference(backend, run, leaves(MIDDLE, dtype))


@only_float32
def test_one_state_for_both_without_grad(backend: str, dtype: torch.dtype) -> None:
    def run(name: Any, named: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            output, _ = call(functional.lstm, named | {"c_0": named["h_0"]}, backend=name)
        assert not output.requires_grad
        return {"output": output}

    against_reference(backend, run, leaves(MIDDLE, dtype))


@only_float32
def test_second_derivatives_are_the_definitions(backend: str, dtype: torch.dtype) -> None:
    def run(name: Any, named: dict[str, Tensor]) -> dict[str, Tensor]:
        output, _ = call(functional.lstm, named, backend=name)
        (grad,) = torch.autograd.grad(output.sum(), named["input"], create_graph=True)
        second = torch.autograd.grad(grad.sum(), named["weight_hh"])
        return {"second": second[0]}

    against_reference(backend, run, leaves(MIDDLE, dtype))


@runs()
def test_empty_batch(backend: str, dtype: torch.dtype) -> None:
    shape = Shape(4, 0, 3, 40)
    options = on_device(options_for(shape)["all"])
    found = results(functional.lstm, leaves(shape, dtype), backend=backend, **options)
    assert found["output"].shape == (4, 0, 40) and found["h_n"].shape == (0, 40)
    assert found["grad weight_hh"].shape == (160, 40) and not found["grad weight_hh"].any()


@needs_cuda  # on the CPU the recurrence alone is tested for it
@runs()
def test_a_long_memory_keeps_its_gradient(backend: str, dtype: torch.dtype) -> None:
    """f is 0.993 to 0.9997 for 2,000 steps: rounding must leave what 1 - f is."""
    shape = Shape(2000, 2, 1, 40)
    named = leaves(shape, dtype)
    with torch.no_grad():
        named["weight_hh"] *= 0.1
        i, f = named["bias_ih"].view(4, shape.H)[:2]
        f += torch.linspace(5, 8, shape.H, device=DEVICE)
        i -= torch.linspace(5, 8, shape.H, device=DEVICE)
    found = []
    for run, given in ((backend, named), ("reference", as_dtype(named, torch.float64))):
        found.append(with_gradients(call(functional.lstm, given, backend=run), given, ("h_n",)))
    for name in ("c_0", "bias_ih", "weight_ih"):
        got, wanted = (x[f"grad {name}"].double() for x in found)
        error = ((got - wanted).norm() / wanted.norm()).item()
        assert error <= LONG_MEMORY[dtype], f"{name}: {error:.1e}"


@needs_cuda
@pytest.mark.slow
@only_float32
def test_more_numbers_than_int32_counts(backend: Any, dtype: torch.dtype) -> None:
    """[T, B, 4H] of 2.2e9 entries, against the same in two halves, none of which is as long."""
    shape = Shape(4200, 1024, 1, 128)
    assert 4 * shape.T * shape.B * shape.H > 2**31
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < 60:
        pytest.skip(f"wants 60 GiB of free GPU memory, there are {free:.0f}")
    named = leaves(shape, dtype)
    weight = random(1, 1, shape.H, seed=5, dtype=dtype).to(DEVICE)

    def run(parts: int) -> dict[str, Tensor]:
        states = (named["h_0"], named["c_0"])
        loss, kept = torch.zeros((), device=DEVICE), []
        for part in named["input"].chunk(parts):
            output, states = functional.lstm(
                part,
                states,
                *(named[n] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
                backend=backend,
            )
            loss = loss + (output * weight).sum()
            kept.append(output.detach()[-1])
        grads = torch.autograd.grad(loss, list(named.values()))
        found = {f"grad {n}": g for n, g in zip(named, grads, strict=True)}
        return found | {"last": kept[-1], "c_n": states[1].detach()}

    whole = run(1)
    torch.cuda.empty_cache()
    for name, wanted in run(2).items():
        # Weights get sums over 4e6 rows, in another order: their rounding grows with its root.
        terms = 4e6**0.5 if "weight" in name or "bias" in name else 1
        error = (whole[name] - wanted).abs().max() / wanted.abs().max()
        assert error <= TOLERANCE[dtype] * terms, f"{name}: {error:.1e}"
