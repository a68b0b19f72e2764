"""Where a number was measured: without this, a latency means nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

import vitrify

DISTRIBUTIONS = ("torch", "timm", "vitrify", "triton", "torchao", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Machine:
    """The hardware and software under a measurement.

    `device` is what ran the timed code; the CPU fields describe the host even then. `threads` is torch's intra-op
    thread count, `load_average` the host's one-minute load before the benchmark began (processes): anything near the
    number of cores means that something else was running.
    """

    device: str
    cpu: str
    cores: int
    threads: int
    isa: str
    gpu: str | None
    platform: str
    python: str
    versions: dict[str, str]
    load_average: float
    date: str

    @property
    def slug(self) -> str:
        """A short file-name-safe name: the GPU where one ran the code, else the CPU and its core count."""
        name = self.gpu if self.device.startswith("cuda") and self.gpu else f"{self.cpu} {self.cores} cores"
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    def __str__(self) -> str:
        on_gpu = self.device.startswith("cuda") and self.gpu
        where = self.gpu if on_gpu else f"{self.cpu}, {self.cores} cores, {self.isa}"
        return (
            f"{where}, {self.threads} threads, torch {self.versions['torch']}, Python {self.python}, "
            f"load {self.load_average:.1f} before the start, {self.date}"
        )


def describe(device: torch.device | str = "cpu") -> Machine:
    """Describe this machine as seen by torch, for code that runs on `device`."""
    device = torch.device(device)
    return Machine(
        device=str(device),
        cpu=_cpu_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        isa=torch.backends.cpu.get_cpu_capability(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        platform=platform.platform(),
        python=platform.python_version(),
        versions={name: version for name in DISTRIBUTIONS if (version := _version(name))},
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else float("nan"),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    if distribution == "torch":
        return torch.__version__  # has the build tag (+cu130), which the distribution's metadata may lack
    if distribution == "vitrify":
        return vitrify.__version__
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
