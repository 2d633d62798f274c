"""The handle of ``accelerate``: whose turn it is, what it tells, processes, threads, foreigners."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import throughtime
from cases import random
from programs import printed, run_python
from throughtime import DetachSchedule, accelerate, explain
from throughtime.acceleration import handle as handles
from throughtime.acceleration import registration
from throughtime.acceleration.call import SPEEDS


@pytest.fixture
def lstm() -> nn.LSTM:
    return nn.LSTM(2, 3)


X = torch.zeros(4, 1, 2)


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    yield
    left = handles.innermost()
    assert left is None, left


def test_the_innermost_handle_decides(lstm: nn.LSTM) -> None:
    with accelerate() as outer:
        lstm(X)
        with accelerate(detach_prob=0.5) as inner:
            assert inner.in_force and not outer.in_force
            lstm(X)
            lstm(X)
        assert outer.in_force and not inner.in_force
        lstm(X)
    lstm(X)
    assert outer.calls == inner.calls == {"cpu kernels": 2}
    outer.calls["cpu kernels"] = 0  # a copy
    assert outer.calls == {"cpu kernels": 2}


def test_removed_twice_and_out_of_order(lstm: nn.LSTM) -> None:
    first, second = accelerate(), accelerate()
    with pytest.warns(RuntimeWarning, match="removed before 1 made after it.*remove that") as told:
        first.remove()
    assert told[0].filename == __file__
    lstm(X)
    assert second.calls == {"cpu kernels": 1} and not first.calls
    second.remove()
    second.remove()
    with pytest.raises(RuntimeError, match="this handle was removed; call accelerate again"):
        second.__enter__()


def test_what_it_prints(lstm: nn.LSTM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(SPEEDS, ("cpu", torch.float64))
    with accelerate(detach_prob=0.25) as outer, accelerate() as handle:
        assert str(outer) == (
            f"accelerate: under another in process {os.getpid()}, detach_prob=0.25"
        )
        lstm(X)
        lstm(X)
        lstm.double()(X.double())
        assert repr(handle).splitlines() == [
            f"accelerate: in force in process {os.getpid()}, detach_prob=0.0",
            "  2 calls, cpu kernels",
            "  1 calls, original: there is no kernel for torch.float64 on cpu",
        ]
    assert str(handle).startswith("accelerate: removed in process")


def test_each_kind_of_call_is_logged_once(lstm: nn.LSTM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="throughtime"), accelerate(detach_prob=0.25):
        for x in (X, X, X[:1], X):
            with torch.no_grad():
                lstm(x)
    why = "one step without gradients, which torch's does faster"
    assert [record.getMessage() for record in caplog.records] == [
        "accelerate: in force, detach_prob=0.25",
        "accelerate: a call of nn.LSTM: cpu kernels",
        f"accelerate: a call of nn.LSTM: original: {why}",
    ]


def test_explain_says_what_runs_an_nn_lstm(lstm: nn.LSTM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(SPEEDS, ("cpu", torch.float64))
    table = explain(lstm)
    assert (
        table.chosen is None
        and "torch runs it: throughtime.accelerate() is not in force" in str(table)
    )
    with accelerate() as handle:
        lstm(X)
        table = explain(lstm)
        assert table.chosen == "cpu" and "accelerate runs it on our cpu kernels" in str(table)
        assert str(handle) in str(table) and "lstm with hidden_size=3" in str(table)
        table = explain(lstm, dtype=torch.float64)
        assert table.chosen is None and "no kernel for torch.float64 on cpu" in str(table)
        table = explain(lstm, device="cuda", dtype=torch.float32)
        assert table.chosen is None and "not been measured beside cuDNN with TF32" in str(table)
        table = explain(lstm, device="cuda", dtype=torch.float16)
        assert table.chosen is None and "cuDNN is faster at H 512" in str(table)
        assert "no h-detach" not in str(table) and "a call raises" not in str(table)


def test_a_schedule_takes_the_handle() -> None:
    with accelerate(detach_prob=0.5) as handle:
        schedule = DetachSchedule(handle, 4, kind="linear")
        schedule.step()
        assert handle.detach_prob == 0.375 and schedule.get_last_value() == [0.375]


def test_every_thread_is_accelerated_and_every_call_counted() -> None:
    """On and off, beside running threads: each call is ours or the original, and never wrong."""
    lstm, x = nn.LSTM(4, 8), random(3, 2, 4, seed=1, dtype=torch.float32)
    expected, calls, stop, wrong = lstm(x)[0].detach(), [0] * 4, threading.Event(), []

    def run(k: int) -> None:
        while not stop.is_set():
            if not torch.allclose(lstm(x)[0], expected, atol=1e-5):
                wrong.append(k)
            calls[k] += 1

    with accelerate() as handle:
        threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        stop.set()
        for thread in threads:
            thread.join()
    assert min(calls) > 0 and handle.calls == {"cpu kernels": sum(calls)} and not wrong
    stop.clear()
    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        with accelerate():
            time.sleep(0.001)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_handle_does_not_leave_its_process() -> None:
    with accelerate() as handle, pytest.raises(TypeError, match="a process that is spawned calls"):
        pickle.dumps(handle)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_goes_on() -> None:
    code = """
