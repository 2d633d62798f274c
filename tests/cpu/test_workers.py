"""How many workers the CPU kernels take: threads of torch, CPUs of the process, neighbours."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import compiled
import throughtime
from throughtime import _ext, env

if _ext.extension is None:
    pytest.skip("the compiled kernels are not in this installation", allow_module_level=True)
kernels: Any = _ext.extension

V1 = "30 20 0:26 {top} /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct"
V2 = "31 20 0:27 {top} /sys/fs/cgroup rw,nosuid shared:4 master:1 - cgroup2 cgroup2 rw,nsdelegate"


def files(root: Path, groups: str, mounts: str, limits: dict[str, str]) -> float:
    """The quota that these made-up files grant; limits are paths below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/self/mountinfo").write_text(f"23 1 8:1 / / rw - ext4 /dev/root rw\n{mounts}\n")
    for name, text in limits.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return float(kernels.cgroup_quota(str(root)))


def v2(top: str = "/") -> str:
    return V2.format(top=top)


def v1(top: str = "/") -> str:
    return V1.format(top=top)


PERIOD = {"cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("groups", "mounts", "limits", "expected"),
    [
        ("0::/\n", v2(), {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", v2(), {"cpu.max": "max 100000\n"}, 0),
        ("0::/\n", v2(), {}, 0),
        ("0::/a/b\n", v2(), {"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, 2),
        ("0::/a/b\n", v2(), {"a/b/cpu.max": "max 100000", "cpu.max": "300000 100000"}, 3),
        ("0::/host/a\n", v2("/host/a"), {"cpu.max": "50000 100000"}, 0.5),
        ("0::/host/a/b\n", v2("/host/a"), {"b/cpu.max": "50000 20000"}, 2.5),
        ("0::/elsewhere\n", v2("/host/a"), {"cpu.max": "50000 100000"}, 0.5),
        (
            "4:cpu,cpuacct:/a\n0::/\n",
            v1(),
            PERIOD | {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000\n"},
            2.5,
        ),
        ("4:cpu,cpuacct:/a\n", v1(), PERIOD | {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1\n"}, 0),
        ("3:cpuset:/a\n", v1(), PERIOD | {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000\n"}, 0),
        (
            "4:cpu,cpuacct:/a/b\n0::/c\n",
            f"{v1()}\n{v2()}",
            PERIOD | {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000\n", "c/cpu.max": "600000 100000"},
            2.5,
        ),
        ("nonsense\n", "nonsense", {"cpu.max": "1 1"}, 0),
        ("0::/\n", v2(), {"cpu.max": "100000 0"}, 0),
    ],
)
def test_quota_of_control_groups(
    tmp_path: Path, groups: str, mounts: str, limits: dict[str, str], expected: float
) -> None:
    assert files(tmp_path, groups, mounts, limits) == expected


def test_no_control_groups(tmp_path: Path) -> None:
    assert kernels.cgroup_quota(str(tmp_path)) == 0


@pytest.fixture
def threads() -> Iterator[None]:
    compiled.wait()  # the compilers of other tests take CPUs too
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_no_more_workers_than_cpus(threads: None) -> None:
    torch.set_num_threads(64)
    found = kernels.workers()
    cpus = found["affinity"]
    if found["quota"]:
        cpus = min(cpus, math.ceil(found["quota"]))
    assert found["workers"] == max(1, min(64, cpus - found["taken"]))
    torch.set_num_threads(1)
    assert kernels.workers()["workers"] == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_affinity_is_looked_at_again() -> None:
    code = """
import os, torch
from throughtime import _ext
torch.set_num_threads(8)
before = _ext.extension.workers()["affinity"]
assert before == len(os.sched_getaffinity(0))
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
assert _ext.extension.workers()["affinity"] == _ext.extension.workers()["workers"] == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_thread_bound_by_openmp_is_not_the_limit() -> None:
    code = "from throughtime import _ext; print(_ext.extension.workers()['affinity'])"
    environment = os.environ | {"OMP_PROC_BIND": "true"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, env=environment, capture_output=True
    )
    assert int(done.stdout) == kernels.workers()["affinity"]


def test_a_cpu_is_left_to_others_and_taken_back(threads: None) -> None:
    cpus = kernels.workers()["affinity"]
    if cpus < 2:
        pytest.skip("one CPU: no team")
    torch.set_num_threads(cpus)
    layer, x = throughtime.LSTM(1, 128, backend="cpu"), torch.randn(300, cpus, 1)

    def until(run: Callable[[], object], seen: Callable[[int], bool]) -> bool:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            run()
            if seen(kernels.workers()["taken"]):
                return True
        return False

    spin = [
        sys.executable,
        "-c",
        "import time; end = time.time() + 30\nwhile time.time() < end: pass",
    ]
    neighbours = [subprocess.Popen(spin) for _ in range(2 * cpus)]
    try:
        assert until(lambda: layer(x), lambda taken: taken > 0)
        assert "left to other processes" in str(throughtime.explain(layer))
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    # Without a call, since the next may find that something else needs a CPU.
    assert until(lambda: time.sleep(0.15), lambda taken: taken == 0)


def test_threads_beyond_the_cpus_cost_little(threads: None) -> None:
    """50 times the time, without the limit; a busy machine makes any timing of threads vague."""
    cpus = kernels.workers()["affinity"]
    layer, x, grad = throughtime.LSTM(1, 128), torch.randn(300, 1, 1), torch.randn(300, 1, 128)
    least = {}
    for count in (cpus, 16 * cpus) * 3:
        torch.set_num_threads(count)
        for _ in range(10):
            start = time.perf_counter()
            layer(x)[0].backward(grad)
            seconds = time.perf_counter() - start
            least[count] = min(seconds, least.get(count, seconds))
    assert least[16 * cpus] < 3 * least[cpus]


def test_workers_are_told(threads: None) -> None:
    torch.set_num_threads(7)
    line = throughtime.explain("lstm", hidden_size=8, backend="cpu").workers
    assert line is not None and "torch threads: 7" in line and "CPUs: " in line
    assert line.split()[0] == str(kernels.workers()["workers"])
    assert throughtime.explain("lstm", hidden_size=8, backend="reference").workers is None
    assert "CPU workers" in env.report()
