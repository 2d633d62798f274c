"""How the compiled CPU kernels divide a layer on threads: their ``plan.h`` in words."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from throughtime import _ext
from throughtime.backends.backend import Work
from throughtime.ops.precision import multiplies_bfloat16

_ASSUMED_BARRIER = 25e-9  # seconds for each member: two workers of a Zen 5
_MULTIPLY_ADDS, _MEETINGS, _ATTEMPTS = 2_000, 10_000, 20

Shares = list[tuple[int, int]]  # [begin, end) each


class Partition(NamedTuple):
    """Which rows and units each worker computes in one pass.

    Attributes:
        rows: those of each group; team t has the groups t, t + teams, ...
        teams: groups that walk at the same time.
        blocks: the blocks of units of each member of a team.
        chunk: steps after which a team meets once more.
    """

    rows: Shares
    teams: int
    blocks: Shares
    chunk: int = 1

    @property
    def workers(self) -> int:
        """All members of all teams."""
        return self.teams * len(self.blocks)

    @property
    def whole(self) -> int:
        """Rows times blocks of all workers."""
        return sum(map(_size, self.rows)) * sum(map(_size, self.blocks))

    @property
    def most(self) -> int:
        """Rows times blocks of the worker that has most."""
        rows = (sum(map(_size, self.rows[team :: self.teams])) for team in range(self.teams))
        return max(rows) * max(map(_size, self.blocks))

    @property
    def balance(self) -> float:
        """Mean work of a worker / most work of a worker."""
        return self.whole / self.workers / self.most


class Products(NamedTuple):
    """The products of one pass.

    Attributes:
        operations: of a step for one row and one block of units.
        meetings: of a team in a step, beside the one of a chunk.
    """

    operations: int
    meetings: int


class Rates(NamedTuple):
    """What a plan's times are made of.

    Attributes:
        operations: a second and worker, of float32; two of each multiply-add.
        barrier: seconds for each worker that meets there.
        source: where the latter is from.
    """

    operations: float
    barrier: float
    source: str


def measure(parts: int) -> Rates:
    """The rates of this machine, on as many workers as there are here.

    Args:
        parts: bfloat16 numbers that an operand of products is made of; 0: float32 as it is.
    """
    kernels = _ext.extension
    assert kernels is not None
    here = kernels.workers()["workers"]
    done = 2 * _MULTIPLY_ADDS * kernels.multiply_adds(1, parts) / here
    rate = done / _least_seconds(partial(kernels.multiply_adds, _MULTIPLY_ADDS, parts))
    if here == 1:
        return Rates(rate, _ASSUMED_BARRIER, "assumed, as one worker meets none")
    barriers = _least_seconds(partial(kernels.meet, here, _MEETINGS))  # and starting the workers
    return Rates(rate, barriers / _MEETINGS / here, f"measured here with {here}")


def lstm(threads: int, work: Work) -> list[str]:
    """The plans of one direction of an LSTM."""
    kernels = _ext.extension
    if kernels is None:
        return [_unknown(threads)]
    sizes = (work.steps, work.batch, work.inputs, work.hidden, work.outputs)
    parts = parts_of(work.dtype, sizes)
    number = 2 * parts or _bytes(work.dtype)
    unit = parts > 0 and kernels.isa() == "amx"
    found = kernels.lstm_plan(*sizes, number, threads, unit)
    lanes, projected = found["lanes"], work.outputs < work.hidden
    forward = 2 * lanes * (4 * (work.outputs + work.inputs) + projected * work.outputs)
    return _describe(
        f"LSTM, H={work.hidden}" + (f", P={work.outputs}" if projected else ""),
        threads,
        work,
        {
            name: (Partition(**found[name]), Products(times * forward, 1 + projected))
            for name, times in (("forward", 1), ("backward", 2))
        },
        lanes,
        parts,
        1 if parts else 4 / number,
    )


def parts_of(dtype: torch.dtype, sizes: tuple[int, int, int, int, int]) -> int:
    """bfloat16 numbers that an operand of an LSTM's products is made of; 0: it stays as it is.

    Args:
        dtype: of the call.
        sizes: T, B, I, H and outputs.
    """
    if dtype == torch.bfloat16:
        return int(multiplies_bfloat16())
    if dtype not in (torch.float16, torch.float32) or _ext.extension is None:
        return 0
    parts: int = _ext.extension.float32_parts(*sizes)
    return parts


def rel_lstm(threads: int, work: Work) -> list[str]:
    """The plans of a RelLSTM, whose members also split the candidates of the attention."""
    kernels = _ext.extension
    if kernels is None:
        return [_unknown(threads)]
    parts = int(work.dtype == torch.bfloat16 and multiplies_bfloat16())
    number = 2 * parts or _bytes(work.dtype)
    sizes = (work.steps, work.batch, work.inputs, work.hidden, work.attention)
    found = kernels.rel_lstm_plan(*sizes, number, threads)
    lanes = found["lanes"]
    units = work.hidden + work.inputs + 0.5 * work.attention
    passes = {}
    for name, times in (("forward", 1), ("backward", 2)):
        part = Partition(**found[name])
        # The rows of a group take turns in the backward, as many at a time as there are members.
        turns = -(-max(map(_size, part.rows)) // len(part.blocks)) if times == 2 else 1
        passes[name] = part, Products(round(times * 8 * lanes * units), 2 * turns + 2)
    return _describe(
        f"RelLSTM, H={work.hidden}, A={work.attention}",
        threads,
        work,
        passes,
        lanes,
        parts,
        1 if parts else 4 / number,
    )


def relevancy(threads: int, work: Work) -> list[str]:
    """The plan of relevancy attention; both passes have the same."""
    kernels = _ext.extension
    if kernels is None:
        return [_unknown(threads)]
    sequences = work.batch * work.heads
    sizes = (sequences, work.steps, work.hidden, min(work.attended, work.steps))
    parts = kernels.relevancy_plan(*sizes, threads, work.score == "dot")
    layer = f"relevancy attention, D={work.hidden}, {work.heads} heads"
    lines = [f"CPU kernels on {threads} threads, {layer}, T={work.steps}, B={work.batch}:"]
    for part in parts:
        count, teams, members = part["end"] - part["begin"], part["teams"], part["members"]
        each = -(-count // teams)
        balance = count / teams / each
        lines.append(
            f"  {count} sequences: workers: {teams * members}; teams: {teams} (members each: "
            f"{members}); a team walks {'up to ' * (balance < 1)}{each}, one after the other"
            + ", and its members share the blocks of queries"
            * (members > 1)
        )
        lines.append(f"    balance: {balance:.0%}")
    return lines


def _describe(
    layer: str,
    threads: int,
    work: Work,
    passes: dict[str, tuple[Partition, Products]],
    lanes: int,
    parts: int,
    rate: float,
) -> list[str]:
    """A heading, a line for each pass, and where the times are from.

    Args:
        layer: its name and sizes of its own.
        passes: the partition of each, and what it takes.
        lanes: units of a block.
        parts: as in ``measure``.
        rate: of the products' dtype, in the rate that is measured.
    """
    rates = measure(parts)
    flops = rates.operations * rate
    sizes = f"T={work.steps}, B={work.batch}, I={work.inputs}, {work.dtype}"
    lines = [f"CPU kernels on {threads} threads, one direction of an {layer}, {sizes}:"]
    for name, (part, products) in passes.items():
        members = len(part.blocks)
        walks = -(-len(part.rows) // part.teams)  # of a team, one after the other
        meetings = products.meetings + 1 / part.chunk if members > 1 else 0
        busy, whole = part.most * products.operations, part.whole * products.operations
        seconds = busy / flops + walks * meetings * members * rates.barrier
        between = f"{busy / walks / meetings:,.0f} operations" if meetings else "no barrier"
        lines.append(
            f"  {name}: workers: {part.workers}{_fewer(part, threads)}; groups: {len(part.rows)} "
            f"(rows each: {_range(part.rows)}); teams: {part.teams} (members each: {members}); of "
            f"{sum(map(_size, part.blocks))} blocks of {lanes} units a member has "
            f"{_range(part.blocks)}"
        )
        lines.append(
            f"    balance: {part.balance:.0%}, work per barrier: {between}, "
            f"speed-up: {whole / flops / seconds:.1f}"
        )
    times = f", times {rate:g}" if rate != 1 else ""
    kind = "bfloat16" if work.dtype == torch.bfloat16 and parts else "float32"
    if kind == "float32" and parts:
        kind += f" in {parts} bfloat16 part{'s' * (parts > 1)}"
    lines.append(
        "  work per barrier: of the busiest worker; speed-up over one thread: predicted from "
        f"{flops / 1e9:.0f} GFLOP/s a worker ({kind} from the first-level cache, measured here"
        f"{times}) and {rates.barrier * 1e9:.0f} ns a barrier and member ({rates.source})"
    )
    return lines


def _fewer(part: Partition, threads: int) -> str:
    """Why there are threads without work."""
    if part.workers == threads:
        return ""
    if part.workers == 1:
        return " (too little work)"
    if part.teams == len(part.rows) and len(part.blocks) == sum(map(_size, part.blocks)):
        return " (no more: every member has one block of units)"
    return " (more would not make the busiest one faster)"


def _bytes(dtype: torch.dtype) -> int:
    """Of a number in products: 16-bit numbers are made float32."""
    return max(dtype.itemsize, 4)


def _size(share: tuple[int, int]) -> int:
    return share[1] - share[0]


def _range(shares: Shares) -> str:
    least, most = min(map(_size, shares)), max(map(_size, shares))
    return f"{least} to {most}" if least < most else str(most)


def _unknown(threads: int) -> str:
    return f"The plan for {threads} threads is not known: {_ext.why_missing()}"


def _least_seconds(run: Callable[[], object]) -> float:
    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return min(once() for _ in range(_ATTEMPTS))
