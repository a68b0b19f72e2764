"""Reports: one HTML file that opens offline, made of plain data (`html`), figures (`plots`, `gallery`) and captures.

>>> from pathlib import Path
>>> from vitrify.report import Fact, Report, write
>>> report = Report("A run", "What it was.", [Fact("3.1x", "fewer multiplications in attention")])
>>> write(report, Path("report.html"))  # doctest: +SKIP
"""

from vitrify.report.html import Fact, Picture, Report, Section, Table, render, write

__all__ = ["Fact", "Picture", "Report", "Section", "Table", "render", "write"]
