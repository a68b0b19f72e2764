"""Fixtures of the op tests: one thread (the machine is shared) and fresh memory that starts as NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Without it cuBLAS refuses every product on a GPU while deterministic algorithms are on, as in `nan_poison`.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def nan_poison() -> Iterator[None]:
    """Let every uninitialised tensor start as NaN, so that a value nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
