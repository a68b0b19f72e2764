"""The tables of benchmarks/README.md come from the results beside it."""

import importlib.util
import json
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SPEC = importlib.util.spec_from_file_location("benchmark_tables", BENCHMARKS / "tables.py")
tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tables)

MACHINE = {"device": "cpu", "cpu": "C", "cores": 2, "gpu": None, "versions": {"torch": "2"}, "threads": 2}
MACHINE |= {"isa": "AVX2", "load_average": 0.1, "date": "today"}
TIMING = {"median_ms": 2.0, "p10_ms": 1.5, "p90_ms": 3.0}


def row(rows, contender, **kwargs):
    case = {"rows": rows, "dtype": "float32"}
    empty = {"timing": None, "speedup": None, "floor_ms": None, "refused": None, "not_run": None}
    return {"case": case, "contender": contender, **empty, **kwargs}


def test_the_readme_holds_the_tables_of_the_results():
    readme = (BENCHMARKS / "README.md").read_text()
    assert tables.tables(BENCHMARKS) in readme, "run: python benchmarks/tables.py"


def test_rows_show_what_was_measured_and_what_was_not(tmp_path):
    rows = [
        row(1, "plain", timing=TIMING, floor_ms=1.0),
        row(2, "ours", timing=TIMING, floor_ms=0.5, speedup={"ratio": 1.25, "verdict": "faster"}),
        row(2, "absent", not_run="no such machine"),
        row(2, "wrong", refused="not timed: error 1"),
    ]
    result = {"benchmark": "shift", "command": "vitrify bench shift", "machine": MACHINE, "rows": rows}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "shift-c.json").write_text(json.dumps(result))
    text = tables.tables(tmp_path)
    assert "| 1 | plain | 2 | 1.5 to 3 |  | 1 | 50 % |" in text
    assert "| 2 | ours | 2 | 1.5 to 3 | 1.25x, faster | 0.5 | 25 % |" in text
    assert "| 2 | absent | not run: no such machine |" in text
    assert "| 2 | wrong | refused: not timed: error 1 |" in text
    assert "### shift, C, 2 cores" in text
    assert "`vitrify bench shift --dtype bfloat16 --compile --output benchmarks/results`: not measured." in text
    assert "### shift, CPU" not in text
    assert "### attention, CPU" in text
