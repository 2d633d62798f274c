"""The LSTM on float32 numbers that are split into bfloat16 parts, by AMX or a stand-in for it.

Numbers that the parts cannot hold go to the vector kernels, sample by sample: those are called here
too, by 0 parts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from closeness import rms
from lstm_cases import WEIGHTS, Case, case, expected, run

LANES, SMALLEST = 16, 2.0**-126  # of a vector; normal number
SIZES = [(1, 1, 1, 1), (7, 5, 1, 16), (20, 33, 33, 40), (9, 70, 70, 33), (40, 1, 5, 30)]
PROJECTED = [(9, 70, 70, 33, 7), (20, 40, 65, 17, 5)]
ERROR = {3: 2e-6, 2: 1.5e-5, 1: 1e-2}  # two parts keep 2^-18 of an operand, one keeps 2^-9


def call(
    layer: Any, given: Case, parts: int = 3, threads: int = 1, **more: Any
) -> dict[str, Tensor]:
    return run(layer, given, threads, more=(parts,), **more)


def float32(*sizes: int, form: str = "") -> Case:
    return case(*sizes, form=form, dtype=torch.float32)


def split(layer: Any, numbers: Tensor) -> tuple[Tensor, bool]:
    """The parts [3, LANES], scaled by 2^24, and whether products take all numbers."""
    parts = torch.empty(3, LANES)
    return parts, layer("split", numbers, parts) != 0


def numbers_of(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def test_parts_add_up_to_the_number(layer: Any) -> None:
    """Every normal number below 2^31, the smallest ones too, and each part is a normal number."""
    exponents = torch.arange(1, 127 + 31)
    for mantissa in (0, 1, 0x7FFFFF, 0x7F7F7F, 0x008080, 0x00FFFF, 0x555555):
        for chunk in numbers_of(exponents << 23 | mantissa).split(LANES):
            for sign in (1, -1):
                given = torch.zeros(LANES)
                given[: len(chunk)] = sign * chunk
                parts, taken = split(layer, given)
                assert taken
                assert torch.equal(parts.double().sum(0), given.double() * 2**24)
                assert torch.equal(parts, parts.bfloat16().float())
                assert ((parts == 0) | (parts.abs() >= SMALLEST)).all()


def test_random_parts_add_up_to_the_number(layer: Any) -> None:
    for _ in range(1000):
        given = torch.randn(LANES) * 2.0 ** torch.randint(-100, 28, (LANES,))
        parts, taken = split(layer, given)
        assert taken and torch.equal(parts.double().sum(0), given.double() * 2**24)


@pytest.mark.parametrize("number", [2.0**31, 3e38, torch.inf, torch.nan])
def test_numbers_that_no_product_takes(layer: Any, number: float) -> None:
    for lane in range(LANES):
        for sign in (1, -1):
            given = torch.zeros(LANES)
            given[lane] = sign * number
            assert not split(layer, given)[1]


def test_subnormal_numbers_are_zero(layer: Any) -> None:
    parts, taken = split(layer, torch.full((LANES,), SMALLEST / 2))
    assert taken and not parts.any()


@pytest.mark.parametrize("parts", [3, 2, 1])
@pytest.mark.parametrize("form", ["", "ragged", "reverse"])
@pytest.mark.parametrize("sizes", [*SIZES, *PROJECTED], ids=str)
def test_against_the_reference(layer: Any, sizes: tuple[int, ...], form: str, parts: int) -> None:
    given = float32(*sizes, form=form)
    wanted = expected(given)
    for recompute in (False, True):
        found = call(layer, given, parts, recompute=recompute)
        assert found.keys() == wanted.keys()
        for name, x in found.items():
            assert rms(x, wanted[name]) <= ERROR[parts], name


@pytest.mark.parametrize(
    "sizes", [(20, 33, 128, 192), (12, 64, 40, 256), (30, 1, 192, 192), (9, 70, 300, 208)], ids=str
)
def test_errors_are_at_most_those_of_nn_lstm(layer: Any, sizes: tuple[int, ...]) -> None:
    given = float32(*sizes)
    wanted, found = expected(given), call(layer, given)
    plain = torch.nn.LSTM(sizes[2], sizes[3])
    leaves = {name: x for name, x in given.tensors.items() if x is not None}
    for name in ("weight_ih", "weight_hh"):
        getattr(plain, f"{name}_l0").data.copy_(leaves[name])
    plain.bias_ih_l0.data.copy_(leaves["bias"])
    plain.bias_hh_l0.data.zero_()
    x, h_0, c_0 = (leaves[name].clone().requires_grad_() for name in ("input", "h_0", "c_0"))
    y, (h_n, c_n) = plain(x, (h_0[None], c_0[None]))
    torch.autograd.backward([y, h_n[0], c_n[0]], given.grads)
    theirs = {
        "y": y, "h_n": h_n[0], "c_n": c_n[0], "input": x.grad, "h_0": h_0.grad, "c_0": c_0.grad,
        "weight_ih": plain.weight_ih_l0.grad, "weight_hh": plain.weight_hh_l0.grad,
        "bias": plain.bias_ih_l0.grad,
    }  # fmt: skip
    errors = {
        name: (rms(found[name], wanted[name]), rms(x, wanted[name])) for name, x in theirs.items()
    }
    print(sizes, {name: f"{ours:.1e} of {plain:.1e}" for name, (ours, plain) in errors.items()})
    assert all(ours <= plain for ours, plain in errors.values())


@pytest.mark.parametrize("sizes", [(20, 70, 33, 70), (30, 2, 5, 140)], ids=str)
def test_bits_do_not_depend_on_threads(layer: Any, sizes: tuple[int, ...]) -> None:
    given = float32(*sizes, form="ragged")
    one = call(layer, given)
    for threads in (2, 3, 8):
        found = call(layer, given, threads=threads)
        assert all(torch.equal(x, one[name]) for name, x in found.items())


def some_rows(whole: Case, rows: slice) -> Case:
    given = {name: x if name in WEIGHTS or x is None else x[..., rows, :].contiguous()
             for name, x in whole.tensors.items()}  # fmt: skip
    assert whole.lengths is not None and whole.reset is not None and whole.detach is not None
    grads = [g[..., rows, :].contiguous() for g in whole.grads]
    masks = [x[:, rows].contiguous() for x in (whole.reset, whole.detach)]
    return Case(given, grads, whole.lengths[rows], *masks, reverse=whole.reverse)


def assert_rows_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], rows: Any) -> None:
    for name in found.keys() - set(WEIGHTS):
        same = torch.equal(found[name][..., rows, :].nan_to_num(7.0),
                           wanted[name][..., rows, :].nan_to_num(7.0))  # fmt: skip
        assert same, name


@pytest.mark.parametrize("form", ["ragged", "reverse"])
def test_bits_of_a_sample_do_not_depend_on_the_batch(layer: Any, form: str) -> None:
    """Nor on what other samples hold."""
    whole = float32(9, 37, 33, 20, form=form)
    one = call(layer, whole)
    for rows in (slice(3, 20), slice(3, 18), slice(7, 8)):  # below and above a tile of AMX
        part = call(layer, some_rows(whole, rows))
        for name in part.keys() - set(WEIGHTS):
            assert torch.equal(part[name], one[name][..., rows, :]), name
    x, h_0 = whole.tensors["input"], whole.tensors["h_0"]
    assert x is not None and h_0 is not None
    x[0, 0, 1], h_0[2, 3] = torch.inf, 1e20
    whole.grads[1][1] = 1e15
    changed = call(layer, whole)
    assert_rows_equal(changed, one, [row for row in range(37) if row not in (0, 1, 2)])


def test_samples_out_of_range_have_the_vector_kernels(layer: Any) -> None:
    given = float32(12, 40, 20, 33, form="ragged")
    x, c_0 = given.tensors["input"], given.tensors["c_0"]
    assert x is not None and c_0 is not None and given.lengths is not None
    given.lengths[:9] = 12
    for row, number in enumerate((torch.inf, -torch.inf, torch.nan, 3e38, -1e12)):
        x[3, row, 1] = number
    c_0[5, 2] = torch.nan
    vectors, found = call(layer, given, 0), call(layer, given)
    assert_rows_equal(found, vectors, slice(0, 6))
    assert found["y"][:, 0].isfinite().all()
    x[3, :5, 1] = c_0[5, 2] = 0
    assert_rows_equal(found, call(layer, given), slice(6, 40))


@pytest.mark.parametrize("sizes", [(15, 36, 24, 40), (9, 40, 20, 33, 7)], ids=str)
def test_gradients_that_leave_the_range(layer: Any, sizes: tuple[int, ...]) -> None:
    """The walk finds them: of a sample whose loss is large, and of one whose cell state's is."""
    given = float32(*sizes, form="ragged")
    calm = call(layer, given)
    given.grads[0][:, 3] *= 1e30
    given.grads[2][5] *= 1e28
    wanted = expected(given)
    for threads in (1, 3):
        found = call(layer, given, threads=threads)
        assert all(rms(x, wanted[name]) <= 2e-6 for name, x in found.items())
        assert_rows_equal(found, calm, [row for row in range(sizes[1]) if row not in (3, 5)])


