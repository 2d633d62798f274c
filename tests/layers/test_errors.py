"""Bad input: ``nn.LSTM``'s error where it has one, otherwise argument, wanted, got, way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from cases import random_mask, runnable
from throughtime import LSTM, RelLSTM, _ext, functional, masks

T, B = 6, 3


NEWER_WORDS = pytest.mark.skipif(
    torch.__version__ < (2, 11), reason="nn.LSTM of torch 2.10 has other words"
)


def error_of(function: Callable[[], object]) -> tuple[type[BaseException], str]:
    """Type and words of the error, to be compared with those of another."""
    with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
        function()
    return caught.type, str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"bias": 1}, marks=NEWER_WORDS),
        pytest.param({"batch_first": "yes"}, marks=NEWER_WORDS),
        {"input_size": 4.0},
        {"hidden_size": "5"},
        pytest.param({"input_size": 0}, marks=NEWER_WORDS),
        {"hidden_size": -1},
        {"num_layers": 0},
        {"dropout": 1.5},
        {"dropout": True},
        {"dropout": -0.1},
        {"proj_size": -1},
        {"proj_size": 5},
    ],
    ids=str,
)
def test_constructor_errors_are_theirs(options: dict[str, object]) -> None:
    arguments = {"input_size": 4, "hidden_size": 5} | options
    assert error_of(lambda: LSTM(**arguments)) == error_of(lambda: nn.LSTM(**arguments))


def test_dropout_with_one_layer_warns_as_theirs_does() -> None:
    with pytest.warns(UserWarning, match="dropout option adds") as theirs:
        nn.LSTM(4, 5, dropout=0.5)
    with pytest.warns(UserWarning, match="dropout option adds") as ours:
        LSTM(4, 5, dropout=0.5)
    assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]


def zeros(*shape: int, **options: object) -> Tensor:
    return torch.zeros(*shape, **options)


@pytest.mark.parametrize(
    "arguments",
    [
        (zeros(T, B, 7),),
        (zeros(0, B, 4),),
        (zeros(T, B, 4, 1),),
        (zeros(4),),
        pytest.param((zeros(T, B, 4, dtype=torch.float64),), marks=NEWER_WORDS),
        (zeros(T, B, 4), (zeros(2, 4, 5), zeros(2, B, 5))),
        (zeros(T, B, 4), (zeros(2, B, 5), zeros(2, B, 6))),
        (zeros(T, B, 4), (zeros(1, B, 5), zeros(2, B, 5))),
        (zeros(T, B, 4), (zeros(2, 5), zeros(2, B, 5))),
        (zeros(T, 4), (zeros(2, 1, 5), zeros(2, 1, 5))),
        (zeros(T, 4), (zeros(2, 4), zeros(2, 5))),
    ],
    ids=lambda arguments: str([list(getattr(x, "shape", "")) or "states" for x in arguments]),
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_call_errors_are_theirs(arguments: tuple[object, ...], batch_first: bool) -> None:
    theirs, ours = (cls(4, 5, 2, batch_first=batch_first) for cls in (nn.LSTM, LSTM))
    if batch_first:
        x = arguments[0]
        arguments = (x.transpose(0, 1) if x.dim() > 2 else x, *arguments[1:])
    assert error_of(lambda: ours(*arguments)) == error_of(lambda: theirs(*arguments))


def packed(features: int = 4, dtype: torch.dtype = torch.float32) -> PackedSequence:
    return pack_sequence([zeros(3, features, dtype=dtype), zeros(1, features, dtype=dtype)])


def device_error(kind: str, tensor: str) -> str:
    return (
        f"Input and {kind} tensors are not at the same device, found input tensor at meta and "
        f"{kind} tensor at cpu ({tensor})"
    )


BY_STEP = r"detach_mask should have shape \[6\], \[6, 3\] or \[2, 6, 1 or 3\] \(\[T\], \[T, B\] or "
MODULE_ERRORS = [
    (
        (packed(7),),
        {},
        RuntimeError,
        r"input.size\(-1\) must be equal to input_size. Expected 4, got 7",
    ),
    ((packed(dtype=torch.float64),), {}, ValueError, "RNN input dtype .torch.float64. does not"),
    (
        (packed(), (zeros(2, 3, 5), zeros(2, 2, 5))),
        {},
        RuntimeError,
        r"Expected hidden\[0\] size \(2, 2, 5\), got \[2, 3, 5\]",
    ),
    (
        (zeros(T, B, 4, device="meta"),),
        {},
        RuntimeError,
        re.escape(device_error("parameter", "weight_ih")),
    ),
    (
        (zeros(T, B, 4), (zeros(2, B, 5).double(), zeros(2, B, 5))),
        {},
        ValueError,
        r"and hx\[0\] with torch.float64. Convert the state: hx\[0\].to\(torch.float32\)",
    ),
    ((zeros(T, B, 4),), {"detach_mask": [True] * T}, TypeError, "detach_mask .* Tensor, got list"),
    (
        (zeros(T, B, 4),),
        {"detach_mask": zeros(5).bool()},
        RuntimeError,
        BY_STEP + r".*got \[5\]$",
    ),
    (
        (zeros(T, B, 4),),
        {"detach_mask": zeros(3, 6).bool()},
        RuntimeError,
        BY_STEP + r".*got \[3, 6\]; it is time-major, also with batch_first=True: transpose",
    ),
    (
        (zeros(T, B, 4),),
        {"detach_mask": zeros(4, T, 1).bool()},
        RuntimeError,
        BY_STEP + r".*got \[4, 6, 1\]$",
    ),
    (
        (zeros(T, B, 4),),
        {"detach_mask": zeros(T)},
        ValueError,
        r"lstm: detach_mask should have dtype torch.bool, got torch.float32; convert it: detach_",
    ),
    (
        (zeros(T, B, 4),),
        {"detach_mask": zeros(T, device="meta").bool()},
        RuntimeError,
        r"detach_mask should be on the input's device cpu, got meta; move it: detach_mask.to\('cp",
    ),
    ((zeros(T, B, 4),), {"reset": [1]}, TypeError, "reset should be a bool Tensor, got list"),
    (
        (zeros(T, B, 4),),
        {"reset": zeros(T).bool()},
        RuntimeError,
        r"reset should have shape \[6, 3\] \(\[T, B\]\), got \[6\]$",
    ),
    (
        (zeros(T, B, 4),),
        {"reset": zeros(B, T).bool()},
        RuntimeError,
        r"reset should have shape \[6, 3\] .*got \[3, 6\]; it is time-major",
    ),
    (
        (zeros(T, B, 4),),
        {"reset": zeros(T, B).int()},
        ValueError,
        r"reset should have dtype torch.bool, got torch.int32; convert it: reset.bool\(\)",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "kind", "message"), MODULE_ERRORS)
def test_module_errors(
    backend: str,
    arguments: tuple[object, ...],
    options: dict[str, object],
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        LSTM(4, 5, 2, backend=backend)(*arguments, **options)


@pytest.mark.parametrize("p", [0.5, np.float32(0.5), np.float64(0.5), np.int64(1), Fraction(1, 2)])
def test_numbers_that_are_probabilities(p: float) -> None:
    """What nn.LSTM takes for dropout is taken for detach_prob and RelLSTM too."""
    assert nn.LSTM(4, 5, 2, dropout=p).dropout == LSTM(4, 5, 2, dropout=p).dropout == float(p)
    for layer in (LSTM(4, 5, detach_prob=p), RelLSTM(4, 5, 2, dropout=p, detach_prob=p)):
        assert type(layer.detach_prob) is float and layer.detach_prob == float(p)
    assert layer.dropout == float(p) and masks.detach_mask(3, p).shape == (3,)


@pytest.mark.parametrize(
    "p", [-0.1, 1.1, float("nan"), "0.5", None, True, np.bool_(True), np.array(0.5), 1j]
)
def test_probabilities(p: object) -> None:
    message = re.escape(f"should be a number in range [0, 1], got {p!r}")
    lstm = LSTM(4, 5)
    for attempt in (
        lambda: LSTM(4, 5, detach_prob=p),
        lambda: setattr(lstm, "detach_prob", p),
        lambda: masks.detach_mask(3, p),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert lstm.detach_prob == 0.0


def test_detach_shared_and_extra_positional_arguments() -> None:
    with pytest.raises(TypeError, match="detach_shared should be of type bool, got: int"):
        LSTM(4, 5, detach_shared=1)
    with pytest.raises(TypeError, match="takes from 3 to 11 positional arguments but 12"):
        LSTM(4, 5, 1, True, False, 0.0, False, 0, None, None, 0.5)


def test_a_backend_that_can_never_run_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "_missing_cuda", "the CUDA kernels were not built; `pip install .`")
    message = re.escape(
        "backend='cuda' cannot run this LSTM: the CUDA kernels were not built; `pip install .`"
    )
    with pytest.raises(RuntimeError, match=message):
        LSTM(4, 5, backend="cuda")
    lstm = LSTM(4, 5)
    with pytest.raises(RuntimeError, match=message):
        lstm.backend = "cuda"
    assert lstm.backend == "auto"


def test_conversion_of_something_else() -> None:
    with pytest.raises(TypeError, match=r"module should be a torch.nn.LSTM, got GRU"):
        LSTM.from_torch(nn.GRU(4, 5))


def layer(**changed: object) -> dict[str, object]:
    """Good arguments of functional.lstm, with some of them changed."""
    good: dict[str, object] = {
        "input": zeros(T, B, 4),
        "hx": (zeros(B, 5), zeros(B, 5)),
        "weight_ih": zeros(20, 4),
        "weight_hh": zeros(20, 5),
        "bias_ih": zeros(20),
        "bias_hh": zeros(20),
    }
    return good | changed


FUNCTION_ERRORS = [
    ({"input": zeros(T, 4)}, RuntimeError, "input must have 3 dimensions, got 2"),
    ({"input": zeros(0, B, 4)}, RuntimeError, "Expected sequence length to be larger than 0 in"),
    ({"input": zeros(T, B, 3)}, RuntimeError, "to input_size. Expected 4, got 3"),
    ({"input": [[1.0]]}, TypeError, "lstm: input should be a Tensor, got list"),
    ({"hx": zeros(B, 5)}, TypeError, r"hx should be a pair \(h_0, c_0\) of tensors or None, got T"),
    ({"hx": (zeros(B, 5), None)}, TypeError, r"or None, got a pair of Tensor and NoneType"),
    ({"hx": (zeros(B, 5),) * 3}, RuntimeError, r"tensors or None, got a tuple of 3"),
    ({"reverse": "no"}, TypeError, r"lstm: reverse should be of type bool, got: str"),
    (
        {"hx": (zeros(1, B, 5), zeros(B, 5))},
        RuntimeError,
        r"Expected hidden\[0\] size \(3, 5\), got \[1, 3, 5\]",
    ),
    (
        {"hx": (zeros(B, 5), zeros(B, 4))},
        RuntimeError,
        r"Expected hidden\[1\] size \(3, 5\), got \[3, 4\]",
    ),
    ({"weight_hh": zeros(18, 5)}, RuntimeError, r"weight_hh should have shape \[4H, H\].*\[18, 5"),
    ({"weight_hh": zeros(20, 6)}, RuntimeError, r"weight_hh should have shape \[20, 5\], got \[20"),
    ({"weight_ih": zeros(16, 4)}, RuntimeError, r"weight_ih should have shape \[20, 4\], got \[16"),
    ({"bias_ih": zeros(5)}, RuntimeError, r"bias_ih should have shape \[20\], got \[5\]"),
    ({"bias_hh": zeros(20, 1)}, RuntimeError, r"bias_hh should have shape \[20\], got \[20, 1\]"),
    ({"weight_hr": zeros(2, 4)}, RuntimeError, r"weight_hr should have shape \[P, 5\], got \[2, 4"),
    (
        {"weight_hr": zeros(2, 5)},
        RuntimeError,
        r"weight_hh should have shape \[20, 2\], got \[20, 5\]",
    ),
    (
        {"weight_hh": zeros(20, 5).double()},
        ValueError,
        r"does not match weight dtype \(torch.float64\) of weight_hh. Convert input: input.to\(",
    ),
    ({"hx": (zeros(B, 5), zeros(B, 5).half())}, ValueError, r"hx\[1\] with torch.float16. Convert"),
    (
        {"detach_mask": random_mask(B, T, p=0.5, seed=1)},
        RuntimeError,
        r"detach_mask should have shape \[6\] or \[6, 3\] \(\[T\] or \[T, B\], time first\), got",
    ),
    ({"detach_mask": zeros(T, B)}, ValueError, "detach_mask should have dtype torch.bool, got tor"),
    ({"detach_mask": 0.5}, TypeError, "detach_mask should be a bool Tensor, got float"),
    (
        {"reset": zeros(T).bool()},
        RuntimeError,
        r"reset should have shape \[6, 3\] \(\[T, B\], time first\), got \[6\]",
    ),
    ({"lengths": [1, 2, 3]}, TypeError, r"lengths should be an int64 Tensor, got list; convert it"),
    (
        {"lengths": torch.tensor([1, 2, 3], dtype=torch.int32)},
        ValueError,
        r"lengths should have dtype torch.int64, got torch.int32; convert it: lengths.long\(\)",
    ),
    ({"lengths": torch.tensor([1, 2])}, RuntimeError, r"lengths should have shape \[3\], one per"),
    (
        {"lengths": torch.tensor([1, 2, 7])},
        ValueError,
        r"lengths should be between 0 and the number of steps 6, got values from 1 to 7; pad the",
    ),
    (
        {"lengths": torch.tensor([1, -1, 2])},
        ValueError,
        r"steps 6, got values from -1 to 2",
    ),
    (
        {"lengths": torch.zeros(B, dtype=torch.int64, device="meta")},
        RuntimeError,
        r"lengths should be on the CPU or on the input's device cpu, got meta",
    ),
    ({"backend": "gpu"}, ValueError, "backend should be one of 'auto', 'cuda', 'triton', 'cpu', "),
]


@pytest.mark.parametrize(("changed", "kind", "message"), FUNCTION_ERRORS)
def test_function_errors(
    backend: str, changed: dict[str, object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        functional.lstm(**{"backend": backend} | layer(**changed))


WEIGHTS = (zeros(20, 4), zeros(20, 5), zeros(20), zeros(20), None)
BOTH_ERRORS = [
    ({"input": None}, TypeError, "input should be a Tensor, got NoneType"),
    ({"weights": None}, TypeError, "weights should be a pair, one per direction, got NoneType"),
    ({"weights": (WEIGHTS,) * 3}, TypeError, "weights should be a pair, .*, got a tuple of 3"),
    ({"weights": (WEIGHTS, WEIGHTS[:2])}, TypeError, r"weights\[1\] should be .*got a tuple of 2"),
    ({"weights": (WEIGHTS, None)}, TypeError, r"weights\[1\] should be .* got NoneType"),
    ({"weights": (WEIGHTS, (*WEIGHTS[:3], None, None))}, TypeError, "have the same biases and pro"),
    (
        {"weights": (WEIGHTS, (*WEIGHTS[:4], zeros(5, 5)))},
        TypeError,
        "the same biases and projections, or none",
    ),
    ({"weights": (WEIGHTS, (None, *WEIGHTS[1:]))}, TypeError, "weight_ih should be a Tensor, got"),
    (
        {"weights": (WEIGHTS, (zeros(24, 4), zeros(24, 6), zeros(24), zeros(24), None))},
        RuntimeError,
        r"weight_hh of the second direction should have shape \[20, 5\], got \[24, 6\]",
    ),
    ({"hx": zeros(2, 2, B, 5)}, TypeError, r"a pair \(h_0, c_0\) of tensors or None, got Tensor"),
    ({"hx": (zeros(2, B, 5),)}, RuntimeError, "tensors or None, got a tuple of 1"),
    ({"hx": (zeros(2, B, 5), None)}, TypeError, "got a pair of Tensor and NoneType"),
    (
        {"hx": (zeros(2, B, 5), zeros(5, B, 5))},
        RuntimeError,
        r"bidirectional_lstm: hx\[1\] should have shape \[2, B, H\], got \[5, 3, 5\]",
    ),
    (
        {"hx": (zeros(B, 5), zeros(2, B, 5))},
        RuntimeError,
        r"hx\[0\] should have shape \[2, B, H or P\], got \[3, 5\]",
    ),
    (
        {"hx": (zeros(2, B, 5), zeros(2, B, 6))},
        RuntimeError,
        r"Expected hidden\[1\] size \(3, 5\), got \[3, 6\]",
    ),
    ({"detach_mask": zeros(T).bool()}, TypeError, "detach_mask should be a pair, .* got Tensor"),
    ({"detach_mask": None}, TypeError, "detach_mask should be a pair, .* got NoneType"),
    ({"reset": (None,)}, TypeError, "reset should be a pair, .* got a tuple of 1"),
    ({"reset": (None, zeros(T, B))}, ValueError, "reset should have dtype torch.bool"),
    ({"lengths": [1, 2, 3]}, TypeError, "lengths should be an int64 Tensor, got list"),
]


@pytest.mark.parametrize(("changed", "kind", "message"), BOTH_ERRORS)
def test_errors_of_both_directions(
    changed: dict[str, object], kind: type[Exception], message: str
) -> None:
    good = {"input": zeros(T, B, 4), "hx": None, "weights": (WEIGHTS, WEIGHTS)}
    functional.bidirectional_lstm(**good)
    with pytest.raises(kind, match=message):
        functional.bidirectional_lstm(**(good | changed))


@pytest.mark.parametrize(
    ("dtype", "castable"),
    [
        (torch.int64, False),
        (torch.bool, False),
        (torch.complex64, False),
        (torch.float64, False),
        (torch.float8_e4m3fn, False),
        (torch.float16, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("argument", ["input", "hx", "weight"])
@pytest.mark.parametrize("layer_type", [LSTM, RelLSTM])
def test_autocast_casts_what_theirs_does(
    layer_type: type[nn.Module], argument: str, dtype: torch.dtype, castable: bool
) -> None:
    """No integer, bool, complex or double is cast in silence: a RuntimeError, as nn.LSTM's."""
    arguments = {"input": zeros(T, B, 4), "hx": zeros(1, B, 5), "weight": zeros(20, 5)}
    arguments[argument] = arguments[argument].to(dtype)

    def run(layer: nn.Module) -> object:
        layer.weight_hh_l0 = nn.Parameter(arguments["weight"], requires_grad=False)
        with torch.autocast("cpu", torch.bfloat16):
            return layer(arguments["input"], (arguments["hx"], arguments["hx"]))

    if castable:
        run(layer_type(4, 5))
        return
    if dtype != torch.float8_e4m3fn:
        assert error_of(lambda: run(nn.LSTM(4, 5)))[0] is RuntimeError
    kind, words = error_of(lambda: run(layer_type(4, 5)))
    assert kind is RuntimeError and str(dtype) in words and words.count(":")


