"""Rules for ATen operators: products of every kind, what kernels consist of, operators without a rule, refusals."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrify import InputError, UnsupportedError, Workload, convert_, recipes, workload
from vitrify.cost.elementwise import ELEMENTWISE, REDUCTIONS
from vitrify.cost.graph import Operand, VectorKind
from vitrify.cost.serialise import check_graph


class Call(nn.Module):
    """A module that calls a function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def traced(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Workload:
    graph = workload(Call(function), example_inputs=[torch.zeros(shape) for shape in shapes])
    check_graph(graph)
    return graph


@pytest.mark.parametrize("kinds", [*ELEMENTWISE.values(), *(" ".join(pair) for pair in REDUCTIONS.values())])
def test_tables_name_kinds_that_exist(kinds):
    assert kinds.split()
    assert set(kinds.split()) <= set(get_args(VectorKind))


@pytest.mark.parametrize(
    ("function", "shapes", "sizes"),
    [
        (torch.mm, ((3, 4), (4, 5)), (3, 4, 5, 1)),
        (torch.bmm, ((2, 3, 4), (2, 4, 5)), (3, 4, 5, 2)),
        (torch.mv, ((3, 4), (4,)), (3, 4, 1, 1)),
        (torch.dot, ((4,), (4,)), (1, 4, 1, 1)),
        (torch.matmul, ((2, 6, 3, 4), (4, 5)), (36, 4, 5, 1)),
        (torch.addmm, ((3, 5), (3, 4), (4, 5)), (3, 4, 5, 1)),
        (lambda a, b: torch.einsum("bik,bkj->bij", a, b), ((2, 3, 4), (2, 4, 5)), (3, 4, 5, 2)),
    ],
)
def test_products(function, shapes, sizes):
    (product,) = [op for op in traced(function, *shapes).operations if op.kind == "matmul"]
    assert (product.m, product.k, product.n, product.count) == sizes


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), (2 * 5 * 7, 4 * 9, 6, 1)),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), (2 * 5 * 7, 9, 1, 4)),
        (nn.Conv2d(4, 6, (2, 3), stride=(2, 1), groups=2, bias=False), (2 * 2 * 5, 2 * 6, 3, 2)),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (2 * 5 * 7, 2, 4 * 3, 2)),
    ],
)
def test_convolutions_are_the_matmuls_they_lower_to(layer, sizes):
    product, *bias = workload(layer, example_inputs=torch.zeros(2, 4, 5, 7)).operations
    assert (product.kind, (product.m, product.k, product.n, product.count)) == ("conv", sizes)
    assert [op.vector for op in bias] == ["add"] * (layer.bias is not None)


def kinds_of(graph: Workload) -> dict[str | None, int]:
    found: dict[str | None, int] = {}
    for op in graph.operations:
        found[op.vector] = found.get(op.vector, 0) + op.elements
    return found


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: F.softmax(x, -1), {"compare": 60, "add": 120, "exp": 60, "div": 60}),
        (lambda x: F.layer_norm(x, (5,)), {"add": 180, "mul": 120, "sqrt": 12, "div": 36}),
        (lambda x: F.group_norm(x, 3), {"add": 180, "mul": 120, "sqrt": 6, "div": 18}),
        (lambda x: F.rms_norm(x, (5,)), {"add": 60 + 12, "mul": 120, "sqrt": 12, "div": 24}),
        (F.gelu, {"mul": 180, "erf": 60, "add": 60}),
        (lambda x: F.gelu(x, approximate="tanh"), {"mul": 360, "tanh": 60, "add": 120}),
        (F.silu, {"exp": 60, "add": 60, "div": 60}),
        (F.relu, {"compare": 60}),
        (lambda x: x.mean(-1), {"add": 60, "div": 12}),
        (lambda x: torch.sub(x, x, alpha=2), {"mul": 60, "add": 60}),
        (lambda x: x**2, {"mul": 60}),
        (lambda x: x.max(-1).values, {"compare": 60}),
        (lambda x: x.roll(1, -1), {"move": 60}),
        (lambda x: F.pad(x, (1, 0)), {"move": 72}),
    ],
)
def test_what_kernels_consist_of(function, expected):
    graph = traced(function, (2, 6, 5))
    assert graph.unknown == {}
    assert kinds_of(graph) == expected


def test_pooling_and_batch_norm():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.MaxPool2d(3), nn.AdaptiveAvgPool2d(1))
    found = kinds_of(workload(model, (4, 12, 12)))
    assert found == {
        "mul": 4 * 144,
        "add": 4 * 144 + 4 * 144 + 4 * 4,  # batch norm, the 2 x 2 windows, the mean
        "div": 4 * 36 + 4,
        "compare": 4 * 36,
    }


