"""What the engine must know of an operation; every operation is one small room that says so."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from bench.cell import OURS, Cell, Contestant, Work


class Case(Protocol):
    """Sizes of one measurement, a frozen dataclass; ``str()`` of it heads a line of a table."""

    def columns(self) -> Mapping[str, Any]:
        """The columns of ``rows.Row`` that it fills."""

    @property
    def queries(self) -> int:
        """How often something is computed per iteration: the time per query is reported."""

    def tiny(self) -> Case:
        """The same kernels on next to nothing."""


class Operation(ABC):
    """One operation: its shapes, its peers, what an iteration computes, moves and may cost.

    Every method takes the sizes as ``case``, of the operation's own class.
    """

    name: ClassVar[str]
    kernel: ClassVar[str]  # its name in throughtime.explain
    heading: ClassVar[str]  # of the column of cases
    labels: ClassVar[Mapping[str, str]]  # peer -> name for people
    default_peers: ClassVar[Sequence[str]]
    detaching_peers: ClassVar[Sequence[str]] = ()  # the others are timed at p = 0
    other_functions: ClassVar[Sequence[str]] = ()  # peers in speed only
    default_ps: ClassVar[Sequence[float] | None] = None  # None: there is no h to detach
    scores: ClassVar[Sequence[str]] = ()  # to choose from

    # Size -> what it is, and its values where only others are given; of --quick where they differ.
    sizes: ClassVar[Mapping[str, str]]
    typical: ClassVar[Mapping[str, Sequence[int]]]
    typical_quick: ClassVar[Mapping[str, Sequence[int]]] = {}

    @abstractmethod
    def default(self) -> Sequence[Any]:
        """The shapes that are measured unless others are asked for."""

    @abstractmethod
    def quick(self) -> Sequence[Any]:
        """Those of ``--quick``."""

    def sweep(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """Those of ``--sweep``, and what it leaves out for its size; none by default."""
        return (), ()

    @abstractmethod
    def case(self, sizes: Mapping[str, Any]) -> Any:
        """A case from the fields of its class."""

    def from_columns(self, columns: Mapping[str, Any]) -> Any:
        """A case from the names of ``sizes``, and ``score``; these are its fields by default."""
        return self.case(columns)

    def combinations(
        self, given: Mapping[str, Sequence[int]], *, quick: bool, score: str | None = None
    ) -> list[Any]:
        """All combinations of the given sizes; the typical ones stand in for the others."""
        values = {**self.typical, **(self.typical_quick if quick else {}), **given}
        extra = {} if score is None else {"score": score}
        return [
            self.from_columns(dict(zip(values, combination, strict=True)) | extra)
            for combination in itertools.product(*values.values())
        ]

    def detaches(self, impl: str) -> bool:
        """Whether an implementation knows h-detach."""
        return impl == OURS or impl in self.detaching_peers

    @abstractmethod
    def hidden_size(self, case: Any) -> int:
        """The size that ``throughtime.explain`` asks for."""

    def why_not(self, contestant: Contestant, cell: Cell) -> str | None:
        """Why a contestant is not measured in a cell, or None."""
        return None

    @abstractmethod
    def shortened(self, case: Any) -> Any:
        """The case at a T at which the float64 reference takes seconds at most."""

    @abstractmethod
    def gflop(self, impl: str, cell: Cell) -> float:
        """10^9 operations of one iteration: the products that an implementation cannot avoid."""

    @abstractmethod
    def gbyte(self, impl: str, cell: Cell) -> float:
        """10^9 bytes of one iteration: inputs, weights, outputs, gradients, once per pass."""

    @abstractmethod
    def work(self, contestant: Contestant, cell: Cell, *, exact: bool = False) -> Work:
        """The same numbers for every contestant of a cell.

        ``exact`` computes with the same weights and inputs (rounded to the cell's dtype) in
        float64.
        """
