"""Run the table of experiments/shiftaddvit; `--help` says how."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grid import main

if __name__ == "__main__":
    main(Path(__file__).parent)
