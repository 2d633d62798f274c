"""The operations that can be measured, by their names on the command line."""

from bench.operations.lstm import Lstm
from bench.operations.operation import Operation
from bench.operations.rel_lstm import RelLstm
from bench.operations.relevancy import Relevancy

OPERATIONS: dict[str, Operation] = {one.name: one for one in (Lstm(), RelLstm(), Relevancy())}
