"""Design-space exploration: which shapes, buffers, widths and schedules of an accelerator suit a workload best.

space.py      places of a hardware description, and the values that each may take
samplers.py   which points to try: a grid, random ones, Optuna's
workers.py    who simulates them: this process, a pool, a Ray cluster
folder.py     finished trials on disk, so that a killed exploration goes on
trials.py     objectives, constraints, the best trial and the Pareto front
run.py        `explore`, which joins these
"""

from vitrify.accelerator.explore.run import explore
from vitrify.accelerator.explore.trials import Exploration, Trial

__all__ = ["Exploration", "Trial", "explore"]
