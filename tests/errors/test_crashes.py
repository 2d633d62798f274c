"""What once ended the process, each as a sentence that says what is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from throughtime import LSTM, RelevancyAttention, RelLSTM, _ext, functional

if _ext.extension is None:
    pytest.skip("needs the compiled CPU kernels", allow_module_level=True)

ops = torch.ops.throughtime
Arguments = dict[str, object]


def lstm(T: int = 3, B: int = 2, inputs: int = 4, H: int = 5) -> Arguments:
    """Arguments of lstm_forward."""
    return {
        "input": torch.randn(T, B, inputs), "h_0": torch.randn(B, H), "c_0": torch.randn(B, H),
        "weight_ih": torch.randn(4 * H, inputs), "weight_hh": torch.randn(4 * H, H), "bias": None,
        "weight_hr": None, "lengths": None, "reset": None, "reverse": False, "save": True,
    }  # fmt: skip


def lstm_gradient(given: Arguments) -> Arguments:
    """Arguments of lstm_backward after that forward."""
    output, *_, saved = run("lstm_forward", given)
    kept = {k: v for k, v in given.items() if k not in ("bias", "save")}
    return {"grad_output": torch.ones_like(output), "grad_h_n": None, "grad_c_n": None, **kept,
            "detach_mask": None, "output": output, "saved": saved, "need_input": True,
            "need_weights": True}  # fmt: skip


def rel_lstm(T: int = 9, B: int = 2, inputs: int = 4, H: int = 5, A: int = 3) -> Arguments:
    """Arguments of rel_lstm_forward."""
    return {
        "input": torch.randn(T, B, inputs), "h_0": torch.randn(B, H), "c_0": torch.randn(B, H),
        "context_0": torch.randn(B, H), "memory": None, "relevance": None,
        "weight_ih": torch.randn(4 * H, inputs), "weight_hh": torch.randn(4 * H, H), "bias": None,
        "weight_query": torch.randn(A, H), "weight_key": torch.randn(A, H),
        "weight_score": torch.randn(A), "lengths": None, "retained": 0, "window_size": 2,
        "top_k": 2, "keep_first": False, "save": True,
    }  # fmt: skip


def rel_lstm_gradient(given: Arguments) -> Arguments:
    """Arguments of rel_lstm_backward after that forward."""
    output, *_, last, _, _, saved = run("rel_lstm_forward", given)
    names = ("input", "c_0", "weight_ih", "weight_hh", "weight_query", "weight_key",
             "weight_score", "lengths", "retained", "window_size")  # fmt: skip
    return {"grad_output": torch.ones_like(output), "grad_h_n": None, "grad_c_n": None,
            "grad_context_n": None, **{name: given[name] for name in names},
            "detach_mask": None, "last": last, "saved": saved, "need_input": True,
            "need_weights": True}  # fmt: skip


def attention(B: int = 2, heads: int = 2, T: int = 9, D: int = 4) -> Arguments:
    """Arguments of relevancy_forward."""
    return {
        **{name: torch.randn(B, heads, T, D) for name in ("query", "key", "value")},
        "score_weight": None, "lengths": None, "relevance": None, "retained": 0, "window_size": 2,
        "top_k": 2, "scale": 0.5, "keep_first": False,
    }  # fmt: skip


def attention_gradient(given: Arguments) -> Arguments:
    """Arguments of relevancy_backward after that forward."""
    output, lse, last, *_ = run("relevancy_forward", given)
    names = ("query", "key", "value", "score_weight", "lengths", "retained", "window_size", "scale")
    return {"grad_output": torch.ones_like(output), **{name: given[name] for name in names},
            "output": output, "lse": lse, "last": last}  # fmt: skip


def run(name: str, arguments: Arguments) -> tuple[Tensor, ...]:
    """An operator with the arguments that its schema asks for; those that it adds are None."""
    operator = getattr(ops, name).default
    names = [argument.name for argument in operator._schema.arguments]
    result: tuple[Tensor, ...] = operator(*(arguments.get(argument) for argument in names))
    return result


CALLS: dict[str, Callable[[], Arguments]] = {
    "lstm_forward": lstm,
    "lstm_backward": lambda: lstm_gradient(lstm()),
    "rel_lstm_forward": rel_lstm,
    "rel_lstm_backward": lambda: rel_lstm_gradient(rel_lstm()),
    "relevancy_forward": attention,
    "relevancy_backward": lambda: attention_gradient(attention()),
}
TENSORS = [(op, name) for op, make in CALLS.items() for name, value in make().items()
           if isinstance(value, Tensor)]  # fmt: skip


def elsewhere(tensor: Tensor) -> Tensor:
    """The same shape on meta."""
    return tensor.to("meta")


def without_memory(tensor: Tensor) -> Tensor:
    """As sharded training leaves it."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def nothing(tensor: Tensor) -> None:
    """What a schema takes for a tensor."""


def endless(tensor: Tensor) -> Tensor:
    """Another shape, of which a copy would not fit."""
    return tensor.flatten()[:1].expand(2**40, *tensor.shape)


