"""The demo of novel views: what each model makes of views that none has seen, beside the truth, and at what cost."""

from vitrify.report.views.results import Results
from vitrify.report.views.run import picture_count, run, summary

__all__ = ["Results", "picture_count", "run", "summary"]
