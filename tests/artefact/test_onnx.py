"""Export to ONNX: equal outputs at another batch size, every recipe, and nothing left behind where it fails."""

import pytest
import torch
from torch import nn

from vitrify import convert_, create_model, export_onnx, recipes
from vitrify.artefact import onnx as exporting
from vitrify.cli import main
from vitrify.errors import VitrifyError
from vitrify.nn import ShiftLinear, calibrate_codes_

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
pytest.importorskip("onnxscript", reason="needs the extra `onnx`")


def mini(recipe):
    torch.manual_seed(0)
    model = create_model("vit_mini_patch2_28", depth=1)
    convert_(model, recipes.get(recipe))
    if recipe == "shiftaddvit":
        calibrate_codes_(model, torch.randn(4, 1, 28, 28))
    return model


@pytest.mark.parametrize("recipe", ["softmax", "taylor", "shiftaddvit", "vitrify"])
def test_a_converted_model_runs_in_onnx_runtime(tmp_path, recipe):
    model = mini(recipe).train()
    error = export_onnx(model, tmp_path / "model.onnx")
    assert error < (1e-2 if recipe == "shiftaddvit" else 1e-5)
    assert model.training
    assert not any(layer.packed for layer in model.modules() if isinstance(layer, ShiftLinear))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(5, 1, 28, 28)
    with torch.no_grad():
        expected = model.eval()(images)
    (output,) = session.run(None, {"images": images.numpy()})
    assert (torch.from_numpy(output) - expected).abs().max() < error * 3 * expected.abs().max() + 1e-6


def test_a_file_that_disagrees_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(VitrifyError, match=r"differ from PyTorch's"):
        export_onnx(mini("taylor"), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_exported_says_why(tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(VitrifyError, match="cannot export Branches"):
        export_onnx(Branches(), tmp_path / "model.onnx", input_size=(1, 4, 4))
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path, capsys):
    assert main(["export", "test_vit", "--output", str(tmp_path / "m.onnx")]) == 0
    assert "agrees with PyTorch" in capsys.readouterr().out
    assert main(["export", "test_vit", "--output", str(tmp_path / "no" / "m.onnx")]) == 2
    assert "does not exist" in capsys.readouterr().err