@pytest.mark.parametrize(
    ("hx", "kind", "message"),
    [
        (zeros(2, 2, B, 5), TypeError, "of tensors or None, got Tensor"),
        ((zeros(2, B, 5),) * 3, RuntimeError, "got a tuple of 3"),
        ([zeros(2, B, 5), None], TypeError, "got a pair of Tensor and NoneType"),
        ((0.0, zeros(2, B, 5)), TypeError, "got a pair of float and Tensor"),
        ("state", TypeError, "got str"),
    ],
)
@pytest.mark.parametrize(
    "x", [zeros(T, B, 4), packed(), zeros(T, 4)], ids=lambda x: type(x).__name__
)
def test_states_of_another_kind(x: object, hx: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        LSTM(4, 5, 2)(x, hx)


def test_states_in_a_list_and_an_input_that_is_no_tensor() -> None:
    x, states = zeros(T, B, 4), [zeros(1, B, 5), zeros(1, B, 5)]
    assert LSTM(4, 5)(x, states)[0].shape == (T, B, 5)
    for layer_type in (LSTM, RelLSTM):
        with pytest.raises(TypeError, match="should be a Tensor or a PackedSequence, got list"):
            layer_type(4, 5)([[1.0]])


def test_the_good_arguments_are_good(backend: str) -> None:
    output, _ = functional.lstm(**layer(backend=backend))
    assert output.shape == (T, B, 5)


def test_mixed_devices_name_both() -> None:
    arguments = layer(input=zeros(T, B, 4, device="meta"))
    with pytest.raises(RuntimeError, match=re.escape(device_error("hidden", "hx[0]"))):
        functional.lstm(**arguments)
    arguments["hx"] = None
    with pytest.raises(RuntimeError, match=re.escape(device_error("parameter", "weight_ih"))):
        functional.lstm(**arguments)


@pytest.mark.parametrize("backend", [name for name in runnable() if name != "reference"])
def test_double_backward_of_compiled_kernels_names_the_way_out(backend: str) -> None:
    x = torch.randn(T, B, 4, requires_grad=True)
    output, _ = LSTM(4, 5, backend=backend)(x)
    (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backend=.reference. for double backward"):
        first.sum().backward()


def test_a_reset_that_is_no_tensor_is_refused_for_unbatched_input_too() -> None:
    with pytest.raises(TypeError, match="reset should be a bool Tensor, got list"):
        LSTM(1, 2)(torch.randn(3, 1), reset=[True])
