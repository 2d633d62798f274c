"""What once ended the process, each as a sentence that says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from cases import Shape
from compiled_kernels import kernels
from samples import Attention, Layer, Recurrence, Sample, detached, operate
from throughtime import LSTM, RelevancyAttention, RelLSTM, functional


def arguments(op: str, case: Sample | None = None, **changed: object) -> dict[str, Any]:
    """Good arguments of an operator, with some of them changed; of a backward after its forward."""
    name, _, part = op.rpartition("_")
    given = detached((case or SMALL[name]).inputs(torch.float32) | changed)
    return given | operate(f"{name}_forward", given) if part == "backward" else given


SMALL: dict[str, Sample] = {
    "lstm": Recurrence(Shape(3, 2, 4, 5)),
    "rel_lstm": Layer(9, 2, 4, 5, 3, 2, 2),
    "relevancy": Attention(2, 2, 9, 4, 4, 2, 2),
}
FULL: tuple[Sample, ...] = (
    Recurrence(Shape(3, 2, 4, 5, 2), "all", anew=True),
    Layer(9, 2, 4, 5, 3, 2, 2, lengths=True, before=5, mask="TB"),
    Attention(2, 2, 9, 4, 4, 2, 2, additive=True, lengths=True, before=5),
)
CALLS = {f"{case.op}_{part}": case for case in FULL for part in ("forward", "backward")}
TENSORS = [
    (op, argument.name)
    for op, case in CALLS.items()
    for argument in getattr(torch.ops.throughtime, op).default._schema.arguments
    if isinstance(arguments(op, case).get(argument.name), Tensor)
]


def elsewhere(tensor: Tensor) -> Tensor:
    """The same shape on meta."""
    return tensor.to("meta")


def without_memory(tensor: Tensor) -> Tensor:
    """A tensor as sharded training leaves it."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def nothing(tensor: Tensor) -> None:
    """What a schema takes for a tensor."""


def endless(tensor: Tensor) -> Tensor:
    """Another shape, of which a copy would not fit."""
    return tensor.flatten()[:1].expand(2**40, *tensor.shape)


def longer(tensor: Tensor) -> Tensor:
    """One more in every dimension."""
    return torch.nn.functional.pad(tensor, (0, 1) * tensor.dim())


