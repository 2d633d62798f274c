"""The text of build.ninja: modules, the objects they are linked of, how those are compiled."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Object:
    """One source compiled in one way; ``name`` tells it from the same source compiled otherwise."""

    source: Path
    name: str
    flags: tuple[str, ...]
    rule: str = "compile"  # or "nvcc"

    def output(self, root: Path) -> str:
        return f"{self.source.relative_to(root).with_suffix('')}.{self.name}.o"


@dataclass(frozen=True)
class Module:
    """A shared library; of equal inline functions the linker keeps the first object's."""

    file: str
    objects: tuple[Object, ...]
    libraries: tuple[str, ...]


def text(modules: list[Module], root: Path, compiler: tuple[str, ...], nvcc: str) -> str:
    """What ninja reads.

    Args:
        modules: what is made; an object that several of them name is compiled once.
        root: folder that all sources lie in.
        compiler: the C++ compiler's command.
        nvcc: the CUDA compiler; used by the rule of that name alone.
    """
    bundle = ["-bundle", "-undefined", "dynamic_lookup"]
    link = [*(bundle if sys.platform == "darwin" else ["-shared"]), "-pthread"]
    # nvcc drives a C++ compiler: the one that compiles the rest.
    host = ["-ccbin", compiler[0]] if len(compiler) == 1 else []
    lines = [
        "rule compile",
        f"  command = {_words(*compiler)} -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {_words(nvcc, *host)} -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {_words(*compiler, *link)} $in -o $out $libraries",
    ]
    written: set[str] = set()
    for module in modules:
        # Ninja starts in this order: the last objects take longest, so no core waits for them.
        for made in reversed(module.objects):
            output = made.output(root)
            if output not in written:
                lines += [f"build {output}: {made.rule} {_path(made.source)}"]
                lines += [f"  flags = {_words(*made.flags)}"]
                written.add(output)
        outputs = " ".join(made.output(root) for made in module.objects)
        lines += [f"build {module.file}: link {outputs}"]
        lines += [f"  libraries = {_words(*module.libraries)}"]
    return "\n".join(lines) + "\n"


def _words(*parts: str) -> str:
    return shlex.join(parts).replace("$", "$$")


def _path(name: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(name))
