"""How the CPU kernels divide their work: groups of rows, teams, members, blocks of units."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch

import throughtime
from cases import Shape, as_dtype, options_for, results, tensors
from throughtime import _ext
from throughtime.functional import lstm

if _ext.extension is None:
    pytest.skip("the compiled kernels are not in this installation", allow_module_level=True)
kernels: Any = _ext.extension

Shares = list[tuple[int, int]]

PASSES = ("forward", "backward")
THREADS = (1, 2, 3, 7, 8, 12, 32, 48, 64, 128)
SHAPES = list(
    itertools.product((1, 10, 784), (1, 3, 16, 100, 256), (1, 64, 2048), (8, 128, 512, 2048))
)
SPLIT = 6  # bytes of a float32 in three bfloat16 parts, which only a matrix unit multiplies
every_size = pytest.mark.parametrize("bytes_each", [2, 4, SPLIT, 8])


def plan(T: int, B: int, I: int, H: int, bytes_each: int, threads: int) -> dict[str, Any]:  # noqa: E741
    unit = bytes_each == SPLIT
    found: dict[str, Any] = kernels.lstm_plan(T, B, I, H, H, bytes_each, threads, unit)
    return found


def workers(part: dict[str, Any]) -> int:
    return int(part["teams"]) * len(part["blocks"])


def share(count: int, index: int, workers: int) -> tuple[int, int]:
    """``Share`` of csrc/common/sizes.h."""
    return count * index // workers, count * (index + 1) // workers


def panels(blocks: int, width: int, members: int) -> Shares:
    """The shares of members whose panels have ``width`` blocks."""
    shares = [share(math.ceil(blocks / width), member, members) for member in range(members)]
    return [(min(begin * width, blocks), min(end * width, blocks)) for begin, end in shares]


def covered(shares: Shares) -> list[int]:
    return [item for begin, end in shares for item in range(begin, end)]


def sizes(shares: Shares) -> list[int]:
    return [end - begin for begin, end in shares]


@every_size
def test_what_orders_sums_is_the_same_for_every_number_of_threads(bytes_each: int) -> None:
    for shape in SHAPES:
        alone = plan(*shape, bytes_each, 1)["backward"]
        for threads in THREADS:
            part = plan(*shape, bytes_each, threads)["backward"]
            assert all(part[key] == alone[key] for key in ("rows", "chunk"))


@every_size
def test_every_row_and_unit_is_computed_by_one_worker(bytes_each: int) -> None:
    for shape, threads, one in itertools.product(SHAPES, THREADS, PASSES):
        T, B, _, H = shape
        found = plan(*shape, bytes_each, threads)
        part, blocks = found[one], math.ceil(H / found["lanes"])
        groups, members = len(part["rows"]), len(part["blocks"])
        assert part["rows"] == [share(B, group, groups) for group in range(groups)]
        widths = (1,) if one == "forward" else (4, 3, 2, 1)
        assert any(part["blocks"] == panels(blocks, width, members) for width in widths)
        assert covered(part["rows"]) == list(range(B))
        assert covered(part["blocks"]) == list(range(blocks))
        assert 1 <= workers(part) <= threads and part["teams"] <= groups <= B
        assert 1 <= part["chunk"] <= T
        assert min(sizes(part["blocks"])) > 0 < min(sizes(part["rows"]))


@pytest.mark.parametrize("bytes_each", [2, SPLIT])
def test_a_matrix_unit_has_whole_tiles(bytes_each: int) -> None:
    """A tile of fewer than 16 rows costs as much: no group has fewer where the batch has more."""
    for H, B, threads in itertools.product((32, 128, 256, 600, 1200), range(1, 200), THREADS):
        found = kernels.lstm_plan(300, B, H, H, H, bytes_each, threads, True)
        for one in PASSES:
            assert min(sizes(found[one]["rows"])) >= min(B, 16), (H, B, threads, one)


def works(part: dict[str, Any]) -> list[int]:
    """Rows times blocks of units of each worker."""
    groups, teams, blocks = part["rows"], part["teams"], part["blocks"]
    return [
        sum(sizes(groups)[group] for group in range(team, len(groups), teams)) * units
        for team in range(teams)
        for units in sizes(blocks)
    ]


def balance(part: dict[str, Any]) -> float:
    """Mean work of a worker / most work of a worker."""
    return sum(works(part)) / len(works(part)) / max(works(part))


@pytest.mark.parametrize("threads", [1, 2, 5, 8, 32, 64])
@pytest.mark.parametrize(("B", "I", "H"), [(32, 1, 128), (33, 200, 200), (129, 5, 600), (1, 3, 70)])
def test_the_balance_that_is_told(B: int, I: int, H: int, threads: int) -> None:  # noqa: E741
    table = throughtime.explain(
        throughtime.LSTM(I, H, device="meta"),
        device="cpu",
        steps=100,
        batch_size=B,
        threads=threads,
    )
    split = kernels.float32_parts(100, B, I, H, H) == 3
    found = plan(100, B, I, H, SPLIT if split else 4, threads)
    pattern = r"(\w+): workers: (\d+).*\n +balance: (\d+)%.*speed-up: ([\d.]+)"
    told = re.findall(pattern, str(table))
    assert [one for one, *_ in told] == list(PASSES)
    for one, count, percent, speed_up in told:
        assert int(count) == workers(found[one])
        assert abs(float(percent) / 100 - balance(found[one])) <= 0.005
        most = sum(works(found[one])) / max(works(found[one]))
        assert 0 <= float(speed_up) <= most + 0.06
        if len(found[one]["blocks"]) == 1:  # no barrier
            assert float(speed_up) == pytest.approx(most, abs=0.06)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("B", [1, 2, 16, 33, 100, 500])
def test_rel_lstm(B: int, threads: int) -> None:
    def planned(threads: int) -> dict[str, Any]:
        found: dict[str, Any] = kernels.rel_lstm_plan(50, B, 30, 128, 64, 4, threads)
        return found

    found = planned(threads)
    layer = throughtime.RelLSTM(30, 128, attention_size=64, window_size=4, top_k=4)
    told = str(throughtime.explain(layer, steps=50, batch_size=B, threads=threads))
    for one in PASSES:
        part, members = found[one], len(found[one]["blocks"])
        groups = len(part["rows"])
        assert part["rows"] == [share(B, group, groups) for group in range(groups)]
        assert 1 <= part["teams"] <= groups and workers(part) <= threads
        assert covered(part["blocks"]) == list(range(-(-128 // found["lanes"])))
        # Members split units only where every group has a team.
        assert members == 1 or part["teams"] == groups
        if B >= 32 and members == 1:
            assert balance(part) >= 0.8
        assert f"{one}: workers: {workers(part)}" in told
        assert f"balance: {balance(part):.0%}, work per barrier: " in told
        assert (members == 1) == bool(re.search(f"{one}: .*\n.*no barrier", told))
    assert found["backward"]["rows"] == planned(1)["backward"]["rows"]
    assert max(sizes(found["forward"]["rows"])) <= -(-B // threads) or threads < 8
    if B == 1:
        assert len(found["forward"]["blocks"]) >= min(threads, 2)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("sequences", [1, 2, 3, 8, 33, 100])
def test_relevancy(sequences: int, threads: int) -> None:
    found = kernels.relevancy_plan(sequences, 4096, 64, 128, threads, True)
    assert covered([(part["begin"], part["end"]) for part in found]) == list(range(sequences))
    for part in found:
        assert 1 <= part["teams"] * part["members"] <= threads
        assert part["teams"] <= part["end"] - part["begin"]
        # Members share a sequence only where every sequence has a team.
        assert part["members"] == 1 or part["teams"] == part["end"] - part["begin"]
    assert found[-1]["members"] > 1 or sequences % threads == 0 or sequences % threads * 2 > threads
    # Short sequences, little work, and the additive score leave a sequence to one worker.
    for steps, shares in ((300, True), (4096, False)):
        alone = kernels.relevancy_plan(sequences, steps, 64, 128, threads, shares)
        assert [part["members"] for part in alone] == [1]
        assert alone[0]["teams"] == min(threads, sequences)
    assert kernels.relevancy_plan(sequences, 4, 2, 2, threads, True)[0]["teams"] == 1
    told = throughtime.explain(
        "relevancy_attention", hidden_size=64, steps=4096, batch_size=sequences, threads=threads
    )
    for part in found:
        assert f"workers: {part['teams'] * part['members']}; teams: {part['teams']} " in str(told)


BATCHES = (32, 33, 40, 48, 63, 64, 65, 97, 100, 128, 129, 200, 256, 512)
UNITS = (128, 130, 144, 160, 176, 192, 200, 224, 256, 300, 384, 400, 512, 600, 768, 1000, 2048)


def evenness(numbers: list[int]) -> float:
    return sum(numbers) / len(numbers) / max(numbers)


def test_balance_with_many_threads() -> None:
    """At least 80 % nearly everywhere; the rest has a reason each.

    Groups depend on the shape alone and may differ by a row (94 %), and units come in blocks of a
    vector, which 2, 3 or 4 members may not divide (81 %): both at once are 77 %. The backward has
    panels of up to four blocks, which belong to one member.
    """
    grid = list(itertools.product((2, 4, 8), (8, 32, 64), BATCHES, UNITS, PASSES, (False, True)))
    below = 0
    for bytes_each, threads, B, H, one, wide in grid:
        part = plan(100, B, H if wide else 1, H, bytes_each, threads)[one]
        below += balance(part) < 0.8
        rows = [sum(sizes(part["rows"][team :: part["teams"]])) for team in range(part["teams"])]
        blocks = sizes(part["blocks"])
        assert evenness(rows) * evenness(blocks) == pytest.approx(balance(part))
        assert evenness(rows) >= 0.9
        assert evenness(blocks) >= (0.8 if one == "forward" else 0.75)
    assert below < 0.02 * len(grid)


LARGE = [Shape(4, 33, 3, 200), Shape(3, 70, 50, 160), Shape(4, 37, 3, 150, 70)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", ["plain", "all-reverse"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_bits_with_many_workers(
    shape: Shape, option: str, dtype: torch.dtype, threads: None
) -> None:
    part = plan(shape.T, shape.B, shape.I, shape.H, 4, 64)["forward"]
    assert workers(part) > 32
    named = as_dtype(tensors(shape), dtype)
    options = options_for(shape)[option]
    torch.set_num_threads(1)
    alone = results(lstm, named, backend="cpu", **options)
    for count in (8, 64):
        torch.set_num_threads(count)
        together = results(lstm, named, backend="cpu", **options)
        assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_brief_walks_have_one_group_and_one_chunk() -> None:
    def backward(T: int, B: int, size: int = 256) -> tuple[int, int]:
        found = plan(T, B, size, size, 4, 2)["backward"]
        return len(found["rows"]), found["chunk"]

    for T, B in ((1, 1), (1, 64), (1, 640), (5, 64), (10, 64), (128, 5)):
        assert backward(T, B) == (1, T)
    assert backward(1, 641)[0] > 1 and backward(1, 64, 64)[0] > 1
    assert backward(20, 64, 2048) == (1, 8)  # long chunks where gradients lie in no cache


def test_sums_of_weight_gradients_have_a_bound() -> None:
    for T, B, I, H in SHAPES:  # noqa: E741
        groups = len(plan(T, B, I, H, 4, 2)["backward"]["rows"])
        assert groups == 1 or groups * 4 * 4 * H * (H + I + 1) <= 64 << 20


def test_threads_are_used_where_there_is_work() -> None:
    def backward(*shape: int, threads: int) -> tuple[int, int, int]:
        found = plan(*shape, 4, threads)["backward"]
        return len(found["rows"]), found["teams"], len(found["blocks"])

    assert backward(784, 100, 1, 128, threads=2) == (4, 2, 1)  # groups, teams, members
    assert backward(100, 16, 1024, 1024, threads=2) == (1, 1, 2)
    assert backward(10, 1, 8, 8, threads=16) == (1, 1, 1)
