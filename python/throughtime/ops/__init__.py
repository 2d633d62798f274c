"""Operators ``torch.ops.throughtime.*``: schemas, fake implementations, gradients.

The implementations are registered by the compiled extension, one per device.
"""
