"""What torch calls at the end of its import: the entry point ``throughtime`` of ``torch.backends``.

It stands outside the package, whose import it saves where the variable is not set.
"""

from __future__ import annotations

import os


def load() -> None:
    """Import throughtime if THROUGHTIME_ACCELERATE is set; its import accelerates."""
    if os.environ.get("THROUGHTIME_ACCELERATE"):
        import throughtime  # noqa: F401