import os, torch, throughtime
torch.set_num_threads(1)
lstm, x = torch.nn.LSTM(2, 3), torch.zeros(4, 1, 2)
handle = throughtime.accelerate()
lstm(x)
if os.fork() == 0:
    lstm(x)
    print(handle, flush=True)
    os._exit(0)
os.wait()
print(handle)
"""
    child, counted, parent, own = printed(code).splitlines()
    assert ", forked from " in child and counted == "  2 calls, cpu kernels"
    assert "forked" not in parent and own == "  1 calls, cpu kernels"


SPAWNS = """
import multiprocessing, torch, throughtime

def child():
    lstm = torch.nn.LSTM(2, 3)
    lstm(torch.zeros(4, 1, 2))
    print(throughtime.explain(lstm).chosen, flush=True)

if __name__ == "__main__":
    with throughtime.accelerate():
        process = multiprocessing.get_context("spawn").Process(target=child)
        process.start()
        process.join()
"""


@pytest.mark.parametrize(("value", "backend"), [("", "None"), ("1", "cpu")])
def test_a_spawned_process_begins_anew(tmp_path: Path, value: str, backend: str) -> None:
    program = tmp_path / "spawns.py"
    program.write_text(SPAWNS)
    environment = os.environ | {"THROUGHTIME_ACCELERATE": value}
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == [backend]


PLAIN = """
import sys, torch
lstm = torch.nn.LSTM(2, 3)
lstm(torch.zeros(4, 1, 2))[0].sum().backward()
print("throughtime" in sys.modules, "torch._dynamo" in sys.modules)
import throughtime
print(throughtime.explain(lstm).acceleration.splitlines()[-1])
"""


def test_the_variable_needs_no_line_in_the_program() -> None:
    first, last = printed(PLAIN, THROUGHTIME_ACCELERATE="1").splitlines()
    assert first == "True False" and last == "  1 calls, cpu kernels"


def test_nothing_is_replaced_without_variable_or_call() -> None:
    code = "import torch\nbefore = torch._C._dispatch_dump('aten::lstm.input')\n" + PLAIN
    code += "print(before == torch._C._dispatch_dump('aten::lstm.input'))"
    first, last, same = printed(code, THROUGHTIME_ACCELERATE="").splitlines()
    assert first == "False False" and last.startswith("torch runs it") and same == "True"
    assert "torch runs it" in printed(PLAIN, THROUGHTIME_ACCELERATE="0")


@pytest.mark.parametrize(("first", "autoload"), [("torch", "0"), ("throughtime", "1")])
def test_the_variable_with_either_import_first(first: str, autoload: str) -> None:
    code = f"import {first}, throughtime, torch\n"
    code += "print(throughtime.explain(torch.nn.LSTM(2, 3)).chosen)"
    environment = {"THROUGHTIME_ACCELERATE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    assert printed(code, **environment) == "cpu\n"


def test_a_wrong_variable_is_an_error() -> None:
    done = run_python("import torch", THROUGHTIME_ACCELERATE="yes")
    assert done.returncode != 0
    assert "THROUGHTIME_ACCELERATE should be 0 or 1, got 'yes'" in done.stderr


def test_it_survives_a_second_import_and_a_reload() -> None:
    code = """
