"""The operations that can be measured, by their names on the command line."""

from bench.operations.lstm import LSTM
from bench.operations.rel_lstm import RelLSTM
from bench.operations.relevancy import Relevancy

OPERATIONS = {kind.name: kind() for kind in (LSTM, RelLSTM, Relevancy)}
