"""One call of torch's LSTM operators, and why ours does not run it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from throughtime.backends.backend import BackendName, Request, can_run
from throughtime.functional import autocast_dtype
from throughtime.functional.lstm import Weights
from throughtime.ops.autograd import recording
from throughtime.ops.precision import LOW_PRECISION, multiplies_bfloat16
from throughtime.packed import check_packed


class _Speed(NamedTuple):
    """Whether ours takes a dtype on a device, and why."""

    takes: Callable[[], bool]
    why: str


def _always() -> bool:
    return True


def _never() -> bool:
    return False


@functools.cache
def _no_float16_products() -> bool:
    """Whether torch's LSTM has no oneDNN for float16 on this processor, and is slow."""
    return not torch.ops.mkldnn._is_mkldnn_fp16_supported()


# Everything else goes to the original.
SPEEDS: dict[tuple[str, torch.dtype], _Speed] = {
    ("cpu", torch.float32): _Speed(_always, "1.1 to 4 times as fast as torch's on Zen 5"),
    ("cpu", torch.float64): _Speed(_always, "3 times as fast as torch's on Zen 5"),
    ("cpu", torch.bfloat16): _Speed(
        multiplies_bfloat16, "only a processor that multiplies bfloat16 makes ours faster"
    ),
    ("cpu", torch.float16): _Speed(  # 6 to 70 times as fast as torch's on Zen 5
        _no_float16_products, "oneDNN multiplies float16 here, the CPU kernels compute in float32"
    ),
    ("cuda", torch.bfloat16): _Speed(_always, "5 to 9 times as fast as cuDNN on an H200"),
    ("cuda", torch.float16): _Speed(_never, "cuDNN is faster at H 512 and 768 with a small batch"),
    ("cuda", torch.float32): _Speed(
        _never, "it has not been measured beside cuDNN with TF32, which torch allows it"
    ),
    ("cuda", torch.float64): _Speed(_never, "there is no CUDA kernel for float64"),
}


def why_never(request: Request) -> str | None:
    """Why ours does not run layers of this kind, or None if it does."""
    assert request.device is not None and request.dtype is not None
    device = request.device.type
    return why_slow(device, request.dtype) or can_run(device, request)


def why_slow(device: str, dtype: torch.dtype) -> str | None:
    """Why ours does not take a dtype on a device, or None if it does."""
    speed = SPEEDS.get((device, dtype))
    if speed is None:
        return f"there is no kernel for {dtype} on {device}"
    return None if speed.takes() else f"{dtype} on {device}: {speed.why}"


@dataclass
class Call:
    """What the operators are given, as the layers of ``throughtime.LSTM`` read it.

    ``input`` is ``[T, B, I]``, or the data ``[rows, I]`` of a packed sequence with ``batch_sizes``.
    """

    input: Tensor
    batch_sizes: Tensor | None
    hx: tuple[Tensor, Tensor]
    parameters: Sequence[Tensor]
    bias: bool
    num_layers: int
    dropout: float
    training: bool
    bidirectional: bool
    recompute = False

    @property
    def backend(self) -> BackendName:
        """The compiled kernels of the device."""
        return "cuda" if self.input.is_cuda else "cpu"

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def projects(self) -> bool:
        """As the operators see it: states of different sizes."""
        return self.hx[0].size(-1) != self.hx[1].size(-1)

    @property
    def steps(self) -> int:
        return self.input.size(0) if self.batch_sizes is None else self.batch_sizes.numel()

    @property
    def batch(self) -> int:
        return self.input.size(1) if self.batch_sizes is None else int(self.batch_sizes[0])

    def _weights(self, layer: int, direction: int) -> Weights:
        """The weights of one layer and direction, in the order of ``functional.lstm``."""
        count, projects = self._count, self.projects
        first = (layer * self.directions + direction) * count
        own = self.parameters[first : first + count]
        biases = (own[2], own[3]) if self.bias else (None, None)
        return (own[0], own[1], *biases, own[-1] if projects else None)

    @property
    def _count(self) -> int:
        """Weights of one layer and direction."""
        return 2 + 2 * self.bias + self.projects

    def fits(self) -> bool:
        """Whether all sizes belong together; the original has the errors for those that do not."""
        (h_0, c_0), dims = self.hx, 3 if self.batch_sizes is None else 2
        if self.input.dim() != dims or h_0.dim() != 3 or c_0.dim() != 3 or not self.input.numel():
            return False
        if self.batch_sizes is not None and not _whole(self.input, self.batch_sizes):
            return False
        stacked = self.num_layers * self.directions
        if h_0.shape[:2] != (stacked, self.batch) or c_0.shape[:2] != (stacked, self.batch):
            return False
        if len(self.parameters) != stacked * self._count:
            return False
        outputs, units = h_0.size(2), c_0.size(2)
        gates = 4 * units
        biases = ((gates,), (gates,)) if self.bias else ()
        projection = ((outputs, units),) if self.projects else ()
        inputs = self.input.size(-1)
        for layer in range(self.num_layers):
            wanted = ((gates, inputs), (gates, outputs), *biases, *projection) * self.directions
            first = layer * len(wanted)
            own = self.parameters[first : first + len(wanted)]
            if any(weight.shape != shape for weight, shape in zip(own, wanted, strict=True)):
                return False
            inputs = self.directions * outputs
        return True


