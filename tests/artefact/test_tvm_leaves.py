"""What is swapped into a model before TVM sees it computes what was there; none of this needs TVM."""

import copy

import pytest
import torch
from torch import nn

from vitrify import convert_, create_model, export_tvm, pack_, recipes
from vitrify.cli import main
from vitrify.convert import AttentionSpec, LinearSpec, Recipe
from vitrify.errors import InputError
from vitrify.nn import ShiftLinear
from vitrify.tvm import leaves


def mini(recipe):
    torch.manual_seed(0)
    model = create_model("vit_mini_patch2_28", depth=1).eval()
    convert_(model, recipe)
    pack_(model)
    return model


RECIPES = {
    "published": recipes.shiftaddvit(),
    "taylor_sign": Recipe("taylor_sign", AttentionSpec("hamming", form="taylor", codes="sign")),
    "quadratic": Recipe("quadratic", AttentionSpec("hamming", order="quadratic")),
    "shift": Recipe("shift", projections=LinearSpec("shift", bits=4), mlp=LinearSpec("shift", bits=3, variant="q")),
}
# qkv, proj, fc1, fc2 where they shift (in a mixture both layers of the MLP do), and the attention.
OPS = {"published": 5, "taylor_sign": 1, "quadratic": 0, "shift": 4}


@pytest.mark.parametrize("name", RECIPES)
def test_the_swapped_model_computes_the_same(name):
    model = mini(RECIPES[name])
    swapped = copy.deepcopy(model)
    assert leaves.use_leaves_(swapped) == OPS[name]
    images = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(swapped(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
@pytest.mark.parametrize("variant", ["ps", "q"])
def test_integers_are_summed_exactly(bits, variant):
    torch.manual_seed(bits)
    layer = ShiftLinear.adopt_(nn.Linear(37, 70), bits=bits, variant=variant, activations="int8").pack_()
    swapped = copy.deepcopy(layer)
    assert leaves.use_leaves_(swapped) == 1
    tokens = torch.randn(2, 11, 37)
    with torch.no_grad():
        assert torch.equal(swapped(tokens), layer(tokens))


@pytest.mark.parametrize("size", [(28, 28), (30, 29)])
def test_patches_become_a_product(size):
    conv = nn.Conv2d(3, 8, 4, stride=4)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = conv(images)
        leaves.use_leaves_(conv)
        assert type(conv) is not nn.Conv2d
        torch.testing.assert_close(conv(images), expected)


def test_other_convolutions_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 2, stride=2, groups=2), nn.Conv2d(8, 8, 1))
    assert leaves.use_leaves_(model) == 0
    assert all(type(module) is nn.Conv2d for module in model)


def test_without_tvm_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tvm", None)
    with pytest.raises(InputError, match=r"pip install 'vitrify\[tvm\]'"):
        export_tvm(nn.Linear(2, 2), tmp_path / "m.so")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "{}/model.pt"], "must end in .onnx, or in .so"),
        (["--output", "{}/model.onnx", "--target", "llvm"], "--target and --batch are for libraries"),
        (["--output", "{}/model.so", "--batch", "0"], "must be at least 1"),
    ],
)
def test_the_command_refuses(tmp_path, capsys, arguments, message):
    assert main(["export", "test_vit", *(argument.format(tmp_path) for argument in arguments)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_ops_know_their_shapes():
    code, rows = torch.randint(0, 2, (1, 2, 5, 3), dtype=torch.int8), torch.randn(1, 2, 5, 4)
    packed = torch.randint(0, 16, (7, 3), dtype=torch.uint8)
    cases = [
        (leaves.OPS.mat_add, (code, rows, "binary", True)),
        (leaves.OPS.mat_shift_integer, (torch.ones(4, 6, dtype=torch.int8), packed, 4, "ps")),
    ]
    for op, arguments in cases:
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))
