"""IntLinear equals an integer layer written with real integers, and trains straight through."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitrify.errors import InputError, UnsupportedError
from vitrify.nn.integer import IntLinear, fake_quantise


def linear(in_features=24, out_features=7, *, seed=0, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def tokens(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(x, bits):
    """Integer codes and step per row, one row at a time."""
    codes, steps = [], []
    for row in x.double():
        step = max(abs(v) for v in row.tolist()) / (2 ** (bits - 1) - 1)
        codes.append([round(v / step) for v in row.tolist()])
        steps.append(step)
    return torch.tensor(codes, dtype=torch.int64), torch.tensor(steps, dtype=torch.float64)


@pytest.mark.parametrize("bits", [4, 8])
def test_it_equals_a_layer_of_real_integers(bits):
    layer, x = linear(dtype=torch.float64), tokens(5, 24, dtype=torch.float64)
    weight_codes, weight_steps = integers(layer.weight.detach(), bits)
    input_codes, input_steps = integers(x, 8)
    assert weight_codes.abs().max() == 2 ** (bits - 1) - 1
    product = (input_codes @ weight_codes.T) * input_steps[:, None] * weight_steps[None, :] + layer.bias
    out = IntLinear.adopt_(layer, bits)(x)
    torch.testing.assert_close(out, product, rtol=1e-12, atol=1e-12)


def test_adopting_keeps_parameters_keys_and_hooks():
    layer = linear()
    weight, bias, keys, calls = layer.weight, layer.bias, list(layer.state_dict()), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    adopted = IntLinear.adopt_(layer, 4)
    adopted(tokens(3, 24))
    assert adopted is layer
    assert adopted.weight is weight
    assert adopted.bias is bias
    assert list(adopted.state_dict()) == keys
    assert calls == [1]
    assert "bits=4, activation_bits=8" in repr(adopted)


def test_gradients_pass_as_if_nothing_were_rounded():
    layer, x = IntLinear.adopt_(linear(dtype=torch.float64)), tokens(5, 24, dtype=torch.float64).requires_grad_()
    grad = tokens(5, 7, seed=3, dtype=torch.float64)
    layer(x).backward(grad)
    with torch.no_grad():
        weight, rounded = fake_quantise(layer.weight, 8), fake_quantise(x, 8)
    torch.testing.assert_close(x.grad, grad @ weight)
    torch.testing.assert_close(layer.weight.grad, grad.T @ rounded)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


def test_fewer_bits_lose_more():
    eight, four = (IntLinear.adopt_(linear(), bits).quantization_error() for bits in (8, 4))
    assert 0 < eight < 0.01 < four < 0.2
    zero = linear()
    nn.init.zeros_(zero.weight)
    assert IntLinear.adopt_(zero).quantization_error() == 0


def test_rows_of_zeros_and_empty_inputs():
    layer = IntLinear.adopt_(linear())
    assert torch.equal(layer(torch.zeros(2, 24)), layer.bias.expand(2, 7))
    assert layer(torch.zeros(0, 24)).shape == (0, 7)


def test_without_values_there_is_no_error_to_state():
    layer = IntLinear.adopt_(nn.Linear(4, 4, device="meta"))
    assert math.isnan(layer.quantization_error())


def test_a_token_does_not_depend_on_its_neighbours():
    layer, x = IntLinear.adopt_(linear(dtype=torch.float64)), tokens(2, 5, 24, dtype=torch.float64)
    loud = x.clone()
    loud[1] *= 1000
    torch.testing.assert_close(layer(loud)[0], layer(x)[0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_and_autocast(dtype):
    layer, x = IntLinear.adopt_(linear()), tokens(5, 24) * 100
    expected = layer(x)
    tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max().item()
    with torch.autocast("cpu", dtype):
        out = layer(x)
    half = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert out.dtype == half.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=tolerance)
    # The input itself was rounded first, which may move a value to the next of its 8-bit levels.
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=tolerance + 0.02 * expected.abs().max().item())


def test_fullgraph_compile_gives_the_same():
    layer, x = IntLinear.adopt_(linear()), tokens(5, 24)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    layer(x).sum().backward()
    torch.testing.assert_close(compiled.weight.grad, layer.weight.grad)
    assert F.linear(x, layer.weight, layer.bias).sub(layer(x)).abs().max() > 1e-4


def test_bad_input_is_named():
    with pytest.raises(InputError, match="4 or 8 for an integer weight, not 5"):
        IntLinear.adopt_(linear(), 5)
    with pytest.raises(UnsupportedError, match="IntLinear is not a plain"):
        IntLinear.adopt_(IntLinear.adopt_(linear()))
