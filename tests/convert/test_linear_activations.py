"""`activations` of a shift layer in recipes, conversions and artefacts."""

import json

import pytest
import torch
from convert_helpers import vit
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vitrify import convert_, create_model, load, pack_, save
from vitrify.convert import LinearSpec, Recipe
from vitrify.errors import InputError
from vitrify.nn import ShiftLinear

INT8 = {"primitive": "shift", "bits": 4, "activations": "int8"}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def shift_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ShiftLinear)}


def test_the_spec_checks_and_prints_them():
    assert LinearSpec("shift").activations == "float"
    assert str(LinearSpec("shift")) == "shift, 4 bits ps"
    assert str(LinearSpec("shift", activations="float8")) == "shift, 4 bits ps, activations float8"
    with pytest.raises(InputError, match=r"unknown linear.activations 'int4'.*Known: float, float8, int8"):
        LinearSpec("shift", activations="int4")
    assert str(LinearSpec("mixture", activations="int8")) == "mixture, 4 bits ps, activations int8, balance 0.01 (hard)"
    with pytest.raises(InputError, match=r"mlp\.activations 'int8' belongs to .* 'shift' or 'mixture', not 'integer'"):
        Recipe(mlp={"primitive": "integer", "activations": "int8"})


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_recipe_file_carries_them(tmp_path, suffix):
    recipe = Recipe("mine", projections=INT8, mlp="shift", modules={"head": {**INT8, "activations": "float8"}})
    recipe.to_yaml(tmp_path / f"recipe{suffix}")
    read = Recipe.from_yaml(tmp_path / f"recipe{suffix}")
    assert read == recipe
    assert (read.projections.activations, read.mlp.activations) == ("int8", "float")


def test_conversion_gives_them_to_layers_and_takes_them_back():
    model = vit()
    plain = model(IMAGES)
    conversion = convert_(model, Recipe("mine", projections=INT8, mlp="shift"))
    assert {n: m.activations for n, m in shift_layers(model).items() if n.startswith("blocks.0")} == {
        "blocks.0.attn.qkv": "int8",
        "blocks.0.attn.proj": "int8",
        "blocks.0.mlp.fc1": "float",
        "blocks.0.mlp.fc2": "float",
    }
    assert "activations int8" in next(c.detail for c in conversion.changed if c.name == "blocks.0.attn.qkv")
    convert_(model, Recipe("other", projections="shift", mlp=INT8))
    assert shift_layers(model)["blocks.1.attn.qkv"].activations == "float"
    assert shift_layers(model)["blocks.1.mlp.fc1"].activations == "int8"
    convert_(model, Recipe("softmax"))
    assert not shift_layers(model)
    assert all("activations" not in vars(module) for module in model.modules())
    assert torch.equal(model(IMAGES), plain)


@pytest.mark.parametrize("packed", [False, True])
def test_the_shifting_experts_of_a_mixture_take_them(tmp_path, packed):
    model = create_model("vit_mini_patch2_28", depth=1).eval()
    spec = {**INT8, "primitive": "mixture"}
    convert_(model, Recipe("mine", projections=spec, mlp=spec))
    if packed:
        pack_(model)
    assert {layer.activations for layer in shift_layers(model).values()} == {"int8"}
    tokens = torch.randn(9, model.embed_dim, generator=torch.Generator().manual_seed(0))
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for mixture in (model.blocks[0].attn.proj, model.blocks[0].mlp):
            for number, expert in enumerate(mixture.experts().values()):
                mixture.router.bias.copy_(torch.tensor([9.0, -9.0] if number == 0 else [-9.0, 9.0]))
                assert torch.equal(mixture(tokens), expert(tokens))
            mixture.router.bias.zero_()
        save(model, tmp_path / "a")
        assert torch.equal(load(tmp_path / "a")(images), model(images))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("kind", "op"), [("int8", "shift_integer_sums"), ("float8", "shift_linear_rounded")])
def test_a_compiled_model_is_one_graph_that_rounds_the_tokens(kind, op):
    """For any number of images; Inductor fuses what is rounded in the graph into the norms and activations."""
    torch.compiler.reset()
    model, spec = vit().eval(), {**INT8, "activations": kind}
    convert_(model, Recipe("mine", attention="softmax", projections=spec, mlp=spec))
    pack_(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for images in (IMAGES, IMAGES.repeat(3, 1, 1, 1)):
        torch.testing.assert_close(compiled(images), model(images))
    (graph,) = (found for found in counter.graphs if len(found.graph.nodes))
    targets = [str(node.target) for node in graph.graph.nodes]
    assert targets.count(f"vitrify.{op}") == len(shift_layers(model)) > 0
    assert "vitrify.shift_linear" not in targets


def test_a_convolution_is_refused_them():
    model = vit()
    conversion = convert_(model, Recipe("mine", modules={"patch_embed.proj": INT8}))
    assert type(model.patch_embed.proj) is nn.Conv2d
    assert [(c.name, c.detail) for c in conversion.refused if c.name == "patch_embed.proj"] == [
        ("patch_embed.proj", "a shift convolution takes float activations, not int8")
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_an_artefact_carries_them(tmp_path, kind, packed):
    model = create_model("vit_mini_patch2_28", depth=1).eval()
    convert_(model, Recipe("mine", projections={**INT8, "activations": kind}, mlp="shift"))
    if packed:
        pack_(model)
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
        save(model, tmp_path / "a")
        loaded = load(tmp_path / "a")
        assert torch.equal(loaded(images), expected)
    assert shift_layers(loaded)["blocks.0.attn.qkv"].activations == kind
    assert shift_layers(loaded)["blocks.0.mlp.fc1"].activations == "float"


def test_an_artefact_from_before_them_still_loads(tmp_path):
    model = create_model("vit_mini_patch2_28", depth=1).eval()
    convert_(model, Recipe("mine", projections="shift", mlp="shift"))
    save(model, tmp_path / "a")
    removed = 0
    for path in (tmp_path / "a").rglob("*.json"):
        data = json.loads(path.read_text())
        removed += _forget(data)
        path.write_text(json.dumps(data))
    assert removed
    loaded = load(tmp_path / "a")
    assert {layer.activations for layer in shift_layers(loaded).values()} == {"float"}


def _forget(data):
    """Remove `activations` from every mapping in plain data; return how many there were."""
    if isinstance(data, dict):
        return (data.pop("activations", None) is not None) + sum(_forget(value) for value in data.values())
    return sum(_forget(value) for value in data) if isinstance(data, list) else 0
