"""Folders that appear whole or not at all."""

from __future__ import annotations

import glob
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vitrify.errors import VitrifyError
from vitrify.files import flush


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a new folder beside `path`, which takes the place of `path` once everything in it is on disk.

    If anything fails, the new folder is removed and `path` is as it was. A process killed at the worst moment leaves
    the old content beside `path` under a hidden name, until the next replacement succeeds. An OSError becomes a
    VitrifyError that names `path`.
    """
    target = path.resolve()
    token = secrets.token_hex(4)
    fresh, old = (target.with_name(f".{target.name}.{kind}-{token}") for kind in ("new", "old"))
    created: list[Path] = []
    try:
        created += _make_parents(target.parent)
        fresh.mkdir()
        yield fresh
        for entry in (*fresh.iterdir(), fresh):
            flush(entry)
        _swap(fresh, target, old)
        flush(target.parent)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        for folder in reversed(created):
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise VitrifyError(f"cannot write {path}: {error.strerror or error}; nothing was written") from error
        raise
    # This one's old content, and what processes killed earlier left.
    for kind in ("new", "old"):
        for leftover in target.parent.glob(f".{glob.escape(target.name)}.{kind}-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _make_parents(folder: Path) -> list[Path]:
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _swap(fresh: Path, target: Path, old: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:
        old.rename(target)
        raise