def test_bilinear_sampling():
    graph = traced(lambda image, grid: F.grid_sample(image, grid.sin(), align_corners=True), (2, 3, 8, 9), (2, 5, 7, 2))
    outputs, coordinates, points = 2 * 3 * 35, 2 * 35 * 2, 2 * 35
    assert graph.unknown == {}
    assert kinds_of(graph) == {
        "exp": coordinates,
        "mul": 4 * outputs + coordinates + 4 * points,  # the neighbours, their scale, their weights
        "add": 3 * outputs + 3 * coordinates,
        "compare": coordinates + 4 * points,  # floor; is each neighbour inside?
    }


def test_masks_and_causality():
    query = (1, 2, 5, 4)
    plain = traced(F.scaled_dot_product_attention, query, query, query)
    masked = traced(lambda q, m: F.scaled_dot_product_attention(q, q, q, m), query, (5, 5))
    causal = traced(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), query)
    assert plain.macs == masked.macs == causal.macs == 2 * 2 * 25 * 4
    before = kinds_of(plain)
    assert kinds_of(masked) == {**before, "add": before["add"] + 50}
    assert kinds_of(causal) == {**before, "compare": before["compare"] + 50}


def test_unknown_operators_are_reported_and_break_no_chain():
    graph = traced(lambda x: torch.sort(torch.sort(x * 2).values).values + 1, (3, 4))
    assert graph.unknown == {"aten.sort.default": 2}
    assert [op.vector for op in graph.operations] == ["mul", "move", "move", "add"]
    assert [op.elements for op in graph.operations] == [12] * 4


def test_results_beside_the_first_have_names_too():
    graph = traced(lambda x: x.max(-1).indices * 2, (3, 4))
    largest, double = graph.operations
    assert [operand.tensor for operand in largest.outputs] == ["op0.out", "op0.out1"]
    assert double.inputs[0].tensor == "op0.out1"


class Nested(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), Call(function))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 0],
        lambda x: x * x.max().item(),
        lambda x: torch.tensor(x.flatten().tolist()),
        lambda x: torch.from_numpy(x.numpy()),
    ],
    ids=["branch", "mask", "item", "tolist", "numpy"],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_control_flow_that_depends_on_data_names_the_module(function, device):
    with pytest.raises(UnsupportedError, match=r"body\.1 \(Call\) (decides by|reads) the values"):
        workload(Nested(function).to(device), (3, 8, 8))


def squeezed(graph: Workload) -> Workload:
    """On a CPU, torch 2.11 multiplies LeViT's one image as a batch of one: operands' shapes then start with a 1."""

    def short(operands: tuple[Operand, ...]) -> tuple[Operand, ...]:
        return tuple(replace(each, shape=each.shape[each.shape[:1] == (1,) :]) for each in operands)

    operations = (replace(op, inputs=short(op.inputs), outputs=short(op.outputs)) for op in graph.operations)
    return replace(graph, operations=tuple(operations))


@pytest.mark.parametrize(("name", "recipe"), [("test_vit", None), ("test_vit", "shiftaddvit"), ("levit_128s", None)])
def test_a_model_on_the_meta_device_gives_the_same_graph(name, recipe):
    def graph(device):
        with torch.device(device):
            model = timm.create_model(name)
        if recipe is not None:
            convert_(model, recipes.get(recipe))
        return workload(model, model.pretrained_cfg["input_size"])

    assert squeezed(graph("meta")) == squeezed(graph("cpu"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": (3, 225, 225)}, r"refuses inputs of shape \(1, 3, 225, 225\), at patch_embed .*225.*224"),
        ({"input_size": (1, 224, 224)}, r"refuses .* at patch_embed\.proj \(Conv2d\)"),
        ({"input_size": (3, 224)}, "input_size must be"),
        ({"batch_size": 0}, "batch_size must be a positive whole number, not 0"),
        ({"taylor": "algorithm2"}, "did you mean 'algorithm1'"),
        ({"example_inputs": 3}, "example_inputs must be a tensor"),
        ({"example_inputs": {"pixels": torch.zeros(1, 3, 224, 224)}}, "unexpected keyword argument 'pixels'"),
    ],
)
def test_arguments_that_are_wrong(arguments, message):
    model = timm.create_model("deit_tiny_patch16_224", depth=1)
    with pytest.raises(InputError, match=message):
        workload(model, **arguments)


def test_a_name_is_not_a_model():
    with pytest.raises(
        InputError, match=r"model must be a torch\.nn\.Module, not str: vitrify\.create_model builds one"
    ):
        workload("deit_tiny_patch16_224")


def test_a_refused_input_is_reported_once(capfd):
    log = logging.getLogger("torch._subclasses.fake_tensor")
    with pytest.raises(InputError, match="refuses inputs"):
        workload(Call(lambda x: x + torch.zeros(7)), example_inputs=torch.zeros(3))
    assert capfd.readouterr().err == ""
    assert not log.disabled
