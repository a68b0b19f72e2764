"""The workload as a graph: every tensor that is read was written, sizes fit shapes, steps stand where they belong."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vitrify
from vitrify import InputError, Workload, workload
from vitrify.cost.serialise import check_graph


def check_sizes(graph: Workload) -> None:
    """Each product's sizes are those of its operands, and each part of a tensor is no larger than the whole."""
    shapes = {operand.tensor: operand.shape for op in graph.operations for operand in op.outputs}
    for op in graph.operations:
        for operand in op.inputs:
            if operand.producer is not None and operand.tensor in shapes and "[" not in operand.tensor:
                # A view of the whole, or broadcast from it.
                assert prod(operand.shape) % prod(shapes[operand.tensor]) == 0
            elif operand.producer is not None:
                whole = operand.tensor.partition("[")[0]
                assert prod(operand.shape) < prod(shapes[whole])
        if op.kind == "matmul":
            assert prod(op.outputs[0].shape) == op.m * op.n * op.count
            assert prod(op.inputs[0].shape) == op.m * op.k * op.count
            assert prod(op.inputs[1].shape) in (op.k * op.n * op.count, op.k * op.n)
            assert op.vector is None
        elif op.kind == "conv":
            assert prod(op.outputs[0].shape) == op.m * op.n * op.count
            assert prod(op.inputs[1].shape) == op.k * op.n * op.count
        else:
            assert op.vector is not None
            assert op.elements > 0
            assert op.macs == 0


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        *(("deit_tiny_patch16_224", name) for name in vitrify.recipes.names()),
        *(("levit_128s", name) for name in ("vitality", "sparse")),
        ("pvt_v2_b0", "shiftaddvit"),
    ],
)
def test_graphs_of_converted_models_are_whole(name, recipe):
    kwargs = {"depth": 1} if name.startswith("deit") else {}
    model = timm.create_model(name, **kwargs)
    vitrify.convert_(model, vitrify.recipes.get(recipe))
    graph = workload(model)
    check_graph(graph)
    check_sizes(graph)
    assert graph.unknown == {}


@settings(max_examples=8, deadline=None)
@given(
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 6, 16]),
    patches=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    depth=st.integers(1, 2),
    batch=st.integers(1, 3),
    class_token=st.booleans(),
    recipe=st.sampled_from(["softmax", "taylor", "shiftaddvit", "sparse"]),
)
def test_any_small_vit(heads, head_dim, patches, depth, batch, class_token, recipe):
    size = (3, 4 * patches[0], 4 * patches[1])
    model = VisionTransformer(
        img_size=size[1:],
        patch_size=4,
        embed_dim=heads * head_dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=2,
        num_classes=5,
        class_token=class_token,
        global_pool="token" if class_token else "avg",
    ).requires_grad_(False)
    graph = workload(model, size, batch)
    # The counter of torch 2.11 knows no fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(batch, *size))
    assert graph.macs * 2 == counter.get_total_flops()
    tokens = patches[0] * patches[1] + class_token
    products = {step: sum(op.macs for op in graph.operations if op.step == step) for step in ("qk", "av")}
    assert products == dict.fromkeys(("qk", "av"), batch * depth * heads * tokens**2 * head_dim)
    vitrify.convert_(model, vitrify.recipes.get(recipe))
    converted = workload(model, size, batch)
    assert graph.unknown == converted.unknown == {}
    for each in (graph, converted):
        check_graph(each)
        check_sizes(each)


def test_batch_multiplies_the_work():
    model = timm.create_model("deit_tiny_patch16_224", depth=1)
    assert workload(model, batch_size=3).macs == 3 * workload(model).macs


