import json
import sys

import matplotlib.image
import pytest
import torch

from vitrify import artefact
from vitrify.cli import main
from vitrify.errors import InputError
from vitrify.report.demo import run as run_demo

demo_module = sys.modules["vitrify.report.demo.run"]


def test_an_output_that_is_a_file_is_refused_at_once(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    assert main(["demo", "--output", str(tmp_path / "taken")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


def test_other_data_are_refused(tmp_path):
    from PIL import Image  # noqa: PLC0415

    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            Image.new("L", (28, 28)).save(folder / "1.png")
    with pytest.raises(InputError, match="ten classes of Fashion-MNIST"):
        run_demo(tmp_path / "out", seconds=1, data=str(tmp_path / "pets"), seed=0)


@pytest.mark.slow
def test_the_demo_writes_a_page_figures_numbers_and_an_artefact(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "IMAGE_SIZES", (28, 48))
    monkeypatch.setattr(demo_module, "SECONDS_PER_COMPARISON", 0.1)
    said = []
    results = run_demo(tmp_path / "out", seconds=5, data="fashion-mnist:shipped", seed=0, say=said.append)

    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<figure>") == 7
    assert "small demonstration" in page
    assert "1,000 images (the subset shipped with vitrify)" in page
    assert results.machine.cpu in page
    names = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert names == {
        f"{name}.png"
        for name in (
            "accuracy",
            "training",
            "predictions",
            "latency",
            "attention-heads",
            "attention-blocks",
            "logits",
        )
    }
    assert matplotlib.image.imread(tmp_path / "out" / "figures" / "accuracy.png").std() > 0
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [point["tokens"] for point in numbers["points"]] == [196, 576]
    assert numbers["multiplications_per_image"]["softmax"] == 4 * 2 * 2 * 196 * 196 * 32
    assert len(numbers["accuracy_percent"]) == 3

    reloaded = artefact.load(tmp_path / "out" / "run" / "model")
    assert torch.isfinite(reloaded(torch.randn(1, 1, 28, 28))).all()
    steps = [line for line in said if line.startswith("[bold]")]
    assert [f"[{number}/6]" in line for number, line in enumerate(steps, start=1)] == [True] * 6
