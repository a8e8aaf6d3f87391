"""Reads images and labels in the IDX format: MNIST's, and that of the data made to take its place.

A file is two zero bytes, 8 for unsigned bytes, the number of axes, the length of each axis as four bytes
with the largest first, and then the numbers themselves.
"""

import argparse
import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """Images (count, rows, columns) and their labels (count), both unsigned bytes."""

    images: np.ndarray
    labels: np.ndarray


def read_folder(folder: Path) -> tuple[Part, Part]:
    """Training and test images; a ValueError names the file that is not right and says why.

    Each file's name may have a dot in front of "idx", and end in .gz if it is compressed.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    training, test = (read_part(folder, name) for name in ("train", "t10k"))
    if training.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"{find(folder, 't10k-images', 3)}: has images of {by(test.images.shape[1:])} pixels, "
            f"where those for training have {by(training.images.shape[1:])}"
        )
    if test.labels.max() > training.labels.max():
        raise ValueError(
            f"{find(folder, 't10k-labels', 1)}: has label {test.labels.max()}, "
            f"where those for training end with {training.labels.max()}"
        )
    return training, test


def read_part(folder: Path, name: str) -> Part:
    """The images and the labels whose files begin with `name`."""
    images, labels = find(folder, f"{name}-images", 3), find(folder, f"{name}-labels", 1)
    part = Part(read(images, 3), read(labels, 1))
    if len(part.labels) != len(part.images):
        raise ValueError(
            f"{labels}: has {len(part.labels):,} labels for {len(part.images):,} images in {images.name}"
        )
    return part


def find(folder: Path, name: str, axes: int) -> Path:
    """The file of that name, whichever way it is spelled."""
    paths = [folder / f"{name}{sign}idx{axes}-ubyte{end}" for end in ("", ".gz") for sign in "-."]
    for path in paths:
        if path.exists():
            return path
    raise ValueError(f"{paths[0]}: no such file, nor {', '.join(path.name for path in paths[1:])}")


def read(path: Path, axes: int) -> np.ndarray:
    """The numbers in one file, which must have so many axes."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    start, magic = 4 + 4 * axes, bytes([0, 0, 8, axes])
    if content[:4] != magic[: len(content)]:
        raise ValueError(
            f"{path}: starts with {content[:4].hex(' ')}, "
            f"where bytes along {axes} {'axes start' if axes > 1 else 'axis start'} with {magic.hex(' ')}"
        )
    if len(content) < start:
        raise ValueError(f"{path}: ends after {len(content)} of the {start} bytes of its header")
    shape = np.frombuffer(content, ">u4", axes, offset=4).tolist()
    size, found = math.prod(shape), len(content) - start
    if found != size:
        raise ValueError(
            f"{path}: {'truncated' if found < size else 'too long'}: "
            f"its header announces {by(shape)} bytes, {found:,} follow"
        )
    if size == 0:
        raise ValueError(f"{path}: holds nothing, its header announces {by(shape)} bytes")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def by(shape) -> str:
    """Lengths as people write them: 28 × 28."""
    return " × ".join(f"{length:,}" for length in shape)


if __name__ == "__main__":
    argparse.ArgumentParser(description=f"{__doc__} For digits.py.").parse_args()
