"""Fixtures of the modules' tests."""

from __future__ import annotations

import pytest
import torch

from vitrify.nn import mixture_grouped


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    """Dynamo compiles one function eight times at most, and all mixtures share their forward."""
    torch.compiler.reset()


@pytest.fixture
def kernels(monkeypatch):
    """Let a mixture's registered ops stand for the GPU's kernels: on the CPU they run the definition. Their calls."""
    calls = []

    def counted(*arguments, **keywords):
        calls.append((keywords["gather"], keywords["scatter"]))
        return grouped_linear(*arguments, **keywords)

    grouped_linear = mixture_grouped.grouped_linear
    monkeypatch.setattr(mixture_grouped, "kernels_take", lambda device, dtype: device.type == "cpu")
    monkeypatch.setattr(mixture_grouped, "grouped_linear", counted)
    return calls
