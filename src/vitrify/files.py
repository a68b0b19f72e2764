"""Files that hold their old content or their new one, never a part of it. Every part of the package may import this."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from vitrify.errors import VitrifyError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) by way of a draft beside `path`, flushed to the disk; the folder is made.

    Raises VitrifyError naming `path` where it cannot be written: then its old content stands, and no draft is left.
    """
    # One name for every attempt: what a killed process leaves is overwritten by the next.
    draft = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(draft)
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise VitrifyError(f"could not write {path}: {error.strerror or error}") from error


def flush(path: Path) -> None:
    """Wait until the file, or the entries of the folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