def _whole(data: Tensor, batch_sizes: Tensor) -> bool:
    """Whether the parts of a packed sequence belong together."""
    try:
        check_packed("lstm", PackedSequence(data, batch_sizes))
    except RuntimeError:
        return False
    return True


def why_not(call: Call) -> str | None:
    """Why a call goes to the original, or None if ours runs it."""
    surroundings = _surroundings()
    if surroundings is not None:
        return surroundings
    input = call.input
    device, dtype, autocast = input.device, input.dtype, autocast_dtype(input)
    for x in (input, *call.hx, *call.parameters):
        keys = torch._C._dispatch_keys(x)
        if keys.raw_repr() not in _PLAIN:
            return f"a tensor that is not plain: {keys}"
        if x.device != device:
            return "tensors on several devices"
        if autocast is None and x.dtype != dtype:
            return "tensors of several dtypes"
        if autocast is not None and x.dtype not in _CAST:
            return "a dtype that autocast does not cast"
    if not call.fits():
        return "sizes that do not belong together, or are zero"
    if call.steps == 1 and not recording():
        return "one step without gradients, which torch's does faster"
    hidden, outputs = call.hx[1].size(2), call.hx[0].size(2)
    proj_size = outputs if call.projects else 0
    return why_never(Request("lstm", hidden, proj_size, device, autocast or dtype))


def _surroundings() -> str | None:
    """What torch does around the call that ours does not know, or None."""
    included = torch._C._dispatch_tls_local_include_set()
    if included.raw_repr() & ~_KNOWN_BITS:
        names = str(included).removeprefix("DispatchKeySet(").removesuffix(")").split(", ")
        unknown = ", ".join(name for name in names if name not in _KNOWN)
        return f"torch traces or transforms it ({unknown})"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return None


_CAST = (torch.float32, *LOW_PRECISION)


def _keys(*names: str) -> int:
    """A set of dispatch keys as its bits."""
    first, *others = map(torch._C._parse_dispatch_key, names)
    assert first is not None
    found = torch._C.DispatchKeySet(first)
    for key in others:
        assert key is not None
        found = found.add(key)
    return found.raw_repr()


# The keys of an ordinary tensor, and of one that inference_mode made. Subclasses, wrappers, views
# with a pending conjugation, nested, sparse and quantized tensors have others.
_PLAIN = {
    _keys(device, f"Autocast{device}", *more)
    for device in ("CPU", "CUDA")
    for more in ((f"Autograd{device}", "ADInplaceOrView"), ())
}
# What is included where nothing but eager autograd and perhaps torch.jit.trace watches.
_KNOWN = ("BackendSelect", "ADInplaceOrView", "Tracer")
_KNOWN_BITS = _keys(*_KNOWN)
