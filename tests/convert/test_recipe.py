"""Recipes: validation that names the field, and the way through YAML and JSON."""

import copy
import json

import pytest

from vitrify import recipes
from vitrify.convert import AttentionSpec, LinearSpec, Recipe
from vitrify.errors import InputError

MINE = Recipe(
    "mine",
    AttentionSpec("taylor", squares=True, value_conv=5),
    {"blocks.0.*": "softmax", "blocks.1*": AttentionSpec("taylor_sparse", threshold=0.1, bits=6, bias="drop")},
    keep_if_costlier=False,
)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_round_trip(tmp_path, suffix):
    path = tmp_path / f"file.{suffix}"
    MINE.to_yaml(path)
    assert Recipe.from_yaml(path) == MINE
    assert recipes.get(str(path)) == MINE


def test_plain_data_round_trip():
    assert Recipe.from_dict(json.loads(json.dumps(MINE.to_dict()))) == MINE
    assert copy.deepcopy(MINE) == MINE


def test_short_forms(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("attention: taylor\nmodules:\n  'blocks.3.*': {core: taylor_sparse, threshold: 1}\n")
    recipe = recipes.get(path)
    assert recipe.name == "short"
    assert recipe.attention == AttentionSpec("taylor")
    assert recipe.spec_for("blocks.3.attn") == AttentionSpec("taylor_sparse", threshold=1)


def test_the_last_match_wins():
    recipe = Recipe(
        attention="taylor", modules={"blocks.*": "sparse", "blocks.2.*": "softmax", "*.1.*": "taylor_sparse"}
    )
    cores = [recipe.spec_for(f"blocks.{i}.attn").core for i in range(3)]
    assert cores == ["sparse", "taylor_sparse", "softmax"]
    assert recipe.spec_for("stages.0.attn").core == "taylor"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"attention": {"threshold": 3}}, ["attention.threshold", "[0, 1]", "3"]),
        ({"attention": {"threshold": "high"}}, ["attention.threshold", "'high'"]),
        ({"attention": {"threshold": float("nan")}}, ["attention.threshold", "nan"]),
        ({"attention": {"core": "tailor"}}, ["attention.core", "'tailor'", "did you mean 'taylor'"]),
        ({"attention": "sofmax"}, ["attention.core", "'softmax'"]),
        ({"attention": {"value_conv": 4}}, ["attention.value_conv", "odd", "4"]),
        ({"attention": {"value_conv": True}}, ["attention.value_conv", "True"]),
        ({"attention": {"bits": 1}}, ["attention.bits", "2 to 16"]),
        ({"attention": {"bias": "keep"}}, ["attention.bias", "carry"]),
        ({"attention": {"squares": True}}, ["attention.squares", "'taylor'", "'softmax'"]),
        ({"attention": {"squares": 1, "core": "taylor"}}, ["attention.squares", "true or false"]),
        ({"attention": {"treshold": 0.1}}, ["'treshold'", "did you mean 'threshold'"]),
        ({"attention": 3}, ["attention", "3"]),
        ({"atention": "taylor"}, ["'atention'", "did you mean 'attention'"]),
        ({"modules": {"blocks.0.*": {"bits": 99}}}, ["modules['blocks.0.*'].bits", "99"]),
        ({"modules": {"blocks.0.*": "tayler"}}, ["modules['blocks.0.*']", "did you mean 'taylor'"]),
        ({"modules": ["blocks.0.*"]}, ["modules", "blocks.0.*"]),
        ({"modules": {3: "taylor"}}, ["modules", "3"]),
        ({"name": ""}, ["name"]),
        ({"keep_if_costlier": "yes"}, ["keep_if_costlier", "'yes'"]),
        (["taylor"], ["mapping", "attention"]),
    ],
)
def test_errors_name_the_field(data, words):
    with pytest.raises(InputError) as error:
        Recipe.from_dict(data)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("content", ["attention: [taylor", "- taylor\n", b"\xff\xfe\x00"])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"bad\.yaml"):
        recipes.get(path)


def test_named_recipes():
    assert recipes.names() == ["shiftaddvit", "softmax", "sparse", "taylor", "vitality", "vitrify"]
    assert [recipes.get(name).name for name in recipes.names()] == recipes.names()
    assert recipes.vitality().attention == AttentionSpec("taylor_sparse", threshold=0.5, bits=4)
    with pytest.raises(InputError, match="did you mean 'vitality'"):
        recipes.get("vitalty")
    with pytest.raises(InputError, match="does not exist"):
        recipes.get("no/such/file.yaml")


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "+1e-3", ".1e-2", "1.0e-3", "10e-4", "0.001"])
def test_yaml_reads_numbers_as_json_does(tmp_path, number):
    path = tmp_path / "mine.yaml"
    path.write_text(f"attention: {{core: taylor_sparse, threshold: {number}}}\n")
    assert Recipe.from_yaml(path).attention.threshold == 0.001


def test_names_that_look_like_numbers_stay_names(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: 1e-3b\nattention: taylor\n")
    assert Recipe.from_yaml(path).name == "1e-3b"


def test_equal_recipes_have_one_hash():
    first, second = (Recipe("mine", "taylor", {"blocks.0.*": "softmax"}) for _ in range(2))
    assert len({first, second, Recipe("mine", "taylor")}) == 2


def test_linear_specs_have_a_short_form_and_names_in_their_errors(tmp_path):
    path = tmp_path / "mixed.yaml"
    path.write_text(
        "projections: shift\nmlp: {primitive: mixture, bits: 5}\n"
        "modules: {'blocks.0.*': {primitive: integer, bits: 8}, 'blocks.0.attn': softmax, head: shift}\n"
    )
    recipe = recipes.get(path)
    assert recipe.projections == LinearSpec("shift")
    assert recipe.linear_spec_for("blocks.1.mlp", recipe.mlp) == LinearSpec("mixture", bits=5)
    assert recipe.linear_spec_for("blocks.0.mlp.fc1", recipe.mlp) == LinearSpec("integer", bits=8)
    assert recipe.spec_for("blocks.0.attn") == AttentionSpec()
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"projections": "shfit"}, ["projections.primitive", "did you mean 'shift'"]),
        ({"mlp": {"primitive": "shift", "bits": 7}}, ["mlp.bits", "3, 4, 5 or 6", "7"]),
        ({"mlp": {"primitive": "integer", "bits": 5}}, ["mlp.bits", "4 or 8", "5"]),
        ({"mlp": {"primitive": "mixture", "balance": -1}}, ["mlp.balance", "-1"]),
        ({"mlp": {"primitve": "shift"}}, ["'primitve'", "did you mean 'primitive'"]),
        ({"modules": {"head": {"primitive": "shift", "variant": "p"}}}, ["modules['head'].variant", "ps"]),
        ({"min_tokens": -1}, ["min_tokens", "-1"]),
        ({"attention": {"order": "quadratic"}}, ["attention.order", "'hamming'", "'softmax'"]),
        ({"attention": {"core": "hamming", "binariser": "learnt"}}, ["attention.binariser", "did you mean 'learned'"]),
    ],
)
def test_errors_name_the_primitive(data, words):
    with pytest.raises(InputError) as error:
        Recipe.from_dict(data)
    for word in words:
        assert word in str(error.value)
