"""Whole models compiled by TVM: MatAdd and MatShift are in them, and the outputs are PyTorch's."""

import copy
import shutil
import subprocess

import pytest
import torch
from torch import nn

from vitrify import convert_, create_model, export_tvm, pack_, recipes
from vitrify.artefact import input_config
from vitrify.cli import main
from vitrify.convert import AttentionSpec, LinearSpec, Recipe
from vitrify.errors import VitrifyError
from vitrify.nn import calibrate_codes_

tvm = pytest.importorskip("tvm", reason="needs TVM: pip install 'vitrify[tvm]'")
from vitrify.tvm import build, frontend  # noqa: E402
from vitrify.tvm import export as exporting  # noqa: E402

INT8 = Recipe(
    "int8",
    AttentionSpec("hamming", form="taylor", codes="sign"),
    projections=LinearSpec("shift", bits=4, activations="int8"),
    mlp=LinearSpec("shift", bits=5, activations="int8"),
)


def converted(name, recipe, **options):
    torch.manual_seed(0)
    model = create_model(name, **options).eval()
    convert_(model, recipe)
    if recipe.attention.core == "hamming":
        calibrate_codes_(model, torch.randn(4, *input_config(model)["input_size"]))
    return model


def kernels(model, images):
    """Return the kernels that the model's module calls, in order, by name."""
    packed = copy.deepcopy(model)
    pack_(packed)
    module = frontend.relax_module(packed, images)
    calls = [line.partition("R.call_tir(cls.")[2].partition(",")[0] for line in module.script().splitlines()]
    return [call.rstrip("0123456789") for call in calls if call]


# An activation between two integers may be rounded to the other one, and is then a 127th of its token's largest off.
@pytest.mark.parametrize(
    ("recipe", "tolerance"), [(recipes.shiftaddvit(), 1e-5), (INT8, 1e-3)], ids=["shiftaddvit", "int8"]
)
def test_a_converted_model_runs_as_a_library(tmp_path, recipe, tolerance):
    model = converted("vit_mini_patch2_28", recipe, depth=1).train()
    error = export_tvm(model, tmp_path / "model.so", batch=2)
    assert error < tolerance
    assert model.training
    images = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        expected = model.eval()(images)
    output = build.run(tmp_path / "model.so", images, "llvm")
    assert (output - expected).abs().max() < tolerance * expected.abs().max()
    assert [path.name for path in tmp_path.iterdir()] == ["model.so"]


def test_our_operators_are_what_is_compiled():
    images = torch.randn(1, 1, 28, 28)
    called = kernels(converted("vit_mini_patch2_28", recipes.shiftaddvit(), depth=2), images)
    # Per block two MatAdds, and four shift layers: qkv, proj and the shift expert's two.
    assert (called.count("mat_add"), called.count("mat_shift")) == (4, 8)
    called = kernels(converted("vit_mini_patch2_28", INT8, depth=2), images)
    assert called.count("mat_shift_integer") == 8


def test_a_library_that_disagrees_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "tolerance_for", lambda model: -1.0)
    with pytest.raises(VitrifyError, match=r"differ from PyTorch's"):
        export_tvm(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), tmp_path / "model.so", input_size=(3, 2, 2))
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_compiled_says_why(tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(VitrifyError, match="cannot compile Branches"):
        export_tvm(Branches(), tmp_path / "model.so", input_size=(1, 4, 4))
    with pytest.raises(VitrifyError, match="must be a whole number"):
        export_tvm(Branches(), tmp_path / "model.so", batch=0)
    with pytest.raises(VitrifyError, match="unknown TVM target 'cpu'"):
        export_tvm(Branches(), tmp_path / "model.so", target="cpu")
    assert not list(tmp_path.iterdir())


def test_a_machine_without_a_compiler_is_told_so(tmp_path, monkeypatch):
    for compiler in ("CXX", "CC"):
        monkeypatch.delenv(compiler, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VitrifyError, match="finds none: install"):
        export_tvm(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), tmp_path / "model.so", input_size=(3, 2, 2))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    assert main(["export", "vit_mini_patch2_28", "--output", str(tmp_path / "m.so")]) == 0
    assert "TVM agrees with PyTorch" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_writes_cuda_source(tmp_path, capsys):
    assert main(["export", "vit_mini_patch2_28", "--output", str(tmp_path / "m.so"), "--target", "cuda"]) == 0
    out = capsys.readouterr().out
    assert ("TVM agrees" if tvm.cuda().exist else "not run: this machine has no CUDA device") in out
    assert "__global__" in (tmp_path / "m.cu").read_text()


@pytest.mark.slow
def test_a_whole_deit_tiny_equals_pytorch(tmp_path):
    """The error allowed is four times what float32 costs PyTorch itself: its rounding, or as much noise on the images.

    Both are measured against float64; the noise is there because either may flip a code, and TVM may flip others.
    """
    model = converted("deit_tiny_patch16_224", recipes.shiftaddvit())
    pack_(model)
    images = torch.randn(1, 3, 224, 224)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        wanted = exact(images.double())
        noisy = exact(images.double() * (1 + 1e-6 * torch.randn(images.shape, dtype=torch.float64)))
        rounded = model(images)
    allowed = 4 * max((output - wanted).abs().max().item() for output in (noisy, rounded))
    assert allowed < 1e-2 * wanted.abs().max()
    export_tvm(model, tmp_path / "deit.so")
    output = build.run(tmp_path / "deit.so", images, "llvm")
    assert (output - wanted).abs().max() <= allowed
    called = kernels(model, images)
    assert (called.count("mat_add"), called.count("mat_shift")) == (24, 48)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here to compile CUDA source with")
def test_the_cuda_source_of_a_whole_deit_tiny_compiles(tmp_path):
    export_tvm(converted("deit_tiny_patch16_224", recipes.shiftaddvit()), tmp_path / "deit.so", target="cuda")
    command = ["nvcc", "-arch=sm_80", "-cubin", "-w", "-Xptxas", "-v", "-o", "deit.cubin", "deit.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill stores" in line]
    assert len(spills) > 20
    assert all(line.strip().startswith("0 bytes stack frame, 0 bytes spill stores") for line in spills)
