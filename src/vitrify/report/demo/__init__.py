"""The demo: a small ViT from softmax to linear attention, with everything measured and shown on one page."""

from vitrify.report.demo.results import Results
from vitrify.report.demo.run import run
from vitrify.report.demo.terminal import summary

__all__ = ["Results", "run", "summary"]
