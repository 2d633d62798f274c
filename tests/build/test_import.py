"""What `import throughtime` does: once, again after a purge, and by `importlib.reload`."""

from __future__ import annotations

import functools

import pytest
import torch

from programs import printed
from throughtime.constant import constant_result


def printed_without_warnings(code: str) -> str:
    return printed(code, PYTHONWARNINGS="error::UserWarning", TRITON_INTERPRET="1")


LAYERS = """
import importlib, sys
import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import throughtime

torch.set_num_threads(1)
NAMES = ("LSTM", "RelLSTM", "RelevancyAttention")

def layer(name, backend):
    torch.manual_seed(0)
    sizes = (4, 2, 3, 1) if name == "RelevancyAttention" else (4, 4)
    return getattr(throughtime, name)(*sizes, backend=backend)

def output(module, x):
    result = module(x)
    return result if isinstance(result, torch.Tensor) else result[0]

def gradient(module):
    x = torch.linspace(-1, 1, 12).view(3, 1, 4).requires_grad_()
    output(module, x).square().sum().backward()
    return x.grad

def shape(module):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return output(module, torch.empty(3, 1, 4)).shape

def loaded():
    return [name for name in sys.modules if name.partition(".")[0] == "throughtime"]

pairs = [(n, b) for n in NAMES for b in ("cpu", "triton", "reference")]
old = {pair: layer(*pair) for pair in pairs}
expected = {pair: gradient(old[pair]) for pair in pairs}
"""
CHECK = """
for pair in pairs:
    for module in (old[pair], layer(*pair)):
        assert torch.equal(gradient(module), expected[pair]), pair
        assert shape(module) == (3, 1, 4), pair
print("same")
"""


def test_layers_work_after_a_second_import_and_after_a_reload() -> None:
    purge = "for name in loaded(): del sys.modules[name]\nimport throughtime"
    reload = "for name in loaded(): importlib.reload(sys.modules[name])"
    code = "\n".join([LAYERS, purge, CHECK, reload, CHECK])
    assert printed_without_warnings(code) == "same\nsame\n"


def test_a_second_import_replaces_what_the_operators_call() -> None:
    code = """
import sys, torch, throughtime
def registered():
    functions = torch.ops.throughtime._functions
    return {f for latest in functions.values() for f in latest.values()}
before = registered()
for name in [n for n in sys.modules if n.startswith("throughtime")]: del sys.modules[name]
import throughtime
called = registered()
assert len(called) == len(before) and not called & before
print(all(f.__globals__ is vars(sys.modules[f.__module__]) for f in called))
"""
    assert printed_without_warnings(code) == "True\n"


def test_an_import_costs_at_most_a_tenth_of_a_second_and_brings_no_dynamo() -> None:
    """The cost is what comes beyond torch; a call of a layer imports no dynamo either."""
    code = """
import sys, time
import functools

import pytest
import torch
before, start = set(sys.modules), time.process_time()
import throughtime
cost = time.process_time() - start
new = {name for name in set(sys.modules) - before if name.startswith("torch.")}
for layer in (
    throughtime.LSTM(4, 4), throughtime.RelLSTM(4, 4), throughtime.RelevancyAttention(4, 2, 3, 1)
):
    result = layer(torch.ones(3, 1, 4))
    (result if isinstance(result, torch.Tensor) else result[0]).sum().backward()
assert not new and "torch._dynamo" not in sys.modules, new
print(cost)
"""
    costs: list[float] = []
    while len(costs) < 3 and min(costs, default=1.0) > 0.1:
        costs.append(float(printed_without_warnings(code)))
    assert min(costs) <= 0.1, costs


def test_the_mark_is_the_one_that_torch_makes() -> None:
    def ours() -> None: ...

    def theirs() -> None: ...

    torch.compiler.assume_constant_result(theirs)
    assert vars(constant_result(ours)) == vars(theirs) != {}


def test_the_mark_wants_a_plain_function() -> None:
    with pytest.raises(TypeError, match="plain function, got _lru_cache_wrapper"):
        constant_result(functools.cache(lambda: None))
