"""IDX, the file format of MNIST and Fashion-MNIST: a big-endian header, then unsigned bytes."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vitrify.errors import InputError


def read_idx(path: Path, ndim: int) -> npt.NDArray[np.uint8]:
    """Read a gzip-compressed IDX file of unsigned bytes with `ndim` axes (3: images (N, H, W); 1: labels (N,)).

    Raises:
        InputError: the file is missing, not gzip, truncated, not IDX, or holds another type, rank or count than it
            declares.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, EOFError, zlib.error) as error:  # a truncated stream is an EOFError, a foreign file a BadGzipFile
        raise InputError(f"{path} cannot be read as gzip: {error}") from error
    magic, expected = content[:4], bytes([0, 0, 0x08, ndim])
    if magic != expected:
        raise InputError(
            f"{path} is not an IDX file of unsigned bytes with {ndim} axes: "
            f"it starts with {magic.hex(' ') or 'nothing'}, not {expected.hex(' ')}"
        )
    header_bytes = 4 + 4 * ndim
    if len(content) < header_bytes:
        raise InputError(f"{path} ends after {len(content)} bytes, inside its header of {header_bytes}")
    shape = tuple(int(size) for size in np.frombuffer(content[4:header_bytes], ">u4"))
    body_bytes = len(content) - header_bytes
    if body_bytes != math.prod(shape):
        raise InputError(f"{path} declares shape {shape}, but {body_bytes} bytes follow its header")
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)