def test_views_cost_nothing_and_copies_are_moves():
    class Rearrange(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            views = x.permute(0, 2, 3, 1)[:, ::2].transpose(1, 2).unsqueeze(0)
            return torch.cat((views.contiguous(), views.contiguous())).relu()

    graph = workload(Rearrange(), (3, 4, 6))
    assert [(op.vector, op.elements) for op in graph.operations] == [
        ("move", 36),
        ("move", 36),
        ("move", 72),
        ("compare", 72),
    ]
    # Both copies read the same part of the input; the rest of the operands are whole.
    assert [operand.tensor for op in graph.operations for operand in op.inputs] == [
        "input[0]",
        "input[0]",
        "op0.out",
        "op1.out",
        "op2.out",
    ]


def test_parts_of_one_tensor_have_names_of_their_own():
    graph = workload(timm.create_model("deit_tiny_patch16_224", depth=1))
    by_step = {op.step: op for op in graph.operations if op.kind == "matmul" and op.step}
    scaled = next(op for op in graph.operations if op.step == "qk" and op.vector == "mul")
    (bias,) = [op for op in graph.operations if op.module == "blocks.0.attn.qkv" and op.vector == "add"]
    parts = [scaled.inputs[0], by_step["qk"].inputs[1], by_step["av"].inputs[1]]
    assert [part.tensor for part in parts] == [f"{bias.id}.out[{index}]" for index in range(3)]
    assert {part.producer for part in parts} == {bias.id}
    assert {part.shape for part in parts} == {(1, 3, 197, 64)}


def test_writing_in_place_makes_a_new_tensor_of_the_whole():
    class Write(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y[:, 0] = x[:, 1]
            y.add_(1)
            return y.sum()

    graph = workload(Write(), (3, 4, 4))
    check_graph(graph)
    double, write, add, total = graph.operations
    assert (write.vector, write.elements) == ("move", 16)
    assert [operand.tensor for operand in write.inputs] == ["op0.out[0]", "input[0]", double.outputs[0].tensor]
    assert add.inputs[0].producer == write.id
    assert total.inputs[0].producer == add.id


def test_what_depends_on_nothing_is_not_work():
    class Mask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = torch.arange(x.shape[-1], device=x.device)
            return x.masked_fill(rows[:, None] > rows, 0)

    graph = workload(Mask(), (3, 4, 4))
    assert [op.vector for op in graph.operations] == ["compare"]
    assert [operand.kind for operand in graph.operations[0].inputs] == ["activation", "weight"]


def test_modules_are_named_and_weights_are_theirs():
    graph = workload(timm.create_model("deit_tiny_patch16_224", depth=1))
    (fc1,) = [op for op in graph.operations if op.module == "blocks.0.mlp.fc1" and op.kind == "matmul"]
    assert (fc1.m, fc1.k, fc1.n, fc1.count, fc1.bits) == (197, 192, 768, 1, (32, 32, 32))
    x, weight = fc1.inputs
    assert (weight.tensor, weight.kind, weight.producer) == ("blocks.0.mlp.fc1.weight", "weight", None)
    assert x.kind == "activation"
    assert x.producer is not None
    assert graph.operations[0].module == "patch_embed.proj"


def test_half_precision_is_half_as_wide_and_summed_in_32_bits():
    graph = workload(timm.create_model("deit_tiny_patch16_224", depth=1).to(torch.bfloat16))
    products = [op for op in graph.operations if op.kind != "vector"]
    assert {op.bits for op in products} == {(16, 16, 32)}
    assert {operand.bits for op in products for operand in (*op.inputs, *op.outputs)} == {16}


def test_the_model_is_left_as_it_was():
    model = timm.create_model("levit_128s").train()
    hooked = []
    model.head.register_forward_hook(lambda *_: hooked.append(1))
    before = {name: (id(p), p._version) for name, p in model.named_parameters()}
    workload(model)
    assert {name: (id(p), p._version) for name, p in model.named_parameters()} == before
    assert hooked == []
    assert model.training
    assert all(len(module._forward_pre_hooks) == 0 for module in model.modules())


def test_check_graph_names_what_is_broken():
    graph = workload(timm.create_model("deit_tiny_patch16_224", depth=1))
    late = replace(graph, operations=graph.operations[1:])
    with pytest.raises(InputError, match=r"op0\.1 reads op0\.out from op0, which does not write it before"):
        check_graph(late)
    twice = replace(graph, operations=(*graph.operations[:1], *graph.operations))
    with pytest.raises(InputError, match="op0 is there twice"):
        check_graph(twice)