def of_another_dtype(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.half()


BREAKAGES = (elsewhere, without_memory, nothing, endless, longer, of_another_dtype)


# The others are compared with these, so that another one may be named.
MEASURES = ("input", "query", "key", "memory", "last", "weight_hh", "weight_score")


@pytest.mark.parametrize("broken", BREAKAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_operators_name_the_tensor_that_is_wrong(
    op: str, name: str, broken: Callable[[Tensor], Tensor | None]
) -> None:
    schema = getattr(torch.ops.throughtime, op).default._schema
    kind = next(str(given.type) for given in schema.arguments if given.name == name)
    if broken is nothing and kind.startswith("Optional"):
        operate(op, arguments(op) | {name: None})  # None is right there
        return
    given = arguments(op, CALLS[op])
    given[name] = broken(given[name])
    by = r"|\w+ should (be on meta|have shape|have dtype)|an earlier call leaves at most"
    by += "|query should have a multiple of the key's"
    with pytest.raises(
        RuntimeError, match=f"throughtime::{op}: ({name}{by if name in MEASURES else ''})"
    ):
        operate(op, given)


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_shapes_without_numbers_are_checked_too(op: str, name: str) -> None:
    """A compiler sees nothing else: a wrong size has to end there, whichever tensor is named."""
    given = {
        n: x.to("meta") if isinstance(x, Tensor) else x for n, x in arguments(op, CALLS[op]).items()
    }
    operate(op, given)
    given[name] = torch.nn.functional.pad(given[name], (0, 1) * given[name].dim())
    with pytest.raises(RuntimeError, match=rf"throughtime::{op}: \w+ should have shape"):
        operate(op, given)


@pytest.mark.parametrize(
    "case",
    [SMALL["rel_lstm"], SMALL["relevancy"], Attention(2, 2, 9, 4, 4, 2, 2, screen_every=3)],
    ids=str,
)
def test_last_is_taken_as_the_forward_pass_wrote_it_and_not_otherwise(case: Sample) -> None:
    op, generator = f"{case.op}_backward", torch.Generator().manual_seed(0)
    refused = 0
    for lengths in (None, torch.tensor([9, 0])):
        right = arguments(op, case, lengths=lengths)
        last = right["last"]
        operate(op, right)
        wrong = [torch.full_like(last, value) for value in (-(2**63), -1, 0, 7, 8, 9, 2**63 - 1)]
        wrong += [torch.randint(-2, 10, last.shape, generator=generator) for _ in range(50)]
        wrong += [last.flip(0), last.roll(1)]
        for values in wrong:
            try:
                operate(op, {**right, "last": values})
            except RuntimeError as error:
                assert "last should be that of the forward pass" in str(error)  # noqa: PT017
                refused += 1
    assert refused >= 100  # a few are what another forward pass would have written


def test_sizes_of_zero() -> None:
    without = {"h_0": torch.empty(2, 0), "weight_hr": torch.empty(0, 5)}
    for name, case, changed in (
        ("weight_hh", Recurrence(Shape(3, 2, 4, 0)), {}),
        ("weight_hh", SMALL["lstm"], {"weight_hh": torch.empty(20, 0), **without}),
        ("weight_hh", Layer(9, 2, 4, 0, 3, 2, 2), {}),
        ("weight_score", Layer(9, 2, 4, 5, 0, 2, 2), {}),
        ("query", Attention(2, 2, 9, 0, 4, 2, 2), {}),
    ):
        op = f"{case.op}_forward"
        with pytest.raises(RuntimeError, match=f"{name}.* at least one"):
            operate(op, arguments(op, case, **changed))
    for case in (
        *(Recurrence(shape) for shape in (Shape(3, 0, 4, 5), Shape(3, 2, 0, 5))),
        *(Layer(9, 0, 4, 5, 3, 2, 2), Layer(9, 2, 0, 5, 3, 2, 2)),
        *(Attention(*sizes, 4, 4, 2, 2) for sizes in ((0, 2, 9), (2, 0, 9), (2, 2, 0))),
    ):
        given = arguments(f"{case.op}_backward", case)
        for gradient in operate(f"{case.op}_backward", given).values():
            assert gradient.isfinite().all()
    # Nothing to do in each of very many sequences.
    empty = torch.empty(1, 1, 0, 4).expand(2**40, 1, 0, 4)
    operate(
        "relevancy_forward", arguments("relevancy_forward", query=empty, key=empty, value=empty)
    )


def test_plans_of_nothing() -> None:
    for sizes in ((0, 0, 0, 0), (1, 0, 1, 1), (1, 1, 1, 0), (-1, 1, 1, 1), (2**62, 2**62, 1, 1)):
        with pytest.raises(ValueError, match="sizes should be"):
            kernels.lstm_plan(*sizes, 1, 4, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [2**62, 2**61, 2**60, 2**53])
def test_sizes_that_wrap(length: int, dtype: torch.dtype) -> None:
    long = torch.zeros(1, 1, 1, dtype=dtype).expand(length, 1, 1)
    wide = torch.zeros(1, 1, 1, dtype=dtype).expand(1, length, 1)
    words = "more than any memory|allocate memory|Storage size"
    for layer in (LSTM(1, 1), RelLSTM(1, 1)):
        for input in (long, wide):
            with pytest.raises(RuntimeError, match=words):
                layer.to(dtype)(input)
    q = long.unsqueeze(0).squeeze(2)[:, None]  # [1, 1, length, 1]
    with pytest.raises(RuntimeError, match=words):
        functional.relevancy_attention(q, q, q, 2, 2)
    with pytest.raises(RuntimeError, match=words):
        RelevancyAttention(1, 1, 2, 2).to(dtype)(long.transpose(0, 1))
    attended = torch.zeros(1, 1, 1, 1, dtype=dtype).expand(1, 1, 1, length)
    given = dict.fromkeys(("query", "key", "value"), attended)
    with pytest.raises(RuntimeError, match=words):
        operate("relevancy_forward", arguments("relevancy_forward", **given))


BATCH_SIZES = [[2, 1, 2], [3, 1, 2], [2, 0, 2], [2, -1, 1], [2, 1, 1], [3, 2, 1], [5, 0], []]


@pytest.mark.parametrize("layer", [LSTM(3, 4), RelLSTM(3, 4)], ids=["LSTM", "RelLSTM"])
@pytest.mark.parametrize("sizes", BATCH_SIZES, ids=str)
def test_batch_sizes_made_by_hand(layer: torch.nn.Module, sizes: list[int]) -> None:
    packed = PackedSequence(torch.randn(5, 3), torch.tensor(sizes, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"batch_sizes .*should be positive.*got"):
        layer(packed)


def test_batch_sizes_in_compiled_code() -> None:
    layer = LSTM(3, 4)
    run_compiled = torch.compile(
        lambda data, sizes: layer(PackedSequence(data, sizes))[0].data, backend="eager"
    )
    data = torch.randn(5, 3)
    layer.requires_grad_(False)
    torch.testing.assert_close(
        run_compiled(data, torch.tensor([2, 2, 1])),
        layer(PackedSequence(data, torch.tensor([2, 2, 1])))[0].data,
    )
    with pytest.raises(RuntimeError, match=r"batch_sizes .*should be positive"):
        run_compiled(data, torch.tensor([2, 1, 2]))


@pytest.mark.parametrize("layer", [LSTM(3, 4), RelLSTM(3, 4)], ids=["LSTM", "RelLSTM"])
@pytest.mark.parametrize(
    ("order", "back"),
    [([0, 5], [0, 1]), ([0, 0], [0, 1]), ([0], [0]), ([0, 1, 2], [0, 1, 2]), ([0, -1], [0, 1]),
     ([0, 1], [0, 9]), ([0, 1], [1, 0])],
)  # fmt: skip
def test_orders_made_by_hand(layer: torch.nn.Module, order: list[int], back: list[int]) -> None:
    data, sizes = torch.randn(5, 3), torch.tensor([2, 2, 1])
    packed = PackedSequence(data, sizes, torch.tensor(order), torch.tensor(back))
    with pytest.raises(RuntimeError, match="sorted_indices of a packed sequence should"):
        layer(packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_is_read_by_the_set_that_wrote_it(isa: str, dtype: torch.dtype) -> None:
    given = detached(SMALL["lstm"].inputs(dtype))
    given |= operate("lstm_forward", given)
    for other in kernels.runnable_isas():
        kernels.set_isa(other)
        if other == isa or {other, isa} <= {"amx", "avx512_bf16", "avx512"}:  # those share kernels
            operate("lstm_backward", given)
            continue
        with pytest.raises(RuntimeError, match=f"saved should .* instruction set, {other}"):
            operate("lstm_backward", given)


def test_lengths_that_change_after_the_forward_pass() -> None:
    lengths = torch.tensor([3, 2])
    x = torch.randn(3, 2, 4, requires_grad=True)
    weight_ih, weight_hh = torch.randn(20, 4), torch.randn(20, 5)
    output, _ = functional.lstm(x, None, weight_ih, weight_hh, lengths=lengths)
    lengths.data.fill_(99)  # past autograd's own check
    with pytest.raises(RuntimeError, match=r"lengths should be in \[0, 3\]"):
        output.sum().backward()
