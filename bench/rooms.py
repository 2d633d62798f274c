"""The operations that can be measured, by their names on the command line."""

from __future__ import annotations

from collections.abc import Mapping

from bench.lstm import Lstm
from bench.operation import Operation
from bench.rel_lstm import RelLstm
from bench.relevancy import Relevancy

OPERATIONS: Mapping[str, Operation] = {
    operation.name: operation for operation in (Lstm(), RelLstm(), Relevancy())
}
