"""Adapters to libraries of reinforcement learning; each module needs its library.

- :mod:`throughtime.integrations.torchrl`: ``LSTMModule``
- :mod:`throughtime.integrations.sb3`: ``RecurrentPolicy`` and its variants, for sb3-contrib
"""
