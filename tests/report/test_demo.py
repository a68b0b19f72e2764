import json
import sys

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F

from vitrify import artefact
from vitrify.cli import main
from vitrify.convert import convert_
from vitrify.errors import InputError
from vitrify.nn import Mixture, ShiftLinear
from vitrify.report.demo import run as run_demo
from vitrify.report.demo import shiftadd
from vitrify.report.demo.pictures import pixels
from vitrify.report.primitives import dispatch_maps

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
    assert page.count("<figure>") == 10
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
            "dispatch",
            "exponents",
            "codes",
        )
    }
    assert matplotlib.image.imread(tmp_path / "out" / "figures" / "accuracy.png").std() > 0
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [point["tokens"] for point in numbers["points"]] == [196, 576]
    assert numbers["multiplications_per_image"]["softmax"] == 4 * 2 * 2 * 196 * 196 * 32
    assert len(numbers["accuracy_percent"]) == 3

    reloaded = artefact.load(tmp_path / "out" / "run" / "model")
    assert torch.isfinite(reloaded(torch.randn(1, 1, 28, 28))).all()
    mixed = artefact.load(tmp_path / "out" / "run-vitrify" / "model").eval()
    mixtures = {name for name, module in mixed.named_modules() if isinstance(module, Mixture)}
    assert set(numbers["shift_add"]["layers"]) == mixtures
    weights = {name: layer.weight.numel() for name, layer in mixed.named_modules() if isinstance(layer, ShiftLinear)}
    counted = numbers["shift_add"]["exponents"]
    assert {name: sum(layer["counts"]) + layer["zeros"] for name, layer in counted.items()} == weights
    images = demo_module._plain("fashion-mnist:shipped", "test", mixed)
    again = dispatch_maps(mixed, torch.stack([images[i][0] for i in range(4)]))
    for name, shown in results.shift_add.dispatch.items():  # another batch size may tip a token that is near a tie
        assert (again[name] != shown).float().mean() < 0.01
    steps = [line for line in said if line.startswith("[bold]")]
    assert [f"[{number}/7]" in line for number, line in enumerate(steps, start=1)] == [True] * 7


def test_shares_on_and_off_the_object_add_up():
    model = artefact.create_model("vit_mini_patch2_28", pretrained=True).eval()
    convert_(model, shiftadd.RECIPE)
    images = demo_module._plain("fashion-mnist:shipped", "test", model)
    batch = torch.stack([images[i][0] for i in range(4)])
    layers = shiftadd.mixture_layers(model, [batch[:3], batch[3:]], batch[:1])
    shown = F.max_pool2d(pixels(batch, model), 2)[:, 0] > 0.001
    assert 0.2 < shown.float().mean() < 0.8
    for name, maps in dispatch_maps(model, batch).items():
        layer = layers[name]
        assert layer.share == pytest.approx(maps.float().mean().item())
        assert layer.on_object == pytest.approx(((maps & shown).sum() / shown.sum()).item())
        assert layer.on_ground == pytest.approx(((maps & ~shown).sum() / (~shown).sum()).item())
        assert min(layer.multiply_ms, layer.shift_ms) > 0
        assert model.get_submodule(name).alpha == (6.0, 4.0)  # measured on a copy
        assert layer.target == pytest.approx(0.4)
