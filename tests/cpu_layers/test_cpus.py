"""What a region tells of the CPUs that its workers had, and how many workers the next ones get."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
import torch

import compiled

MS = 1_000_000  # nanoseconds


class Machine:
    """A machine in made-up time; all times are in milliseconds."""

    def __init__(self, layer: Any, cpus: int) -> None:
        self.layer = layer
        self.cpus = cpus
        layer("machine", cpus)
        if self.usable() != cpus:
            pytest.skip("a quota of control groups")

    def usable(self) -> int:
        return int(self.layer("usable"))

    def rest(self, time: float) -> None:
        self.layer("pass", round(time * MS))

    def region(
        self,
        workers: int,
        length: float,
        *,
        late: dict[int, float] | None = None,
        off: dict[int, float] | None = None,
        asleep: dict[int, float] | None = None,
        launch: float = 0,
    ) -> int:
        """Returns how many workers regions may have afterwards; the dictionaries are by worker."""
        times = [torch.zeros(workers, dtype=torch.int64) for _ in range(3)]
        for row, given in zip(times, (late, off, asleep), strict=True):
            for worker, each in (given or {}).items():
                row[worker] = round(each * MS)
        self.layer("region", workers, round(length * MS), round(launch * MS), *times)
        return self.usable()

    def crowded(self, workers: int, others: int, length: float = 10) -> int:
        """Other threads that never rest share all CPUs fairly with the workers."""
        share = max(0, 1 - self.cpus / (workers + others))
        return self.region(workers, length, off=dict.fromkeys(range(workers), share * length))


@pytest.mark.parametrize("cpus", [2, 3, 16, 128])
def test_sleep_at_a_barrier_is_no_lack(layer: Any, cpus: int) -> None:
    asleep = dict.fromkeys(range(1, cpus), 9.0)
    assert Machine(layer, cpus).region(cpus, 10, off=asleep, asleep=asleep) == cpus


def test_a_lack_beside_sleep_is_one(layer: Any) -> None:
    assert Machine(layer, 4).region(4, 10, off={1: 9}, asleep={1: 6}) == 3


def test_time_to_start_threads_is_no_lack(layer: Any) -> None:
    """Each begins as soon as it is started, all before the thread that starts them."""
    machine = Machine(layer, 16)
    late = {worker: 0.06 * (worker - 16) for worker in range(1, 16)}
    assert machine.region(16, 2, launch=0.96, late=late) == 16
    assert machine.region(16, 2, launch=0.96, late=late | {15: 0.6}) == 15  # it had no CPU


@pytest.mark.parametrize(
    ("length", "off", "lacking"),
    [(10, 2.4, 0), (10, 2.6, 1), (0.5, 0.19, 0), (0.5, 0.21, 1)],
    ids=["less than a quarter", "a quarter", "as long as a thread wakes", "longer"],
)
def test_what_is_a_lack(layer: Any, length: float, off: float, lacking: int) -> None:
    assert Machine(layer, 8).region(8, length, off={3: off}) == 8 - lacking


def test_as_many_fewer_as_cpus_were_lacking(layer: Any) -> None:
    machine = Machine(layer, 128)
    assert machine.region(128, 10, off=dict.fromkeys(range(32), 5.0)) == 112
    assert machine.region(112, 10, off=dict.fromkeys(range(112), 9.99)) == 1


def test_a_region_of_more_workers_than_there_may_be_tells_nothing(layer: Any) -> None:
    """Regions of one call all have the workers that there were when it began."""
    machine = Machine(layer, 16)
    for _ in range(5):
        assert machine.crowded(16, others=8) == 11


def test_a_region_of_few_workers_takes_the_rest_no_lower_than_it_had(layer: Any) -> None:
    machine = Machine(layer, 16)
    usable = [machine.region(4, 10, off={2: 5}) for _ in range(20)]
    assert usable == [*range(15, 3, -1), *[3] * 8]


@pytest.mark.parametrize("cpus", [2, 3, 8, 16, 64, 128])
def test_workers_and_other_threads_come_to_have_a_cpu_each(layer: Any, cpus: int) -> None:
    for others in {1, cpus // 2, cpus - 1, cpus, 4 * cpus}:
        machine = Machine(layer, cpus)
        for _ in range(9):
            before = machine.usable()
            if before == 1:
                break
            had = before * min(1, cpus / (before + others))
            assert before >= machine.crowded(before, others) >= int(had)
        # At most a quarter of a CPU is lacking.
        assert machine.usable() == 1 or machine.usable() + others <= cpus * 4 / 3
        assert machine.usable() >= cpus - others


def test_cpus_are_tried_again(layer: Any) -> None:
    machine = Machine(layer, 128)
    machine.region(128, 10, off=dict.fromkeys(range(120), 10.0))
    assert machine.usable() == 8
    machine.rest(99)
    assert machine.usable() == 8
    usable = []
    for _ in range(7):
        machine.rest(101)
        usable.append(machine.usable())
    assert usable == [9, 11, 15, 23, 39, 71, 128]


def test_a_lack_makes_the_next_trial_a_small_one_again(layer: Any) -> None:
    machine = Machine(layer, 128)
    machine.region(128, 10, off=dict.fromkeys(range(120), 10.0))
    for usable in (9, 11, 15):
        machine.rest(101)
        assert machine.usable() == usable
    assert machine.region(15, 10, off=dict.fromkeys(range(7), 10.0)) == 8
    machine.rest(99)
    assert machine.region(8, 10) == 9
    assert machine.region(9, 200, off={0: 200}) == 8
    assert machine.region(8, 200, off={0: 200}) == 7  # it began before the next trial


def two_real_workers(layer: Any, share: float, steps: int, *, same_cpu: bool) -> tuple[bool, int]:
    """Whether a worker is left out then, and the nanoseconds that one lacked a CPU."""
    machine = Machine(layer, 2)
    work = torch.tensor([MS, int(share * MS)])
    lacked = layer("real_region", work, steps, same_cpu)
    return machine.usable() < 2, lacked


@pytest.mark.parametrize("share", [1, 0.5, 0.1])
def test_uneven_work_is_no_lack(layer: Any, share: float) -> None:
    """Only regions count in which both threads had their CPU all the time."""
    compiled.wait()
    counted, end = 0, time.monotonic() + 20
    while counted < 5 and time.monotonic() < end:
        fewer, lacked = two_real_workers(layer, share, 1, same_cpu=False)
        if lacked < 0.1 * MS:
            counted += 1
            assert not fewer
    if not counted:
        pytest.skip("other programs took CPUs from every region")


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="threads cannot be bound to a CPU")


@ON_LINUX
@pytest.mark.parametrize("share", [1, 0.5])
def test_two_threads_on_one_cpu_lack_one(layer: Any, share: float) -> None:
    assert any(two_real_workers(layer, share, 20, same_cpu=True)[0] for _ in range(5))


@ON_LINUX
def test_after_a_sleep_a_thread_wants_its_cpu(layer: Any) -> None:
    """What is no sleep of a thread that never blocks otherwise is what the system tells."""
    times = torch.zeros(2, dtype=torch.int64)
    layer("sleep_beside", 300 * MS, times)
    lacked, queued = times.tolist()
    if queued < MS:
        pytest.skip("the sleeper came first, or this system does not tell")
    assert abs(lacked - queued) < queued / 4
