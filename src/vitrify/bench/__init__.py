"""Benchmarks that check before they time, compare contenders in turns, and say on which machine.

>>> from vitrify import bench
>>> case = {"tokens": 197, "heads": 12, "head_dim": 64, "batch_size": 1}
>>> case |= {"dtype": "float32", "device": "cpu", "compile": False}
>>> result = bench.run("attention", [case], seconds=5)  # doctest: +SKIP
"""

from vitrify.bench.machine import Machine, describe
from vitrify.bench.registry import BENCHMARKS
from vitrify.bench.runner import Result, Row, run
from vitrify.bench.timing import Speedup, Timing

__all__ = ["BENCHMARKS", "Machine", "Result", "Row", "Speedup", "Timing", "describe", "run"]
