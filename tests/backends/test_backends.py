"""Which backend runs, what decides it, and what is said about the others."""

from __future__ import annotations

import logging
import threading
import warnings
from typing import Any

import pytest
import torch

import throughtime
from programs import run_python
from throughtime import LSTM, _ext, explain, functional
from throughtime.backends import NAMES, ORDER, Request, can_run, choose, selection

CPU = torch.device("cpu")
REQUEST = Request("lstm", 8, 0, CPU, torch.float32)
COMPILED = _ext.why_missing() is None
BEST = "cpu" if COMPILED else "reference"
WAY_OUT = "use backend='reference' or 'auto'"


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THROUGHTIME_BACKEND", raising=False)


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "_missing", "no kernels were built; run `pip install .`")
    monkeypatch.setattr(selection, "_warned", set())


def test_argument_before_context_before_variable_before_auto(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def source() -> str:
        return explain("lstm", hidden_size=8).source

    assert choose("auto", REQUEST) == BEST and source() == "backend='auto'"
    monkeypatch.setenv("THROUGHTIME_BACKEND", "reference")
    assert choose("auto", REQUEST) == "reference"
    assert source() == "environment variable THROUGHTIME_BACKEND=reference"
    with throughtime.backend("auto"):
        assert choose("auto", REQUEST) == BEST
    monkeypatch.setenv("THROUGHTIME_BACKEND", "cuda")
    with throughtime.backend("reference"):
        assert choose("auto", REQUEST) == "reference"
        assert source() == "throughtime.backend('reference')"
    with throughtime.backend("cuda"):
        assert choose("reference", REQUEST) == "reference"


def test_contexts_nest_and_end_with_an_exception() -> None:
    again = throughtime.backend("reference")
    with throughtime.backend("cuda"):
        with again, again:
            assert choose("auto", REQUEST) == "reference"
        with pytest.raises(RuntimeError, match=r"throughtime\.backend\('cuda'\) cannot run"):
            choose("auto", REQUEST)
    assert choose("auto", REQUEST) == BEST


def test_another_thread_keeps_its_own_choice() -> None:
    entered, leave, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with throughtime.backend("cuda"):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(10)
    seen.append(choose("auto", REQUEST))
    with throughtime.backend("reference"):
        leave.set()
        thread.join()
        seen.append(choose("auto", REQUEST))
    assert seen == [BEST, "reference"]


def test_an_explicit_choice_that_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = torch.randn(2, 1, 3), (torch.randn(4, 3), torch.randn(4, 1))

    def assert_refused(by: str, backend: Any = "auto") -> None:
        with pytest.raises(RuntimeError) as caught:
            functional.lstm(x, None, *weights, backend=backend)
        reason = f"the tensors are on cpu, not on a GPU; move them, or {way_out}"
        assert str(caught.value) == f"{by} cannot run this lstm: {reason}"

    way_out = WAY_OUT if BEST == "reference" else "use backend='cpu', 'reference' or 'auto'"
    assert_refused("backend='cuda'", "cuda")
    with throughtime.backend("cuda"):
        assert_refused("throughtime.backend('cuda')")
    monkeypatch.setenv("THROUGHTIME_BACKEND", "cuda")
    assert_refused("environment variable THROUGHTIME_BACKEND=cuda")
    without_kernels(monkeypatch)
    way_out = WAY_OUT
    assert_refused("environment variable THROUGHTIME_BACKEND=cuda")


def test_cpu_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernels(monkeypatch)
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run this lstm: no kernels were"):
        choose("cpu", REQUEST)
    lstm = LSTM(2, 3)
    for attempt in (lambda: LSTM(2, 3, backend="cpu"), lambda: setattr(lstm, "backend", "cpu")):
        with pytest.raises(RuntimeError, match="backend='cpu' cannot run this LSTM: no kernels"):
            attempt()
    assert lstm.backend == "auto"


@pytest.mark.parametrize(
    ("backend", "changed", "reason"),
    [
        ("cpu", {"device": torch.device("cuda:1")}, "the tensors are on cuda:1, not on the CPU"),
        ("cpu", {"dtype": torch.complex64}, "torch.complex64 is not supported"),
        ("triton", {"proj_size": 3}, "proj_size=3 is not supported by the Triton kernels; use"),
        ("reference", {"dtype": torch.int64}, "torch.int64 is not a floating point dtype; convert"),
        ("reference", {"device": torch.device("cuda"), "proj_size": 3}, ""),
    ],
)
def test_requirements_name_the_reason(backend: Any, changed: dict[str, Any], reason: str) -> None:
    found = can_run(backend, REQUEST._replace(**changed))
    assert found is None if not reason else str(found).startswith(reason)


def test_auto_says_so_when_nothing_can_run() -> None:
    with pytest.raises(ValueError, match=r"backend should be one of 'cuda', .*got 'auto'"):
        can_run("auto", REQUEST)
    with pytest.raises(RuntimeError, match=r"no backend can run this lstm: cuda: .*reference: "):
        choose("auto", REQUEST._replace(dtype=torch.int64))
    x, weights = torch.zeros(2, 1, 3).long(), (torch.zeros(4, 3).long(), torch.zeros(4, 1).long())
    with pytest.raises(RuntimeError, match=r"torch\.int64 is not a floating point dtype; convert"):
        functional.lstm(x, None, *weights, backend="reference")


def test_an_unknown_name_in_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = "should be one of 'auto', 'cuda', 'triton', 'cpu', 'reference', got 'gpu'"
    monkeypatch.setenv("THROUGHTIME_BACKEND", "gpu")
    with pytest.raises(ValueError, match="environment variable") as caught:
        choose("auto", REQUEST)
    assert str(caught.value) == f"environment variable THROUGHTIME_BACKEND {wanted}"
    assert ("auto", *ORDER) == NAMES


def test_auto_logs_why_it_passes_over(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="throughtime"):
        choose("auto", REQUEST._replace(device=torch.device("xpu")))
    (record,) = caplog.records
    assert record.getMessage().startswith("lstm runs on backend 'reference'; passed over: cuda: ")
    assert "cpu: the tensors are on xpu, not on the CPU" in record.getMessage()


def test_missing_kernels_warn_once_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernels(monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            LSTM(2, 3)(torch.zeros(2, 1, 2))
    assert [str(w.message) for w in caught] == [
        "throughtime runs its slow pure PyTorch lstm: no kernels were built; run `pip install .`"
    ]
    assert caught[0].filename == __file__  # the line that called the layer


@pytest.mark.parametrize("why", ["explicit", "device"])
def test_no_warning_where_kernels_would_not_help(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernels(monkeypatch)
    device = "meta" if why == "device" else "cpu"
    layer = LSTM(2, 3, device=device, backend="reference" if why == "explicit" else "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.zeros(2, 1, 2, device=device))


def test_compiled_code_warns_too(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernels(monkeypatch)
    compiled = torch.compile(LSTM(2, 3), fullgraph=True, backend="eager")
    match = "slow pure PyTorch lstm: no kernels were built"
    with pytest.warns(RuntimeWarning, match=match) as caught:
        compiled(torch.zeros(2, 1, 2))
    ours = [warning for warning in caught if "throughtime" in str(warning.message)]
    assert [warning.filename for warning in ours] == [__file__]


def test_log_level_variable() -> None:
    code = "import throughtime, torch; throughtime.LSTM(2, 3)(torch.zeros(2, 1, 2))"
    said = run_python(code, THROUGHTIME_LOG_LEVEL="debug", PYTHONWARNINGS="ignore").stderr
    assert f"throughtime DEBUG: lstm runs on backend '{BEST}'" in said
    done = run_python(code, THROUGHTIME_LOG_LEVEL="loud")
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == (
        "ValueError: environment variable THROUGHTIME_LOG_LEVEL should be one of DEBUG, INFO, "
        "WARNING, ERROR, CRITICAL, got 'loud'"
    )


def test_explain_a_module() -> None:
    table = explain(LSTM(2, 3, proj_size=1, dtype=torch.float64, device="meta"))
    assert table.request == Request("lstm", 3, 1, torch.device("meta"), torch.float64)
    assert table.chosen == "cpu" and list(table.reasons) == list(ORDER)
    first, header, _, *rows, workers = str(table).splitlines()
    assert workers.startswith("CPU workers: ")
    assert first == "lstm with hidden_size=3, proj_size=1, torch.float64 on meta, backend='auto'"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (header, *rows)]
    assert cells.pop(0) == ["backend", "can run", "chosen", "reason"]
    assert [" ".join(row[:3]) for row in cells] == [
        "cuda no ",
        "triton no ",
        "cpu yes *",
        "reference yes ",
    ]
    assert cells[0][3].startswith("proj_size=1 is not supported by the CUDA kernels")
    assert repr(table) == str(table)


def test_explain_sizes() -> None:
    table = explain("lstm", hidden_size=128, dtype=torch.bfloat16, device="cuda")
    if torch.cuda.is_available():
        assert table.chosen in ("cuda", "triton", "reference")
    else:
        assert table.chosen == "reference"
        assert str(table.reasons["triton"]).startswith(("torch sees no GPU", "Triton is not"))
    assert table.reasons["cpu"].startswith("the tensors are on cuda, not on the CPU")
    assert explain("lstm", hidden_size=8).chosen == BEST


def test_explain_follows_the_choice() -> None:
    lstm = LSTM(2, 3)
    lstm.backend = "reference"
    assert explain(lstm).chosen == "reference"
    assert explain(lstm, backend="auto").chosen == BEST
    with throughtime.backend("cuda"):
        table = explain(LSTM(2, 3))
    assert table.chosen is None
    assert str(table).endswith("The explicit choice cannot run, so a call raises RuntimeError.")