@pytest.mark.parametrize("broken", [elsewhere, without_memory, nothing, endless])
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_operators_name_the_tensor_that_is_wrong(
    op: str, name: str, broken: Callable[[Tensor], Tensor | None]
) -> None:
    arguments = CALLS[op]()
    tensor = arguments[name]
    assert isinstance(tensor, Tensor)
    arguments[name] = broken(tensor)
    if broken is nothing and name.startswith("grad_") and op != "relevancy_backward":
        run(op, arguments)  # None is right there
        return
    # Where all others are compared with that tensor, one of them may be named.
    by = r"|.* should be on meta|.* should have shape" if name in ("input", "query", "key") else ""
    with pytest.raises(RuntimeError, match=f"throughtime::{op}: ({name}{by})"):
        run(op, arguments)


@pytest.mark.parametrize("op", ["rel_lstm", "relevancy"])
def test_last_is_taken_as_the_forward_pass_wrote_it_and_not_otherwise(op: str) -> None:
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for lengths in (None, torch.tensor([9, 0])):
        make = rel_lstm if op == "rel_lstm" else attention
        backward = rel_lstm_gradient if op == "rel_lstm" else attention_gradient
        right = backward({**make(), "lengths": lengths})
        last = right["last"]
        assert isinstance(last, Tensor)
        run(f"{op}_backward", right)
        wrong = [torch.full_like(last, value) for value in (-(2**63), -1, 0, 7, 8, 9, 2**63 - 1)]
        wrong += [torch.randint(-2, 10, last.shape, generator=generator) for _ in range(50)]
        wrong += [last.flip(0), last.roll(1)]
        for values in wrong:
            try:
                run(f"{op}_backward", {**right, "last": values})
            except RuntimeError as error:
                assert "last should be that of the forward pass" in str(error)  # noqa: PT017
                refused += 1
    assert refused >= 100  # a few are what another forward pass would have written


def test_sizes_of_zero() -> None:
    for op, name, sizes in (
        ("lstm_forward", "weight_hh", lstm(H=0)),
        ("lstm_forward", "weight_hh", lstm() | {"h_0": torch.empty(2, 0),
         "weight_hr": torch.empty(0, 5), "weight_hh": torch.empty(20, 0)}),
        ("rel_lstm_forward", "weight_hh", rel_lstm(H=0)),
        ("rel_lstm_forward", "weight_score", rel_lstm(A=0)),
        ("relevancy_forward", "query", attention(D=0)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"{name}.* at least one"):
            run(op, sizes)
    for op, make, backward in (
        ("lstm", lambda: lstm(B=0), lstm_gradient),
        ("lstm", lambda: lstm(inputs=0), lstm_gradient),
        ("rel_lstm", lambda: rel_lstm(B=0), rel_lstm_gradient),
        ("rel_lstm", lambda: rel_lstm(inputs=0), rel_lstm_gradient),
        ("relevancy", lambda: attention(B=0), attention_gradient),
        ("relevancy", lambda: attention(heads=0), attention_gradient),
        ("relevancy", lambda: attention(T=0), attention_gradient),
    ):
        for gradient in run(f"{op}_backward", backward(make())):
            assert gradient.isfinite().all()
    # Nothing to do in each of very many sequences.
    empty = torch.empty(1, 1, 0, 4).expand(2**40, 1, 0, 4)
    run("relevancy_forward", attention() | dict.fromkeys(("query", "key", "value"), empty))


def test_plans_of_nothing() -> None:
    for sizes in ((0, 0, 0, 0), (1, 0, 1, 1), (1, 1, 1, 0), (-1, 1, 1, 1), (2**62, 2**62, 1, 1)):
        with pytest.raises(ValueError, match="sizes should be"):
            _ext.extension.lstm_plan(*sizes, 4, 2)  # type: ignore[union-attr]


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
    with pytest.raises(RuntimeError, match=words):
        run("relevancy_forward", attention() | dict.fromkeys(("query", "key", "value"), attended))


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
def test_saved_is_read_by_the_set_that_wrote_it(dtype: torch.dtype) -> None:
    sets = _ext.extension.runnable_isas()  # type: ignore[union-attr]
    best = _ext.extension.isa()  # type: ignore[union-attr]
    given = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in lstm().items()}
    try:
        for one in sets:
            for other in sets:
                _ext.extension.set_isa(one)  # type: ignore[union-attr]
                arguments = lstm_gradient(given)
                _ext.extension.set_isa(other)  # type: ignore[union-attr]
                if one == other:
                    run("lstm_backward", arguments)
                    continue
                with pytest.raises(RuntimeError, match=f"saved should .* instruction set, {other}"):
                    run("lstm_backward", arguments)
    finally:
        _ext.extension.set_isa(best)  # type: ignore[union-attr]


def test_lengths_that_change_after_the_forward_pass() -> None:
    lengths = torch.tensor([3, 2])
    x = torch.randn(3, 2, 4, requires_grad=True)
    weight_ih, weight_hh = torch.randn(20, 4), torch.randn(20, 5)
    output, _ = functional.lstm(x, None, weight_ih, weight_hh, lengths=lengths)
    lengths.data.fill_(99)  # past autograd's own check
    with pytest.raises(RuntimeError, match=r"lengths should be in \[0, 3\]"):
        output.sum().backward()
