import importlib.util
from pathlib import Path
from types import SimpleNamespace

FILE = Path(__file__).parents[2] / "experiments" / "latency" / "run.py"


def test_a_refused_contender_does_not_keep_the_other_models_from_being_measured(monkeypatch, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("latency_run", FILE)
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    asked = []

    def vitrify(command, check):
        asked.append(command[command.index("--models") + 1])
        return SimpleNamespace(returncode=int("b0" in asked[-1]))

    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run.subprocess, "run", vitrify)
    monkeypatch.setattr("sys.argv", ["run.py", "--models", "pvt_v2_b0", "pvt_v2_b1", "--recipes", "vitrify"])
    assert run.main() == 1
    assert asked == ["pvt_v2_b0:224", "pvt_v2_b1:224"]
    assert "failed, or wrong output refused: pvt_v2_b0 vitrify" in capsys.readouterr().err
