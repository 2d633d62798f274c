"""The command that installs this package again, for messages."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname


def source(extra: str = "") -> str:
    """The argument for pip: the folder that this installation came from, else the git address.

    Args:
        extra: an extra of pyproject.toml with its brackets, as in ``"[bench]"``.

    Example:
        >>> from throughtime import _install
        >>> assert "[bench]" in _install.source("[bench]")
    """
    folder, address = Path(__file__).resolve().parents[2], ""
    try:
        installed = distribution("throughtime")
    except PackageNotFoundError:  # run from a source tree
        pass
    else:
        # A checkout, if what is found is the egg-info in its folder python.
        folder = Path(str(installed.locate_file(""))).resolve().parent
        came_from = json.loads(installed.read_text("direct_url.json") or "{}")
        if "dir_info" in came_from:
            folder = Path(url2pathname(urlparse(came_from["url"]).path))
        for line in installed.metadata.get_all("Project-URL") or []:
            label, _, value = line.partition(", ")
            address = f"git+{value}" if label == "Repository" else address
    if (folder / "csrc" / "toolchain.py").is_file() or not address:
        return shlex.quote(f"{folder}{extra}")
    return shlex.quote(f"throughtime{extra} @ {address}") if extra else address


def again(build: str) -> str:
    """The command that installs and compiles, or says what is missing.

    Args:
        build: the value of THROUGHTIME_BUILD.
    """
    pip = "pip install --force-reinstall --no-deps --no-cache-dir"
    return f"`THROUGHTIME_BUILD={build} {pip} {source()}`"
