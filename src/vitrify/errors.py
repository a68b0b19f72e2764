"""The errors a user may meet, and how they are worded.

`InputError` means that what the user gave is wrong: the command line exits with 2 and prints the message without a
traceback. `VitrifyError` means that something else failed: exit code 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class VitrifyError(Exception):
    """Base of every error that vitrify raises on purpose; the command line turns it into exit code 1."""


class InputError(VitrifyError, ValueError):
    """The caller's input is wrong: the message names the value, and what would be right. Exit code 2."""


class UnsupportedError(InputError):
    """The request is well-formed, but this module, mask or shape cannot be handled exactly, so it is refused."""


def unknown(kind: str, name: str, valid: Iterable[str]) -> InputError:
    """Return the error for a name that is not one of `valid`: it names the nearest ones.

    >>> str(unknown("recipe", "vitalty", ["vitality", "softmax"]))
    "unknown recipe 'vitalty': did you mean 'vitality'? Known: softmax, vitality"
    """
    known = sorted(valid)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    # A registry of a thousand model names would bury the hint.
    listed = f"Known: {', '.join(known)}" if len(known) <= 24 else f"{len(known)} names are known"
    return InputError(f"unknown {kind} {name!r}: {hint}{listed}")


@contextmanager
def optional(package: str, extra: str, purpose: str) -> Iterator[None]:
    """Turn a failed import of `package`, which `extra` installs, into an InputError that says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise InputError(f"{purpose} needs {package}: pip install 'vitrify[{extra}]'") from error
