import dataclasses
import sys
import types

import pytest
import torch

from vitrify.bench import quantised, shift
from vitrify.bench.reference import check_linear
from vitrify.bench.registry import prepare
from vitrify.errors import InputError

CASE = {"rows": 33, "inputs": 64, "outputs": 48, "dtype": "float32", "device": "cpu", "compile": False}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contenders_pass_their_checks_and_the_others_say_why_not(dtype):
    prepared = prepare("shift", {**CASE, "dtype": dtype})
    names = [contender.name for contender in prepared.contenders]
    four_bits = ["torch INT4 weights"] if dtype == "bfloat16" else []
    assert names == ["F.linear", "shift float", "shift int8", "torch INT8", *four_bits]
    assert prepared.baselines == dict.fromkeys(names, "F.linear")
    torchao = {"torchao INT4 weights", "torchao FP8"}
    assert prepared.not_run.keys() == {"torch FP8", "torch INT4 weights", *torchao} - set(four_bits)
    assert prepared.not_run["torch FP8"] == "needs a GPU of compute capability 9.0"
    for contender in prepared.contenders:
        check = contender.check(prepared.inputs(0))
        assert check.passed, (contender.name, check)


def test_a_compiled_twin_of_each_is_compared_with_the_compiled_baseline():
    prepared = prepare("shift", {**CASE, "compile": True})
    names = [contender.name for contender in prepared.contenders]
    assert names[:4] == ["F.linear", "F.linear compiled", "shift float", "shift float compiled"]
    assert prepared.baselines["shift int8 compiled"] == "F.linear compiled"


@pytest.mark.parametrize("rounding", ["float", "int8", "float8"])
def test_a_wrong_layer_is_found(rounding):
    generator = torch.Generator().manual_seed(0)
    input, weight = torch.randn(20, 64, generator=generator), torch.randn(48, 64, generator=generator)
    rounded = input
    if rounding != "float":
        largest = {"int8": 127, "float8": 448}[rounding]
        scale = input.abs().amax(-1, keepdim=True) / largest
        values = input / scale
        rounded = (values.round() if rounding == "int8" else values.to(torch.float8_e4m3fn).float()) * scale
    right = rounded @ weight.T
    assert check_linear(right, input, weight, None, rounding).passed
    wrong = right.clone()
    wrong[3, 5] += 0.01 * right.abs().max()
    assert not check_linear(wrong, input, weight, None, rounding).passed
    wrong[3, 5] = float("nan")
    assert not check_linear(wrong, input, weight, None, rounding).passed
    if rounding != "float":  # rounding where none should be, and none where it should
        assert not check_linear(right, input, weight, None, "float").passed


def test_floors_count_narrow_products_and_packed_weights():
    contenders = {contender.name: contender for contender in prepare("shift", CASE).contenders}
    flops = 2 * 33 * 64 * 48
    activations = 4 * (33 * (64 + 48) + 48)
    assert {name: c.cost.flops for name, c in contenders.items()} == dict.fromkeys(contenders, flops)
    assert contenders["F.linear"].cost.bytes_moved == activations + 4 * 64 * 48
    assert contenders["shift int8"].cost.bytes_moved == activations + 64 * 48 // 2
    assert contenders["torch INT8"].cost.bytes_moved == activations + 64 * 48
    assert contenders["shift int8"].cost.narrow == {"int8": flops}
    assert contenders["shift float"].cost.narrow == {}


def test_the_published_shapes_are_among_those_of_a_quick_run():
    assert set(shift.PUBLISHED) <= set(shift.QUICK) & set(shift.FULL)
    assert {rows for rows, *_ in shift.FULL} >= set(shift.ROWS)


def test_what_gpus_do_not_take_is_said():
    cuda = torch.device("cuda")
    objections = {rival.name: rival.objection for rival in quantised.RIVALS}
    assert "more than 16 rows" in objections["torch INT8"](1, 64, 64, torch.bfloat16, cuda)
    assert objections["torch INT8"](17, 64, 64, torch.bfloat16, cuda) is None
    assert "bfloat16" in objections["torch INT4 weights"](17, 64, 64, torch.float32, cuda)
    assert "groups of 64" in objections["torch INT4 weights"](17, 32, 64, torch.bfloat16, cuda)


@pytest.fixture
def torchao(monkeypatch):
    """Put a library in torchao's place that rounds weights to bfloat16 halves, or refuses to."""
    library = types.ModuleType("torchao.quantization")
    library.refusal = None

    def quantize_(model, config):
        if library.refusal is not None:
            raise library.refusal
        assert config == 64
        for layer in model:
            layer.weight.copy_((layer.weight * 2).round() / 2)

    library.Int4WeightOnlyConfig = lambda group_size, int4_packing_format: group_size
    library.quantize_ = quantize_
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", library)
    return library


def test_a_layer_of_torchao_is_held_against_the_weight_that_it_makes_of_it(torchao):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, 64, generator=generator), torch.randn(48, generator=generator).bfloat16()
    run, own = quantised.torchao_int4(weight, bias)
    assert torch.equal(own, (weight.bfloat16() * 2).round().double() / 2)
    x = torch.randn(20, 64, generator=generator).bfloat16()
    assert check_linear(run(x), x, own, bias, "float").passed
    assert not check_linear(run(x), x, weight, bias, "float").passed


def test_torchao_says_why_it_does_not_run(torchao, monkeypatch):
    rivals = {rival.name: rival for rival in quantised.RIVALS}
    chosen = (dataclasses.replace(rivals["torchao INT4 weights"], objection=lambda *_: None),)
    monkeypatch.setattr(shift, "RIVALS", chosen)
    names = [c.name for c in prepare("shift", {**CASE, "dtype": "bfloat16"}).contenders]
    assert names[-1] == "torchao INT4 weights"
    torchao.refusal = ImportError("Requires mslk >= 1.0.0\nand more")
    prepared = prepare("shift", {**CASE, "dtype": "bfloat16"})
    assert prepared.not_run == {"torchao INT4 weights": "ImportError: Requires mslk >= 1.0.0"}
    assert [c.name for c in prepared.contenders] == names[:-1]


def test_without_torchao_it_is_said(monkeypatch):
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    not_run = prepare("shift", CASE).not_run
    assert not_run["torchao INT4 weights"] == not_run["torchao FP8"] == "torchao is not installed"


def test_bad_sizes_are_refused():
    with pytest.raises(InputError, match="outputs must be at least 1, not 0"):
        prepare("shift", {**CASE, "outputs": 0})
    with pytest.raises(InputError, match="not 'int8'"):
        prepare("shift", {**CASE, "dtype": "int8"})
