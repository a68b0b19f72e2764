"""Runs the Triton kernels in the interpreter, and checks what `backend="triton"` means on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from taylor_inputs import qkv

from vitrify.errors import InputError
from vitrify.ops import backends, gpu, selected_backend, taylor_attention

CASES = Path(__file__).with_name("taylor_triton_cases.py")


def run(*arguments, **environment):
    """Run Python in a process of its own: Triton decides at its import whether it interprets."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON"))}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_case_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=0")
    result = run("-m", "pytest", *options, CASES, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def test_ops_do_without_triton():
    script = """
import sys
import torch
sys.modules["triton"] = None
from vitrify.ops import backends, selected_backend, taylor_attention
x = torch.randn(1, 2, 9, 4)
assert taylor_attention(x, x, x).isfinite().all()
assert selected_backend("cuda") == "aten"
assert "triton" not in backends("cuda")
"""
    result = run("-c", script, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


def test_importing_the_ops_does_not_import_triton():
    script = "import torch, sys; before = set(sys.modules); import vitrify.ops; print(set(sys.modules) - before)"
    result = run("-c", script)
    assert result.returncode == 0, result.stderr
    assert "vitrify.ops.gpu" in result.stdout
    assert "'triton" not in result.stdout
    assert "vitrify.ops.taylor.triton" not in result.stdout


def test_backend_triton_names_the_device_it_cannot_take():
    inputs = qkv(1, 1, 4, 4, 4, 4)
    for device in ("cpu", "meta"):
        with pytest.raises(InputError, match=f"backend 'triton' takes tensors on an NVIDIA GPU .* not on {device}"):
            taylor_attention(*(t.to(device) for t in inputs), backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what holds without a GPU")
def test_gpus_get_the_triton_kernels(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    assert selected_backend("cuda:1") == "triton"
    assert backends("cuda") == ("aten", "reference", "triton")
    assert backends("cpu") == ("aten", "cpu", "reference")
    monkeypatch.setattr(gpu, "INSTALLED", False)
    assert selected_backend("cuda:1") == "aten"


@pytest.mark.parametrize("major", [7, 8, 9])
def test_old_gpus_keep_plain_pytorch(monkeypatch, major):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Properties", (), {"major": major}))
    assert selected_backend("cuda") == ("aten" if major < 8 else "triton")
