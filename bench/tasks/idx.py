"""IDX files, the format of MNIST: a magic number, the sizes as big-endian uint32, the bytes."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from bench.errors import UsageError

SIDE = 28
CLASSES = 10
PARTS = ("train", "t10k")
UNSIGNED_BYTE = 0x08
GZIP_MAGIC = b"\x1f\x8b"


def read_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images and labels of one part of MNIST, checked against each other.

    Args:
        folder: holds the files under their usual names, plain or gzipped.
        part: ``"train"`` or ``"t10k"`` (the test part).

    Returns:
        uint8 images ``[N, 28, 28]`` and uint8 labels ``[N]`` from 0 to 9.

    Raises:
        UsageError: naming the file, what was expected, what was found and the way out.

    Source: the format is described on the home page of the MNIST database (LeCun, Cortes, Burges).
    """
    images_path = find(folder, f"{part}-images", 3)
    labels_path = find(folder, f"{part}-labels", 1)
    images = read(images_path, 3)
    labels = read(labels_path, 1)
    if images.shape[1:] != (SIDE, SIDE):
        found = " x ".join(str(n) for n in images.shape[1:])
        raise _broken(images_path, f"images of {SIDE} x {SIDE} pixels", f"{found} pixels")
    if len(labels) != len(images):
        wanted = f"{len(images)} labels, one for each image in {images_path.name}"
        raise _broken(labels_path, wanted, f"{len(labels)} labels")
    if len(images) == 0:
        raise _broken(images_path, "one image or more", "none")
    if int(labels.max()) >= CLASSES:
        raise _broken(labels_path, "labels from 0 to 9", f"a label {int(labels.max())}")
    return images, labels


def find(folder: Path, stem: str, dimensions: int) -> Path:
    """The file of that stem in any of its usual spellings.

    Raises:
        UsageError: if the folder or the file is missing, with the names that were looked for.
    """
    names = [
        f"{stem}{separator}idx{dimensions}-ubyte{suffix}"
        for separator in "-."
        for suffix in ("", ".gz")
    ]
    if not folder.is_dir():
        raise UsageError(
            f"--mnist: there is no folder {folder}; wanted one with the four files of MNIST, "
            f"for instance {names[0]}"
        )
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UsageError(
        f"--mnist: {folder} holds none of {', '.join(names)}; "
        "download the missing file, or name the folder that holds it"
    )


def read(path: Path, dimensions: int) -> Tensor:
    """One IDX file of unsigned bytes as a uint8 tensor with that many dimensions.

    Raises:
        UsageError: if the file is not exactly that.
    """
    data = _bytes(path)
    header = 4 + 4 * dimensions
    magic = bytes((0, 0, UNSIGNED_BYTE, dimensions))
    if data[:4] != magic:
        found = f"{data[:4].hex(' ')}" if data else "an empty file"
        raise _broken(path, f"the magic bytes {magic.hex(' ')}", found)
    if len(data) < header:
        raise _broken(path, f"a header of {header} bytes", f"{len(data)} bytes")
    sizes = struct.unpack(f">{dimensions}I", data[4:header])
    wanted = math.prod(sizes)
    found_bytes = len(data) - header
    if found_bytes != wanted:
        shape = " x ".join(str(size) for size in sizes)
        cause = "truncated" if found_bytes < wanted else "too long"
        raise _broken(
            path, f"{wanted} bytes after the header ({shape})", f"{found_bytes}: it is {cause}"
        )
    if wanted == 0:
        return torch.empty(sizes, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header).reshape(sizes)


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _broken(path, "a readable file", error.strerror or str(error)) from error
    if path.suffix != ".gz" and not data.startswith(GZIP_MAGIC):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise _broken(path, "a complete gzip file", f"a broken one ({error})") from error


def _broken(path: Path, wanted: str, found: str) -> UsageError:
    return UsageError(f"--mnist: {path}: wanted {wanted}, found {found}; download the file again")