def test_weights_out_of_range_take_the_vector_kernels(layer: Any) -> None:
    given = float32(9, 20, 24, 40, form="ragged")
    weight = given.tensors["weight_hh"]
    assert weight is not None
    for number in (2.0**16, torch.inf, torch.nan):
        weight[3, 5] = number
        found, vectors = call(layer, given), call(layer, given, 0)
        for name, x in vectors.items():
            assert torch.equal(found[name].nan_to_num(7.0), x.nan_to_num(7.0)), name


def assert_as_exact_as_vectors(layer: Any, given: Case) -> None:
    """Products of the smallest normal numbers are subnormal, and zero in both."""
    wanted, found, vectors = expected(given), call(layer, given), call(layer, given, 0)
    for name, x in wanted.items():
        assert rms(found[name], x) <= max(rms(vectors[name], x), 5e-7), name


@pytest.mark.parametrize("size", [1e-30, 1e-32, 1e-34, 1e8])
def test_no_digit_is_lost_of_tiny_and_large_gradients(layer: Any, size: float) -> None:
    """The gradient of a loss on the last step falls with every step back."""
    given = float32(9, 20, 24, 40, form="ragged")
    for grad in given.grads:
        grad *= size
    assert_as_exact_as_vectors(layer, given)


@pytest.mark.parametrize("size", [1e-30, 1e-33, 1e-36, 1e8])
def test_no_digit_is_lost_of_tiny_and_large_inputs(layer: Any, size: float) -> None:
    """All is as small as they, or the weights bring them back to size one."""
    given = float32(6, 20, 24, 40)
    x, weight, bias = (given.tensors[name] for name in ("input", "weight_ih", "bias"))
    assert x is not None and weight is not None and bias is not None
    for tensor in (given.tensors["h_0"], given.tensors["c_0"], bias):
        assert tensor is not None
        tensor *= min(size, 1)
    x *= size
    if size > 1:
        weight *= 1 / size
    assert_as_exact_as_vectors(layer, given)


def test_which_shapes_the_unit_takes(layer: Any) -> None:
    def fits(T: int, B: int, inputs: int, units: int) -> bool:
        return layer("fits", T, B, inputs, units) != 0

    assert fits(100, 64, 512, 512) and fits(8, 1, 1, 192)
    assert not fits(100, 64, 512, 128), "the cell takes as long as the products"
    assert not fits(1, 64, 512, 512), "packing takes as long as the products"
    assert not fits(100, 1, 1, 1 << 16), "a sum of so many products may overflow"


def test_the_stand_in_has_the_bits_of_amx(layer: Any, stand_in: Any) -> None:
    if layer.isa != "amx":
        pytest.skip("this processor has no AMX, or this is another instruction set's turn")
    for sizes in (*SIZES, *PROJECTED):
        for parts in (3, 2, 1):
            given = float32(*sizes, form="ragged")
            one, other = call(layer, given, parts), call(stand_in, given, parts)
            assert all(torch.equal(x, other[name]) for name, x in one.items())
