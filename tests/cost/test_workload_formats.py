"""Workloads as JSON and in other simulators' formats."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
import timm
import yaml

import vitrify
from vitrify import InputError, Workload, workload
from vitrify.cost.export import to_scalesim, to_zigzag
from vitrify.cost.schema_check import check_schema
from vitrify.cost.serialise import from_json, schema, to_json


@pytest.fixture(scope="module")
def graph() -> Workload:
    model = timm.create_model("deit_tiny_patch16_224", depth=2)
    vitrify.convert_(model, vitrify.recipes.shiftaddvit())
    return workload(model)


def test_json_round_trip(graph):
    assert from_json(to_json(graph)) == graph


def test_the_schema_is_a_json_schema_that_holds(graph):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(dict(schema()))
    jsonschema.validate(json.loads(to_json(graph)), dict(schema()))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "workload.version must be 1, not 2"),
        (("model",), 3, "workload.model must be string, not 3"),
        (("colour",), "red", "workload.colour is unknown: there are format"),
        (("operations", 1, "kind"), "gemm", r"workload.operations\[1\].kind must be one of \['matmul'"),
        (("operations", 0, "m"), -1, r"workload.operations\[0\].m must be at least 0, not -1"),
        (("operations", 0, "m"), True, r"workload.operations\[0\].m must be integer, not True"),
        (("operations", 0, "bits"), [32, 32], r"workload.operations\[0\].bits must have 3 to 3 entries, not 2"),
        (("operations", 0, "inputs", 0, "shape", 1), 0.5, r"inputs\[0\].shape\[1\] must be integer, not 0.5"),
        (("operations", 2, "id"), "op0", "operation op0 is there twice|reads"),
        (("unknown", "aten.sort"), 0, "workload.unknown.aten.sort must be at least 1"),
    ],
)
def test_json_that_does_not_fit_names_the_place(graph, path, value, message):
    data = json.loads(to_json(graph))
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(InputError, match=message):
        from_json(json.dumps(data))


def test_json_that_is_cut_off_or_lacks_something():
    with pytest.raises(InputError, match="is not JSON"):
        from_json("{")
    with pytest.raises(InputError, match="workload lacks format, version"):
        from_json("{}")


def test_the_check_refuses_a_schema_that_it_does_not_understand():
    with pytest.raises(NotImplementedError, match="pattern"):
        check_schema("a", {"pattern": "a"}, {}, "here")


def test_scalesim_reads_a_row_per_product(graph):
    """As its reader does: the first row is a header, and what follows the last comma is dropped."""
    text = to_scalesim(graph)
    rows = [line.split(",")[:-1] for line in text.splitlines()]
    assert rows[0] == ["Layer", "M", "N", "K"]
    assert all(len(row) == 4 for row in rows)
    assert sum(int(m) * int(n) * int(k) for _, m, n, k in rows[1:]) == graph.macs
    assert len({row[0] for row in rows}) == len(rows) == 1 + sum(o.count for o in graph.operations if o.macs)
    assert list(csv.reader(io.StringIO(text)))[1][:4] == ["op0_patch_embed.proj", "196", "192", "768"]


# What ZigZag 3.9 accepts as an equation (its WorkloadValidator).
EQUATION = re.compile(r"^O(\[\w+\])+\s*\+?\s*=\s*\w(\[\w+\])+\s*[*+]\s*\w(\[(?:\w+)?\])+\s*$")


def test_zigzag_has_a_gemm_per_product(graph):
    layers = yaml.safe_load(to_zigzag(graph))
    products = [op for op in graph.operations if op.kind != "vector"]
    assert [layer["id"] for layer in layers] == list(range(len(products)))
    for layer, op in zip(layers, products, strict=True):
        assert layer["operator_type"] == "Gemm"
        assert EQUATION.match(layer["equation"])
        sizes = dict(zip(layer["loop_dims"], layer["loop_sizes"], strict=True))
        assert (sizes["D"], sizes["C"], sizes["K"], sizes.get("B", 1)) == (op.m, op.k, op.n, op.count)
        assert {name.upper() for name in re.findall(r"\[(\w)\]", layer["equation"])} == set(sizes)
        left, right, sums = op.bits
        precision = layer["operand_precision"]
        assert (precision["I"], precision["W"], precision["O"]) == (left, right, sums)
        assert all(source <= layer["id"] for source in layer["operand_source"].values())


def test_zigzag_knows_where_operands_come_from():
    """Both operands of Q K^T come from the qkv layer, and V's product reads the one before; weights are constants."""
    layers = yaml.safe_load(to_zigzag(workload(timm.create_model("deit_tiny_patch16_224", depth=1))))
    names = [layer["name"].partition("_")[2] for layer in layers]
    number = {name: index for index, name in enumerate(names)}
    source = {name: layer["operand_source"] for name, layer in zip(names, layers, strict=True)}
    qkv, qk, av = number["blocks.0.attn.qkv"], number["blocks.0.attn_qk"], number["blocks.0.attn_av"]
    assert source["patch_embed.proj"] == {"I": 0, "W": 0}
    assert source["blocks.0.attn.qkv"] == {"I": 0, "W": qkv}
    assert source["blocks.0.attn_qk"] == {"I": qkv, "W": qkv}
    assert source["blocks.0.attn_av"] == {"I": qk, "W": qkv}
    assert source["blocks.0.attn.proj"] == {"I": av, "W": av + 1}
