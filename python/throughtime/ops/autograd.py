"""What the autograd functions of the operations are."""

from __future__ import annotations

from typing import Any

from torch.autograd.function import _SingleLevelFunction


class SingleLevelFunction(_SingleLevelFunction):
    """``torch.autograd.Function`` for one level of differentiation.

    Its ``apply`` is that of C++, without the part in Python that takes a third of a small call's
    time. What compiled autograd asks a function for is in the class that it leaves out.
    """

    @staticmethod
    def _compiled_autograd_key(ctx: Any) -> tuple[int]:
        key: int = ctx._autograd_function_id
        return (key,)
