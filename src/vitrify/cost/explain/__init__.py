"""The advisor: which primitive would pay in which part of a model on a target, or that none would. How: LATENCY.md.

`advisor` asks, and the others answer: `groups`, which part of the model an operation belongs to; `variants`, what the
model would be with another primitive; `prune`, a smaller model that stands for it; `ledger`, what either costs;
`sizes`, from which image size on Taylor attention pays; `risk`, what a primitive does to the output; `words`, the
sentences.
"""

from vitrify.cost.explain.advisor import Advice, Explanation, Row, Saving, explain

__all__ = ["Advice", "Explanation", "Row", "Saving", "explain"]
