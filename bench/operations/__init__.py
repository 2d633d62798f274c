"""The operations that can be measured, by their names on the command line."""

from bench.operations.lstm import LSTM
from bench.operations.rel_lstm import REL_LSTM
from bench.operations.relevancy import RELEVANCY

OPERATIONS = {one.name: one for one in (LSTM, REL_LSTM, RELEVANCY)}
