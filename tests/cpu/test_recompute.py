"""What ``recompute`` saves, and that gradients keep their bits, for each instruction set."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import LOW_PRECISION, OPTIONS, Shape, call, options_for, results, tensors
from closeness import rms
from throughtime import LSTM, functional
from throughtime.ops.precision import multiplies_bfloat16

run = partial(functional.lstm, backend="cpu")
again = partial(run, recompute=True)

# One chunk and several; x inside the step's product, and in one of its own; one step, unpacked.
SHAPES = (Shape(7, 3, 5, 17), Shape(40, 5, 60, 33), Shape(9, 70, 49, 24, 5), Shape(130, 1, 2, 70))
SHAPES += (Shape(1, 8, 60, 260),)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_keep_their_bits(isa: str, name: str, shape: Shape, threads: int) -> None:
    options = options_for(shape)[name]
    torch.set_num_threads(threads)
    try:
        for dtype in (torch.float32, torch.float64):
            named = tensors(shape, dtype)
            one, other = results(run, named, **options), results(again, named, **options)
            assert all(torch.equal(x, other[key]) for key, x in one.items())
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_16_bits(dtype: torch.dtype) -> None:
    """bfloat16 kernels round the gates that they save."""
    named = tensors(SHAPES[1], dtype)
    one, other = results(run, named), results(again, named)
    assert all(rms(other[key], x.double()) <= 5e-3 for key, x in one.items())


def saved_bytes(function: Any, named: dict[str, Tensor], **options: Any) -> int:
    """What autograd keeps beside the arguments and the output."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output, _ = call(function, named, **options)
    for x in (*named.values(), output):
        kept.pop(x.data_ptr(), None)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_c_alone_is_saved(isa: str, dtype: torch.dtype) -> None:
    """Of i, f, g, o, c; kernels that multiply bfloat16 save 12 bytes of them."""
    shape = Shape(30, 4, 3, 32)
    named = tensors(shape, dtype, bias=False)
    spared = saved_bytes(run, named) - saved_bytes(again, named)
    of_a_unit = 32 if dtype == torch.float64 else 16
    if dtype == torch.bfloat16 and multiplies_bfloat16():
        of_a_unit = 8
    assert spared == of_a_unit * shape.T * shape.B * shape.H


def test_the_layer_passes_it_on() -> None:
    layer = LSTM(3, 4, num_layers=2, bidirectional=True, recompute=True)
    assert "recompute=True" in repr(layer) and layer.recompute
    assert LSTM.from_torch(torch.nn.LSTM(3, 4), recompute=True).recompute
    plain = LSTM(3, 4, num_layers=2, bidirectional=True)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(50, 2, 3)
    for backend in ("cpu", "reference"):
        layer.backend = plain.backend = backend
        kept = [saved_bytes(lambda x, *_, of: of(x), {"input": x}, of=of) for of in (layer, plain)]
        assert kept[0] < kept[1] / 2
        grads = []
        for each in (layer, plain):
            each.zero_grad()
            each(x)[0].square().sum().backward()
            grads.append([p.grad for p in each.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with pytest.raises(TypeError, match="recompute should be of type bool"):
        LSTM(3, 4, recompute=1)