import importlib, sys, torch, throughtime
lstm, x = torch.nn.LSTM(2, 3), torch.zeros(4, 1, 2)
old = throughtime.accelerate()
for name in [n for n in sys.modules if n.partition(".")[0] == "throughtime"]: del sys.modules[name]
import throughtime
lstm(x)
with throughtime.accelerate() as new:
    lstm(x)
lstm(x)
old.remove()
lstm(x)
print(sum(old.calls.values()), sum(new.calls.values()), throughtime.explain(lstm).chosen)
"""
    assert printed(code, PYTHONWARNINGS="error::UserWarning") == "2 1 None\n"


FOREIGN = """
import torch, warnings
from torch._C import DispatchKey
warnings.simplefilter("ignore", UserWarning)
def foreign(*args):
    return torch.ops.aten.lstm.input._op_dk(DispatchKey.CompositeImplicitAutograd, *args)
def override(how):
    if how == "library":
        global lib
        lib = torch.library.Library("aten", "IMPL")
        lib.impl("lstm.input", foreign, KEY)
    else:
        torch.library.impl("aten::lstm.input", KEY, foreign)
"""


@pytest.mark.parametrize(("how", "key"), [("library", "CPU"), ("function", "AutogradCPU")])
def test_another_library_in_the_place_is_told(how: str, key: str) -> None:
    before = f"""
KEY = {key!r}
override({how!r})
import throughtime
try:
    throughtime.accelerate()
except RuntimeError as error:
    print(error)
print(throughtime.explain(torch.nn.LSTM(2, 3)).chosen)
"""
    told, chosen = printed(FOREIGN + before).splitlines()
    assert f"another implementation of aten::lstm.input was registered for {key} at " in told
    assert "use throughtime.replace(model)" in told and chosen == "None"
    after = f"""
KEY = {key!r}
import throughtime
handle = throughtime.accelerate()
try:
    override({how!r})
except RuntimeError as error:  # torch 2.10, for a key that ours has
    raise SystemExit(f"torch refuses: {{error}}")
print(throughtime.explain(torch.nn.LSTM(2, 3)).acceleration.splitlines()[0])
print(str(handle).splitlines()[-1])
warnings.simplefilter("error", RuntimeWarning)
try:
    handle.remove()
except RuntimeWarning as warning:
    print(warning)
"""
    done = run_python(FOREIGN + after)
    if "torch refuses: This is not allowed since there's already a kernel" in done.stderr:
        return
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("another implementation of" in line for line in lines)
    assert lines[0].startswith("torch runs it: ") and "not every call came" in lines[2]


def test_a_torch_without_the_hooks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_dispatch_keys")
    with pytest.raises(RuntimeError, match=r"has no torch\._C\._dispatch_keys; use throughtime\.r"):
        accelerate()
    monkeypatch.setattr(registration, "_HOOKS", ("_dynamo.nothing.here",))
    with pytest.raises(RuntimeError, match=r"has no torch\._C\._dynamo\.nothing\.here"):
        accelerate()


def test_without_compiled_kernels_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughtime._ext, "_missing", "they were left out")
    monkeypatch.setattr(throughtime._ext, "_missing_cuda", "they were left out")
    with pytest.raises(RuntimeError, match="accelerate: they were left out"):
        accelerate()


def test_it_imports_no_dynamo(lstm: nn.LSTM) -> None:
    code = """
import sys, torch, throughtime
before = {name for name in sys.modules if name.startswith("torch.")}
with throughtime.accelerate():
    torch.nn.LSTM(2, 3)(torch.zeros(4, 1, 2))[0].sum().backward()
print({name for name in sys.modules if name.startswith("torch.")} - before)
"""
    assert printed(code) == "set()\n"


def test_it_warns_of_nothing() -> None:
    assert printed("import throughtime; throughtime.accelerate()", PYTHONWARNINGS="error") == ""
