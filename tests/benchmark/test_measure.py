"""Measuring: verification refuses what is wrong, contestants alternate, rows say what happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from bench import machine, table
from bench.measure import engine, gpu, memory, timing, verify
from bench.measure.engine import Bench
from bench.measure.timing import Plan
from bench.measure.verify import Errors, Verifier
from bench.operations import OPERATIONS, authors_rel_lstm, lstm_peers, relevancy
from bench.operations.operation import OURS, REFERENCE, Case, Contestant
from torch import Tensor

import throughtime

LSTM, REL_LSTM, RELEVANCY = OPERATIONS.values()
TINY = LSTM.case(T=6, B=3, I=2, H=5, p=0.0)
REL_TINY = REL_LSTM.case(T=9, B=2, I=2, H=5, window_size=3, top_k=2, p=0.0)
RELEVANCY_TINY = RELEVANCY.case(T=9, B=1, heads=1, D=4, window_size=3, top_k=2)
OUR_CPU = Contestant(OURS, "cpu")

# Timing


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a run take as many seconds as it returns."""

    def timed(run: Callable[[], Any], repeats: int) -> float:
        return sum(run() for _ in range(repeats))

    monkeypatch.setattr(timing, "_time", timed)


@pytest.mark.usefixtures("clock")
def test_contestants_alternate_and_rotate() -> None:
    order: list[str] = []

    def run(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    runs = {"a": lambda: run("a", 0.4), "b": lambda: run("b", 0.5)}
    samples = timing.alternate(runs, Plan(3, 0))
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"  # one warm-up, then three rounds
    assert samples["a"].tolist() == [0.4] * 3 and samples["b"].tolist() == [0.5] * 3


@pytest.mark.usefixtures("clock")
def test_each_takes_part_often_enough_and_long_enough() -> None:
    samples = timing.alternate({"fast": lambda: 0.1, "slow": lambda: 0.5}, Plan(5, 1.05))
    assert samples.count().to_dict() == {"fast": 11, "slow": 5}
    assert samples["slow"].notna().tolist() == [True] * 5 + [False] * 6


@pytest.mark.usefixtures("clock")
def test_short_runs_are_repeated_within_a_sample() -> None:
    count = 0

    def run() -> float:
        nonlocal count
        count += 1
        return 0.0005

    samples = timing.alternate({"a": run}, Plan(2, 0))
    assert count == 4 + 2 * 40
    assert samples["a"].tolist() == pytest.approx([0.0005] * 2)


def test_roofs_are_a_product_and_a_copy() -> None:
    roofs = timing.roofs(torch.float64, "cpu")
    assert [work for _, work in roofs.values()] == [2 * 64**3, 2 * 2**20]
    product: Any = roofs["matmul"][0]()
    copied: Any = roofs["copy"][0]()
    assert product.shape == (64, 64) and product.dtype == torch.float64
    assert copied.nbytes == 2**20  # read, and written


@pytest.mark.parametrize("multiplies", [False, True])
def test_the_roof_of_16_bits_on_a_cpu(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 has one of its own where the kernels multiply it, float16 never."""
    monkeypatch.setattr(timing, "multiplies_bfloat16", lambda: multiplies)
    kernels = SimpleNamespace(multiply_adds=lambda repeats, parts: 7 * repeats * parts)
    monkeypatch.setattr(timing._ext, "extension", kernels)
    (run, work), (half, _) = (
        timing.roofs(dtype, "cpu")["matmul"] for dtype in (torch.bfloat16, torch.float16)
    )
    made: Any = half()
    assert made.dtype == torch.float32
    found: Any = run()
    if multiplies:
        assert found == work / 2 == 7 * timing.TILE_REPEATS
    else:
        assert found.dtype == torch.float32 and work == 2 * 64**3


# Verification


def check(impl: Contestant, p: float, dtype: str = "float32") -> Errors:
    return Verifier(LSTM).check(impl, replace(TINY, p=p, dtype=dtype))


@pytest.mark.parametrize("impl", [OUR_CPU, REFERENCE, Contestant("loop")])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_right_results_pass(impl: Contestant, p: float) -> None:
    errors = check(impl, p)
    values = {"output", "h_n", "c_n", "inference", "d input"}
    weights = {f"d {kind}_{of}" for kind in ("weight", "bias") for of in ("ih", "hh")}
    assert errors.passed and set(errors.relative) == values | weights
    assert 0 < errors.largest < errors.limit < 1e-4 and errors.rms_limit == torch.inf
    assert errors.rms.keys() == errors.relative.keys() and 0 < errors.largest_rms < errors.limit
    assert check(OUR_CPU, p, "float64").limit < 1e-13


LOW = ["bfloat16", "float16", "autocast"]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_ours_has_at_most_the_error_of_nn_lstm_in_16_bits(
    dtype: str, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies between that and the limit of the largest error fails."""
    errors = check(OUR_CPU, p, dtype)
    assert errors.passed and errors.largest_rms <= errors.rms_limit < errors.limit
    assert check(Contestant("torch"), 0.0, dtype).rms_limit == torch.inf
    right = throughtime.LSTM.forward

    def wrong(self: Any, *args: Any, **options: Any) -> Any:
        output, state = right(self, *args, **options)
        worse = self.backend == "cpu" and output.dtype != torch.float64
        return output * (1 + 1.5 * errors.rms_limit if worse else 1), state

    monkeypatch.setattr(throughtime.LSTM, "forward", wrong)
    worse = check(OUR_CPU, p, dtype)
    assert worse.largest <= worse.limit and not worse.passed
    assert str(worse).startswith("root mean square error of ")


@pytest.mark.parametrize("dtype", LOW)
def test_a_missing_mask_is_seen_in_16_bits(dtype: str) -> None:
    """nn.LSTM has none: its gradients of p = 0.5 are wrong by 9 %."""
    assert check(OUR_CPU, 0.5, dtype).passed
    assert check(Contestant("torch"), 0.0, dtype).passed
    assert not check(Contestant("torch"), 0.5, dtype).passed


def test_a_single_step_has_gradients_of_zero() -> None:
    """That of the recurrent weights; 0 / 0 is no error."""
    assert Verifier(LSTM).check(OUR_CPU, replace(TINY, T=1)).passed
    assert verify.relative_errors({"x": torch.ones(1)}, {"x": torch.zeros(1)}) == {"x": torch.inf}


def test_errors_by_hand() -> None:
    got, wanted = {"x": torch.tensor([3.0, 5.0, 7.0])}, {"x": torch.tensor([4.0, 5.0, 10.0])}
    assert verify.relative_errors(got, wanted) == {"x": pytest.approx(0.3)}
    rms = verify.relative_errors(got, wanted, verify.rms)
    assert rms == {"x": pytest.approx((10 / 141) ** 0.5)}


@pytest.mark.parametrize("fault", ["output", "c_n", "gradient", "inference", "nan", "mask"])
def test_a_fault_of_a_thousandth_fails(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    right = throughtime.LSTM.forward

    def wrong(self: Any, input: Tensor, *, detach_mask: Tensor | None = None) -> Any:
        if self.backend == "reference":
            return right(self, input, detach_mask=detach_mask)
        mask = None if fault == "mask" else detach_mask
        output, (h_n, c_n) = right(self, input, detach_mask=mask)
        changed = fault == "output" or (fault == "inference" and not torch.is_grad_enabled())
        if fault == "gradient":
            output = output * 1.001 - (output * 0.001).detach()
        output = output * (float("nan") if fault == "nan" else 1.001 if changed else 1)
        return output, (h_n, c_n * (1.001 if fault == "c_n" else 1))

    monkeypatch.setattr(throughtime.LSTM, "forward", wrong)
    assert not check(OUR_CPU, 0.5).passed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_loop_fails_and_widens_no_limit(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its retained set is left empty: only steps after the window show that."""
    case = replace(REL_TINY, dtype=dtype)
    right = Verifier(REL_LSTM).check(Contestant("loop"), case)
    assert right.passed
    monkeypatch.setattr(authors_rel_lstm.AuthorsRelLSTM, "_retain", lambda *arguments: None)
    wrong = Verifier(REL_LSTM).check(Contestant("loop"), case)
    assert not wrong.passed and wrong.limit <= right.limit


def test_a_peer_in_speed_only_is_judged_by_itself() -> None:
    errors = Verifier(RELEVANCY).check(Contestant("sdpa"), RELEVANCY_TINY)
    assert 0 < errors.largest < 1e-5 and errors.limit == torch.inf


# The engine


def make(**options: Any) -> Bench:
    return Bench(LSTM, **{"memory": False, "plan": Plan(1, 0), **options})


def test_float32_is_measured_as_exactly_as_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's switch stays for all of a case: forward, backward, verification."""
    seen = []

    def measure(bench: Bench, case: Case) -> list[dict[str, Any]]:
        precision = torch.get_float32_matmul_precision()
        seen.append((case.dtype, precision, torch.backends.cudnn.allow_tf32, case.rounding))
        return []

    monkeypatch.setattr(Bench, "_measure", measure)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    make(dtypes=["float32-high", "float32", "float32-medium", "bfloat16"]).rows([TINY])
    assert seen == [
        ("float32-high", "high", True, 2**-16),
        ("float32", "highest", False, torch.finfo(torch.float32).eps),
        ("float32-medium", "medium", True, 2**-7),
        ("bfloat16", "highest", False, torch.finfo(torch.bfloat16).eps),
    ]
    assert torch.get_float32_matmul_precision() == before and torch.backends.cudnn.allow_tf32
    on_gpu = [
        replace(TINY, dtype=dtype, device="cuda").rounding for dtype in ("float32-high", "float32")
    ]
    assert on_gpu == [2**-11, torch.finfo(torch.float32).eps]


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two rounds of fixed seconds: ours 1 and 2, the reference 6, nn.LSTM 3, the loop 4 once."""
    seconds = {"cpu": (1.0, 2.0), "reference": (6.0, 6.0), "torch": (3.0, 3.0)}
    seconds |= {"loop": (4.0, float("nan")), "matmul": (1.0, 1.0), "copy": (1.0, 1.0)}
    timed: list[str] = []

    def alternate(runs: dict[Any, Any], plan: Plan, timer: object) -> pd.DataFrame:
        timed.append(" ".join(map(str, runs)))
        names = {key: getattr(key, "backend", None) or getattr(key, "impl", key) for key in runs}
        return pd.DataFrame({key: seconds[name] for key, name in names.items()})

    monkeypatch.setattr(timing, "alternate", alternate)
    return timed


def by_name(found: pd.DataFrame, p: float = 0.0) -> dict[str, Any]:
    return {table.contestant(row): row for row in found[found["p"] == p].itertuples()}


@pytest.mark.usefixtures("times")
def test_ratios_by_hand() -> None:
    rows = by_name(make(backends=["cpu", "reference"], peers=["torch", "loop"]).rows([TINY]))
    ours, reference = rows["throughtime (cpu)"], rows["throughtime (reference)"]
    assert (ours.median_ms, ours.q1_ms, ours.q3_ms, ours.runs) == (1500, 1250, 1750, 2)
    assert (ours.ratio, ours.ratio_q1, ours.ratio_q3) == (1, 1, 1)
    assert ours.reference_ratio == 4.5  # 6 / 1 and 6 / 2
    assert ours.best_peer_ratio == 2.25  # nn.LSTM: 3 / 1 and 3 / 2
    assert (reference.ratio, reference.best_peer_ratio) == (4.5, 0.5)
    assert rows["torch"].ratio == 2.25 and rows["torch"].reference_ratio == 2
    assert (rows["loop"].ratio, rows["loop"].runs) == (4, 1), "of the common rounds"
    assert pd.isna(rows["loop"].best_peer_ratio)
    assert ours.gflops == pytest.approx(LSTM.gflop(OURS, TINY) / 1.5)
    assert ours.share_of_matmul == pytest.approx(ours.gflops / (2e-9 * 64**3))
    assert ours.gbs == pytest.approx(LSTM.gbyte(OURS, TINY) / 1.5)
    assert ours.share_of_bandwidth == pytest.approx(ours.gbs / (2e-9 * 2**20))
    assert ours.us_per_query == pytest.approx(1.5e6 / 18)


def test_a_peer_without_h_detach_is_timed_at_p_0_beside_every_p(times: list[str]) -> None:
    bench = make(ps=[0.0, 0.5], modes=["forward+backward", "inference"], input_grad=True)
    rows = bench.rows([TINY])
    assert times == ["throughtime (cpu) torch matmul copy"] * 3
    assert rows["p"].tolist() == [0, 0, 0.5, 0.5, 0, 0]
    assert rows["mode"].tolist() == ["forward+backward"] * 4 + ["inference"] * 2
    one, other = (by_name(rows[:4], p)["torch"] for p in (0.0, 0.5))
    remark = "with the gradient of the input"
    assert (one.note, other.note) == (remark, f"no h-detach: timed at p = 0; {remark}")
    assert one.gflops == other.gflops
    ours = [by_name(rows[:4], p)["throughtime (cpu)"].gflops for p in (0.0, 0.5)]
    assert ours[1] < ours[0], "a detached step is spared a product"


@pytest.mark.usefixtures("times")
def test_what_auto_chooses_takes_part_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make(backends=["auto", "cpu", "reference"], peers=[]).rows([TINY])
    assert rows["backend"].tolist() == ["cpu", "reference"]
    monkeypatch.setenv("THROUGHTIME_BACKEND", "reference")
    assert make(peers=[]).rows([TINY])["backend"].tolist() == ["reference"]


@pytest.mark.usefixtures("times")
def test_what_cannot_run_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(lstm_peers.shutil, "which", lambda name: None)
    bench = make(backends=["triton", "cpu"], peers=["torch", "compiled-loop"])
    triton, cpu, torch_, compiled = bench.rows([TINY]).itertuples()
    assert pd.isna(triton.median_ms) and "Triton needs a GPU" in triton.note
    assert (cpu.ratio, torch_.ratio) == (1, 2.25), "ours is the first that can run"
    assert compiled.note == "torch.compile needs a C++ compiler, and there is no c++ here"
    assert pd.isna(compiled.median_ms) and not bench.red
    if not torch.cuda.is_available():
        rows = make(devices=["cuda"]).rows([TINY])
        assert rows["note"].str.startswith("cannot run: torch ").all()


@pytest.mark.parametrize("layer", [lstm_peers.LoopLSTM, throughtime.LSTM])
@pytest.mark.parametrize("length", [16, 40], ids=["verification", "full size"])
def test_what_fails_is_a_row_with_the_reason(
    layer: type[throughtime.LSTM], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a peer; ours is red too."""
    right = layer.forward

    def forward(self: Any, input: Tensor, **options: Any) -> Any:
        if input.size(0) == length and type(self) is layer and self.backend != "reference":
            raise RuntimeError("no primitive\nfor this")
        return right(self, input, **options)

    monkeypatch.setattr(layer, "forward", forward)
    bench = make(peers=["loop", "torch"])
    rows = by_name(bench.rows([replace(TINY, T=40)]))
    ours = layer is throughtime.LSTM
    failed = rows.pop("throughtime (cpu)" if ours else "loop")
    assert failed.note == "cannot run: no primitive" and pd.isna(failed.median_ms)
    assert all(row.median_ms > 0 for row in rows.values()) and bench.red == ours


def test_no_speed_for_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_mask(self: Any, input: Tensor, *, detach_mask: Tensor | None = None) -> Any:
        return right(self, input, detach_mask=None if self.backend == "cpu" else detach_mask)

    right = throughtime.LSTM.forward
    monkeypatch.setattr("throughtime.LSTM.forward", without_mask)  # right at p = 0
    bench = make(ps=[0.0, 0.5])
    rows = bench.rows([TINY])
    assert bench.red and by_name(rows)["throughtime (cpu)"].median_ms > 0
    wrong, torch_ = by_name(rows, 0.5).values()
    assert pd.isna(wrong.median_ms) and pd.isna(wrong.error)
    assert wrong.note.startswith("WRONG RESULTS, no speed reported: error of d ")
    assert torch_.median_ms > 0 and pd.isna(torch_.ratio), (
        "there is nothing of ours to compare with"
    )


def test_a_wrong_choice_of_keys_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = relevancy.attend

    def wrong(contestant: Contestant, *rest: Any) -> dict[str, Tensor]:
        found = right(contestant, *rest)
        return {**found, "last": found["last"] + 8} if contestant == OUR_CPU else found

    monkeypatch.setattr(relevancy, "attend", wrong)
    bench = Bench(RELEVANCY, backends=["cpu", "reference"], peers=["sdpa"], memory=False,
                  plan=Plan(1, 0))  # fmt: skip
    ours, reference, sdpa = bench.rows([RELEVANCY_TINY]).itertuples()
    assert ours.note.startswith("WRONG RESULTS, no speed reported: error of last") and bench.red
    assert reference.ratio == 1 and sdpa.note == engine.OTHER_FUNCTION and pd.isna(sdpa.p)


@pytest.mark.usefixtures("times")
def test_memory_is_that_of_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def peak_mb(contestant: Contestant, case: Any) -> float:
        asked.append(f"{contestant}, {case.p:g}")
        return float(len(asked))

    monkeypatch.setattr(memory, "peak_mb", peak_mb)
    rows = make(memory=True, ps=[0.5]).rows([TINY])
    assert asked == ["throughtime (cpu), 0.5", "torch, 0"] and rows["peak_mb"].tolist() == [1, 2]


# Memory, machine, and what can be tested of a GPU without one


def test_peak_memory_sees_what_is_saved_for_backward() -> None:
    case = LSTM.case(T=200, B=64, I=64, H=128, p=0.0)
    outputs_mb = 200 * 64 * 128 * 4 / 2**20
    training, inference = (
        memory.peak_mb(Contestant("torch"), replace(case, mode=mode))
        for mode in ("forward+backward", "inference")
    )
    assert training is not None and inference is not None
    assert outputs_mb < inference < training and 4 * outputs_mb < training < 60 * outputs_mb
    # Quadratic attention at T = 4096 would hold 64 MB of weights per head.
    long = RELEVANCY.case(T=16384, B=1, heads=1, D=32, window_size=16, top_k=16)
    peak = memory.peak_mb(OUR_CPU, long)
    assert peak is not None and 0 < peak < 40  # inputs, outputs and gradients are about 18 MB


def test_a_failed_memory_process_gives_none() -> None:
    assert memory.peak_mb(Contestant(OURS, "cuda"), TINY) is None  # it cannot run on a CPU


def test_header_names_what_a_reader_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (1.5, 0.0, 0.0))
    *lines, warning = machine.header()
    for word in (machine.cpu_model(), f"torch {torch.__version__}", throughtime.__version__):
        assert word in "\n".join(lines)
    assert "load average 1.5 on 2 cores" in warning
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (0.9, 0.0, 0.0))
    assert machine.header()[-1].startswith("torch ")
    monkeypatch.setattr(machine, "cpu_model", lambda: "(R) Xeon(R) @ 2.1GHz")
    assert machine.slug() == "r-xeon-r-2-1ghz-2core"


class FakeEvent:
    """Counts milliseconds: every recorded event is 3 later than the one before."""

    now = 0.0

    def __init__(self, device: str, enable_timing: bool) -> None:
        assert device == "cuda" and enable_timing

    def record(self) -> None:
        FakeEvent.now += 3
        self.at = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def test_every_run_on_a_gpu_is_timed_after_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Buffer:
        def zero_(self) -> None:
            order.append("flush")

    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: Buffer())
    monkeypatch.setattr(torch, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    seconds = gpu.EventTimer()(lambda: order.append("run"), 3)
    assert order == ["flush", "run"] * 3 + ["wait"]
    assert seconds == pytest.approx(3 * 3e-3)


@pytest.mark.parametrize(
    ("number", "text"),
    [(91_300, "cuDNN 9.13.0"), (91_002, "cuDNN 9.10.2: measure"), (8902, "cuDNN 8.9.2: measure")],
)
def test_an_old_cudnn_is_told(number: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    told = gpu.cudnn()
    assert told.startswith(text) and ("measure" in told) == ("measure" in text)
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    assert told in machine.header("cuda") and told not in machine.header()


def test_a_gpu_is_named_before_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    assert machine.name("cuda").startswith("A GPU; ") and machine.name() in machine.name("cuda")
